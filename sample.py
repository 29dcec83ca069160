"""Draw images: one step from a generator (stage 2), Heun's method from a denoiser (stage 1).

Reads a network file (network.pt of either stage, or a published EDM or EDM2 pickle). Writes a grid
(`--out grid.png`), a folder of PNG files (`--out folder`) or a batch for measurement (`--out
samples.npz`: array `arr_0`, uint8, N x H x W x C, the format of the ADM evaluation suite).

    python sample.py                                       64 digits, from the weights in assets/
    python sample.py --network runs/digits/dijs/network.pt --n 100 --out digits.png
    python sample.py --network runs/digits/pretrain/network.pt --one-step 2.5 --out before.png
    python sample.py --network edm-imagenet-64x64-cond-adm.pkl --n 64 --class 207 --out dogs.png
    python sample.py --ratio assets/digits-ratio.pt --candidates 4 --out chosen.png
"""

import machinery  # before PyTorch: how its threads wait
import math
from pathlib import Path

import numpy as np
import torch

import networks
from machinery import checkpoints, data, files, training
from machinery.training import UserError

DIGITS = str(Path(__file__).parent / "assets" / "digits.pt")
VAE = "stabilityai/sd-vae-ft-mse"  # what EDM2's latents were made with


def karras_sigma(u):
    """EDM's schedule, Equation 5, with rho = 7: from 0.002 at u = 0 to 80 at u = 1 (a tensor)."""
    low, high = 0.002 ** (1 / 7.0), 80.0 ** (1 / 7.0)
    return (low + u * (high - low)) ** 7.0


@torch.no_grad()
def heun(net, z, labels=None, steps=18):
    """Heun's method for the probability flow ODE: z [N, C, H, W] -> images; EDM, Algorithm 1."""
    sigmas = [*karras_sigma(torch.linspace(1, 0, steps, dtype=torch.float64)).tolist(), 0.0]
    x = z.double() * sigmas[0]  # float64, as in EDM

    def slope(x, sigma):  # dx/dsigma of the probability flow
        return (x - net(x.float(), x.new_full((len(x),), sigma).float(), labels).double()) / sigma

    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        d, step = slope(x, sigma), sigma_next - sigma
        if sigma_next > 0:
            d = (d + slope(x + step * d, sigma_next)) / 2
        x = x + step * d
    return x.float()


def one_step(net, z, labels=None, t_init=2.5):
    """The generator G(z) = D(t_init z; t_init) (arXiv 2502.08005) of z [N, C, H, W] ~ N(0, I)."""
    return net(t_init * z, torch.full((len(z),), t_init, device=z.device), labels)


@torch.no_grad()
def generate(net, z, labels=None, steps=18):
    """Images [N, C, H, W] in [-1, 1] from a network of either stage; `net.about` says which."""
    if net.about["role"] == "generator":
        return one_step(net, z, labels, net.about["t_init"])
    return heun(net, z, labels, steps)


def random_state(*key):
    """A NumPy generator whose stream depends on `key` alone and never changes (NEP 19).

    PyTorch's CPU generator takes 32 bits of a seed: two of 50,000 images may share their noise.
    """
    return np.random.RandomState(np.random.Philox(key=training.seed_of(*key, bits=128)))


def inputs(net, indices, seed, device, label=None, candidate=0):
    """(z [n, C, H, W] standard normal, labels [n] or None) of the images with these indices.

    Each image has random numbers of its own, so image i of a seed is the same in any batch and on
    any device. label: the class of all, "each" for the classes in turn, None for random ones, as
    frequent as in the training data. `candidate` numbers further draws of the same image and class.
    """
    config, classes = net.config, net.config.label_dim
    shape = (config.img_channels, config.img_resolution, config.img_resolution)
    z = np.stack([random_state(seed, i, candidate, "z").standard_normal(shape) for i in indices])
    z = torch.from_numpy(z).float().to(device)
    if not classes:
        return z, None
    counts = np.array(net.about.get("class_frequencies") or [1] * classes)
    if label is None:
        draws = [random_state(seed, i, "class").random_sample() for i in indices]
        labels = np.searchsorted(counts.cumsum() / counts.sum(), draws, side="right")
    else:
        seen = counts.nonzero()[0]
        labels = [seen[i % len(seen)] if label == "each" else int(label) for i in indices]
    return z, torch.tensor(labels, device=device)


def pick(h, indices, seed):
    """Draw one of K candidates with weights exp(h), h [n, K]: its number, effective size [n]."""
    weights = h.double().softmax(dim=1)
    draws = [random_state(seed, i, "choice").random_sample() for i in indices]
    kept = torch.searchsorted(weights.cumsum(dim=1), weights.new_tensor(draws)[:, None])[:, 0]
    return kept.clamp(max=h.shape[1] - 1), 1 / weights.square().sum(dim=1)


@torch.no_grad()
def choose(net, ratio, indices, seed, device, candidates, sigma, label=None):
    """Inference-time scaling (arXiv 2502.08005, v5): draw candidates, keep one by the ratio.

    Importance resampling with exp(h) at noise level sigma (docs/method.md, section 5). Returns
    images [n, C, H, W], labels [n] or None, and the effective sample size [n].
    """
    images, logits = [], []
    for k in range(candidates):
        z, labels = inputs(net, indices, seed, device, label, k)
        images.append(generate(net, z, labels))
        eps, _ = inputs(net, indices, seed, device, candidate=-1 - k)
        level = torch.full((len(z),), sigma, device=device)
        logits.append(ratio(images[-1] + sigma * eps, level, labels))
    kept, size = pick(torch.stack(logits, dim=1), indices, seed)
    return torch.stack(images, dim=1)[torch.arange(len(kept), device=device), kept], labels, size


