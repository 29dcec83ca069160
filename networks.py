"""The networks: denoisers D(x; sigma) of EDM and EDM2, and the ratio network h(x, sigma).

Four architectures, whose weights have the shapes and, but for a few (machinery/checkpoints.py), the
names of the published checkpoints:

    ddpmpp   DDPM++ of EDM (arXiv 2206.00364, Table 7): CIFAR-10, FFHQ, AFHQv2, our small presets
    ncsnpp   NCSN++ of EDM: Fourier embedding, a pyramid of the input, a wider resampling filter
    adm      ADM (arXiv 2105.05233) as EDM trained it: ImageNet 64x64
    edm2     EDM2 (arXiv 2312.02696), configuration G: ImageNet 512x512 latents

Shapes: x [N, C, H, W] float32, sigma [N] (standard deviation of the noise, for data scaled to
[-1, 1]), labels [N] int64 or None (ignored by networks without classes).
"""

import dataclasses
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

# ---- Configurations

class ConfigError(ValueError):
    """A configuration that fits no network. The message names the value and the remedy."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a network's shape and function; stored in every network file."""

    architecture: str = "ddpmpp"  # ddpmpp, ncsnpp, adm or edm2
    img_resolution: int = 32  # pixels, height = width
    img_channels: int = 3
    label_dim: int = 0  # number of classes, 0 = unconditional
    model_channels: int = 128  # base channels
    channel_mult: tuple = (2, 2, 2)  # of each level, highest resolution first
    num_blocks: int = 4  # residual blocks per level
    attn_resolutions: tuple = (16,)  # resolutions with self-attention
    dropout: float = 0.0  # probability
    preconditioning: str = "edm"  # edm, vp or ve: see `preconditioning`
    sigma_data: float = 0.5  # standard deviation of the data that the preconditioning assumes

    def __post_init__(self):
        arch, kind, size = self.architecture, self.preconditioning, self.img_resolution
        if arch not in ("ddpmpp", "ncsnpp", "adm", "edm2"):
            raise ConfigError(f"unknown architecture {arch!r}; known: ddpmpp, ncsnpp, adm, edm2")
        if kind not in ("edm", "vp", "ve"):
            raise ConfigError(f"unknown preconditioning {kind!r}; known: edm, vp, ve")
        sizes = (size, self.img_channels, self.model_channels, self.num_blocks, *self.channel_mult)
        rest = self.label_dim >= 0 and 0 <= self.dropout < 1 and 0 < self.sigma_data < math.inf
        if not self.channel_mult or min(sizes) < 1 or not rest:
            raise ConfigError(f"sizes and sigma_data must be positive, dropout in [0, 1): {self}")
        if self.model_channels % 4:
            raise ConfigError(f"model_channels must be a multiple of 4, not {self.model_channels}")
        halvings = len(self.channel_mult) - 1
        if size % 2**halvings:
            raise ConfigError(f"images of {size}x{size} cannot be halved {halvings} times; "
                              f"resize them to a multiple of {2**halvings}")


NETWORKS = {  # in the order of Config's fields, up to dropout
    "digits": Config("ddpmpp", 8, 1, 0, 32, (1, 2), 1, ()),
    "fashion-mnist": Config("ddpmpp", 28, 1, 0, 16, (1, 2, 4), 1, ()),
    "cifar10-small": Config("ddpmpp", 32, 3, 0, 32, (1, 2, 4), 1, ()),
    "pictures": Config("ddpmpp", 64, 3, 0, 64, (1, 2, 3, 4), 2, (16,)),
    "cifar10": Config("ddpmpp", 32, 3, 0, 128, (2, 2, 2), 4, (16,), 0.13),  # EDM, Table 7
    "imagenet64": Config("adm", 64, 3, 1000, 192, (1, 2, 3, 4), 3, (32, 16, 8), 0.10),
    "edm2-xs": Config("edm2", 64, 4, 1000, 128, (1, 2, 3, 4), 3, (16, 8)),
    "edm2-s": Config("edm2", 64, 4, 1000, 192, (1, 2, 3, 4), 3, (16, 8)),
}


