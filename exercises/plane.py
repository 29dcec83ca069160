"""The ratio's gradient is a score difference: points in the plane, where both are known at every noise level.

p is a spiral of eight Gaussians, q the same spiral turned. A small ratio network learns ln p/q with the product's own
`ratio_loss`, two small denoisers learn the scores of p and of q with `denoising_loss`, from as many points; then the
gradient of the one and the difference of the others stand beside the truth, at six noise levels (`error`). With a generator
in the loop (`fixed-point`) the question is where it ends when it follows the one or the other.

    python exercises/plane.py                                  all: two tables and the pictures, one seed, four minutes
    python exercises/plane.py --seeds 3                        seeds 0, 1, 2
    python exercises/plane.py error --regimes close "few points"
    python exercises/plane.py pictures                         draws what is there (needs requirements-exercises.txt)

A row is a line of JSON in exercises/results/plane.jsonl. Stopped, it continues with the same command: a row with the same
settings that is there is not run again.
"""

import copy
import io
import json
import math
import sys
import time
from pathlib import Path

import PIL.Image
import torch
from torch import nn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT)]
from machinery import training  # noqa: E402
from machinery.files import UserError, json_lines  # noqa: E402
from networks import Config, parameter_count, preconditioning  # noqa: E402
from pretrain import denoising_loss  # noqa: E402
from train_diffratio import generator_loss, ratio_loss  # noqa: E402

# ---------------------------------------------------------------------------------------------------------
# Settings: what all regimes share, and each regime as differences from it.

SIGMAS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # noise levels of the measurement; training draws ln sigma ~ N(-1.2, 1.2^2)
COMMON = dict(
    turn=202.5,  # degrees by which q is p turned: the centres of q lie between those of p, on the other arm
    steps=2000, batch=256, lr=5e-3,  # of every network; batch: points of p and as many of q; the rate falls to zero
    width=64,  # of every network: three hidden layers
    ratio_width=None,  # of the ratio network, where it is to have as many parameters as the two scores
    teacher_steps=None, teacher_width=None,  # of the score of p, where it is to be worse than the others
    from_teacher=False,  # the score of q starts from the weights of the score of p
    points=None,  # p is known by so many points only; None: fresh ones in every step
    scaled=False,  # the logit is multiplied by sigma_data / sqrt(sigma^2 + sigma_data^2)
)  # fmt: skip
REGIMES = {
    "far": {},
    "between": dict(turn=22.5),  # the same arm: mean and covariance nearly equal, so that noise soon hides the difference
    "close": dict(turn=5.0),
    "brief": dict(steps=200),
    "small": dict(width=12),
    "few points": dict(points=100),
    "brief teacher": dict(teacher_steps=100),
    "small teacher": dict(teacher_width=8),
    "close, student from teacher": dict(turn=5.0, from_teacher=True),
    "close, small": dict(turn=5.0, width=12),
    "close, few points": dict(turn=5.0, points=100),
    "far, same size and time": dict(ratio_width=92),
    "far, scaled logit": dict(scaled=True),
    "close, scaled logit": dict(turn=5.0, scaled=True),
}
# With a generator: `follow` the ratio's gradient, the difference of two scores, or (affine only, q is then Gaussian) the truth.
# The score of q starts from the score of p. One step of the critic per step of the generator.
LOOP = dict(
    follow="ratio", generator="affine", generator_lr=5e-3, steps=800, batch=256, lr=5e-3, width=64, teacher_steps=None,
    teacher_width=None, points=None, scaled=False,
    start=(0.5, 0.0, 0.0),  # of the affine generator: standard deviation and mean
)  # fmt: skip
ASIDE = dict(start=(0.3, 0.5, -0.5))
LOOPS = {
    "affine, exact": dict(follow="exact"),
    "affine, ratio": {},
    "affine, scores": dict(follow="scores"),
    "affine, scores, brief teacher": dict(follow="scores", teacher_steps=100),
    "aside, exact": dict(ASIDE, follow="exact"),
    "aside, ratio": ASIDE,
    "aside, scores": dict(ASIDE, follow="scores"),
    "MLP, ratio": dict(generator="mlp"),
    "MLP, scores": dict(generator="mlp", follow="scores"),
    "MLP, scores, brief teacher": dict(generator="mlp", follow="scores", teacher_steps=100),
    "MLP, ratio, few points": dict(generator="mlp", points=100),
    "MLP, scores, few points": dict(generator="mlp", follow="scores", points=100),
}


