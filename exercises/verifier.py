"""A verifier for free? Draw K candidates per image, let the ratio network choose, measure what that is worth.

16 candidates of each image are drawn once, as sample.py draws them. Each of RECIPES chooses among the first K at each noise
level: a blind choice (h = 0), the ratio network of the training, and the same trained on against the frozen averaged generator,
with 80 % of the data. A last tenth judges (of Fashion-MNIST the test set). The generator of the digits has seen all of them.

    python exercises/verifier.py --seeds 3                   the digits, with the networks of assets/
    python exercises/verifier.py --network "mine/{seed}/network.pt" --ratio "mine/{seed}/ratio.pt" --results mine.jsonl
    python exercises/verifier.py --data fashion-mnist --seeds 3 --recipes blind "as trained"      without any training

A recipe that has its lines of JSON in --results is not measured again: without --results none is.
"""

import argparse
import copy

import torch
import torch.nn.functional as F

from project import HERE, ROOT
import fid
import measure
import networks
import sample
import train_diffratio
from machinery import checkpoints, data, files, training
from machinery.files import UserError

CANDIDATES = (1, 2, 4, 8, 16)
SIGMAS = (0.1, 0.2, 0.5, 1.0)  # noise levels at which the ratio is read
ASSETS = ROOT / "assets"
DATA = {  # images that are measured; of training on: samples to learn from, steps
    "digits": dict(samples=1797, pool=7372, steps=600),
    "fashion-mnist": dict(samples=2000, pool=18_000, steps=1500),
}
RECIPES = ("blind", "as trained", "trained on")


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


def train_on(ratio, real, fake, steps, settings, seed):
    """A copy of `ratio`, trained further to tell images `real` from samples `fake` [n, C, H, W] of a frozen generator."""
    ratio, shape = copy.deepcopy(ratio).train().requires_grad_(True), real.shape[1:]
    rt = training.Runtime("cpu", batch=128)
    optimizer = training.Optimizer(ratio, rt, (0.0, 0.999))
    for step in range(1, steps + 1):
        rt.seed(seed, step, "verifier")
        a, b = (images[(rt.rand() * len(images)).long()] for images in (real, fake))
        batch = a, b, train_diffratio.noise_levels(settings, rt), rt.randn(*shape), rt.randn(*shape)
        optimizer.step(3e-4, lambda *tensors: train_diffratio.ratio_loss(ratio, *tensors), *batch)
    return ratio.eval()


def calibration(h_real, h_fake, bins=10):
    """How far the logits [n] of data and [m] of samples, both new, are probabilities: {measure: number}.

    accuracy: how often they are right; 0.5 is blind. error: mean distance of predicted probability and frequency over `bins`
    bins. mean_ratio: E_q[exp h], 1 for the exact ratio. loss: cross-entropy, ln 2 if blind. Data and samples weigh a half each.
    """
    h = torch.cat([h_real, h_fake]).double()
    real = torch.arange(len(h)) < len(h_real)
    weight = torch.where(real, 0.5 / len(h_real), 0.5 / len(h_fake)).double()
    p = h.sigmoid()
    bin_of = (p * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins).double().index_add_(0, bin_of, weight * (p - real.double()))
    loss = weight * F.softplus(torch.where(real, -h, h))
    return {"accuracy": weight[(h > 0) == real].sum().item(), "error": gaps.abs().sum().item(),
            "mean_ratio": h_fake.double().exp().mean().item(), "loss": loss.sum().item()}


def weighted(features, weights, tag):
    """The `Statistics` of features [m, d] with weights [m]."""
    x, w = features.double(), weights.double() / weights.sum()
    return fid.Statistics((w @ x).numpy(), x.T.cov(correction=0, aweights=w).numpy(), tag, len(x))


def worth(measures, features, nearest, chosen, weights):
    """{measure: number} of the candidates `chosen` [n], and of all K with their `weights` [n, K].

    features: {view: [n, 16, d]} of all candidates, nearest [n, 16]: their distances to the nearest training image.
    """
    rows = torch.arange(len(chosen))
    result = {"nearest": nearest[rows, chosen].median().item()}
    for view, each in features.items():
        held, extractor = measures.held[view], measures.views[view]
        result[f"fd_{view}"] = measure.distance(extractor, each[rows, chosen], held)
        ours = weighted(each[:, : weights.shape[1]].flatten(0, 1), weights.flatten(), extractor.tag)
        theirs = weighted(held, torch.ones(len(held)), extractor.tag)
        result[f"average_{view}"] = fid.frechet_distance(ours, theirs)
    return result


