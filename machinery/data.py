"""Data sets in, pictures out. Nothing in a file is executed.

A data set is held in memory; a large folder or zip is converted once into the cache and mapped.
"""

import contextlib
import functools
import gzip
import hashlib
import io
import json
import os
import posixpath
import sys
import tarfile
import unicodedata
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features

from machinery.files import UserError, atomic, cache_dir, download, reading, status
from machinery.training import rng

DIGITS = Path(__file__).parent.parent / "assets" / "digits.npz"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package
DOWNLOADS = {  # address, {file: MD5}
    "cifar10": ("https://www.cs.toronto.edu/~kriz/",
                {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}),
    "fashion-mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    }),
}
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".gif", ".tif", ".tiff")
SUFFIXES += (".avif",) if features.check("avif") else ()
MEMORY_LIMIT = 256 * 2**20  # bytes; larger folders and zips are mapped
VERSION = 2  # of the cache; raise it when files are decoded to other pixels
RESIZE = "--resolution N cuts out the middle of each image and resizes it"

# EDM2's statistics of Stable Diffusion's latents, per channel; networks see a deviation of 0.5.
LATENT_MEAN, LATENT_STD, LATENT_SCALE = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28), 0.5


class Dataset:
    """Images or latents with optional class labels.

    images: uint8 [N, H, W, 1 or 3], or float32 [N, 8, h, w]: mean (first 4 channels) and standard
        deviation (last 4) of each image's VAE latent. labels: int64 [N], from 0 on, or None.
    classes: names of the classes, or None. label_error: why labels cannot be used, or None.
    """

    def __init__(self, name, images, labels=None, classes=None, label_error=None):
        _check(images)
        if labels is not None:
            fits = labels.shape == images.shape[:1] and labels.dtype.kind in "iu"
            if not fits or labels.min() < 0:
                raise UserError(f"labels {labels.dtype} {list(labels.shape)} do not match "
                                f"{len(images)} images; give each an integer from 0 on")
            labels = labels.astype(np.int64)
        self.name, self.images, self.labels = name, images, labels
        self.classes, self.label_error, self.hash = classes, label_error, None
        self.label_dim = 0 if labels is None else int(labels.max()) + 1  # number of classes
        self.is_latent = images.dtype == np.float32
        self.resolution = images.shape[2]  # height = width of what a network sees
        self.channels = 4 if self.is_latent else images.shape[3]

    def __len__(self):
        return len(self.images)

    def require_labels(self):
        """Refuse data without labels; renumber the classes if some have no images."""
        if self.labels is None:
            raise UserError(self.label_error or
                            f"{self.name} has no labels; add a dataset.json or class folders")
        found, labels = np.unique(self.labels, return_inverse=True)
        if len(found) < self.label_dim:
            self.labels, self.label_dim, self.classes = labels, len(found), list(map(str, found))
            _say(f"{self.name}: only classes {' '.join(self.classes)} have images; numbered from 0")

    def class_frequencies(self):
        """Number of images of each class."""
        return [] if self.labels is None else np.bincount(self.labels).tolist()

    def fingerprint(self):
        """SHA-256 (hexadecimal) of the shape, the type and the content of `images`."""
        if self.hash is None:
            digest = hashlib.sha256(f"{self.images.shape} {self.images.dtype.str}".encode())
            digest.update(np.ascontiguousarray(self.images).data.cast("B"))
            self.hash = digest.hexdigest()
        return self.hash

    def batch(self, indices):
        """(raw images [n, ...], labels int64 [n] or None) at `indices`, on the CPU."""
        indices = np.asarray(indices)
        labels = None if self.labels is None else torch.from_numpy(self.labels[indices])
        return torch.from_numpy(self.images[indices]), labels

    def to_model(self, raw, device, flip=None, eps=None):
        """What a network sees of a raw batch: float32 [n, C, H, W] on `device`.

        Images in [-1, 1], mirrored where `flip` (bool [n]) is true, or latents mean + std * eps
        with standard normal `eps` [n, 4, h, w] (None: the mean), normalised.
        """
        raw = raw.to(device, non_blocking=True)  # images travel as bytes
        if self.is_latent and flip is not None:
            raise UserError(f"{self.name}: latents cannot be flipped; leave out the flips")
        if self.is_latent:
            mean, std = raw.chunk(2, dim=1)
            return normalise_latents(mean if eps is None else mean + std * eps.to(device))
        x = raw.permute(0, 3, 1, 2)  # channels-last, without a copy
        if flip is not None:
            x = torch.where(flip.to(device).view(-1, 1, 1, 1), x.flip(3), x)
        return x.to(torch.float32) / 127.5 - 1


