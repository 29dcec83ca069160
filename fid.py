"""FID, Inception Score, KID, precision and recall of images; or all but the Inception Score without any download.

Reads two sets: samples and reference. Each is a data set name (digits, fashion-mnist, cifar10), a folder or zip of
images, a `.npz` of images, or a `.npz` of statistics (`mu`, `sigma`, as NVIDIA publishes them for EDM). The features
are Inception's, whose weights (95 MB) are downloaded once; or with --features those of a stage-1 network, which
need no download but compare with nothing published. Prints the results; writes statistics with --save-stats. The
statistics of a reference are kept in the cache folder, so they are computed once.

FID and IS take all images. KID, precision and recall take the features of at most 10,000 on each side, a random choice
that is always the same; statistics that were computed here hold these features too, others (NVIDIA's) give no such numbers.
FID, IS and KID stand beside published ones; precision and recall only where those were taken in Inception's features.

    python fid.py samples.npz cifar10
    python fid.py samples.npz cifar10-32x32.npz --json
    python fid.py samples.npz digits --features runs/digits/pretrain/network.pt
    torchrun --nproc-per-node 8 fid.py samples.npz imagenet-64x64.zip --save-stats imagenet-64x64.npz
"""

import dataclasses
import hashlib
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from machinery import checkpoints
from machinery import data
from machinery import files
import networks
from machinery import training
from machinery.files import UserError
from machinery.training import positive

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
INCEPTION_HASH = "6726825d"  # beginning of the file's SHA-256
INCEPTION_TAG = "inception-2015-12-05"
NETWORK_SIGMA = 0.2  # noise level at which a stage-1 network looks at the clean images
PUBLISHED_COUNT = 50_000  # images on each side in the published tables
PAIRS_LIMIT = 10_000  # images on each side whose features are kept, for the measures that compare all pairs


# ---------------------------------------------------------------------------------------------------------
# Inception v3 as TensorFlow's graph of 2015-12-05 has it (arXiv 1512.00567).


class Conv(nn.Conv2d):
    """Convolution with bias and ReLU. Keeps the image size ("same" padding) unless it is strided or `valid`."""

    def __init__(self, cin, cout, kernel, stride=1, valid=False):
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        same = stride == 1 and not valid
        super().__init__(cin, cout, kernel, stride, padding=(kernel[0] // 2, kernel[1] // 2) if same else 0)

    def forward(self, x):
        return F.relu_(super().forward(x))


def average(x):  # the padding does not count, so the borders are averages of fewer pixels
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def maximum(x):
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halve(x):
    return F.max_pool2d(x, 3, stride=2)


# The branches of each block: {name: layers}. A layer is (channels, kernel[, stride]), a pooling, or a list of two
# convolutions that both read the layer before. Convolution i of several in a branch has the name `{branch}_{i}`.
def block_a(pool_width):
    return {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
            "branch_pool": [average, (pool_width, 1)]}


def block_c(c):
    return {"branch1x1": [(192, 1)], "branch7x7": [(c, 1), (c, (1, 7)), (192, (7, 1))],
            "branch7x7dbl": [(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))],
            "branch_pool": [average, (192, 1)]}


def block_e(pool):
    fork = [(384, (1, 3)), (384, (3, 1))]
    return {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), fork], "branch3x3dbl": [(448, 1), (384, 3), fork],
            "branch_pool": [pool, (192, 1)]}


MIXED = {
    "Mixed_5b": block_a(32), "Mixed_5c": block_a(64), "Mixed_5d": block_a(64),
    "Mixed_6a": {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)], "pool": [halve]},
    "Mixed_6b": block_c(128), "Mixed_6c": block_c(160), "Mixed_6d": block_c(160), "Mixed_6e": block_c(192),
    "Mixed_7a": {"branch3x3": [(192, 1), (320, 3, 2)],
                 "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)], "pool": [halve]},
    "Mixed_7b": block_e(average), "Mixed_7c": block_e(maximum),  # not average: so it is in the graph of 2015
}  # fmt: skip


