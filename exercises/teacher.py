"""Stage 2 with a teacher: variational score distillation (VSD) and SiD, to stand beside DiffRatio.

The networks, noise levels, rates, lengths and logs are those of train_diffratio.py. What differs is where the generator's
direction comes from: from two denoisers instead of one ratio network. The teacher D_T is the frozen network of stage 1; the
student D_S begins as its copy and learns, by the loss of stage 1, from the generator's samples. No data is needed.

    DiffRatio   one encoder, trained on data and samples; its logit is differentiated
    VSD         two denoisers; their difference is the direction, no network is differentiated
    SiD         two denoisers; the squared difference is the loss, both networks are differentiated

Writes what train_diffratio.py writes, but no ratio.pt: `network.pt` (for sample.py), `checkpoint.pt`, `log.jsonl` (with
`fid`, if --fid-every asks for it) and sample grids. The same command again continues the run.

    python exercises/teacher.py --method vsd --kimg 50
    python exercises/teacher.py --method sid --kimg 50
    python exercises/teacher.py --cost digits           time, memory and arithmetic of an iteration, as JSON lines
"""

import copy
import dataclasses
import json
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "exercises")]
from machinery import checkpoints  # noqa: E402
from machinery import data  # noqa: E402
import networks  # noqa: E402
import pretrain  # noqa: E402
from machinery import training  # noqa: E402
import sample  # noqa: E402
import train_diffratio  # noqa: E402
from machinery.training import positive  # noqa: E402

# ---------------------------------------------------------------------------------------------------------
# Settings: those of train_diffratio.py, without what concerns the ratio network, and the rates of each method.

# Rates of the generator and of the student. On the digits (32 kimg, seed 0, distance in stage-1 features x 1000) VSD ended at
# 8.7 with lr 1e-4 and at 7.3 with 3e-4, SiD at 6.9 and 8.0.
RATES = {"vsd": dict(lr=3e-4, score_lr=3e-4), "sid": dict(lr=1e-4, score_lr=3e-4)}
ALPHA = 1.0  # of SiD
PRESETS = {
    name: {key: value for key, value in preset.items() if key != "divergence" and not key.startswith("ratio")}
    | dict(lr=None, score_lr=None, fid_reference=None, inception=None)
    for name, preset in train_diffratio.PRESETS.items()
}


def arguments():
    parser = training.Parser(__doc__)
    add = parser.add_argument
    add("--method", choices=list(METHODS), default="vsd", help="what the generator follows")
    add("--init", metavar="PATH", help="network of stage 1: the teacher, and the start of the student and of the generator")
    add("--lr", type=positive(float), metavar="X", help=f"learning rate of the generator (default: {RATES} by method)")
    add("--score-lr", type=positive(float), metavar="X", help="learning rate of the student's denoiser (default: see --lr)")
    add("--fid-every", type=positive(float), metavar="KIMG", help="measure FID every KIMG thousand images (default: never)")
    add("--fid-images", type=positive(int), default=50_000, metavar="N", help="samples per measurement")
    add("--fid-features", metavar="PATH", help="stage-1 network whose features to use (default: Inception)")
    add("--cost", choices=list(networks.NETWORKS), help="measure an iteration of each method with this network, train nothing")
    args = training.parse_args(parser, PRESETS)
    args.outdir = args.outdir or f"runs/exercises/teacher/{args.method}-{args.seed}"
    args.lr, args.score_lr = args.lr or RATES[args.method]["lr"], args.score_lr or RATES[args.method]["score_lr"]
    if args.micro_batch:
        parser.error("--micro-batch: here the batch is in one piece")
    return args


# ---------------------------------------------------------------------------------------------------------
# The methods. Loss per image [N] of samples `fake` [N, C, H, W] = G(z) at noise level sigma [N]; gradients flow into `fake`.


def sample_weight(fake, right):
    """1 / mean |G - D_T|, [N, 1, 1, 1], held fixed: brings all noise levels to one scale (DMD, Equation 8; SiD, Section 4.4)."""
    return 1 / (fake - right).detach().abs().mean(dim=(1, 2, 3), keepdim=True)


def vsd_loss(teacher, student, fake, sigma, eps, labels=None):
    """VSD (arXiv 2305.16213; weight of DMD, arXiv 2311.18828): the gradient of the reverse KL divergence, `dikl`, is
    E[(score of samples - score of data) dx/dtheta], and the scores of noised images are (D - x) / sigma^2, so

        dL/dG = w (D_S(x) - D_T(x))    at x = G + sigma eps, both denoisers held fixed.
    """
    with torch.no_grad():
        noised = fake + sigma[:, None, None, None] * eps
        wrong, right = student(noised, sigma, labels), teacher(noised, sigma, labels)
        direction = sample_weight(fake, right) * (wrong - right)
    return (direction * fake).sum(dim=(1, 2, 3))


def sid_loss(teacher, student, fake, sigma, eps, labels=None):
    """SiD (arXiv 2404.04057, Equation 23): with the difference d = D_T(x) - D_S(x) at x = G + sigma eps,

        L = w [(1 - alpha) |d|^2 + d . (D_S(x) - G)],    differentiated through x and G, not into the denoisers' weights.

    The aim is the Fisher divergence E|d|^2, the squared difference of the scores. Its gradient has to know how D_S follows
    the generator, and D_S is held fixed. alpha = 1/2 repairs that (as arXiv 2410.19310 finds for flows): the loss is then
    w/2 (|D_T - G|^2 - |D_S - G|^2), and D_S minimises the second term, so it may be held fixed there. SiD trained best with
    alpha = 1 and 1.2.
    """
    noised = fake + sigma[:, None, None, None] * eps
    wrong, right = student(noised, sigma, labels), teacher(noised, sigma, labels)
    d = right - wrong
    return (sample_weight(fake, right) * ((1 - ALPHA) * d * d + d * (wrong - fake))).sum(dim=(1, 2, 3))


