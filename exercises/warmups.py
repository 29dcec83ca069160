"""Warm-ups: what can be seen of the method in seconds, without training.

`wrong-loss` and `realism` are closed forms and need nothing. `log`, `calibration` and `reliability` read the generator and
the ratio network in assets/. `one-step`, `price` and `two-steps` also need the stage-1 network of `make demo`. Each prints a
table; exercises/00-warm-ups.md says what to expect.

    python exercises/warmups.py                        the first five, less than a minute
    python exercises/warmups.py all                    all eight, two to three minutes
    python exercises/warmups.py wrong-loss realism
    python exercises/warmups.py log --log runs/digits/dijs/log.jsonl
    python exercises/warmups.py one-step --seeds 3

The seeds are those of the noise, never of a training.
"""

import functools
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]
import measure  # noqa: E402
import sample  # noqa: E402
from machinery import checkpoints, data, training  # noqa: E402
from machinery.files import UserError, reading  # noqa: E402
from machinery.training import BANDS, band_sums  # noqa: E402
from train_diffratio import DIVERGENCES  # noqa: E402

# ---- Closed forms: q = N(theta, 1) against p = N(0, 1.5^2), by quadrature ----------------------------

GRID = torch.linspace(-12, 12, 20001, dtype=torch.float64)
THETA, STD_P = 0.7, 1.5
F_OF_U = {  # D_f(q || p) = E_p[f(u)] with u = q/p
    "dijs": lambda u: 0.5 * (u * u.log() - (u + 1) * ((u + 1) / 2).log()),
    "dikl": lambda u: u * u.log(),
    "dirm": lambda u: (1 + u) * (1 + u).log() - u,
    "fkl": lambda u: -u.log(),
}


def log_normal(x, mean, std):
    return -((x - mean) ** 2) / (2 * std**2) - math.log(std * math.sqrt(2 * math.pi))


def exact_gradient(f):
    """d/dtheta of E_p[f(q/p)], a float: q moves with theta."""
    theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
    log_p = log_normal(GRID, 0, STD_P)
    u = (log_normal(GRID, theta, 1) - log_p).exp()
    return torch.autograd.grad(torch.trapezoid(log_p.exp() * f(u), GRID), theta)[0].item()


def pathwise_gradient(loss):
    """d/dtheta of E_z[loss(h(theta + z))], a float: the function h = ln p/q is held fixed, as a frozen ratio network is."""
    theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
    x = theta + GRID
    h = log_normal(x, 0, STD_P) - log_normal(x, THETA, 1)
    return torch.autograd.grad(torch.trapezoid(log_normal(GRID, 0, 1).exp() * loss(h), GRID), theta)[0].item()


def wrong_loss(seed):
    """The loss of a sample: f'(u), or f(u)/u, whose mean is the divergence as well?"""
    rows = []
    for name, f in F_OF_U.items():
        wrong = pathwise_gradient(lambda h: f((-h).exp()) / (-h).exp())
        right, exact = pathwise_gradient(DIVERGENCES[name]), exact_gradient(f)
        rows.append({"divergence": name, "f(u)/u": wrong, "f'(u)": right, "d/dtheta of the divergence": exact})
    return rows


def realism(seed):
    """DiRM's f is convex with f'' = 1/(1 + u), and its divergence is 2 KL((p + q)/2 || p) + 2 ln 2 - 1."""
    rows = []
    for mean, std in [(0.0, STD_P), (THETA, 1.0), (2.0, 0.5), (-2.0, 1.2)]:
        log_p, log_q = log_normal(GRID, 0, STD_P), log_normal(GRID, mean, std)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        value = torch.trapezoid(log_p.exp() * F_OF_U["dirm"]((log_q - log_p).exp()), GRID).item()
        kl = torch.trapezoid(log_m.exp() * (log_m - log_p), GRID).item()
        expected = 2 * kl + 2 * math.log(2) - 1
        rows.append({"q": f"N({mean:g}, {std:g}^2)", "E_p[f(q/p)]": value, "2 KL(m, p) + 2 ln 2 - 1": expected})
    return rows


# ---- Reading a ratio network -------------------------------------------------------------------------


def real_digits():
    """The 1797 digits, [1797, 1, 8, 8] in [-1, 1]."""
    dataset = data.load("digits")
    return dataset.to_model(dataset.batch(np.arange(len(dataset)))[0], "cpu")


RATIO = str(ROOT / "assets" / "digits-ratio.pt")
FRESH = 1_000_000  # seeds of the samples begin here


@functools.cache
def fresh_samples(seed, n=1797):
    """Samples [n, 1, 8, 8] of the generator in assets/, of noise that no training has used."""
    net = checkpoints.load_network(sample.DIGITS, role="generator")
    return torch.cat([x for x, _ in sample.in_batches(net, range(n), FRESH + seed, "cpu", 600)])


