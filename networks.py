"""The networks: denoisers D(x; sigma) of EDM and EDM2, and the ratio network h(x, sigma) built on their encoders.

Four architectures, with the module names and shapes of the published EDM and EDM2 checkpoints so that those load by
name:

    ddpmpp   DDPM++ of EDM (arXiv 2206.00364, Table 7): CIFAR-10, FFHQ, AFHQv2, and our small presets
    ncsnpp   NCSN++ of EDM: Fourier embedding, a residual pyramid of the input in the encoder, wider resampling filter
    adm      ADM (arXiv 2105.05233) as EDM trained it: ImageNet 64x64
    edm2     the magnitude-preserving U-Net of EDM2 (arXiv 2312.02696), configuration G: ImageNet 512x512 latents

Each is an encoder class and a U-Net that inherits from it and adds the decoder. `Denoiser` wraps a U-Net in the
preconditioning, `RatioNetwork` wraps the encoder alone in the same preconditioning and adds a head with one logit.
Nothing here reads a file: `checkpoints.load_network(path)` does.

Shapes: x [N, C, H, W] float32, sigma [N] (standard deviation of the noise, data scaled to [-1, 1]), labels [N] int64
or None.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn

from machinery.files import UserError

# ---------------------------------------------------------------------------------------------------------
# Configurations.


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides the shape and the function of a network. Plain values: it is stored in every checkpoint."""

    architecture: str = "ddpmpp"  # ddpmpp, ncsnpp, adm or edm2
    img_resolution: int = 32  # pixels, height = width
    img_channels: int = 3
    label_dim: int = 0  # number of classes, 0 = unconditional
    model_channels: int = 128  # channels at multiplier 1
    channel_mult: tuple = (2, 2, 2)  # one entry per resolution level, highest resolution first
    num_blocks: int = 4  # residual blocks per level
    attn_resolutions: tuple = (16,)  # resolutions with self-attention
    dropout: float = 0.0  # probability
    preconditioning: str = "edm"  # edm, vp or ve: see `preconditioning`
    sigma_data: float = 0.5  # standard deviation of the data that the preconditioning assumes

    def __post_init__(self):
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))  # lists from a file become tuples
        object.__setattr__(self, "attn_resolutions", tuple(self.attn_resolutions))
        if self.architecture not in ("ddpmpp", "ncsnpp", "adm", "edm2"):
            raise UserError(f"unknown architecture {self.architecture!r}; known: ddpmpp, ncsnpp, adm, edm2")
        sizes = (self.img_resolution, self.img_channels, self.model_channels, self.num_blocks, *self.channel_mult)
        whole = all(isinstance(n, int) for n in (*sizes, *self.attn_resolutions, self.label_dim))
        if not self.channel_mult or not whole or min(sizes) < 1 or self.label_dim < 0:
            raise UserError(f"network sizes must be positive whole numbers: {self}")
        if not all(isinstance(n, (int, float)) for n in (self.dropout, self.sigma_data)):
            raise UserError(f"dropout and sigma_data must be numbers: {self}")
        if not 0 <= self.dropout < 1 or not 0 < self.sigma_data < math.inf:
            raise UserError(f"dropout must be in [0, 1) and sigma_data above 0: {self}")
        if self.preconditioning not in ("edm", "vp", "ve"):
            raise UserError(f"unknown preconditioning {self.preconditioning!r}; known: edm, vp, ve")
        halvings = len(self.channel_mult) - 1
        if self.img_resolution % 2**halvings:
            raise UserError(
                f"images of {self.img_resolution}x{self.img_resolution} cannot be halved {halvings} times, as a network "
                f"with {halvings + 1} levels does; resize them to a multiple of {2**halvings} or use fewer levels"
            )
        if self.model_channels % 4:
            raise UserError(f"model_channels must be a multiple of 4, not {self.model_channels}")


_EDM2 = dict(architecture="edm2", img_resolution=64, img_channels=4, label_dim=1000, channel_mult=(1, 2, 3, 4),
             num_blocks=3, attn_resolutions=(16, 8))  # fmt: skip

