"""Stage 2: turn the stage-1 denoiser into a one-step generator by following a learned log density ratio.

DiffRatio: Training One-Step Diffusion Models Without Teacher Supervision, arXiv 2502.08005. The generator is
G(z) = D(t_init z; t_init), a copy of the stage-1 network at one noise level. A ratio network is trained to tell noised
data from noised samples, at every noise level; its logit h estimates log p_sigma / q_sigma. The generator follows the
gradient of a divergence that is a function of h. There is no teacher and no score network of the student.

Reads a data set (data.py) and the network of stage 1 (`--init`: a network.pt of pretrain.py or a published EDM or EDM2
pickle). Writes into --outdir: `network.pt` (the EMA generator, for sampling), `ratio.pt` (the ratio network),
`checkpoint.pt` (all that a continuation needs), `log.jsonl` and sample grids. The same command again continues the run.

    python train_diffratio.py                                  the embedded digits, after python pretrain.py
    torchrun train_diffratio.py --divergence dijs
    torchrun --nproc-per-node 8 train_diffratio.py --preset cifar10 --init edm-cifar10-32x32-uncond-vp.pkl
"""

import argparse
import copy
import dataclasses
import math
from pathlib import Path

import torch
import torch.nn.functional as F

import checkpoints
import data
import fid
import networks
import pretrain
import runtime
import sample
from files import UserError
from runtime import HelpFormatter, positive

# ---------------------------------------------------------------------------------------------------------
# Settings. The defaults of each preset; every flag overrides.

COMMON = dict(
    divergence="dijs", t_init=2.5, ratio_init="pretrained", ratio_steps=1, p_mean=-1.2, p_std=1.2, beta2=0.999,
    lr_decay_kimg=0.0, xflip=False, network=None, fid_every=None, log_kimg=50.0, grid_kimg=200.0, save_kimg=1000.0,
)  # fmt: skip
# The paper gives t_init, beta1 = 0 and the divergences. All else in the presets is our choice:
# - noise levels: the distribution of stage 1, whose network knows these levels best;
# - learning rates 1 : 5 on the 1797 digits, where a faster ratio network learns the images by heart, and 1 : 10 on
#   large data;
# - on the digits both fall to zero over the run, which brings the samples a little closer;
# - for the large systems, rates of the size that teacher-supervised methods use from the same checkpoints, and
#   batches as large as theirs. They have not been run at full length.
_CIFAR10 = dict(
    COMMON, data="cifar10", kimg=50_000.0, batch=512, lr=1e-5, ratio_lr=1e-4, ema_halflife_kimg=500.0, xflip=True
)
PRESETS = {
    "digits": dict(
        COMMON, data="digits", init="runs/digits/pretrain/network.pt", outdir="runs/digits/dijs", kimg=130.0, batch=128,
        lr=1e-4, ratio_lr=5e-4, lr_decay_kimg=130.0, ema_halflife_kimg=20.0, log_kimg=5.0, grid_kimg=25.0, save_kimg=25.0,
    ),
    "fashion-mnist": dict(
        COMMON, data="fashion-mnist", init="runs/fashion-mnist/pretrain/network.pt", outdir="runs/fashion-mnist/dijs",
        kimg=300.0, batch=128, lr=1e-4, ratio_lr=1e-3, lr_decay_kimg=300.0, ema_halflife_kimg=10.0, log_kimg=4.0,
        grid_kimg=20.0, save_kimg=20.0,
    ),
    # Memory per GPU below is computed, not measured, by examples/memory.py: without the allocator's overhead.
    # 50 million images; 9 GB at micro-batch 64, 16 GB at 128.
    "cifar10": dict(_CIFAR10, init="edm-cifar10-32x32-uncond-vp.pkl", outdir="runs/cifar10/dijs"),
    "cifar10-cond": dict(_CIFAR10, init="edm-cifar10-32x32-cond-vp.pkl", outdir="runs/cifar10-cond/dijs"),
    # 200 million images; 22 GB at micro-batch 16, 36 GB at 32, 63 GB at 64.
    "imagenet64": dict(
        COMMON, data="imagenet-64x64.zip", init="edm-imagenet-64x64-cond-adm.pkl", outdir="runs/imagenet64/dijs",
        kimg=200_000.0, batch=2048, lr=4e-6, ratio_lr=4e-5, ema_halflife_kimg=2000.0,
    ),
    # 200 million images; EDM2-S: 15 GB at micro-batch 16, 22 GB at 32, 35 GB at 64. EDM2's weights have unit norm per
    # output, far above EDM's: the rates are relative to that.
    "imagenet512": dict(
        COMMON, data="img512-sd.zip", init="edm2-img512-s-2147483-0.130.pkl", outdir="runs/imagenet512/dijs",
        kimg=200_000.0, batch=2048, lr=5e-5, ratio_lr=5e-4, beta2=0.99, p_mean=-0.4, p_std=1.0, ema_halflife_kimg=2000.0,
    ),
}  # fmt: skip

