"""Stage 1: train an EDM denoiser D(x; sigma), from which stage 2 makes the one-step generator.

Elucidating the Design Space of Diffusion-Based Generative Models (EDM), arXiv 2206.00364; for
`imagenet512` EDM2, arXiv 2312.02696. Reads a data set. Writes into --outdir: network.pt (averaged
weights, for sampling and for stage 2), checkpoint.pt, log.jsonl and sample grids. The same command
again resumes the run.

    python pretrain.py                                    the included digits, minutes on a CPU
    python pretrain.py --preset fashion-mnist             half an hour
    torchrun --nproc-per-node 8 pretrain.py --preset cifar10
"""

import machinery  # before PyTorch: how its threads wait
import copy
import dataclasses
from pathlib import Path

import torch

import networks
import sample
from machinery import checkpoints, data, training
from machinery.training import UserError, finite, fraction, not_negative

SETTINGS = dict(  # {flag: (default, help[, type or choices])}
    network=(None, "architecture; its resolution follows the data", list(networks.NETWORKS)),
    cond=(False, "condition on the class labels of the data"),
    xflip=(False, "mirror half of the images"),
    dropout=(None, "dropout probability; None: that of --network", fraction),
    p_mean=(-1.2, "mean of ln sigma, sigma being the noise level (EDM, Table 1)", finite),
    p_std=(1.2, "standard deviation of ln sigma"),
    lr=(None, "learning rate of Adam, after its ramp-up", float),
    lr_rampup_kimg=(None, "thousands of images over which it rises linearly from 0", not_negative),
    lr_decay_batches=(0.0, "after N steps it falls as 1/sqrt(steps), EDM2; 0: never", not_negative),
    beta2=(0.999, "Adam's beta2; beta1 is 0.9", fraction),
    ema_halflife_kimg=(500.0, "half-life of the averaged weights, thousands of images"),
)
SMALL = dict(batch=64, lr=1e-3, lr_rampup_kimg=10.0, ema_halflife_kimg=20.0,
             log_kimg=4.0, grid_kimg=64.0, save_kimg=16.0)
PRESETS = {
    "digits": dict(SMALL, data="digits", network="digits", kimg=100.0, batch=128,
                   lr_rampup_kimg=5.0, log_kimg=10.0, grid_kimg=50.0, save_kimg=50.0),
    "fashion-mnist": dict(SMALL, data="fashion-mnist", network="fashion-mnist", kimg=256.0),
    "cifar10-small": dict(SMALL, data="cifar10", network="cifar10-small", xflip=True, kimg=512.0),
    "pictures": dict(network="pictures", resolution=64, xflip=True, dropout=0.1, kimg=20_000.0,
                     batch=256, lr=5e-4, lr_rampup_kimg=500.0, ema_halflife_kimg=250.0),
    # EDM, Table 7. EDM also augments (its Section 5), which is not implemented beyond flips.
    "cifar10": dict(data="cifar10", network="cifar10", xflip=True, kimg=200_000.0, batch=512,
                    lr=1e-3, lr_rampup_kimg=10_000.0),
    "imagenet64": dict(data="imagenet-64x64.zip", network="imagenet64", cond=True,
                       kimg=2_500_000.0, batch=4096, lr=1e-4, lr_rampup_kimg=10_000.0,
                       ema_halflife_kimg=50_000.0, save_kimg=10_000.0, grid_kimg=10_000.0),
    # EDM2, Table 6, configuration S (XS: --lr 0.012).
    # EDM2's averaging profile widens with training; the 5 % limit of `update_ema` does so here.
    "imagenet512": dict(data="img512-sd.zip", network="edm2-s", cond=True, kimg=2_147_483.0,
                        batch=2048, lr=0.010, lr_rampup_kimg=10_000.0, lr_decay_batches=70_000.0,
                        beta2=0.99, p_mean=-0.4, p_std=1.0, ema_halflife_kimg=200_000.0,
                        save_kimg=10_000.0, grid_kimg=10_000.0),
}


def denoising_loss(net, x, sigma, eps, labels=None):
    """EDM, Equation 8: weighted squared error of D(x + sigma eps; sigma), summed over pixels, [N].

    x and eps [N, C, H, W], sigma [N]. A sum, not a mean: Adam's epsilon is absolute. For EDM2 the
    error is divided by the learned exp(u), with u added as the penalty (2312.02696, Equation 21).
    """
    sigma_data, s = net.config.sigma_data, sigma[:, None, None, None]
    weight = (s**2 + sigma_data**2) / (s * sigma_data) ** 2
    error = weight * (net(x + s * eps, sigma, labels) - x).square()
    if net.config.architecture == "edm2":
        u = net.logvar(sigma)[:, None, None, None]
        error = error / u.exp() + u
    return error.sum(dim=(1, 2, 3))


