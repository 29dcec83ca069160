"""Stage 2: turn the stage-1 denoiser into a one-step generator by following a learned log density ratio.

DiffRatio: Training One-Step Diffusion Models Without Teacher Supervision, arXiv 2502.08005. The generator is
G(z) = D(t_init z; t_init), a copy of the stage-1 network at one noise level. A ratio network is trained to tell noised
data from noised samples, at every noise level; its logit h estimates log p_sigma / q_sigma. The generator follows the
gradient of a divergence that is a function of h. There is no teacher and no score network of the student.

Reads a data set (data.py) and the network of stage 1 (`--init`: a network.pt of pretrain.py or a published EDM or EDM2
pickle). Writes into --outdir: `network.pt` (the EMA generator, for sampling), `ratio.pt` (the ratio network),
`checkpoint.pt` (all that a continuation needs), `log.jsonl` and sample grids. The same command again continues the run;
Ctrl-C or SIGTERM stops it after the step in hand, with a checkpoint.

A line of log.jsonl holds means over the images since the line before:
    nimg                images seen so far; images_per_second, peak_memory_gb: speed and memory
    generator_loss      mean of the divergence's loss: it says whether the run is alive, not how good the samples are
    ratio_loss          binary cross-entropy; ln 2 = 0.693 where the ratio network cannot tell samples from data, as it
                        should be in the end; ln 2 minus it bounds the Jensen-Shannon divergence from below
    ratio_accuracy      share of data and samples told apart; 0.5 is blind. Far above it at small sigma late in a run on
                        few images: the ratio network knows them by heart
    bands               the same per band of noise levels sigma, with mean and standard deviation of the logit h
    fid                 with --fid-every: the distance of the averaged generator

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

from machinery import checkpoints
from machinery import data
import fid
import networks
import pretrain
from machinery import training
import sample
from machinery.files import UserError
from machinery.training import Parser, fraction, not_negative, positive

# ---------------------------------------------------------------------------------------------------------
# Settings. The defaults of each preset; every flag overrides.

COMMON = dict(
    divergence="dijs",  # what the generator minimises: a line of DIVERGENCES below
    t_init=2.5,  # noise level at which the generator is frozen (the paper's)
    noise="lognormal",  # levels at which densities are compared: lognormal, or karras as the teacher-supervised peers
    p_mean=-1.2, p_std=1.2,  # lognormal: ln sigma ~ N(p_mean, p_std^2), EDM's levels of stage 1
    karras_share=0.8,  # karras: up to this share of EDM's schedule, sigma 24.4; SiD's choice
    lr_decay_kimg=0.0,  # thousands of images over which both learning rates fall to 0; 0: constant; None: the run
    beta1=0.0, beta2=0.999,  # of Adam; beta1 = 0 is the paper's
    ratio_steps=1,  # of the ratio network per step of the generator (the paper's)
    ratio_init="pretrained",  # its encoder starts from stage 1
    ratio_width=None,  # its channels at multiplier 1; None: the generator's
    network=None,  # for --init random only
    xflip=False,  # half of the images mirrored
    fid_every=None,  # thousands of images between measurements of FID; None: never
    log_kimg=50.0, grid_kimg=200.0, save_kimg=1000.0,  # a log line, a sample grid, a checkpoint every so many images
)  # fmt: skip
# The paper gives t_init, beta1, ratio_steps and the divergences. All else in the presets is our choice. For the large
# systems it rests on what peers published from the same checkpoints (the table in README.md), and was not run at length:
# - rates of the generator from D2O and SiDA; the ratio network's five times that, as in D2O for ImageNet;
# - noise levels with as much weight on large noise as theirs. On 8x8 digits less is better, as small images need less.
_NATURAL = dict(COMMON, noise="karras", ema_halflife_kimg=2000.0)
_CIFAR10 = dict(
    _NATURAL, data="cifar10", xflip=True, kimg=20_000.0, batch=512, lr=1e-4, ratio_lr=5e-4, ema_halflife_kimg=500.0
)
PRESETS = {
    # On 1797 images a faster ratio network learns them by heart; rates that fall to zero bring the samples closer.
    "digits": dict(
        COMMON, data="digits", init="runs/digits/pretrain/network.pt",
        kimg=100.0, batch=128,  # thousands of images in all; images per step
        lr=1e-4, ratio_lr=3.5e-4, lr_decay_kimg=None,  # learning rates of the generator and of the ratio network
        ema_halflife_kimg=20.0,  # of the averaged generator, thousands of images
        log_kimg=5.0, grid_kimg=25.0, save_kimg=25.0,
    ),
    # Two ratio steps: with one the ratio falls behind the generator early in the run (docs/method.md, section 5).
    "fashion-mnist": dict(
        COMMON, data="fashion-mnist", init="runs/fashion-mnist/pretrain/network.pt", kimg=448.0, batch=64, lr=1e-4,
        ratio_lr=3e-4, ratio_steps=2, lr_decay_kimg=None, ema_halflife_kimg=20.0, log_kimg=4.0, grid_kimg=32.0, save_kimg=16.0,
    ),
    "pictures": dict(  # a folder of pictures of any size, after pretrain.py --preset pictures
        _NATURAL, data=None, resolution=64, init="runs/pictures/pretrain/network.pt", kimg=5_000.0, batch=256, lr=5e-5,
        ratio_lr=2.5e-4, ema_halflife_kimg=250.0, xflip=True,
    ),
    "cifar10": dict(_CIFAR10, init="edm-cifar10-32x32-uncond-vp.pkl"),
    "cifar10-cond": dict(_CIFAR10, init="edm-cifar10-32x32-cond-vp.pkl"),
    "imagenet64": dict(
        _NATURAL, data="imagenet-64x64.zip", init="edm-imagenet-64x64-cond-adm.pkl", kimg=50_000.0, batch=2048, lr=8e-6,
        ratio_lr=4e-5,
    ),
    # EDM2's weights have unit norm per output, far above EDM's: the rates are relative to that.
    "imagenet512": dict(
        _NATURAL, data="img512-sd.zip", init="edm2-img512-s-2147483-0.130.pkl", kimg=200_000.0, batch=2048, lr=5e-5,
        ratio_lr=2.5e-4,
    ),
}  # fmt: skip


def arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--divergence", choices=list(DIVERGENCES), help="what the generator minimises")
    add("--init", metavar="PATH|random", help="network of stage 1, or random weights (which collapse)")
    add("--network", choices=list(networks.NETWORKS), help="architecture and size for --init random")
    add("--t-init", type=positive(float), metavar="X", help="fixed noise level of the generator, standard deviation")
    add("--noise", choices=["lognormal", "karras"], help="noise levels at which the densities are compared: ln sigma normal, "
        "or uniform in the index of EDM's schedule from 0.002 to 80")  # fmt: skip
    add("--p-mean", type=float, metavar="X", help="lognormal: mean of ln sigma")
    add("--p-std", type=positive(float), metavar="X", help="lognormal: standard deviation of ln sigma")
    add("--karras-share", type=positive(float), metavar="X", help="karras: share of the schedule, from its low end")
    add("--ratio-init", choices=["pretrained", "random"], help="start of the ratio network's encoder")
    add("--ratio-width", type=positive(int), metavar="N", help="its channels at multiplier 1, with --ratio-init random "
        "(default: the generator's)")  # fmt: skip
    add("--ratio-steps", type=positive(int), metavar="N", help="steps of the ratio network per step of the generator")
    add("--lr", type=positive(float), metavar="X", help="learning rate of the generator (Adam)")
    add("--ratio-lr", type=positive(float), metavar="X", help="learning rate of the ratio network (Adam)")
    add("--lr-decay-kimg", type=not_negative, metavar="N", help="thousands of images over which both fall as a half cosine to 0; "
        "0: constant (default of the small presets: the length of the run)")  # fmt: skip
    add("--beta1", type=fraction, metavar="X", help="Adam's beta1 of both networks; larger values than 0 collapse")
    add("--beta2", type=fraction, metavar="X", help="Adam's beta2 of both networks")
    add("--ema-halflife-kimg", type=positive(float), metavar="N", help="half-life of the averaged generator, thousands of images")
    add("--fid-every", type=positive(float), metavar="KIMG", help="measure FID of the averaged generator every KIMG "
        "thousand images and keep the best as network-best.pt (default: never)")  # fmt: skip
    add("--fid-images", type=positive(int), default=50_000, metavar="N", help="samples per measurement")
    add("--fid-reference", metavar="NAME|PATH", help="what to compare with: images or statistics (default: --data)")
    add("--fid-features", metavar="PATH", help="stage-1 network whose features to use (default: Inception)")
    add("--inception", metavar="PATH", help="Inception weights (default: torch's hub cache, filled by a download)")
    add("--xflip", action=argparse.BooleanOptionalAction, help="flip half of the images horizontally")
    args = training.parse_args(parser, PRESETS)
    args.outdir = args.outdir or f"runs/{args.preset}/{args.divergence}"
    if args.fid_images < 2:
        parser.error("--fid-images: a covariance needs at least 2")
    if args.ratio_width and args.ratio_init != "random":
        parser.error("--ratio-width: an encoder of another width cannot start from stage 1; add --ratio-init random")
    return args


# ---------------------------------------------------------------------------------------------------------
# The method. docs/method.md derives each formula. Everywhere h = log p_sigma / q_sigma, data over generator, and u = q / p.

# D_f(q || p) = E_p[f(u)]. Its gradient is that of the mean over samples of q of f'(u), with u held fixed: the derivative
# of the integral of p f(q/p) is the integral of f'(q/p) dq. So a line gives f'(exp(-h)), up to a constant, which drops
# out because q always integrates to one. One line is one method.
DIVERGENCES = {
    "dijs": lambda h: -0.5 * F.softplus(h),  # Jensen-Shannon, f(u) = 1/2 [u ln u - (u + 1) ln((u + 1) / 2)]
    "dikl": lambda h: -h,  # reverse Kullback-Leibler, f(u) = u ln u
    "dirm": lambda h: F.softplus(-h),  # realism maximisation, max ln sigmoid(h): f(u) = (1 + u) ln(1 + u) - u
    "fkl": lambda h: -torch.exp(h),  # forward Kullback-Leibler, f(u) = -ln u
}


def noise_levels(args, draw):
    """Noise levels sigma [images of this rank] at which p and q are compared, for the ratio network and the generator alike.

    lognormal: ln sigma ~ N(p_mean, p_std^2), as in the training of EDM (Table 1). karras: uniform in the index of EDM's
    schedule (Equation 5), up to the share `karras_share` of it from the low end, as SiD draws them.
    """
    if args.noise == "lognormal":
        return (draw.normal() * args.p_std + args.p_mean).exp()
    return sample.karras_sigma(draw.uniform() * args.karras_share)


def ratio_loss(ratio, real, fake, sigma, eps_real, eps_fake, labels=None):
    """Binary cross-entropy of the ratio network on noised data (label 1) and noised samples (label 0), per pair [N].

    real, fake, eps_* [N, C, H, W]; sigma [N], the same for both. A blind network, h = 0, has ln 2. Returns the loss and
    the logits [N] of real and of fake.
    """
    s = sigma[:, None, None, None]
    both = torch.cat([real + s * eps_real, fake + s * eps_fake])
    h_real, h_fake = ratio(both, sigma.repeat(2), None if labels is None else labels.repeat(2)).chunk(2)
    return 0.5 * (F.softplus(-h_real) + F.softplus(h_fake)), h_real, h_fake


def generator_loss(ratio, fake, sigma, eps, divergence, labels=None):
    """The divergence's pathwise loss at noise level sigma, per image [N]: gradients flow through x = fake + sigma eps."""
    return DIVERGENCES[divergence](ratio(fake + sigma[:, None, None, None] * eps, sigma, labels))


