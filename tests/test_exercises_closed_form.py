"""Exercises 0 and 1: closed forms, the networks in assets/, points in the plane."""

import argparse
import json
import math
import sys

import plane
import pytest
import torch
import warmups
from conftest import ROOT, call

import train_diffratio


def test_f_of_u_over_u_has_another_gradient_which_kl_hides():
    """For Jensen-Shannon and forward KL the sign is wrong. For reverse KL f(u)/u = ln u is f'(u) up to a constant."""
    rows = {row["divergence"]: row for row in warmups.wrong_loss(0)}
    assert rows.keys() == train_diffratio.DIVERGENCES.keys()
    for row in rows.values():
        assert row["f'(u)"] == pytest.approx(row["d/dtheta of the divergence"], abs=1e-9)
    assert rows["dijs"]["f(u)/u"] == pytest.approx(-0.1286, abs=1e-4) and rows["dijs"]["f'(u)"] == pytest.approx(0.0877, abs=1e-4)
    assert rows["dikl"]["f(u)/u"] == pytest.approx(rows["dikl"]["f'(u)"], abs=1e-9)
    assert rows["fkl"]["f(u)/u"] < 0 < rows["fkl"]["f'(u)"]


def test_dijs_is_the_minimax_game_on_the_classifiers_own_loss():
    """The generator's gradient with DiJS is minus that of `ratio_loss`; a blind ratio loses ln 2."""
    torch.manual_seed(0)
    ratio, (real, eps, fake), sigma = plane.Ratio(64), torch.randn(3, 6, 2, 1, 1), torch.rand(6) + 0.1
    fake.requires_grad_(True)
    losses = (train_diffratio.generator_loss(ratio, fake, sigma, eps, "dijs"),
              train_diffratio.ratio_loss(ratio, real, fake, sigma, eps, eps)[0])
    generators, ratios = (torch.autograd.grad(loss.sum(), fake)[0] for loss in losses)
    torch.testing.assert_close(generators, -ratios)
    assert generators.abs().min() > 0
    blind = train_diffratio.ratio_loss(lambda x, *_: 0 * x[:, 0, 0, 0], real, fake, sigma, eps, eps)[0]
    torch.testing.assert_close(blind, torch.full((6,), math.log(2)))


def test_warmups_of_the_networks_in_assets(capsys, tmp_path):
    """The margins allow for weights that are trained again on another machine."""
    call(warmups, "--noises", 2)
    assert "-0.1286" in capsys.readouterr().out

    # Little is left to see, and most of it where there is little noise; above 1 nothing.
    args = argparse.Namespace(noises=2, log=tmp_path / "log.jsonl")
    args.log.write_text('{"nimg": 1, "bands": {"<0.1": {"loss": 0.5}}}\n{"nimg": 1, "fid": 2.0}\n')
    log = {row["sigma"]: row for row in warmups.read_log(0, args)}
    bound = {band: row["ln 2 - cross-entropy"] for band, row in log.items()}
    assert log["<0.1"]["in the log"] == pytest.approx(math.log(2) - 0.5)
    assert 0.005 < bound["<0.1"] < 0.2 and 0.003 < bound["0.1-0.3"] < 0.1
    assert 0 < bound["0.3-1.0"] < 0.02 and bound["<0.1"] > bound["0.3-1.0"]
    assert abs(bound["1.0-3.0"]) < 0.003 and abs(bound[">3.0"]) < 0.003
    assert all(row["right"] == pytest.approx((row["right, data"] + row["right, samples"]) / 2, abs=1e-6) for row in log.values())
    assert log["<0.1"]["right"] > 0.53 and abs(log[">3.0"]["right"] - 0.5) < 0.05

    mean = {row["sigma"]: row["E_q[exp h]"] for row in warmups.calibration(0, args)}
    assert mean.keys() == {0.05, 0.2, 0.5, 2.0} and all(0.75 < value < 1.2 for value in mean.values())
    assert all(abs(mean[level] - 1) < 0.05 for level in (0.5, 2.0))

    # The logit is too small: less data than it says where P < 0.45, more where P > 0.55.
    at = {row["P"]: row for row in warmups.reliability(0, args)}
    low, high = at["0 to 0.45"], at["0.55 to 1"]
    assert min(low["count"], high["count"]) > 200 and low["frequency of data"] < low["ideal: mean P"] - 0.02
    assert high["frequency of data"] > high["ideal: mean P"] + 0.02