# D_f(q || p) = E_p[f(q/p)]. Its gradient for a sample x of q is f'(u) at u = q/p = exp(-h), since the score of q itself
# integrates to zero: the table gives f'(exp(-h)) up to a constant. One line is one method.
DIVERGENCES = {
    "dijs": lambda h: -0.5 * F.softplus(h),  # Jensen-Shannon, f(u) = 1/2 [u ln u - (u + 1) ln((u + 1) / 2)]
    "dikl": lambda h: -h,  # reverse Kullback-Leibler, f(u) = u ln u
    "dirm": lambda h: F.softplus(-h),  # realism maximisation, max ln sigmoid(h): no f-divergence
    "fkl": lambda h: -torch.exp(h),  # forward Kullback-Leibler, f(u) = -ln u
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--divergence", choices=list(DIVERGENCES), help="what the generator minimises")
    add("--init", metavar="PATH|random", help="network of stage 1, or random weights (which collapse)")
    add("--network", choices=list(networks.NETWORKS), help="architecture and size for --init random")
    add("--t-init", type=positive(float), metavar="X", help="fixed noise level of the generator, standard deviation")
    add("--ratio-init", choices=["pretrained", "random"], help="start of the ratio network's encoder")
    add("--ratio-steps", type=positive(int), metavar="N", help="steps of the ratio network per step of the generator")
    add("--lr", type=positive(float), metavar="X", help="learning rate of the generator (Adam)")
    add("--ratio-lr", type=positive(float), metavar="X", help="learning rate of the ratio network (Adam)")
    add("--lr-decay-kimg", type=float, metavar="N", help="thousands of images over which both fall as a half cosine to 0; "
        "0: constant")  # fmt: skip
    add("--beta2", type=float, metavar="X", help="Adam's beta2; beta1 is 0, larger values collapse")
    add("--ema-halflife-kimg", type=positive(float), metavar="N", help="half-life of the averaged generator, thousands of images")
    add("--p-mean", type=float, metavar="X", help="mean of ln sigma, the noise level at which densities are compared")
    add("--p-std", type=positive(float), metavar="X", help="standard deviation of ln sigma")
    add("--fid-every", type=positive(float), metavar="KIMG", help="measure FID of the averaged generator every KIMG "
        "thousand images and keep the best as network-best.pt (default: never)")  # fmt: skip
    add("--fid-images", type=positive(int), default=50_000, metavar="N", help="samples per measurement")
    add("--fid-reference", metavar="NAME|PATH", help="what to compare with: images or statistics (default: --data)")
    add("--fid-features", metavar="PATH", help="stage-1 network whose features to use (default: Inception)")
    add("--inception", metavar="PATH", help="Inception weights (default: torch's hub cache, filled by a download)")
    add("--xflip", action=argparse.BooleanOptionalAction, help="flip half of the images horizontally")
    return runtime.parse_args(parser, PRESETS)


# ---------------------------------------------------------------------------------------------------------
# The method.


def ratio_loss(ratio, real, fake, sigma, eps_real, eps_fake, labels=None):
    """Binary cross-entropy of the ratio network on noised data (label 1) and noised samples (label 0), per image.

    real, fake, eps_* [N, C, H, W]; sigma [N], the same for both. Returns loss [N] and the logits [N] of real and fake.
    """
    s = sigma[:, None, None, None]
    both = torch.cat([real + s * eps_real, fake + s * eps_fake])
    h_real, h_fake = ratio(both, sigma.repeat(2), None if labels is None else labels.repeat(2)).chunk(2)
    return F.softplus(-h_real) + F.softplus(h_fake), h_real, h_fake


def generator_loss(ratio, fake, sigma, eps, divergence, labels=None):
    """The divergence's pathwise loss at noise level sigma, per image [N]: gradients flow through x = fake + sigma eps."""
    return DIVERGENCES[divergence](ratio(fake + sigma[:, None, None, None] * eps, sigma, labels))


def learning_rate_factor(args, nimg):
    """Half a cosine from one to zero over --lr-decay-kimg, or constant one."""
    if not args.lr_decay_kimg:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(nimg / (args.lr_decay_kimg * 1000), 1)))