# ---------------------------------------------------------------------------------------------------------
# The truth.


class Mixture:
    """A mixture of Gaussians in the plane; noise of level sigma only widens each of them. centres [K, 2], stds [K]."""

    def __init__(self, centres, stds):
        self.centres, self.stds = centres, stds

    def sample(self, n, rng):
        """Points [n, 2]."""
        k = torch.randint(len(self.stds), (n,), generator=rng)
        return self.centres[k] + self.stds[k, None] * torch.randn(n, 2, generator=rng)

    def _logits(self, x, sigma):
        """ln of density times weight of each component at x [N, 2], for sigma [N]: [N, K]; differences [N, K, 2]; variances."""
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


class Sample:
    """p known by n points only: `sample` draws from them, again and again."""

    def __init__(self, mixture, n, rng):
        self.points = mixture.sample(n, rng)

    def sample(self, n, rng):
        return self.points[torch.randint(len(self.points), (n,), generator=rng)]


# ---------------------------------------------------------------------------------------------------------
# The networks, with the interface of the product's: x [N, 2, 1, 1], sigma [N].


def mlp(inputs, width, outputs):
    layers = [nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


class Ratio(nn.Module):
    """The logit h(x, sigma), [N]."""

    config = Config(img_resolution=1, img_channels=2, channel_mult=(1,))

    def __init__(self, width, scaled=False):
        super().__init__()
        self.layers, self.scaled = mlp(3, width, 1), scaled

    def forward(self, x, sigma, labels=None):
        c_in, c_noise = preconditioning("edm", sigma, 0.5)[2:]
        h = self.layers(torch.cat([x.flatten(1) * c_in[:, None], c_noise[:, None]], dim=1)).flatten()
        return h * 0.5 * c_in if self.scaled else h  # the truth falls as 1/sigma where noise outweighs data


class Score(nn.Module):
    """The denoiser D(x; sigma) of EDM, [N, 2, 1, 1]."""

    config = Ratio.config

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


# ---------------------------------------------------------------------------------------------------------
# Training.


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
    """Random numbers of a training: points, levels, noise, all of one seed."""

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
    net, noise = Ratio(o["ratio_width"] or o["width"], o["scaled"]), Noise(o["batch"], seed, "ratio")
    trainer = Trainer(net, o["lr"], o["steps"])
    for _ in range(o["steps"]):
        real, fake, sigma = noise.points(p), noise.points(q), noise.levels()
        trainer.step(ratio_loss(net, real, fake, sigma, noise.normal(), noise.normal())[0])
    return net


def train_score(p, o, seed, name, width, steps, start=None):
    torch.manual_seed(training.seed_of(seed, name))
    net, noise = copy.deepcopy(start) or Score(width), Noise(o["batch"], seed, name)
    trainer = Trainer(net, o["lr"], steps)
    for _ in range(steps):
        trainer.step(denoising_loss(net, noise.points(p), noise.levels(), noise.normal()))
    return net


def known(o, seed):
    """What the networks see of p."""
    return Sample(spiral(), o["points"], training.rng("cpu", seed, "points")) if o["points"] else spiral()


TEACHERS = {}  # those that were trained before in this process: several regimes have the same


def train_teacher(o, seed):
    """The score of p."""
    width, steps = o["teacher_width"] or o["width"], o["teacher_steps"] or o["steps"]
    key = (seed, width, steps, o["batch"], o["lr"], o["points"])
    if key not in TEACHERS:
        TEACHERS[key] = train_score(known(o, seed), o, seed, "teacher", width, steps)
    return TEACHERS[key]


def measure_error(o, seed):
    """Errors of the two estimates of grad ln p/q, at points of noised q, relative to its root mean square: a row's numbers."""
    p, q = spiral(), spiral(o["turn"])
    seen, started = known(o, seed), time.monotonic()
    ratio = train_ratio(seen, q, o, seed)
    middle = time.monotonic()
    TEACHERS.clear()  # trained anew, as it is timed
    teacher = train_teacher(o, seed)
    student = train_score(q, o, seed, "student", o["width"], o["steps"], teacher if o["from_teacher"] else None)
    row = {"ratio_seconds": middle - started, "scores_seconds": time.monotonic() - middle}
    row |= {"ratio_parameters": parameter_count(ratio)}
    row |= {"scores_parameters": parameter_count(teacher) + parameter_count(student)}
    row |= {f"{name}_{what}": [] for name in ("ratio", "scores") for what in ("error", "cosine")}
    for level in SIGMAS:
        rng, sigma = training.rng("cpu", "plane, test", level), torch.full((4000,), level)
        x = q.sample(4000, rng) + level * torch.randn(4000, 2, generator=rng)
        truth = p.score(x, sigma) - q.score(x, sigma)
        found = {"ratio": ratio_gradient(ratio, x, sigma), "scores": score(teacher, x, sigma) - score(student, x, sigma)}
        for name, estimate in found.items():
            row[f"{name}_error"].append(round(((estimate - truth).norm() / truth.norm()).item(), 4))
            row[f"{name}_cosine"].append(round(((estimate * truth).sum() / estimate.norm() / truth.norm()).item(), 4))
    return row


# ---------------------------------------------------------------------------------------------------------
# With a generator in the loop.


class Affine(nn.Module):
    """x = A z + b: six parameters, and q is Gaussian at every noise level."""

    def __init__(self, std, *mean):
        super().__init__()
        self.a, self.b = nn.Parameter(std * torch.eye(2)), nn.Parameter(torch.tensor(mean))

    def forward(self, z):
        return z @ self.a.T + self.b

    def score(self, x, sigma):
        """grad ln q_sigma at x [N, 2]."""
        covariance = self.a @ self.a.T + sigma[:, None, None] ** 2 * torch.eye(2)
        return torch.linalg.solve(covariance, self.b - x)


class Small(nn.Module):
    """x = a small MLP of z."""

    def __init__(self):
        super().__init__()
        self.layers = mlp(2, 32, 2)

    def forward(self, z):
        return 0.5 * z + self.layers(z)


def run_loop(o, seed):
    """Train a generator to minimise the reverse KL over all noise levels, by the gradient that `follow` names: a row."""
    p = spiral()
    seen = known(o, seed)
    teacher = train_teacher(o, seed) if o["follow"] == "scores" else None
    torch.manual_seed(training.seed_of(seed, "loop"))
    generator = Affine(*o["start"]) if o["generator"] == "affine" else Small()
    critic = Ratio(o["width"], o["scaled"]) if o["follow"] != "scores" else Score(o["width"])
    if teacher:
        critic.load_state_dict(teacher.state_dict())
    noise, betas = Noise(o["batch"], seed, "loop"), (0.0, 0.999)  # beta1 = 0, as in the product
    follow, watch = Trainer(generator, o["generator_lr"], o["steps"], betas), Trainer(critic, o["lr"], o["steps"], betas)
    for _ in range(o["steps"]):
        fake = generator(noise.normal().flatten(1))[:, :, None, None]
        held = fake.detach()
        if o["follow"] == "ratio":
            watch.step(ratio_loss(critic, noise.points(seen), held, noise.levels(), noise.normal(), noise.normal())[0])
            critic.requires_grad_(False)
            follow.step(generator_loss(critic, fake, noise.levels(), noise.normal(), "dikl"))
            critic.requires_grad_(True)
            continue
        if o["follow"] == "scores":
            watch.step(denoising_loss(critic, held, noise.levels(), noise.normal()))
        sigma = noise.levels()
        x = fake.flatten(1) + sigma[:, None] * noise.normal().flatten(1)
        with torch.no_grad():
            of_p = p.score(x, sigma) if teacher is None else score(teacher, x, sigma)
            there = of_p - (generator.score(x, sigma) if teacher is None else score(critic, x, sigma))
        follow.step(-(there * x).sum(1))
    with torch.no_grad():
        x = generator(torch.randn(2000, 2, generator=training.rng("cpu", "plane, test")))
        row = {f"kl_{level}": divergence(x, p, level) for level in (0.1, 0.5)}
        if o["generator"] == "affine":
            row |= {"mean": generator.b.tolist(), "covariance": (generator.a @ generator.a.T).tolist()}
        elif seed == 0:  # to be drawn
            row["points"] = [[round(v, 2) for v in point] for point in x[:300].tolist()]
    return row


def divergence(x, p, level, cells=60, edge=2.0):
    """KL(q_sigma || p_sigma) on a grid; q_sigma is the sum of Gaussians of width sigma around the samples x [n, 2]."""
    line = torch.linspace(-edge, edge, cells) * (1 + level)
    grid, sigma = torch.cartesian_prod(line, line), torch.full((cells**2,), level)
    q = Mixture(x, torch.zeros(len(x)))
    log_q = torch.cat([q.log_density(part, s) for part, s in zip(grid.split(500), sigma.split(500))])
    return ((log_q - p.log_density(grid, sigma)) * log_q.exp()).sum().item() * (line[1] - line[0]).item() ** 2


def wasserstein(a, b):
    """The 2-Wasserstein distance of two Gaussians, each a row with `mean` and `covariance`."""
    s, t = (torch.tensor(row["covariance"], dtype=torch.float64) for row in (a, b))
    values, vectors = torch.linalg.eigh(s)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ t @ root).clamp(min=0).sqrt().sum()
    square = (torch.tensor(a["mean"]) - torch.tensor(b["mean"])).square().sum() + s.trace() + t.trace() - 2 * cross
    return square.clamp(min=0).sqrt().item()