class Mixed(nn.Module):
    """Branches that read the same x [N, C, H, W]; their outputs side by side, [N, channels, H', W']."""

    def __init__(self, channels, branches):
        super().__init__()
        self.branches, self.channels = [], 0
        for branch, layers in branches.items():
            steps, width = [], channels  # a step is a list of what reads the output of the step before
            several = sum(not callable(layer) for layer in layers) > 1
            for layer in layers:
                if callable(layer):
                    steps.append([layer])
                    continue
                convs = {"": layer} if isinstance(layer, tuple) else dict(zip("ab", layer))
                i = sum(isinstance(step[0], Conv) for step in steps) + 1
                steps.append([])
                for letter, shape in convs.items():
                    steps[-1].append(Conv(width, *shape))
                    self.add_module(f"{branch}_{i}{letter}" if several else branch, steps[-1][-1])
                width = shape[0]
            self.branches.append(steps)
            self.channels += width * len(steps[-1])

    def forward(self, x):
        outputs = []
        for steps in self.branches:
            y = x
            for (step,) in steps[:-1]:
                y = step(y)
            outputs += [step(y) for step in steps[-1]]
        return torch.cat(outputs, dim=1)


class Inception(nn.Module):
    """x [N, 3, 299, 299] in [-1, 1) -> features [N, 2048], logits [N, 1008] without the bias of `fc`.

    BatchNorm (eps 1e-3) is folded into the convolutions; `file_shapes` and `fold` speak of the file's tensors.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, valid=True)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, valid=True)
        channels = 192
        for name, branches in MIXED.items():
            self.add_module(name, Mixed(channels, branches))
            channels = getattr(self, name).channels
        self.fc = nn.Linear(channels, 1008)

    def forward(self, x):
        x = halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        for name in MIXED:
            x = getattr(self, name)(x)
        x = x.mean(dim=(2, 3))
        return x, F.linear(x, self.fc.weight)  # the original Inception Score left the bias out


BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def file_shapes(net):
    """{name: shape} of the 472 tensors of a weight file: five for each of the 94 convolutions, two for `fc`."""
    shapes = {}
    for name, module in net.named_modules():
        if isinstance(module, Conv):
            shapes[f"{name}.conv.weight"] = module.weight.shape
            shapes.update({f"{name}.bn.{key}": module.bias.shape for key in BATCH_NORM})
    return {**shapes, "fc.weight": net.fc.weight.shape, "fc.bias": net.fc.bias.shape}


def fold(state):
    """The tensors of a weight file with each BatchNorm folded into its convolution, as `Inception` has them."""
    folded = {"fc.weight": state["fc.weight"].float(), "fc.bias": state["fc.bias"].float()}
    for key in state:
        if key.endswith(".conv.weight"):
            name = key.removesuffix(".conv.weight")
            gain, bias, mean, variance = (state[f"{name}.bn.{k}"].double() for k in BATCH_NORM)
            scale = gain / (variance + 1e-3).sqrt()  # y = gain (w x - mean) / sqrt(variance + eps) + bias
            folded[f"{name}.weight"] = (state[key].double() * scale[:, None, None, None]).float()
            folded[f"{name}.bias"] = (bias - mean * scale).float()
    return folded


def load_inception(path):
    """`Inception` with the weights of the file at `path`, in eval mode on the CPU."""
    state = files.load_plain(path, "a file of Inception weights")
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        net = Inception()
    for name, shape in file_shapes(net).items():
        found = state.get(name) if isinstance(state, dict) else None
        if not isinstance(found, torch.Tensor) or found.shape != shape:
            what = f"{list(found.shape)}" if isinstance(found, torch.Tensor) else "missing"
            raise UserError(f"{path}: not the weights of Inception v3: {name} is {what}, expected {list(shape)}; "
                            f"get {INCEPTION_URL}")
    net.load_state_dict(fold({name: state[name] for name in file_shapes(net)}), assign=True)
    return net.eval().requires_grad_(False)


def resize_tf1(images, size=299):
    """Bilinear resize as TensorFlow 1 did it: images [N, H, W, C] -> float32 [N, size, size, C].

    Output pixel i reads the source at i * H/size (no half-pixel shift, no antialiasing), clamped at the far edge.
    The published statistics depend on it; `F.interpolate` has other conventions.
    """
    x = images.float()
    for dim in (2, 1):  # along x, then along y
        position = torch.arange(size, dtype=torch.float32, device=x.device) * (x.shape[dim] / size)
        low = position.long()
        high = (low + 1).clamp(max=x.shape[dim] - 1)
        weight = (position - low).view([-1 if d == dim else 1 for d in range(4)])
        a, b = x.index_select(dim, low), x.index_select(dim, high)
        x = b.sub_(a).mul_(weight).add_(a)
    return x


# ---------------------------------------------------------------------------------------------------------
# Feature extractors.


@dataclasses.dataclass
class Extractor:
    """Turns uint8 images [N, H, W, C] (numpy or torch) into (features [N, dim] float32, logits or None) on `device`.

    tag: names the kind of features; distances are only taken between features of one kind.
    shape: the only (H, W, C) it takes, or None for any.
    """

    name: str
    tag: str
    dim: int
    shape: tuple
    device: torch.device
    function: object

    @torch.no_grad()
    def __call__(self, batch):
        if isinstance(batch, np.ndarray) and not batch.flags.writeable:  # a mapped file, of which PyTorch warns
            batch = batch.copy()
        return self.function(torch.as_tensor(batch).to(self.device, non_blocking=True))


def load_extractor(rt, features=None, weights=None):
    """The features of the stage-1 network `features`, or else Inception's; the first rank goes first and downloads."""
    return rt.main_first(lambda: network_features(rt, features) if features else inception(rt, weights))