@pytest.mark.parametrize("level", [0.05, 0.5, 2.0])
def test_scores_and_divergences_of_mixtures_and_gaussians(level):
    """Scores are gradients of log densities, a density integrates to one, KL on the grid is that of two Gaussians."""
    mixture = plane.spiral(30)
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_(True)
    sigma, double = torch.full((50,), level, dtype=torch.float64), plane.Mixture(mixture.centres.double(), mixture.stds.double())
    torch.testing.assert_close(double.score(x, sigma), torch.autograd.grad(double.log_density(x, sigma).sum(), x)[0])
    line = torch.linspace(-4, 4, 161)
    grid = torch.cartesian_prod(line, line)
    density = mixture.log_density(grid, torch.full((len(grid),), 0.3)).exp()
    assert density.sum().item() * 0.05**2 == pytest.approx(1, abs=1e-4)
    p, s, t = plane.Mixture(torch.zeros(1, 2), torch.tensor([0.4])), 0.3**2, 0.4**2 + 0.3**2
    exact = math.log(t / s) + s / t - 1 + 0.5**2 / (2 * t)
    assert plane.divergence(torch.tensor([[0.5, 0.0]]), p, 0.3) == pytest.approx(exact, rel=1e-3)

    generator, x, sigma = plane.Affine(), x.float(), sigma.float()
    generator.a.data, generator.b.data = torch.tensor([[0.5, 0.2], [-0.1, 0.3]]), torch.tensor([0.2, -0.1])
    covariance = generator.a @ generator.a.T + level**2 * torch.eye(2)
    gaussian = torch.distributions.MultivariateNormal(generator.b, covariance)
    (expected,) = torch.autograd.grad(gaussian.log_prob(x).sum(), x)
    torch.testing.assert_close(generator.score(x, sigma), expected, rtol=1e-4, atol=1e-4)


def test_an_exact_ratio_and_two_exact_denoisers_give_the_same_gradient():
    """So the comparison favours neither."""
    p, q, level = plane.spiral(), plane.spiral(22.5), 0.2
    sigma = torch.full((100,), level)
    x = q.sample(100, torch.Generator().manual_seed(0))
    ratio = lambda x, sigma: p.log_density(x.flatten(1), sigma) - q.log_density(x.flatten(1), sigma)  # noqa: E731
    ideal = lambda m: lambda x, s: (x.flatten(1) + s[:, None] ** 2 * m.score(x.flatten(1), s))[:, :, None, None]  # noqa: E731
    difference = plane.score(ideal(p), x, sigma) - plane.score(ideal(q), x, sigma)
    truth = p.score(x, sigma) - q.score(x, sigma)
    torch.testing.assert_close(difference, truth, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(plane.ratio_gradient(ratio, x, sigma), truth, rtol=1e-3, atol=1e-3)


def test_plane_runs_and_does_not_run_again(refused, tmp_path, capsys, monkeypatch):
    for settings in (plane.COMMON, plane.LOOP):
        monkeypatch.setitem(settings, "steps", 3)
    flags = ["--regimes", "brief teacher", "far, scaled logit", "affine, exact", "MLP, ratio, few points", "affine, scores"]
    flags += ["--results", tmp_path / "rows.jsonl"]
    for part, rows in (("error", 2), ("error", 2), ("fixed-point", 5), ("fixed-point", 5)):
        call(plane, part, *flags)
        lines = (tmp_path / "rows.jsonl").read_text().splitlines()
        assert len(lines) == rows
        assert ("| brief teacher, ratio |" if part == "error" else "| MLP, ratio, few points |") in capsys.readouterr().out
    row = json.loads(lines[0])
    assert row["settings"]["steps"] == 3 and len(row["ratio_error"]) == len(plane.SIGMAS)
    (tmp_path / "rows.jsonl").write_text('{"run": "of another program"}\n')
    assert "give another --results" in refused(plane, "error", *flags)


def test_results_of_the_plane_are_of_its_tables():
    rows = plane.measure.json_lines(ROOT / "exercises" / "results" / "plane.jsonl")
    for part, (table, common, *_) in plane.PARTS.items():
        for regime, changes in table.items():
            settings = json.loads(json.dumps({**common, **changes}))
            found = [r["seed"] for r in rows if (r["part"], r["regime"], r["settings"]) == (part, regime, settings)]
            assert sorted(found) == [0, 1, 2], f"{part}: {regime}"


def test_plane_and_warmups_say_what_is_missing(refused, monkeypatch, tmp_path):
    assert "invalid choice: 'nowhere'" in refused(plane, "error", "--regimes", "nowhere")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert "make exercises" in refused(plane, "error", "--pictures", tmp_path)
    assert "none.jsonl: no such file" in refused(warmups, "log", "--noises", 1, "--log", tmp_path / "none.jsonl")
    assert "unknown" in refused(warmups, "prize")


def test_plane_draws(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(plane.COMMON, "steps", 2)
    call(plane, "--regimes", "far", "--results", tmp_path / "rows.jsonl", "--pictures", tmp_path)
    assert (tmp_path / "plane-field.png").exists()
