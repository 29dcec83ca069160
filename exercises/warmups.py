"""Warm-ups: what can be seen of the method in seconds, without training.

`wrong-loss` is a closed form. `log`, `calibration` and `reliability` read the generator and the ratio network in assets/,
`one-step` and `price` the stage-1 network there. exercises/00-warm-ups.md says what to expect.

    python exercises/warmups.py --seeds 3              the first four; the seeds are those of the noise, never of a training
    python exercises/warmups.py one-step price         the last two
    python exercises/warmups.py log --log runs/digits/dijs/log.jsonl
"""

import functools
import json
import math
from pathlib import Path

import torch

from project import ROOT
import check
import measure
import sample
from machinery import checkpoints, data, training
from machinery.files import reading
from train_diffratio import DIVERGENCES

# ---- Closed forms: q = N(theta, 1) against p = N(0, 1.5^2), by quadrature ----------------------------

GRID = torch.linspace(-12, 12, 20001, dtype=torch.float64)
THETA, STD_P = 0.7, 1.5


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


def wrong_loss(seed, args=None):
    """The loss of a sample: f'(u), or f(u)/u, whose mean is the divergence as well?"""
    rows = []
    for name, loss in DIVERGENCES.items():
        f = check.F_OF_U[name]  # of u = q/p: D_f(q || p) = E_p[f(u)]
        wrong = pathwise_gradient(lambda h: f((-h).exp()) / (-h).exp())
        rows.append({"divergence": name, "f(u)/u": wrong, "f'(u)": pathwise_gradient(loss),
                     "d/dtheta of the divergence": exact_gradient(f)})
    return rows


RATIO, STAGE1 = (str(ROOT / "assets" / f"digits-{name}.pt") for name in ("ratio", "stage1"))
FRESH = 1_000_000  # seeds of the samples begin here


@functools.cache
def fresh_samples(seed, n=1797):
    """Samples [n, 1, 8, 8] of the generator in assets/, of noise that no training has used."""
    net = checkpoints.load_network(sample.DIGITS, role="generator")
    return torch.cat(list(measure.in_batches(net, range(n), FRESH + seed, "cpu", 600)))


def ratio_and_images(seed):
    """The ratio network in assets/, the digits and as many fresh samples [1797, 1, 8, 8] in [-1, 1]."""
    dataset = data.load("digits")
    return checkpoints.load_network(RATIO), dataset.to_model(torch.tensor(dataset.images), "cpu"), fresh_samples(seed)


@torch.no_grad()
def logits(ratio, x, sigma, seed):
    """The logit [n] of x + sigma eps, for images x [n, 1, 8, 8] and levels sigma [n]."""
    eps = torch.randn(x.shape, generator=training.rng("cpu", seed, "warm-up noise"))
    parts = zip((x + sigma[:, None, None, None] * eps).split(600), sigma.split(600))
    return torch.cat([ratio(part, level) for part, level in parts])


def both_logits(seed, noises):
    """Noise levels as in training, logits of the data and of fresh samples, each [1797 * noises]."""
    (ratio, real, fake), draws = ratio_and_images(seed), []
    for key in range(100 * seed, 100 * seed + noises):
        sigma = (torch.randn(len(real), generator=training.rng("cpu", key, "warm-up levels")) * 1.2 - 1.2).exp()
        draws.append((sigma, logits(ratio, real, sigma, 2 * key), logits(ratio, fake, sigma, 2 * key + 1)))
    return map(torch.cat, zip(*draws))


def read_log(seed, args):
    """ln 2 - cross-entropy bounds the Jensen-Shannon divergence from below (nats; at most ln 2 = 0.693)."""
    sigma, h_real, h_fake = both_logits(seed, args.noises)
    unused = dict(generator_loss=torch.zeros(()), gradient=torch.ones(1, 5))
    bands = training.stage2_line(dict(unused, bands=training.band_sums(sigma, h_real, h_fake)))[0]["bands"]
    right = torch.stack([h_real > 0, h_fake < 0])  # 0.5 is blind
    shares = (training.by_band(sigma, right) / training.by_band(sigma, torch.ones_like(right))).T.tolist()
    rows, last = [], {}
    if args.log:
        with reading(args.log, "a log.jsonl of stage 2", "give the one beside a ratio.pt"):
            lines = map(json.loads, Path(args.log).read_text().splitlines())
            last = [line["bands"] for line in lines if "bands" in line][-1]
    for (band, found), (of_data, of_samples) in zip(bands.items(), shares):
        rows.append({"sigma": band, "right, data": of_data, "right, samples": of_samples, "right": found["accuracy"],
                     "ln 2 - cross-entropy": math.log(2) - found["loss"]})
        if band in last:
            rows[-1]["in the log"] = math.log(2) - last[band]["loss"]
    return rows


