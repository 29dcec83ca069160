"""A verifier for free? Draw K candidates per image, let the ratio network choose, measure what that is worth.

`sample.py --candidates K` keeps candidate k with probability proportional to exp(h_k). Here 16 candidates of each image are
drawn once, with the random numbers of sample.py. Each of RECIPES chooses among the first K of them at each noise level: the
ratio network of the training, the same trained on against the frozen averaged generator, and a blind choice (h = 0) with the
same random numbers. Each seed splits the data: 80 % to train on, a tenth to decide when to stop, a tenth to judge (of
Fashion-MNIST the test set judges). The generator of the digits has seen all of them.

    python exercises/verifier.py --seeds 3                   the digits, with the networks of assets/ and runs/digits/pretrain
    python exercises/verifier.py --network "mine/{seed}/network.pt" --ratio "mine/{seed}/ratio.pt" --results mine.jsonl
    python exercises/verifier.py --data fashion-mnist --seeds 3 --recipes blind "as trained"      without any training

Adds a line of JSON per noise level and K to --results. A recipe that has its lines there is not measured again; in the file
of the repository all have, so without --results only the table is printed. Ratio networks go to OUTDIR/DATA-SEED.
"""

import argparse
import copy
import functools
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "exercises")]
import fid  # noqa: E402
import measure  # noqa: E402
import networks  # noqa: E402
import sample  # noqa: E402
import train_diffratio  # noqa: E402
from machinery import checkpoints, data, files, training  # noqa: E402
from machinery.files import UserError  # noqa: E402

CANDIDATES = (1, 2, 4, 8, 16)
SIGMAS = (0.1, 0.2, 0.5, 1.0)  # noise levels at which the ratio is read
DATA = {  # images that are measured; of training on: samples to learn from, steps, half-life of the average in images;
    # stage-1 network for FD (stage 1)
    "digits": dict(samples=1797, pool=8192, steps=600, halflife=5000, pretrained="runs/digits/pretrain/network.pt"),
    "fashion-mnist": dict(samples=2000, pool=20_000, steps=1500, halflife=20_000,
                          pretrained=str(ROOT / "assets" / "fashion-mnist-stage1.pt")),
}
LR, BATCH = 3e-4, 128  # of training on
CHECKS, CHECK_IMAGES = 20, 1000  # how often the loss on the tenth for stopping is taken, and of how many noised images a side
RECIPES = {"blind": "blind", "as trained": "trained", "trained on": "last", "stopped early": "best", "averaged weights": "average"}

@torch.no_grad()
def draw_candidates(net, indices, seed, count):
    """Candidates [n, count, C, H, W] in [-1, 1] of the images with these indices: those that `sample.choose` draws."""
    parts = [indices[i : i + 500] for i in range(0, len(indices), 500)]
    columns = [[sample.generate(net, sample.inputs(net, p, seed, "cpu", candidate=k)[0]) for p in parts] for k in range(count)]
    return torch.stack([torch.cat(column) for column in columns], dim=1)


@torch.no_grad()
def logits(ratio, images, sigma, seed):
    """h [n, K] of images [n, K, C, H, W], with the noise of `sample.choose`."""
    columns = []
    for k in range(images.shape[1]):
        eps = sample.inputs(ratio, range(len(images)), seed, "cpu", candidate=-1 - k)[0]
        columns.append([ratio(x, torch.full((len(x),), sigma)) for x in (images[:, k] + sigma * eps).split(500)])
    return torch.stack([torch.cat(column) for column in columns], dim=1)


# ---- The ratio network, trained on against the frozen generator --------------------------------------


