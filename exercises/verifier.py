"""A verifier for free? Draw K candidates per image, let the ratio network choose, measure what that is worth.

`sample.py --candidates K` keeps candidate k with probability proportional to exp(h_k) (resampling) or that of the largest h_k
(best). Here 16 candidates of each image are drawn once, with the numbers of sample.py, and all K, noise levels and RECIPES
choose from them: the ratio network that training left, others trained on against the frozen averaged generator, and a blind
choice (h = 0) with the same random numbers. Each seed splits the data: 80 % to train on, a tenth to decide when to stop and
the temperature, a tenth to judge (of Fashion-MNIST the test set judges). The generator of the digits has seen all of them.

    python exercises/verifier.py --seeds 3                         the digits, with the networks of assets/ and runs/digits/pretrain
    python exercises/verifier.py --seeds 3 --network "my-runs/{seed}/network.pt" --ratio "my-runs/{seed}/ratio.pt" --results mine.jsonl
    python exercises/verifier.py --data fashion-mnist --seeds 3 --recipes blind "as trained"      without any training

Adds a line of JSON per choice to --results. A recipe that has its lines there is not measured again; if all have, as in the
repository, only the table is printed: --results mine.jsonl measures anew. The ratio networks go to
runs/exercises/verifier/DATA-SEED, for `sample.py --ratio`.
"""

import argparse
import copy
import functools
import itertools
import json
import statistics
import sys
from pathlib import Path

import scipy.optimize
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "exercises")]
from machinery import checkpoints  # noqa: E402
from machinery import data  # noqa: E402
import fid  # noqa: E402
from machinery import files  # noqa: E402
import measure  # noqa: E402
import networks  # noqa: E402
from machinery import training  # noqa: E402
import sample  # noqa: E402
import train_diffratio  # noqa: E402
from machinery.files import UserError  # noqa: E402

# ---------------------------------------------------------------------------------------------------------
# All settings.

CANDIDATES = (1, 2, 4, 8, 16)
CHECKED = 4  # K for which KID, precision and recall are taken too
SIGMAS = (0.1, 0.2, 0.5, 1.0)  # noise levels at which the ratio is read
DATA = {  # images that are measured; of training on: samples to learn from, steps; images over which averages forget a half;
    # the stage-1 network of the second view
    "digits": dict(samples=1797, pool=8192, steps=600, halflife=5000, pretrained="runs/digits/pretrain/network.pt"),
    "fashion-mnist": dict(samples=2000, pool=20_000, steps=1500, halflife=20_000,
                          pretrained=str(ROOT / "assets" / "fashion-mnist-stage1.pt")),
}  # fmt: skip
BATCH, LR = 128, 3e-4  # of training on
CHECKS, CHECK_IMAGES = 20, 1000  # how often the loss on the tenth for stopping is taken, and of how many noised images a side
PENALTY = 1.0  # weight of R1, |sigma grad h|^2 on noised data: how much h changes over one standard deviation of the noise
RECIPES = {  # name: (ratio network, noise draws over which h is averaged, temperature fitted on held-out data)
    "blind": ("blind", 1, False),
    "as trained": ("trained", 1, False),
    "trained on": ("last", 1, False),
    "stopped early": ("best", 1, False),  # each that follows adds something to it
    "4 noise draws": ("best", 4, False),
    "averaged weights": ("average", 1, False),
    "input-gradient penalty": ("r1", 1, False),
    "temperature": ("best", 1, True),
    "all together": ("r1-average", 4, True),
}
CPU = training.Runtime(torch.device("cpu"))

# ---------------------------------------------------------------------------------------------------------
# Choosing as sample.choose does, from candidates that are drawn once.


@torch.no_grad()
def draw_candidates(net, indices, seed, count):
    """Candidates [n, count, C, H, W] in [-1, 1] of the images with these indices: those that `sample.choose` draws."""
    parts = [indices[i:i + 500] for i in range(0, len(indices), 500)]
    columns = [[sample.generate(net, sample.inputs(net.config, p, seed, "cpu", candidate=k)[0]) for p in parts] for k in range(count)]
    return torch.stack([torch.cat(column) for column in columns], dim=1)


