"""Draw images from a trained network: one step from a generator (stage 2), Heun's method from a denoiser (stage 1).

Reads a network file (`network.pt` of either stage, or a published EDM or EDM2 pickle) and says which it is.
Writes a PNG grid (`--out grid.png`), a folder of PNGs (`--out folder`) or a batch of images for measurement
(`--out samples.npz`: array `arr_0`, uint8, N x H x W x C, the format of the ADM evaluation suite).

    python sample.py                                       64 digits, from the weights in assets/
    python sample.py --network runs/digits/dijs/network.pt --n 100 --out digits.png
    python sample.py --network runs/digits/pretrain/network.pt --one-step 2.5 --out before.png
    python sample.py --network runs/cifar10/dijs/network.pt --n 50000 --out samples.npz
    python sample.py --network runs/digits/dijs/network.pt --ratio runs/digits/dijs/ratio.pt --candidates 4
    python sample.py --network edm-imagenet-64x64-cond-adm.pkl --n 64 --class 207 --out dogs.png
    python sample.py --network assets/fashion-mnist-cond-stage1.pt --n 100 --class each --out garments.png
"""

import math
from pathlib import Path

import numpy as np
import torch

from machinery import checkpoints
from machinery import data
import networks
from machinery import training
from machinery.files import UserError

DIGITS = str(Path(__file__).parent / "assets" / "digits.pt")  # the generator of `make demo`