@torch.no_grad()
def logits(ratio, x, sigma, seed):
    """The logit [n] of x + sigma eps, for images x [n, 1, 8, 8] and levels sigma [n]."""
    eps = torch.randn(x.shape, generator=training.rng("cpu", seed, "warm-up noise"))
    parts = zip((x + sigma[:, None, None, None] * eps).split(600), sigma.split(600))
    return torch.cat([ratio(part, level) for part, level in parts])


def both_logits(seed, noises):
    """Iterator over (sigma, logits of the data, logits of fresh samples), each [1797], once per draw of the noise."""
    ratio, real, fake = checkpoints.load_network(RATIO), real_digits(), fresh_samples(seed)
    for key in range(100 * seed, 100 * seed + noises):
        sigma = (torch.randn(len(real), generator=training.rng("cpu", key, "warm-up levels")) * 1.2 - 1.2).exp()  # as in stage 2
        yield sigma, logits(ratio, real, sigma, 2 * key), logits(ratio, fake, sigma, 2 * key + 1)


def read_log(seed, noises, log=None):
    """ln 2 - cross-entropy bounds the Jensen-Shannon divergence from below (nats; at most ln 2 = 0.693).

    Noise levels as in training. `right`: share told apart, of the data and of fresh samples; 0.5 is blind.
    """
    sums, right = torch.zeros(5, len(BANDS) + 1, dtype=torch.float64), torch.zeros(3, len(BANDS) + 1)
    for sigma, h_real, h_fake in both_logits(seed, noises):
        sums += band_sums(sigma, h_real, h_fake)
        counts = torch.stack([torch.ones_like(h_real), (h_real > 0).float(), (h_fake < 0).float()])
        right.index_add_(1, sum(sigma > edge for edge in BANDS), counts)
    last = {}
    if log:
        with reading(log, "a log.jsonl of stage 2", "give the one beside a ratio.pt"):
            last = json.loads(Path(log).read_text().splitlines()[-1])["bands"]
    rows = []
    record, _ = training.stage2_line({"bands": sums, "generator_loss": torch.zeros(()), "gradient": sums[:1]}, 1)
    for i, (band, found) in enumerate(record["bands"].items()):
        of_data, of_samples = (right[1:, i] / right[0, i]).tolist()
        row = {"sigma": band, "right, data": of_data, "right, samples": of_samples, "right": found["accuracy"]}
        row["ln 2 - cross-entropy"] = math.log(2) - found["loss"]
        rows.append({**row, "in the log": math.log(2) - last[band]["loss"]} if band in last else row)
    return rows


def calibration(seed, noises):
    """E_q[exp h] = 1 if h = ln p/q, since the integral of q p/q is that of p; and E_p[exp(-h)] = 1.

    The standard error is over images (each the mean over its noises), not over draws of noise.
    """
    ratio, real, fake, rows = checkpoints.load_network(RATIO), real_digits(), fresh_samples(seed), []
    for level in (0.05, 0.2, 0.5, 2.0):
        sigma, row, keys = torch.full((len(real),), level), {"sigma": level}, range(100 * seed, 100 * seed + noises)
        of_q = torch.stack([logits(ratio, fake, sigma, 2 * key).exp() for key in keys]).mean(dim=0)
        of_p = torch.stack([(-logits(ratio, real, sigma, 2 * key + 1)).exp() for key in keys]).mean(dim=0)
        for name, each in (("E_q[exp h]", of_q), ("E_p[exp(-h)]", of_p)):
            row |= {name: each.mean().item(), f"error of {name[:3]}": each.std().item() / math.sqrt(len(each))}
        rows.append({**row, "ideal": 1.0})
    return rows


def reliability(seed, noises, bins=(0.0, 0.45, 0.48, 0.5, 0.52, 0.55, 1.0)):
    """Where the network says "data with probability P", how often is it data? Noise levels as in training."""
    h = [(h_real, h_fake) for _, h_real, h_fake in both_logits(seed, noises)]
    probability = torch.cat([torch.cat(pair) for pair in h]).sigmoid()
    is_data = torch.cat([torch.cat([torch.ones_like(h_real), torch.zeros_like(h_fake)]) for h_real, h_fake in h])
    rows = []
    for low, high in zip(bins, bins[1:]):
        inside = (probability >= low) & (probability < high)
        frequency, ideal = is_data[inside].mean().item(), probability[inside].mean().item()
        row = {"P": f"{low:g} to {high:g}", "count": float(inside.sum())}
        rows.append({**row, "frequency of data": frequency, "ideal: mean P": ideal})
    return rows


# ---- Sampling: distances of 898 samples from the 1797 digits -----------------------------------------

STAGE1 = ROOT / "runs" / "digits" / "pretrain" / "network.pt"