def to_uint8(x):
    """Images x [N, C, H, W] in [-1, 1] as numpy uint8 [N, H, W, C]: inverts `Dataset.to_model`."""
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


@functools.cache  # a copy each time would make the GPU wait
def _latent_statistics(device):
    return [torch.tensor(v, device=device).view(1, 4, 1, 1) for v in (LATENT_MEAN, LATENT_STD)]


class Batches:
    """Endless: this rank's (raw, labels) of each global batch of `rt.batch` images.

    Image n of the run is element n % N of a permutation that depends on (seed, n // N) alone, so a
    run continues with `start` = images seen. A thread prepares one batch ahead.
    """

    def __init__(self, dataset, rt, seed, start=0):
        self.dataset, self.rt, self.seed, self.epoch = dataset, rt, seed, None
        share = rt.batch // rt.world_size
        self.positions = start + rt.rank * share + np.arange(share)
        self.thread = ThreadPoolExecutor(1)
        self.future = self.thread.submit(self._prepare)

    def __next__(self):
        batch = self.future.result()
        self.future = self.thread.submit(self._prepare)
        return batch

    def training_batch(self, xflip):
        """(x float32 [n, C, H, W], labels int64 [n] or None); `rt` draws flips and noise."""
        raw, labels = next(self)
        rt, dataset = self.rt, self.dataset
        flip = rt.rand() < 0.5 if xflip else None
        eps = rt.randn(dataset.channels, *raw.shape[2:]) if dataset.is_latent else None
        x = dataset.to_model(raw, rt.device, flip, eps)
        return x, None if labels is None else labels.to(rt.device, non_blocking=True)

    def _prepare(self):
        epochs, offsets = np.divmod(self.positions, len(self.dataset))
        self.positions = self.positions + self.rt.batch
        indices = np.empty_like(offsets)
        for epoch in np.unique(epochs):  # more than one at a boundary
            if epoch != self.epoch:
                generator = rng("cpu", self.seed, "data", int(epoch))
                self.order = torch.randperm(len(self.dataset), generator=generator).numpy()
                self.epoch = epoch
            here = epochs == epoch
            indices[here] = self.order[offsets[here]]
        raw, labels = self.dataset.batch(indices)
        if self.rt.device.type == "cuda":  # copies from pinned memory overlap with computing
            raw, labels = raw.pin_memory(), None if labels is None else labels.pin_memory()
        return raw, labels


# --------------------------------------------------------------------------------------------------
# Reading. A reader returns images and a function that returns (labels, names of classes) or Nones.