BANDS = (0.1, 0.3, 1.0, 3.0)  # edges of the noise-level bands in the log


def band_statistics(records, rt):
    """Per noise-level band, over all that was recorded: the ratio network's accuracy, loss, mean and spread of the logit.

    records: list of (sigma [N], h_real [N], h_fake [N]). The sums are taken on the device and over the ranks.
    """
    sigma, h_real, h_fake = (torch.cat(t).double() for t in zip(*records))
    band = torch.bucketize(sigma.float(), torch.tensor(BANDS, device=sigma.device))
    h = torch.stack([h_real, h_fake])
    right = torch.stack([h_real > 0, h_fake < 0]) + 0.5 * (h == 0)
    loss = torch.stack([F.softplus(-h_real), F.softplus(h_fake)])
    values = torch.stack([torch.ones_like(h), right, loss, h, h * h]).sum(dim=1)  # [5, N]
    sums = rt.sum(torch.zeros(5, len(BANDS) + 1, dtype=torch.float64, device=sigma.device).index_add_(1, band, values)).cpu()
    names = [f"<{BANDS[0]}", *(f"{a}-{b}" for a, b in zip(BANDS, BANDS[1:])), f">{BANDS[-1]}"]
    out = {}
    for name, (n, right, loss, total, square) in zip(names, sums.T.tolist()):
        if n:
            spread = max(square / n - (total / n) ** 2, 0) ** 0.5
            out[name] = dict(accuracy=right / n, loss=loss / n, logit_mean=total / n, logit_std=spread)
    return out, (sums[1].sum() / sums[0].sum()).item(), (sums[2].sum() / sums[0].sum()).item()


