"""Stage 1: train an EDM denoiser D(x; sigma), from which stage 2 makes the one-step generator.

Elucidating the Design Space of Diffusion-Based Generative Models (EDM), arXiv 2206.00364; for `imagenet512` EDM2,
arXiv 2312.02696. Reads a data set (data.py). Writes into --outdir: `network.pt` (the EMA network, for sampling and for
stage 2), `checkpoint.pt` (all that a continuation needs), `log.jsonl` and sample grids. The same command again
continues the run.

    python pretrain.py                                    the embedded digits, minutes on a laptop CPU
    python pretrain.py --preset fashion-mnist             hours on a laptop CPU
    torchrun --nproc-per-node 8 pretrain.py --preset cifar10
"""

import argparse
import copy
import dataclasses

import torch

import checkpoints
import data
import networks
import runtime
import sample
from files import UserError
from runtime import HelpFormatter, positive

# ---------------------------------------------------------------------------------------------------------
# Settings. The defaults of each preset; every flag overrides.

COMMON = dict(
    xflip=False, cond=False, dropout=None, p_mean=-1.2, p_std=1.2, beta2=0.999, lr_decay_batches=0.0,
    log_kimg=50.0, grid_kimg=1000.0, save_kimg=1000.0,
)  # fmt: skip
_CIFAR10 = dict(  # EDM, Table 7. EDM also augments (its Section 5), which is not implemented beyond flips.
    COMMON, data="cifar10", network="cifar10", kimg=200_000.0, batch=512, lr=1e-3, lr_rampup_kimg=10_000.0,
    ema_halflife_kimg=500.0, xflip=True,
)  # fmt: skip
PRESETS = {
    # Ours, tuned for a good result within minutes (digits) and hours (fashion-mnist) of a laptop CPU.
    "digits": dict(
        COMMON, data="digits", network="digits", outdir="runs/digits/pretrain", kimg=200.0, batch=128,
        lr=1e-3, lr_rampup_kimg=5.0, ema_halflife_kimg=20.0, log_kimg=8.0, grid_kimg=40.0, save_kimg=40.0,
    ),
    "fashion-mnist": dict(
        COMMON, data="fashion-mnist", network="fashion-mnist", outdir="runs/fashion-mnist/pretrain", kimg=600.0,
        batch=128, lr=1e-3, lr_rampup_kimg=10.0, ema_halflife_kimg=20.0, log_kimg=4.0, grid_kimg=40.0, save_kimg=20.0,
    ),
    "cifar10": dict(_CIFAR10, outdir="runs/cifar10/pretrain"),
    "cifar10-cond": dict(_CIFAR10, outdir="runs/cifar10-cond/pretrain", cond=True),
    # EDM, Table 7.
    "imagenet64": dict(
        COMMON, data="imagenet-64x64.zip", network="imagenet64", outdir="runs/imagenet64/pretrain", kimg=2_500_000.0,
        batch=4096, lr=1e-4, lr_rampup_kimg=10_000.0, ema_halflife_kimg=50_000.0, cond=True, save_kimg=10_000.0,
        grid_kimg=10_000.0,
    ),
    # EDM2, Table 6, configuration S; --lr 0.012, 0.010, 0.009, 0.008, 0.007, 0.0065 for edm2-xs to edm2-xxl. EDM2 averages
    # weights with a profile that widens in proportion to the training time. Our choice comes near it: with so
    # long a half-life, the limit of 5 % of the images seen is what counts (see `main`).
    "imagenet512": dict(
        COMMON, data="img512-sd.zip", network="edm2-s", outdir="runs/imagenet512/pretrain", kimg=2_147_483.0,
        batch=2048, lr=0.010, lr_rampup_kimg=10_000.0, lr_decay_batches=70_000.0, beta2=0.99, p_mean=-0.4, p_std=1.0,
        ema_halflife_kimg=200_000.0, cond=True, save_kimg=10_000.0, grid_kimg=10_000.0,
    ),
}  # fmt: skip


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--network", choices=list(networks.NETWORKS), help="architecture and size; its resolution follows the data")
    add("--cond", action=argparse.BooleanOptionalAction, help="condition on the class labels of the data")
    add("--xflip", action=argparse.BooleanOptionalAction, help="flip half of the images horizontally")
    add("--dropout", type=float, metavar="P", help="dropout probability (default: that of --network)")
    add("--lr", type=positive(float), metavar="X", help="learning rate of Adam, after the ramp-up")
    add("--lr-rampup-kimg", type=float, metavar="N", help="thousands of images over which it rises linearly from 0")
    add("--lr-decay-batches", type=float, metavar="N", help="after N steps it falls as 1/sqrt(steps), as in EDM2; 0: never")
    add("--beta2", type=float, metavar="X", help="Adam's beta2; beta1 is 0.9")
    add("--ema-halflife-kimg", type=positive(float), metavar="N", help="half-life of the averaged weights, thousands of images")
    add("--p-mean", type=float, metavar="X", help="mean of ln sigma, sigma being the noise level trained on")
    add("--p-std", type=positive(float), metavar="X", help="standard deviation of ln sigma")
    return runtime.parse_args(parser, PRESETS)


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
    rt = runtime.start(args.device, args.precision)
    micro_batches, micro_batch = runtime.split_batch(args.batch, args.micro_batch, rt.world_size)

    # Data and networks. The same seed on every rank: all start from the same weights.
    dataset = rt.main_first(lambda: data.load(args.data))
    torch.manual_seed(args.seed)
    net = networks.Denoiser(network_config(args.network, dataset, args.cond, args.dropout)).to(rt.device).train()
    net.to(memory_format=torch.channels_last)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    ema.about = {"role": "denoiser"}
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, betas=(0.9, args.beta2), fused=True)
    scaler = rt.grad_scaler()

    run = runtime.Run(args, rt, "stage 1")
    if run.state:
        net.load_state_dict(run.state["net"])
        ema.load_state_dict(run.state["ema"])
        optimizer.load_state_dict(run.state["optimizer"])
        scaler.load_state_dict(run.state["scaler"])
    run.state = None  # frees its memory
    if args.compile:
        net.compile()
    networks.normalize_weights(net)
    config = net.config
    rt.print(
        f"stage 1: {config.architecture}, {networks.parameter_count(net) / 1e6:.2f} M parameters, "
        f"{dataset.name} ({len(dataset)} x {config.img_resolution}x{config.img_resolution}x{config.img_channels}), "
        f"{rt.world_size} x {rt.device.type}, {rt.precision}, batch {args.batch} = {rt.world_size} x {micro_batches} x {micro_batch}"
    )
    latent_shape = (config.img_channels, config.img_resolution, config.img_resolution)
    losses = []
    batches = data.Batches(dataset, args.batch, args.seed, run.nimg, rt.rank, rt.world_size)

    while run.nimg < run.total_nimg:
        raw, labels = next(batches)
        draw = runtime.Draw(rt, args.batch, args.seed, run.nimg, "pretrain")
        flip = draw.coin() if args.xflip else None
        x = dataset.to_model(raw, rt.device, flip, draw.normal(*latent_shape) if dataset.is_latent else None)
        labels = labels.to(rt.device, non_blocking=True) if config.label_dim else None
        sigma = (draw.normal() * args.p_std + args.p_mean).exp()
        eps = draw.normal(*x.shape[1:])

        # Gradient of the mean over the global batch, micro-batch by micro-batch.
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, run.nimg + args.batch)
        for i in range(micro_batches):
            part = slice(i * micro_batch, (i + 1) * micro_batch)
            torch.manual_seed(runtime.seed_of(args.seed, run.nimg, rt.rank, i, "dropout"))
            with rt.autocast():
                loss = denoising_loss(net, x[part], sigma[part], eps[part], None if labels is None else labels[part])
            scaler.scale(loss.sum() / args.batch).backward()
            losses.append(loss.detach().sum() / x[0].numel())
        runtime.optimizer_step(optimizer, scaler, rt)
        networks.normalize_weights(net)

        # The average forgets faster at the start, when the weights are still far off (EDM, as in its training code).
        run.nimg += args.batch
        networks.update_ema(ema, net, args.batch, min(args.ema_halflife_kimg * 1000, 0.05 * run.nimg))

        if run.due(args.log_kimg):
            total = rt.sum(torch.stack(losses).sum())
            loss = total.item() / (len(losses) * micro_batch * rt.world_size)
            run.report({"loss": loss}, f"loss {loss:.4f}")
            losses = []
        if run.due(args.grid_kimg) and rt.is_main:
            sample.preview(ema, run.dir / f"samples-{run.nimg // 1000:06d}.png", args.seed, rt.device)
        if run.due(args.save_kimg):
            run.save(net=net.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
            if rt.is_main:
                checkpoints.save_network(run.dir / "network.pt", ema, role="denoiser", nimg=run.nimg, data=dataset.name)
    rt.print(f"stage 1 is done: {run.dir / 'network.pt'}")


if __name__ == "__main__":
    runtime.run(main)