def inception(rt, path=None):
    """The Inception features of FID, 2048 of them, and the logits of the Inception Score.

    path: a weight file; None: the file in torch's hub cache, downloaded there if it is missing.
    """
    given, path = path is not None, Path(path or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE)
    if not path.exists():
        if given:
            raise UserError(f"{path}: no such file; without --inception the weights are downloaded")
        files.download(INCEPTION_URL, path, "sha256", INCEPTION_HASH)
    found, tag = files.file_hash(path), INCEPTION_TAG
    if not found.startswith(INCEPTION_HASH):
        if not given:
            raise UserError(f"{path}: its SHA-256 begins with {found[:8]}, expected {INCEPTION_HASH}; "
                            "delete it and it will be downloaded again")
        tag = f"inception sha256:{found[:16]}"
    net = load_inception(path).to(rt.device, memory_format=torch.channels_last)
    if tag != INCEPTION_TAG and rt.is_main:
        print(f"warning: {path} is not {INCEPTION_FILE} (its SHA-256 begins with {found[:8]}, not {INCEPTION_HASH}): "
              "these numbers compare with nothing published", file=sys.stderr)

    def function(images):
        x = resize_tf1(images).expand(-1, -1, -1, 3)  # gray is repeated to three channels
        return net((x.permute(0, 3, 1, 2) - 128) / 128)

    return Extractor("Inception", tag, net.fc.in_features, None, rt.device, function)


def network_features(rt, path):
    """The features of a stage-1 network: the mean over positions of its encoder's last activation.

    The images stay clean, the network is told sigma = 0.2; so the features are deterministic.
    """
    net = networks.place(checkpoints.load_network(path, role="denoiser").requires_grad_(False), rt.device)
    shape = (net.config.img_resolution, net.config.img_resolution, net.config.img_channels)

    def function(images):
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        sigma = torch.full((len(x),), NETWORK_SIGMA, device=x.device)
        return net.features(x, sigma).float().mean(dim=(2, 3)), None

    with torch.no_grad():
        dim = function(torch.zeros((1, *shape), dtype=torch.uint8, device=rt.device))[0].shape[1]
    return Extractor(str(path), f"network sha256:{files.file_hash(path)[:16]}", dim, shape, rt.device, function)


# ---------------------------------------------------------------------------------------------------------
# Statistics.


