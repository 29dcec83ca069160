"""Data sets in, pictures out."""

import contextlib
import functools
import gzip
import hashlib
import io
import itertools
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
from PIL import Image, ImageOps

from machinery.files import UserError, atomic, cache_dir, download, reading
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
SUFFIXES = tuple(".png .jpg .jpeg .jfif .bmp .webp .gif .tif .tiff .avif".split())
MEMORY_LIMIT = 256 * 2**20  # bytes; larger folders and zips are converted once and mapped
VERSION = 2  # of the cache; raise it when files are decoded to other pixels
RESIZE = "--resolution N crops the centre of each image and resizes it"

# EDM2's means and standard deviations of the channels of Stable Diffusion's latents.
LATENTS = torch.tensor([[5.81, 3.25, 0.12, -2.15], [4.17, 4.62, 3.71, 3.28]]).view(2, 1, 4, 1, 1)


class Dataset:
    """Images or latents with optional class labels.

    images: uint8 [N, H, W, 1 or 3], or float32 [N, 8, h, w]: mean (first 4 channels) and standard
        deviation (last 4) of each image's VAE latent. labels: int64 [N], from 0 on, or None.
    classes: names of the classes, or None. label_error: why labels cannot be used, or None.
    """

    def __init__(self, name, images, labels=None, classes=None, label_error=None):
        if labels is not None:
            fit = labels.shape == (len(images),) and labels.dtype.kind in "iu"
            if not fit or labels.astype(np.int64).min() < 0:  # which 2^63 is, too
                raise UserError(f"labels {labels.dtype} {list(labels.shape)} do not match "
                                f"{len(images)} images; give each an integer from 0 on")
            labels = labels.astype(np.int64)
        self.name, self.images, self.labels = name, _check(images), labels
        self.classes, self.label_error = classes, label_error
        self.label_dim = 0 if labels is None else int(labels.max()) + 1  # number of classes
        self.is_latent = images.dtype == np.float32
        self.resolution = images.shape[2]  # height = width of what a network sees
        self.channels = 4 if self.is_latent else images.shape[3]

    def __len__(self):
        return len(self.images)

    def require_labels(self):
        """Refuse data without labels; number the classes anew if some have no images."""
        if self.labels is None:
            raise UserError(self.label_error or
                            f"{self.name} has no labels; add a dataset.json or class folders")
        found, labels = np.unique(self.labels, return_inverse=True)
        if len(found) < self.label_dim:
            self.labels, self.label_dim, self.classes = labels, len(found), list(map(str, found))
            _say(f"{self.name}: only classes {' '.join(self.classes)} have images; numbered from 0")

    def class_frequencies(self, classes):
        """Number of images of each class, for a network with so many classes; [] for none."""
        return np.bincount(self.labels, minlength=classes).tolist() if classes else []

    def fingerprint(self):
        """SHA-256 (hexadecimal) of the shape, the type and the content of `images`."""
        digest = hashlib.sha256(f"{self.images.shape} {self.images.dtype.str}".encode())
        digest.update(np.ascontiguousarray(self.images).data.cast("B"))
        return digest.hexdigest()

    def describe(self, conditional):
        """Name, size, classes and a hash of up to 1000 images: what a run must be resumed with.

        For a `conditional` network the hash covers all labels, too.
        """
        some = Dataset(self.name, self.images[:: -(-len(self) // 1000)]).fingerprint()
        if conditional:
            some = hashlib.sha256(some.encode() + self.labels.tobytes()).hexdigest()
        name = Path(self.name).name  # the folder may move
        return f"{name} ({len(self)} images, {self.label_dim} classes, content {some[:8]})"

    def batch(self, indices):
        """(raw images [n, ...], labels int64 [n] or None) at `indices`, on the CPU."""
        indices = np.asarray(indices)
        labels = None if self.labels is None else torch.from_numpy(self.labels[indices])
        return torch.from_numpy(self.images[indices]), labels

    def to_model(self, raw, device, eps=None):
        """What a network sees of a raw batch: float32 [n, C, H, W] on `device`.

        Images in [-1, 1], or latents mean + std * eps with standard normal `eps` [n, 4, h, w]
        (None: the mean), of standard deviation 0.5 per channel.
        """
        raw = raw.to(device, non_blocking=True)  # images travel as bytes
        if not self.is_latent:
            return raw.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1  # channels-last
        mean, std = raw.chunk(2, dim=1)
        latents = mean if eps is None else mean + std * eps.to(device)
        centre, scale = LATENTS.to(device, non_blocking=True)
        return (latents - centre) / scale * 0.5


def to_uint8(x):
    """Images x [N, C, H, W] in [-1, 1] as numpy uint8 [N, H, W, C]: inverts `Dataset.to_model`."""
    x = (x.detach().float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return x.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def batches(dataset, rt, seed, start=0, xflip=False):
    """Iterate without end over (x float32 [n, C, H, W], labels int64 [n] or None) of this rank.

    Image n of a run is element n % N of a permutation that depends on (seed, n // N) alone. `rt`
    draws flips and the noise of latents when a batch is asked for.
    """
    if xflip and dataset.is_latent:
        raise UserError(f"{dataset.name}: latents cannot be flipped; leave out --xflip")

    @functools.lru_cache(2)
    def order(epoch):
        generator = rng("cpu", seed, "data", epoch)
        return torch.randperm(len(dataset), generator=generator).numpy()

    def read(position):
        places = [divmod(i, len(dataset)) for i in range(position, position + rt.share)]
        raw, labels = dataset.batch([order(epoch)[i] for epoch, i in places])
        if rt.device.type == "cuda":  # copies from pinned memory overlap with computing
            raw, labels = raw.pin_memory(), None if labels is None else labels.pin_memory()
        return raw, labels

    thread, start = ThreadPoolExecutor(1), start + rt.rank * rt.share
    future = thread.submit(read, start)
    for position in itertools.count(start + rt.batch, rt.batch):
        (raw, labels), future = future.result(), thread.submit(read, position)  # one batch ahead
        eps = rt.randn(dataset.channels, *raw.shape[2:]) if dataset.is_latent else None
        x = dataset.to_model(raw, rt.device, eps)
        if xflip:
            x = torch.where((rt.rand() < 0.5).view(-1, 1, 1, 1), x.flip(3), x)
        yield x, None if labels is None else labels.to(rt.device, non_blocking=True)


# ---- Reading: images, and a function that returns (labels, names of classes)

def load(spec, cache=None, resolution=None):
    """The `Dataset` that `spec` names; raises `UserError`.

    spec: `digits`, `fashion-mnist`, `cifar10` or a path: IDX folder (MNIST), CIFAR-10's binary
        tar.gz, folder or zip of images or latents (.npy) with a dataset.json or class folders,
        .npz (`images` or `arr_0`, `labels` or `arr_1`). `:test` of IDX and CIFAR-10.
    resolution: crop the centre of each image and resize it, as EDM's dataset tool does.
    """
    name, cache = str(spec), Path(cache or cache_dir())
    source, test = name.removesuffix(":test"), name.endswith(":test")
    path = Path(os.path.expanduser(source))
    if source == "digits" or source in DOWNLOADS:
        if path.is_dir():
            _say(f"{source}: the built-in data set; give ./{source} for your folder")
        path = DIGITS if source == "digits" else _fetch(source, cache / source)
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
            raise UserError("no such file or data set; give digits, fashion-mnist, cifar10, "
                            "a folder, a .zip, a .npz or CIFAR-10's .tar.gz")
        if resolution and images.dtype == np.uint8 and images.shape[1:3] != (resolution,) * 2:
            images = np.stack([_fit(_to_pillow(image), resolution) for image in images])
        try:
            with reading(path, "labels"):
                return Dataset(name, images, *labels())
        except UserError as error:  # matters only with --cond
            return Dataset(name, images, label_error=str(error))


def _fetch(name, folder):
    url, hashes = DOWNLOADS[name]
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
    return images


def _load_idx(files, split):
    """MNIST's format: four bytes that tell the type, the lengths (big-endian), then bytes."""

    def read(name, ndim):
        if name not in files:
            raise UserError(f"has no {name}; add it")
        with reading(files[name], "an IDX file", "delete it and get it again"):
            content = files[name].read_bytes()
            content = gzip.decompress(content) if files[name].suffix == ".gz" else content
            shape = np.frombuffer(content, ">u4", ndim, offset=4).tolist()
            return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape)

    images = read(f"{split}-images-idx3-ubyte", 3)[..., None]
    return images, lambda: [read(f"{split}-labels-idx1-ubyte", 1)]


def _load_cifar10(path, test):
    """The binary version: per image 1 byte of label and 3072 of the planes R, G, B."""
    names = ["test_batch"] if test else [f"data_batch_{i}" for i in range(1, 6)]
    remedy = "give cifar-10-binary.tar.gz or --data cifar10"
    with reading(path, "CIFAR-10's binary version", remedy), tarfile.open(path, "r:gz") as tar:
        files = [tar.extractfile(f"cifar-10-batches-bin/{name}.bin").read() for name in names]
        records = np.frombuffer(b"".join(files), np.uint8).reshape(-1, 3073)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), lambda: [records[:, 0]]


def _load_npz(path):
    arrays = np.load(path)  # executes nothing: allow_pickle is False
    key = "images" if "images" in arrays else "arr_0"
    if key not in arrays:
        raise UserError(f"holds {arrays.files}, but no images (`arr_0` or `images`); give another")
    images = np.ascontiguousarray(arrays[key])
    images = images[..., None] if images.ndim == 3 else images
    key = "labels" if "labels" in arrays else "arr_1"
    return images, lambda: [arrays.get(key)]


def _list_folder(folder):
    """Sorted names of the files below `folder`. Links are followed, each folder is read once."""
    names, seen, todo = [], set(folder.resolve().parents), [folder]
    for parent in todo:
        if (real := parent.resolve()) not in seen:
            seen.add(real)
            entries = sorted(entry for entry in parent.iterdir() if _visible(entry.name))
            todo += filter(Path.is_dir, entries)
            names += [e.relative_to(folder).as_posix() for e in entries if not e.is_dir()]
    return sorted(names)


def _visible(name):
    """False for hidden files, folders in a zip, and what a NAS or macOS adds."""
    parts = name.removeprefix("./").split("/")
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

    def parse(name, parser):
        with reading(f"{path}/{name}", "an image or latent", "replace it or remove it"):
            return parser(io.BytesIO(read(name)))

    def decode(file):
        array = _decode_image(file, gray, resolution) if images else np.lib.format.read_array(file)
        return _check(array[None])[0]

    def arrays():
        for name in files:
            if (array := parse(name, decode)).shape != first.shape:
                raise UserError(f"{path}/{name}: {list(array.shape)}, but {files[0]} has "
                                f"{list(first.shape)}; all need one size: {RESIZE}")
            yield array

    labels = functools.partial(_read_labels, names, files, read)
    stats = map(os.stat, [path] if archive else [path / name for name in files])
    stats = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
    key = repr((VERSION, os.path.abspath(path), resolution, files, stats)).encode()
    cached = cache / "datasets" / f"{path.stem}-{hashlib.sha256(key).hexdigest()[:16]}.npy"
    if not cached.exists():
        # One image in colour makes all RGB. The modes are read from the headers.
        gray = all(parse(name, _open_image).mode in ("1", "L", "LA") for name in images)
        first, count = parse(files[0], decode), len(files)
        if count * first.nbytes <= MEMORY_LIMIT:
            return np.fromiter(arrays(), np.dtype((first.dtype, first.shape)), count), labels
        print(f"converting {path} to {cached} (once)", file=sys.stderr, flush=True)
        header = {"descr": first.dtype.str, "fortran_order": False, "shape": (count, *first.shape)}
        with atomic(cached) as part, open(part, "wb") as file:  # a full disk would crash a map
            np.lib.format.write_array_header_1_0(file, header)
            file.writelines(array.tobytes() for array in arrays())
    with reading(cached, "a converted data set", "delete it and it will be made again"):
        return np.load(cached, mmap_mode="r"), labels


def _decode_image(file, gray, resolution):
    """An image file as uint8 [H, W, 1 if `gray` else 3], on white where it is transparent."""
    image = _open_image(file)
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF must not block the picture
        ImageOps.exif_transpose(image, in_place=True)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return _fit(image.convert("L" if gray else "RGB"), resolution)


def _open_image(file):
    """A Pillow image, of which only the header is read."""
    try:
        image = Image.open(file, formats="PNG JPEG BMP WEBP GIF TIFF AVIF".split())
    except Image.DecompressionBombError:
        raise UserError("too large (Pillow refuses so many pixels); make it smaller") from None
    # Mode RGB can stand for 16 bits per channel, which the decoder's mode tells: RGB;16B.
    if image.mode[0] in "IF" or image.format in ("PNG", "TIFF") and ";16" in str(image.tile):
        raise UserError("has more than 8 bits per channel; convert it to 8 bits")
    return image


def _fit(image, resolution):
    """A Pillow image as uint8 [H, W, C]; with `resolution` the square in its middle, resized."""
    if resolution:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((resolution, resolution), Image.Resampling.LANCZOS)
    return np.atleast_3d(image)


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
        if min(map(len, parts)) < 2:
            return None, None
        if all(len(c) == 5 and c.isdigit() for c in classes):
            raise UserError("folders of five digits are no classes; rename them")
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
        missing, extra = (sorted(set(a) - set(b)) for a, b in ((images, labels), (labels, images)))
        if missing or extra:
            raise UserError(f"{len(missing)} images without a label {missing[:1]}, {len(extra)} "
                            f"labels without an image {extra[:1]}; give each image one label")
        return np.array([labels[name] for name in images]), None


# ---- Writing

def save_grid(images, path, columns, scale=1, padding=2):
    """Write images (uint8 [N, H, W, C]), enlarged `scale` times, row by row as one PNG."""
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    around = [(0, -len(images) % columns), (0, padding), (0, padding), (0, 0)]
    images = np.pad(images, around, constant_values=255)
    rows = images.reshape(-1, columns, *images.shape[1:])
    grid = np.concatenate(np.concatenate(rows, axis=1), axis=1)
    grid = np.pad(grid, [(padding, 0), (padding, 0), (0, 0)], constant_values=255)
    with atomic(path) as part:
        _to_pillow(grid).save(part, format="PNG")  # the temporary name does not end in .png


def write_images(batches, out):
    """Write all (images uint8 [n, H, W, C], labels or None) of `batches`; `load` reads them again.

    out: a .npz (`arr_0`, labels `arr_1`) or a new folder of PNG files, with a dataset.json.
    """
    out, table = Path(out), []
    if out.suffix.lower() == ".npz":
        images, labels = zip(*batches)
        arrays = [np.concatenate(each) for each in (images, labels) if each[0] is not None]
        with atomic(out) as part, open(part, "wb") as file:
            np.savez(file, *arrays)
        return
    if out.is_file() or out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: exists already; give a new folder, or remove this one")
    with atomic(out) as part:
        for images, labels in batches:
            for i, image in enumerate(images):
                name = f"{len(table) // 1000:05d}/img{len(table):08d}.png"
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                _to_pillow(image).save(part / name)
                table.append((name, None if labels is None else int(labels[i])))
        if labels is not None:
            (part / "dataset.json").write_text(json.dumps({"labels": table}))


def _to_pillow(image):  # Pillow wants gray images without a channel axis
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