def sweep(args, seed, path, ratio_path, shared, recipes):
    """Yield the lines of each of `recipes`, which begin with `shared`: at each noise level, for each K."""
    net = checkpoints.load_network(path, role="generator")
    ratio = sample.load_ratio(ratio_path, net, path)
    measures = measure.Measures(args.data, args.pretrained)
    dataset, own, config = measures.train, DATA[args.data], net.config
    if (config.img_resolution, config.img_channels, config.label_dim) != (dataset.resolution, dataset.channels, 0):
        raise UserError(f"{path}: a generator of other images than {args.data}, or with classes")
    order = torch.randperm(len(dataset), generator=training.rng("cpu", seed, "split")).numpy()
    train, judged = order[: len(order) * 8 // 10], order[len(order) * 9 // 10 :]
    judges = (measures.reference, range(2000)) if measures.has_test else (dataset, judged)
    known, new = (source.to_model(source.batch(part)[0], "cpu") for source, part in ((dataset, train), judges))
    nets = {"blind": networks.RatioNetwork(ratio.config).eval(), "as trained": ratio}  # the head of the first is still zero
    if "trained on" in recipes:
        defaults = {name: setting[0] for name, setting in train_diffratio.SETTINGS.items()}
        noise = argparse.Namespace(**defaults | train_diffratio.PRESETS[args.data])
        fake = draw_candidates(net, range(10**6, 10**6 + own["pool"]), seed, 1)[:, 0]
        nets["trained on"] = train_on(ratio, known, fake, own["steps"], noise, seed)

    candidates = draw_candidates(net, range(own["samples"]), seed, max(CANDIDATES))
    columns = [data.to_uint8(x) for x in candidates.unbind(dim=1)]
    found = [measures.features(x) for x in columns]
    features = {view: torch.stack([each[view] for each in found], dim=1) for view in measures.views}
    nearest = torch.stack([measures.nearest(x) for x in columns], dim=1)
    for recipe in recipes:
        lines = []
        for sigma in SIGMAS:
            h = logits(nets[recipe], candidates, sigma, seed)
            h_new = logits(nets[recipe], new[:, None], sigma, (seed, 1))[:, 0]
            at = {**shared, "recipe": recipe, "sigma": sigma, **calibration(h_new, h[:, 0])}
            for k in CANDIDATES:
                chosen, size = sample.pick(h[:, :k], range(len(h)), seed)
                found = worth(measures, features, nearest, chosen, h[:, :k].softmax(dim=1))
                lines.append({**at, "k": k, "ess": size.mean().item(), **found})
        yield lines


def table(rows):
    """What the choices are worth, in Markdown: mean and standard deviation over the seeds."""
    cells, last = {}, CANDIDATES[-1]
    for row in rows:
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
        network=(f"{ASSETS}/{{data}}.pt", "the generator; {data} and {seed} are replaced"),
        ratio=(f"{ASSETS}/{{data}}-ratio.pt", "its ratio network, in the same way"),
        pretrained=(f"{ASSETS}/{{data}}-stage1.pt", "stage-1 network for FD (stage 1)"),
        seeds=(1, "seeds 0 to N - 1"),
        results=(str(HERE / "results" / "verifier.jsonl"), "JSON lines to add to")))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES, metavar="NAME", help="%(choices)s")
    args = parser.parse_args()
    args.pretrained = args.pretrained.replace("{data}", args.data)
    for seed in range(args.seeds):
        paths = [path.replace("{data}", args.data).replace("{seed}", str(seed)) for path in (args.network, args.ratio)]
        shared = {"data": args.data, "samples": DATA[args.data]["samples"], "seed": seed}
        for name, path in zip(("network", "ratio"), paths):
            with files.reading(path, "a network"):
                shared[name] = files.file_hash(path)[:16]
        rows = [row for row in measured(args) if row["seed"] == seed]
        if any(row.get(name) != value for row in rows for name, value in shared.items()):
            raise UserError(f"{args.results} holds lines of other networks or settings; give another --results")
        left = [recipe for recipe in args.recipes if recipe not in {row["recipe"] for row in rows}]
        for lines in sweep(args, seed, *paths, shared, left) if left else ():
            measure.add_lines(args.results, *lines)
            print(f"seed {seed}: {lines[0]['recipe']}", flush=True)
    print(table(measured(args)))


def measured(args):
    """The lines of this data and these seeds."""
    rows = measure.json_lines(args.results, "data", "seed", "recipe")
    return [row for row in rows if row["data"] == args.data and row["seed"] < args.seeds]


if __name__ == "__main__":
    training.run(main)