NETWORKS = {
    "digits": Config(img_resolution=8, img_channels=1, model_channels=32, channel_mult=(1, 2), num_blocks=1,
                     attn_resolutions=()),
    "fashion-mnist": Config(img_resolution=28, img_channels=1, model_channels=16, channel_mult=(1, 2, 4), num_blocks=1,
                            attn_resolutions=()),
    "pictures": Config(img_resolution=64, model_channels=64, channel_mult=(1, 2, 3, 4), num_blocks=2),
    "cifar10": Config(dropout=0.13),  # EDM, Table 7: 55.7 M parameters
    "imagenet64": Config("adm", 64, 3, 1000, 192, (1, 2, 3, 4), 3, (32, 16, 8), dropout=0.10),
    "edm2-xs": Config(**_EDM2, model_channels=128),
    "edm2-s": Config(**_EDM2, model_channels=192),
    "edm2-m": Config(**_EDM2, model_channels=256, dropout=0.10),
    "edm2-l": Config(**_EDM2, model_channels=320, dropout=0.10),
    "edm2-xl": Config(**_EDM2, model_channels=384, dropout=0.10),
    "edm2-xxl": Config(**_EDM2, model_channels=448, dropout=0.10),
}  # fmt: skip


def preconditioning(kind, sigma, sigma_data):
    """c_skip, c_out, c_in, c_noise of D(x; sigma) = c_skip x + c_out F(c_in x, c_noise); EDM, Table 1."""
    if kind == "edm":
        total = (sigma**2 + sigma_data**2).sqrt()
        return sigma_data**2 / total**2, sigma * sigma_data / total, 1 / total, sigma.log() / 4
    one = torch.ones_like(sigma)
    if kind == "vp":  # t(sigma) inverts the variance preserving schedule with beta_d = 19.9, beta_min = 0.1
        t = ((0.1**2 + 2 * 19.9 * (1 + sigma**2).log()).sqrt() - 0.1) / 19.9
        return one, -sigma, 1 / (sigma**2 + 1).sqrt(), 999 * t
    if kind == "ve":
        return one, sigma, one, (sigma / 2).log()
    raise UserError(f"unknown preconditioning {kind!r}; known: edm, vp, ve")


def one_hot(labels, label_dim, like):
    """Labels [N] int64 as float32 [N, label_dim]; None is the all-zero row, which EDM uses for "no class"."""
    if labels is None:
        return like.new_zeros(len(like), label_dim)
    return F.one_hot(labels, label_dim).to(like)


# ---------------------------------------------------------------------------------------------------------
# Pieces that the architectures share.


def own_precision(x):
    """Context in which operations run in the type of x, whatever autocast does to them.

    On GPUs autocast computes norms and up-sampling in float32, and autograd then keeps float32 of them. The kernel of
    GroupNorm takes its sums in float32 all the same, and repeating pixels has nothing to round.
    """
    return torch.autocast(x.device.type, enabled=False)


def resample(x, mode, kernel=None):
    """Halve ("down") or double ("up") the resolution of x; "keep" returns x.

    kernel: the low-pass filter [1, 1, k, k] with sum one; None and k = 2 are the 2x2 box.
    """
    if mode == "keep":
        return x
    if kernel is None or kernel.shape[-1] == 2:  # plain averaging and plain repetition
        with own_precision(x):
            return F.avg_pool2d(x, 2) if mode == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")
    kernel, padding = kernel.expand(x.shape[1], 1, -1, -1), (kernel.shape[-1] - 1) // 2
    if mode == "down":
        return F.conv2d(x, kernel, stride=2, padding=padding, groups=x.shape[1])
    return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=x.shape[1])


def filter_2d(taps):
    """Outer product of the 1-d filter with itself, summing to one: [1, 1, k, k]."""
    taps = torch.tensor(taps, dtype=torch.float32)
    return (taps[:, None] * taps[None, :] / taps.sum() ** 2)[None, None]