@dataclasses.dataclass(eq=False)
class Statistics:
    """Mean mu [d] and covariance sigma [d, d] (divided by n - 1) of features, float64, and where they came from.

    features: the extractor's tag; "inception" if a file does not say (NVIDIA's do not). n: number of images or None.
    rows: the features of at most PAIRS_LIMIT of the images, float32 [m, d], or None.
    """

    mu: np.ndarray
    sigma: np.ndarray
    features: str
    n: int = None
    name: str = ""
    hash: str = ""
    rows: np.ndarray = None

    def __post_init__(self):
        mu, sigma, rows = self.mu, self.sigma, self.rows
        with files.reading(self.name or "statistics", "mean and covariance of features", "compute them again"):
            if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not len(mu):
                raise ValueError(f"mu {list(mu.shape)} and sigma {list(sigma.shape)}, expected [d] and [d, d]")
            if mu.dtype.kind != "f" or sigma.dtype.kind != "f":
                raise ValueError(f"mu and sigma are {mu.dtype} and {sigma.dtype}, expected float64")
            if not np.isfinite(mu).all() or not np.isfinite(sigma).all():
                raise ValueError("mu or sigma holds NaN or infinity")
            if np.abs(sigma - sigma.T).max() > 1e-5 * np.abs(sigma).max() or sigma.diagonal().min() < 0:
                raise ValueError("sigma is not a covariance: not symmetric, or a negative variance")
            if rows is not None and (rows.shape[1:] != mu.shape or rows.dtype != np.float32 or not np.isfinite(rows).all()):
                raise ValueError(f"rows are {rows.dtype} {list(rows.shape)}, expected finite float32 [m, {len(mu)}]")
        self.mu, self.sigma = mu.astype(np.float64), sigma.astype(np.float64)

    def save(self, path):
        """Write a `.npz` that `load` reads, atomically."""
        about = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        with files.atomic(path) as part, open(part, "wb") as file:
            np.savez(file, **about)

    @classmethod
    def load(cls, path):
        """Read a `.npz` of `mu` and `sigma`; those without more are taken for Inception's if they have its size."""
        with files.reading(path, "a readable .npz of statistics `mu` and `sigma`"), np.load(path, allow_pickle=False) as file:
            mu, sigma = file["mu"], file["sigma"]
            kinds = dict(features=str, n=int, name=str, hash=str)
            about = {key: kind(file[key].item()) for key, kind in kinds.items() if key in file.files}
            about["rows"] = file["rows"] if "rows" in file.files else None
            if "features" not in about and mu.shape[:1] != (2048,):
                raise UserError(f"does not say which features it holds, and mu is {list(mu.shape)}, while "
                                "Inception's is [2048]")
            return cls(mu, sigma, **{"features": "inception", "name": str(path), **about})

    def check(self, tag, dim, other):
        """Raise unless these are features of the kind `tag` and the size `dim`, which `other` has."""
        kinds = {self.features, tag}
        same = len(kinds) == 1 or "inception" in kinds and all(kind.startswith("inception") for kind in kinds)
        if not same or len(self.mu) != dim:
            raise UserError(f"{self.name or 'statistics'} holds {len(self.mu)} features of the kind '{self.features}', "
                            f"{other} has {dim} of the kind '{tag}'; both sides must come from one network")


class Moments:
    """Mean and covariance of rows that come in batches, in one pass, in float64; memory O(dim^2).

    Each batch is centred on its own mean and then merged (Chan, Golub, LeVeque 1983), which keeps all digits where
    the mean is large against the spread.
    """

    def __init__(self, dim, device="cpu"):
        self.n, self.mean = 0, torch.zeros(dim, dtype=torch.float64, device=device)
        self.squares = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # sum of (x - mean)(x - mean)^T

    def add(self, rows):
        """rows [n, dim]."""
        x, n = rows.double(), len(rows)
        mean = x.mean(dim=0)
        delta, total = mean - self.mean, self.n + n
        x = x - mean
        self.squares.addmm_(x.T, x).addr_(delta, delta, alpha=self.n * n / total)
        self.mean += delta * (n / total)
        self.n = total

    def result(self, rt):
        """(n, mean [dim], covariance [dim, dim]) over all ranks, in numpy."""
        n = int(rt.sum(torch.tensor(self.n, device=self.mean.device)))
        if n < 2:
            raise UserError(f"a covariance needs at least 2 images; there {'is 1' if n else 'are none'}")
        mean = rt.sum(self.mean * (self.n / n))
        delta = self.mean - mean
        squares = rt.sum(self.squares.addr(delta, delta, alpha=self.n))
        return n, mean.cpu().numpy(), (squares / (n - 1)).cpu().numpy()


