"""All measures of a set of samples, against images that were held out where there are such.

Reads files of samples (`sample.py --out samples.npz`), prints a table: Fréchet distance (FD), KID, precision and recall in the
features of a stage-1 network and of a classifier of the labels, the distance to the nearest training image, shares of classes.
The reference is the test set of Fashion-MNIST or CIFAR-10; for other data it is the data itself. The first row compares the
data with it. Compare distances of equal numbers of images only. None is an FID, which needs Inception's features (fid.py).

    python exercises/measure.py digits --pretrained runs/digits/pretrain/network.pt "x=digits.npz"
    python exercises/measure.py fashion-mnist "one step=seed-0.npz" "one step=seed-1.npz"     mean and deviation of two seeds
"""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import project  # noqa: F401
import fid
import sample
from machinery import data, files, training

VERSION = 3  # of the classifier's cached weights; raise it when the network or its training changes
NEAREST = 2000  # images whose nearest neighbour among all training images is looked for


def json_lines(path, *keys):
    """The JSON lines of a results file, each an object with `keys`; none if there is no file."""
    with files.reading(path, "a file of results", "correct it or give another --results"):
        text = Path(path).read_text() if Path(path).exists() else ""
        rows = [json.loads(line) for line in text.splitlines()]
        if not all(row.keys() >= set(keys) for row in rows):
            raise ValueError("lines of another program")
        return rows