def attention(qkv, heads, transform=lambda x: x):
    """Self-attention over positions. qkv [N, 3C, H, W], channels laid out [head, channel, (q, k, v)] -> [N, C, H, W].

    `transform` acts on [3, N, H W, heads, C / heads] (EDM2 normalises there). The one copy makes the channels of a head
    neighbours in memory: without that the fused kernels refuse, and the full [H W, H W] matrix is computed and kept.
    """
    n, c, h, w = qkv.shape
    qkv = qkv.reshape(n, heads, -1, 3, h * w).permute(3, 0, 4, 1, 2).contiguous()
    q, k, v = transform(qkv).transpose(2, 3)  # each [N, heads, H W, C / heads]
    return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(n, c // 3, h, w)


# ---------------------------------------------------------------------------------------------------------
# EDM: DDPM++, NCSN++ and ADM. One encoder and one U-Net; the architectures differ in the numbers below.

_DDPMPP = dict(eps=1e-6, skip_scale=0.5**0.5, adaptive_scale=False, resample_proj=True, taps=(1, 1))
_EDM_BLOCKS = {  # adaptive_scale: the embedding scales and shifts after norm1, instead of being added before it
    "ddpmpp": _DDPMPP,
    "ncsnpp": dict(_DDPMPP, taps=(1, 3, 3, 1)),
    "adm": dict(eps=1e-5, skip_scale=1.0, adaptive_scale=True, resample_proj=False, taps=(1, 1)),
}


def initialise(module, architecture, gain=1.0):
    """Start values of EDM: Xavier uniform times `gain` (DDPM++, NCSN++); PyTorch's own, or zero (ADM). Returns `module`.

    ADM's Kaiming uniform times sqrt(1/3), for weights and biases, is what PyTorch's layers start with.
    """
    if architecture != "adm":
        nn.init.xavier_uniform_(module.weight, gain=gain)
    elif gain < 0.1:
        nn.init.zeros_(module.weight)
    if module.bias is not None and (architecture != "adm" or gain < 0.1):
        nn.init.zeros_(module.bias)
    return module


class GroupNorm(nn.GroupNorm):
    """GroupNorm with at least 4 channels a group and at most 32 groups; its result has the type of its input."""

    def __init__(self, channels, eps):
        groups = min(32, channels // 4)
        if channels % groups:
            raise UserError(f"{channels} channels do not divide into {groups} groups; choose model_channels as a multiple of 32")
        super().__init__(groups, channels, eps)

    def forward(self, x):
        if self.weight.requires_grad and not x.requires_grad:
            x = x.contiguous()  # behind a frozen encoder, PyTorch 2.13 on the CPU ends in a crash with channels-last
        with own_precision(x):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Resample(nn.Module):
    """Change of resolution without weights. The filter is a buffer because published checkpoints hold it."""

    def __init__(self, mode, taps):
        super().__init__()
        self.mode = mode
        self.register_buffer("resample_filter", filter_2d(taps))

    def forward(self, x):
        return resample(x, self.mode, self.resample_filter)


class Conv2d(nn.Conv2d):
    """Convolution, padded to keep the size, after a change of resolution ("up", "down" or "keep")."""

    def __init__(self, in_channels, out_channels, kernel, mode="keep", taps=(1, 1)):
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        self.mode = mode
        self.register_buffer("resample_filter", None if mode == "keep" else filter_2d(taps))

    def forward(self, x):
        return super().forward(resample(x, self.mode, self.resample_filter))


class FusedDownConv2d(Conv2d):
    """3x3 convolution followed by [1, 3, 3, 1] down-sampling, both padded at once: NCSN++'s auxiliary residual.

    The convolution is not cropped to the image before the filter is applied, which changes the border pixels.
    """

    def forward(self, x):
        x = F.conv2d(x, self.weight, padding=2)
        kernel = self.resample_filter.expand(x.shape[1], 1, -1, -1)
        return F.conv2d(x, kernel, stride=2, groups=x.shape[1]) + self.bias.to(x.dtype)[:, None, None]


class SinusoidalEmbedding(nn.Module):
    """c_noise [N] -> [N, width]: sines and cosines at geometric frequencies, ordered as the architecture wants them."""

    def __init__(self, width, architecture):
        super().__init__()
        self.half, self.adm = width // 2, architecture == "adm"

    def forward(self, c_noise):
        exponent = torch.arange(self.half, dtype=torch.float32, device=c_noise.device)
        exponent = exponent / (self.half if self.adm else self.half - 1)
        angle = c_noise[:, None] * 10000**-exponent
        pair = (angle.cos(), angle.sin()) if self.adm else (angle.sin(), angle.cos())
        return torch.cat(pair, dim=1)


class FourierEmbedding(nn.Module):
    """c_noise [N] -> [N, width]: sines and cosines at random frequencies of standard deviation 16 (NCSN++)."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("freqs", torch.randn(width // 2) * 16)

    def forward(self, c_noise):
        angle = c_noise[:, None] * (2 * math.pi * self.freqs)
        return torch.cat((angle.sin(), angle.cos()), dim=1)


class Block(nn.Module):
    """Residual block of EDM's U-Nets with optional change of resolution and self-attention.

    x [N, in_channels, H, W], emb [N, emb_channels] -> [N, out_channels, H', W'].
    """

    def __init__(self, config, in_channels, out_channels, mode="keep", attend=False):
        super().__init__()
        arch = config.architecture
        kind = _EDM_BLOCKS[arch]
        eps, taps = kind["eps"], kind["taps"]
        self.dropout, self.skip_scale, self.adaptive_scale = config.dropout, kind["skip_scale"], kind["adaptive_scale"]
        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = initialise(Conv2d(in_channels, out_channels, 3, mode, taps), arch)
        self.affine = initialise(
            nn.Linear(4 * config.model_channels, out_channels * (2 if self.adaptive_scale else 1)), arch
        )
        self.norm1 = GroupNorm(out_channels, eps)
        self.conv1 = initialise(Conv2d(out_channels, out_channels, 3), arch, 1e-5)
        self.skip = None
        if in_channels != out_channels or (mode != "keep" and kind["resample_proj"]):
            self.skip = initialise(Conv2d(in_channels, out_channels, 1, mode, taps), arch)
        elif mode != "keep":
            self.skip = Resample(mode, taps)
        self.heads = (out_channels // 64 if arch == "adm" else 1) if attend else 0
        if self.heads:  # none in ADM's narrowest networks
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = initialise(Conv2d(out_channels, 3 * out_channels, 1), arch, 0.2**0.5)
            self.proj = initialise(Conv2d(out_channels, out_channels, 1), arch, 1e-5)

    def forward(self, x, emb):
        shortcut = x if self.skip is None else self.skip(x)
        params = self.affine(emb)[:, :, None, None]
        x = self.conv0(F.silu(self.norm0(x)))
        if self.adaptive_scale:
            scale, shift = params.to(x.dtype).chunk(2, dim=1)
            x = F.silu(torch.addcmul(shift, self.norm1(x), scale + 1))
        else:
            x = F.silu(self.norm1(x + params))
        x = self.conv1(F.dropout(x, self.dropout, self.training))
        x = (shortcut + x) * self.skip_scale
        if self.heads:
            x = (x + self.proj(attention(self.qkv(self.norm2(x)), self.heads))) * self.skip_scale
        return x


class Encoder(nn.Module):
    """Noise-level and class embedding, and the encoder half of EDM's U-Nets."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        arch, width = config.architecture, config.model_channels
        emb_channels, noise_channels = 4 * width, width * (2 if arch == "ncsnpp" else 1)
        self.map_noise = FourierEmbedding(noise_channels) if arch == "ncsnpp" else SinusoidalEmbedding(noise_channels, arch)
        if config.label_dim and arch == "adm":
            self.map_label = nn.Linear(config.label_dim, emb_channels, bias=False)
            nn.init.normal_(self.map_label.weight)
        elif config.label_dim:
            self.map_label = initialise(nn.Linear(config.label_dim, noise_channels), arch)
        self.map_layer0 = initialise(nn.Linear(noise_channels, emb_channels), arch)
        self.map_layer1 = initialise(nn.Linear(emb_channels, emb_channels), arch)

        self.enc = nn.ModuleDict()
        channels = width * config.channel_mult[0] if arch == "adm" else width
        aux_channels = config.img_channels
        self.skip_channels = []  # of the outputs that the decoder receives, in order
        for level, mult in enumerate(config.channel_mult):
            res = config.img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = initialise(Conv2d(config.img_channels, channels, 3), arch)
            else:
                self.enc[f"{res}x{res}_down"] = Block(config, channels, channels, mode="down")
                if arch == "ncsnpp":
                    self.enc[f"{res}x{res}_aux_residual"] = initialise(
                        FusedDownConv2d(aux_channels, channels, 3, "down", _EDM_BLOCKS[arch]["taps"]), arch
                    )
                    aux_channels = channels
            self.skip_channels.append(channels)
            for i in range(config.num_blocks):
                attend = res in config.attn_resolutions
                self.enc[f"{res}x{res}_block{i}"] = Block(config, channels, width * mult, attend=attend)
                channels = width * mult
                self.skip_channels.append(channels)

    def embed(self, c_noise, labels=None):
        """c_noise [N], labels [N] or None -> embedding [N, 4 model_channels]."""
        emb, label_dim = self.map_noise(c_noise), self.config.label_dim
        label = one_hot(labels, label_dim, c_noise) if label_dim else None
        if self.config.architecture == "adm":
            emb = self.map_layer1(F.silu(self.map_layer0(emb)))
            return F.silu(emb + self.map_label(label) if label_dim else emb)
        if label_dim:
            emb = emb + self.map_label(label * label_dim**0.5)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def encode(self, x, emb):
        """x [N, C, H, W], already scaled by c_in -> the encoder's outputs, highest resolution first."""
        skips, aux = [], x
        for name, module in self.enc.items():
            if name.endswith("aux_residual"):  # NCSN++: the pyramid of the input joins the last output
                aux = skips[-1] = (skips[-1] + module(aux)) * 0.5**0.5
            else:
                x = module(skips[-1] if skips else x, emb) if isinstance(module, Block) else module(x)
                skips.append(x)
        return skips


class UNet(Encoder):
    """The encoder with EDM's decoder: F(c_in x, c_noise, labels) of the preconditioned denoiser."""

    def __init__(self, config):
        super().__init__(config)
        arch, levels = config.architecture, config.channel_mult
        channels, skip_channels = self.skip_channels[-1], list(self.skip_channels)
        self.dec = nn.ModuleDict()
        for level in reversed(range(len(levels))):
            res = config.img_resolution >> level
            if level == len(levels) - 1:
                self.dec[f"{res}x{res}_in0"] = Block(config, channels, channels, attend=True)
                self.dec[f"{res}x{res}_in1"] = Block(config, channels, channels)
            else:
                self.dec[f"{res}x{res}_up"] = Block(config, channels, channels, mode="up")
            for i in range(config.num_blocks + 1):
                # ADM attends in every block of a level in the list, DDPM++ and NCSN++ in the last one.
                attend = res in config.attn_resolutions and (arch == "adm" or i == config.num_blocks)
                out_channels = config.model_channels * levels[level]
                self.dec[f"{res}x{res}_block{i}"] = Block(config, channels + skip_channels.pop(), out_channels, attend=attend)
                channels = out_channels
        norm = GroupNorm(channels, _EDM_BLOCKS[arch]["eps"])
        conv = initialise(Conv2d(channels, config.img_channels, 3), arch, 1e-5)
        if arch == "adm":
            self.out_norm, self.out_conv = norm, conv
        else:
            self.dec[f"{res}x{res}_aux_norm"], self.dec[f"{res}x{res}_aux_conv"] = norm, conv

    def forward(self, x, c_noise, labels=None):
        emb = self.embed(c_noise, labels)
        skips = self.encode(x, emb)
        x = skips[-1]
        for name, module in self.dec.items():
            if "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            if name.endswith("_aux_norm"):
                x = F.silu(module(x))
            elif name.endswith("_aux_conv"):
                x = module(x)
            else:
                x = module(x, emb)
        return self.out_conv(F.silu(self.out_norm(x))) if self.config.architecture == "adm" else x


# ---------------------------------------------------------------------------------------------------------
# EDM2: every layer preserves the magnitude of its input in expectation (arXiv 2312.02696, Section 2 and Appendix B).


def mp_normalize(x, dims=None):
    """Scale x to unit root mean square over `dims` (default: all but the first)."""
    dims = list(range(1, x.ndim)) if dims is None else dims
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    return x / (1e-4 + norm * math.sqrt(norm.numel() / x.numel())).to(x.dtype)


def mp_silu(x):
    """SiLU divided by its root mean square on unit Gaussian input; EDM2, Equation 81."""
    return F.silu(x) / 0.596


def mp_sum(a, b, t):
    """(1 - t) a + t b, rescaled for independent inputs of unit magnitude; EDM2, Equation 88."""
    return torch.lerp(a, b.to(a.dtype), t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a, b):
    """Concatenate over channels so that both inputs contribute alike; EDM2, Equation 103 with t = 1/2."""
    na, nb = a.shape[1], b.shape[1]
    scale = math.sqrt((na + nb) / 2)
    return torch.cat([a * (scale / math.sqrt(na)), b * (scale / math.sqrt(nb))], dim=1)


class MPConv(nn.Module):
    """Convolution (kernel 1 or 3) or linear layer (kernel 0) with unit-norm weights and no bias; EDM2, Equation 47.

    While training, call `normalize_weights` after each optimiser step (forced weight normalisation).
    """

    def __init__(self, in_channels, out_channels, kernel):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *((kernel, kernel) if kernel else ())))

    def forward(self, x, gain=1.0):
        weight = mp_normalize(self.weight) * (gain / math.sqrt(self.weight[0].numel()))
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2) if weight.ndim == 4 else F.linear(x, weight)