def preconditioning(kind, sigma, sigma_data):
    """c_skip, c_out, c_in, c_noise of D = c_skip x + c_out F(c_in x, c_noise); EDM, Table 1."""
    one = torch.ones_like(sigma)
    if kind == "vp":  # t(sigma) inverts the schedule with beta_d = 19.9, beta_min = 0.1
        t = ((0.1**2 + 2 * 19.9 * (1 + sigma**2).log()).sqrt() - 0.1) / 19.9
        return one, -sigma, 1 / (sigma**2 + 1).sqrt(), 999 * t
    if kind == "ve":
        return one, sigma, one, (sigma / 2).log()
    total = (sigma**2 + sigma_data**2).sqrt()
    return sigma_data**2 / total**2, sigma * sigma_data / total, 1 / total, sigma.log() / 4


# ---- Pieces that the architectures share

def resample(x, mode, smooth=False, padding=1):
    """Halve ("down") or double ("up") the resolution of x with a box filter of 2x2.

    smooth: with three such boxes in a row, the filter (1, 3, 3, 1) of NCSN++, on zero-padded x.
    """
    if mode == "keep":
        return x
    with torch.autocast(x.device.type, enabled=False):  # as in GroupNorm
        x = F.interpolate(x, scale_factor=2.0) if mode == "up" else x
        if smooth:
            x = F.avg_pool2d(F.avg_pool2d(x, 2, 1, padding), 2, 1)
        return F.avg_pool2d(x, 2) if mode == "down" else x


