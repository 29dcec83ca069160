"""Data sets in, pictures out.

`load(spec)` reads every kind of data set into one `Dataset`: the embedded digits, MNIST-family IDX folders, CIFAR-10,
folders and zips of images or of EDM2 latents, and `.npz` batches. Images stay uint8 [N, H, W, C]. A folder, zip or
`.npz` larger than `MEMORY_LIMIT` is converted once to a memory-mapped file in the cache folder, so memory use does
not grow with the data set. `Batches` gives each rank its share of the shuffled data, `save_grid` and `write_images`
write what was generated. Nothing in a file that is read here is ever executed.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from files import NUMPY_STAND_INS, PickledArray, UserError, atomic, cache_dir, download, read_pickle
from runtime import rng

DIGITS = Path(__file__).parent / "assets" / "digits.npz"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_MD5 = "c58f30108f718f92721af3b95e74349a"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
MEMORY_LIMIT = 256 * 2**20  # bytes; larger folders, zips and .npz files are memory-mapped from the cache

# EDM2's statistics of the Stable Diffusion latents, per channel; networks see latents of standard deviation 0.5.
LATENT_MEAN, LATENT_STD, LATENT_SCALE = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28), 0.5

_READ_ERRORS = (ValueError, EOFError, KeyError, RuntimeError, zlib.error, zipfile.BadZipFile, gzip.BadGzipFile,
                tarfile.TarError)  # what zipfile, gzip, tarfile and numpy raise on damaged files


@dataclasses.dataclass(eq=False)
class Dataset:
    """Images or latents with optional class labels.

    images: uint8 [N, H, W, C] with C = 1 or 3, or float32 [N, 8, h, w]: per image the mean (first 4 channels) and
        standard deviation (last 4) of its VAE latent. In memory or memory-mapped.
    labels: int64 [N], classes counted from 0, or None.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray = None
    _fingerprint: str = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self):
        _check_shape(self.name, self.images.shape, self.images.dtype)
        if self.labels is not None:
            if self.labels.shape != self.images.shape[:1]:
                raise UserError(f"{self.name}: labels {list(self.labels.shape)} do not match {len(self)} images; "
                                "give one per image")
            if self.labels.dtype.kind not in "iu" or self.labels.min() < 0:
                raise UserError(f"{self.name}: the labels must be integers from 0 on")
            self.labels = np.asarray(self.labels, np.int64)

    def __len__(self):
        return len(self.images)

    @property
    def is_latent(self):
        return self.images.dtype == np.float32

    @property
    def resolution(self):
        """Height = width of what a network sees."""
        return self.images.shape[2]

    @property
    def channels(self):
        """Channels of what a network sees: 1 or 3 for images, 4 for latents."""
        return self.images.shape[1] // 2 if self.is_latent else self.images.shape[3]

    @property
    def label_dim(self):
        """Number of classes, 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def fingerprint(self):
        """SHA-256 (hexadecimal) of the shape, the type and the content of `images`."""
        if self._fingerprint is None:
            digest = hashlib.sha256(f"{self.images.shape} {self.images.dtype.str}".encode())
            for i in range(0, len(self), 1024):
                digest.update(self.images[i:i + 1024].tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def batch(self, indices):
        """(raw, labels) at `indices` (any order, repeats allowed), on the CPU.

        raw: uint8 [n, H, W, C] or float32 [n, 8, h, w]; labels: int64 [n] or None.
        """
        indices = np.asarray(indices)
        labels = None if self.labels is None else torch.from_numpy(self.labels[indices])
        return torch.from_numpy(self.images[indices]), labels

    def to_model(self, raw, device, flip=None, eps=None):
        """What a network sees of a raw batch: float32 [n, C, H, W] on `device`.

        Images: scaled to [-1, 1], mirrored left-right where `flip` (bool [n]) says so. Latents: mean + std * eps with
        `eps` standard normal [n, 4, h, w] (the mean alone without it), normalised.
        """
        raw = raw.to(device, non_blocking=True)  # images travel as bytes and are converted there
        if self.is_latent:
            if flip is not None:
                raise UserError(f"{self.name}: latents cannot be flipped; leave out the horizontal flips")
            mean, std = raw.chunk(2, dim=1)
            return normalise_latents(mean if eps is None else mean + std * eps.to(device))
        x = raw.permute(0, 3, 1, 2)  # NHWC bytes seen as NCHW: channels-last without a copy
        if flip is not None:
            x = torch.where(flip.to(device).view(-1, 1, 1, 1), x.flip(3), x)
        return x.to(torch.float32) / 127.5 - 1


def to_uint8(x):
    """Images x [N, C, H, W] in [-1, 1] as numpy uint8 [N, H, W, C]: the inverse of `Dataset.to_model`."""
    x = (x.detach().float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return x.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def normalise_latents(latents):
    """VAE latents [n, 4, h, w] -> what a network sees, of standard deviation 0.5 per channel."""
    mean, std = _latent_statistics(latents.device)
    return (latents - mean) / std * LATENT_SCALE


def denormalise_latents(x):
    """The inverse of `normalise_latents`: [n, 4, h, w], ready for the VAE's decoder."""
    mean, std = _latent_statistics(x.device)
    return x / LATENT_SCALE * std + mean


