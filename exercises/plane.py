"""The ratio's gradient is a score difference: points in the plane, where both are known at every noise level.

p is a spiral of eight Gaussians, q the same spiral turned. A small ratio network learns ln p/q, two small denoisers learn the
scores of p and of q, with the losses of the main scripts and as many points. `error` compares the gradient of the one and the
difference of the others with the truth. `fixed-point` trains a generator by the one or the other and asks where it ends.

    python exercises/plane.py                                  two tables, one seed, three minutes
    python exercises/plane.py error --regimes close "far, scaled logit" --pictures my-pictures         and the gradient fields

A row is a line of JSON in exercises/results/plane.jsonl. A row with the same settings that is there is not run again.
"""

import copy
import itertools
import math
import types
from pathlib import Path

import torch
from torch import nn

from project import HERE
import measure
from machinery import training
from machinery.files import UserError, atomic
from networks import Config, preconditioning
from pretrain import denoising_loss
from train_diffratio import generator_loss, ratio_loss

# ---- Settings: what all regimes share, and each regime as differences from it ------------------------

SIGMAS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # noise levels of the measurement; training draws ln sigma ~ N(-1.2, 1.2^2)
COMMON = dict(
    turn=202.5,  # degrees by which q is turned: its centres lie between those of p, on the other arm
    steps=2000, batch=256, lr=5e-3,  # of every network; batch: points of p and as many of q; the rate falls to zero
    width=64,  # of every network: three hidden layers
    teacher_steps=None, teacher_width=None,  # of the score of p, if different
    points=None,  # p is known by so many points only; None: fresh ones in every step
    scaled=False,  # the logit is multiplied by sigma_data / sqrt(sigma^2 + sigma_data^2)
)
REGIMES = {
    "far": {},
    "close": dict(turn=5.0),
    "brief teacher": dict(teacher_steps=100),
    "small teacher": dict(teacher_width=8),
    "close, small": dict(turn=5.0, width=12),
    "far, scaled logit": dict(scaled=True),
}
# With a generator: `follow` the ratio's gradient, the difference of two scores, or the exact gradient (affine generator only).
# The score of q starts from the score of p. One step of ratio or score per step of the generator.
LOOP = dict(follow="ratio", generator="affine", generator_lr=5e-3, steps=800, batch=256, lr=5e-3, width=64, teacher_steps=None,
            teacher_width=None, points=None)
LOOPS = {
    "affine, exact": dict(follow="exact"),
    "affine, ratio": {},
    "affine, scores": dict(follow="scores"),
    "MLP, ratio": dict(generator="mlp"),
    "MLP, scores": dict(generator="mlp", follow="scores"),
    "MLP, scores, brief teacher": dict(generator="mlp", follow="scores", teacher_steps=100),
    "MLP, ratio, few points": dict(generator="mlp", points=100),
    "MLP, scores, few points": dict(generator="mlp", follow="scores", points=100),
}


class Mixture:
    """A mixture of Gaussians in the plane: centres [K, 2], stds [K]. Noise of level sigma widens each of them."""

    def __init__(self, centres, stds):
        self.centres, self.stds = centres, stds

    def sample(self, n, rng):
        """Points [n, 2]."""
        k = torch.randint(len(self.stds), (n,), generator=rng)
        return self.centres[k] + self.stds[k, None] * torch.randn(n, 2, generator=rng)

    def _logits(self, x, sigma):
        """At x [N, 2], sigma [N]: ln of each weighted component's density [N, K], centre - x [N, K, 2], variances [N, K]."""
        apart, variance = self.centres - x[:, None], self.stds**2 + sigma[:, None] ** 2
        return -apart.square().sum(2) / (2 * variance) - (2 * math.pi * variance * len(self.stds)).log(), apart, variance

    def log_density(self, x, sigma):
        """ln p_sigma(x), [N]."""
        return self._logits(x, sigma)[0].logsumexp(dim=1)

    def score(self, x, sigma):
        """The gradient of ln p_sigma at x, [N, 2]: the way to each centre, weighted by how probably x comes from there."""
        logits, apart, variance = self._logits(x, sigma)
        return (logits.softmax(dim=1)[:, :, None] * apart / variance[:, :, None]).sum(1)


