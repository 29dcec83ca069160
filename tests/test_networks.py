"""Facts about the networks: sizes, preconditioning, conditioning, EDM2's magnitudes, averages."""

import copy
import dataclasses
import math

import gpu
import pytest
import torch
import torch.nn.functional as F
from gpu import randomise

import networks
from networks import NETWORKS, ConfigError, Denoiser, RatioNetwork, parameter_count

ARCHITECTURES = list(gpu.ARCHITECTURES)


def small(architecture, **changes):
    return dataclasses.replace(gpu.small(architecture), **{"label_dim": 0, **changes})


@pytest.mark.parametrize("config, count, share", [
    # Published: 55.734 M and 56.398 M with `map_augment`, 9 x 128 or 9 x 256 weights left out here.
    (NETWORKS["cifar10"], 55_733_891 - 9 * 128, 0.352),
    (dataclasses.replace(NETWORKS["cifar10"], architecture="ncsnpp"), 56_397_827 - 9 * 256, 0.360),
    (NETWORKS["imagenet64"], 295_899_267, 0.310),
    (NETWORKS["edm2-xs"], 124_713_253, 0.312), (NETWORKS["edm2-s"], 280_212_837, 0.311),
    (dataclasses.replace(NETWORKS["edm2-s"], model_channels=448), 1_523_164_773, 0.310),
])
def test_sizes_are_the_published_ones_and_the_ratio_network_has_a_third(config, count, share):
    with torch.device("meta"):
        assert parameter_count(Denoiser(config)) == count
        assert parameter_count(RatioNetwork(config)) / count == pytest.approx(share, abs=0.001)


def test_ddpmpp_attends_in_the_published_blocks():
    with torch.device("meta"):
        names = Denoiser(NETWORKS["cifar10"]).state_dict()
    blocks = [f"enc.16x16_block{i}" for i in range(4)] + ["dec.8x8_in0", "dec.16x16_block4"]
    assert [name for name in names if "qkv.w" in name] == [f"unet.{b}.qkv.weight" for b in blocks]