@functools.cache
def _latent_statistics(device):
    """LATENT_MEAN and LATENT_STD as [1, 4, 1, 1], once per device: each copy from a list would make the GPU wait."""
    return [torch.tensor(values, device=device).view(1, 4, 1, 1) for values in (LATENT_MEAN, LATENT_STD)]


class Batches:
    """Endless iterator over this rank's share of the global batches: (raw, labels) as `Dataset.batch` gives them.

    Image n of the run (counted from 0 over the whole run) is element n % N of a permutation that depends on
    (seed, n // N) alone. So the order is a function of the number of images seen: a run continues with `start` =
    images seen so far, and the ranks' shares, concatenated, are the batch that one rank would get. A background
    thread prepares one batch ahead. `pin` asks for page-locked memory, from which copies to a GPU overlap with its work.
    """

    def __init__(self, dataset, batch, seed, start=0, rank=0, world_size=1, pin=False):
        if batch < 1 or batch % world_size:
            raise UserError(f"a batch of {batch} does not divide among {world_size} ranks")
        self.dataset, self.batch, self.seed, self.pin = dataset, batch, seed, pin
        self.share = batch // world_size
        self.position = start + rank * self.share  # of this rank's next image
        self.epoch, self.permutation = None, None
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        self.next = self.thread.submit(self._prepare, self.position)

    def __iter__(self):
        return self

    def __next__(self):
        batch = self.next.result()
        self.position += self.batch
        self.next = self.thread.submit(self._prepare, self.position)
        return batch

    def training_batch(self, draw, xflip):
        """The next batch as networks see it, on the device of `draw` (a `runtime.Draw`), which gives what is random in it.

        Returns x float32 [n, C, H, W], half of it mirrored if `xflip`, and labels int64 [n] or None.
        """
        raw, labels = next(self)
        flip = draw.coin() if xflip else None
        eps = draw.normal(self.dataset.channels, *raw.shape[2:]) if self.dataset.is_latent else None
        x = self.dataset.to_model(raw, draw.device, flip, eps)
        return x, None if labels is None else labels.to(draw.device, non_blocking=True)

    def _prepare(self, position):
        epochs, offsets = np.divmod(np.arange(position, position + self.share), len(self.dataset))
        indices = np.empty(self.share, np.int64)
        for epoch in np.unique(epochs):  # one epoch, two at a boundary, more if the batch exceeds the data set
            here = epochs == epoch
            indices[here] = self._permutation(int(epoch))[offsets[here]]
        raw, labels = self.dataset.batch(indices)
        if self.pin:
            raw, labels = raw.pin_memory(), None if labels is None else labels.pin_memory()
        return raw, labels

    def _permutation(self, epoch):
        if epoch != self.epoch:
            order = torch.randperm(len(self.dataset), generator=rng("cpu", self.seed, "data", epoch))
            self.epoch, self.permutation = epoch, order.numpy()
        return self.permutation


