"""Facts that have a closed form: ratios, divergences, denoisers and samplers of Gaussians."""

import math
import types

import numpy as np
import plane
import pytest
import torch
from check import F_OF_U
from conftest import call
from torch import nn
from torch.distributions import Normal

import pretrain
import sample
import train_diffratio
from machinery import training
from machinery.checkpoints import load_network
from networks import Config

P = plane.Mixture(torch.tensor([[0.4, 0.0]]), torch.tensor([0.5]))  # N(mean, std^2)
Q = plane.Mixture(torch.tensor([[-0.2, 0.3]]), torch.tensor([0.4]))


@pytest.fixture(scope="module")
def trained_ratio():
    settings = dict(plane.COMMON, steps=1500, batch=1024, lr=1e-2)
    return plane.train_ratio(P, Q, settings, seed=0)


@pytest.mark.parametrize("level", [0.05, 0.2, 0.5, 1.0])
def test_ratio_and_its_gradient_match_two_gaussians(trained_ratio, level):
    """Logits within 12 % of their spread, gradients within 20 % of the scores' difference.
    CPUs round differently, which acts as a seed: eight reached 7 and 12 %."""
    rng, sigma = torch.Generator().manual_seed(1), torch.full((2000,), level)
    x = Q.sample(2000, rng) + level * torch.randn(2000, 2, generator=rng)
    exact = P.log_density(x, sigma) - Q.log_density(x, sigma)
    scores = P.score(x, sigma) - Q.score(x, sigma)
    learned = trained_ratio(x[:, :, None, None], sigma)
    gradient = plane.ratio_gradient(trained_ratio, x, sigma)
    assert (learned - exact).square().mean().sqrt() < 0.12 * exact.std()
    assert (gradient - scores).square().mean().sqrt() < 0.20 * scores.square().mean().sqrt()


@pytest.mark.parametrize("name", train_diffratio.DIVERGENCES)
def test_loss_is_the_derivative_of_f_at_the_inverse_ratio(name):
    """loss(h) = f'(exp(-h)), up to a constant that no gradient sees."""
    h = torch.linspace(-4, 4, 41, dtype=torch.float64)
    u = (-h).exp().requires_grad_(True)
    derivative = torch.autograd.grad(F_OF_U[name](u).sum(), u)[0]
    constant = train_diffratio.DIVERGENCES[name](h) - derivative
    torch.testing.assert_close(constant, constant[:1].expand(41))


class GaussianDenoiser(nn.Module):
    """The ideal denoiser of N(mean, std^2) data: the posterior mean. std 0: of a single image."""

    config = Config(img_resolution=8, img_channels=1)

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x, sigma, labels=None):
        s = sigma[:, None, None, None]
        return self.mean + self.std**2 / (self.std**2 + s**2) * (x - self.mean)


def test_the_denoiser_of_a_point_mass_alone_has_no_loss():
    torch.manual_seed(0)
    x0, eps, sigma = torch.rand(1, 1, 8, 8) - 0.5, torch.randn(6, 1, 8, 8), torch.logspace(-2, 1, 6)
    net, other = GaussianDenoiser(x0, 0), GaussianDenoiser(x0 + 0.1, 0)
    x = x0.expand(6, 1, 8, 8)
    torch.testing.assert_close(pretrain.denoising_loss(net, x, sigma, eps), torch.zeros(6))
    assert (pretrain.denoising_loss(other, x, sigma, eps) > 0.1).all()


