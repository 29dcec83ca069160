"""Exercises 10 and 11: what VSD and SiD follow, on Gaussians; that teacher.py runs and continues; what choosing by a ratio does."""

import json
import math
import os
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, same, weights

from machinery import checkpoints
import networks
from machinery import training
import sample
import train_diffratio

sys.path.insert(0, str(ROOT / "exercises"))
import teacher
import verifier

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The path of a stage-1 network for the digits, untrained and as small as can be."""
    torch.manual_seed(0)
    config = networks.Config(img_resolution=8, img_channels=1, model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    path = tmp_path_factory.mktemp("tiny") / "network.pt"
    checkpoints.save_network(path, networks.Denoiser(config), role="denoiser")
    return path


# ---------------------------------------------------------------------------------------------------------
# Gaussians: data N(0.4, 0.5^2), samples G = mean + std z. The best denoiser of N(m, s^2) is (s^2 x + sigma^2 m) / (s^2 + sigma^2).

SIGMA = 0.7


def denoiser(mean, std):
    return lambda x, sigma, labels=None: (std**2 * x + SIGMA**2 * mean) / (std**2 + SIGMA**2)


def noised_samples(mean, std):
    """fake, sigma, eps, as the losses take them, and their weights: quadrature, exact for polynomials up to degree 15."""
    nodes, probability = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(8))
    z, eps = torch.meshgrid(nodes, nodes, indexing="ij")
    weight = torch.outer(probability, probability).flatten() / (2 * math.pi)
    fake = (mean + std * z.flatten()).view(-1, 1, 1, 1)
    return fake, torch.full((len(fake),), SIGMA, dtype=torch.float64), eps.reshape(-1, 1, 1, 1), weight


def parameters(mean=-0.2, std=0.3):
    return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (mean, std)]


def test_vsd_follows_the_exact_ratio_of_dikl():
    """With exact denoisers its gradient at each sample is that of DiffRatio's reverse KL with the exact h, times w sigma^2."""
    fake, sigma, eps, _ = noised_samples(-0.2, 0.3)
    fake.requires_grad_(True)

    def exact_h(x, sigma, labels):
        moments = [torch.tensor([m, math.sqrt(s**2 + SIGMA**2)], dtype=torch.float64) for m, s in ((0.4, 0.5), (-0.2, 0.3))]
        densities = [torch.distributions.Normal(*pair) for pair in moments]
        return (densities[0].log_prob(x) - densities[1].log_prob(x)).flatten()

    vsd = torch.autograd.grad(teacher.vsd_loss(denoiser(0.4, 0.5), denoiser(-0.2, 0.3), fake, sigma, eps).sum(), fake)[0]
    ours = torch.autograd.grad(train_diffratio.generator_loss(exact_h, fake, sigma, eps, "dikl").sum(), fake)[0]
    weight = 1 / (fake - denoiser(0.4, 0.5)(fake + SIGMA * eps, sigma)).abs()
    torch.testing.assert_close(vsd, weight * SIGMA**2 * ours)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_rests_where_student_and_teacher_agree(monkeypatch, alpha):
    monkeypatch.setattr(teacher, "ALPHA", alpha)
    fake, sigma, eps, _ = noised_samples(-0.2, 0.3)
    fake.requires_grad_(True)
    loss = teacher.sid_loss(denoiser(0.4, 0.5), denoiser(0.4, 0.5), fake, sigma, eps)
    assert not loss.any() and not torch.autograd.grad(loss.sum(), fake)[0].any()


def sid_gradient(monkeypatch, alpha):
    """(E[L], its gradient by mean and std of the samples) of SiD without the weight, the student exact."""
    monkeypatch.setattr(teacher, "ALPHA", alpha)
    monkeypatch.setattr(teacher, "sample_weight", lambda fake, right: 1.0)
    mean, std = parameters()
    fake, sigma, eps, weight = noised_samples(mean, std)
    loss = (weight * teacher.sid_loss(denoiser(0.4, 0.5), denoiser(-0.2, 0.3), fake, sigma, eps)).sum()
    return loss.item(), torch.stack(torch.autograd.grad(loss, (mean, std)))


def test_with_alpha_one_half_sid_follows_the_fisher_divergence(monkeypatch):
    """As the docstring says. With alpha = 1, and the student exact, the loss is 0 whatever the samples; its gradient is not."""
    mean, std = parameters()
    fake, sigma, eps, weight = noised_samples(mean, std)
    x = fake + SIGMA * eps
    fisher = (weight * (denoiser(0.4, 0.5)(x, sigma) - denoiser(mean, std)(x, sigma)).flatten() ** 2).sum()  # D_S follows
    exact = torch.stack(torch.autograd.grad(fisher, (mean, std))) / 2
    torch.testing.assert_close(sid_gradient(monkeypatch, 0.5)[1], exact)
    loss, gradient = sid_gradient(monkeypatch, 1.0)
    assert abs(loss) < 1e-12
    assert torch.dot(gradient, exact) > 0 and (gradient - exact).norm() > 0.1 * exact.norm()