# ---------------------------------------------------------------------------------------------------------
# Reading.


def load(spec, cache=None):
    """The data set that `spec` names.

    spec: `digits`, `fashion-mnist`, `cifar10`, or the path of an IDX folder, of CIFAR-10's tar.gz, of a folder or zip
        of images (optional `dataset.json` with labels) or of EDM2 latents (`.npy`), or of a `.npz` with uint8 images
        (`images` or `arr_0`) and optional labels (`labels` or `arr_1`). IDX and CIFAR-10 give the training set;
        `:test` at the end of `spec` asks for the test set.
    cache: folder for what is downloaded or converted; the default is `files.cache_dir()`.
    """
    name, cache = str(spec), Path(cache) if cache else cache_dir()
    test = name.endswith(":test")
    source = name.removesuffix(":test")
    path = Path(source).expanduser()
    if source == "digits":
        path = DIGITS
    elif source == "fashion-mnist":
        path = FASHION_MNIST if FASHION_MNIST.is_dir() else cache / "fashion-mnist"
        if not path.is_dir():
            raise UserError("fashion-mnist is not installed; run `apt-get install dataset-fashion-mnist`, or give the "
                            f"folder that holds its four IDX files, or put them into {path}")
    elif source == "cifar10":
        path = cache / "cifar-10-python.tar.gz"
        if not path.exists():
            download(CIFAR10_URL, path, "md5", CIFAR10_MD5)

    if not path.exists():
        raise UserError(f"{path}: no such file or folder; a data set is digits, fashion-mnist, cifar10 or a path")
    if path.is_dir() and (any(path.glob("train-images-idx3-ubyte*")) or any(path.glob("t10k-images-idx3-ubyte*"))):
        return Dataset(name, *_load_idx(path, "t10k" if test else "train"))
    if path.name.endswith((".tar.gz", ".tgz")):
        return Dataset(name, *_load_cifar10(path, test))
    if test:
        raise UserError(f"{name}: only IDX folders and CIFAR-10 have a test set; leave out :test")
    if path.suffix == ".npz":
        return Dataset(name, *_load_npz(path, cache))
    if path.is_dir() or path.suffix == ".zip":
        return Dataset(name, *_load_files(path, cache))
    raise UserError(f"{path}: not a data set; give a folder, a .zip, a .npz or CIFAR-10's .tar.gz")


def _check_shape(what, shape, dtype):
    """Refuse arrays that no network here takes: shape [N, ...]."""
    latents = dtype == np.float32 and len(shape) == 4 and shape[1] == 8
    if not latents and not (dtype == np.uint8 and len(shape) == 4 and shape[3] in (1, 3)):
        raise UserError(f"{what}: {dtype} {list(shape)} is not a set of images; expected uint8 [N, H, W, 1 or 3]")
    if 0 in shape:
        raise UserError(f"{what}: holds no images")
    height, width = shape[2:] if latents else shape[1:3]
    if height != width:
        raise UserError(f"{what}: {width}x{height} (width x height), but the networks need squares; crop the images")


def _load_idx(folder, split):
    """MNIST's format: a big-endian header (magic number, lengths), then bytes."""
    arrays = []
    for kind, magic, ndim in (("images-idx3", 0x803, 3), ("labels-idx1", 0x801, 1)):
        path = folder / f"{split}-{kind}-ubyte"
        path = path if path.exists() else path.with_name(path.name + ".gz")
        if not path.exists():
            raise UserError(f"{path}: no such file; an IDX data set needs its images and its labels in one folder")
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                data = file.read()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: damaged or truncated gzip file ({error}); get it again") from None
        header = [int.from_bytes(data[i:i + 4], "big") for i in range(0, 4 + 4 * ndim, 4)]
        if header[0] != magic:
            raise UserError(f"{path}: not an IDX file of {kind[:6]} (magic {header[0]:#010x}, expected {magic:#010x})")
        shape, found = header[1:], len(data) - 4 - 4 * ndim
        if found != math.prod(shape):
            raise UserError(f"{path}: truncated or damaged: {found} bytes for the shape {shape}; get it again")
        arrays.append(np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape))
    images, labels = arrays
    return images[..., None], labels.astype(np.int64)