@torch.no_grad()
def logits(ratio, images, sigma, seed, draws):
    """h [draws, n, K] of images [n, K, C, H, W]; the noise of the first draw is that of `sample.choose`."""

    def column(k, draw):
        eps = sample.inputs(ratio.config, range(len(images)), seed, "cpu", candidate=-1 - k - 1000 * draw)[0]
        return torch.cat([ratio(x, torch.full((len(x),), sigma)) for x in (images[:, k] + sigma * eps).split(500)])

    return torch.stack([torch.stack([column(k, draw) for k in range(images.shape[1])], dim=1) for draw in range(draws)])


# ---------------------------------------------------------------------------------------------------------
# The ratio network, trained on against the frozen generator.


def train_on(ratio, train, stop, steps, halflife, settings, seed, penalty=0.0):
    """{"last", "best", "average": ratio networks} from `ratio`, trained on further. "best" and "average" (of the weights) are
    those of the lowest loss on `stop`. train, stop: pairs (data, samples) of images [n, C, H, W].
    """
    ratio = copy.deepcopy(ratio).train().requires_grad_(True)
    average = copy.deepcopy(ratio).eval().requires_grad_(False)
    learner, kept, curve = training.Learner(ratio, CPU, LR, (0.0, 0.999), BATCH), {}, []

    def batch(pair, n, *key):
        draw = training.Draw(CPU, n, seed, *key)
        real, fake = (images[(draw.uniform() * len(images)).long()] for images in pair)
        return real, fake, train_diffratio.noise_levels(settings, draw), *(draw.normal(*real.shape[1:]) for _ in range(2))

    def loss(real, fake, sigma, eps_real, eps_fake):
        each, h_real, _ = train_diffratio.ratio_loss(ratio, real.requires_grad_(), fake, sigma, eps_real, eps_fake)
        if not penalty:
            return each
        slope = torch.autograd.grad(h_real.sum(), real, create_graph=True)[0].flatten(1)
        return each + penalty / 2 * (sigma[:, None] * slope).square().sum(dim=1)

    for step in range(1, steps + 1):
        learner.step(LR, loss, *batch(train, BATCH, step, "verifier"))
        networks.update_ema(average, ratio, BATCH, halflife, step * BATCH)
        if step % max(steps // CHECKS, 1) == 0:
            for name, net in (("best", ratio), ("average", average)):
                with torch.no_grad():  # the same images and the same noise each time
                    value = train_diffratio.ratio_loss(net, *batch(stop, CHECK_IMAGES, "stop"))[0].mean().item()
                curve.append(value)
                if name not in kept or value < kept[name][0]:
                    kept[name] = (value, copy.deepcopy(net))
    print(f"trained on, penalty {penalty:g}: held-out loss (blind: 0.6931) at each check, and of the averaged weights:")
    print(*(" ".join(f"{value:.4f}" for value in curve[i::2]) for i in range(2)), sep="\n", flush=True)
    return {"last": ratio, "best": kept["best"][1], "average": kept["average"][1]}


def networks_of(args, seed):
    """(path of the generator, path of its ratio network) of a seed."""
    return [path.replace("{data}", args.data).replace("{seed}", str(seed)) for path in (args.network, args.ratio)]


def settings_of(args, seed):
    """{name: value} of what decides the lines of a seed; networks by the content of their files."""
    result = {name: getattr(args, name) for name in ("samples", "pool", "steps")}
    for name, path in zip(("network", "ratio"), networks_of(args, seed)):
        with files.reading(path, "a network"):
            result[name] = files.file_hash(path)[:16]
    return result


def ratio_networks(args, seed, settings, ratio, train, stop):
    """{name: ratio network trained on}; an earlier call has left them in the folder of this data and seed, or they are trained now.

    settings: `settings_of` this seed.
    """
    folder, names = Path(args.outdir) / f"{args.data}-{seed}", ("last", "best", "average", "r1", "r1-average")
    about = {"data": args.data, "seed": seed, **settings}
    del about["samples"]  # they are judged, not learned from
    if (folder / f"{names[-1]}.pt").exists():  # the last that is written
        found = checkpoints.load_network(folder / f"{names[-1]}.pt", role="ratio").about
        if {key: found.get(key) for key in about} != about:
            raise UserError(f"{folder} holds ratio networks of another generator or of other settings; give another --outdir")
    else:
        preset = argparse.Namespace(**train_diffratio.PRESETS[args.data])
        common = (ratio, train, stop, args.steps, DATA[args.data]["halflife"], preset, seed)
        made, penalised = train_on(*common), train_on(*common, PENALTY)
        made |= {"r1": penalised["best"], "r1-average": penalised["average"]}
        for name in names:
            checkpoints.save_network(folder / f"{name}.pt", made[name], role="ratio", **about)
    return {name: checkpoints.load_network(folder / f"{name}.pt", role="ratio") for name in names}


def temperature(h_real, h_fake):
    """The factor a of the lowest cross-entropy of a h: below 1 where the ratio network is too sure of itself."""
    real, fake = h_real.double(), h_fake.double()
    return scipy.optimize.minimize_scalar(lambda a: (F.softplus(-a * real).mean() + F.softplus(a * fake).mean()).item(),
                                          bounds=(0, 3), method="bounded").x  # fmt: skip


def calibration(h_real, h_fake, bins=10):
    """How far the logits [n] of data and [m] of samples, both new, are probabilities: {measure: number}.

    calibration_error: mean distance of predicted probability and frequency over `bins` bins, data and samples with a half of
    the weight each. mean_ratio: E_q[exp h], which is 1 for the exact ratio. loss: cross-entropy, ln 2 if blind.
    """
    h = torch.cat([h_real, h_fake]).double()
    real = torch.cat([torch.ones(len(h_real)), torch.zeros(len(h_fake))]).double()
    weight = torch.where(real > 0, 0.5 / len(h_real), 0.5 / len(h_fake)).double()
    p = h.sigmoid()
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, (p * bins).long().clamp(max=bins - 1), weight * (p - real))
    loss = (weight * F.softplus(torch.where(real > 0, -h, h))).sum()
    return {"calibration_error": gaps.abs().sum().item(), "mean_ratio": h_fake.double().exp().mean().item(), "loss": loss.item()}