@pytest.mark.parametrize("label_dim", [0, 5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shapes_and_conditioning(architecture, label_dim):
    """The output has the input's shape, and depends on the class if the network is conditional."""
    net = randomise(Denoiser(small(architecture, label_dim=label_dim))).eval()
    ratio = randomise(RatioNetwork(net.config)).eval()
    x, sigma = torch.randn(4, 3, 16, 16), torch.tensor([0.01, 0.5, 2.5, 80.0])
    a, b, none = (y if y is None else torch.full((4,), y) for y in (1, 3, None))
    with torch.no_grad():
        assert net(x, sigma, a).shape == x.shape and ratio(x, sigma, a).shape == (4,)
        assert torch.equal(net(x, sigma, a), net(x, sigma, b)) == (label_dim == 0)
        assert torch.equal(ratio(x, sigma, a), ratio(x, sigma, b)) == (label_dim == 0)
        assert net(x, sigma, none).isfinite().all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_where_networks_start(architecture):
    """D at its skip connection, c_skip x; the ratio undecided, with the encoder of stage 1."""
    torch.manual_seed(0)
    net, x, sigma = Denoiser(small(architecture)).eval(), torch.randn(2, 3, 16, 16), torch.ones(2)
    ratio = RatioNetwork(net.config).eval()
    with torch.no_grad():
        # The last layer's weights are 1e-5 of the usual ones, in EDM2 and ADM zero.
        torch.testing.assert_close(net(x, sigma / 2), 0.5 * x, atol=1e-3, rtol=1e-3)
        ratio.load_encoder(randomise(net))
        assert torch.equal(ratio(x, sigma), torch.zeros(2))
        features = net.unet.features(x, sigma)
        torch.testing.assert_close(ratio.encoder.features(x, sigma), features)


@pytest.mark.parametrize("kind", [Denoiser, RatioNetwork])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_device_changes_outputs_and_gradients_by_rounding_alone(architecture, kind, device):
    """Some 40 layers, sums of up to 1000 products: 6e-8 sqrt(40 * 1000) = 1e-5. TF32 has 5e-4."""
    net, found = randomise(kind(small(architecture, label_dim=3))), []
    x, sigma, labels = torch.randn(4, 3, 16, 16), torch.logspace(-2, 1.9, 4), torch.arange(4) % 3
    for one in (copy.deepcopy(net), networks.place(net, torch.device(device))):
        images, *rest = (t.detach().to(next(one.parameters()).device) for t in (x, sigma, labels))
        y = one(images.requires_grad_(), *rest)
        y.square().sum().backward()
        found.append(([y], [images.grad], [p.grad for p in one.parameters() if p.grad is not None]))
    for a, b in zip(*found):
        assert gpu.apart(b, a) < 5e-5


@pytest.mark.parametrize("level", [0.01, 0.5, 10.0])
def test_preconditioning_keeps_inputs_and_targets_at_unit_variance(level):
    """The conditions from which EDM derives its coefficients (Appendix B.6); data of std 0.5."""
    torch.manual_seed(0)
    x, n = torch.randn(2, 200_000, dtype=torch.float64)
    sigma = torch.tensor(level, dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = networks.preconditioning("edm", sigma, 0.5)
    noisy = 0.5 * x + sigma * n
    # The standard deviation of 200,000 draws is off by 0.0016 by chance.
    assert (c_in * noisy).std().item() == pytest.approx(1, abs=0.01)
    assert ((0.5 * x - c_skip * noisy) / c_out).std().item() == pytest.approx(1, abs=0.01)
    assert c_noise.item() == pytest.approx(math.log(level) / 4)


def test_vp_noise_label_inverts_the_schedule():
    """Variance preserving SDE: sigma^2 = exp(beta_d t^2 / 2 + beta_min t) - 1; EDM, Table 1."""
    sigma = torch.tensor([0.01, 1.0, 50.0], dtype=torch.float64)
    t = networks.preconditioning("vp", sigma, 0.5)[3] / 999
    torch.testing.assert_close((0.5 * 19.9 * t**2 + 0.1 * t).exp() - 1, sigma**2)


@pytest.mark.parametrize("mode, shape", [("down", (2, 3, 4, 4)), ("up", (2, 3, 16, 16))])
@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_resampling_is_a_convolution_with_the_filter_of_these_taps(mode, shape, taps):
    """As EDM defines it: zeros between the pixels when doubling, every second one when halving."""
    x, kernel = torch.randn(2, 3, 8, 8), torch.tensor(taps).float()
    kernel = (kernel[:, None] * kernel / kernel.sum() ** 2).expand(3, 1, -1, -1)
    how = dict(stride=2, padding=len(taps) // 2 - 1, groups=3)
    wanted = F.conv2d(x, kernel, **how) if mode == "down" else F.conv_transpose2d(x, 4 * kernel, **how)
    assert wanted.shape == shape
    torch.testing.assert_close(networks.resample(x, mode, smooth=len(taps) == 4), wanted)


def test_attention_layout_is_head_channel_triple():
    """qkv's channel c is head c // (3 d), channel (c // 3) % d, and q, k or v by c % 3."""
    n, heads, d, h, w = 2, 3, 4, 2, 2
    qkv = torch.randn(n, heads * d * 3, h, w)
    out = torch.zeros(n, heads * d, h * w)
    for head in range(heads):
        channels = [[3 * (head * d + c) + i for c in range(d)] for i in range(3)]
        q, k, v = (qkv.flatten(2)[:, index] for index in channels)  # each [n, d, h w]
        weights = (q.transpose(1, 2) @ k / d**0.5).softmax(dim=-1)
        out[:, head * d : (head + 1) * d] = v @ weights.transpose(1, 2)
    torch.testing.assert_close(networks.attention(qkv, heads), out.view(n, -1, h, w))


def test_magnitude_preserving_operations_keep_unit_variance():
    torch.manual_seed(0)
    a, b = torch.randn(64, 32, 16, 16), torch.randn(64, 96, 16, 16)
    conv = networks.MPConv(32, 48, 3)
    with torch.no_grad():
        interior = conv(a)[..., 1:-1, 1:-1]  # at the border the padding takes some
    fourier = networks.MPFourier(256)(torch.randn(500))
    for y in (networks.mp_silu(a), networks.mp_sum(a, b[:, :32], 0.3), interior, fourier):
        assert y.square().mean().sqrt().item() == pytest.approx(1, abs=0.03)
    joined = networks.mp_cat(a, b)
    first, second = joined[:, :32], joined[:, 32:]  # contribute equally
    assert first.square().sum() / second.square().sum() == pytest.approx(1, abs=0.02)
    assert joined.square().mean().sqrt().item() == pytest.approx(1, abs=0.02)


def test_forced_weight_normalisation_undoes_growth_without_changing_the_function(device):
    """Scaling an EDM2 weight changes no output; `normalize_weights` brings it back to unit norm."""
    torch.manual_seed(0)
    net = networks.place(randomise(Denoiser(small("edm2"))).eval(), torch.device(device))
    layers = [module for module in net.modules() if isinstance(module, networks.MPConv)]
    x, sigma = torch.randn(2, 3, 16, 16).to(device), torch.ones(2, device=device)
    networks.normalize_weights(net)
    before = net(x, sigma)
    for layer in layers:
        layer.weight.data *= 7
    networks.normalize_weights(net)
    # The normalisation adds 1e-4 to a norm, so each of some ten layers is off by up to 1e-4.
    torch.testing.assert_close(net(x, sigma), before, rtol=1e-3, atol=1e-3)
    for layer in layers:
        norms = layer.weight.flatten(1).square().mean(dim=1).sqrt()
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-3)


def test_ema_fades_by_half_every_halflife_and_faster_at_the_start(device):
    net, ema = (torch.nn.ParameterList([torch.full((3,), value, device=device)])
                for value in (0.0, 1.0))
    for _ in range(10):
        networks.update_ema(ema, net, batch=50, halflife=500)
    torch.testing.assert_close(ema[0].cpu().data, torch.full((3,), 0.5))
    networks.update_ema(ema, net, batch=50, halflife=500, nimg=1000)  # half-life: 5 % of 1000
    torch.testing.assert_close(ema[0].cpu().data, torch.full((3,), 0.25))


@pytest.mark.parametrize("changes, message", [
    (dict(img_resolution=30, channel_mult=(1, 2, 2)), "cannot be halved 2 times"),
    (dict(model_channels=30), "multiple of"), (dict(num_blocks=0), "must be positive"),
    (dict(architecture="dit"), "unknown architecture"), (dict(dropout=1.0), "dropout in"),
    (dict(preconditioning="flow"), "unknown preconditioning"),
])
def test_impossible_configurations_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(small("ddpmpp"), **changes)


def test_a_norm_behind_a_frozen_encoder_trains(device):
    """Channels-last, as on the CPU: there PyTorch crashes if a norm's input needs no gradient."""
    ratio = networks.place(RatioNetwork(NETWORKS["digits"]), torch.device(device))
    ratio.encoder.requires_grad_(False)
    torch.nn.init.ones_(ratio.head.weight)
    x = torch.randn(4, 1, 8, 8, device=device)
    ratio(x, torch.ones(4, device=device)).sum().backward()
    assert ratio.norm.weight.grad.abs().sum() > 0