def _load_cifar10(path, test):
    """The official tar.gz of Python 2 pickles, which are read without executing anything."""
    wanted = ["test_batch"] if test else [f"data_batch_{i}" for i in range(1, 6)]
    found = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                name = Path(member.name).name
                if name in wanted and member.isfile():
                    found[name] = _read_cifar10_batch(tar.extractfile(member), f"{path}: {name}")
    except _READ_ERRORS as error:
        raise UserError(f"{path}: not a readable tar.gz ({error}); delete it and get it from {CIFAR10_URL}") from None
    for name in wanted:
        if name not in found:
            raise UserError(f"{path}: has no {name}; expected CIFAR-10's python version from {CIFAR10_URL}")
    images, labels = zip(*(found[name] for name in wanted))
    return np.concatenate(images), np.concatenate(labels)


def _read_cifar10_batch(file, what):
    batch = read_pickle(file, NUMPY_STAND_INS, what, encoding="bytes")
    data = batch.get(b"data") if isinstance(batch, dict) else None
    labels = batch.get(b"labels") if isinstance(batch, dict) else None
    try:
        data = data.array() if isinstance(data, PickledArray) else np.empty(0)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise UserError(f"{what}: not a CIFAR-10 batch; expected `data` as uint8 [n, 3072]")
    if not isinstance(labels, list) or len(labels) != len(data) or not all(_is_class(label) for label in labels):
        raise UserError(f"{what}: `labels` do not match; expected {len(data)} integers from 0 on")
    return np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), np.array(labels, np.int64)


def _is_class(label):
    return type(label) is int and 0 <= label < 2**31


def _load_npz(path, cache):
    """A sample batch: uint8 [N, H, W, C] or [N, H, W], read once, or memory-mapped from the cache if it is large."""
    stat = path.stat()
    whole = _cache_folder(path, [(stat.st_size, stat.st_mtime_ns)], cache)
    try:
        with zipfile.ZipFile(path) as archive:
            files = {name.removesuffix(".npy") for name in archive.namelist()}
            key = next((key for key in ("images", "arr_0") if key in files), None)
            if key is None and "mu" in files:
                raise UserError(f"{path}: holds statistics (mu, sigma), not images; it can only be a reference for FID")
            if key is None:
                raise UserError(f"{path}: has no array `arr_0` or `images`, only {sorted(files)}")
            with archive.open(f"{key}.npy") as member:
                old = np.lib.format.read_magic(member) == (1, 0)
                read_header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
                shape, _, dtype = read_header(member)
            if dtype != np.uint8:
                raise UserError(f"{path}: {key} is {dtype}; expected images as uint8, 0 to 255")
            _check_shape(f"{path}: {key}", shape if len(shape) != 3 else (*shape, 1), dtype)
            with np.load(path, allow_pickle=False) as arrays:
                labels = next((arrays[key] for key in ("labels", "arr_1") if key in files), None)
                images = arrays[key] if math.prod(shape) <= MEMORY_LIMIT else None
            if images is None and not whole.is_dir():
                with _new_cache(path, whole) as part, archive.open(f"{key}.npy") as member:
                    with open(part / "images.npy", "wb") as file:
                        shutil.copyfileobj(member, file, 2**20)
        if images is None:
            images, _ = _open_cache(whole)
    except _READ_ERRORS as error:
        raise UserError(f"{path}: not a readable .npz file ({error})") from None
    return images if images.ndim == 4 else images[..., None], labels


