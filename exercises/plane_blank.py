"""The whole method on points in the plane, with eight blanks to fill in: every `...` below. Takes a minute to run.

p is eight Gaussians on a circle. Stage 1 trains a denoiser D of noised points. Stage 2 starts the generator as
G(z) = D(2.5 z; 2.5) and brings it to p by a learned log density ratio. Fill in, check, run:

    python exercises/check.py 1
    python exercises/plane_blank.py                        draws runs/exercises/plane.png as it goes (needs matplotlib)
    python exercises/plane_blank.py --far 3 --sigma 0.1 --divergence fkl       it starts 3 to the right, where h is large
"""

import ast
import math
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: F401  (for the blanks)

from project import ROOT
import plane
from machinery import training
from machinery.files import UserError

# ---- Blanks. h = ln p/q; u = q/p = exp(-h). Shapes: h [N]; samples and noise [N, 2]; sigma [N] --------

DIVERGENCES = {  # f'(u) at u = exp(-h), up to a constant. Mind large |h|: exp(h) overflows at 88.7
    "dijs": lambda h: ...,  # f = (u ln u - (u + 1) ln((u + 1) / 2)) / 2
    "dikl": lambda h: ...,  # f = u ln u
    "dirm": lambda h: ...,  # f = (1 + u) ln(1 + u) - u
    "fkl": lambda h: ...,  # f = -ln u
}


def ratio_loss(h_real, h_fake):
    """Half of the cross-entropy of data (label 1) plus half of that of samples (label 0), from their logits: [N]."""
    return ...


def generator_loss(ratio, fake, sigma, eps, divergence):
    """The divergence's loss at noised samples, [N]. `ratio(x, sigma)` is h at x [N, 2]."""
    return ...


def iteration(G, ratio, watch, follow, real, normal, levels, divergence):
    """One iteration of stage 2 on data `real` [N, 2]; returns the samples [N, 2] and their logits [N].

    normal() and levels() draw new noise [N, 2] and noise levels [N]. watch.step(loss [N]) is a step of the ratio network's
    optimizer, follow.step(loss [N]) one of the generator's.
    """
    # 1. Ratio: tell noised data from noised samples of the present generator.
    ratio.requires_grad_(True)
    fake, sigma = G(normal()), levels()
    h_real = ratio(real + sigma[:, None] * normal(), sigma)
    h_fake = ...  # the same of the samples; this step must not reach the generator
    watch.step(ratio_loss(h_real, h_fake))
    # 2. Generator: the same samples, noised anew, judged by the ratio network just trained, now frozen.
    ratio.requires_grad_(False)
    ...  # one step of the generator on its loss
    return fake, h_fake


# ---- Given: data, networks, what is drawn -------------------------------------------------------------

ANGLE = 2 * math.pi * torch.arange(8) / 8
EIGHT = plane.Mixture(0.7 * torch.stack([ANGLE.cos(), ANGLE.sin()], dim=1), torch.full((8,), 0.05))


def draw(panels, right):
    """A panel of points for each {title: x [N, 2]}."""
    plt = plane.pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(3 * len(panels), 3.2), squeeze=False, layout="constrained")
    for axis, (title, x) in zip(axes.flat, panels.items()):
        axis.plot(*EIGHT.centres.T, "k+")
        axis.plot(*x[:500].T, ".", markersize=3, alpha=0.5)
        axis.set(title=title, aspect="equal", xlim=(-1.3, right), ylim=(-1.3, 1.3), xticks=[], yticks=[])
    plane.save(figure, ROOT / "runs" / "exercises" / "plane.png")
    plt.close(figure)


def main():
    args = training.Parser(__doc__, dict(
        divergence=("dijs", "what the generator minimises", list(DIVERGENCES)),
        far=(0.0, "how far to the right of its place the generator starts", training.not_negative),
        sigma=(0.0, "a single noise level of stage 2 (default: all, as in stage 1)", training.not_negative),
        iterations=(1000, "of stage 2"), steps=(1500, "of stage 1"), picture=(True, "draw"),
        seed=(0, "of everything random", training.integer))).parse_args()
    if "..." in map(ast.unparse, ast.walk(ast.parse(Path(__file__).read_text()))):
        raise UserError("there are blanks left: fill them in, then python exercises/check.py 1")
    if args.picture:
        plane.pyplot()  # a missing package is told now, not after the work
    noise = plane.Noise(512, args.seed, "plane_blank")
    generator = plane.train_score(EIGHT, dict(batch=512, lr=2e-3), args.seed, "stage 1", 128, args.steps)
    ratio, aside, panels = plane.Ratio(128), torch.tensor([args.far, 0.0]), {}
    follow, watch = (plane.Trainer(net, lr, args.iterations, (0.0, 0.999)) for net, lr in ((generator, 5e-4), (ratio, 2e-3)))

    def normal():
        return noise.normal().flatten(1)

    def levels():
        return torch.full((512,), args.sigma) if args.sigma else noise.levels()

    def G(z):
        return generator(2.5 * z[:, :, None, None], torch.full((len(z),), 2.5)).flatten(1) + aside

    for i in range(args.iterations + 1):
        real = noise.points(EIGHT).flatten(1)
        fake, h_fake = iteration(G, ratio, watch, follow, real, normal, levels, args.divergence)
        if i in (0, 30, 100, 300) or i == args.iterations:
            found = ((fake.detach()[:, None] - EIGHT.centres).norm(dim=2) < 3 * EIGHT.stds).float().mean(dim=0)  # by mode
            print(f"{i:5}: {int((found > 0.01).sum())} of 8 modes, {found.sum():.0%} of samples within three deviations of one,"
                  f" mean h {h_fake.mean():+.1f}, mean x {fake[:, 0].mean():+.2f}", flush=True)
            panels[f"{args.divergence}, iteration {i}"] = fake.detach()
            if args.picture:
                draw(panels, 1.3 + args.far)


if __name__ == "__main__":
    training.run(main)