def learning_rate_factor(args, nimg):
    """Half a cosine from one to zero over --lr-decay-kimg (None: the length of the run), or constant one."""
    length = args.kimg if args.lr_decay_kimg is None else args.lr_decay_kimg
    return 0.5 * (1 + math.cos(math.pi * min(nimg / (length * 1000), 1))) if length else 1.0


def main():
    args = arguments()
    rt = training.start(args.device, args.precision)

    # Data, generator, ratio network. Dropout is off: the generator is a function of z, and the loss its gradient.
    dataset = rt.main_first(lambda: data.load(args.data, resolution=args.resolution))
    torch.manual_seed(args.seed)
    init = load_init(args, dataset)
    config = dataclasses.replace(init.config, dropout=0.0)
    generator = networks.Denoiser(config)
    ratio = networks.RatioNetwork(dataclasses.replace(config, model_channels=args.ratio_width or config.model_channels))
    generator.load_state_dict(init.state_dict())
    if args.ratio_init == "pretrained":
        ratio.load_encoder(init)
    del init  # no teacher is kept
    for net in (generator, ratio):
        networks.place(net, rt.device, args.compile).train()
        networks.normalize_weights(net)
    ema = copy.deepcopy(generator).eval().requires_grad_(False)
    ema.about = {"role": "generator", "t_init": args.t_init}

    # beta1 = 0: the gradient field moves with the ratio network, and momentum along an old field makes both collapse.
    betas = (args.beta1, args.beta2)
    generator_learner = training.Learner(generator, rt, args.lr, betas, args.batch, args.micro_batch)
    ratio_learner = training.Learner(ratio, rt, args.ratio_lr, betas, args.batch, args.micro_batch)
    run = training.Run(
        args, rt, "stage 2",
        dict(generator=generator, ratio=ratio, ema=ema, generator_opt=generator_learner.optimizer,
             ratio_opt=ratio_learner.optimizer, generator_scaler=generator_learner.scaler, ratio_scaler=ratio_learner.scaler),
    )  # fmt: skip
    rt.print(
        f"stage 2: {args.divergence}, generator {networks.parameter_count(generator) / 1e6:.2f} M and ratio "
        f"{networks.parameter_count(ratio) / 1e6:.2f} M parameters, {dataset.name} ({len(dataset)} images), "
        f"{rt.world_size} x {rt.device.type}, {rt.precision}, batch {args.batch} in parts of {generator_learner.micro_batch}"
    )
    measure_fid = fid_measurement(args, dataset, rt) if args.fid_every else None
    shape = (config.img_channels, config.img_resolution, config.img_resolution)
    seen = run.nimg * args.ratio_steps
    batches = data.Batches(dataset, args.batch, args.seed, seen, rt.rank, rt.world_size, rt.device.type == "cuda")

    # One forward of the generator serves both steps where the batch is in one piece: its graph then waits in memory.
    whole = len(generator_learner.parts) == 1

    def samples(z, labels, keep_graph):
        """G(z), [N, C, H, W]."""
        with rt.autocast(), torch.set_grad_enabled(keep_graph):
            return torch.cat([sample.one_step(generator, z, y, args.t_init) for z, y in generator_learner.split(z, labels)])

    def ratio_objective(real, fake, sigma, eps_real, eps_fake, labels):
        loss, h_real, h_fake = ratio_loss(ratio, real, fake, sigma, eps_real, eps_fake, labels)
        run.add(bands=band_sums(sigma, h_real.detach(), h_fake.detach()))
        return loss

    def generator_objective(z, fake, sigma, eps, labels):
        if not whole:  # drawn once more, with a graph, a micro-batch at a time
            fake = sample.one_step(generator, z, labels, args.t_init)
        loss = generator_loss(ratio, fake, sigma, eps, args.divergence, labels)
        run.add(generator_loss=loss.sum())
        return loss

    def write(name, net, role, **extra):
        about = dict(nimg=run.nimg, data=dataset.name, divergence=args.divergence, t_init=args.t_init)
        checkpoints.save_network(run.dir / name, net, role=role, **about, **extra)

    def write_networks():
        write("network.pt", ema, "generator")
        write("ratio.pt", ratio, "ratio")

    def log_fid():
        """Measure FID if it is due and not in the log, and keep the generator if it is the best so far."""
        if not measure_fid or not run.lacks("fid", args.fid_every):
            return
        with run.at_rest():
            value = measure_fid(ema)
            if rt.is_main and value < min(run.log.values("fid").values(), default=math.inf):
                write("network-best.pt", ema, "generator", fid=value)
            run.note({"fid": value}, f"FID {value:.4g} of {args.fid_images} samples")

    log_fid()  # if the run was stopped before this
    while run.goes_on():
        factor = learning_rate_factor(args, run.nimg)

        # Ratio step (or several): tell noised data from noised samples of the present generator. It comes first: a ratio
        # that is a step behind the generator that follows it left the digits twice as far away (exercises/README.md, 5).
        ratio.requires_grad_(True)
        for step in range(args.ratio_steps):
            draw = training.Draw(rt, args.batch, args.seed, run.nimg, step, "stage 2")
            real, labels = batches.training_batch(draw, args.xflip)
            labels = labels if config.label_dim else None  # the samples carry the classes of the data
            z, sigma = draw.normal(*shape), noise_levels(args, draw)
            fake = samples(z, labels, keep_graph=whole and step == args.ratio_steps - 1)
            eps_real, eps_fake = draw.normal(*shape), draw.normal(*shape)
            ratio_learner.step(
                args.ratio_lr * factor, ratio_objective, real, fake.detach(), sigma, eps_real, eps_fake, labels
            )
            networks.normalize_weights(ratio)

        # Generator step: the same samples, re-noised at new levels, judged by the ratio network just trained, now frozen.
        ratio.requires_grad_(False)
        sigma, eps = noise_levels(args, draw), draw.normal(*shape)
        generator_learner.step(args.lr * factor, generator_objective, z, fake, sigma, eps, labels)
        networks.normalize_weights(generator)
        run.advance()
        networks.update_ema(ema, generator, args.batch, args.ema_halflife_kimg * 1000, run.nimg)

        # Machinery from here on: log, sample grid, FID, files.
        if run.due(args.log_kimg):
            sums, images = run.take()
            bands, accuracy, cross_entropy = band_statistics(sums["bands"])
            loss = sums["generator_loss"].item() / images
            run.report({"generator_loss": loss, "ratio_loss": cross_entropy, "ratio_accuracy": accuracy, "bands": bands},
                       f"generator {loss:+.4f}  ratio {cross_entropy:.4f}, {100 * accuracy:.1f} % right")  # fmt: skip
        if run.due(args.save_kimg) or run.stopping or args.fid_every and run.due(args.fid_every):
            run.save(write_networks)
        if run.due(args.grid_kimg) and rt.is_main:
            sample.preview(ema, run.dir / f"samples-{run.nimg // 1000:06d}.png", args.seed, rt, run.since(args.grid_kimg))
        log_fid()
    run.finish()