# ---------------------------------------------------------------------------------------------------------
# Folders and zips: one file per image, decoded by a few threads (Pillow lets them run side by side).


class _Colour(Exception):
    """A colour image came up in a set that was gray so far."""


def _load_files(path, cache):
    """A folder or zip of images or latents: (images, labels), in the order of the names."""
    if path.is_dir():
        files = _list_folder(path)  # the names with sizes and times, because a changed file must be seen
        whole = _cache_folder(path, files, cache)
    else:
        whole = _cache_folder(path, [(path.stat().st_size, path.stat().st_mtime_ns)], cache)
    if whole.is_dir():
        return _open_cache(whole)

    with contextlib.nullcontext() if path.is_dir() else _open_zip(path) as archive:
        if archive is None:
            names = [name for name, *_ in files]
        else:
            names = sorted(name for name in set(archive.namelist()) if not _is_hidden(name))

        def read(name):
            return (path / name).read_bytes() if archive is None else _read_member(archive, name, path)

        def decode(name):
            return (_decode_image if images else _decode_latent)(read(name), f"{path}/{name}")

        images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
        latents = [name for name in names if name.lower().endswith(".npy")]
        if images and latents:
            raise UserError(f"{path}: holds both images ({images[0]}) and latents ({latents[0]}); give one kind")
        if not images and not latents:
            raise UserError(f"{path}: no images in it ({' '.join(IMAGE_SUFFIXES)}) and no latents (.npy)")
        kept = images or latents
        labels = _read_labels(read("dataset.json"), kept, path) if "dataset.json" in names else None
        first = decode(kept[0])
        _check_shape(f"{path}/{kept[0]}", (1, *first.shape), first.dtype)
        try:
            return _convert(path, kept, decode, first, first.shape, labels, whole)
        except _Colour:  # all become RGB, from the first on
            return _convert(path, kept, decode, first, (*first.shape[:2], 3), labels, whole)


def _list_folder(folder):
    """Sorted (name, bytes, time) of the files below `folder`: images, latents and dataset.json."""
    def refuse(error):
        raise error

    files = []
    for parent, _, names in os.walk(folder, onerror=refuse, followlinks=True):
        inside = Path(parent).relative_to(folder).as_posix()
        for name in names:
            short = name if inside == "." else f"{inside}/{name}"
            wanted = short == "dataset.json" or short.lower().endswith((*IMAGE_SUFFIXES, ".npy"))
            if wanted and not _is_hidden(short):
                stat = os.stat(os.path.join(parent, name))
                files.append((short, stat.st_size, stat.st_mtime_ns))
    return sorted(files)


def _is_hidden(name):
    return any(part.startswith(".") for part in name.split("/"))


def _open_zip(path):
    try:
        return zipfile.ZipFile(path)
    except _READ_ERRORS as error:
        raise UserError(f"{path}: not a readable zip file ({error})") from None


def _read_member(archive, name, path):
    try:
        return archive.read(name)
    except _READ_ERRORS as error:
        raise UserError(f"{path}/{name}: cannot be read from the zip file ({error})") from None


def _read_labels(text, names, path):
    """Labels int64 [N] in the order of `names` from the text of a dataset.json, or None where it has none."""
    what = f"{path}/dataset.json"
    try:
        labels = json.loads(text)["labels"]
        labels = None if labels is None else {name: label for name, label in labels}
    except (ValueError, TypeError, KeyError):
        raise UserError(f'{what}: not of the form {{"labels": [["img.png", 3], ...]}} or {{"labels": null}}') from None
    if labels is None:
        return None
    for name in names:
        if name not in labels:
            raise UserError(f"{what}: no label for {name}; give every image one, or {{\"labels\": null}}")
        if not _is_class(labels[name]):
            raise UserError(f"{what}: the label of {name} is {labels[name]!r}; expected an integer from 0 on")
    if len(labels) != len(names):
        extra = min(labels.keys() - set(names))
        raise UserError(f"{what}: {len(labels)} labels for {len(names)} images; there is no {extra}")
    return np.array([labels[name] for name in names], np.int64)


