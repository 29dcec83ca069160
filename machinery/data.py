"""Data sets in, pictures out.

`load(spec)` reads every kind of data set into one `Dataset`: the embedded digits, MNIST-family IDX folders, CIFAR-10,
folders and zips of images or of EDM2 latents, and `.npz` batches. Images stay uint8 [N, H, W, C]. What is larger than
`MEMORY_LIMIT` is memory-mapped, so memory use does not grow with the data set: an uncompressed `.npz` where it lies,
others from the cache folder, into which they are converted once. Transparent images (alpha channels and transparent
colours of PNG, WebP and BMP) are put on white. With `resolution` the middle of each image is cut out and resized.
`Batches` gives each rank its share of the shuffled data, `save_grid` and `write_images` write what was generated.
Nothing in a file that is read here is ever executed.
"""

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
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from machinery.files import NUMPY_STAND_INS, UserError, atomic, cache_dir, download, lock, read_pickle, reading, remove_parts, status
from machinery.training import rng

DIGITS = Path(__file__).parent.parent / "assets" / "digits.npz"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
DOWNLOADS = {  # address, {file: MD5}
    "cifar10": ("https://www.cs.toronto.edu/~kriz/", {"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"}),
    "fashion-mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    }),
}  # fmt: skip
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
MEMORY_LIMIT = 256 * 2**20  # bytes; larger sets are memory-mapped, where they lie or from the cache
RESIZE = "--resolution N cuts out the middle of each and resizes it"