class Distances:
    """`distances(x)` of images [n, 1, 8, 8] is {features: Fréchet distance from the digits}."""

    def __init__(self, stage1):
        if not Path(stage1).exists():
            raise UserError(f"{stage1} is missing: run `make demo` first, or `python pretrain.py`, or give --pretrained PATH")
        self.measures = measure.Measures("digits", stage1)
        self.net = checkpoints.load_network(stage1, role="denoiser")

    def __call__(self, x):
        images, names = data.to_uint8(x), {"classifier": "classifier", "stage1": "stage 1"}
        return {names[view]: self.measures.distance(view, self.measures.features(view, images)) for view in self.measures.views}


def noise(seed, n=898):
    """Standard normal z [n, 1, 8, 8], as `fresh_samples` has it. (Fewer samples are farther from the data.)"""
    return sample.inputs(checkpoints.load_network(sample.DIGITS), range(n), FRESH + seed, "cpu")[0]


@torch.no_grad()
def one_step(seed, distances):
    """One step of the untrained network, D(t z; t): which t is the best start, and is it the paper's 2.5?"""
    levels = (0.3, 0.5, 0.7, 1.0, 1.5, 2.5, 5.0, 20.0, 80.0)
    return [{"t": t, **distances(sample.one_step(distances.net, noise(seed), None, t))} for t in levels]


def price(seed, distances):
    """Heun with few steps against one step of the generator in assets/."""
    z, rows = noise(seed), []
    for steps in (3, 5, 9, 18):
        found = distances(sample.heun(distances.net, z, steps=steps))
        rows.append({"sampler": f"Heun, {steps} steps", "evaluations": 2 * steps - 1, **found})
    return rows + [{"sampler": "one step, after stage 2", "evaluations": 1, **distances(fresh_samples(seed, len(z)))}]


@torch.no_grad()
def two_steps(seed, distances):
    """Denoise at t, noise again to s, denoise at s: a sample in two evaluations of stage 1, without stage 2."""
    rows = []
    for t in (80.0, 2.5):
        first = sample.one_step(distances.net, noise(seed), None, t)
        eps = torch.randn(first.shape, generator=training.rng("cpu", seed, "second step"))
        for s in (0.2, 0.35, 0.5, 0.7, 1.0):
            rows.append({"t": t, "then s": s, **distances(distances.net(first + s * eps, torch.full((len(first),), s)))})
    return rows


CLOSED = {"wrong-loss": wrong_loss, "realism": realism}
READING = {"log": read_log, "calibration": calibration, "reliability": reliability}
SAMPLING = {"one-step": one_step, "price": price, "two-steps": two_steps}


def table(seeds):
    """The rows of each seed as one table in Markdown: mean, and standard deviation where seeds differ."""
    def show(values):
        if not isinstance(values[0], float):
            return str(values[0])
        return f"{np.mean(values):.4g}" + (f" ± {np.std(values, ddof=1):.2g}" if len(set(values)) > 1 else "")

    names = [f"FD ({key})" if key in ("classifier", "stage 1") else key for key in seeds[0][0]]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for same in zip(*seeds):
        lines.append(f"| {' | '.join(show([row[key] for row in same]) for key in same[0])} |")
    return "\n".join(lines)


def main():
    parser = training.Parser(__doc__, dict(
        seeds=(1, "seeds of the noise, 0 to N - 1"),
        noises=(10, f"draws of noise per image: {', '.join(READING)}"),
        log=(None, "a log.jsonl of stage 2, to print beside the table `log`", str),
        pretrained=(str(STAGE1), "the stage-1 network of the last three"),
        json=(None, "append a line of JSON per row to this file", str)))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all, or some of {', '.join([*CLOSED, *READING, *SAMPLING])}")
    args = parser.parse_args()
    every = {**CLOSED, **READING, **SAMPLING}
    names = list(every if "all" in args.names else args.names or {**CLOSED, **READING})
    if unknown := set(names) - set(every):
        parser.error(f"{min(unknown)}: unknown; choose among all, {', '.join(every)}")
    distances = Distances(args.pretrained) if set(names) & set(SAMPLING) else None
    for name in names:
        extra = {"noises": args.noises} if name in READING else {"distances": distances} if name in SAMPLING else {}
        if name == "log":
            extra["log"] = args.log
        seeds = [every[name](seed, **extra) for seed in range(1 if name in CLOSED else args.seeds)]
        print(f"\n{name}: {every[name].__doc__.strip().splitlines()[0]}\n\n{table(seeds)}", flush=True)
        if args.json:
            with open(args.json, "a") as file:
                for seed, rows in enumerate(seeds):
                    file.writelines(json.dumps({"exercise": name, "seed": seed, **row}) + "\n" for row in rows)


if __name__ == "__main__":
    training.run(main)