def load(spec, cache=None, resolution=None):
    """The `Dataset` that `spec` names; raises `UserError`.

    spec: `digits`, `fashion-mnist`, `cifar10` or a path: IDX folder (MNIST), CIFAR-10's binary
        tar.gz, folder or zip of images or latents (.npy) with a dataset.json or class folders,
        .npz (`images` or `arr_0`, `labels` or `arr_1`). `:test` of IDX and CIFAR-10.
    cache: folder for what is downloaded or converted.
    resolution: cut out the middle of each image and resize it, as EDM's dataset tool does.
    """
    name, cache = str(spec), Path(cache) if cache else cache_dir()
    source, test = name.removesuffix(":test"), name.endswith(":test")
    path = Path(source).expanduser()
    if source == "digits" or source in DOWNLOADS:
        if path.is_dir():
            _say(f"{source}: the built-in data set; for your folder of this name give ./{source}")
        path = DIGITS if source == "digits" else _fetch(source, cache)
    if not path.exists():
        raise UserError(f"{path}: no such file; give digits, fashion-mnist, cifar10 or a path")
    with reading(path, "a data set"):
        names, kind = _list_folder(path) if path.is_dir() else [], path.name.lower()
        idx = {name.replace(".idx", "-idx").removesuffix(".gz"): path / name for name in names}
        if "train-images-idx3-ubyte" in idx or "t10k-images-idx3-ubyte" in idx:
            images, labels = _load_idx(idx, "t10k" if test else "train")
        elif kind.endswith((".tar.gz", ".tgz")):
            images, labels = _load_cifar10(path, test)
        elif "data_batch_1" in idx or "data_batch_1.bin" in idx:
            raise UserError("CIFAR-10, unpacked; give cifar-10-binary.tar.gz or --data cifar10")
        elif test:
            raise UserError("only IDX folders and CIFAR-10 have a test set; leave out :test")
        elif kind.endswith(".npz"):
            images, labels = _load_npz(path)
        elif path.is_dir() or kind.endswith(".zip"):
            images, labels = _load_files(path, names, cache, resolution)
        else:
            raise UserError("not a data set; give a folder, a .zip, a .npz or CIFAR-10's .tar.gz")
        square = (resolution, resolution)
        if resolution and images.dtype == np.uint8 and images.shape[1:3] != square:
            images = np.stack([_fit(_to_pillow(image), resolution) for image in images])
        try:
            with reading(path, "labels"):
                return Dataset(name, images, *labels())
        except UserError as error:  # matters only with --cond
            return Dataset(name, images, label_error=str(error))


def _fetch(name, cache):
    (url, hashes), folder = DOWNLOADS[name], cache / name
    if name == "fashion-mnist" and all((FASHION_MNIST / file).exists() for file in hashes):
        return FASHION_MNIST
    for file, md5 in hashes.items():
        if not (folder / file).exists():
            download(url + file, folder / file, "md5", md5)
    return folder if len(hashes) > 1 else folder / file


def _say(text):
    if os.environ.get("RANK", "0") == "0":
        print(UserError(text), file=sys.stderr, flush=True)  # one printable line


def _check(images):
    """Refuse arrays [N, ...] that no network takes."""
    shape, dtype = images.shape, images.dtype
    if 0 in shape:
        raise UserError("holds no images; give others")
    if dtype == np.uint8 and len(shape) == 4 and shape[3] in (1, 3):
        if shape[1] != shape[2]:
            raise UserError(f"{shape[2]}x{shape[1]} pixels, but networks need squares; {RESIZE}")
    elif dtype != np.float32 or len(shape) != 4 or shape[1] != 8 or shape[2] != shape[3]:
        raise UserError(f"{dtype} {list(shape)}; expected images, uint8 [N, H, W, 1 or 3], "
                        "or latents, float32 [N, 8, h, h]")


def _load_idx(files, split):
    """MNIST's format: four bytes that tell the type, the lengths (big-endian), then bytes."""

    def read(kind, ndim):
        if (path := files.get(f"{split}-{kind}-ubyte")) is None:
            raise UserError(f"has no {split}-{kind}-ubyte; add it")
        unpack = gzip.decompress if path.suffix == ".gz" else bytes
        with reading(path, "an IDX file", "delete it and get it again"):
            content = unpack(path.read_bytes())
            shape = np.frombuffer(content, ">u4", ndim, offset=4).tolist()
            return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape)

    return read("images-idx3", 3)[..., None], lambda: [read("labels-idx1", 1)]


