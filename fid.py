"""FID, Inception Score, KID, precision and recall of images.

Compares samples with a reference. Each is a data set name, a folder or zip of images, a `.npz` of
images, or statistics as NVIDIA publishes them (a `.npz` of `mu` and `sigma`, or EDM2's `.pkl`). If
a file has both (ADM's VIRTUAL_*.npz), FID uses the statistics; KID, precision, recall the images.
Features are Inception's (a download of 95 MB), or with --features those of a stage-1 network, which
give no published numbers. KID, precision and recall take at most 10,000 images a side.

    python fid.py samples.npz cifar10
    python fid.py samples.npz digits --features runs/digits/pretrain/network.pt
    torchrun --nproc-per-node 8 fid.py samples.npz imagenet-64x64.zip --save-stats stats.npz
"""

import machinery  # before PyTorch: how its threads wait
import contextlib
import dataclasses
import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import networks
import sample
from machinery import checkpoints, data, files, training
from machinery.files import UserError

INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_HASH = "6726825d"  # beginning of the file's SHA-256
INCEPTION_TAG = "inception-2015-12-05"
PUBLISHED_COUNT = 50_000  # images on each side in published tables
PAIRS_LIMIT = 10_000  # images on each side for KID, precision and recall
AT_LEAST_TWO = training.number("2 or more", int, 2)  # images of a covariance
SETTINGS = dict(  # of FID during training
    fid_every=(None, "measure FID of the averaged generator at this interval, in thousands of "
               "images, and keep the best as network-best.pt (default: never)", float),
    fid_images=(50_000, "samples per measurement", AT_LEAST_TWO),
    fid_reference=(None, "what to compare with: images or statistics (default: --data)", str),
    fid_features=(None, "stage-1 network whose features to use (default: Inception)", str),
    inception=(None, "Inception weights (default: torch's hub cache, or a download)", str),
    vae=sample.SETTINGS["vae"],
)

# ---- Inception v3 as in TensorFlow's graph of 2015-12-05

# Names of layers in a row: a pooling or a convolution. / before its stride: it does not pad.
STEM = "Conv2d_1a_3x3/2 Conv2d_2a_3x3/1 Conv2d_2b_3x3 halve Conv2d_3b_1x1 Conv2d_4a_3x3/1 halve"
# Branches of a block, which read the same input. Layer x of block b is called Mixed_b.branchx.
A = ["1x1", "5x5_1 5x5_2", "3x3dbl_1 3x3dbl_2 3x3dbl_3", "average _pool"]
C = ["1x1", "7x7_1 7x7_2 7x7_3", "7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5", "average _pool"]
E = ["1x1", "3x3_1 3x3_2a", "3x3_1 3x3_2b",
     "3x3dbl_1 3x3dbl_2 3x3dbl_3a", "3x3dbl_1 3x3dbl_2 3x3dbl_3b"]
BLOCKS = {
    "5b": A, "5c": A, "5d": A, "6a": ["3x3/2", "3x3dbl_1 3x3dbl_2 3x3dbl_3/2", "halve"],
    "6b": C, "6c": C, "6d": C, "6e": C,
    "7a": ["3x3_1 3x3_2/2", "7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4/2", "halve"],
    "7b": [*E, "average _pool"], "7c": [*E, "maximum _pool"],  # as in the graph of 2015
}
POOLS = {
    "average": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "maximum": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "halve": lambda x: F.max_pool2d(x, 3, stride=2),
}