def main():
    args = arguments()
    rt = runtime.start(args.device, args.precision)
    micro_batches, micro_batch = runtime.split_batch(args.batch, args.micro_batch, rt.world_size)

    # Data, generator, ratio network. Dropout is off: the generator is a function of z, and the loss its gradient.
    dataset = rt.main_first(lambda: data.load(args.data))
    torch.manual_seed(args.seed)
    init = load_init(args, dataset)
    config = dataclasses.replace(init.config, dropout=0.0)
    generator, ratio = networks.Denoiser(config), networks.RatioNetwork(config)
    generator.load_state_dict(init.state_dict())
    if args.ratio_init == "pretrained":
        ratio.load_encoder(init)
    for net in (generator, ratio):
        net.to(rt.device, memory_format=torch.channels_last).train()
        networks.normalize_weights(net)
    ema = copy.deepcopy(generator).eval().requires_grad_(False)
    ema.about = {"role": "generator", "t_init": args.t_init}
    # beta1 = 0: the gradient field moves with the ratio network, and momentum along an old field makes both collapse.
    betas = (0.0, args.beta2)
    generator_opt = torch.optim.Adam(generator.parameters(), lr=args.lr, betas=betas, fused=True)
    ratio_opt = torch.optim.Adam(ratio.parameters(), lr=args.ratio_lr, betas=betas, fused=True)
    generator_scaler, ratio_scaler = rt.grad_scaler(), rt.grad_scaler()

    parts = dict(generator=generator, ratio=ratio, ema=ema, generator_opt=generator_opt, ratio_opt=ratio_opt,
                 generator_scaler=generator_scaler, ratio_scaler=ratio_scaler)  # fmt: skip
    run = runtime.Run(args, rt, "stage 2")
    best_fid = None
    if run.state:
        best_fid = run.state["best_fid"]
        for name, part in parts.items():
            part.load_state_dict(run.state[name])
    del init
    run.state = None  # frees its memory
    if args.compile:
        generator.compile()
        ratio.compile()
    rt.print(
        f"stage 2: {args.divergence}, generator {networks.parameter_count(generator) / 1e6:.2f} M and ratio "
        f"{networks.parameter_count(ratio) / 1e6:.2f} M parameters, {dataset.name} ({len(dataset)} images), "
        f"{rt.world_size} x {rt.device.type}, {rt.precision}, batch {args.batch} = {rt.world_size} x {micro_batches} x {micro_batch}"
    )
    measure_fid = fid_measurement(args, dataset, rt) if args.fid_every else None
    shape = (config.img_channels, config.img_resolution, config.img_resolution)
    parts_of_batch = [slice(i * micro_batch, (i + 1) * micro_batch) for i in range(micro_batches)]
    # One forward of the generator serves both steps if the batch is in one piece: its graph then waits in memory.
    shared = micro_batches == 1
    records, losses = [], []
    batches = data.Batches(dataset, args.batch, args.seed, run.nimg * args.ratio_steps, rt.rank, rt.world_size)

    while run.nimg < run.total_nimg:
        factor = learning_rate_factor(args, run.nimg)
        generator_opt.param_groups[0]["lr"], ratio_opt.param_groups[0]["lr"] = args.lr * factor, args.ratio_lr * factor

        # Ratio steps: noised data against noised samples. The samples carry the classes of the data.
        ratio.requires_grad_(True)
        for step in range(args.ratio_steps):
            raw, labels = next(batches)
            draw = runtime.Draw(rt, args.batch, args.seed, run.nimg, step, "stage 2")
            flip = draw.coin() if args.xflip else None
            real = dataset.to_model(raw, rt.device, flip, draw.normal(*shape) if dataset.is_latent else None)
            labels = labels.to(rt.device, non_blocking=True) if config.label_dim else None
            z, sigma = draw.normal(*shape), (draw.normal() * args.p_std + args.p_mean).exp()
            eps_real, eps_fake = draw.normal(*shape), draw.normal(*shape)
            keep_graph = shared and step == args.ratio_steps - 1
            for i in parts_of_batch:
                y = None if labels is None else labels[i]
                with rt.autocast():
                    with torch.set_grad_enabled(keep_graph):
                        fake = sample.one_step(generator, z[i], y, args.t_init)
                    loss, h_real, h_fake = ratio_loss(ratio, real[i], fake.detach(), sigma[i], eps_real[i], eps_fake[i], y)
                ratio_scaler.scale(loss.sum() / args.batch).backward()
                records.append((sigma[i], h_real.detach(), h_fake.detach()))
            runtime.optimizer_step(ratio_opt, ratio_scaler, rt)
            networks.normalize_weights(ratio)

        # Generator step: the samples z gave, re-noised at new levels, judged by the frozen ratio network.
        ratio.requires_grad_(False)
        sigma, eps = (draw.normal() * args.p_std + args.p_mean).exp(), draw.normal(*shape)
        for i in parts_of_batch:
            y = None if labels is None else labels[i]
            with rt.autocast():
                if not shared:
                    fake = sample.one_step(generator, z[i], y, args.t_init)
                loss = generator_loss(ratio, fake, sigma[i], eps[i], args.divergence, y)
            generator_scaler.scale(loss.sum() / args.batch).backward()
            losses.append(loss.detach().sum())
        runtime.optimizer_step(generator_opt, generator_scaler, rt)
        networks.normalize_weights(generator)

        run.nimg += args.batch
        networks.update_ema(ema, generator, args.batch, min(args.ema_halflife_kimg * 1000, 0.05 * run.nimg))

        if run.due(args.log_kimg):
            bands, accuracy, bce = band_statistics(records, rt)
            loss = rt.sum(torch.stack(losses).sum()).item() / (len(losses) * micro_batch * rt.world_size)
            run.report({"generator_loss": loss, "ratio_loss": bce, "ratio_accuracy": accuracy, "bands": bands},
                       f"generator {loss:+.4f}  ratio {bce:.4f}, {100 * accuracy:.1f} % right")  # fmt: skip
            records, losses = [], []
        if run.due(args.grid_kimg) and rt.is_main:
            sample.preview(ema, run.dir / f"samples-{run.nimg // 1000:06d}.png", args.seed, rt.device)
        about = dict(nimg=run.nimg, data=dataset.name, divergence=args.divergence, t_init=args.t_init)
        if measure_fid and run.due(args.fid_every):
            value = measure_fid(ema)
            run.note({"fid": value}, f"FID {value:.4g} of {args.fid_images} samples")
            if rt.is_main and (best_fid is None or value < best_fid):
                best_fid = value
                checkpoints.save_network(run.dir / "network-best.pt", ema, role="generator", fid=value, **about)
        if run.due(args.save_kimg):
            run.save(best_fid=best_fid, **{name: part.state_dict() for name, part in parts.items()})
            if rt.is_main:
                checkpoints.save_network(run.dir / "network.pt", ema, role="generator", **about)
                checkpoints.save_network(run.dir / "ratio.pt", ratio, role="ratio", **about)
    rt.print(f"stage 2 is done: {run.dir / 'network.pt'}")