def _load_cifar10(path, test):
    """The binary version: per image 1 byte of label and 3072 of the planes R, G, B."""
    wanted = ["test_batch.bin"] if test else [f"data_batch_{i}.bin" for i in range(1, 6)]
    with tarfile.open(path, "r:gz") as tar:
        found = {posixpath.basename(member.name): tar.extractfile(member).read()
                 for member in tar if member.name.endswith(".bin")}
    if missing := [name for name in wanted if name not in found]:
        raise UserError(f"has no {missing[0]}; give CIFAR-10's binary version, "
                        "cifar-10-binary.tar.gz, or --data cifar10, which downloads it")
    records = np.frombuffer(b"".join(found[name] for name in wanted), np.uint8).reshape(-1, 3073)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), lambda: [records[:, 0]]


def _load_npz(path):
    arrays = np.load(path)  # executes nothing: allow_pickle is False
    key, labels = (next((key for key in keys if key in arrays.files), None)
                   for keys in (("images", "arr_0"), ("labels", "arr_1")))
    if key is None:
        raise UserError(f"has no images (`arr_0` or `images`), only {arrays.files}; give another "
                        "(statistics mu and sigma are a reference for FID alone)")
    images = np.ascontiguousarray(arrays[key])
    images = images[..., None] if images.ndim == 3 else images
    return images, lambda: [arrays[labels] if labels else None]


def _list_folder(folder):
    """Sorted names of the files below `folder`. Links are followed, each folder is read once."""
    names, seen, todo = [], {str(parent) for parent in folder.resolve().parents}, [folder]
    for parent in todo:
        if (real := os.path.realpath(parent)) in seen:
            continue
        seen.add(real)
        entries = sorted(filter(lambda e: _visible(e.name), os.scandir(parent)), key=os.fspath)
        todo += [entry.path for entry in entries if entry.is_dir()]
        files = [entry.path for entry in entries if not entry.is_dir()]
        names += [Path(file).relative_to(folder).as_posix() for file in files]
    return sorted(names)


def _visible(name):
    """False for hidden files, folders in a zip, and what a NAS or macOS adds."""
    parts = name.split("/")
    return parts[-1] and not any(p.startswith((".", "@eaDir", "__MACOSX")) for p in parts)


def _load_files(path, names, cache, resolution):
    """A folder or zip with one file per image or latent."""
    archive = None if path.is_dir() else zipfile.ZipFile(path)
    names = sorted(filter(_visible, set(archive.namelist()))) if archive else names
    images = [name for name in names if name.lower().endswith(SUFFIXES)]
    latents = [name for name in names if name.lower().endswith(".npy")]
    files = images or latents
    if not files or images and latents:
        raise UserError(f"{len(images)} images ({' '.join(SUFFIXES)}) and {len(latents)} latents "
                        "(.npy) in it; give one kind")
    if latents and resolution:
        raise UserError("latents cannot be resized; leave out --resolution")
    known = (*SUFFIXES, ".npy", "dataset.json")
    if unread := [name for name in names if not name.lower().endswith(known)]:
        suffixes = sorted({posixpath.splitext(name)[1].lower() for name in unread})
        _say(f"{path}: {len(unread)} files not read: {' '.join(suffixes)}")

    def read(name):
        return archive.read(name) if archive else (path / name).read_bytes()

    def decode(name, colour=False):
        kind = "an image" if images else "a latent (.npy)"
        with reading(f"{path}/{name}", kind, "replace it or remove it"):
            file = io.BytesIO(read(name))
            array = (_decode_image(file, resolution, colour) if images
                     else np.lib.format.read_array(file))
            _check(array[None])
            return array

    stats = [os.stat(path / name) for name in ([""] if archive else files)]
    stats = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
    key = repr((VERSION, os.path.abspath(path), resolution, files, stats)).encode()
    folder = cache / "datasets" / f"{path.stem}-{hashlib.sha256(key).hexdigest()[:16]}"
    try:
        arrays = _convert(path, files, decode, folder)
    except _Mixed:
        arrays = _convert(path, files, lambda name: decode(name, colour=True), folder)
    return arrays, lambda: _read_labels(names, files, read)