def _decode_image(data, name):
    """The bytes of an image file -> uint8 [H, W, C], C = 1 if it is stored in gray, else 3."""
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "BMP", "WEBP"))
    except Image.DecompressionBombError as error:
        raise UserError(f"{name}: refused: {error}") from None
    except Exception:  # Pillow's readers fail in many ways on foreign bytes
        raise UserError(f"{name}: not a PNG, JPEG, BMP or WebP image; remove it or replace it") from None
    if image.mode[0] in "IF":  # Pillow would clip 16 bits to 8
        raise UserError(f"{name}: has more than 8 bits per channel; convert it to 8 bits")
    try:
        if image.mode in ("1", "L"):
            return np.asarray(image.convert("L"))[..., None]
        return np.asarray((image.convert("RGBA") if image.mode == "P" else image).convert("RGB"))
    except Exception as error:
        raise UserError(f"{name}: damaged or truncated image ({error})") from None


def _decode_latent(data, name):
    """The bytes of a .npy file -> float32 [8, h, w]."""
    try:
        latent = np.load(io.BytesIO(data), allow_pickle=False)
    except _READ_ERRORS as error:
        raise UserError(f"{name}: not a readable .npy file ({error})") from None
    if latent.dtype != np.float32 or latent.ndim != 3 or len(latent) != 8:
        raise UserError(f"{name}: {latent.dtype} {list(latent.shape)}; expected a latent: float32 [8, h, w]")
    return latent


def _convert(path, names, decode, first, shape, labels, whole):
    """Decode all files to arrays of `shape`: into memory, or into the cache folder `whole` if they are large."""
    arrays = _decode_all(path, names, decode, shape)
    if len(names) * math.prod(shape) * first.itemsize <= MEMORY_LIMIT:
        images = np.empty((len(names), *shape), first.dtype)
        for i, array in enumerate(arrays):
            images[i] = array
        return images, labels
    with _new_cache(path, whole) as part:
        with open(part / "images.npy", "wb") as file:  # not through a memory map, where a full disk is a crash
            _write_npy_header(file, (len(names), *shape), first.dtype)
            for array in arrays:
                file.write(array.tobytes())
        if labels is not None:
            np.save(part / "labels.npy", labels)
    return _open_cache(whole)


def _decode_all(path, names, decode, shape):
    """Yield the decoded files in order, each of `shape`. At most 256 are held at a time."""
    waiting, to_submit = collections.deque(), iter(names)
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for done, name in enumerate(names):
            while len(waiting) < 256 and (ahead := next(to_submit, None)):
                waiting.append(pool.submit(decode, ahead))
            array = waiting.popleft().result()
            if array.dtype == np.uint8 and array.shape[:2] == shape[:2] and array.shape[2] != shape[2]:
                if shape[2] == 1:
                    raise _Colour
                array = np.repeat(array, 3, axis=2)
            if array.shape != shape:
                raise UserError(f"{path}/{name}: {_size(array.shape)}, but {names[0]} has {_size(shape)}; "
                                "all must be of one size")
            if done % 1000 == 999 and sys.stderr.isatty():
                print(f"\rreading {path}: {done + 1} / {len(names)}", end="", file=sys.stderr, flush=True)
            yield array
    if len(names) >= 1000 and sys.stderr.isatty():
        print(file=sys.stderr)


def _size(shape):  # width x height of an image [H, W, C] or a latent [8, h, w]
    return f"{shape[2]}x{shape[1]}" if shape[2] > 3 else f"{shape[1]}x{shape[0]}"


# ---------------------------------------------------------------------------------------------------------
# The cache of converted data sets: a folder with images.npy and perhaps labels.npy, there as a whole or not at all.