class MPFourier(nn.Module):
    """c_noise [N] -> [N, width]: cosines of random frequency and phase, of unit magnitude; EDM2, Equation 75."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(width))
        self.register_buffer("phases", 2 * math.pi * torch.rand(width))

    def forward(self, c_noise):
        return (c_noise[:, None] * self.freqs + self.phases).cos() * math.sqrt(2)


class EDM2Block(nn.Module):
    """Residual block of EDM2. x [N, in_channels, H, W], emb [N, emb_channels] -> [N, out_channels, H', W']."""

    def __init__(self, config, in_channels, out_channels, decoder=False, mode="keep", attend=False):
        super().__init__()
        self.decoder, self.mode, self.dropout = decoder, mode, config.dropout
        self.heads = out_channels // 64 if attend else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(in_channels if decoder else out_channels, out_channels, 3)
        self.emb_linear = MPConv(config.model_channels * max(config.channel_mult), out_channels, 0)
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        self.conv_skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, 3 * out_channels, 1) if self.heads else None
        self.attn_proj = MPConv(out_channels, out_channels, 1) if self.heads else None

    def forward(self, x, emb):
        x = resample(x, self.mode)
        if not self.decoder:
            x = x if self.conv_skip is None else self.conv_skip(x)
            x = mp_normalize(x, dims=[1])  # pixel norm: keeps the main path's magnitude in check
        y = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = mp_silu(y * scale[:, :, None, None].to(y.dtype))
        y = self.conv_res1(F.dropout(y, self.dropout, self.training))
        if self.decoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, 0.3)
        if self.heads:  # cosine attention
            y = attention(self.attn_qkv(x), self.heads, lambda qkv: mp_normalize(qkv, dims=[-1]))
            x = mp_sum(x, self.attn_proj(y), 0.3)
        return x.clip(-256, 256)  # safe in float16


class EDM2Encoder(nn.Module):
    """Noise-level and class embedding, and the encoder half of EDM2's U-Net."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        widths = [config.model_channels * mult for mult in config.channel_mult]
        self.emb_fourier = MPFourier(widths[0])
        self.emb_noise = MPConv(widths[0], max(widths), 0)
        self.emb_label = MPConv(config.label_dim, max(widths), 0) if config.label_dim else None
        self.enc = nn.ModuleDict()
        channels = config.img_channels + 1  # a channel of ones takes the place of biases
        self.skip_channels = []
        for level, width in enumerate(widths):
            res = config.img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = MPConv(channels, width, 3)
                channels = width
            else:
                self.enc[f"{res}x{res}_down"] = EDM2Block(config, channels, channels, mode="down")
            self.skip_channels.append(channels)
            for i in range(config.num_blocks):
                attend = res in config.attn_resolutions
                self.enc[f"{res}x{res}_block{i}"] = EDM2Block(config, channels, width, attend=attend)
                channels = width
                self.skip_channels.append(channels)

    def embed(self, c_noise, labels=None):
        """c_noise [N], labels [N] or None -> embedding [N, widest level]."""
        emb = self.emb_noise(self.emb_fourier(c_noise))
        if self.emb_label is not None:
            label_dim = self.config.label_dim
            label = one_hot(labels, label_dim, c_noise)
            emb = mp_sum(emb, self.emb_label(label * math.sqrt(label_dim)), 0.5)
        return mp_silu(emb)

    def encode(self, x, emb):
        """x [N, C, H, W], already scaled by c_in -> the encoder's outputs, highest resolution first."""
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips = []
        for module in self.enc.values():
            x = module(x, emb) if isinstance(module, EDM2Block) else module(x)
            skips.append(x)
        return skips