METHODS = {"vsd": vsd_loss, "sid": sid_loss}


def iteration(method, nets, learners, rates, z, labels, t_init, score_noise, noise, add=lambda **sums: None):
    """One step of the student on samples of the generator, then one of the generator on the same samples, re-noised.

    nets: (generator, student, teacher); learners and rates: of the first two; each noise: (sigma [N], eps [N, C, H, W]).
    """
    generator, student, teacher = nets
    with learners[0].rt.autocast():
        fake = sample.one_step(generator, z, labels, t_init)

    def score_objective(*part):
        loss = pretrain.denoising_loss(student, *part)
        add(score_loss=loss.sum() / fake[0].numel())
        return loss

    def generator_objective(*part):
        loss = METHODS[method](teacher, student, *part)
        add(generator_loss=loss.sum())
        return loss

    student.requires_grad_(True)
    learners[1].step(rates[1], score_objective, fake.detach(), *score_noise, labels)
    networks.normalize_weights(student)
    student.requires_grad_(False)
    learners[0].step(rates[0], generator_objective, fake, *noise, labels)
    networks.normalize_weights(generator)


def main():
    args = arguments()
    rt = training.start(args.device, args.precision)
    if args.cost:
        return cost(args, rt)

    # Teacher, student, generator: three copies of stage 1. The data only says what the pictures look like.
    dataset = rt.main_first(lambda: data.load(args.data, resolution=args.resolution))
    torch.manual_seed(args.seed)
    teacher = train_diffratio.load_init(args, dataset).requires_grad_(False)
    config = dataclasses.replace(teacher.config, dropout=0.0)
    generator, student = networks.Denoiser(config), networks.Denoiser(config)
    for net in (generator, student, teacher):
        net.load_state_dict(teacher.state_dict())
        networks.place(net, rt.device, args.compile)
        networks.normalize_weights(net)
    ema = copy.deepcopy(generator).eval().requires_grad_(False)
    ema.about = {"role": "generator", "t_init": args.t_init}
    learners = [training.Learner(net, rt, args.lr, (args.beta1, args.beta2), args.batch) for net in (generator, student)]
    parts = dict(generator=generator, student=student, ema=ema, generator_opt=learners[0].optimizer,
                 student_opt=learners[1].optimizer, generator_scaler=learners[0].scaler, student_scaler=learners[1].scaler)  # fmt: skip
    run = training.Run(args, rt, f"stage 2 with a teacher, {args.method}", parts)
    measure_fid = train_diffratio.fid_measurement(args, dataset, rt) if args.fid_every else None
    shape = (config.img_channels, config.img_resolution, config.img_resolution)

    def write_networks():
        about = dict(nimg=run.nimg, data=dataset.name, method=args.method, t_init=args.t_init)
        checkpoints.save_network(run.dir / "network.pt", ema, role="generator", **about)

    def log_fid():
        if measure_fid and run.lacks("fid", args.fid_every):
            with run.at_rest():
                value = measure_fid(ema)
                run.note({"fid": value}, f"FID {value:.4g} of {args.fid_images} samples")

    log_fid()  # if the run was stopped before this
    while run.goes_on():
        factor = train_diffratio.learning_rate_factor(args, run.nimg)
        draw = training.Draw(rt, args.batch, args.seed, run.nimg, 0, "stage 2")
        labels = (draw.uniform() * config.label_dim).long() if config.label_dim else None
        z = draw.normal(*shape)
        score_noise, noise = [(train_diffratio.noise_levels(args, draw), draw.normal(*shape)) for _ in range(2)]
        rates = (args.lr * factor, args.score_lr * factor)
        iteration(args.method, (generator, student, teacher), learners, rates, z, labels, args.t_init, score_noise, noise, run.add)
        run.advance()
        networks.update_ema(ema, generator, args.batch, args.ema_halflife_kimg * 1000, run.nimg)

        # Machinery from here on: log, files, sample grid, FID.
        if run.due(args.log_kimg):
            sums, images = run.take()
            means = {name: value.item() / images for name, value in sums.items()}
            run.report(means, "  ".join(f"{name} {value:+.4f}" for name, value in means.items()))
        if run.due(args.save_kimg) or run.stopping or args.fid_every and run.due(args.fid_every):
            run.save(write_networks)
        if run.due(args.grid_kimg) and rt.is_main:
            sample.preview(ema, run.dir / f"samples-{run.nimg // 1000:06d}.png", args.seed, rt, run.since(args.grid_kimg))
        log_fid()
    run.finish()


def cost(args, rt):
    """Print a line of JSON per method: GFLOP and seconds per image of an iteration of --batch images, and peak memory."""
    import benchmark  # which imports this file

    config = networks.NETWORKS[args.cost]
    for method in ("diffratio", *METHODS):
        torch.manual_seed(0)
        if method == "diffratio":
            step = benchmark.stage_2(config, args.batch, rt)
        else:
            step = benchmark.distillation(config, args.batch, rt, method=method)
        with FlopCounterMode(display=False) as counter:
            step()
        seconds, memory = benchmark.measure(step, rt.device, repeats=3)
        row = {"network": args.cost, "method": method, "batch": args.batch, "precision": rt.precision,
               "gflop_per_image": counter.get_total_flops() / args.batch / 1e9, "seconds_per_image": seconds / args.batch,
               "peak_memory_gb": memory, "hardware": benchmark.hardware(rt.device)}  # fmt: skip
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    training.run(main)