def calibration(seed, args):
    """E_q[exp h] = 1 if h = ln p/q, since the integral of q p/q is that of p; and E_p[exp(-h)] = 1."""
    (ratio, real, fake), rows = ratio_and_images(seed), []
    for level in (0.05, 0.2, 0.5, 2.0):
        sigma, keys = torch.full((len(real),), level), range(100 * seed, 100 * seed + args.noises)
        of_q = torch.cat([logits(ratio, fake, sigma, 2 * key).exp() for key in keys]).mean().item()
        of_p = torch.cat([(-logits(ratio, real, sigma, 2 * key + 1)).exp() for key in keys]).mean().item()
        rows.append({"sigma": level, "E_q[exp h]": of_q, "E_p[exp(-h)]": of_p, "ideal": 1.0})
    return rows


def reliability(seed, args, bins=(0.0, 0.45, 0.48, 0.5, 0.52, 0.55, 1.0)):
    """Where the network says "data with probability P", how often is it data? Noise levels as in training."""
    _, h_real, h_fake = both_logits(seed, args.noises)
    probability = torch.cat([h_real, h_fake]).sigmoid()
    is_data = torch.cat([torch.ones_like(h_real), torch.zeros_like(h_fake)])
    rows = []
    for low, high in zip(bins, bins[1:]):
        inside = (probability >= low) & (probability < high)
        rows.append({"P": f"{low:g} to {high:g}", "count": float(inside.sum()),
                     "frequency of data": is_data[inside].mean().item(), "ideal: mean P": probability[inside].mean().item()})
    return rows


# ---- Sampling: distances of 898 samples from the 1797 digits -----------------------------------------

measures = functools.cache(lambda: measure.Measures("digits", STAGE1))  # made when first asked for


def distances(x):
    """{heading: Fréchet distance of images x [n, 1, 8, 8] from the digits}."""
    known, ours = measures(), measures().features(data.to_uint8(x))
    found = [measure.distance(known.views[view], ours[view], known.held[view]) for view in ("classifier", "stage1")]
    return dict(zip(("FD (classifier)", "FD (stage 1)"), found))


def noise(seed, n=898):
    """Standard normal z [n, 1, 8, 8], as `fresh_samples` has it. (Fewer samples are farther from the data.)"""
    return sample.inputs(checkpoints.load_network(sample.DIGITS), range(n), FRESH + seed, "cpu")[0]


@torch.no_grad()
def one_step(seed, args):
    """One step of the untrained network, D(t z; t): which t is the best start, and is it the paper's 2.5?"""
    net, levels = checkpoints.load_network(STAGE1), (0.3, 0.5, 0.7, 1.0, 1.5, 2.5, 5.0, 20.0, 80.0)
    return [{"t": t, **distances(sample.one_step(net, noise(seed), None, t))} for t in levels]


def price(seed, args):
    """Heun with few steps against one step of the generator in assets/."""
    net, z = checkpoints.load_network(STAGE1), noise(seed)
    drawn = {f"Heun, {steps} steps": (2 * steps - 1, sample.heun(net, z, steps=steps)) for steps in (3, 5, 9, 18)}
    drawn["one step, after stage 2"] = 1, fresh_samples(seed, len(z))
    return [{"sampler": name, "evaluations": float(cost), **distances(x)} for name, (cost, x) in drawn.items()]


EVERY = {"wrong-loss": wrong_loss, "log": read_log, "calibration": calibration, "reliability": reliability,
         "one-step": one_step, "price": price}


def main():
    parser = training.Parser(__doc__, dict(
        seeds=(1, "seeds of the noise, 0 to N - 1"),
        noises=(10, "draws of noise per image, of those that read a ratio network"),
        log=(None, "a log.jsonl of stage 2, to print beside the table `log`", str)))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(EVERY)} (default: the first four)")
    args = parser.parse_args()
    if unknown := set(args.names) - set(EVERY):
        parser.error(f"{min(unknown)}: unknown; choose among {', '.join(EVERY)}")
    for name in args.names or list(EVERY)[:4]:
        seeds = [EVERY[name](seed, args) for seed in range(1 if name == "wrong-loss" else args.seeds)]
        first, *headings = seeds[0][0]  # the first value of a row is its name
        rows = {f"{first} {same[0][first]}": same for same in zip(*seeds)}
        columns = {heading: (lambda row, key=heading: row[key], "{:.4g}") for heading in headings}
        print(f"\n{name}: {EVERY[name].__doc__}\n\n{measure.table(rows, columns)}", flush=True)


if __name__ == "__main__":
    training.run(main)
