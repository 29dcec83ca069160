"""Stage 1: train an EDM denoiser D(x; sigma), from which stage 2 makes the one-step generator.

Elucidating the Design Space of Diffusion-Based Generative Models (EDM), arXiv 2206.00364; for `imagenet512` EDM2,
arXiv 2312.02696. Reads a data set (data.py). Writes into --outdir: `network.pt` (the EMA network, for sampling and for
stage 2), `checkpoint.pt` (all that a continuation needs), `log.jsonl` and sample grids. The same command again
continues the run; Ctrl-C or SIGTERM stops it after the step in hand, with a checkpoint.

    python pretrain.py                                    the embedded digits, minutes on a laptop CPU
    python pretrain.py --preset fashion-mnist             half an hour to an hour
    torchrun --nproc-per-node 8 pretrain.py --preset cifar10
"""

import argparse
import copy
import dataclasses

import torch

from machinery import checkpoints
from machinery import data
import networks
from machinery import training
import sample
from machinery.files import UserError
from machinery.training import Parser, fraction, not_negative, positive

# ---------------------------------------------------------------------------------------------------------
# Settings. The defaults of each preset; every flag overrides.

COMMON = dict(
    cond=False,  # conditional on the class labels of the data
    xflip=False,  # half of the images mirrored
    dropout=None,  # probability; None: that of the network
    p_mean=-1.2, p_std=1.2,  # ln sigma ~ N(p_mean, p_std^2) are the noise levels; EDM, Table 1
    beta2=0.999,  # of Adam; beta1 is 0.9
    lr_decay_batches=0.0,  # 0: the rate is constant after its ramp-up
    log_kimg=50.0, grid_kimg=1000.0, save_kimg=1000.0,  # a log line, a sample grid, a checkpoint every so many images
)  # fmt: skip
_CIFAR10 = dict(  # EDM, Table 7. EDM also augments (its Section 5), which is not implemented beyond flips.
    COMMON, data="cifar10", network="cifar10", xflip=True,
    kimg=200_000.0, batch=512,  # thousands of images in all; images per step
    lr=1e-3, lr_rampup_kimg=10_000.0,  # learning rate; thousands of images over which it rises from 0
    ema_halflife_kimg=500.0,  # thousands of images
)  # fmt: skip
PRESETS = {
    # Ours, tuned for a good result within minutes (digits) and an hour or two (fashion-mnist) of a laptop CPU.
    "digits": dict(
        COMMON, data="digits", network="digits", kimg=200.0, batch=128, lr=1e-3, lr_rampup_kimg=5.0,
        ema_halflife_kimg=20.0, log_kimg=10.0, grid_kimg=50.0, save_kimg=50.0,
    ),
    "fashion-mnist": dict(
        COMMON, data="fashion-mnist", network="fashion-mnist", kimg=256.0, batch=64, lr=1e-3, lr_rampup_kimg=10.0,
        ema_halflife_kimg=20.0, log_kimg=4.0, grid_kimg=64.0, save_kimg=16.0,
    ),
    # Ours, for a folder of pictures of any size (--data) and one GPU; not run at length.
    "pictures": dict(
        COMMON, data=None, resolution=64, network="pictures", kimg=20_000.0, batch=256, lr=5e-4, lr_rampup_kimg=500.0,
        ema_halflife_kimg=250.0, xflip=True, dropout=0.1,
    ),
    "cifar10": _CIFAR10,
    "cifar10-cond": dict(_CIFAR10, cond=True),
    # EDM, Table 7.
    "imagenet64": dict(
        COMMON, data="imagenet-64x64.zip", network="imagenet64", kimg=2_500_000.0, batch=4096, lr=1e-4,
        lr_rampup_kimg=10_000.0, ema_halflife_kimg=50_000.0, cond=True, save_kimg=10_000.0, grid_kimg=10_000.0,
    ),
    # EDM2, Table 6, configuration S; --lr 0.012, 0.010, 0.009, 0.008, 0.007, 0.0065 for edm2-xs to edm2-xxl. EDM2 averages
    # weights with a profile that widens in proportion to the training time. Our choice comes near it: with so
    # long a half-life, the limit of 5 % of the images seen is what counts (`networks.update_ema`).
    "imagenet512": dict(
        COMMON, data="img512-sd.zip", network="edm2-s", kimg=2_147_483.0, batch=2048, lr=0.010, lr_rampup_kimg=10_000.0,
        lr_decay_batches=70_000.0, beta2=0.99, p_mean=-0.4, p_std=1.0, ema_halflife_kimg=200_000.0, cond=True,
        save_kimg=10_000.0, grid_kimg=10_000.0,
    ),
}  # fmt: skip


def arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--network", choices=list(networks.NETWORKS), help="architecture and size; its resolution follows the data")
    add("--cond", action=argparse.BooleanOptionalAction, help="condition on the class labels of the data")
    add("--xflip", action=argparse.BooleanOptionalAction, help="flip half of the images horizontally")
    add("--dropout", type=fraction, metavar="P", help="dropout probability (default: that of --network)")
    add("--lr", type=positive(float), metavar="X", help="learning rate of Adam, after the ramp-up")
    add("--lr-rampup-kimg", type=not_negative, metavar="N", help="thousands of images over which it rises linearly from 0")
    add("--lr-decay-batches", type=not_negative, metavar="N", help="after N steps it falls as 1/sqrt(steps), as in EDM2; 0: never")
    add("--beta2", type=fraction, metavar="X", help="Adam's beta2; beta1 is 0.9")
    add("--ema-halflife-kimg", type=positive(float), metavar="N", help="half-life of the averaged weights, thousands of images")
    add("--p-mean", type=float, metavar="X", help="mean of ln sigma, sigma being the noise level trained on")
    add("--p-std", type=positive(float), metavar="X", help="standard deviation of ln sigma")
    args = training.parse_args(parser, PRESETS)
    args.outdir = args.outdir or f"runs/{args.preset}/pretrain"
    return args