class _Mixed(Exception):
    """Gray images and images in colour: all become RGB."""


def _convert(path, names, decode, folder):
    """What `decode` makes of `names` as one array, in memory or mapped from the cache `folder`."""
    if not folder.is_dir():
        first, count = decode(names[0]), len(names)
        arrays = _decode_all(path, names, decode, first.shape)
        if count * first.nbytes <= MEMORY_LIMIT:
            return np.fromiter(arrays, np.dtype((first.dtype, first.shape)), count)
        print(f"converting {path} to {folder} (once)", file=sys.stderr, flush=True)
        shape = (count, *first.shape)
        header = {"descr": first.dtype.str, "fortran_order": False, "shape": shape}
        try:
            with atomic(folder) as part:
                part.mkdir()
                with open(part / "images.npy", "wb") as file:  # a full disk would crash a map
                    np.lib.format.write_array_header_1_0(file, header)
                    file.writelines(array.tobytes() for array in arrays)
        except OSError:
            if not folder.is_dir():  # else another process has converted the same
                raise
    with reading(folder, "a converted data set", "delete this folder and it will be made again"):
        return np.load(folder / "images.npy", mmap_mode="r")


def _decode_all(path, names, decode, shape):
    with ThreadPoolExecutor(4) as pool:  # Pillow decodes without Python's lock
        for i in range(0, len(names), 256):  # as many are held at a time
            for name, array in zip(names[i:i + 256], pool.map(decode, names[i:i + 256])):
                if array.shape != shape:
                    if array.shape[:2] == shape[:2]:
                        raise _Mixed
                    raise UserError(f"{path}/{name}: {list(array.shape)}, but {names[0]} has "
                                    f"{list(shape)}; all need one size: {RESIZE}")
                yield array
            done = min(i + 256, len(names))
            status(f"reading {path}: {done} / {len(names)}", "\n" * (done == len(names)))