class Inception:
    """uint8 images [N, H, W, 1 or 3] -> features [N, 2048], logits [N, 1008] (arXiv 1512.00567).

    state: tensors as in the file of weights. BatchNorm is folded into the convolutions, in float64.
    """

    def __init__(self, state, device):
        self.layers, self.fc = {}, state["fc.weight"].float().to(device)
        for key in [key for key in state if key.endswith(".conv.weight")]:
            name = key.removesuffix(".conv.weight")
            gain, bias, mean, variance = (
                state[f"{name}.bn.{key}"].double()
                for key in ("weight", "bias", "running_mean", "running_var"))
            scale = gain / (variance + 1e-3).sqrt()
            weight = state[key].double() * scale[:, None, None, None]
            weight = weight.to(device, torch.float, memory_format=torch.channels_last)
            self.layers[name] = weight, (bias - mean * scale).float().to(device)

    def chain(self, x, names, prefix=""):
        for name in names.split():
            if name in POOLS:
                x = POOLS[name](x)
            else:
                name, _, stride = name.partition("/")
                padding = "valid" if stride else "same"
                x = F.conv2d(x, *self.layers[prefix + name], int(stride or 1), padding).relu_()
        return x

    def __call__(self, images):
        x = resize_tf1(images).expand(-1, -1, -1, 3)  # gray is repeated to three channels
        x = self.chain((x.permute(0, 3, 1, 2) - 128) / 128, STEM)
        for block, branches in BLOCKS.items():
            outputs = [self.chain(x, names, f"Mixed_{block}.branch") for names in branches]
            x = torch.cat(outputs, dim=1)
        x = x.mean(dim=(2, 3))
        return x, F.linear(x, self.fc)  # the original Inception Score left the bias out


def resize_tf1(images, size=299):
    """TensorFlow 1's bilinear resize: [N, H, W, C] -> float32 [N, size, size, C].

    No half-pixel shift, no antialiasing. The published statistics depend on it.
    """
    x = images.float()
    for dim in (2, 1):
        position = torch.arange(size, device=x.device).float() * (x.shape[dim] / size)
        low = position.long()
        high = (low + 1).clamp(max=x.shape[dim] - 1)
        weight = (position - low).view([-1 if d == dim else 1 for d in range(4)])
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight)
    return x


# ---- Feature extractors

@dataclasses.dataclass
class Extractor:
    """uint8 images [N, H, W, C] -> features [N, dim] float32, logits [N, 1008] or None."""

    name: str
    tag: str  # the kind of features; only features of one kind have a distance
    dim: int
    shape: tuple  # the only (H, W, C) it reads, or None for any
    device: torch.device
    function: object

    @torch.no_grad()
    def __call__(self, images):
        return self.function(torch.as_tensor(images).to(self.device, non_blocking=True))


def load_extractor(rt, features=None, weights=None):
    """The features of the stage-1 network `features`, or else Inception's with `weights`."""
    if features and weights:
        raise UserError("--inception and a network for the features (--features, --fid-features) "
                        "exclude each other; give one")
    make, path = (network_features, features) if features else (inception, weights)
    return rt.main_first(lambda: make(rt, path))


def inception(rt, path=None):
    """Inception's features. path: its weights; None: from torch's hub cache or a download."""
    url = INCEPTION_URL + INCEPTION_FILE
    file = Path(path or f"{torch.hub.get_dir()}/checkpoints/{INCEPTION_FILE}")
    if not path and not file.exists():
        files.download(url, file, "sha256", INCEPTION_HASH)
    with files.reading(file, "the weights of Inception v3", f"get {url}"):
        net = Inception(files.load_plain(file), rt.device)
        net(torch.zeros(1, 8, 8, 3, device=rt.device))  # fails where weights do not fit
        found = files.file_hash(file)
    tag = INCEPTION_TAG if found.startswith(INCEPTION_HASH) else f"inception sha256:{found[:16]}"
    if tag != INCEPTION_TAG and rt.is_main:
        print(f"warning: {file}: SHA-256 {found[:8]}..., not {INCEPTION_HASH}: the results do not "
              "compare with published ones", file=sys.stderr)
    return Extractor("Inception", tag, 2048, None, rt.device, net)


def network_features(rt, path):
    """The last activation of a stage-1 network's encoder, averaged over positions."""
    net = checkpoints.load_network(path, role="denoiser").requires_grad_(False)
    net, config = networks.place(net, rt.device), net.config
    shape = (config.img_resolution, config.img_resolution, config.img_channels)

    def function(images):
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        sigma = torch.full((len(x),), 0.2, device=x.device)  # what it is told of the clean images
        return net.unet.features(x, sigma).float().mean(dim=(2, 3)), None

    tag = f"network sha256:{files.file_hash(path)[:16]}"
    dim = config.model_channels * config.channel_mult[-1]
    return Extractor(str(path), tag, dim, shape, rt.device, function)