# ---------------------------------------------------------------------------------------------------------
# Measuring.


def weighted(features, weights, tag):
    """Mean and covariance of features [m, d] with weights [m] that sum to one, as the `Statistics` of a distance."""
    x, w = features.double(), weights.double()
    mean = w @ x
    return fid.Statistics(mean.numpy(), ((x - mean).T * w @ (x - mean)).numpy(), tag, len(x))


def on_average(measures, features, weights):
    """{measure: number} of all candidates [n, K], each with its weight: what resampling gives without the chance of the choice."""
    result = {}
    for view, each in features.items():
        held, tag = measures.held[view], measures.views[view].tag
        ours = weighted(each[:, :weights.shape[1]].flatten(0, 1), weights.flatten() / len(weights), tag)
        result[f"average_{view}"] = fid.frechet_distance(ours, weighted(held, torch.full((len(held),), 1 / len(held)), tag))
    return result


def worth(measures, features, nearest, held_out, more):
    """The measures of images from their features {view: [n, d]} and distances to the nearest training images [m]."""
    result = {"nearest": nearest.median().item()}
    for view, ours in features.items():
        result[f"fd_{view}"] = measures.distance(view, ours)
        if held_out:  # data that no ratio network was trained on
            result[f"fd_held_out_{view}"] = measures.distance(view, ours, held_out[view])
        if more:
            result[f"kid_{view}"] = fid.kernel_distance(measures.held[view], ours, subsets=4)[0]
            result[f"precision_{view}"], result[f"recall_{view}"] = fid.precision_recall(measures.held[view], ours)
    return result