def train_on(ratio, train, stop, steps, halflife, settings, seed):
    """Train `ratio` further: {"last", "best", "average": ratio networks}.

    train, stop: pairs (data, samples) of images [n, C, H, W]. "best" and "average" (of the weights) are those of the lowest
    loss on `stop`.
    """
    ratio = copy.deepcopy(ratio).train().requires_grad_(True)
    average = copy.deepcopy(ratio).eval().requires_grad_(False)
    learn, check = (training.Runtime(torch.device("cpu"), batch=n) for n in (BATCH, CHECK_IMAGES))
    optimizer, kept = training.Optimizer(ratio, learn, (0.0, 0.999)), {}

    def batch(pair, rt, *key):
        rt.seed(seed, *key)
        real, fake = (images[(rt.rand() * len(images)).long()] for images in pair)
        return real, fake, train_diffratio.noise_levels(settings, rt), rt.randn(*real.shape[1:]), rt.randn(*real.shape[1:])

    for step in range(1, steps + 1):
        optimizer.step(LR, functools.partial(train_diffratio.ratio_loss, ratio), *batch(train, learn, step, "verifier"))
        networks.update_ema(average, ratio, BATCH, halflife, step * BATCH)
        if step % max(steps // CHECKS, 1) == 0:
            for name, net in (("best", ratio), ("average", average)):
                with torch.no_grad():  # the same images and the same noise each time
                    loss = train_diffratio.ratio_loss(net, *batch(stop, check, "stop"))[0].mean().item()
                if name not in kept or loss < kept[name][0]:
                    kept[name] = loss, copy.deepcopy(net)
                print(f"step {step}, {name}: held-out loss {loss:.4f} (blind: 0.6931)", flush=True)
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
    """{name: ratio network trained on}, from the folder of this data and seed, or trained now. settings: `settings_of`."""
    folder, names = Path(args.outdir) / f"{args.data}-{seed}", ("last", "best", "average")
    about = {"data": args.data, "seed": seed, **settings}
    del about["samples"]  # they are judged, not learned from
    if (folder / f"{names[-1]}.pt").exists():  # the last that is written
        found = checkpoints.load_network(folder / f"{names[-1]}.pt", role="ratio").about
        if {key: found.get(key) for key in about} != about:
            raise UserError(f"{folder} holds ratio networks of another generator or of other settings; give another --outdir")
    else:
        defaults = {name: setting[0] for name, setting in train_diffratio.SETTINGS.items()}
        noise = argparse.Namespace(**defaults | train_diffratio.PRESETS[args.data])
        made = train_on(ratio, train, stop, args.steps, DATA[args.data]["halflife"], noise, seed)
        for name in names:
            checkpoints.save_network(folder / f"{name}.pt", made[name], role="ratio", **about)
    return {name: checkpoints.load_network(folder / f"{name}.pt", role="ratio") for name in names}


def calibration(h_real, h_fake, bins=10):
    """How far the logits [n] of data and [m] of samples, both new, are probabilities: {measure: number}.

    calibration_error: mean distance of predicted probability and frequency over `bins` bins; data and samples weigh a half
    each. mean_ratio: E_q[exp h], which is 1 for the exact ratio. loss: cross-entropy, ln 2 if blind.
    """
    h = torch.cat([h_real, h_fake]).double()
    real = torch.cat([torch.ones(len(h_real)), torch.zeros(len(h_fake))]).double()
    weight = torch.where(real > 0, 0.5 / len(h_real), 0.5 / len(h_fake)).double()
    p = h.sigmoid()
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, (p * bins).long().clamp(max=bins - 1), weight * (p - real))
    loss = (weight * F.softplus(torch.where(real > 0, -h, h))).sum()
    return {"calibration_error": gaps.abs().sum().item(), "mean_ratio": h_fake.double().exp().mean().item(), "loss": loss.item()}


def weighted(features, weights, tag):
    """Mean and covariance of features [m, d] with weights [m] that sum to one, as the `Statistics` of a distance."""
    x, w = features.double(), weights.double()
    mean = w @ x
    return fid.Statistics(mean.numpy(), ((x - mean).T * w @ (x - mean)).numpy(), tag, len(x))


def worth(measures, features, nearest, chosen, weights):
    """{measure: number} of the candidates `chosen` [n], and of all K with their `weights` [n, K], without the chance of a choice.

    features: {view: [n, 16, d]} of all candidates, nearest [m, 16]: their distances to the nearest training image.
    """
    rows, result = torch.arange(len(chosen)), {}
    result["nearest"] = nearest[rows[: len(nearest)], chosen[: len(nearest)]].median().item()
    for view, each in features.items():
        held, tag = measures.held[view], measures.views[view].tag
        result[f"fd_{view}"] = measures.distance(view, each[rows, chosen])
        ours = weighted(each[:, : weights.shape[1]].flatten(0, 1), weights.flatten() / len(weights), tag)
        result[f"average_{view}"] = fid.frechet_distance(ours, weighted(held, torch.full((len(held),), 1 / len(held)), tag))
    return result


