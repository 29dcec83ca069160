"""Exercises 10 and 11: what VSD and SiD follow, on Gaussians; teacher.py resumes; what choosing by a ratio does."""

import json
import math

import numpy as np
import pytest
import teacher
import torch
import verifier
from conftest import ROOT, alike, call, same, weights

import sample
import train_diffratio
from machinery import checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")


STAGE1, SIGMA = ROOT / "assets" / "digits-stage1.pt", 0.7


def denoiser(mean, std):
    """The best denoiser of N(mean, std^2)."""
    return lambda x, sigma, labels=None: (std**2 * x + SIGMA**2 * mean) / (std**2 + SIGMA**2)


def noised_samples(mean, std):
    """fake, sigma, eps, as the losses take them, and their weights: quadrature, exact for polynomials up to degree 15."""
    nodes, probability = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(8))
    z, eps = torch.meshgrid(nodes, nodes, indexing="ij")
    weight = torch.outer(probability, probability).flatten() / (2 * math.pi)
    fake = (mean + std * z.flatten()).view(-1, 1, 1, 1)
    return fake, torch.full((len(fake),), SIGMA, dtype=torch.float64), eps.reshape(-1, 1, 1, 1), weight


def test_vsd_follows_the_exact_ratio_of_dikl():
    """With exact denoisers its gradient at each sample is that of DiffRatio's reverse KL with the exact h, times w sigma^2."""
    fake, sigma, eps, _ = noised_samples(-0.2, 0.3)
    fake.requires_grad_(True)

    def exact_h(x, sigma, labels):
        moments = torch.tensor([[0.4, math.sqrt(0.5**2 + SIGMA**2)], [-0.2, math.sqrt(0.3**2 + SIGMA**2)]], dtype=torch.float64)
        p, q = (torch.distributions.Normal(*pair) for pair in moments)
        return (p.log_prob(x) - q.log_prob(x)).flatten()

    vsd = torch.autograd.grad(teacher.vsd_loss(denoiser(0.4, 0.5), denoiser(-0.2, 0.3), fake, sigma, eps).sum(), fake)[0]
    ours = torch.autograd.grad(train_diffratio.generator_loss(exact_h, fake, sigma, eps, "dikl").sum(), fake)[0]
    weight = 1 / (fake - denoiser(0.4, 0.5)(fake + SIGMA * eps, sigma)).abs()
    torch.testing.assert_close(vsd, weight * SIGMA**2 * ours)