# ---- Statistics

@dataclasses.dataclass(eq=False)
class Statistics:
    """Mean mu [d] and covariance sigma [d, d] (divided by n - 1) of features, float64."""

    mu: np.ndarray
    sigma: np.ndarray
    features: str  # the extractor's tag
    n: int = None  # number of images, if it is known
    name: str = "statistics"
    rows: np.ndarray = None  # features of a random choice of the images, float32 [m, d]

    def __post_init__(self):
        mu, sigma, rows = self.mu, self.sigma, self.rows
        if not (mu.dtype.kind + sigma.dtype.kind == "ff" and sigma.shape == 2 * mu.shape
                and np.isfinite(mu).all() and np.isfinite(sigma).all()
                and np.abs(sigma - sigma.T).max() <= 1e-5 * np.abs(sigma).max()
                and sigma.diagonal().min() >= -1e-5 * np.abs(sigma).max()):
            raise UserError(f"{self.name}: expected finite float64 [d] and a covariance [d, d]; "
                            "make them again")
        if rows is not None and not (rows.dtype == np.float32 and rows.shape[1:] == mu.shape
                                     and np.isfinite(rows).all()):
            raise UserError(f"{self.name}: expected finite float32 rows [m, {len(mu)}]; "
                            "make them again")
        self.mu, self.sigma = mu.astype(np.float64), sigma.astype(np.float64)

    def save(self, path):
        with files.atomic(path) as part, open(part, "wb") as file:
            np.savez(file, **{k: v for k, v in vars(self).items() if v is not None})

    @classmethod
    def load(cls, path, remedy="get it again"):
        """Read a `.npz` of `mu` and `sigma`; without `features` they are Inception's."""
        what = "a readable .npz of statistics `mu` and `sigma`"
        with files.reading(path, what, remedy), np.load(path) as file:  # runs no pickles
            about = {key: file[key].item() for key in ("features", "n", "name") if key in file}
            arrays = file["mu"], file["sigma"]
            if "features" not in about and len(arrays[0]) != 2048:  # Inception's
                raise UserError("does not say which features it has; make it again")
            about = {"features": INCEPTION_TAG, "name": str(path), **about}
            return cls(*arrays, rows=file.get("rows"), **about)

    def check(self, tag, dim, other):
        """Raise unless these are `dim` features of the kind `tag`, which `other` has."""
        if self.features != tag or len(self.mu) != dim:
            raise UserError(f"{self.name} has {len(self.mu)} features of the kind "
                            f"'{self.features}', {other} has {dim} of the kind '{tag}'; "
                            "both sides must come from one network")


def distance_name(tag):
    return "FID" if tag.startswith("inception") else "FD (stage 1)"


def random_choice(n, limit, key="pairs"):
    """Sorted indices [min(n, limit)], or all (None): random, but the same for each n and key."""
    return torch.randperm(n, generator=training.rng("cpu", key))[:limit].sort().values