# EDM2's statistics of the Stable Diffusion latents, per channel; networks see latents of standard deviation 0.5.
LATENT_MEAN, LATENT_STD, LATENT_SCALE = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28), 0.5


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
        with reading(self.name, "a data set"):
            _check_shape(self.images.shape, self.images.dtype)
            if self.labels is not None:
                if self.labels.shape != self.images.shape[:1]:
                    raise UserError(f"labels {list(self.labels.shape)} do not match {len(self)} images; give one per image")
                if self.labels.dtype.kind not in "iu" or self.labels.min() < 0:
                    raise UserError("the labels are not integers from 0 on; correct them")
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
            for i in range(0, len(self), 64):
                digest.update(self.images[i:i + 64].tobytes())
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
        """The next batch as networks see it, on the device of `draw` (a `training.Draw`), which gives what is random in it.

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


def load(spec, cache=None, resolution=None):
    """The data set that `spec` names.

    spec: `digits`, `fashion-mnist`, `cifar10`, or the path of an IDX folder, of CIFAR-10's tar.gz, of a folder or zip
        of images (optional `dataset.json` with labels) or of EDM2 latents (`.npy`), or of a `.npz` with uint8 images
        (`images` or `arr_0`) and optional labels (`labels` or `arr_1`). IDX and CIFAR-10 give the training set;
        `:test` at the end of `spec` asks for the test set.
    cache: folder for what is downloaded or converted; the default is `files.cache_dir()`.
    resolution: cut the largest square out of the middle of each image and resize it to so many pixels (Lanczos), as the
        dataset tool of EDM does with `--transform=center-crop`.
    """
    name, cache = str(spec), Path(cache) if cache else cache_dir()
    source, test = name.removesuffix(":test"), name.endswith(":test")
    path = DIGITS if source == "digits" else _fetch(source, cache) if source in DOWNLOADS else Path(source).expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; a data set is digits, fashion-mnist, cifar10 or a path")
    with reading(path, "a data set", "delete it and get it again" if source in DOWNLOADS else "get it again"):
        listing = _list_folder(path) if path.is_dir() else [(path.name, path.stat().st_size, path.stat().st_mtime_ns)]
        key = hashlib.sha256(repr((os.path.abspath(path), test, resolution, listing)).encode()).hexdigest()[:16]
        whole = cache / "datasets" / f"{path.stem}-{key}"
        if whole.is_dir():
            return Dataset(name, *_open_cache(whole))
        if any(file.startswith(("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")) for file, *_ in listing):
            images, labels = _load_idx(path, "t10k" if test else "train")
        elif path.name.endswith((".tar.gz", ".tgz")):
            images, labels = _load_cifar10(path, test)
        elif test:
            raise UserError(f"{name}: only IDX folders and CIFAR-10 have a test set; leave out :test")
        elif path.suffix == ".npz":
            images, labels = _load_npz(path, whole, resolution)
        elif path.is_dir() or path.suffix == ".zip":
            images, labels = _load_files(path, [file for file, *_ in listing], whole, resolution)
        else:
            raise UserError("not a data set; give a folder, a .zip, a .npz or CIFAR-10's .tar.gz")
        if resolution and images.dtype == np.uint8 and images.shape[1:3] != (resolution, resolution):
            images, labels = _convert(path, images, len(images), lambda image: _fit(_to_pillow(image), resolution), labels, whole)
    return Dataset(name, images, labels)


def _fetch(name, cache):
    """Where the data set `name` is, after its files were downloaded if they are missing."""
    url, hashes = DOWNLOADS[name]
    if name == "fashion-mnist" and all((FASHION_MNIST / file).exists() for file in hashes):
        return FASHION_MNIST
    folder = cache / name if len(hashes) > 1 else cache
    for file, md5 in hashes.items():
        if not (folder / file).exists():
            download(url + file, folder / file, "md5", md5)
    return folder if len(hashes) > 1 else folder / file


def _list_folder(folder):
    """Sorted (name, bytes, time) of the files below `folder` that can be part of a data set."""
    def refuse(error):
        raise error

    files = []
    for parent, _, names in os.walk(folder, onerror=refuse, followlinks=True):
        for name in names:
            short = Path(parent, name).relative_to(folder).as_posix()
            if short == "dataset.json" or short.lower().endswith((*IMAGE_SUFFIXES, ".npy", "-ubyte", "-ubyte.gz")):
                stat = os.stat(os.path.join(parent, name))
                files.append((short, stat.st_size, stat.st_mtime_ns))
    return sorted(files)


def _check_shape(shape, dtype):
    """Refuse arrays that no network here takes: shape [N, ...]."""
    latents = dtype == np.float32 and len(shape) == 4 and shape[1] == 8 and shape[2] == shape[3]
    if not latents and not (dtype == np.uint8 and len(shape) == 4 and shape[3] in (1, 3)):
        raise UserError(f"{dtype} {list(shape)}; expected images, uint8 [N, H, W, 1 or 3], or latents, float32 [N, 8, h, h]")
    if min(shape) < 1:
        raise UserError("holds no images; give others")
    if not latents and shape[1] != shape[2]:
        raise UserError(f"{shape[2]}x{shape[1]} (width x height), but the networks need squares; {RESIZE}")


def _load_idx(folder, split):
    """MNIST's format: a big-endian header (magic number, lengths), then bytes."""
    arrays = []
    for kind, magic, ndim in (("images-idx3", 0x803, 3), ("labels-idx1", 0x801, 1)):
        path = folder / f"{split}-{kind}-ubyte"
        path = path if path.exists() else path.with_name(path.name + ".gz")
        if not path.exists():
            raise UserError(f"{path}: no such file; an IDX data set needs its images and its labels in one folder")
        unpacked = gzip.open if path.suffix == ".gz" else open
        with reading(path, "an IDX file", "delete it and get it again"), unpacked(path, "rb") as file:
            data = file.read()
            header = [int.from_bytes(data[i:i + 4], "big") for i in range(0, 4 + 4 * ndim, 4)]
            if header[0] != magic:
                raise ValueError(f"magic number {header[0]:#010x}, expected {magic:#010x} for {kind[:6]}")
            arrays.append(np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(header[1:]))
    images, labels = arrays
    return images[..., None], labels.astype(np.int64)