def test_with_alpha_one_half_sid_follows_the_fisher_divergence(monkeypatch):
    """With alpha = 1, and the student exact, the loss is 0 whatever the samples; its gradient is not."""
    monkeypatch.setattr(teacher, "sample_weight", lambda fake, right: 1.0)
    mean, std = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (-0.2, 0.3))

    def gradient(loss):
        return torch.stack(torch.autograd.grad(loss, (mean, std), retain_graph=True))

    fake, sigma, eps, weight = noised_samples(mean, std)
    x, losses = fake + SIGMA * eps, {}
    fisher = (weight * (denoiser(0.4, 0.5)(x, sigma) - denoiser(mean, std)(x, sigma)).flatten() ** 2).sum()  # D_S follows
    for alpha in (0.5, 1.0):
        monkeypatch.setattr(teacher, "ALPHA", alpha)
        losses[alpha] = (weight * teacher.sid_loss(denoiser(0.4, 0.5), denoiser(-0.2, 0.3), fake, sigma, eps)).sum()
    exact = gradient(fisher) / 2
    torch.testing.assert_close(gradient(losses[0.5]), exact)
    assert abs(losses[1.0].item()) < 1e-12 and torch.dot(gradient(losses[1.0]), exact) > 0
    assert (gradient(losses[1.0]) - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize("method", teacher.METHODS)
def test_teacher_trains_a_generator_and_resumes(tmp_path, method):
    """Two steps, or one and then another, or in micro-batches: the same generator."""
    args = ["--method", method, "--init", STAGE1, "--batch", "16", "--device", "cpu", "--lr", "1e-3", "--lr-decay-kimg", "1"]
    for folder, kimg in (("whole", "0.032"), ("resumed", "0.016"), ("resumed", "0.032")):
        call(teacher, *args, "--kimg", kimg, "--outdir", tmp_path / folder)
    call(teacher, *args, "--kimg", "0.032", "--micro-batch", "8", "--outdir", tmp_path / "micro")
    whole, resumed, micro = (weights(tmp_path / folder / "network.pt") for folder in ("whole", "resumed", "micro"))
    assert same(whole, resumed) and not same(whole, weights(STAGE1)) and alike(whole, micro, weights(STAGE1))
    about = checkpoints.load_network(tmp_path / "whole" / "network.pt", role="generator").about
    assert (about["method"], about["t_init"], about["nimg"]) == (method, 2.5, 32)


def test_flags_that_teacher_does_not_use_are_refused(refused):
    for flag in ("--noise-weight", "--ratio-lr", "--divergence", "--fid-every"):
        assert "unrecognized arguments" in refused(teacher, flag, "1")


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0])
def test_under_noise_even_the_exact_ratio_goes_a_part_of_the_way(sigma):
    """q = N(0, 1), p = N(0.5, 1), both with noise: h(y) = (y/2 - 1/8) / (1 + sigma^2), and E[x | y] = y / (1 + sigma^2)."""
    x, eps = torch.randn(2, 10_000, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = ((x + sigma * eps) / 2 - 1 / 8) / (1 + sigma**2)
    mean = x[range(len(x)), sample.pick(h, range(len(h)), seed=0)[0]].mean().item()
    assert abs(mean - 0.5 / (1 + sigma**2)) < 4 / math.sqrt(len(x)) + 0.5 / 64  # chance, and the bias of 64 candidates


def test_calibration_of_an_exact_ratio():
    rng = torch.Generator().manual_seed(0)
    fake, real = torch.randn(40_000, generator=rng), torch.randn(40_000, generator=rng) + 0.5
    h_real, h_fake = real / 2 - 1 / 8, fake / 2 - 1 / 8
    found = verifier.calibration(h_real, h_fake)
    assert found["error"] < 0.02 and abs(found["mean_ratio"] - 1) < 0.02 and found["loss"] < math.log(2)
    assert verifier.calibration(3 * h_real, 3 * h_fake)["error"] > 0.05


def test_the_verifier_chooses_what_sample_chooses():
    net, ratio = checkpoints.load_network(sample.DIGITS), checkpoints.load_network(ROOT / "assets" / "digits-ratio.pt")
    images, _, sizes = sample.choose(net, ratio, range(12), 5, "cpu", 3, 0.2)
    candidates = verifier.draw_candidates(net, range(12), 5, 4)
    chosen, size = sample.pick(verifier.logits(ratio, candidates, 0.2, 5)[:, :3], range(12), 5)
    torch.testing.assert_close(candidates[torch.arange(12), chosen], images)
    torch.testing.assert_close(size, sizes)


def test_verifier_measures_and_continues(refused, tmp_path, monkeypatch, capsys):
    measure, results = verifier.measure, tmp_path / "r.jsonl"
    brief = lambda dataset, device: measure.Classifier(1, 8, 10).eval().requires_grad_(False)  # noqa: E731
    monkeypatch.setattr(measure, "load_classifier", brief)
    monkeypatch.setattr(verifier, "CANDIDATES", (1, 2))
    monkeypatch.setattr(verifier, "SIGMAS", (0.5,))
    monkeypatch.setitem(verifier.DATA, "digits", dict(samples=32, pool=80, steps=2))
    args = ["--pretrained", STAGE1, "--results", results, "--recipes", "blind"]

    def run(*more):
        torch.manual_seed(0)  # of the classifier above
        call(verifier, *args, *more)
        return results.read_text()

    text = run("trained on")
    rows = [json.loads(line) for line in text.splitlines()]
    assert [(row["recipe"], row["k"]) for row in rows] == [(name, k) for name in ("blind", "trained on") for k in (1, 2)]
    assert all(row["fd_classifier"] > 0 and row["fd_stage1"] > 0 and 1 <= row["ess"] <= 2 for row in rows)
    assert rows[0]["loss"] == pytest.approx(math.log(2)) and (rows[0]["ess"], rows[1]["ess"]) == (1, 2)
    results.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(verifier, "train_on", None)  # a blind choice trains nothing
        assert run().splitlines() == text.splitlines()[:2]
    assert run("trained on") == text and "| trained on, at 0.5 |" in capsys.readouterr().out
    other = tmp_path / "other.pt"  # lines belong to networks, by their content, and to settings
    net = checkpoints.load_network(sample.DIGITS)
    checkpoints.save_network(other, net, **net.about | {"t_init": 1.0})
    for flags in (["--network", other], ["--ratio", other]):
        assert "give another --results" in refused(verifier, *args, *flags)
    with monkeypatch.context() as patch:
        patch.setitem(verifier.DATA, "digits", dict(samples=33, pool=80, steps=2))
        assert "give another --results" in refused(verifier, *args)
    results.write_text(text[:-20])
    assert "r.jsonl: not a file of results" in refused(verifier, *args)
    network, ratio = (ROOT / "assets" / f"fashion-mnist{end}.pt" for end in ("", "-ratio"))
    args += ["--results", tmp_path / "new.jsonl"]
    assert "was not trained with" in refused(verifier, *args, "--ratio", ratio)
    net = checkpoints.load_network(ROOT / "assets" / "digits-ratio.pt")
    for flag in ({"seed": 1}, {"t_init": 1.0}):  # the same run with another flag
        checkpoints.save_network(other, net, **net.about | flag)
        assert "was not trained with" in refused(verifier, *args, "--ratio", other)
    assert "other images" in refused(verifier, *args, "--network", network, "--ratio", ratio)
    assert "none.pt: no such file" in refused(verifier, *args, "--network", tmp_path / "none.pt")


@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
def test_the_verifier_finds_its_networks_in_assets(tmp_path, monkeypatch, name):
    """With no flag but --data; of Fashion-MNIST the stage-1 network too."""
    roles, found = ["generator", "ratio", *["denoiser"] * (name == "fashion-mnist")], []
    monkeypatch.setattr(verifier, "sweep", lambda args, _, *paths: found.extend([*paths[:2], args.pretrained]) or ())
    call(verifier, "--data", name, "--results", tmp_path / "r.jsonl")
    for path, role in zip(found, roles):
        net = checkpoints.load_network(path, role=role)
        assert net.about["data"] == name and not net.config.label_dim