def fid_measurement(args, dataset, rt):
    """Function from a generator to its FID; the ranks share the sampling. The reference is measured once and cached."""
    extractor = fid.load_extractor(rt, args.fid_features, args.inception)
    decode = data.to_uint8
    if dataset.is_latent:
        decode = sample.latent_decoder(rt.device, sample.VAE)
        if decode is None:
            raise UserError(f"--fid-every: {sample.NO_DIFFUSERS}")
    reference = rt.main_first(lambda: fid.open_side(args.fid_reference)) if args.fid_reference else dataset
    if isinstance(reference, data.Dataset):
        reference = fid.reference_statistics(extractor, reference, rt)
    reference.check(extractor.tag, extractor.dim, extractor.name)
    mine = range(rt.rank, args.fid_images, rt.world_size)

    def measure(ema):
        batches = (decode(x) for x, _ in sample.in_batches(ema, mine, args.seed, rt.device, batch=64))
        return fid.frechet_distance(fid.measure(extractor, batches, rt, "samples"), reference)

    return measure


def load_init(args, dataset):
    """The stage-1 `Denoiser` that --init names, checked against the data."""
    if args.init == "random":
        if not args.network:
            raise UserError("--init random: say which network with --network")
        cond = networks.NETWORKS[args.network].label_dim > 0
        return networks.Denoiser(pretrain.network_config(args.network, dataset, cond))
    if not Path(args.init).exists():
        trained = Path(pretrain.PRESETS[args.preset]["outdir"]) / "network.pt"
        raise UserError(
            f"stage 2 starts from stage 1, but {args.init} is missing; run `python pretrain.py --preset {args.preset}` first "
            f"and give --init {trained}" + (", or download the published checkpoint" if args.init.endswith(".pkl") else "")
        )
    net = checkpoints.load_network(args.init, role="denoiser")
    wanted, found = (net.config.img_resolution, net.config.img_channels), (dataset.resolution, dataset.channels)
    if wanted != found:
        raise UserError(
            f"{args.init} is for images of {wanted[0]}x{wanted[0]} with {wanted[1]} channels, but {dataset.name} has "
            f"{found[0]}x{found[0]} with {found[1]}; choose the data that stage 1 was trained on"
        )
    if net.config.label_dim and dataset.label_dim not in range(1, net.config.label_dim + 1):
        raise UserError(
            f"{args.init} is conditional on {net.config.label_dim} classes, but {dataset.name} has "
            f"{dataset.label_dim or 'no'} labels; choose the data that stage 1 was trained on"
        )
    return net


if __name__ == "__main__":
    runtime.run(main)