# ---------------------------------------------------------------------------------------------------------
# The scripts.


@pytest.mark.parametrize("method", teacher.METHODS)
def test_teacher_trains_a_generator_and_continues(call, tiny, tmp_path, monkeypatch, method):
    """Two steps in one go, or stopped after the first: the same generator, which sample.py takes, and a distance in the log."""
    args = ["--method", method, "--init", tiny, "--kimg", "0.064", "--batch", "32", "--device", "cpu", "--fid-every", "0.064",
            "--fid-images", "40", "--fid-features", tiny, "--lr", "1e-3"]  # fmt: skip
    call(teacher, *args, "--outdir", tmp_path / "whole")
    advance = training.Run.advance

    def signalled(run):
        if run.nimg == 0:
            os.kill(os.getpid(), signal.SIGINT)
        advance(run)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(training.Run, "advance", signalled)
        call(teacher, *args, "--outdir", tmp_path / "parts")
    call(teacher, *args, "--outdir", tmp_path / "parts")
    whole = weights(tmp_path / "whole" / "network.pt")
    assert same(whole, weights(tmp_path / "parts" / "network.pt")) and not same(whole, weights(tiny))
    about = checkpoints.load_network(tmp_path / "whole" / "network.pt", role="generator").about
    assert (about["method"], about["t_init"], about["nimg"]) == (method, 2.5, 64)
    assert [json.loads(line)["fid"] > 0 for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines() if "fid" in line] == [True]


def test_exact_ratio_moves_samples_towards_the_data():
    """q = N(0, 1), p = N(0.5, 1), h = x / 2 - 1/8. K = 1 is plain sampling; the mean for K = 2 is E[d/2 tanh(d/4)], d = x1 - x2."""
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h, means = x / 2 - 1 / 8, {}
    for k in (1, 2, 4, 16):
        chosen, size = sample.pick(h[:, :k], range(len(h)), seed=0)
        means[k] = x[torch.arange(len(x)), chosen].mean().item()
        assert size.min() >= 1 and size.max() <= k + 1e-9
        if k == 1:
            assert not chosen.any()
    nodes, probability = np.polynomial.hermite_e.hermegauss(60)
    d = math.sqrt(2) * nodes
    exact = (probability * d / 2 * np.tanh(d / 4)).sum() / math.sqrt(2 * math.pi)
    error = 4 / math.sqrt(len(x))  # four standard deviations
    assert abs(means[1]) < error and abs(means[2] - exact) < error and abs(means[16] - 0.5) < error
    assert means[1] < means[2] < means[4] < means[16]