# ---------------------------------------------------------------------------------------------------------
# Rows, tables, pictures.

PARTS = {"error": (REGIMES, COMMON, measure_error), "fixed-point": (LOOPS, LOOP, run_loop)}


def spread(rows, key):
    """Mean and standard deviation over rows of a number, or of each of a list of numbers."""
    values = torch.tensor([row[key] for row in rows], dtype=torch.float64)
    return values.mean(dim=0), values.std(dim=0) if len(rows) > 1 else torch.zeros_like(values[0])


def error_table(rows):
    lines = [f"| regime | gradient | {' | '.join(f'{s:g}' for s in SIGMAS)} |", "|---" * (2 + len(SIGMAS)) + "|"]
    for regime in dict.fromkeys(row["regime"] for row in rows):
        mine = [row for row in rows if row["regime"] == regime]
        for name in ("ratio", "scores"):
            cells = " | ".join(f"{m:.2f} ± {s:.2f}" for m, s in zip(*spread(mine, f"{name}_error")))
            lines.append(f"| {regime} | {name} | {cells} |")
    return "\n".join(lines)


def loop_table(rows):
    lines = ["| loop | KL at 0.1 | KL at 0.5 | from the exact end |", "|---|---|---|---|"]
    exact = {(row["regime"].split(",")[0], row["seed"]): row for row in rows if row["settings"]["follow"] == "exact"}
    for regime in dict.fromkeys(row["regime"] for row in rows):
        mine = [dict(row) for row in rows if row["regime"] == regime]
        away = ""
        kind = regime.split(",")[0]
        if all((kind, row["seed"]) in exact for row in mine):
            for row in mine:
                row["away"] = wasserstein(row, exact[kind, row["seed"]])
            away = "{:.3f} ± {:.3f}".format(*spread(mine, "away"))
        kl = " | ".join("{:.3f} ± {:.3f}".format(*spread(mine, f"kl_{level}")) for level in (0.1, 0.5))
        lines.append(f"| {regime} | {kl} | {away} |")
    return "\n".join(lines)


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise UserError("the pictures need matplotlib: pip install -r requirements-exercises.txt") from None
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