def preview(net, run, seed):
    """Write a grid of up to 64 samples while training; of latents, three channels as RGB."""
    n = min(64, run.nimg // 100)  # few in a short trial
    if not n or not run.rt.is_main:
        return
    z, labels = inputs(net, range(n), seed, run.rt.device)
    with run.rt.autocast():
        images = data.to_uint8(generate(net, z, labels)[:, :3])
    path = run.dir / f"samples-{run.nimg // 1000:06d}.png"
    data.save_grid(images, path, columns=8, scale=max(1, 32 // net.config.img_resolution))


def latent_decoder(device, vae=VAE):
    """Function from latents [n, 4, h, w] as networks see them to uint8 images [n, 8h, 8w, 3]."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise UserError("latents are decoded with diffusers, which is missing; "
                        "`pip install diffusers`") from None
    with files.reading(vae, "a decoder that can be loaded", "give its folder with --vae"):
        model = AutoencoderKL.from_pretrained(vae, use_safetensors=True).to(device).eval()

    centre, scale = data.LATENTS.to(device)

    @torch.no_grad()
    def decode(x):  # eight at a time: 64 images of 512x512 need over 50 GB in float32
        parts = [model.decode(part).sample for part in (x / 0.5 * scale + centre).split(8)]
        # EDM2 fed the VAE pixels in [0, 1], not [-1, 1], and truncates.
        pixels = (torch.cat(parts).clamp(0, 1) * 255).to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).cpu().numpy()

    return decode


def load_ratio(path, net, network):
    """The ratio network of a file, if it was trained with `net`, the generator of `network`."""
    ratio = checkpoints.load_network(path, role="ratio")
    a, b = ((each.config, {**each.about, "role": ""}) for each in (ratio, net))
    if a != b:
        raise UserError(f"{path} was not trained with {network}; give the ratio.pt beside it")
    return ratio


SETTINGS = dict(  # {flag: (default, help[, type or choices])}
    network=(DIGITS, "network.pt of either stage, or a published EDM or EDM2 pickle"),
    n=(64, "number of images"),
    seed=(0, "random seed; --batch does not change the images", training.integer),
    out=("samples.png", "a .png (grid), a .npz (batch) or a new folder (PNG files)"),
    steps=(18, "Heun steps, for stage-1 networks"),
    one_step=(None, "one step from a stage-1 network, at this noise level", float),
    **{"class": (None, "class of all images, or `each` in turn (default: random)", str)},
    batch=(64, "images at once; affects only the memory"),
    ratio=(None, "ratio.pt of stage 2, for --candidates", str),
    candidates=(1, "number of candidates per image, of which the ratio keeps one"),
    ratio_sigma=(0.1, "noise level at which the ratio is evaluated"),
    vae=(VAE, "decoder for latents, a name or folder (needs diffusers)"),
    device=training.DEVICE,
    precision=("fp32", *training.PRECISION[1:]),
)


def main():
    args = training.Parser(__doc__, SETTINGS).parse_args()
    label, suffix = vars(args)["class"], Path(args.out).suffix.lower()
    if suffix not in (".png", ".npz") and suffix[1:].isalpha():
        raise UserError(f"--out {args.out}: end it in .png or .npz, or name a folder")
    if (args.candidates > 1) != bool(args.ratio):
        raise UserError("--candidates and --ratio go together: give a ratio.pt and K > 1")
    rt = training.Runtime(args.device, args.precision, alone=True)
    net = checkpoints.load_network(args.network, role="denoiser" if args.one_step else None)
    if net.about["role"] == "ratio":
        raise UserError(f"{args.network} is a ratio network; give the network.pt beside it")
    if args.one_step:  # what stage 2 starts from
        net.about |= {"role": "generator", "t_init": args.one_step}
    classes = net.config.label_dim
    if label and not classes or label not in (None, "each", *map(str, range(classes))):
        known = f"classes 0 to {classes - 1}" if classes else "no classes"
        raise UserError(f"--class {label}: {args.network} has {known}")
    networks.place(net, rt.device)
    ratio = args.ratio and networks.place(load_ratio(args.ratio, net, args.network), rt.device)
    is_latent = net.config.img_channels == 4  # images have 1 or 3
    decode = latent_decoder(rt.device, args.vae) if is_latent else data.to_uint8
    how = "one step" if net.about["role"] == "generator" else f"Heun, {args.steps} steps"
    rt.print(f"{args.network}: {how}, {args.n} images")
    files.check_writable(args.out)  # before hours of work

    sizes = []  # effective sample sizes of the choices

    def batches():
        for start in range(0, args.n, args.batch):
            common = range(args.n)[start : start + args.batch], args.seed, rt.device
            if ratio:
                x, labels, size = choose(
                    net, ratio, *common, args.candidates, args.ratio_sigma, label)
                sizes.append(size)
            else:
                z, labels = inputs(net, *common, label)
                x = generate(net, z, labels, args.steps)
            yield decode(x), labels if labels is None else labels.tolist()

    with rt.autocast():
        if suffix == ".png":
            parts, each = zip(*batches())
            images, kinds = np.concatenate(parts), len({c for labels in each for c in labels or ()})
            columns = kinds if label == "each" and kinds <= 20 else math.ceil(args.n**0.5)
            data.save_grid(images, args.out, columns, scale=max(1, 32 // images.shape[1]))
        else:
            data.write_images(batches(), args.out)
    if sizes:
        size = torch.cat(sizes).mean()
        rt.print(f"effective sample size {size:.2f} of {args.candidates} candidates")
    rt.print(f"wrote {args.out}")


if __name__ == "__main__":
    training.run(main)