class EDM2UNet(EDM2Encoder):
    """The encoder with EDM2's decoder."""

    def __init__(self, config):
        super().__init__(config)
        levels, channels, skip_channels = config.channel_mult, self.skip_channels[-1], list(self.skip_channels)
        self.dec = nn.ModuleDict()
        for level in reversed(range(len(levels))):
            res, width = config.img_resolution >> level, config.model_channels * levels[level]
            if level == len(levels) - 1:
                self.dec[f"{res}x{res}_in0"] = EDM2Block(config, channels, channels, decoder=True, attend=True)
                self.dec[f"{res}x{res}_in1"] = EDM2Block(config, channels, channels, decoder=True)
            else:
                self.dec[f"{res}x{res}_up"] = EDM2Block(config, channels, channels, decoder=True, mode="up")
            for i in range(config.num_blocks + 1):
                attend = res in config.attn_resolutions
                joined = channels + skip_channels.pop()
                self.dec[f"{res}x{res}_block{i}"] = EDM2Block(config, joined, width, decoder=True, attend=attend)
                channels = width
        self.out_conv = MPConv(channels, config.img_channels, 3)
        self.out_gain = nn.Parameter(torch.zeros([]))

    def forward(self, x, c_noise, labels=None):
        emb = self.embed(c_noise, labels)
        skips = self.encode(x, emb)
        x = skips[-1]
        for name, block in self.dec.items():
            x = block(mp_cat(x, skips.pop()) if "_block" in name else x, emb)
        return self.out_conv(x, gain=self.out_gain)