COLOURS = {"truth": "0.35", "ratio": "C0", "scores": "C3"}


def draw_field(folder, regime="far", levels=(0.1, 0.5, 2.0)):
    """The true gradient of ln p/q, the ratio network's and the score pair's at three noise levels; trains them first."""
    plt, o = pyplot(), {**COMMON, **REGIMES[regime]}
    p, q = spiral(), spiral(o["turn"])
    ratio, teacher = train_ratio(p, q, o, 0), train_teacher(o, 0)
    student = train_score(q, o, 0, "student", o["width"], o["steps"])
    figure, axes = plt.subplots(3, len(levels), figsize=(8.4, 8.4), sharex="col", sharey="col", layout="constrained")
    for column, level in enumerate(levels):
        line = torch.linspace(-1.3, 1.3, 15) * (1 + 0.8 * level)
        grid, sigma = torch.cartesian_prod(line, line), torch.full((15**2,), level)
        fields = {"truth": p.score(grid, sigma) - q.score(grid, sigma), "ratio": ratio_gradient(ratio, grid, sigma),
                  "scores": score(teacher, grid, sigma) - score(student, grid, sigma)}  # fmt: skip
        density = (p.log_density(grid, sigma).exp() + q.log_density(grid, sigma).exp()).clamp(min=0)
        seen = density > 0.01 * density.max()  # elsewhere there are no points, neither for training nor for the generator
        scale = fields["truth"][seen].norm(dim=1).quantile(0.9).item()
        for row, (name, field) in enumerate(fields.items()):
            axis = axes[row, column]
            arrows = field[seen] / scale
            arrows = arrows / arrows.norm(dim=1, keepdim=True).clamp(min=1.5) * 1.5  # the longest are cut
            axis.quiver(*grid[seen].T.numpy(), *arrows.T.numpy(), color=COLOURS[name], angles="xy", scale=14, width=0.006)
            for mixture, marker in ((p, "k+"), (q, "kx")):
                axis.plot(*mixture.centres.T.numpy(), marker, markersize=4, alpha=0.5)
            axis.set(xticks=[], yticks=[], aspect="equal")
            if row == 0:
                axis.set_title(f"sigma = {level:g}")
            if column == 0:
                axis.set_ylabel({"truth": "true gradient", "ratio": "ratio network", "scores": "two scores"}[name])
    save(figure, folder / "plane-field.png")


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=75)
    PIL.Image.open(picture).convert("RGB").quantize(32).save(path, optimize=True)  # 32 colours: a small file
    print(f"drew {path}")