def sweep(args, seed, settings, recipes):
    """Yield the lines of each of `recipes`: at each noise level, for each K."""
    path, ratio_path = networks_of(args, seed)
    net = checkpoints.load_network(path, role="generator")
    ratio = sample.load_ratio(ratio_path, net, path)
    if net.config.label_dim:
        raise UserError(f"{path}: conditional on classes; this exercise takes unconditional networks")
    dataset = data.load(args.data)
    if (net.config.img_resolution, net.config.img_channels) != (dataset.resolution, dataset.channels):
        raise UserError(f"{path}: a generator of other images than those of {args.data}; --data names what it was trained on")
    measures = measure.Measures(args.data, args.pretrained)
    order = torch.randperm(len(dataset), generator=training.rng("cpu", seed, "split")).numpy()
    train, stop, judged = (order[len(order) * a // 10 : len(order) * b // 10] for a, b in ((0, 8), (8, 9), (9, 10)))
    judges = (measures.reference, range(2000)) if measures.has_test else (dataset, judged[:2000])
    real = [source.to_model(source.batch(part)[0], "cpu") for source, part in ((dataset, train), (dataset, stop), judges)]
    nets = {"blind": networks.RatioNetwork(ratio.config).eval(), "trained": ratio}  # the head of the first is still zero
    if {RECIPES[recipe] for recipe in recipes} - nets.keys():
        fake = draw_candidates(net, range(10**6, 10**6 + args.pool), seed, 1)[:, 0]
        split = args.pool * 9 // 10
        nets |= ratio_networks(args, seed, settings, ratio, (real[0], fake[:split]), (real[1], fake[split:]))

    candidates = draw_candidates(net, range(args.samples), seed, max(CANDIDATES))
    columns = [data.to_uint8(candidates[:, k]) for k in range(max(CANDIDATES))]
    features = {view: torch.stack([measures.features(view, x) for x in columns], dim=1) for view in measures.views}
    nearest = torch.stack([measures.nearest(x) for x in columns], dim=1)
    for recipe in recipes:
        lines = []
        for sigma in SIGMAS:
            h = logits(nets[RECIPES[recipe]], candidates, sigma, seed)
            h_real = logits(nets[RECIPES[recipe]], real[2][:, None], sigma, (seed, 1))[:, 0]
            shared = {"data": args.data, **settings, "seed": seed, "recipe": recipe, "sigma": sigma, **calibration(h_real, h[:, 0])}
            for k in CANDIDATES:
                chosen, size = sample.pick(h[:, :k], range(len(h)), seed)
                found = worth(measures, features, nearest, chosen, h[:, :k].softmax(dim=1))
                lines.append({**shared, "k": k, "ess": size.mean().item(), **found})
        yield lines


def table(rows):
    """What the choices are worth, in Markdown: mean and standard deviation over the seeds."""
    cells, last = {}, CANDIDATES[-1]
    for row in rows:
        if not row.get("best"):  # an earlier version also kept the largest h
            cells.setdefault(f"{row['recipe']}, at {row['sigma']}", {}).setdefault(row["seed"], {})[row["k"]] = row
    columns = {f"FD (classifier), K = {k}": (lambda r, k=k: r[k]["fd_classifier"], "{:.1f}") for k in CANDIDATES}
    columns |= {"mean over choices": (lambda r: r[last]["average_classifier"], "{:.1f}")}
    columns |= {f"FD (stage 1), K = {k}": (lambda r, k=k: r[k]["fd_stage1"], "{:.5f}") for k in (1, last)}
    columns |= {"FD (stage 1), mean over choices": (lambda r: r[last]["average_stage1"], "{:.5f}"),
                f"effective of {last}": (lambda r: r[last]["ess"], "{:.1f}"), "cross-entropy": (lambda r: r[1]["loss"], "{:.3f}")}
    return measure.table({name: list(seeds.values()) for name, seeds in cells.items()}, columns)


def main():
    parser = training.Parser(__doc__, dict(
        data=("digits", "what the generator was trained on", list(DATA)),
        network=(str(ROOT / "assets" / "{data}.pt"), "the generator; {data} and {seed} are replaced"),
        ratio=(str(ROOT / "assets" / "{data}-ratio.pt"), "its ratio network, in the same way"),
        pretrained=(None, "stage-1 network for FD (stage 1) (default: that of `make demo`, or of assets/)", str),
        seeds=(1, "seeds 0 to N - 1"),
        samples=(None, "images that are measured (default: that of the data)", training.number("4 or more", int, 4)),
        pool=(None, "samples to train on (default: that of the data)", training.number("10 or more", int, 10)),
        steps=(None, "steps of training on (default: that of the data)", int),
        outdir=("runs/exercises/verifier", "for the ratio networks"),
        results=(str(ROOT / "exercises" / "results" / "verifier.jsonl"), "JSON lines to add to")))
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES), metavar="NAME", help="%(choices)s")
    args = parser.parse_args()
    for name in ("samples", "pool", "steps", "pretrained"):
        setattr(args, name, getattr(args, name) or DATA[args.data][name])
    path, seeds = Path(args.results), range(args.seeds)
    wanted = {seed: settings_of(args, seed) for seed in seeds}
    path.parent.mkdir(parents=True, exist_ok=True)

    def measured():
        rows = [row for row in measure.json_lines(path, "data", "seed", "recipe") if row["data"] == args.data and row["seed"] in seeds]
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