def _load_cifar10(path, test):
    """The official tar.gz of Python 2 pickles, which are read without executing anything."""
    wanted, found = ["test_batch"] if test else [f"data_batch_{i}" for i in range(1, 6)], {}
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            name = Path(member.name).name
            if name not in wanted or not member.isfile():
                continue
            with reading(f"{path}: {name}", "a CIFAR-10 batch", "delete it and get it again"):
                batch = read_pickle(tar.extractfile(member), NUMPY_STAND_INS, f"{path}: {name}", encoding="bytes")
                data, labels = batch[b"data"].array(), batch[b"labels"]
                if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
                    raise ValueError(f"`data` is {data.dtype} {list(data.shape)}, expected uint8 [n, 3072]")
                if not isinstance(labels, list) or len(labels) != len(data) or not all(_is_class(y) for y in labels):
                    raise ValueError(f"`labels` do not match; expected {len(data)} integers from 0 on")
            found[name] = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(labels, np.int64)
    if missing := [name for name in wanted if name not in found]:
        raise UserError(f"has no {missing[0]}; expected CIFAR-10's python version, which --data cifar10 downloads")
    images, labels = zip(*(found[name] for name in wanted))
    return np.ascontiguousarray(np.concatenate(images)), np.concatenate(labels)


def _is_class(label):
    return type(label) is int and 0 <= label < 2**31


