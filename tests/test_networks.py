"""Facts about the networks: sizes, preconditioning, conditioning, magnitude preservation, and what the ratio shares."""

import dataclasses
import math

import pytest
import torch

from machinery import checkpoints
import networks
from machinery.files import UserError
from networks import NETWORKS, Config, Denoiser, RatioNetwork, parameter_count

SMALL = dict(img_resolution=16, img_channels=3, model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,))
ARCHITECTURES = ["ddpmpp", "ncsnpp", "adm", "edm2"]


def small(architecture, **changes):
    width = 64 if architecture in ("adm", "edm2") else 32  # these attend with 64 channels a head
    return Config(**{**SMALL, "architecture": architecture, "model_channels": width, **changes})


def randomise(net, seed=0):
    """Random weights everywhere: what starts at zero would hide differences."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator) * (0.5 / max(p[0].numel(), 1) ** 0.5 if p.ndim > 1 else 0.3)
    return net


@pytest.mark.parametrize(
    "config, expected",
    [
        # Published: 55.734 M and 56.398 M with `map_augment`, a layer of 9 x 128 or 9 x 256 weights that is left out.
        (NETWORKS["cifar10"], 55_733_891 - 9 * 128),
        (dataclasses.replace(NETWORKS["cifar10"], architecture="ncsnpp"), 56_397_827 - 9 * 256),
        (NETWORKS["imagenet64"], 295_899_267),
        (NETWORKS["edm2-xs"], 124_713_253),
        (NETWORKS["edm2-s"], 280_212_837),
        (NETWORKS["edm2-xxl"], 1_523_164_773),
    ],
)
def test_parameter_counts_are_the_published_ones(config, expected):
    with torch.device("meta"):
        assert parameter_count(Denoiser(config)) == expected


@pytest.mark.parametrize("architecture, share", [("ddpmpp", 0.35), ("ncsnpp", 0.36), ("adm", 0.31)])
def test_ratio_network_is_an_encoder_not_a_second_unet(architecture, share):
    config = NETWORKS["imagenet64"] if architecture == "adm" else dataclasses.replace(NETWORKS["cifar10"], architecture=architecture)
    with torch.device("meta"):
        assert parameter_count(RatioNetwork(config)) / parameter_count(Denoiser(config)) == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize("label_dim", [0, 5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shapes_and_conditioning(architecture, label_dim):
    """The output has the input's shape and depends on the class if, and only if, the network is conditional."""
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
def test_ratio_starts_undecided_and_from_the_encoder_of_stage_1(architecture):
    net = randomise(Denoiser(small(architecture))).eval()
    ratio = RatioNetwork(net.config).eval()
    ratio.load_encoder(net)
    x, sigma = torch.randn(2, 3, 16, 16), torch.ones(2)
    with torch.no_grad():
        assert torch.equal(ratio(x, sigma), torch.zeros(2))
        c_in, c_noise = networks.preconditioning("edm", sigma, 0.5)[2:]
        emb = ratio.encoder.embed(c_noise)
        torch.testing.assert_close(ratio.encoder.encode(c_in[:, None, None, None] * x, emb)[-1], net.features(x, sigma))


def test_preconditioning_keeps_inputs_and_targets_at_unit_variance():
    """The conditions from which EDM derives its coefficients (Appendix B.6), for data of standard deviation 0.5."""
    torch.manual_seed(0)
    for sigma in (0.01, 0.5, 10.0):
        x, n = 0.5 * torch.randn(200_000, dtype=torch.float64), torch.randn(200_000, dtype=torch.float64)
        c_skip, c_out, c_in, c_noise = networks.preconditioning("edm", torch.tensor(sigma, dtype=torch.float64), 0.5)
        noisy = x + sigma * n
        # The standard deviation of 200,000 draws is off by 0.0016 by chance.
        assert (c_in * noisy).std().item() == pytest.approx(1, abs=0.01)
        assert ((x - c_skip * noisy) / c_out).std().item() == pytest.approx(1, abs=0.01)
        assert c_noise.item() == pytest.approx(math.log(sigma) / 4)


def test_vp_noise_label_inverts_the_schedule():
    """t(sigma) of the variance preserving SDE: sigma^2 = exp(beta_d t^2 / 2 + beta_min t) - 1 (EDM, Table 1)."""
    sigma = torch.tensor([0.01, 1.0, 50.0], dtype=torch.float64)
    t = networks.preconditioning("vp", sigma, 0.5)[3] / 999
    torch.testing.assert_close((0.5 * 19.9 * t**2 + 0.1 * t).exp() - 1, sigma**2)


