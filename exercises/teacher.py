"""Stage 2 with a teacher: variational score distillation (VSD) and SiD, to stand beside DiffRatio.

It differs from train_diffratio.py in where the generator's direction comes from: two denoisers instead of one ratio network.
The teacher D_T is the frozen network of stage 1. The student D_S starts as its copy and learns, by the loss of stage 1, from
the generator's samples. No data is needed. No ratio.pt is written. The same command again resumes the run.

    python exercises/teacher.py --method vsd --kimg 50 --p-mean -1.2          or sid
"""

import copy
import dataclasses
import functools
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "exercises")]
import networks  # noqa: E402
import pretrain  # noqa: E402
import sample  # noqa: E402
import train_diffratio  # noqa: E402
from machinery import checkpoints, data, training  # noqa: E402

# ---- Settings: those of train_diffratio.py without the ratio network's -------------------------------

RATES = {"vsd": 3e-4, "sid": 1e-4}  # of the generator: the better of 1e-4 and 3e-4 on the digits after 32 kimg, seed 0
ALPHA = 1.0  # of SiD


def without_ratio(settings):
    without = ("divergence", "noise_weight", "xflip")
    return {key: value for key, value in settings.items() if key not in without and not key.startswith("ratio")}


PRESETS = {name: without_ratio(preset) | dict(lr=None) for name, preset in train_diffratio.PRESETS.items()}
SETTINGS = without_ratio(train_diffratio.SETTINGS) | dict(
    method=("vsd", "what the generator follows", ["vsd", "sid"]),
    lr=(None, f"learning rate of the generator (default: {RATES} by method)", float),
    score_lr=(3e-4, "learning rate of the student"),
)


def arguments():
    args = training.arguments(__doc__, SETTINGS, PRESETS)
    args.outdir = args.outdir or f"runs/exercises/teacher/{args.method}-{args.seed}"
    args.lr = args.lr or RATES[args.method]
    return args


# ---- The methods -------------------------------------------------------------------------------------
# Loss per image [N] of samples `fake` [N, C, H, W] = G(z) at noise level sigma [N]; gradients flow into `fake`.


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

    The aim is the Fisher divergence E|d|^2, the squared difference of the scores. D_S depends on the generator and is held
    fixed here; alpha decides what that costs (exercise 10). SiD trained best with alpha = 1 and 1.2.
    """
    noised = fake + sigma[:, None, None, None] * eps
    wrong, right = student(noised, sigma, labels), teacher(noised, sigma, labels)
    d = right - wrong
    return (sample_weight(fake, right) * ((1 - ALPHA) * d * d + d * (wrong - fake))).sum(dim=(1, 2, 3))


METHODS = {"vsd": vsd_loss, "sid": sid_loss}


def iteration(method, nets, optimizers, rates, z, labels, t_init, score_noise, noise):
    """One step of the student on samples of the generator, then one of the generator on the same samples, noised anew.

    nets: (generator, student, teacher); optimizers and rates: of the first two; each noise: (sigma [N], eps [N, C, H, W]).
    Returns the losses [N] of the student and of the generator.
    """
    generator, student, teacher = nets
    G = functools.partial(sample.one_step, generator, t_init=t_init)  # G(z, labels)

    def score_objective(*inputs):
        return [pretrain.denoising_loss(student, *inputs)]

    def generator_objective(z, fake, sigma, eps, labels):
        fake = fake if fake.requires_grad else G(z, labels)  # several micro-batches: drawn again
        return [METHODS[method](teacher, student, fake, sigma, eps, labels)]

    fake = optimizers[0].rt.in_parts(G, z, labels)
    student.requires_grad_(True)
    (score_loss,) = optimizers[1].step(rates[1], score_objective, fake.detach(), *score_noise, labels)
    student.requires_grad_(False)
    (loss,) = optimizers[0].step(rates[0], generator_objective, z, fake, *noise, labels)
    return score_loss, loss


def main():
    args = arguments()
    rt = training.Runtime(args.device, args.precision, args.batch, args.micro_batch)

    # Teacher, student, generator: three copies of stage 1. The data only gives the shape of the images.
    dataset = rt.main_first(lambda: data.load(args.data, resolution=args.resolution))
    torch.manual_seed(args.seed)
    teacher = pretrain.load_init(args, dataset).requires_grad_(False)
    config = dataclasses.replace(teacher.config, dropout=0.0)
    generator, student = networks.Denoiser(config), networks.Denoiser(config)
    nets = generator, student, teacher
    for net in nets:
        net.load_state_dict(teacher.state_dict())
        networks.place(net, rt.device, args.compile)
    optimizers = [training.Optimizer(net, rt, (args.beta1, args.beta2)) for net in (generator, student)]
    networks.normalize_weights(teacher)
    ema = copy.deepcopy(generator).eval().requires_grad_(False)
    ema.about = dict(role="generator", t_init=args.t_init, method=args.method, data=args.data,
                     class_frequencies=dataset.class_frequencies(config.label_dim))
    run = training.Run(args, rt, f"stage 2 with a teacher, {args.method}", dataset, generator=generator, student=student, ema=ema,
                       generator_optimizer=optimizers[0], student_optimizer=optimizers[1])
    shape = (config.img_channels, config.img_resolution, config.img_resolution)

    while run.unfinished():
        factor = train_diffratio.learning_rate_factor(args, run.nimg)
        rt.seed(args.seed, run.nimg, 0, "stage 2")
        labels = (rt.rand() * config.label_dim).long() if config.label_dim else None
        z = rt.randn(*shape)
        noises = [(train_diffratio.noise_levels(args, rt), rt.randn(*shape)) for _ in range(2)]
        rates = args.lr * factor, args.score_lr * factor
        score_loss, loss = iteration(args.method, nets, optimizers, rates, z, labels, args.t_init, *noises)
        run.add(score_loss=score_loss.sum() / z[0].numel(), generator_loss=loss.sum())
        run.advance()
        networks.update_ema(ema, generator, rt.batch, args.ema_halflife_kimg * 1000, run.nimg)

        # Log, look, save.
        if run.due(args.log_kimg):
            means = {name: value.item() for name, value in run.pop_means().items()}
            run.report(means, "  ".join(f"{name} {value:+.4f}" for name, value in means.items()))
        if run.due(args.grid_kimg):
            sample.preview(ema, run, args.seed)
        if run.due(args.save_kimg) or run.stopping:
            run.save(lambda: checkpoints.save_network(run.dir / "network.pt", ema, nimg=run.nimg))


if __name__ == "__main__":
    training.run(main)