def test_calibration_and_temperature_of_an_exact_ratio():
    rng = torch.Generator().manual_seed(0)
    fake, real = torch.randn(40_000, generator=rng), torch.randn(40_000, generator=rng) + 0.5
    h_real, h_fake = real / 2 - 1 / 8, fake / 2 - 1 / 8
    found = verifier.calibration(h_real, h_fake)
    assert found["calibration_error"] < 0.02 and abs(found["mean_ratio"] - 1) < 0.02 and found["loss"] < math.log(2)
    assert abs(verifier.temperature(3 * h_real, 3 * h_fake) - 1 / 3) < 0.02  # the score has a deviation of 0.007
    assert verifier.calibration(3 * h_real, 3 * h_fake)["calibration_error"] > 0.05


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0])
def test_under_noise_even_the_exact_ratio_goes_a_part_of_the_way(sigma):
    """q = N(0, 1), p = N(0.5, 1), both with noise: h(y) = (y/2 - 1/8) / (1 + sigma^2), and E[x | y] = y / (1 + sigma^2)."""
    x, eps = torch.randn(2, 10_000, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = ((x + sigma * eps) / 2 - 1 / 8) / (1 + sigma**2)
    chosen, _ = sample.pick(h, range(len(h)), seed=0)
    mean = x[torch.arange(len(x)), chosen].mean().item()
    assert abs(mean - 0.5 / (1 + sigma**2)) < 4 / math.sqrt(len(x)) + 0.5 / 64  # chance, and the bias of 64 candidates


@pytest.mark.parametrize("best", [False, True])
def test_the_verifier_chooses_what_sample_chooses(best):
    net, ratio = checkpoints.load_network(sample.DIGITS), checkpoints.load_network(ROOT / "assets" / "digits-ratio.pt")
    images, _, sizes = sample.choose(net, ratio, range(12), 5, "cpu", 3, 0.2, best=best)
    candidates = verifier.draw_candidates(net, range(12), 5, 4)
    chosen, size = sample.pick(verifier.logits(ratio, candidates, 0.2, 5, draws=2)[0, :, :3], range(12), 5, best)
    torch.testing.assert_close(candidates[torch.arange(12), chosen], images)
    torch.testing.assert_close(size, sizes)


def test_verifier_measures_and_continues(call, refused, tiny, tmp_path, monkeypatch, capsys):
    classifier = verifier.measure.classifier
    monkeypatch.setattr(classifier, "load", lambda dataset: classifier.Classifier(1, 8, 10).eval().requires_grad_(False))
    monkeypatch.setattr(verifier, "CANDIDATES", (1, 2))
    monkeypatch.setattr(verifier, "SIGMAS", (0.5,))
    monkeypatch.setattr(verifier, "CHECK_IMAGES", 50)
    monkeypatch.setattr(verifier, "RECIPES", {name: verifier.RECIPES[name] for name in ("blind", "all together")})
    args = ["--pretrained", tiny, "--samples", "32", "--pool", "80", "--steps", "2", "--outdir", tmp_path, "--results", tmp_path / "r.jsonl"]
    torch.manual_seed(0)
    call(verifier, *args)
    text = (tmp_path / "r.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [(r["recipe"], r["k"], r["best"]) for r in rows[:3]] == [("blind", 1, False), ("blind", 2, False), ("blind", 2, True)]
    assert len(rows) == 6 and all(r["fd_classifier"] > 0 and r["fd_stage1"] > 0 and 1 <= r["ess"] <= 2 for r in rows)
    assert rows[0]["loss"] == pytest.approx(math.log(2)) and rows[0]["ess"] == 1 and rows[1]["ess"] == 2
    (tmp_path / "r.jsonl").unlink()
    torch.manual_seed(0)  # of the classifier above
    call(verifier, *args, "--recipes", "blind", "--outdir", tmp_path / "none")
    assert (tmp_path / "r.jsonl").read_text().splitlines() == text.splitlines()[:3]
    assert not (tmp_path / "none").exists()  # nothing was trained on
    torch.manual_seed(0)
    call(verifier, *args)
    assert (tmp_path / "r.jsonl").read_text() == text
    assert "| all together | 0.5 |" in capsys.readouterr().out

    # What is there belongs to these networks, by their content, and to these settings.
    other = tmp_path / "other.pt"
    net = checkpoints.load_network(sample.DIGITS)
    checkpoints.save_network(other, net, **net.about | {"t_init": 1.0})
    for flags in (["--network", other], ["--ratio", other], ["--steps", "3"], ["--samples", "33"], ["--pool", "81"]):
        assert "give another --results" in refused(verifier, *args, *flags)
    assert "give another --outdir" in refused(verifier, *args, "--network", other, "--results", tmp_path / "new" / "s.jsonl")
    (tmp_path / "r.jsonl").write_text(text[:-20])
    assert "r.jsonl: not a file of results" in refused(verifier, *args)


def test_the_verifier_refuses_networks_of_other_images(refused, tmp_path):
    garments = [ROOT / "assets" / f"fashion-mnist{end}.pt" for end in ("", "-ratio")]
    new = ["--results", tmp_path / "new.jsonl"]
    assert "was not trained with" in refused(verifier, "--ratio", garments[1], *new)
    assert "other images" in refused(verifier, "--network", garments[0], "--ratio", garments[1], *new)
    assert "none.pt: no such file" in refused(verifier, "--network", tmp_path / "none.pt", *new)
    for few in (["--pool", "9"], ["--samples", "3"]):
        assert "too few" in refused(verifier, *few, *new)


@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
def test_the_verifier_finds_its_networks_in_assets(call, tmp_path, monkeypatch, name):
    """With no flag but --data; of Fashion-MNIST the stage-1 network too, so that nothing must be trained first."""
    roles = {"network": "generator", "ratio": "ratio"} | ({"pretrained": "denoiser"} if name == "fashion-mnist" else {})
    seen = []
    monkeypatch.setattr(verifier, "sweep", lambda args, seed, settings, done: seen.append(dict(zip(roles, [*verifier.networks_of(args, seed), args.pretrained]))) or ())
    monkeypatch.setattr(verifier, "table", lambda rows: "")
    call(verifier, "--data", name, "--results", tmp_path / "r.jsonl")
    for key, role in roles.items():
        net = verifier.checkpoints.load_network(seen[0][key], role=role)
        assert net.about["data"] == name and not net.config.label_dim