def test_a_network_starts_close_to_its_skip_connection():
    """EDM starts with a last layer near zero, so D starts at c_skip x."""
    torch.manual_seed(0)
    for architecture in ARCHITECTURES:
        net = Denoiser(small(architecture)).eval()
        x = torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            # The last layer's weights are 1e-5 of the usual ones, in EDM2 and ADM zero.
            torch.testing.assert_close(net(x, torch.full((2,), 0.5)), 0.5 * x, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("mode, shape", [("down", (2, 3, 4, 4)), ("up", (2, 3, 16, 16))])
@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_resampling_keeps_constants(mode, shape, taps):
    x = torch.full((2, 3, 8, 8), 0.7)
    y = networks.resample(x, mode, networks.filter_2d(taps))
    assert y.shape == shape
    torch.testing.assert_close(y[..., 1:-1, 1:-1], torch.full_like(y[..., 1:-1, 1:-1], 0.7))


def test_attention_layout_is_head_channel_triple():
    """qkv channel c of the convolution is head c // (3 d), channel (c // 3) % d, and q, k or v by c % 3 (the fastest)."""
    n, heads, d, h, w = 2, 3, 4, 2, 2
    qkv = torch.randn(n, heads * d * 3, h, w)
    out = torch.zeros(n, heads * d, h * w)
    for head in range(heads):
        q, k, v = (qkv.flatten(2)[:, [3 * (head * d + c) + i for c in range(d)]] for i in range(3))  # [n, d, h w]
        weights = (q.transpose(1, 2) @ k / d**0.5).softmax(dim=-1)
        out[:, head * d : (head + 1) * d] = v @ weights.transpose(1, 2)
    torch.testing.assert_close(networks.attention(qkv, heads), out.view(n, -1, h, w))


# ---------------------------------------------------------------------------------------------------------
# EDM2.


def test_magnitude_preserving_operations_keep_unit_variance():
    torch.manual_seed(0)
    a, b = torch.randn(64, 32, 16, 16), torch.randn(64, 96, 16, 16)
    conv = networks.MPConv(32, 48, 3)
    with torch.no_grad():
        interior = conv(a)[..., 1:-1, 1:-1]  # at the border the padding takes some
    for y in (networks.mp_silu(a), networks.mp_sum(a, b[:, :32], 0.3), interior, networks.MPFourier(256)(torch.randn(500))):
        assert y.square().mean().sqrt().item() == pytest.approx(1, abs=0.03)
    joined = networks.mp_cat(a, b)
    assert joined[:, :32].square().sum() / joined[:, 32:].square().sum() == pytest.approx(1, abs=0.02)  # alike
    assert joined.square().mean().sqrt().item() == pytest.approx(1, abs=0.02)


def test_forced_weight_normalisation_undoes_growth_without_changing_the_function():
    """Scaling an EDM2 weight changes no output; `normalize_weights` brings it back to unit norm per output."""
    torch.manual_seed(0)
    net = Denoiser(small("edm2")).eval()
    for name, p in net.named_parameters():
        if name.endswith("gain"):  # they start at zero, and with them the output
            p.data.fill_(0.5)
    x, sigma = torch.randn(2, 3, 16, 16), torch.ones(2)
    before = net(x, sigma)
    for module in net.modules():
        if isinstance(module, networks.MPConv):
            module.weight.data *= 7
    networks.normalize_weights(net)
    # The normalisation adds 1e-4 to a norm. So weights are off by up to 1e-4 of themselves, in each of some ten layers.
    torch.testing.assert_close(net(x, sigma), before, rtol=1e-3, atol=1e-3)
    for module in net.modules():
        if isinstance(module, networks.MPConv):
            norms = module.weight.flatten(1).square().mean(dim=1).sqrt()
            torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------
# Averages, files, bad sizes.


def test_ema_fades_by_half_every_halflife():
    net, ema = Denoiser(small("ddpmpp")), Denoiser(small("ddpmpp"))
    for p in net.parameters():
        p.data.fill_(0.0)
    for p in ema.parameters():
        p.data.fill_(1.0)
    for _ in range(10):
        networks.update_ema(ema, net, batch=50, halflife=500)
    for p in ema.parameters():
        torch.testing.assert_close(p.data, torch.full_like(p, 0.5))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_network_comes_back_the_same(architecture, tmp_path):
    net = randomise(Denoiser(small(architecture, label_dim=5))).eval()
    checkpoints.save_network(tmp_path / "network.pt", net, role="generator", t_init=2.5)
    back = checkpoints.load_network(tmp_path / "network.pt", role="generator")
    assert back.config == net.config and back.about == {"role": "generator", "t_init": 2.5} and not back.training
    x, sigma, labels = torch.randn(2, 3, 16, 16), torch.ones(2), torch.tensor([0, 4])
    assert torch.equal(back(x, sigma, labels), net(x, sigma, labels))
    with pytest.raises(UserError, match="holds a generator, but a denoiser"):
        checkpoints.load_network(tmp_path / "network.pt", role="denoiser")


def test_a_damaged_network_file_is_refused(tmp_path):
    path = tmp_path / "network.pt"
    checkpoints.save_network(path, Denoiser(small("ddpmpp")), role="denoiser")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="network.pt"):
        checkpoints.load_network(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(img_resolution=30, channel_mult=(1, 2, 2)), "cannot be halved 2 times"),
        (dict(model_channels=30), "multiple of"),
        (dict(architecture="dit"), "unknown architecture"),
        (dict(num_blocks=0), "positive"),
    ],
)
def test_impossible_sizes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        Config(**{**SMALL, **changes})


def test_a_norm_behind_a_frozen_encoder_trains():
    """Channels-last, as networks are placed on the CPU: there PyTorch crashes if a norm's input needs no gradient."""
    ratio = networks.place(networks.RatioNetwork(networks.NETWORKS["digits"]), torch.device("cpu"))
    ratio.encoder.requires_grad_(False)
    torch.nn.init.ones_(ratio.head.weight)
    x = torch.randn(4, 1, 8, 8)
    ratio(x, torch.ones(4)).sum().backward()
    assert ratio.norm.weight.grad.abs().sum() > 0 and all(p.grad is None for p in ratio.encoder.parameters())