@torch.no_grad()
def normalize_weights(net):
    """Forced weight normalisation (EDM2, Equation 66): rewrite every `MPConv` weight normalised.

    To be called after each optimiser step; without it the weights would grow and so the effective learning rate
    shrink. Does nothing to the other architectures.
    """
    for module in net.modules():
        if isinstance(module, MPConv):
            module.weight.copy_(mp_normalize(module.weight))


# ---------------------------------------------------------------------------------------------------------
# The two networks of the method.


class Denoiser(nn.Module):
    """The preconditioned denoiser D(x; sigma) of EDM, Equation 7; at a fixed sigma, a one-step generator.

    `net(x, sigma, labels)` with x [N, C, H, W] float32, sigma [N], labels [N] int64 or None returns the denoised x,
    [N, C, H, W] float32.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        if config.architecture == "edm2":  # attribute names as in the published checkpoints
            self.unet = EDM2UNet(config)
            self.logvar_fourier = MPFourier(128)
            self.logvar_linear = MPConv(128, 1, 0)
        else:
            self.model = UNet(config)

    @property
    def backbone(self):
        return self.unet if self.config.architecture == "edm2" else self.model

    def forward(self, x, sigma, labels=None):
        x = x.float().contiguous()  # the memory format is that of the weights, not that of the images
        c_skip, c_out, c_in, c_noise = preconditioning(
            self.config.preconditioning, sigma.float()[:, None, None, None], self.config.sigma_data
        )
        return c_skip * x + c_out * self.backbone(c_in * x, c_noise.flatten(), labels).float()

    def features(self, x, sigma, labels=None):
        """The encoder's last activation, [N, C', H', W']."""
        return _encode(self.backbone, self.config, x, sigma, labels)

    def logvar(self, sigma):
        """EDM2's learned log variance u(sigma) of the denoising error, [N]; arXiv 2312.02696, Equation 21."""
        c_noise = preconditioning(self.config.preconditioning, sigma, self.config.sigma_data)[3]
        return self.logvar_linear(self.logvar_fourier(c_noise)).flatten().float()