def draw_error(rows, folder):
    """Error by noise level, a panel per regime, the band from the least to the largest seed."""
    plt = pyplot()
    regimes = list(dict.fromkeys(row["regime"] for row in rows))
    columns = 4
    lines = -(-len(regimes) // columns)
    size = dict(figsize=(11, 2.5 * lines), squeeze=False)
    figure, axes = plt.subplots(lines, columns, sharex=True, sharey=True, layout="constrained", **size)
    for axis in axes.flat[len(regimes) :]:
        axis.axis("off")
    for axis, regime in zip(axes.flat, regimes):
        for name in ("ratio", "scores"):
            values = torch.tensor([row[f"{name}_error"] for row in rows if row["regime"] == regime])
            axis.fill_between(SIGMAS, values.amin(0), values.amax(0), color=COLOURS[name], alpha=0.3)
            axis.loglog(SIGMAS, values.mean(0), color=COLOURS[name], label={"ratio": "ratio", "scores": "two scores"}[name])
        axis.axhline(1, color="0.7", linewidth=0.8)
        axis.set_title(regime, fontsize=10)
    axes[0, 0].legend()
    figure.supxlabel("noise level sigma")
    figure.supylabel("relative error of the gradient (1: no better than zero)")
    save(figure, folder / "plane-error.png")


def draw_loops(rows, folder):
    """Where generators end: affine ones as ellipses, small networks as points (seed 0), over the density of p."""
    plt, p = pyplot(), spiral()
    line = torch.linspace(-1.5, 1.5, 120)
    grid = torch.cartesian_prod(line, line)
    density = p.log_density(grid, torch.full((len(grid),), 0.1)).exp().view(120, 120).T
    small = [row for row in rows if "points" in row]
    columns = -(-(len(small) + 2) // 2)
    figure, axes = plt.subplots(2, columns, figsize=(2.7 * columns, 5.6), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], aspect="equal", xlim=(-1.5, 1.5), ylim=(-1.5, 1.5))
        axis.contour(line, line, density, colors="0.6", linewidths=0.6)
    for axis in axes.flat[len(small) + 2 :]:
        axis.set_visible(False)
    circle = torch.stack([torch.linspace(0, 2 * math.pi, 100).cos(), torch.linspace(0, 2 * math.pi, 100).sin()])
    for axis, start in zip(axes.flat, ("affine", "aside")):
        for row in rows:
            follow = row["regime"].removeprefix(f"{start}, ")
            if row["regime"] == f"{start}, {follow}" and follow in ("exact", "ratio", "scores"):
                root = torch.linalg.cholesky(torch.tensor(row["covariance"]))
                ring = root @ circle + torch.tensor(row["mean"])[:, None]
                colour = COLOURS.get(follow, COLOURS["truth"])
                axis.plot(*ring, color=colour, linewidth=1, label=follow if row["seed"] == 0 else None)
        if axis.lines:
            axis.legend(fontsize=7, loc="lower right")
        axis.set_title(f"{start}: one standard deviation", fontsize=9)
    for axis, row in zip(axes.flat[2:], small):
        axis.plot(*torch.tensor(row["points"]).T, ".", markersize=2.5, color="C3" if "scores" in row["regime"] else "C0")
        axis.set_title(row["regime"], fontsize=9)
    save(figure, folder / "plane-fixed-point.png")


def main():
    parser = training.Parser(__doc__)
    add = parser.add_argument
    add("part", nargs="?", choices=[*PARTS, "pictures", "all"], default="all", help="what to run")
    add("--seeds", type=training.positive(int), default=1, metavar="N", help="seeds 0 to N - 1")
    add("--regimes", nargs="+", metavar="NAME", help="some of the regimes (default: all)")
    add("--steps", type=training.positive(int), metavar="N", help="another length of every training (default: the table's)")
    add("--results", type=Path, default=HERE / "results" / "plane.jsonl", metavar="PATH", help="the file of the rows")
    add("--pictures", type=Path, default=ROOT / "assets" / "exercises", metavar="FOLDER", help="where the pictures go")
    args = parser.parse_args()
    for name in args.regimes or []:
        if name not in {**REGIMES, **LOOPS}:
            parser.error(f"{name}: unknown; the regimes are {', '.join([*REGIMES, *LOOPS])}")
    if args.part in ("all", "pictures"):
        pyplot()  # a missing package is told now, not after the work

    wanted = {}
    for seed in range(args.seeds):
        for part, (table, common, measure) in PARTS.items():
            for regime in table:
                if regime not in (args.regimes or table):
                    continue
                settings = {**common, **table[regime], **({"steps": args.steps} if args.steps else {})}
                settings = json.loads(json.dumps(settings))  # as they are read again: tuples become lists
                key = {"part": part, "regime": regime, "seed": seed, "settings": settings}
                found = [row for row in json_lines(args.results, *key) if all(row[k] == v for k, v in key.items())]
                if not found and args.part in (part, "all"):
                    print(f"{part}: {regime}, seed {seed}", flush=True)
                    found = [{**key, **measure(settings, seed)}]
                    args.results.parent.mkdir(parents=True, exist_ok=True)
                    with open(args.results, "a") as file:
                        file.write(json.dumps(found[0]) + "\n")
                wanted.setdefault(part, []).extend(found[-1:])
    for part, show in (("error", error_table), ("fixed-point", loop_table)):
        if args.part in (part, "all") and wanted.get(part):
            print(f"\n{part}: mean and standard deviation over {args.seeds} seed(s)\n\n{show(wanted[part])}")
    if args.part in ("all", "pictures"):
        draw_field(args.pictures)
        if wanted.get("error"):
            draw_error(wanted["error"], args.pictures)
        if wanted.get("fixed-point"):
            draw_loops(wanted["fixed-point"], args.pictures)


if __name__ == "__main__":
    training.run(main)