def _cache_folder(path, listing, cache):
    """Where the converted data set is: its name depends on the source's path and on `listing`, its sizes and times."""
    path = Path(os.path.abspath(path))
    digest = hashlib.sha256(os.fsencode(path))
    for item in listing:
        digest.update(repr(item).encode())
    return cache / "datasets" / f"{path.stem}-{digest.hexdigest()[:16]}"


@contextlib.contextmanager
def _new_cache(path, whole):
    """Yield a temporary folder that becomes the cache folder `whole` if all goes well."""
    print(f"converting {path} to {whole} (once)", file=sys.stderr, flush=True)
    try:
        with atomic(whole) as part:
            part.mkdir(exist_ok=True)  # a killed process may have left one
            yield part
    except OSError:
        if not whole.is_dir():  # otherwise another process has finished the same conversion first
            raise


def _open_cache(whole):
    labels = whole / "labels.npy"
    try:
        return np.load(whole / "images.npy", mmap_mode="r"), np.load(labels) if labels.exists() else None
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{whole}: damaged cache ({error}); delete this folder and it will be made again") from None


def _write_npy_header(file, shape, dtype):
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(file, header)


# ---------------------------------------------------------------------------------------------------------
# Writing.


def save_grid(images, path, columns, scale=1, padding=2):
    """Write images (uint8 [N, H, W, C]) as one PNG, row by row, `columns` in a row.

    Each pixel becomes a square of `scale` pixels; `padding` white pixels separate the images.
    """
    count, height, width, channels = images.shape
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    step_y, step_x = height * scale + padding, width * scale + padding
    grid = np.full((-(-count // columns) * step_y + padding, columns * step_x + padding, channels), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * step_y + padding, i % columns * step_x + padding
        grid[y:y + height * scale, x:x + width * scale] = image
    with atomic(path) as part:
        _to_pillow(grid).save(part, format="PNG")  # the temporary name does not end in .png


def write_images(batches, out, count):
    """Write `count` images, streamed: memory use does not grow with their number. `load(out)` reads them again.

    batches: iterable of (images, labels): uint8 [n, H, W, C], or float32 [n, 4, h, w] for latents; int [n] or None.
    out: a path ending in .npz, for one file with `arr_0` (`latents` for latents) and, with labels, `arr_1`;
        or a new or empty folder, for PNG files and, with labels, a dataset.json.
    """
    out = Path(out)
    if out.suffix == ".npz":
        write = _write_npz
    else:
        write = _write_folder
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):  # asked before the first batch is made
            raise UserError(f"{out}: exists already; give a new folder, or remove this one")
    with atomic(out) as part:
        write(batches, part, count)


def _write_npz(batches, part, count):
    batches = iter(batches)
    images, labels = next(batches)
    all_labels, written = [], 0
    with zipfile.ZipFile(part, "w") as archive:
        with archive.open("arr_0.npy" if images.dtype == np.uint8 else "latents.npy", "w", force_zip64=True) as member:
            _write_npy_header(member, (count, *images.shape[1:]), images.dtype)
            for images, labels in itertools.chain([(images, labels)], batches):
                member.write(images.tobytes())
                written += len(images)
                all_labels += [] if labels is None else [int(label) for label in labels]
        if all_labels:
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, np.array(all_labels, np.int64))
    assert written == count, (written, count)


def _write_folder(batches, part, count):
    written, all_labels = 0, []
    part.mkdir()
    for images, labels in batches:
        if images.dtype != np.uint8:
            raise UserError("latents can only be written to a .npz file; give --out a name that ends in .npz")
        for i, image in enumerate(images):
            name = f"{written // 1000:05d}/img{written:08d}.png"  # a thousand per folder keeps listings quick
            (part / name).parent.mkdir(exist_ok=True)
            _to_pillow(image).save(part / name)
            written += 1
            all_labels += [] if labels is None else [[name, int(labels[i])]]
    if all_labels:
        (part / "dataset.json").write_text(json.dumps({"labels": all_labels}))
    assert written == count, (written, count)


def _to_pillow(image):  # uint8 [H, W, C]; Pillow wants gray images without a channel axis
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