class RatioNetwork(nn.Module):
    """The logit h(x, sigma) = log p_sigma(x) / q_sigma(x): data density over generator density at noise level sigma.

    An encoder as the denoiser's, with its preconditioning and its noise-level and class conditioning, then GroupNorm,
    SiLU, the mean over positions and one linear layer that starts at zero. sigmoid(h) is the probability that x is
    noised data rather than a noised sample. (The paper, arXiv 2502.08005, says "U-Net encoder + sigmoid" and leaves
    the head open: this one is our choice.)
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = EDM2Encoder(config) if config.architecture == "edm2" else Encoder(config)
        channels = self.encoder.skip_channels[-1]
        self.norm = GroupNorm(channels, 1e-5)
        self.head = nn.Linear(channels, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x, sigma, labels=None):
        """x [N, C, H, W] noised images, sigma [N] -> logits [N] float32."""
        x = _encode(self.encoder, self.config, x, sigma, labels)
        return self.head(F.silu(self.norm(x)).float().mean(dim=(2, 3))).flatten().float()

    def load_encoder(self, denoiser):
        """Start the encoder from the weights of a pre-trained `Denoiser`."""
        mine = self.encoder.state_dict()
        self.encoder.load_state_dict({k: v for k, v in denoiser.backbone.state_dict().items() if k in mine})


def _encode(encoder, config, x, sigma, labels):
    x, sigma = x.float().contiguous(), sigma.float()
    _, _, c_in, c_noise = preconditioning(config.preconditioning, sigma, config.sigma_data)
    return encoder.encode(c_in[:, None, None, None] * x, encoder.embed(c_noise, labels))[-1]


def memory_format(config, device_type, compiled=False):
    """The memory format in which a network of this configuration is fastest.

    Convolutions like channels-last best. But the GPU's kernel of GroupNorm knows NCHW only, so activations would be copied
    before and behind each norm, forward and backward; EDM2 has no norms, and the compiler writes norms of its own.
    """
    channels_last = compiled or device_type == "cpu" or config.architecture == "edm2"
    return torch.channels_last if channels_last else torch.contiguous_format


def place(net, device, compiled=False):
    """Move `net` to `device` in its best memory format, and compile it if asked; returns it.

    Each shape is compiled as it is (dynamic=False): training has one or two batch sizes, again and again.
    """
    net.to(device, memory_format=memory_format(net.config, device.type, compiled))
    if compiled:
        net.compile(dynamic=False)
    return net


@torch.no_grad()
def update_ema(ema, net, batch, halflife, nimg=math.inf):
    """Move the weights `ema` towards `net` so that the past fades by half every `halflife` images; one foreach call.

    After `nimg` images the half-life is at most 5 % of them: at the start, when the weights are still far off, the average
    forgets faster (as EDM trains).
    """
    beta = 0.5 ** (batch / max(min(halflife, 0.05 * nimg), 1e-8))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - beta)


def parameter_count(net):
    return sum(p.numel() for p in net.parameters())