def add_lines(path, *lines):
    """Append dicts to a file of JSON lines."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def chosen(images, limit=fid.PAIRS_LIMIT):
    """At most `limit` of an array of images or labels: a random choice that depends on their number alone."""
    return images if len(images) <= limit else images[fid.random_choice(len(images), limit).numpy()]


def halves(n, seed=0):
    """Two disjoint random halves of range(n), each n // 2 sorted indices."""
    order = torch.randperm(n, generator=training.rng("cpu", seed, "halves")).numpy()
    return np.sort(order[: n // 2]), np.sort(order[n // 2 : n // 2 * 2])


def features(extractor, images):
    """Features [n, d] of images uint8 [n, H, W, C]."""
    parts = torch.tensor(images).split(500)  # a copy, as a data set may be read-only
    return torch.cat([extractor(part)[0] for part in parts])


def statistics(x, tag):
    """The `fid.Statistics` of features x [n, d]."""
    x = x.double().cpu()
    return fid.Statistics(x.mean(dim=0).numpy(), x.T.cov().numpy(), tag, len(x))


def distance(extractor, a, b):
    """Fréchet distance of two sets of its features, [n, d] and [m, d]."""
    return fid.frechet_distance(*(statistics(x, extractor.tag) for x in (a, b)))


def in_batches(net, indices, seed, device, batch):
    """Iterate over the samples [n, C, H, W] with these indices."""
    for i in range(0, len(indices), batch):
        yield sample.generate(net, *sample.inputs(net, indices[i : i + batch], seed, device))


class Classifier(nn.Module):
    """Images x [N, C, H, W] in [-1, 1] -> logits [N, classes]; `features(x)`: [N, 64].

    A distance in the features of stage 1 judges a generator by the network from which it started. This one knows only images
    and labels. It is trained in a minute and kept in the cache folder.
    """

    def __init__(self, channels, resolution, classes):
        super().__init__()
        if channels == 1:
            stride = 1 if resolution < 16 else 2
            layers = [nn.Conv2d(1, 32, 5, stride, padding=2), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, padding=1), nn.ReLU()]
            size = 64 * (-(-resolution // (2 * stride))) ** 2
        else:
            layers, size = [], 128 * (resolution // 8) ** 2
            for a, b in ((channels, 32), (32, 64), (64, 128)):
                layers += nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(size, 64), nn.ReLU())
        self.out = nn.Linear(64, classes)

    def forward(self, x):
        return self.out(F.dropout(self.features(x), 0.3, self.training))


def train_classifier(dataset, images, seed=0, batch=100, device="cpu"):
    """A trained `Classifier`. Coloured images are mirrored and shifted by up to 4 pixels."""
    torch.manual_seed(training.seed_of(seed, "classifier"))
    net = Classifier(dataset.channels, dataset.resolution, dataset.label_dim).to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, images // batch)
    batches = data.batches(dataset, training.Runtime("cpu", batch=batch), seed)
    for x, labels in itertools.islice(batches, images // batch):
        x = x.to(device)
        if dataset.channels > 1:
            (dy, dx), flip = torch.randint(9, (2,)).tolist(), torch.rand(len(x), 1, 1, 1, device=device) < 0.5
            x = F.pad(torch.where(flip, x.flip(3), x), (4, 4, 4, 4))[:, :, dy : dy + x.shape[2], dx : dx + x.shape[3]]
        F.cross_entropy(net(x), labels.to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return net.eval().requires_grad_(False)


def load_classifier(dataset, images=None, device="cpu"):
    """The classifier of a labelled data set on `device`, from the cache folder if it was trained before."""
    if not dataset.label_dim or dataset.is_latent or dataset.channels > 1 and dataset.resolution < 8:
        raise files.UserError(f"{dataset.name}: the classifier needs labelled images, in colour at least 8x8; give other data")
    images = images or max(100_000, (4 if dataset.channels == 1 else 6) * len(dataset))
    labels = hashlib.sha256(dataset.labels.tobytes()).hexdigest()
    key = hashlib.sha256(f"{VERSION} {images} {dataset.fingerprint()} {labels}".encode()).hexdigest()[:16]
    path = files.cache_dir() / "classifiers" / f"{key}.pt"
    if not path.exists():
        net = train_classifier(dataset, images, device=device)
        files.save_checkpoint({"kind": "classifier", "state": net.state_dict()}, path)
    net = Classifier(dataset.channels, dataset.resolution, dataset.label_dim).to(device).eval().requires_grad_(False)
    with files.reading(path, "a classifier", "delete it and it is trained again"):
        net.load_state_dict(files.load_checkpoint(path)["state"])
    return net


@torch.no_grad()
def predict(net, images):
    """Classes int64 [N] of uint8 images [N, H, W, C]."""
    x = torch.tensor(images).permute(0, 3, 1, 2)  # a copy, as a data set may be read-only
    parts = x.to(net.out.weight.device).split(500)
    return torch.cat([net(part / 127.5 - 1).argmax(dim=1) for part in parts]).cpu().numpy()


def classifier_view(net, dataset):
    """The features of the classifier of `dataset` for the distances of fid.py."""
    def function(images):
        return net.features(images.permute(0, 3, 1, 2) / 127.5 - 1), None

    name = f"the classifier of {dataset.name}"  # not for `fid.reference_statistics`: it does not tell the weights
    return fid.Extractor(name, name, net.out.in_features, dataset.images.shape[1:], net.out.weight.device, function)


class Measures:
    """The measures of samples of one data set. `measures(images)` is a dict of numbers.

    pretrained: path of the stage-1 network whose features are the second view, or None.
    test: a data set of held-out images; None: the data set's own, or else the data.
    """

    def __init__(self, name, pretrained=None, test=None, rt=None, resolution=None):
        rt = rt or training.Runtime("cpu")
        self.train, self.device = data.load(name, resolution=resolution), rt.device
        test = test or (f"{name}:test" if name in ("fashion-mnist", "cifar10") else None)
        self.train.require_labels()  # numbers the classes as training with --cond does
        self.has_test, self.reference = bool(test), data.load(test, resolution=resolution) if test else self.train
        self.classifier = load_classifier(self.train, device=rt.device)
        self.views = {"classifier": classifier_view(self.classifier, self.train)}
        if pretrained:
            self.views["stage1"] = fid.network_features(rt, str(pretrained))
        self.check(self.train, self.reference)
        self.known = self.pixels(self.train.images)
        self.held = self.features(chosen(self.reference.images))

    def check(self, *datasets):
        """Raise `UserError` for images of which the two networks have no features."""
        for view in self.views.values():
            fid.check_images(view, *datasets)

    def pixels(self, images):
        return torch.tensor(images).to(self.device).flatten(1).float()

    def features(self, images):
        """{"classifier" or "stage1": features [n, d]} of images uint8 [n, H, W, C]."""
        return {view: features(extractor, images) for view, extractor in self.views.items()}

    def nearest(self, images, skip_self=False):
        """Root mean square difference in grey levels to the nearest training image, [n], of the first `NEAREST` images."""
        x = self.pixels(images[:NEAREST])
        k = 2 if skip_self else 1
        found = [torch.cdist(part, self.known).topk(k, largest=False).values[:, -1] for part in x.split(250)]
        return torch.cat(found) / x.shape[1] ** 0.5

    def memory(self, images, skip_self=False):
        """The median distance to the nearest training image, and its lowest percentile."""
        found = self.nearest(chosen(images, NEAREST), skip_self)
        return {"nearest": found.median().item(), "nearest_low": found.quantile(0.01).item()}

    def __call__(self, images, labels=None, held=None, kid=True):
        """images uint8 [N, H, W, C], classes asked for int [N] or None -> {measure: number}. KID takes the longest.

        held: {view: features} to compare with instead of those of the reference.
        """
        images, labels = chosen(images), labels if labels is None else chosen(labels)
        result = {"images": len(images)}
        for view, ours in self.features(images).items():
            theirs = (held or self.held)[view]
            result[f"fd_{view}"] = distance(self.views[view], ours, theirs)
            if kid:
                result[f"kid_{view}"], result[f"kid_std_{view}"] = fid.kernel_distance(theirs, ours)
            result[f"precision_{view}"], result[f"recall_{view}"] = fid.precision_recall(theirs, ours)
        found = predict(self.classifier, images)
        shares = np.bincount(found, minlength=self.train.label_dim) / len(found)
        result |= self.memory(images) | {"shares": [round(share, 4) for share in shares.tolist()]}
        if labels is not None:
            result["accuracy"] = float((found == labels).mean())
        return result

    def floors(self):
        """{name: measures} of the data itself: what new images of the same kind would show."""
        if self.has_test:  # distances to the nearest training image and accuracy are those of the test images
            row = self(chosen(self.train.images, len(self.reference)))
            if self.reference.label_dim == self.train.label_dim:
                row["accuracy"] = float((predict(self.classifier, self.reference.images) == self.reference.labels).mean())
            return {"data: training against test images": row | self.memory(self.reference.images)}
        a, b = (chosen(self.train.images[half]) for half in halves(len(self.train)))
        row = self(a, held=self.features(b)) | self.memory(a, skip_self=True)
        return {"data: one half against the other": row}


COLUMNS = {  # heading: (value in a row's measures, format)
    "images": (lambda r: r["images"], "{:.0f}"),
    "FD (classifier)": (lambda r: r["fd_classifier"], "{:.1f}"),
    "FD (stage 1)": (lambda r: r.get("fd_stage1"), "{:.4f}"),
    "KID (classifier)": (lambda r: r.get("kid_classifier"), "{:.3g}"),
    "precision": (lambda r: r["precision_classifier"], "{:.2f}"),
    "recall": (lambda r: r["recall_classifier"], "{:.2f}"),
    "nearest": (lambda r: r["nearest"], "{:.1f}"),
    "nearest, lowest 1 %": (lambda r: r.get("nearest_low"), "{:.1f}"),
    "rarest class, %": (lambda r: 100 * min(r["shares"]), "{:.1f}"),
    "most frequent, %": (lambda r: 100 * max(r["shares"]), "{:.1f}"),
    "class asked for, %": (lambda r: 100 * r["accuracy"] if "accuracy" in r else None, "{:.1f}"),  # of data: its label
}


def table(rows, columns=COLUMNS):
    """A table in Markdown of {name: [measures of each seed]}: means, and standard deviations where there are several."""

    def cell(row, value, form):
        found = [value(seed) for seed in row if value(seed) is not None]
        spread = f" ± {form.format(np.std(found, ddof=1))}" if np.ptp(found or [0]) else ""
        return form.format(np.mean(found)) + spread if found else ""

    cells = {name: [cell(row, *column) for column in columns.values()] for name, row in rows.items()}
    kept = [i for i in range(len(columns)) if any(row[i] for row in cells.values())]  # not the empty columns
    return markdown([list(columns)[i] for i in kept], {name: [row[i] for i in kept] for name, row in cells.items()})


def markdown(headings, rows):
    """A table of {name: cells}."""
    lines = [f"| | {' | '.join(headings)} |", "|---" * (len(headings) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(row)} |" for name, row in rows.items()])


def main():
    parser = training.Parser(__doc__, dict(
        pretrained=(None, "stage-1 network whose features to use as well", str),
        test=(None, "held-out images to compare with (default: Fashion-MNIST's and CIFAR-10's own, else the data)", str),
        device=training.DEVICE,
        resolution=training.SHARED_SETTINGS["resolution"],
        json=(None, "append a line of JSON to this file for each row", str)))
    parser.add_argument("data", metavar="NAME", help="digits, fashion-mnist, cifar10 or another labelled data set")
    parser.add_argument("samples", nargs="*", metavar="NAME=FILE", help="a row's name and its samples")
    args = parser.parse_intermixed_args()  # files may stand behind the flags
    for text in args.samples:
        if "=" not in text:
            parser.error(f"{text}: give NAME=FILE")
    measures = Measures(args.data, args.pretrained, args.test, training.Runtime(args.device, alone=True), args.resolution)
    samples = [(name, data.load(path, resolution=args.resolution)) for name, path in (text.rsplit("=", 1) for text in args.samples)]
    measures.check(*(dataset for _, dataset in samples))
    rows = {name: [row] for name, row in measures.floors().items()}
    if all(dataset.labels is None for _, dataset in samples):
        for (row,) in rows.values():  # the data's accuracy stands beside that of samples only
            row.pop("accuracy", None)
    for name, dataset in samples:
        rows.setdefault(name, []).append(measures(dataset.images, dataset.labels))
    print(table(rows))
    if args.json:
        add_lines(args.json, *({"data": args.data, "row": name, **seed} for name, row in rows.items() for seed in row))


if __name__ == "__main__":
    training.run(main)