# ---------------------------------------------------------------------------------------------------------
# Below is machinery: what is logged and measured, and what stage 2 starts from.

BANDS = (0.1, 0.3, 1.0, 3.0)  # edges of the noise-level bands in the log


def band_sums(sigma, h_real, h_fake):
    """Sums over the logits [N] of real and fake at noise levels sigma [N], per noise-level band: [5, bands] float64.

    Rows: number of logits, how many are right, binary cross-entropy, logit, logit squared.
    """
    band = sum(sigma > edge for edge in BANDS)
    h, margin = torch.stack([h_real, h_fake]).double(), torch.stack([h_real, -h_fake]).double()
    right = (margin > 0) + 0.5 * (margin == 0)
    values = torch.stack([torch.ones_like(h), right, F.softplus(-margin), h, h * h]).sum(dim=1)  # [5, N]
    return torch.zeros(5, len(BANDS) + 1, dtype=torch.float64, device=sigma.device).index_add_(1, band, values)


def band_statistics(sums):
    """(bands, accuracy, cross-entropy) for the log from summed `band_sums`; bands {name: {accuracy, loss, logit_mean, ...}}."""
    names = [f"<{BANDS[0]}", *(f"{a}-{b}" for a, b in zip(BANDS, BANDS[1:])), f">{BANDS[-1]}"]
    bands = {}
    for name, (n, right, loss, total, square) in zip(names, sums.T.tolist()):
        if n:
            spread = max(square / n - (total / n) ** 2, 0) ** 0.5
            bands[name] = dict(accuracy=right / n, loss=loss / n, logit_mean=total / n, logit_std=spread)
    n, right, loss, *_ = sums.sum(dim=1).tolist()
    return bands, right / n, loss / n


def fid_measurement(args, dataset, rt):
    """Function from a generator to its FID; the ranks share the sampling. The reference is measured once and cached."""
    extractor = fid.load_extractor(rt, args.fid_features, args.inception)
    decode = data.to_uint8
    if dataset.is_latent:
        decode = sample.latent_decoder(rt.device, sample.VAE)
        if decode is None:
            raise UserError(f"--fid-every: {sample.NO_DIFFUSERS}")
    reference = rt.main_first(lambda: fid.open_side(args.fid_reference, args.resolution)) if args.fid_reference else dataset
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
        raise UserError(
            f"stage 2 starts from stage 1, but {args.init} is missing; run `python pretrain.py --preset {args.preset}` first "
            f"and give --init runs/{args.preset}/pretrain/network.pt" + (", or download the published checkpoint" if args.init.endswith(".pkl") else "")
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
    training.run(main)