def learning_rate(args, nimg):
    """Linear ramp-up, then constant, or EDM2's inverse square root decay (2312.02696, Eq. 67)."""
    lr = args.lr
    if args.lr_decay_batches:
        lr /= max(nimg / (args.lr_decay_batches * args.batch), 1) ** 0.5
    if args.lr_rampup_kimg:
        lr *= min(nimg / (args.lr_rampup_kimg * 1000), 1)
    return lr


def load_init(args, dataset):
    """Stage 2: the `Denoiser` that --init names, checked against the data."""
    args.init = args.init or f"runs/{args.preset}/pretrain/network.pt"
    if not Path(args.init).exists():
        how = f"run `python pretrain.py --preset {args.preset}` first"
        if args.init.endswith(".pkl"):
            how = "download it (README, The paper's systems)"
        raise UserError(f"{args.init} is missing; {how}, or give --init a network of stage 1 or a "
                        "published checkpoint")
    if Path(args.init).resolve() == Path(args.outdir, "network.pt").resolve():
        raise UserError(f"{args.init} would be overwritten; choose another --outdir")
    net = checkpoints.load_network(args.init, role="denoiser")
    config = net.config
    names = net.about.get("classes")  # None in published networks
    fit = not config.label_dim or (
        not (names or dataset.classes) and 0 < dataset.label_dim <= config.label_dim)
    if not fit:
        dataset.require_labels()  # numbers the classes as stage 1 did, if the same have images
        fit = dataset.label_dim == config.label_dim and names in (None, dataset.classes)
    wanted = (config.img_resolution, config.img_channels, names or config.label_dim)
    found = (dataset.resolution, dataset.channels, dataset.classes or dataset.label_dim)
    if wanted[:2] != found[:2] or not fit:
        raise UserError(f"{args.init} has (resolution, channels, classes) {wanted}, but "
                        f"{dataset.name} has {found}; choose the data of stage 1")
    return net


def main():
    args = training.arguments(__doc__, SETTINGS, PRESETS, "runs/{preset}/pretrain")
    rt = training.Runtime(args.device, args.precision, args.batch, args.micro_batch)

    # Data and networks. The same seed on every rank: all start from the same weights.
    dataset = rt.main_first(lambda: data.load(args.data, resolution=args.resolution))
    if args.cond:
        dataset.require_labels()
    config = networks.NETWORKS[args.network]
    config = dataclasses.replace(
        config, img_resolution=dataset.resolution, img_channels=dataset.channels,
        label_dim=dataset.label_dim if args.cond else 0,
        dropout=config.dropout if args.dropout is None else args.dropout)
    torch.manual_seed(args.seed)
    net = networks.place(networks.Denoiser(config), rt.device, args.compile)
    optimizer = training.Optimizer(net, rt, (0.9, args.beta2))
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    ema.about = dict(role="denoiser", data=args.data,
                     classes=dataset.classes if args.cond else None,
                     class_frequencies=dataset.class_frequencies(net.config.label_dim))
    run = training.Run(args, rt, "stage 1", dataset, net=net, ema=ema, optimizer=optimizer)
    batches = data.batches(dataset, rt, args.seed, run.nimg, args.xflip)

    while run.unfinished():
        # A batch, its noise levels and its noise; one step of the denoiser.
        rt.seed(args.seed, run.nimg, "pretrain")
        x, labels = next(batches)
        sigma, eps = (rt.randn() * args.p_std + args.p_mean).exp(), rt.randn(*x.shape[1:])
        (loss,) = optimizer.step(
            learning_rate(args, run.nimg + args.batch), lambda *part: [denoising_loss(net, *part)],
            x, sigma, eps, labels)
        run.add(loss=loss.sum() / x[0].numel())
        run.advance()
        networks.update_ema(ema, net, args.batch, args.ema_halflife_kimg * 1000, run.nimg)

        # Log, look, save.
        if run.due(args.log_kimg):
            loss = run.pop_means()["loss"].item()
            run.report({"loss": loss}, f"loss {loss:.4f}")
        if run.due(args.grid_kimg):
            sample.preview(ema, run, args.seed)
        if run.due(args.save_kimg) or run.stopping:
            run.save(lambda: checkpoints.save_network(run.dir / "network.pt", ema, nimg=run.nimg))


if __name__ == "__main__":
    training.run(main)