def test_a_network_trained_on_one_image_approaches_its_known_denoiser(tmp_path, device):
    """Stage 1 on a single image: D(x0 + sigma eps; sigma) comes close to x0 at all noise levels."""
    image = np.random.default_rng(0).integers(64, 192, (1, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "one.npz", images=image)
    call(pretrain, "--data", tmp_path / "one.npz", "--batch", 32, "--kimg", 3, "--lr", 2e-3,
         "--lr-rampup-kimg", 0, "--device", device, "--outdir", tmp_path)
    net, x0 = load_network(tmp_path / "network.pt"), torch.from_numpy(image).view(8, 8) / 127.5 - 1
    sigma, eps = torch.tensor([0.2, 1.0, 5.0]), torch.randn(3, 1, 8, 8)
    error = net(x0 + sigma[:, None, None, None] * eps, sigma) - x0
    assert error.square().mean().sqrt() < 0.15  # the image has 0.28; three seeds: 0.08 to 0.10


def test_heun_reaches_a_known_gaussian_and_its_error_falls_with_the_square_of_the_steps(device):
    """The flow is linear: x(0) - mean = (x(sigma_max) - mean) std / sqrt(std^2 + sigma_max^2)."""
    mean, std, sigma_max = 0.3, 0.25, 80.0
    z = torch.randn(64, 1, 4, 4, generator=torch.manual_seed(0)).to(device)
    exact = mean + std / math.sqrt(std**2 + sigma_max**2) * (sigma_max * z - mean)
    net = GaussianDenoiser(mean, std)
    error = {n: (sample.heun(net, z, steps=n) - exact).std().item() for n in (18, 36, 72)}
    # The smallest error is 9e-4; float32 rounding in the denoiser is 1e-7 of its output.
    assert error[18] < 0.1 * std and error[72] < 0.01 * std
    assert 3 < error[18] / error[36] < 6 and 3 < error[36] / error[72] < 6


def test_resampling_by_the_exact_ratio_moves_the_generator_to_the_data(device):
    """One pixel; q = N(0, 1), p = N(0.5, 0.8^2), read at a small noise level."""
    net = GaussianDenoiser(0, 1e6)  # returns its noise
    net.about = {"role": "generator", "t_init": 1.0}
    net.config = Config(img_resolution=1, img_channels=1, channel_mult=(1,))

    def exact_ratio(x, sigma, labels=None):
        p, q = Normal(0.5, (0.8**2 + sigma**2).sqrt()), Normal(0, (1 + sigma**2).sqrt())
        return p.log_prob(x.flatten()) - q.log_prob(x.flatten())

    (x, _, size), (plain, _, _) = (
        sample.choose(net, exact_ratio, range(4000), 0, device, candidates=n, sigma=0.05)
        for n in (8, 1))
    # Seeds of images: all CPUs draw the same. Mean of 4000: 0.016 by chance; of 8: 0.05 too low.
    assert abs(plain.mean()) < 0.05 and abs(x.mean() - 0.5) < 0.08 and abs(x.std() - 0.8) < 0.06
    assert 1 < size.mean() < 8


def test_weights_over_noise_levels():
    """`edm` is sigma^2 / c_out of EDM's Table 1; all are what their names say."""
    sigma = torch.tensor([0.01, 0.5, 24.0])
    c_out = sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    wanted = {"none": sigma**0, "sigma": sigma, "sigma2": sigma**2, "edm": sigma**2 / c_out}
    found = {name: weight(sigma) for name, weight in train_diffratio.NOISE_WEIGHTS.items()}
    torch.testing.assert_close(found, wanted)


def test_the_log_sums_the_size_of_each_samples_gradient_by_noise_level():
    sums, sigma = {}, torch.tensor([0.05, 0.2, 0.25, 5.0])
    fake = torch.zeros(4, 1, 1, 2, requires_grad=True)
    training.Run.add_gradient(types.SimpleNamespace(add=sums.update), sigma, fake)
    weight = torch.tensor([1.0, 2, 3, float("inf")]).view(4, 1, 1, 1)  # fp16 may overflow
    (weight * fake * torch.tensor([3.0, 4])).sum().backward()
    assert sums["gradient"].tolist() == [[5, 25, 0, 0, 0]]
    bands = training.band_sums(sigma, sigma, sigma)
    nothing = dict(bands=bands, generator_loss=torch.zeros(()), gradient=torch.zeros(1, 5))
    record, _ = training.stage2_line(nothing)  # all steps overflowed
    assert {band["gradient_share"] for band in record["bands"].values()} == {0}