def attention(qkv, heads, transform=lambda x: x):
    """Self-attention over positions: qkv [N, 3C, H, W] -> [N, C, H, W].

    The channels of qkv are laid out [head, channel, (q, k, v)], as in published checkpoints.
    EDM2's `transform` normalises [3, N, H W, heads, C / heads] over the last dimension.
    """
    n, c, h, w = qkv.shape
    # The fused kernels need the copy. Without it the full [H W, H W] matrix is computed and kept.
    qkv = qkv.reshape(n, heads, -1, 3, h * w).permute(3, 0, 4, 1, 2).contiguous()
    q, k, v = transform(qkv).transpose(2, 3)  # each [N, heads, H W, C / heads]
    return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(n, c // 3, h, w)


class GroupNorm(nn.GroupNorm):
    """At least 4 channels a group and at most 32 groups. The result has the dtype of the input."""

    def __init__(self, channels, eps):
        super().__init__(min(32, channels // 4), channels, eps)

    def forward(self, x):
        if self.weight.requires_grad and not x.requires_grad:
            x = x.contiguous()  # PyTorch 2.13 crashes on the CPU, channels-last, without a gradient
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        # Autocast would make and keep float32 activations. The kernel sums in float32 anyway.
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


# ---- EDM: layers and block of DDPM++, NCSN++ and ADM

def initialise(layer, config, gain=1.0):
    """Set start values: Xavier uniform times `gain`, zero bias; in ADM PyTorch's own or zero."""
    if config.architecture != "adm":
        nn.init.xavier_uniform_(layer.weight, gain=gain)
        nn.init.zeros_(layer.bias)
    elif gain < 0.1:  # else Kaiming uniform times sqrt(1/3), which is what PyTorch draws
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return layer


def conv(config, cin, cout, kernel, gain=1.0):
    """A convolution that keeps the size."""
    return initialise(nn.Conv2d(cin, cout, kernel, padding=kernel // 2), config, gain)


class FusedDownConv2d(nn.Conv2d):
    """3x3 convolution, then down-sampling (NCSN++). The padding of both comes first."""

    def forward(self, x):
        x = resample(F.conv2d(x, self.weight, padding=2), "down", smooth=True, padding=0)
        return x + self.bias.to(x.dtype)[:, None, None]


class NoiseEmbedding(nn.Module):
    """c_noise [N] -> [N, width]: sines and cosines at geometric (NCSN++: random) frequencies."""

    def __init__(self, config, width):
        super().__init__()
        self.arch, self.half = config.architecture, width // 2
        if self.arch == "ncsnpp":
            self.register_buffer("freqs", torch.randn(self.half) * 16)

    def forward(self, c_noise):
        if self.arch == "ncsnpp":
            frequencies = 2 * math.pi * self.freqs
        else:
            steps = self.half if self.arch == "adm" else self.half - 1
            frequencies = 10000 ** -(torch.arange(self.half, device=c_noise.device) / steps)
        angle = c_noise[:, None] * frequencies
        pair = (angle.cos(), angle.sin()) if self.arch == "adm" else (angle.sin(), angle.cos())
        return torch.cat(pair, dim=1)


class EDMBlock(nn.Module):
    """Residual block: x [N, cin, H, W], emb [N, 4 model_channels] -> [N, cout, H', W']."""

    def __init__(self, config, cin, cout, mode="keep", attend=False):
        super().__init__()
        self.adm, self.dropout = config.architecture == "adm", config.dropout
        self.skip_scale = 1.0 if self.adm else 0.5**0.5  # keeps the variance of a sum
        smooth = config.architecture == "ncsnpp"
        self.resample = functools.partial(resample, mode=mode, smooth=smooth)
        eps, width = 1e-5 if self.adm else 1e-6, 4 * config.model_channels
        self.norm0 = GroupNorm(cin, eps)
        self.conv0 = conv(config, cin, cout, 3)
        self.affine = initialise(nn.Linear(width, 2 * cout if self.adm else cout), config)
        self.norm1 = GroupNorm(cout, eps)
        self.conv1 = conv(config, cout, cout, 3, gain=1e-5)
        project = cin != cout or (mode != "keep" and not self.adm)
        self.skip = conv(config, cin, cout, 1) if project else nn.Identity()
        self.heads = (cout // 64 if self.adm else 1) if attend else 0
        if self.heads:  # ADM has none below 64 channels
            self.norm2 = GroupNorm(cout, eps)
            self.qkv = conv(config, cout, 3 * cout, 1, gain=0.2**0.5)
            self.proj = conv(config, cout, cout, 1, gain=1e-5)

    def forward(self, x, emb):
        shortcut = self.skip(self.resample(x))
        params = self.affine(emb)[:, :, None, None]
        x = self.conv0(self.resample(F.silu(self.norm0(x))))
        if self.adm:  # scale and shift after the norm
            scale, shift = params.to(x.dtype).chunk(2, dim=1)
            x = F.silu(torch.addcmul(shift, self.norm1(x), scale + 1))
        else:
            x = F.silu(self.norm1(x + params))
        x = self.conv1(F.dropout(x, self.dropout, self.training))
        x = (shortcut + x) * self.skip_scale
        if self.heads:
            y = self.proj(attention(self.qkv(self.norm2(x)), self.heads))
            x = (x + y) * self.skip_scale
        return x


# ---- EDM2: layers and block, magnitude-preserving ("mp")

def mp_normalize(x, dims=None):
    """Scale x to unit root mean square over `dims` (default: all but the first)."""
    dims = list(range(1, x.ndim)) if dims is None else dims
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=dtype)
    return x / (1e-4 + norm * math.sqrt(norm.numel() / x.numel())).to(x.dtype)


def mp_silu(x):
    """SiLU divided by its root mean square on unit Gaussian input; EDM2, Equation 81."""
    return F.silu(x) / 0.596


def mp_sum(a, b, t):
    """(1 - t) a + t b, rescaled for independent inputs of unit magnitude; EDM2, Equation 88."""
    return torch.lerp(a, b.to(a.dtype), t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a, b):
    """Concatenate over channels; both contribute equally. EDM2, Equation 103 with t = 1/2."""
    na, nb = a.shape[1], b.shape[1]
    scale = math.sqrt((na + nb) / 2)
    return torch.cat([a * (scale / math.sqrt(na)), b * (scale / math.sqrt(nb))], dim=1)


class MPConv(nn.Module):
    """Convolution or linear layer (kernel 0), weights of unit norm, no bias; EDM2, Equation 47."""

    def __init__(self, cin, cout, kernel):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin, *((kernel, kernel) if kernel else ())))

    def forward(self, x, gain=1.0):
        weight = mp_normalize(self.weight) * (gain / math.sqrt(self.weight[0].numel()))
        if weight.ndim == 2:
            return F.linear(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class MPFourier(nn.Module):
    """c_noise [N] -> [N, width]: cosines of random frequency and phase; EDM2, Equation 75."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(width))
        self.register_buffer("phases", 2 * math.pi * torch.rand(width))

    def forward(self, c_noise):
        return (c_noise[:, None] * self.freqs + self.phases).cos() * math.sqrt(2)


class EDM2Block(nn.Module):
    """Residual block of EDM2, as `EDMBlock`; emb is as wide as the widest level."""

    def __init__(self, config, cin, cout, mode="keep", attend=False, decoder=False):
        super().__init__()
        self.decoder, self.mode, self.dropout = decoder, mode, config.dropout
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(cin if decoder else cout, cout, 3)
        self.emb_linear = MPConv(config.model_channels * max(config.channel_mult), cout, 0)
        self.conv_res1 = MPConv(cout, cout, 3)
        self.conv_skip = MPConv(cin, cout, 1) if cin != cout else nn.Identity()
        self.heads = cout // 64 if attend else 0
        if self.heads:
            self.attn_qkv = MPConv(cout, 3 * cout, 1)
            self.attn_proj = MPConv(cout, cout, 1)

    def forward(self, x, emb):
        x = resample(x, self.mode)
        if not self.decoder:
            x = mp_normalize(self.conv_skip(x), dims=[1])  # pixel norm: the main path cannot grow
        y = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = mp_silu(y * scale[:, :, None, None].to(y.dtype))
        y = self.conv_res1(F.dropout(y, self.dropout, self.training))
        if self.decoder:
            x = self.conv_skip(x)
        x = mp_sum(x, y, 0.3)
        if self.heads:  # cosine attention
            y = attention(self.attn_qkv(x), self.heads, lambda qkv: mp_normalize(qkv, dims=[-1]))
            x = mp_sum(x, self.attn_proj(y), 0.3)
        return x.clip(-256, 256)  # safe in float16


@torch.no_grad()
def normalize_weights(net):
    """Normalise EDM2's weights after an optimizer step (Equation 66); no effect on the others."""
    for module in net.modules():
        if isinstance(module, MPConv):
            module.weight.copy_(mp_normalize(module.weight))


# ---- The U-Net

class UNet(nn.Module):
    """F(c_in x, c_noise, labels) of the preconditioned denoiser, or only its encoder.

    Encoder: each level has a down-sampling block (the first level a convolution) and `num_blocks`
    blocks. Decoder: each level has an up-sampling block (the lowest resolution two blocks) and
    `num_blocks` + 1 blocks; each of these also takes one output of the encoder, the last first.
    """

    def __init__(self, config, decoder=True):
        super().__init__()
        self.config = config
        base, image, classes = config.model_channels, config.img_channels, config.label_dim
        edm2, adm, ncsnpp = (config.architecture == name for name in ("edm2", "adm", "ncsnpp"))
        self.edm2, self.adm = edm2, adm
        levels = []  # name of the resolution, channels, whether blocks attend
        for i, mult in enumerate(config.channel_mult):
            res = config.img_resolution >> i
            levels.append((f"{res}x{res}", base * mult, res in config.attn_resolutions))
        top = levels[0][1]

        # Embedding of noise level and class.
        if edm2:
            emb_width = base * max(config.channel_mult)
            self.emb_fourier = MPFourier(top)
            self.emb_noise = MPConv(top, emb_width, 0)
            self.emb_label = MPConv(classes, emb_width, 0) if classes else None
        else:
            noise_width = 2 * base if ncsnpp else base
            self.map_noise = NoiseEmbedding(config, noise_width)
            if classes and adm:
                self.map_label = nn.Linear(classes, 4 * base, bias=False)
                nn.init.normal_(self.map_label.weight)
            elif classes:
                self.map_label = initialise(nn.Linear(classes, noise_width), config)
            self.map_layer0 = initialise(nn.Linear(noise_width, 4 * base), config)
            self.map_layer1 = initialise(nn.Linear(4 * base, 4 * base), config)

        # Encoder.
        block = functools.partial(EDM2Block if edm2 else EDMBlock, config)
        channels, aux = top if edm2 or adm else base, image
        first = MPConv(image + 1, channels, 3) if edm2 else conv(config, image, channels, 3)
        self.enc = nn.ModuleDict({f"{levels[0][0]}_conv": first})
        skips = [channels]  # channels of the encoder's outputs
        for level, (res, width, attend) in enumerate(levels):
            if level > 0:
                self.enc[f"{res}_down"] = block(channels, channels, mode="down")
                skips.append(channels)
                if ncsnpp:
                    pyramid = FusedDownConv2d(aux, channels, 3)
                    self.enc[f"{res}_aux_residual"] = initialise(pyramid, config)
                    aux = channels
            for i in range(config.num_blocks):
                self.enc[f"{res}_block{i}"] = block(channels, width, attend=attend)
                channels = width
                skips.append(channels)
        if not decoder:
            return

        # Decoder.
        block = functools.partial(block, decoder=True) if edm2 else block
        self.dec = nn.ModuleDict()
        for res, width, attend in reversed(levels):
            if not self.dec:
                self.dec[f"{res}_in0"] = block(channels, channels, attend=True)
                self.dec[f"{res}_in1"] = block(channels, channels)
            else:
                self.dec[f"{res}_up"] = block(channels, channels, mode="up")
            for i in range(config.num_blocks + 1):  # DDPM++ and NCSN++ attend only in the last
                here = attend and (edm2 or adm or i == config.num_blocks)
                self.dec[f"{res}_block{i}"] = block(channels + skips.pop(), width, attend=here)
                channels = width

        # Last layers.
        if edm2:
            self.out_conv = MPConv(channels, image, 3)
            self.out_gain = nn.Parameter(torch.zeros([]))
            return
        self.out_norm = GroupNorm(channels, 1e-5 if adm else 1e-6)
        self.out_conv = conv(config, channels, image, 3, gain=1e-5)

    def embed(self, c_noise, labels):
        """c_noise [N], labels [N] or None (no class: a zero vector) -> embedding [N, width]."""
        classes = self.config.label_dim
        label = c_noise.new_zeros(len(c_noise), classes)
        if classes and labels is not None:
            label = F.one_hot(labels, classes).to(c_noise)
        if self.edm2:
            emb = self.emb_noise(self.emb_fourier(c_noise))
            if classes:
                emb = mp_sum(emb, self.emb_label(label * math.sqrt(classes)), 0.5)
            return mp_silu(emb)
        emb = self.map_noise(c_noise)
        if classes and not self.adm:
            emb = emb + self.map_label(label * math.sqrt(classes))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if classes and self.adm:
            emb = emb + self.map_label(label)
        return F.silu(emb)

    def encode(self, x, emb):
        """c_in x [N, C, H, W] and the embedding -> the encoder's outputs, first to last."""
        outputs, aux = [], x
        if self.edm2:  # a channel of ones replaces biases
            x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        for name, module in self.enc.items():
            if name.endswith("_conv"):
                outputs.append(module(x))
            elif name.endswith("_aux_residual"):  # NCSN++: add the down-sampled input
                aux = outputs[-1] = (outputs[-1] + module(aux)) * 0.5**0.5
            else:
                outputs.append(module(outputs[-1], emb))
        return outputs

    def forward(self, x, c_noise, labels=None):
        """x [N, C, H, W], c_noise [N], labels [N] or None -> [N, C, H, W]."""
        emb = self.embed(c_noise, labels)
        skips = self.encode(x, emb)
        x = skips[-1]
        for name, block in self.dec.items():
            if "_block" in name:
                skip = skips.pop()
                x = mp_cat(x, skip) if self.edm2 else torch.cat([x, skip], dim=1)
            x = block(x, emb)
        if self.edm2:
            return self.out_conv(x, gain=self.out_gain)
        return self.out_conv(F.silu(self.out_norm(x)))

    def features(self, x, sigma, labels=None):
        """The encoder's last output for x at noise level sigma, [N, C', H', W']."""
        _, _, c_in, c_noise = preconditioning(
            self.config.preconditioning, sigma.float(), self.config.sigma_data)
        x = c_in[:, None, None, None] * x.float().contiguous()
        return self.encode(x, self.embed(c_noise, labels))[-1]


# ---- The two networks of the method

class Denoiser(nn.Module):
    """The preconditioned denoiser D(x; sigma) of EDM (Equation 7); at fixed sigma a generator."""

    def __init__(self, config):
        super().__init__()
        self.config, self.about = config, {}
        self.unet = UNet(config)
        if config.architecture == "edm2":
            self.logvar_fourier = MPFourier(128)
            self.logvar_linear = MPConv(128, 1, 0)

    def forward(self, x, sigma, labels=None):
        """Noised images x [N, C, H, W], sigma [N], labels [N] or None -> denoised, as x."""
        x = x.float().contiguous()  # the weights decide the memory format, not the images
        c_skip, c_out, c_in, c_noise = preconditioning(
            self.config.preconditioning, sigma.float()[:, None, None, None], self.config.sigma_data)
        return c_skip * x + c_out * self.unet(c_in * x, c_noise.flatten(), labels).float()

    def logvar(self, sigma):
        """EDM2's learned log variance u(sigma) of the denoising error, [N]; EDM2, Equation 21."""
        c_noise = preconditioning(self.config.preconditioning, sigma, self.config.sigma_data)[3]
        return self.logvar_linear(self.logvar_fourier(c_noise)).flatten().float()


class RatioNetwork(nn.Module):
    """The logit h(x, sigma) = log(p_sigma(x) / q_sigma(x)): data density over generator density.

    sigmoid(h) is the probability that x is noised data rather than a noised sample. The network is
    the denoiser's encoder and a head: GroupNorm, SiLU, the mean over positions and a linear layer
    that starts at zero. (The paper leaves the head open: "U-Net encoder + sigmoid".)
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.about = config, {}
        self.encoder = UNet(config, decoder=False)
        channels = config.model_channels * config.channel_mult[-1]
        self.norm = GroupNorm(channels, 1e-5)
        self.head = nn.Linear(channels, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x, sigma, labels=None):
        """x [N, C, H, W] noised images, sigma [N] -> logits [N] float32."""
        x = self.encoder.features(x, sigma, labels)
        return self.head(F.silu(self.norm(x)).float().mean(dim=(2, 3))).flatten().float()

    def load_encoder(self, denoiser):
        """Start the encoder from the weights of a pre-trained `Denoiser`."""
        self.encoder.load_state_dict(denoiser.unet.state_dict(), strict=False)  # no decoder


# ---- Placing, averaging, counting

def memory_format(config, device_type, compiled=False):
    """The faster one: the GPU's GroupNorm, unless the compiler writes its own, takes only NCHW."""
    channels_last = compiled or device_type == "cpu" or config.architecture == "edm2"
    return torch.channels_last if channels_last else torch.contiguous_format


def place(net, device, compiled=False):
    """Move `net` to `device` in its best memory format, compile it if asked, and return it."""
    net.to(device, memory_format=memory_format(net.config, device.type, compiled))
    if compiled:
        net.compile(dynamic=False)  # each shape separately: training has one or two
    return net


@torch.no_grad()
def update_ema(ema, net, batch, halflife, nimg=math.inf):
    """Update `ema`, the exponential moving average of the weights, after a step of `batch` images.

    halflife: in images; at most 5 % of the `nimg` images seen so far, as in EDM.
    """
    beta = 0.5 ** (batch / max(min(halflife, 0.05 * nimg), 1e-8))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - beta)


def parameter_count(net):
    return sum(p.numel() for p in net.parameters())