def karras_sigma(share, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """The noise level at `share` (a tensor in [0, 1]) of EDM's schedule, from sigma_min at 0 to sigma_max at 1; Equation 5."""
    return (sigma_min ** (1 / rho) + share * (sigma_max ** (1 / rho) - sigma_min ** (1 / rho))) ** rho


def sigma_steps(steps, **levels):
    """Noise levels of the sampler, from sigma_max down to sigma_min, then 0: [steps + 1] float64."""
    sigmas = karras_sigma(torch.linspace(1, 0, steps, dtype=torch.float64), **levels)
    return torch.cat([sigmas, sigmas.new_zeros(1)])


@torch.no_grad()
def heun(net, z, labels=None, steps=18, **levels):
    """Heun's second order method for the probability flow ODE; EDM, Algorithm 1. 2 steps - 1 evaluations of `net`.

    z [N, C, H, W] standard normal, labels [N] or None -> images [N, C, H, W] float32. The state is float64, as in EDM.
    """
    sigmas = sigma_steps(steps, **levels).tolist()
    x = z.double() * sigmas[0]

    def slope(x, sigma):  # dx/dsigma of the probability flow
        return (x - net(x.float(), x.new_full((len(x),), sigma).float(), labels).double()) / sigma

    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        d = slope(x, sigma)
        x_next = x + (sigma_next - sigma) * d
        if sigma_next > 0:
            x_next = x + (sigma_next - sigma) * (d + slope(x_next, sigma_next)) / 2
        x = x_next
    return x.float()


def one_step(net, z, labels=None, t_init=2.5):
    """The one-step generator G(z) = D(t_init z; sigma = t_init); arXiv 2502.08005. z [N, C, H, W] standard normal."""
    return net(t_init * z, torch.full((len(z),), t_init, device=z.device), labels)


@torch.no_grad()
def generate(net, z, labels=None, steps=18):
    """Images [N, C, H, W] in [-1, 1] from a network of either stage; `net.about` says which it is."""
    if net.about["role"] == "generator":
        return one_step(net, z, labels, net.about["t_init"])
    return heun(net, z, labels, steps)


def inputs(config, indices, seed, device, label=None, candidate=0):
    """(z [n, C, H, W] standard normal, labels [n] or None) of the images with these indices.

    Each image has random numbers of its own, drawn on the CPU, so that image i of a seed is the same in any batch and
    on any device. `label` fixes the class, or, if "each", takes the classes in turn; otherwise it is uniformly random.
    `candidate` numbers further draws of the same image (and class).
    """
    shape = (config.img_channels, config.img_resolution, config.img_resolution)
    z = torch.stack([torch.randn(shape, generator=training.rng("cpu", seed, i, candidate, "z")) for i in indices])
    if not config.label_dim:
        return z.to(device), None
    if label is None:
        labels = [torch.randint(config.label_dim, [], generator=training.rng("cpu", seed, i, "class")).item() for i in indices]
    else:
        labels = [i % config.label_dim if label == "each" else label for i in indices]
    return z.to(device), torch.tensor(labels, device=device)


def in_batches(net, indices, seed, device, batch, label=None, steps=18):
    """Iterator over (images [n, C, H, W], labels [n] or None) of the samples with these indices, `batch` at a time."""
    for i in range(0, len(indices), batch):
        z, labels = inputs(net.config, indices[i : i + batch], seed, device, label)
        yield generate(net, z, labels, steps), labels


def pick(h, indices, seed, best=False):
    """From log ratios h [n, K] of K candidates of each image: the candidate that is kept [n], and the effective sample size [n].

    Candidate k is kept with probability proportional to exp(h_k), or, with `best`, if h_k is the largest. The chance is a
    function of the seed and the image's index.
    """
    weights = h.softmax(dim=1)
    if best:
        kept = h.argmax(dim=1)
    else:
        draws = [w.multinomial(1, generator=training.rng("cpu", seed, i, "choice")) for i, w in zip(indices, weights.cpu())]
        kept = torch.cat(draws).to(h.device)
    return kept, 1 / weights.square().sum(dim=1)


@torch.no_grad()
def choose(net, ratio, indices, seed, device, candidates, sigma, label=None, best=False, steps=18):
    """Inference-time scaling: per image draw several candidates in parallel, keep one by the ratio (arXiv 2502.08005, v5).

    Candidate k is kept with probability proportional to exp(h_k), the estimated ratio of data to generator density at
    noise level sigma (importance resampling), or, with `best`, if h_k is the largest (the mode-seeking limit). What is
    told apart under noise is corrected only as far as the noise leaves it visible: docs/method.md, section 5.
    Returns images [n, C, H, W], labels [n] or None, and the effective sample size [n] (1 to `candidates`) of the weights.
    """
    images, logits = [], []
    for k in range(candidates):
        z, labels = inputs(net.config, indices, seed, device, label, k)
        images.append(generate(net, z, labels, steps))
        eps, _ = inputs(net.config, indices, seed, device, candidate=-1 - k)
        logits.append(ratio(images[-1] + sigma * eps, torch.full((len(z),), sigma, device=device), labels))
    chosen, size = pick(torch.stack(logits, dim=1), indices, seed, best)
    return torch.stack(images, dim=1)[torch.arange(len(chosen), device=device), chosen], labels, size


def preview(net, path, seed, rt, trained):
    """Write a PNG grid of up to 64 samples, to look at while training. Of latents, the first three channels stand for RGB.

    `trained`: number of images since the last grid. At most an evaluation of `net` for every 16 of them is spent, about
    2 % of the time, as a step costs three or more per image. If that is not enough for 64 samples, there are fewer, or none.
    """
    evaluations = trained // 16
    n = min(64, evaluations // (1 if net.about["role"] == "generator" else 35))
    if n == 0:
        rt.print(f"no {path.name}: a sample would take too long beside the {trained} images trained on")
        return
    rt.print(f"drawing {path.name} ({n} images)")
    z, labels = inputs(net.config, range(n), seed, rt.device)
    with rt.autocast():
        images = data.to_uint8(generate(net, z, labels)[:, :3])
    data.save_grid(images, path, columns=8, scale=max(1, 32 // net.config.img_resolution))


VAE = "stabilityai/sd-vae-ft-mse"  # what EDM2's latents were made with
NO_DIFFUSERS = "latents are decoded with diffusers, which is not installed (`pip install diffusers`)"


def latent_decoder(device, vae):
    """Function from the network's latents [n, 4, h, w] to uint8 images [n, 8h, 8w, 3], or None without diffusers."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        return None
    try:
        model = AutoencoderKL.from_pretrained(vae, use_safetensors=True).to(device).eval()
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(f"cannot load the decoder {vae}: {error}; download it and give its folder with --vae") from None

    @torch.no_grad()
    def decode(x):
        # EDM2 fed the VAE pixels in [0, 1], not in the usual [-1, 1]: what comes out is in [0, 1] as well.
        # Eight at a time: 64 images of 512x512 need over 50 GB in float32.
        parts = data.denormalise_latents(x).split(8)
        return np.concatenate([data.to_uint8(2 * model.decode(part).sample - 1) for part in parts])

    return decode


def load_ratio(path, net, network):
    """The ratio network of a file, if it is for the images and classes of `net`, the generator of the file `network`."""
    ratio = checkpoints.load_network(path, role="ratio")
    if any(getattr(ratio.config, key) != getattr(net.config, key) for key in ("img_resolution", "img_channels", "label_dim")):
        raise UserError(f"{path} was not trained with {network}; give the ratio.pt beside it")
    return ratio


def class_number(text):
    """An argparse type: "each", or the number of a class."""
    return text if text == "each" else int(text)


class_number.__name__ = 'class number or "each"'  # in argparse's message


def arguments():
    parser = training.Parser(__doc__)
    add = parser.add_argument
    add("--network", default=DIGITS, metavar="PATH", help="network.pt of either stage, or a published EDM or EDM2 pickle")
    add("--n", type=training.positive(int), default=64, metavar="N", help="number of images")
    add("--seed", type=int, default=0, metavar="S", help="seed; image i of a seed is the same in any batch")
    add("--out", default="samples.png", metavar="PATH", help="a .png (grid), a .npz (batch) or a new folder (PNG files)")
    add("--steps", type=training.positive(int), default=18, metavar="N", help="Heun steps, for stage-1 networks")
    add("--one-step", type=training.positive(float), metavar="T", help="one step from a stage-1 network, at noise level T")
    add("--class", dest="label", type=class_number, metavar="C|each", help="class of all images, or each in turn (default: random)")
    add("--batch", type=training.positive(int), default=64, metavar="N", help="images at once; changes the memory only")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is any")
    add("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="fp32", help="of the network's arithmetic")
    add("--ratio", metavar="PATH", help="ratio.pt of stage 2, for --candidates")
    add("--candidates", type=training.positive(int), default=1, metavar="K", help="draw K per image and keep one by the ratio")
    add("--ratio-sigma", type=training.positive(float), default=0.1, metavar="X", help="noise level at which it is read")
    add("--best", action="store_true", help="keep the candidate of largest ratio instead of resampling")
    add("--vae", default=VAE, metavar="NAME|PATH", help="decoder for latents (needs diffusers)")
    return parser.parse_args()


def main():
    args = arguments()
    rt = training.start(args.device, args.precision, alone=True)
    net = checkpoints.load_network(args.network)
    role, config = net.about["role"], net.config
    if args.one_step and role != "denoiser":
        raise UserError(f"--one-step is for networks of stage 1; {args.network} holds a {role}")
    if args.one_step:  # as stage 2 finds it
        role, net.about = "generator", {"role": "generator", "t_init": args.one_step}
    if role == "ratio":
        raise UserError(f"{args.network} is a ratio network and makes no images; give the network.pt beside it")
    if args.label is not None and args.label not in (("each", *range(config.label_dim)) if config.label_dim else ()):
        known = f"classes 0 to {config.label_dim - 1}" if config.label_dim else "no classes"
        raise UserError(f"--class {args.label}: {args.network} has {known}")
    if (args.candidates > 1) != bool(args.ratio):
        raise UserError("--candidates and --ratio go together: give the ratio.pt of the generator's folder and K > 1")
    networks.place(net, rt.device)
    ratio = networks.place(load_ratio(args.ratio, net, args.network), rt.device) if args.ratio else None
    print(f"{args.network}: {'one step' if role == 'generator' else f'Heun, {args.steps} steps'}, {args.n} images")

    decode = data.to_uint8
    if config.img_channels == 4:  # latents; images have 1 or 3
        decode = latent_decoder(rt.device, args.vae)
        if decode is None and not args.out.endswith(".npz"):
            raise UserError(f"{NO_DIFFUSERS}; without it latents can be written: give --out a name that ends in .npz")
        if decode is None:
            print(f"{NO_DIFFUSERS}: writing the latents instead of images")

            def decode(x):
                return data.denormalise_latents(x).cpu().numpy()

    sizes = []

    def chosen_by_ratio():
        for i in range(0, args.n, args.batch):
            indices = range(i, min(i + args.batch, args.n))
            x, labels, size = choose(
                net, ratio, indices, args.seed, rt.device, args.candidates, args.ratio_sigma, args.label, args.best, args.steps
            )
            sizes.extend(size.tolist())
            yield x, labels

    plain = in_batches(net, range(args.n), args.seed, rt.device, args.batch, args.label, args.steps)
    batches = ((decode(x), labels if labels is None else labels.tolist()) for x, labels in (chosen_by_ratio() if ratio else plain))
    with rt.autocast():
        if args.out.endswith(".png"):
            images = np.concatenate([images for images, _ in batches])
            columns = config.label_dim if args.label == "each" and config.label_dim <= 20 else math.ceil(args.n**0.5)
            data.save_grid(images, args.out, columns=columns, scale=max(1, 32 // images.shape[1]))
        else:
            data.write_images(batches, args.out, args.n)
    if sizes:
        print(f"effective sample size {np.mean(sizes):.2f} of {args.candidates} candidates")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    training.run(main)