def _load_npz(path, whole, resolution):
    """A sample batch, uint8 [N, H, W, C] or [N, H, W]. A large one is mapped where it lies, unless it is compressed."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        key = next((key for key in ("images.npy", "arr_0.npy") if key in names), None)
        if key is None and "mu.npy" in names:
            raise UserError("holds statistics (mu, sigma), not images; it can only be a reference for FID")
        if key is None:
            raise UserError(f"has no array `arr_0` or `images`, only {sorted(names)}; give another file")
        labels = next((name for name in ("labels.npy", "arr_1.npy") if name in names), None)
        if labels:
            with archive.open(labels) as member:
                labels = np.lib.format.read_array(member, allow_pickle=False)
        with archive.open(key) as member:
            old = np.lib.format.read_magic(member) == (1, 0)
            read_header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read_header(member)
            shape, order = shape if len(shape) != 3 else (*shape, 1), "F" if fortran else "C"
            size = math.prod(shape)
            _check_shape((*shape[:1], resolution, resolution, *shape[3:]) if resolution else shape, dtype)
            info, start = archive.getinfo(key), member.tell()
            if info.file_size != start + size:
                raise ValueError(f"{key} has {info.file_size - start} bytes for the shape {list(shape)}")
            if size <= MEMORY_LIMIT or fortran and info.compress_type != zipfile.ZIP_STORED:
                return np.frombuffer(member.read(), np.uint8).reshape(shape, order=order), labels
            if info.compress_type != zipfile.ZIP_STORED:
                images = (np.frombuffer(member.read(size // shape[0]), np.uint8).reshape(shape[1:]) for _ in range(shape[0]))
                return _convert(path, images, shape[0], lambda image: _fit(_to_pillow(image), resolution), labels, whole)
            while member.read(2**24):  # to the end, where zipfile compares the check sum
                pass
        archive.fp.seek(info.header_offset + 26)  # of the header before the member: 30 bytes, then two texts
        lengths = np.frombuffer(archive.fp.read(4), "<u2")
        start += info.header_offset + 30 + int(lengths.sum())
        return np.memmap(path, np.uint8, "r", start, shape, order), labels


# ---------------------------------------------------------------------------------------------------------
# Folders and zips: one file per image.


def _load_files(path, names, whole, resolution):
    """A folder or zip of images or latents: (images, labels), in the order of the names. `names`: those in the folder."""
    with contextlib.nullcontext() if path.is_dir() else zipfile.ZipFile(path) as archive:
        names = sorted(set(archive.namelist())) if archive else names
        names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]  # hidden files
        images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
        latents = [name for name in names if name.lower().endswith(".npy")]
        if images and latents:
            raise UserError(f"holds both images ({images[0]}) and latents ({latents[0]}); give one kind")
        if not images and not latents:
            raise UserError(f"no images in it ({' '.join(IMAGE_SUFFIXES)}) and no latents (.npy); give another")
        if latents and resolution:
            raise UserError("latents cannot be resized; leave out --resolution")

        def read(name):
            return archive.read(name) if archive else (path / name).read_bytes()

        def decode(name, colour=False):
            with reading(f"{path}/{name}", "an image" if images else "a latent (.npy)", "replace it or remove it"):
                file = io.BytesIO(read(name))
                array = _decode_image(file, resolution, colour) if images else np.lib.format.read_array(file, allow_pickle=False)
                _check_shape((1, *array.shape), array.dtype)
                return array

        labels = None
        if "dataset.json" in names:
            form = 'of the form {"labels": [["img.png", 3], ...]} or {"labels": null}'
            with reading(f"{path}/dataset.json", form, "correct it or remove it"):
                labels = _read_labels(read("dataset.json"), images or latents)
        names = images or latents
        try:
            return _convert(path, names, len(names), decode, labels, whole)
        except _Colour:  # all become RGB
            return _convert(path, names, len(names), functools.partial(decode, colour=True), labels, whole)


def _read_labels(text, names):
    """Labels int64 [N] in the order of `names` from the text of a dataset.json, or None where it has none."""
    labels = json.loads(text)["labels"]
    if labels is None:
        return None
    labels = {name: label for name, label in labels}
    for name in names:
        if name not in labels:
            raise UserError(f'no label for {name}; give every image one, or {{"labels": null}}')
        if not _is_class(labels[name]):
            raise UserError(f"the label of {name} is {labels[name]!r}; expected an integer from 0 on")
    if len(labels) != len(names):
        extra = min(labels.keys() - set(names))
        raise UserError(f"{len(labels)} labels for {len(names)} images; there is no {extra}")
    return np.array([labels[name] for name in names], np.int64)


def _decode_image(file, resolution, colour):
    """An image file -> uint8 [H, W, C], C = 1 if it is stored in gray and `colour` is not asked for, else 3."""
    try:
        image = Image.open(file, formats=("PNG", "JPEG", "BMP", "WEBP"))
    except UnidentifiedImageError:
        raise UserError("not a PNG, JPEG, BMP or WebP image; replace it or remove it") from None
    if image.mode[0] in "IF":  # Pillow would clip 16 bits to 8
        raise UserError("has more than 8 bits per channel; convert it to 8 bits")
    if image.format == "PNG" and image.width * image.height > 8 * 1032 * file.getbuffer().nbytes:  # as far as deflate goes
        raise UserError("damaged: more pixels than a file of this size can hold; replace it or remove it")
    mode = "L" if image.mode in ("1", "L", "LA") and not colour else "RGB"
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return _fit(image.convert(mode), resolution)


def _fit(image, resolution):
    """A Pillow image as uint8 [H, W, C]; with `resolution` the square in its middle, resized."""
    if resolution:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((resolution, resolution), Image.Resampling.LANCZOS)
    array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]


# ---------------------------------------------------------------------------------------------------------
# Conversion: into memory, or if the result is large into a folder of the cache, with images.npy and perhaps labels.npy.
# The folder is there as a whole or not at all.


class _Colour(Exception):
    """A set holds both gray images and images in colour."""


def _convert(path, items, count, decode, labels, whole):
    """(images, labels) of the `count` arrays that `decode` makes of `items`. `whole`: the folder of the cache."""
    arrays = _decode_all(path, items, count, decode)
    first = next(arrays)
    arrays = itertools.chain([first], arrays)
    if count * first.nbytes <= MEMORY_LIMIT:
        return np.fromiter(arrays, np.dtype((first.dtype, first.shape)), count), labels
    # Another process, perhaps on another machine with the same cache, may be making the same.
    held = lock(whole.parent.with_name("locks") / whole.name, whole, wait=True)
    with held or contextlib.nullcontext():
        if whole.is_dir():
            return _open_cache(whole)
        if held:
            remove_parts(whole.parent, whole.name)
        print(f"converting {path} to {whole} (once)", file=sys.stderr, flush=True)
        try:
            with atomic(whole) as part:
                part.mkdir(exist_ok=True)  # without locks a killed process may have left one
                with open(part / "images.npy", "wb") as file:  # not through a memory map, where a full disk is a crash
                    _write_npy_header(file, (count, *first.shape), first.dtype)
                    for array in arrays:
                        file.write(array.tobytes())
                if labels is not None:
                    np.save(part / "labels.npy", labels)
        except OSError as error:
            if not whole.is_dir():  # without locks another process can have finished the same conversion first
                error.filename = error.filename or error.errno and str(whole)
                raise
    return _open_cache(whole)


def _decode_all(path, items, count, decode):
    """Yield `decode(item)` in order, all of one shape. A few threads share the work (Pillow lets them run side by side)."""
    items, first, done = iter(items), None, 0
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        while some := list(itertools.islice(items, 256)):  # no more than these are held at a time
            for item, array in zip(some, pool.map(decode, some)):
                first, shape = (item, array.shape) if first is None else (first, shape)
                if array.dtype == np.uint8 and array.shape[2] != shape[2]:
                    raise _Colour
                if array.shape != shape:
                    raise UserError(f"{path}/{item}: {list(array.shape)}, but {first} has {list(shape)}; all must be of one "
                                    f"size{f': {RESIZE}' if array.dtype == np.uint8 else ''}")
                yield array
            done += len(some)
            status(f"reading {path}: {done} / {count}", "\n" * (done == count))


def _open_cache(whole):
    with reading(whole, "a converted data set", "delete this folder and it will be made again"):
        labels = whole / "labels.npy"
        return np.load(whole / "images.npy", mmap_mode="r"), np.load(labels) if labels.exists() else None


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


def save_panels(sets, path, side=8, scale=1):
    """Write one PNG that shows the first side x side images of each of `sets` (uint8 [N, H, W, C]) next to one another.

    If a set has fewer, all panels are smaller.
    """
    sets = list(sets)
    side = min(side, *(math.isqrt(len(images)) for images in sets))
    panels = [images[: side**2].reshape(side, side, *images.shape[1:]) for images in sets]
    gap = np.full_like(panels[0][:, :1], 255)
    rows = np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=1)
    save_grid(rows.reshape(-1, *rows.shape[2:]), path, columns=rows.shape[1], scale=scale, padding=1)


def write_images(batches, out, count):
    """Write `count` images, streamed: memory use does not grow with their number. `load(out)` reads them again.

    batches: iterable of (images, labels): uint8 [n, H, W, C], or float32 [n, 4, h, w] for latents; int [n] or None.
    out: a path ending in .npz, for one file with `arr_0` (`latents` for latents) and, with labels, `arr_1`;
        or a new or empty folder, for PNG files and, with labels, a dataset.json.
    """
    out, labels, written = Path(out), [], 0
    if out.suffix != ".npz" and out.exists() and not (out.is_dir() and not any(out.iterdir())):  # before the first batch
        raise UserError(f"{out}: exists already; give a new folder, or remove this one")

    def images():
        nonlocal written
        for batch, batch_labels in batches:
            written += len(batch)
            labels.extend([] if batch_labels is None else [int(label) for label in batch_labels])
            yield batch

    with atomic(out) as part:
        (_write_npz if out.suffix == ".npz" else _write_folder)(images(), labels, part, count)
        assert written == count, (written, count)


def _write_npz(batches, labels, part, count):
    """Write arrays [n, ...] that together have `count` rows; `labels` is complete after the last of them."""
    first = next(batches)
    with zipfile.ZipFile(part, "w") as archive:
        with archive.open("arr_0.npy" if first.dtype == np.uint8 else "latents.npy", "w", force_zip64=True) as member:
            _write_npy_header(member, (count, *first.shape[1:]), first.dtype)
            for batch in itertools.chain([first], batches):
                member.write(batch.tobytes())
        if labels:
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, np.array(labels, np.int64))


def _write_folder(batches, labels, part, count):
    part.mkdir()
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(count)]  # a thousand per folder keeps listings quick
    for image, name in zip(itertools.chain.from_iterable(batches), names):
        if image.dtype != np.uint8:
            raise UserError("latents can only be written to a .npz file; give --out a name that ends in .npz")
        (part / name).parent.mkdir(exist_ok=True)
        _to_pillow(image).save(part / name)
    if labels:
        (part / "dataset.json").write_text(json.dumps({"labels": list(zip(names, labels))}))


def _to_pillow(image):  # uint8 [H, W, C]; Pillow wants gray images without a channel axis
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