def measure(extractor, read, n, rt, batch=64, name="samples"):
    """One pass over n images, shared by the ranks: (`Statistics`, Inception Score or None).

    read: function from a range of indices to uint8 images. Inception Score (arXiv 1606.03498): mean
    and standard deviation over ten splits of exp(mean KL(p(y|x) || p(y))), if there are logits.
    """
    device, dim, scored = extractor.device, extractor.dim, extractor.tag.startswith("inception")
    chosen, splits = random_choice(n, PAIRS_LIMIT), min(10, n)
    split = ((torch.arange(n, device=device) + 1) * splits - 1) // n  # of each image
    # Sums around a point among the features keep their digits where the mean is large.
    origin = rt.sum(extractor(read(range(1)))[0][0].double()) / rt.world_size
    sizes = {"x": [dim], "xx": [dim, dim], "p": [splits, 1008], "p_log_p": [splits]}
    sums = {k: torch.zeros(size, dtype=torch.double, device=device) for k, size in sizes.items()}
    sums["rows"] = torch.zeros(len(chosen), dim, device=device)
    for i in range(rt.rank * batch, n, rt.world_size * batch):
        j = min(i + batch, n)
        features, logits = extractor(read(range(i, j)))
        x = features.double() - origin
        sums["x"] += x.sum(dim=0)
        sums["xx"].addmm_(x.T, x)
        low, high = torch.searchsorted(chosen, torch.tensor([i, j])).tolist()
        sums["rows"][low:high] = features[chosen[low:high] - i]
        if scored:
            log_p = logits.double().log_softmax(dim=1)
            sums["p"].index_add_(0, split[i:j], log_p.exp())
            sums["p_log_p"].index_add_(0, split[i:j], (log_p.exp() * log_p).sum(dim=1))
        if rt.is_main and sys.stderr.isatty():  # one line that is overwritten
            end = "\r" if i + rt.world_size * batch < n else "\n"
            print(f"{name}: {j} of {n}", end=end, file=sys.stderr, flush=True)
    sums = {key: rt.sum(value).cpu() for key, value in sums.items()}

    mean = sums["x"] / n
    sigma = (sums["xx"] - n * mean.outer(mean)) / (n - 1)
    mu, rows = (origin.cpu() + mean).numpy(), sums["rows"].numpy()
    statistics = Statistics(mu, sigma.numpy(), extractor.tag, n, name, rows)
    count = split.cpu().bincount()
    p = sums["p"] / count[:, None]
    score = (sums["p_log_p"] / count - torch.special.xlogy(p, p).sum(dim=1)).exp()
    return statistics, (score.mean().item(), score.std(correction=0).item()) if scored else None


def measure_dataset(extractor, dataset, rt, count=None, key="reference"):
    """`measure` of a data set, or of at most `count` of its images, chosen by `key`."""
    indices = random_choice(len(dataset), count, key)
    return measure(extractor, lambda part: dataset.batch(indices[part.start:part.stop])[0],
                   len(indices), rt, name=dataset.name)


def reference_statistics(extractor, dataset, rt):
    """`Statistics` of a whole data set, from the cache folder if they were computed before."""
    # Increment the 2 when the features, or what is kept of them, change.
    key = hashlib.sha256(f"2 {dataset.fingerprint()} {extractor.tag}".encode()).hexdigest()[:32]
    path = files.cache_dir() / "stats" / f"{key}.npz"
    if not rt.agree(not path.exists()):
        statistics = Statistics.load(path, "delete it and it is computed again")
        return dataclasses.replace(statistics, name=dataset.name)
    statistics, _ = measure_dataset(extractor, dataset, rt)
    with contextlib.suppress(OSError):  # a full or read-only disk costs only the cache
        if rt.local_rank == 0:
            statistics.save(path)
    return statistics


def check_images(extractor, *sides):
    """Raise unless data sets, `Statistics` and None fit each other and `extractor`."""
    size = None
    for side in filter(None, sides):
        if isinstance(side, Statistics):
            side.check(extractor.tag, extractor.dim, extractor.name)
            continue
        if side.is_latent or len(side) < 2:
            raise UserError(f"{side.name}: FID needs two images or more, and no latents")
        size, shape = size or side.resolution, side.images.shape[1:]
        wanted = extractor.shape or (size, size, side.channels)
        if shape != wanted:
            raise UserError(f"{side.name}: images [H, W, C] {list(shape)}, but the other side or "
                            f"{extractor.name} has {list(wanted)}; give --resolution N, images of "
                            "the same colours, or another network")


# ---- The distances

def frechet_distance(a, b):
    """|mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^1/2) of `Statistics`; arXiv 1706.08500.

    With S_a = R R^T the last trace is the sum of the roots of the eigenvalues of R^T S_b R.
    """
    a.check(b.features, len(b.mu), b.name)
    a, b = sorted((a, b), key=lambda side: side.n or math.inf)  # fewer images: lower rank
    values, vectors = torch.linalg.eigh(torch.from_numpy(a.sigma))
    kept = values >= len(values) * torch.finfo(values.dtype).eps * values[-1]  # not rounding errors
    root = (vectors[:, kept] * values[kept].sqrt()).flip(1)  # largest first keeps small ones exact
    products = torch.linalg.eigvalsh(root.T @ torch.from_numpy(b.sigma) @ root)
    for side, found in ((a, values), (b, products)):
        if found[0] < -1e-5 * found[-1]:
            raise UserError(f"{side.name}: sigma has negative eigenvalues; get it again")
    distance = ((a.mu - b.mu) ** 2).sum() + a.sigma.trace() + b.sigma.trace()
    return max(float(distance) - 2 * products.clamp(min=0).sqrt().sum().item(), 0.0)