def sweep(args, seed, settings, recipes):
    """Yield the lines of each of `recipes`: at each noise level, for each K, resampled and best."""
    path, ratio_path = networks_of(args, seed)
    net = checkpoints.load_network(path, role="generator")
    ratio = sample.load_ratio(ratio_path, net, path)
    if net.config.label_dim:
        raise UserError(f"{path}: conditional on classes; this exercise takes unconditional networks")
    dataset = data.load(args.data)
    if (net.config.img_resolution, net.config.img_channels) != (dataset.resolution, dataset.channels):
        raise UserError(f"{path}: a generator of other images than those of {args.data}; --data names what it was trained on")
    order = torch.randperm(len(dataset), generator=training.rng("cpu", seed, "split")).numpy()
    train, stop, judged = (order[len(order) * a // 10:len(order) * b // 10] for a, b in ((0, 8), (8, 9), (9, 10)))
    measures = measure.Measures(args.data, args.pretrained)
    held_out = {view: measures.features(view, dataset.images[judged]) for view in measures.views if not measures.has_test}
    parts = ((dataset, train), (dataset, stop), (measures.reference, torch.arange(2000).numpy() if measures.has_test else judged))
    real = [source.to_model(source.batch(part)[0], "cpu") for source, part in parts]
    pool = range(10**6, 10**6 + args.pool)
    learn, stop_early = pool[:args.pool * 9 // 10], pool[args.pool * 9 // 10:]
    fake_stop = draw_candidates(net, stop_early, seed, 1)[:, 0]
    nets = {"blind": networks.RatioNetwork(ratio.config).eval(), "trained": ratio}  # the head of the first is still zero
    if {RECIPES[recipe][0] for recipe in recipes} - nets.keys():
        fake = draw_candidates(net, learn, seed, 1)[:, 0]
        nets |= ratio_networks(args, seed, settings, ratio, (real[0], fake), (real[1], fake_stop))
    candidates, rows = draw_candidates(net, range(args.samples), seed, max(CANDIDATES)), torch.arange(args.samples)
    columns = [data.to_uint8(candidates[:, k]) for k in range(max(CANDIDATES))]
    features = {view: torch.stack([measures.features(view, x) for x in columns], dim=1) for view in measures.views}
    nearest = torch.stack([measures.nearest(x) for x in columns], dim=1)
    plain = worth(measures, {view: each[:, 0] for view, each in features.items()}, nearest[:, 0], held_out, more=True)

    @functools.cache
    def judged_by(name, sigma):
        """h [draws, n, K] of the candidates, and [draws, m] of the data for stopping, the data for judging and new samples."""
        draws = max(recipe[1] for recipe in RECIPES.values() if recipe[0] == name)
        h = logits(nets[name], candidates, sigma, seed, draws)
        return h, *(logits(nets[name], x[:2000, None], sigma, (seed, i), draws)[..., 0] for i, x in enumerate((*real[1:], fake_stop)))

    for recipe in recipes:
        (name, draws, fitted), lines = RECIPES[recipe], []
        for sigma in SIGMAS:
            h, h_stop, h_judged, h_fake = (each[:draws].mean(dim=0) for each in judged_by(name, sigma))
            factor = temperature(h_stop, h_fake) if fitted else 1.0
            shared = {"data": args.data, **settings, "seed": seed, "recipe": recipe, "sigma": sigma, "factor": factor,
                      **calibration(factor * h_judged, factor * h[:, 0])}  # fmt: skip
            lines.append({**shared, "k": 1, "best": False, "ess": 1.0, **plain})
            for k, best in itertools.product(CANDIDATES[1:], (False, True)):
                chosen, size = sample.pick(factor * h[:, :k], range(len(h)), seed, best)
                kept = {view: each[rows, chosen] for view, each in features.items()}
                near = nearest[rows[:len(nearest)], chosen[:len(nearest)]]
                found = worth(measures, kept, near, held_out, more=k == CHECKED and not best)
                if not best:
                    found |= on_average(measures, features, (factor * h[:, :k]).softmax(dim=1))
                lines.append({**shared, "k": k, "best": best, "ess": size.mean().item(), **found})
        yield lines


def table(rows):
    """What the choices are worth, in Markdown: mean and standard deviation over the seeds; then which of them win."""
    cells, last, views = {}, CANDIDATES[-1], ("classifier", "stage1")
    for row in rows:
        cells.setdefault((row["recipe"], row["sigma"], row["k"], row["best"]), {})[row["seed"]] = row

    def moments(name, cell):
        values = [row[name] for row in cells[cell].values()]
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0

    def wins(cell):
        pairs = [(moments(f"fd_{view}", cell), moments(f"fd_{view}", (*cell[:2], 1, False))) for view in views]
        return all(ours[0] + ours[1] < plain[0] - plain[1] for ours, plain in pairs)

    def gains(cell):
        blind, names = cells.get(("blind", *cell[1:]), {}), [f"average_{view}" for view in views if cell[2] > 1 and not cell[3]]
        return names and all(seed in blind and row[name] < blind[seed][name] for seed, row in cells[cell].items() for name in names)

    columns = [(f"K = {k}", "fd_classifier", k, False) for k in CANDIDATES] + [(f"best of {last}", "fd_classifier", last, True)]
    columns += [(f"stage 1, K = {k}", "fd_stage1", k, False) for k in CANDIDATES[::2]]
    columns += [(f"{view}, average of K = {last}", f"average_{view}", last, False) for view in views]
    columns += [(f"effective of {last}", "ess", last, False)]
    columns += [(name.replace("_", " "), name, 1, False) for name in ("calibration_error", "mean_ratio", "loss")]
    lines = ["| recipe | sigma | " + " | ".join(column[0] for column in columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for key in dict.fromkeys(cell[:2] for cell in cells):
        shown = ["{:.4g} ± {:.2g}".format(*moments(name, (*key, k, best))) for _, name, k, best in columns]
        lines.append(f"| {key[0]} | {key[1]} | {' | '.join(shown)} |")
    for text, holds in (("below K = 1 by more than the spread of both, in both views", wins),
                        ("on average below the blind choice of as many, in each seed and both views", gains)):  # fmt: skip
        found = [f"{cell[0]} at {cell[1]}, {'best of' if cell[3] else 'K ='} {cell[2]}" for cell in cells if holds(cell)]
        lines.append(f"\n{text}: {'; '.join(found) or 'none'}")
    return "\n".join(lines)


def main():
    parser = training.Parser(__doc__)
    add = parser.add_argument
    add("--data", choices=list(DATA), default="digits", help="what the generator was trained on")
    add("--network", default=str(ROOT / "assets" / "{data}.pt"), metavar="PATH", help="the generator; {data} and {seed} are replaced")
    add("--ratio", default=str(ROOT / "assets" / "{data}-ratio.pt"), metavar="PATH", help="its ratio network, in the same way")
    add("--pretrained", metavar="PATH", help="stage-1 network of the second view (default: that of `make demo`, or of assets/)")
    add("--seeds", type=training.positive(int), default=1, metavar="N", help="how many")
    add("--first-seed", type=int, default=0, metavar="S", help="the first of them; new seeds confirm what others suggest")
    for name in ("samples", "pool", "steps"):
        add(f"--{name}", type=training.positive(int), metavar="N", help=f"(default: {DATA['digits'][name]} or {DATA['fashion-mnist'][name]})")
    add("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES), metavar="NAME", help="which to measure: %(choices)s (default: all)")
    add("--outdir", default="runs/exercises/verifier", metavar="DIR", help="for the ratio networks")
    add("--results", default=str(ROOT / "exercises" / "results" / "verifier.jsonl"), metavar="PATH", help="JSON lines to add to")
    args = parser.parse_args()
    for name in ("samples", "pool", "steps", "pretrained"):
        setattr(args, name, getattr(args, name) or DATA[args.data][name])
    if args.pool < 10 or args.samples < 4:
        raise UserError("--pool and --samples: too few; a tenth of the one decides when to stop, and a covariance needs 4 of the other")
    path, seeds = Path(args.results), range(args.first_seed, args.first_seed + args.seeds)
    wanted = {seed: settings_of(args, seed) for seed in seeds}
    path.parent.mkdir(parents=True, exist_ok=True)

    def measured():
        rows = [row for row in files.json_lines(path, "data", "seed", "recipe") if row["data"] == args.data and row["seed"] in seeds]
        if any(row.get(name) != value for row in rows for name, value in wanted[row["seed"]].items()):
            raise UserError(f"{path} holds lines of other networks or settings; give another --results")
        return rows

    for seed in seeds:
        done = {row["recipe"] for row in measured() if row["seed"] == seed}
        left = [recipe for recipe in args.recipes if recipe not in done]
        for lines in sweep(args, seed, wanted[seed], left) if left else ():
            with open(path, "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            print(f"seed {seed}: {lines[0]['recipe']}", flush=True)
    print(table(measured()))


if __name__ == "__main__":
    training.run(main)