# ---------------------------------------------------------------------------------------------------------
# The method.


def denoising_loss(net, x, sigma, eps, labels=None):
    """EDM, Equation 8: weighted squared error of D(x + sigma eps; sigma), per image and summed over pixels, [N].

    x and eps [N, C, H, W], sigma [N]. A sum, not a mean: Adam's epsilon is absolute, and with a mean over 3072 pixels
    the smallest gradients would come near it. For EDM2 the error is scaled by the learned variance exp(u), with u
    as the penalty (arXiv 2312.02696, Equation 21): all noise levels then contribute alike.
    """
    sigma_data = net.config.sigma_data
    s = sigma[:, None, None, None]
    weight = (s**2 + sigma_data**2) / (s * sigma_data) ** 2
    error = weight * (net(x + s * eps, sigma, labels) - x).square()
    if net.config.architecture == "edm2":
        u = net.logvar(sigma)[:, None, None, None]
        error = error / u.exp() + u
    return error.sum(dim=(1, 2, 3))


def learning_rate(args, nimg):
    """Linear ramp-up, then constant, or EDM2's inverse square root decay (arXiv 2312.02696, Equation 67)."""
    lr = args.lr
    if args.lr_decay_batches:
        lr /= max(nimg / (args.lr_decay_batches * args.batch), 1) ** 0.5
    if args.lr_rampup_kimg:
        lr *= min(nimg / (args.lr_rampup_kimg * 1000), 1)
    return lr


def network_config(name, dataset, cond, dropout=None):
    """The named configuration, with the resolution, channels and classes of the data."""
    if cond and not dataset.label_dim:
        raise UserError(f"--cond: {dataset.name} has no labels; add a dataset.json or leave --cond out")
    config = networks.NETWORKS[name]
    return dataclasses.replace(
        config, img_resolution=dataset.resolution, img_channels=dataset.channels,
        label_dim=dataset.label_dim if cond else 0, dropout=config.dropout if dropout is None else dropout,
    )  # fmt: skip


def main():
    args = arguments()
    rt = training.start(args.device, args.precision)

    # Data and networks. The same seed on every rank: all start from the same weights.
    dataset = rt.main_first(lambda: data.load(args.data, resolution=args.resolution))
    torch.manual_seed(args.seed)
    net = networks.Denoiser(network_config(args.network, dataset, args.cond, args.dropout)).train()
    networks.place(net, rt.device, args.compile)
    networks.normalize_weights(net)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    ema.about = {"role": "denoiser"}
    learner = training.Learner(net, rt, args.lr, (0.9, args.beta2), args.batch, args.micro_batch)
    run = training.Run(args, rt, "stage 1", dict(net=net, ema=ema, optimizer=learner.optimizer, scaler=learner.scaler))
    config = net.config
    rt.print(
        f"stage 1: {config.architecture}, {networks.parameter_count(net) / 1e6:.2f} M parameters, "
        f"{dataset.name} ({len(dataset)} x {config.img_resolution}x{config.img_resolution}x{config.img_channels}), "
        f"{rt.world_size} x {rt.device.type}, {rt.precision}, batch {args.batch} in parts of {learner.micro_batch}"
    )
    batches = data.Batches(dataset, args.batch, args.seed, run.nimg, rt.rank, rt.world_size, rt.device.type == "cuda")

    def loss(x, sigma, eps, labels):
        each = denoising_loss(net, x, sigma, eps, labels)
        run.add(loss=each.sum() / x[0].numel())
        return each

    while run.goes_on():
        # A batch, its noise levels and its noise.
        draw = training.Draw(rt, args.batch, args.seed, run.nimg, "pretrain")
        x, labels = batches.training_batch(draw, args.xflip)
        sigma, eps = (draw.normal() * args.p_std + args.p_mean).exp(), draw.normal(*x.shape[1:])

        # One step of the denoiser. Masks of dropout follow the rank and the micro-batch.
        torch.manual_seed(training.seed_of(args.seed, run.nimg, rt.rank, "dropout"))
        learner.step(learning_rate(args, run.nimg + args.batch), loss, x, sigma, eps, labels if args.cond else None)
        networks.normalize_weights(net)
        run.advance()
        networks.update_ema(ema, net, args.batch, args.ema_halflife_kimg * 1000, run.nimg)

        # Machinery from here on: log, sample grid, files.
        if run.due(args.log_kimg):
            sums, images = run.take()
            mean = sums["loss"].item() / images
            run.report({"loss": mean}, f"loss {mean:.4f}")
        if run.due(args.save_kimg) or run.stopping:
            about = dict(role="denoiser", nimg=run.nimg, data=dataset.name)
            run.save(lambda: checkpoints.save_network(run.dir / "network.pt", ema, **about))
        if run.due(args.grid_kimg) and rt.is_main:
            sample.preview(ema, run.dir / f"samples-{run.nimg // 1000:06d}.png", args.seed, rt, run.since(args.grid_kimg))
    run.finish()


if __name__ == "__main__":
    training.run(main)