def _decode_image(file, resolution, colour):
    """An image file as uint8 [H, W, C]: C = 1 if it is gray and `colour` is false, else 3."""
    try:
        image = Image.open(file, formats=("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "AVIF"))
    except UnidentifiedImageError:
        raise UserError("not an image that is read here; replace it or remove it") from None
    except Image.DecompressionBombError:
        raise UserError("too large (Pillow refuses so many pixels); make it smaller") from None
    depth = file.getbuffer()[24] if image.format == "PNG" else 8  # the mode is RGB for 16 bits too
    depth = max(image.tag_v2.get(258, (1,))) if image.format == "TIFF" else depth
    if depth > 8:
        raise UserError(f"has {depth} bits per channel; convert it to 8 bits")
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF must not block the picture
        ImageOps.exif_transpose(image, in_place=True)
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
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((resolution, resolution), Image.Resampling.LANCZOS)
    array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]


def _read_labels(names, files, read):
    """(labels [N], names of classes) of `files`, from a dataset.json or else from class folders."""

    def plain(name):  # a dataset.json may spell it with \\, ./ or other accents
        return unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")))

    images = list(map(plain, files))
    tables = [name for name in names if posixpath.basename(name) == "dataset.json"]
    if not tables:  # torchvision's convention; 00000, 00001 ... are the folders of write_images
        top = posixpath.commonpath(map(posixpath.dirname, images))
        parts = [name.removeprefix(top).strip("/").split("/") for name in images]
        classes, labels = np.unique([part[0] for part in parts], return_inverse=True)
        if min(map(len, parts)) < 2 or all(len(c) == 5 and c.isdigit() for c in classes):
            return None, None
        return labels, classes.tolist()
    table, labels = min(tables, key=len), {}
    form = 'of the form {"labels": [["img.png", 3], ...]} or {"labels": null}'
    with reading(table, form, "correct it or remove it"):
        pairs = json.loads(read(table))["labels"]
        if pairs is None:
            return None, None
        for name, label in pairs:
            name = plain(posixpath.join(posixpath.dirname(table), name))
            if type(label) is not int or not 0 <= label < 2**31:
                raise UserError(f"the label of {name} is {label!r}; expected an integer from 0 on")
            if labels.setdefault(name, label) != label:
                raise UserError(f"{name} is listed with two labels; correct it")
        missing, extra = sorted(set(images) - set(labels)), sorted(set(labels) - set(images))
        if missing or extra:
            raise UserError(f"{len(missing)} images without a label {missing[:1]}, {len(extra)} "
                            f"labels without an image {extra[:1]}; give each image one label")
        return np.array([labels[name] for name in images]), None


# --------------------------------------------------------------------------------------------------
# Writing.


def save_grid(images, path, columns, scale=1, padding=2):
    """Write images (uint8 [N, H, W, C]), enlarged `scale` times, row by row as one PNG."""
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    around = [(0, -len(images) % columns), (0, padding), (0, padding), (0, 0)]
    images = np.pad(images, around, constant_values=255)
    rows = images.reshape(-1, columns, *images.shape[1:]).swapaxes(1, 2)
    grid = rows.reshape(rows.shape[0] * rows.shape[1], -1, rows.shape[-1])
    grid = np.pad(grid, [(padding, 0), (padding, 0), (0, 0)], constant_values=255)
    with atomic(path) as part:
        _to_pillow(grid).save(part, format="PNG")  # the temporary name does not end in .png


def save_panels(sets, path, side=8, scale=1):
    """Write one PNG with the first side x side images (or fewer) of sets of uint8 [N, H, W, C]."""
    sets = list(sets)
    side = min(side, *(int(len(images)**0.5) for images in sets))
    panels = [images[: side**2].reshape(side, side, *images.shape[1:]) for images in sets]
    gap = np.full_like(panels[0][:, :1], 255)
    rows = np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=1)
    save_grid(rows.reshape(-1, *rows.shape[2:]), path, rows.shape[1], scale, padding=1)


def write_images(batches, out):
    """Write all (images, labels) of `batches`; `load(out)` reads them again.

    images: uint8 [n, H, W, C], or float32 [n, 4, h, w] for latents. labels: int [n] or None.
    out: a .npz for `arr_0` (latents: `latents`) and labels `arr_1`, all collected in memory, or a
        new or empty folder for PNG files and labels in a dataset.json.
    """
    out, names, labels = Path(out), [], []
    if out.suffix.lower() == ".npz":
        images, labels = zip(*batches)
        arrays = {"arr_0" if images[0].dtype == np.uint8 else "latents": np.concatenate(images)}
        if labels[0] is not None:
            arrays["arr_1"] = np.concatenate(labels)
        with atomic(out) as part, open(part, "wb") as file:
            np.savez(file, **arrays)
        return
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: exists already; give a new folder, or remove this one")
    with atomic(out) as part:
        for images, classes in batches:
            if images.dtype != np.uint8:
                raise UserError("latents need a .npz file; let --out end in .npz")
            labels += [] if classes is None else map(int, classes)
            for image in images:
                names.append(f"{len(names) // 1000:05d}/img{len(names):08d}.png")
                (part / names[-1]).parent.mkdir(parents=True, exist_ok=True)
                _to_pillow(image).save(part / names[-1])
        if labels:
            table = {"labels": list(zip(names, labels))}
            (part / "dataset.json").write_text(json.dumps(table))


def _to_pillow(image):  # Pillow wants gray images without a channel axis
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