def spiral(turn=0.0):
    """Eight Gaussians on a spiral, turned by so many degrees; standard deviation about 0.5, as the networks assume."""
    k = torch.arange(8)
    angle, radius = 2 * math.pi * k / 8 + math.radians(turn), 0.4 + 0.075 * k
    return Mixture(torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), 0.06 + 0.01 * k)


# ---- The networks, with the interface of those in networks.py: x [N, 2, 1, 1], sigma [N] -------------


def mlp(inputs, width, outputs):
    layers = [nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


class Ratio(nn.Module):
    """The logit h(x, sigma), [N]."""

    def __init__(self, width, scaled=False):
        super().__init__()
        self.layers, self.scaled = mlp(3, width, 1), scaled

    def forward(self, x, sigma, labels=None):
        c_in, c_noise = preconditioning("edm", sigma, 0.5)[2:]
        h = self.layers(torch.cat([x.flatten(1) * c_in[:, None], c_noise[:, None]], dim=1)).flatten()
        return h * 0.5 * c_in if self.scaled else h  # the truth falls as 1/sigma where noise outweighs data


class Score(nn.Module):
    """The denoiser D(x; sigma) of EDM, [N, 2, 1, 1]."""

    config = Config(img_resolution=1, img_channels=2, channel_mult=(1,))

    def __init__(self, width):
        super().__init__()
        self.layers = mlp(3, width, 2)

    def forward(self, x, sigma, labels=None):
        c_skip, c_out, c_in, c_noise = (c[:, None] for c in preconditioning("edm", sigma, 0.5))
        x = x.flatten(1)
        return (c_skip * x + c_out * self.layers(torch.cat([c_in * x, c_noise], dim=1)))[:, :, None, None]


def ratio_gradient(ratio, x, sigma):
    """grad_x h at x [N, 2]."""
    x = x[:, :, None, None].detach().requires_grad_(True)
    return torch.autograd.grad(ratio(x, sigma).sum(), x)[0].flatten(1)


@torch.no_grad()
def score(net, x, sigma):
    """(D(x; sigma) - x) / sigma^2 at x [N, 2]."""
    return (net(x[:, :, None, None], sigma).flatten(1) - x) / sigma[:, None] ** 2


class Trainer:
    """Adam with a rate that falls to zero along half a cosine over `steps` calls of `step(loss [N])`."""

    def __init__(self, net, lr, steps, betas=(0.9, 0.999)):
        self.optimizer = torch.optim.Adam(net.parameters(), lr, betas)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def step(self, loss):
        self.optimizer.zero_grad()
        loss.mean().backward()
        self.optimizer.step()
        self.schedule.step()


class Noise:
    """Random numbers of a training: points, noise levels and noise from one seed."""

    def __init__(self, batch, *key):
        self.batch, self.rng = batch, training.rng("cpu", *key)

    def points(self, source):
        return source.sample(self.batch, self.rng)[:, :, None, None]

    def levels(self):
        return (torch.randn(self.batch, generator=self.rng) * 1.2 - 1.2).exp()

    def normal(self):
        return torch.randn(self.batch, 2, 1, 1, generator=self.rng)


def train_ratio(p, q, o, seed):
    torch.manual_seed(training.seed_of(seed, "ratio"))
    net, noise = Ratio(o["width"], o["scaled"]), Noise(o["batch"], seed, "ratio")
    trainer = Trainer(net, o["lr"], o["steps"])
    for _ in range(o["steps"]):
        real, fake, sigma = noise.points(p), noise.points(q), noise.levels()
        trainer.step(ratio_loss(net, real, fake, sigma, noise.normal(), noise.normal())[0])
    return net


def train_score(p, o, seed, name, width, steps):
    torch.manual_seed(training.seed_of(seed, name))
    net, noise = Score(width), Noise(o["batch"], seed, name)
    trainer = Trainer(net, o["lr"], steps)
    for _ in range(steps):
        trainer.step(denoising_loss(net, noise.points(p), noise.levels(), noise.normal()))
    return net


def known(o, seed):
    """What the networks see of p: fresh points, or `o["points"]` points of which they draw with replacement."""
    if not o["points"]:
        return spiral()
    points = spiral().sample(o["points"], training.rng("cpu", seed, "points"))
    return types.SimpleNamespace(sample=lambda n, rng: points[torch.randint(len(points), (n,), generator=rng)])


def train_teacher(o, seed):
    return train_score(known(o, seed), o, seed, "teacher", o["teacher_width"] or o["width"], o["teacher_steps"] or o["steps"])


def train_both(o, seed):
    """Function (x, sigma) -> the true gradient of ln p/q at x [N, 2], the ratio network's, that of two scores."""
    p, q = spiral(), spiral(o["turn"])
    ratio, teacher = train_ratio(known(o, seed), q, o, seed), train_teacher(o, seed)
    student = train_score(q, o, seed, "student", o["width"], o["steps"])
    return lambda x, sigma: (p.score(x, sigma) - q.score(x, sigma), ratio_gradient(ratio, x, sigma),
                             score(teacher, x, sigma) - score(student, x, sigma))


def measure_error(o, seed):
    """Errors of the two estimates of grad ln p/q, at points of noised q, relative to its root mean square: a row's numbers."""
    q, gradients, row = spiral(o["turn"]), train_both(o, seed), {"ratio_error": [], "scores_error": []}
    for level in SIGMAS:
        rng, sigma = training.rng("cpu", "plane, test", level), torch.full((4000,), level)
        x = q.sample(4000, rng) + level * torch.randn(4000, 2, generator=rng)
        truth, *estimates = gradients(x, sigma)
        for errors, estimate in zip(row.values(), estimates):
            errors.append(round(((estimate - truth).norm() / truth.norm()).item(), 4))
    return row


class Affine(nn.Module):
    """x = A z + b: six parameters, and q is Gaussian at every noise level."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(0.5 * torch.eye(2)), nn.Parameter(torch.zeros(2))

    def forward(self, z):
        return z @ self.a.T + self.b

    def score(self, x, sigma):
        """grad ln q_sigma at x [N, 2]."""
        covariance = self.a @ self.a.T + sigma[:, None, None] ** 2 * torch.eye(2)
        return torch.linalg.solve(covariance, self.b - x)


class Small(nn.Sequential):
    """x = z / 2 plus an MLP of z."""

    def forward(self, z):
        return 0.5 * z + super().forward(z)


def run_loop(o, seed):
    """Train a generator to minimise the reverse KL over all noise levels, by the gradient `follow`: a row's numbers."""
    p, seen = spiral(), known(o, seed)
    teacher = train_teacher(o, seed) if o["follow"] == "scores" else None
    torch.manual_seed(training.seed_of(seed, "loop"))
    generator = Affine() if o["generator"] == "affine" else Small(*mlp(2, 32, 2))
    critic = copy.deepcopy(teacher) if teacher else Ratio(o["width"])
    noise, betas = Noise(o["batch"], seed, "loop"), (0.0, 0.999)  # as in train_diffratio.py
    follow, watch = Trainer(generator, o["generator_lr"], o["steps"], betas), Trainer(critic, o["lr"], o["steps"], betas)
    for _ in range(o["steps"]):
        fake = generator(noise.normal().flatten(1))[:, :, None, None]
        if o["follow"] == "ratio":
            watch.step(ratio_loss(critic, noise.points(seen), fake.detach(), noise.levels(), noise.normal(), noise.normal())[0])
            critic.requires_grad_(False)
            follow.step(generator_loss(critic, fake, noise.levels(), noise.normal(), "dikl"))
            critic.requires_grad_(True)
            continue
        if o["follow"] == "scores":
            watch.step(denoising_loss(critic, fake.detach(), noise.levels(), noise.normal()))
        sigma = noise.levels()
        x = fake.flatten(1) + sigma[:, None] * noise.normal().flatten(1)
        with torch.no_grad():
            of_p = p.score(x, sigma) if teacher is None else score(teacher, x, sigma)
            there = of_p - (generator.score(x, sigma) if teacher is None else score(critic, x, sigma))
        follow.step(-(there * x).sum(1))
    with torch.no_grad():
        x = generator(torch.randn(2000, 2, generator=training.rng("cpu", "plane, test")))
        return {f"kl_{level}": divergence(x, p, level) for level in (0.1, 0.5)}


def divergence(x, p, level):
    """KL(q_sigma || p_sigma) on a grid; q_sigma is the sum of Gaussians of width sigma around the samples x [n, 2]."""
    line = torch.linspace(-2, 2, 60) * (1 + level)
    grid, sigma = torch.cartesian_prod(line, line), torch.full((60**2,), level)
    q = Mixture(x, torch.zeros(len(x)))
    log_q = torch.cat([q.log_density(part, s) for part, s in zip(grid.split(500), sigma.split(500))])
    return ((log_q - p.log_density(grid, sigma)) * log_q.exp()).sum().item() * (line[1] - line[0]).item() ** 2


def error_table(rows):
    """Of {regime: its rows}."""
    both = itertools.product(rows, ("ratio", "scores"))
    lines = {f"{regime}, {name}": [row[f"{name}_error"] for row in rows[regime]] for regime, name in both}
    return measure.table(lines, {f"sigma {s:g}": (lambda r, i=i: r[i], "{:.2f}") for i, s in enumerate(SIGMAS)})


def loop_table(rows):
    return measure.table(rows, {f"KL at sigma {s}": (lambda r, s=s: r[f"kl_{s}"], "{:.3f}") for s in (0.1, 0.5)})


def pyplot():
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("the pictures need matplotlib, which is missing; `make exercises` installs it") from None
    plt.switch_backend("agg")
    return plt


def draw_field(folder):
    """The gradients of the regime `far` at three noise levels; trains the networks first."""
    plt, gradients, p, q = pyplot(), train_both(COMMON, 0), spiral(), spiral(COMMON["turn"])
    figure, axes = plt.subplots(3, 3, figsize=(8.4, 8.4), sharex="col", sharey="col", layout="constrained")
    for column, level in enumerate((0.1, 0.5, 2.0)):
        line = torch.linspace(-1.3, 1.3, 15) * (1 + 0.8 * level)
        grid, sigma = torch.cartesian_prod(line, line), torch.full((15**2,), level)
        fields = gradients(grid, sigma)
        density = p.log_density(grid, sigma).exp() + q.log_density(grid, sigma).exp()
        seen = density > 0.01 * density.max()  # elsewhere there are hardly any points
        scale = fields[0][seen].norm(dim=1).quantile(0.9).item()
        axes[0, column].set_title(f"sigma = {level:g}")
        names = {"true gradient": "0.35", "ratio network": "C0", "two scores": "C3"}  # and colours
        for axis, field, (label, colour) in zip(axes[:, column], fields, names.items()):
            arrows = field[seen] / scale
            arrows = arrows / arrows.norm(dim=1, keepdim=True).clamp(min=1.5) * 1.5  # the longest are cut
            axis.quiver(*grid[seen].T.numpy(), *arrows.T.numpy(), color=colour, angles="xy", scale=14, width=0.006)
            for mixture, marker in ((p, "k+"), (q, "kx")):
                axis.plot(*mixture.centres.T.numpy(), marker, markersize=4, alpha=0.5)
            axis.set(xticks=[], yticks=[], aspect="equal", ylabel=label if column == 0 else "")
    save(figure, folder / "plane-field.png")


def save(figure, path):
    with atomic(path) as part:
        figure.savefig(part, format="png", dpi=75)
    print(f"drew {path}")


PARTS = {"error": (REGIMES, COMMON, measure_error, error_table), "fixed-point": (LOOPS, LOOP, run_loop, loop_table)}


def main():
    parser = training.Parser(__doc__, dict(
        seeds=(1, "seeds 0 to N - 1"),
        results=(HERE / "results" / "plane.jsonl", "the file of the rows", Path),
        pictures=(None, "draw the gradient fields into this folder (matplotlib: `make exercises`)", Path)))
    parser.add_argument("part", nargs="?", choices=list(PARTS), help="what to run (default: both)")
    parser.add_argument("--regimes", nargs="+", choices=[*REGIMES, *LOOPS], metavar="NAME", help="only these (default: all)")
    args = parser.parse_args()
    if args.pictures:
        draw_field(args.pictures)
    for part in [args.part] if args.part else PARTS:
        (regimes, common, run, table), rows = PARTS[part], {}
        for seed, regime in itertools.product(range(args.seeds), [name for name in regimes if name in (args.regimes or regimes)]):
            key = {"part": part, "regime": regime, "seed": seed, "settings": {**common, **regimes[regime]}}
            found = [row for row in measure.json_lines(args.results, *key) if all(row[k] == v for k, v in key.items())]
            if not found:
                print(f"{part}: {regime}, seed {seed}", flush=True)
                found = [{**key, **run(key["settings"], seed)}]
                measure.add_lines(args.results, *found)
            rows.setdefault(regime, []).append(found[-1])
        if rows:
            print(f"\n{part}: mean and standard deviation over {args.seeds} seed(s)\n\n{table(rows)}")


if __name__ == "__main__":
    training.run(main)