def kernel_distance(reference, samples, subsets=100, size=1000, seed=0):
    """KID, arXiv 1801.01401: (mean, standard deviation) over random subsets of features [n, d].

    The squared maximum mean discrepancy with the kernel (x.y / d + 1)^3, without bias: of equal
    distributions about half of the values are negative. `size` is at most that of the smaller set.
    """
    size = min(size, len(reference), len(samples))
    generator, estimates = training.rng("cpu", seed, "subsets"), []
    for _ in range(subsets):
        x, y = (rows[torch.randperm(len(rows), generator=generator)[:size]].double()
                for rows in (reference, samples))
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        # Within a set only pairs of two different points count.
        within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
        estimates.append(within / (size * (size - 1)) - 2 * xy.mean())
    estimates = torch.stack(estimates)
    return estimates.mean().item(), estimates.std(correction=0).item()


def precision_recall(reference, samples, k=3):
    """(precision, recall) of features [n, d] and [m, d]; arXiv 1904.06991.

    Around each point lies a ball that reaches to the k-th nearest other point of its set. Precision
    is the share of samples in a ball of the reference, recall the other way round.
    """
    if min(len(reference), len(samples)) <= k:
        raise UserError(f"precision and recall with k = {k} need at least {k + 1} images per side")

    def share(x, y):  # of the points x that lie in a ball of y
        x, y = x.double(), y.double()
        rows = max(1, 6_000_000 // len(y))  # 50 MB of distances at once
        radius = [torch.cdist(part, y).kthvalue(k + 1).values for part in y.split(rows)]
        # Of more than k equal points the ball has radius 0, and distances are rounding errors.
        radius = torch.cat(radius).maximum(1e-6 * y.norm(dim=1))
        inside = [(torch.cdist(part, y) <= radius).any(dim=1) for part in x.split(rows)]
        return torch.cat(inside).sum().item() / len(x)

    return share(samples, reference), share(reference, samples)


# ---- FID during training, and the command

def open_side(spec, resolution=None):
    """(`Statistics` or None, `Dataset` or None): what the file or data set `spec` holds."""
    names, kind = set(), spec.lower()
    if kind.endswith(".pkl"):
        with files.reading(spec, "a reference of EDM2 with mu and sigma under `fid`"):
            found = files.read_pickle(spec)["fid"]
            return Statistics(found["mu"], found["sigma"], INCEPTION_TAG, name=spec), None
    if kind.endswith(".npz") and Path(spec).is_file():
        with files.reading(spec, "a readable .npz of images or statistics"), np.load(spec) as file:
            names = set(file.files)
    given = Statistics.load(spec) if "mu" in names else None
    bare = given and not names & {"arr_0", "images"}
    return given, None if bare else data.load(spec, resolution=resolution)


def training_fid(args, dataset, run, net, write_networks):
    """Function that measures and logs the FID of `net` when due, and writes the best networks."""
    if not args.fid_every:
        return lambda: None
    rt, given, images = run.rt, None, dataset
    extractor = load_extractor(rt, args.fid_features, args.inception)
    decode, size, channels = data.to_uint8, dataset.resolution, dataset.channels
    if dataset.is_latent:
        decode, size, channels = sample.latent_decoder(rt.device, args.vae), 8 * size, 3
    if args.fid_reference:
        crop = size if dataset.is_latent else args.resolution
        given, images = rt.main_first(lambda: open_side(args.fid_reference, crop))
    drawn = data.Dataset("the generator", np.zeros((2, size, size, channels), np.uint8))
    # What does not fit together is told now, not after days of training.
    check_images(extractor, images, given, drawn)
    reference = given or reference_statistics(extractor, images, rt)

    def read(indices):
        return decode(sample.generate(net, *sample.inputs(net, indices, args.seed, rt.device)))

    # Values compare only with those measured alike: these flags may change when a run resumes.
    how = {"features": extractor.tag, "images": args.fid_images,
           "reference": Path(reference.name).name}  # the folder may move

    def measure_fid():
        if run.due(args.fid_every):
            value = frechet_distance(measure(extractor, read, args.fid_images, rt)[0], reference)
            before = [line["fid"] for line in run.log if line.items() >= how.items()]
            if rt.is_main and value < min(before, default=math.inf):
                write_networks("-best", fid=value)
            name = distance_name(extractor.tag)
            run.write({"fid": value, **how}, f"{name} {value:.4g} of {args.fid_images} samples")

    done = any("fid" in line for line in run.log if line["nimg"] == run.nimg)
    if rt.agree(rt.is_main and not done):  # the run was stopped before it
        measure_fid()
    return measure_fid


def main():
    parser = training.Parser(__doc__, dict(
        features=SETTINGS["fid_features"],
        inception=SETTINGS["inception"],
        count=(None, "at most so many images a side, chosen at random (default: all)",
               AT_LEAST_TWO),
        device=training.DEVICE,
        json=(False, "print one line of JSON instead of text"),
        resolution=training.SHARED_SETTINGS["resolution"],
        save_stats=(None, "write the statistics of REFERENCE to this .npz", str)))
    parser.add_argument("samples", metavar="SAMPLES", help="images or statistics")
    parser.add_argument("reference", metavar="REFERENCE", help="the same, often the training set")
    args = parser.parse_args()
    if args.save_stats and not args.save_stats.endswith(".npz"):
        parser.error(f"--save-stats {args.save_stats}: the name must end in .npz")
    rt = training.Runtime(args.device)

    # Find all that can be wrong before the features are computed, which may take an hour.
    if args.save_stats and rt.is_main:
        files.check_writable(args.save_stats)
    specs = (args.samples, args.reference)
    sides = [rt.main_first(lambda: open_side(spec, args.resolution)) for spec in specs]
    if any(images for _, images in sides):  # two files of statistics need no network
        extractor = load_extractor(rt, args.features, args.inception)
        check_images(extractor, *sides[0], *sides[1])

    def measured(name, given, images):
        if not images:
            return given, None
        if given or name == "reference" and not args.count:
            found = reference_statistics(extractor, images, rt)
            return dataclasses.replace(given, rows=found.rows) if given else found, None
        return measure_dataset(extractor, images, rt, args.count, name)

    a, score = measured("samples", *sides[0])
    b, _ = measured("reference", *sides[1])
    if not rt.is_main:
        return

    rows, pairs = [side.rows for side in (b, a)], [None] * 4
    if all(x is not None and len(x) > 3 for x in rows):
        rows = [torch.from_numpy(x).to(rt.device) for x in rows]
        pairs = *kernel_distance(*rows), *precision_recall(*rows)
    keys = "fid is_mean is_std kid_mean kid_std precision recall n_samples n_reference features"
    values = frechet_distance(a, b), *(score or [None] * 2), *pairs, a.n, b.n, a.features
    result, name = dict(zip(keys.split(), values)), distance_name(a.features)
    for side, (given, images) in zip((a, b), sides):
        if given and images:
            print(f"note: {side.name}: FID of its mu and sigma; KID, precision and recall of its "
                  f"{len(images):,} images", file=sys.stderr)
        if name == "FID" and side.n and side.n < PUBLISHED_COUNT:
            print(f"warning: {side.name}: {side.n} images; published numbers use "
                  f"{PUBLISHED_COUNT:,}, and fewer give a larger FID", file=sys.stderr)
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{name} of {a.name} from {b.name}")
        for key, value in result.items():
            if value is not None:
                print(f"{key:13}{value:.5g}" if isinstance(value, float) else f"{key:13}{value}")
    if args.save_stats:
        b.save(args.save_stats)


if __name__ == "__main__":
    training.run(main)