class InceptionScore:
    """exp(mean KL(p(y|x) || p(y))) over contiguous splits of n images; arXiv 1606.03498. Memory O(splits * classes).

    start: position among the n images of the first logits that this rank adds.
    """

    def __init__(self, n, start=0, classes=1008, device="cpu"):
        self.position, splits = start, min(10, n)
        self.ends = torch.tensor([n * (s + 1) // splits for s in range(splits)], device=device)
        # Per split: sum of p(y|x) over its images | sum of p(y|x) ln p(y|x) over images and classes | number of images.
        self.sums = torch.zeros(splits, classes + 2, dtype=torch.float64, device=device)

    def add(self, logits):
        """logits [n, classes] of the next n images."""
        log_p = logits.double().log_softmax(dim=1)
        p = log_p.exp()
        split = torch.bucketize(torch.arange(len(p), device=p.device) + self.position, self.ends, right=True)
        self.sums.index_add_(0, split, torch.cat([p, (p * log_p).sum(1, True), torch.ones_like(p[:, :1])], dim=1))
        self.position += len(p)

    def result(self, rt):
        """(mean, population standard deviation) over the splits, over all ranks."""
        sums = rt.sum(self.sums.clone())
        p, p_log_p = sums[:, :-2] / sums[:, -1:], sums[:, -2] / sums[:, -1]
        scores = (p_log_p - torch.special.xlogy(p, p).sum(dim=1)).exp()
        return scores.mean().item(), scores.std(unbiased=False).item()


def random_choice(n, limit):
    """Sorted indices [min(n, limit)] of `limit` of n images: a random choice that depends on n alone.

    Not the first ones: many sets are sorted by class.
    """
    return torch.randperm(n, generator=training.rng("cpu", "pairs"))[:limit].sort().values


class Rows:
    """The features of PAIRS_LIMIT of n images, or of all if they are fewer (`random_choice`).

    start: position among the n images of the first that this rank adds.
    """

    def __init__(self, n, start, dim, device="cpu"):
        self.position, self.chosen = start, random_choice(n, PAIRS_LIMIT)
        self.rows = torch.zeros(len(self.chosen), dim, device=device)

    def add(self, features):
        """features [N, dim] of the next N images."""
        ends = torch.tensor([self.position, self.position + len(features)])
        low, high = torch.searchsorted(self.chosen, ends).tolist()
        self.rows[low:high] = features[self.chosen[low:high] - self.position]
        self.position += len(features)

    def result(self, rt):
        """float32 [m, dim] over all ranks, in numpy. Each rank has left the others' rows at zero."""
        return rt.sum(self.rows).cpu().numpy()


def measure(extractor, batches, rt, name="", content="", score=None, rows=None):
    """`Statistics` of the features of `batches`, an iterable of uint8 [n, H, W, C], each rank with its own.

    name and content (a hash) say where the images came from. score: an `InceptionScore` that gets the logits.
    rows: `Rows` that get the features.
    """
    moments = Moments(extractor.dim, extractor.device)
    for batch in batches:
        features, logits = extractor(batch)
        moments.add(features)
        if score is not None:
            score.add(logits)
        if rows is not None:
            rows.add(features)
    n, mu, sigma = moments.result(rt)
    if not np.isfinite(sigma).all():
        raise UserError(f"{name or 'samples'}: NaN or infinity in the features; are the weights of {extractor.name} "
                        "damaged?")
    return Statistics(mu, sigma, extractor.tag, n, name, content, rows and rows.result(rt))


def measure_dataset(extractor, dataset, rt, batch=64, indices=None):
    """Statistics of a data set, or of its images at `indices`; the ranks share the work in contiguous parts.

    Returns (`Statistics`, (Inception Score, its standard deviation) or None where the extractor has no logits).
    """
    check_images(extractor, dataset)
    content = dataset.fingerprint()
    if indices is None:
        indices = np.arange(len(dataset))
    else:
        content = hashlib.sha256(f"{content} {np.asarray(indices).tolist()}".encode()).hexdigest()
    n = len(indices)
    start, stop = n * rt.rank // rt.world_size, n * (rt.rank + 1) // rt.world_size
    progress = training.Progress(0, stop - start)

    def batches():
        for i in range(start, stop, batch):
            end = min(i + batch, stop)
            yield dataset.batch(indices[i:end])[0]
            if rt.is_main and sys.stderr.isatty():
                text = progress.tick(end - start)[1]
                print(f"\r{dataset.name}: {text}  ", end="\n" * (end == stop), file=sys.stderr, flush=True)

    score = InceptionScore(n, start, device=extractor.device) if extractor.tag.startswith("inception") else None
    rows = Rows(n, start, extractor.dim, extractor.device)
    statistics = measure(extractor, batches(), rt, dataset.name, content, score, rows)
    return statistics, score and score.result(rt)


def reference_statistics(extractor, dataset, rt, batch=64):
    """`Statistics` of a whole data set, from the cache folder if they were computed before."""
    check_images(extractor, dataset)
    # The 2 is the version of this file's features and of what is kept of them: whoever changes that changes it.
    key = hashlib.sha256(f"2 {dataset.fingerprint()} {extractor.tag}".encode()).hexdigest()[:32]
    path = files.cache_dir() / "stats" / f"{key}.npz"

    def cached():
        try:
            return Statistics.load(path)
        except UserError:  # absent, or damaged: it is computed again
            return None

    statistics = rt.first(cached)
    if statistics is None:
        statistics, _ = measure_dataset(extractor, dataset, rt, batch)
        if rt.is_main:
            try:
                statistics.save(path)
            except OSError as error:  # a full or read-only disk costs the cache, not the result
                print(f"warning: {path} could not be written ({error.strerror})", file=sys.stderr)
    return dataclasses.replace(statistics, name=dataset.name)


def check_images(extractor, dataset):
    """Raise unless `extractor` can read the images of `dataset`, and there are at least two."""
    if dataset.is_latent:
        raise UserError(f"{dataset.name}: holds latents; FID needs images, so decode them first")
    if len(dataset) < 2:
        raise UserError(f"{dataset.name}: has {len(dataset)} image; a covariance needs at least 2")
    found = dataset.images.shape[1:]
    if extractor.shape and found != extractor.shape:
        raise UserError(f"{dataset.name}: images [H, W, C] {list(found)}, but {extractor.name} is for "
                        f"{list(extractor.shape)}; use a network that was trained on such images")


def split_half(n, seed=0):
    """Two disjoint random halves of range(n), each n // 2 sorted indices: the distance of data from itself."""
    order = torch.randperm(n, generator=training.rng("cpu", seed, "halves")).numpy()
    return np.sort(order[:n // 2]), np.sort(order[n // 2:n // 2 * 2])


# ---------------------------------------------------------------------------------------------------------
# The distances.


def frechet_distance(a, b):
    """|mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^1/2) of two `Statistics`; arXiv 1706.08500.

    With S = R R^T, the eigenvalues of S_a S_b that are not zero are those of the symmetric P P^T, P = R_a^T R_b. So
    the square roots of the latter's eigenvalues add up to the trace; nothing is complex and no S is inverted, so
    either may be singular, as with fewer images than features.
    """
    a.check(b.features, len(b.mu), b.name or "the other side")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them gain little here, and on a busy machine they wait for each other
    try:
        # Any root of S_b does. Cholesky's is the cheapest, and it fails where S_b is singular.
        lower, failed = torch.linalg.cholesky_ex(torch.from_numpy(b.sigma))
        product = _root(a).T @ (_root(b) if failed else lower)  # [rank_a, rank_b]
        product = product if product.shape[0] <= product.shape[1] else product.T  # the side with fewer zeros to round
        trace = torch.linalg.eigvalsh(product @ product.T).clamp(min=0).sqrt().sum().item()
    finally:
        torch.set_num_threads(threads)
    distance = float(((a.mu - b.mu) ** 2).sum() + a.sigma.trace() + b.sigma.trace() - 2 * trace)
    return max(distance, 0.0)  # rounding can put equal sets at -1e-13


def _root(statistics):
    """R [d, rank] with sigma = R R^T: the eigenvectors, each times the square root of its eigenvalue.

    Eigenvalues that are rounding errors of zero are left out. The largest comes first: graded like this, products of
    roots have small eigenvalues with all their digits, in the other order the large ones drown them.
    """
    values, vectors = torch.linalg.eigh(torch.from_numpy(statistics.sigma))
    largest = values[-1].item()
    if values[0] < -1e-5 * largest:
        raise UserError(f"{statistics.name or 'statistics'}: sigma is not a covariance (it has negative eigenvalues)")
    kept = values > len(values) * torch.finfo(torch.float64).eps * largest
    return (vectors[:, kept] * values[kept].sqrt()).flip(1)


def kernel_distance(reference, samples, subsets=100, size=1000, seed=0):
    """KID, arXiv 1801.01401: (mean, standard deviation) over random subsets of `size` of the features [n, d] and [m, d].

    The squared maximum mean discrepancy with the kernel (x.y / d + 1)^3. The estimate has no bias, however few images there
    are: below zero for about half of all sets that are equal in truth. A set smaller than `size` is taken whole; the
    standard deviation is that of one subset, and 0 where both sets are taken whole.
    """
    size = min(size, len(reference), len(samples))
    if size < 2:
        raise UserError("KID needs at least 2 images on each side")
    generator, estimates = training.rng("cpu", seed, "subsets"), []

    def kernel(x, y):
        return (x @ y.T).div_(x.shape[1]).add_(1).pow_(3)

    def within(x):  # mean over the pairs of two different points
        values = kernel(x, x)
        return (values.sum() - values.trace()) / (size * (size - 1))

    for _ in range(subsets):
        x, y = (rows[torch.randperm(len(rows), generator=generator)[:size]].double() for rows in (reference, samples))
        estimates.append(within(x) + within(y) - 2 * kernel(x, y).mean())
    estimates = torch.stack(estimates)
    return estimates.mean().item(), estimates.std(unbiased=False).item()


def precision_recall(reference, samples, k=3):
    """(precision, recall) of features [n, d] and [m, d], arXiv 1904.06991. Memory: the features twice in float64, and 100 MB.

    Around each point lies a ball that reaches to the k-th nearest other point of its set. Precision: the share of
    samples in a ball of the reference. Recall: the share of the reference in a ball of the samples.
    """
    if min(len(reference), len(samples)) <= k:
        raise UserError(f"precision and recall with k = {k} need at least {k + 1} images on each side")
    mean = reference.double().mean(dim=0)
    sets = [rows.double() - mean for rows in (reference, samples)]  # near the origin, where rounding errors are smallest

    def squares(x, y, shrink=1.0):
        """(first row, squared distances [rows, len(y)]) for chunks of the rows of x, of 50 MB each."""
        x2, y2 = (shrink * (a * a).sum(dim=1) for a in (x, y))
        chunk = max(1, 50_000_000 // (8 * len(y)))
        for i in range(0, len(x), chunk):
            yield i, torch.addmm(y2, x[i:i + chunk], y.T, alpha=-2).add_(x2[i:i + chunk, None])

    def radii(x):
        nearest = [d.topk(k + 1, largest=False).values[:, -1] for _, d in squares(x, x)]  # + 1: the point itself is at 0
        return torch.cat(nearest)

    real, ours = map(radii, sets)
    # Rounding errors are below 1e-12 of the squared norms. With that taken off, a point is for certain in the ball of an equal
    # point, also if the ball has no size: of more than k equal points it has none.
    inside, covered = 0, torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for i, d in squares(sets[1], sets[0], shrink=1 - 1e-12):
        inside += (d <= real).any(dim=1).sum().item()
        covered |= (d <= ours[i:i + len(d), None]).any(dim=0)
    return inside / len(samples), covered.double().mean().item()


# ---------------------------------------------------------------------------------------------------------
# The command.


def arguments():
    parser = training.Parser(__doc__)
    add = parser.add_argument
    add("samples", metavar="SAMPLES", help="data set name, folder, zip, .npz of images or .npz of statistics")
    add("reference", metavar="REFERENCE", help="the same; in published tables the training set")
    add("--features", metavar="PATH", help="network of stage 1 whose features to use; default: Inception")
    add("--inception", metavar="PATH", help="Inception weights; default: torch's hub cache, filled by a download")
    add("--count", type=positive(int), metavar="N", help="N random images of each side that has more; default: all")
    add("--seed", type=int, default=0, metavar="N", help="seed of the choice that --count makes; default: 0")
    add("--batch", type=positive(int), default=64, metavar="N",
        help="images at once on each rank, for memory and speed only; default: 64")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: auto, CUDA where there is any")
    add("--json", action="store_true", help="print one line of JSON instead of text")
    add("--resolution", type=positive(int), metavar="N", help="cut the middle out of images of other sizes and resize it")
    add("--save-stats", metavar="PATH", help="write the statistics of REFERENCE, and the features kept, to this .npz")
    args = parser.parse_args()
    if args.features and args.inception:
        parser.error("--features and --inception exclude each other")
    if args.save_stats and not args.save_stats.endswith(".npz"):
        parser.error(f"--save-stats {args.save_stats}: the name must end in .npz")
    return args


def open_side(spec, resolution=None):
    """`Statistics` if `spec` is a file of them, else the data set that it names, as `data.load` reads it."""
    if spec.endswith(".npz") and Path(spec).is_file():
        with files.reading(spec, "a readable .npz of images or statistics"), zipfile.ZipFile(spec) as archive:
            names = set(archive.namelist())
        if names & {"mu.npy", "sigma.npy"} and not names & {"arr_0.npy", "images.npy"}:
            return Statistics.load(spec)
    return data.load(spec, resolution=resolution)


def main():
    args = arguments()
    rt = training.start(args.device)

    # All that can be wrong is found before the features are computed, which may take an hour.
    specs = (args.samples, args.reference)
    samples, reference = sides = [rt.main_first(lambda: open_side(spec, args.resolution)) for spec in specs]
    datasets = [side for side in sides if isinstance(side, data.Dataset)]
    if len(datasets) == 2 and samples.resolution != reference.resolution:
        sizes = [f"{dataset.name} has {dataset.resolution}x{dataset.resolution}" for dataset in datasets]
        raise UserError(f"images of different sizes: {sizes[0]}, {sizes[1]}; give --resolution N")
    if args.count == 1:
        raise UserError("--count 1: a covariance needs at least 2 images")
    extractor = load_extractor(rt, args.features, args.inception) if datasets else None  # two files need no network
    for side in sides:
        if side in datasets:
            check_images(extractor, side)
        elif extractor:
            side.check(extractor.tag, extractor.dim, extractor.name)

    def chosen(dataset, side):
        if args.count is None or args.count >= len(dataset):
            return None
        order = torch.randperm(len(dataset), generator=training.rng("cpu", args.seed, side))
        return np.sort(order[:args.count].numpy())

    a, score, b = samples, None, reference
    if samples in datasets:
        a, score = measure_dataset(extractor, samples, rt, args.batch, chosen(samples, "samples"))
    if reference in datasets and (indices := chosen(reference, "reference")) is not None:
        b, _ = measure_dataset(extractor, reference, rt, args.batch, indices)
    elif reference in datasets and a.hash == reference.fingerprint():  # a set against itself
        b = a
    elif reference in datasets:
        b = reference_statistics(extractor, reference, rt, args.batch)
    if not rt.is_main:
        return

    distance, kind = frechet_distance(a, b), a.features if a.features != "inception" else b.features
    is_mean, is_std = score or (None, None)  # none from statistics or with --features
    kid_mean = kid_std = precision = recall = None  # none from the statistics of others, or of three images
    if a.rows is not None and b.rows is not None and min(len(a.rows), len(b.rows)) > 3:
        both = [torch.from_numpy(side.rows).to(rt.device) for side in (b, a)]
        (kid_mean, kid_std), (precision, recall) = kernel_distance(*both), precision_recall(*both)
    if args.json:
        result = dict(fid=distance, is_mean=is_mean, is_std=is_std, kid_mean=kid_mean, kid_std=kid_std, precision=precision,
                      recall=recall, n_samples=a.n, n_reference=b.n, features=kind)
        print(json.dumps(result))
    else:
        print(f"FID        {distance:.5g}")
        if score:
            print(f"IS         {is_mean:.4g} ± {is_std:.2g}")
        if kid_mean is not None:
            print(f"KID        {kid_mean:.3g} ± {kid_std:.2g}\nprecision  {precision:.4g}\nrecall     {recall:.4g}")
        for side, statistics in (("samples", a), ("reference", b)):
            count = "unknown number of" if statistics.n is None else f"{statistics.n:,}"
            print(f"{side:9}  {count} images, {statistics.name}")
        print(f"features   {kind}")
    for side, statistics in (("samples", a), ("reference", b)):
        if kind.startswith("inception") and (statistics.n or PUBLISHED_COUNT) < PUBLISHED_COUNT:
            print(f"warning: {statistics.n:,} {side} images; published numbers use {PUBLISHED_COUNT:,}, and fewer give "
                  "a larger FID", file=sys.stderr)
    if args.save_stats:
        b.save(args.save_stats)


if __name__ == "__main__":
    training.run(main)
