"""Data: every format round trips, the order is a pure function, bad input is one clear line."""

import errno
import gzip
import hashlib
import io
import json
import os
import pickle
import tarfile
import zipfile
import zlib
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from test_published import Attack

from machinery import data, files, training
from machinery.files import UserError

RGB, GRAY = (np.random.default_rng(c).integers(0, 256, (6, 8, 8, c), np.uint8) for c in (3, 1))
WHITE, COLOUR, MIXED, ALPHAS = (255, 255, 255), (200, 30, 90), (227, 142, 172), (0, 128, 255)
mapped_or_in_memory = pytest.mark.parametrize("cache", [100, 2**28], indirect=True)


@pytest.fixture
def cache(tmp_path, monkeypatch, request):
    """The cache's folder. Even small sets are converted to it, unless a higher limit is asked."""
    monkeypatch.setattr(data, "MEMORY_LIMIT", getattr(request, "param", 100))
    return tmp_path / "cache"


def png(image, format="PNG", mode=None, **options):
    """The bytes of an image file from uint8 [H, W, C] or a Pillow image."""
    image = image if isinstance(image, Image.Image) else data._to_pillow(image)
    (image.convert(mode) if mode else image).save(file := io.BytesIO(), format, **options)
    return file.getvalue()


def npy(array):
    np.save(file := io.BytesIO(), array)
    return file.getvalue()


def make(path, files):
    """A folder or .zip of {name: bytes, str or None (left out)}, a .npz of arrays, or bytes."""
    if isinstance(files, bytes):
        path.write_bytes(files)
    elif path.suffix.lower() == ".npz":
        with open(path, "wb") as file:
            np.savez(file, **files)
    else:
        for name, content in files.items():
            if path.suffix == ".zip":
                with zipfile.ZipFile(path, "a") as archive:
                    archive.writestr(name, content)
            elif content is not None:
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).write_bytes(content.encode() if type(content) is str else content)
    return path


def images_and_labels(images, labels):
    files = {f"{i // 4:05d}/img{i}.png": png(image) for i, image in enumerate(images)}
    return {**files, "dataset.json": json.dumps({"labels": list(zip(files, map(int, labels)))})}


def error_of(spec, cache=None, labels=False):
    """The message with which `spec`, or its labels alone, are refused; it is one line."""
    if labels:
        dataset = data.load(spec, cache)
        assert dataset.labels is None and dataset.label_dim == 0
    with pytest.raises(UserError) as caught:
        dataset.require_labels() if labels else data.load(spec, cache)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_digits_are_embedded_a_folder_of_that_name_is_pointed_out(tmp_path, monkeypatch, capsys):
    digits = data.load("digits")
    assert (len(digits), digits.resolution, digits.channels, digits.label_dim) == (1797, 8, 1, 10)
    assert digits.images.max() == 255 and len(np.unique(digits.images)) == 17
    assert digits.class_frequencies(10) == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert digits.classes is None and "test set" in error_of("digits:test")
    make(tmp_path / "digits", {"0.png": png(RGB[0])})
    monkeypatch.chdir(tmp_path)
    assert len(data.load("digits")) == 1797 and "./digits" in capsys.readouterr().err
    assert len(data.load("./digits")) == 1 and not capsys.readouterr().err


@mapped_or_in_memory
@pytest.mark.parametrize("kind", ["set", "set.zip", "set.npz", "gray.NPZ", "idx"])
@pytest.mark.parametrize("resolution", [None, 8])
def test_images_with_labels_from_every_kind_of_file(tmp_path, kind, cache, resolution, capsys):
    """Large folders and zips are converted once and memory-mapped. `--resolution` as EDM's dataset
    tool: Pillow's Lanczos filter on the largest square in the middle."""
    labels, mapped = [3, 1, 4, 1, 5, 9], data.MEMORY_LIMIT == 100 and kind in ("set", "set.zip")
    shape = 6, *((12, 17) if resolution else (8, 8)), 1 if kind in ("gray.NPZ", "idx") else 3
    images = expected = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    if resolution:
        squares = [Image.fromarray(image.squeeze()[:, 2:14]) for image in images]
        expected = [square.resize((8, 8), Image.Resampling.LANCZOS) for square in squares]
        expected = np.reshape(expected, (6, 8, 8, -1))
    hidden = dict.fromkeys([".hidden.png", "@eaDir/0.png", "__MACOSX/0.png"], "not an image")
    prefix = "./" if kind == "set.zip" else ""  # as bsdtar writes names
    path = make(tmp_path / kind, {
        "set.npz": {"arr_0": images, "arr_1": labels},
        "gray.NPZ": {"images": images[..., 0], "labels": np.int32(labels)},
        "idx": {name.replace("-idx", ".idx").removesuffix(".gz"): gzip.decompress(content)
                for name, content in idx_folder(images[..., 0], labels).items()},  # as Kaggle does
    }.get(kind) or {prefix + name: content for name, content in (images_and_labels(images, labels) | hidden).items()})
    for _ in range(2):
        dataset = data.load(path, cache, resolution)
        assert np.array_equal(dataset.images, expected) and dataset.labels.tolist() == labels
        assert dataset.labels.dtype == np.int64 and dataset.label_dim == 10
        assert isinstance(dataset.images, np.memmap) == mapped
        batch, some = dataset.batch([3, 1, 3])
        assert np.array_equal(batch, expected[[3, 1, 3]]) and some.tolist() == [1, 1, 1]
    assert capsys.readouterr().err.count("converting") == mapped
    if resolution:
        assert data.load(path, cache, 12).resolution == 12  # not the cache of the other
        assert "--resolution" in error_of(path, cache)


@mapped_or_in_memory
@pytest.mark.parametrize("images, resolution, expected", [
    (GRAY, None, GRAY),
    ([*GRAY, RGB[0]], None, [*GRAY.repeat(3, axis=3), RGB[0]]),  # one colour image makes all RGB
    ([RGB[0], *GRAY], None, [RGB[0], *GRAY.repeat(3, axis=3)]),
    ([RGB[0], np.pad(RGB[1], [(2, 3), (0, 0), (0, 0)])], 8, RGB[:2]),  # resized only if needed
])
def test_images_that_differ_become_alike(tmp_path, cache, images, resolution, expected):
    files = {f"{i}.png": png(image) for i, image in enumerate(images)}
    dataset = data.load(make(tmp_path / "set", files), cache, resolution)
    assert np.array_equal(dataset.images, expected)


@pytest.mark.parametrize("format, mode, columns, seen", [
    ("PNG", "RGBA", [(*COLOUR, alpha) for alpha in ALPHAS], [WHITE, MIXED, COLOUR]),
    ("WEBP", "RGBA", [(*COLOUR, alpha) for alpha in ALPHAS], [WHITE, MIXED, COLOUR]),
    ("PNG", "LA", [(200, alpha) for alpha in ALPHAS], [255, 227, 200]),
    # Without an alpha channel a file can name one colour that is transparent (PNG's chunk tRNS).
    ("PNG", "RGB", [COLOUR, (1, 2, 3)], [WHITE, (1, 2, 3)]), ("PNG", "L", [77, 0], [255, 0]),
    ("PNG", "1", [0, 1], [255, 255]), ("PNG", "P", [0, 1], [WHITE, (4, 5, 6)]),
    ("GIF", "P", [0, 1], [WHITE, (4, 5, 6)]), ("TIFF", "P", [0, 1], [(1, 2, 3), (4, 5, 6)]),
    *[(format, "RGB", [WHITE], [WHITE]) for format in ("BMP", "WEBP", "TIFF", "AVIF")],
    ("JPEG", "CMYK", [(0, 0, 0, 0)], [WHITE]), ("JPEG", "L", [77], [77]),
])
def test_every_mode_becomes_gray_or_rgb_on_white(tmp_path, format, mode, columns, seen):
    """The colour under transparent parts is not seen, half-transparent parts are mixed."""
    image = Image.new(mode, (len(columns),) * 2)
    if mode == "P":
        image.putpalette([1, 2, 3, 4, 5, 6])
    for x, colour in enumerate(columns):
        image.paste(colour, (x, 0, x + 1, len(columns)))
    one = {} if "A" in mode else {"transparency": columns[0]}
    content = png(image, format, lossless=True, exact=True, **one)
    rows = data.load(make(tmp_path / "set", {f"0.{format}": content})).images[0].astype(int)
    seen = np.reshape(seen, (1, len(columns), -1))
    assert rows.shape[1:] == seen.shape[1:] and np.abs(rows - seen).max() <= 1  # two roundings
    assert (rows[:, [0, -1]] == seen[:, [0, -1]]).all()  # where nothing is mixed


@pytest.mark.parametrize("orientation, undo", enumerate([None, 0, 3, 1, 5, 2, 6, 4], start=1))
def test_photographs_are_turned_upright(tmp_path, orientation, undo):
    stored, exif = Image.fromarray(RGB[0]), Image.Exif()
    exif[0x0112] = orientation  # `undo` is Pillow's transposition that undoes this
    stored = stored if undo is None else stored.transpose(undo)
    files = {"0.png": png(stored, exif=exif), "1.png": png(RGB[1], exif=b"Exif\0\0damaged")}
    assert np.array_equal(data.load(make(tmp_path / "set", files)).images, RGB[:2])


def idx(array):
    header = np.array((0x800 + array.ndim, *array.shape), ">u4")
    return header.tobytes() + array.astype(np.uint8).tobytes()


def idx_folder(images, labels):
    arrays = {"train-images-idx3-ubyte": images, "train-labels-idx1-ubyte": np.array(labels),
              "t10k-images-idx3-ubyte": images[:2], "t10k-labels-idx1-ubyte": np.array([7, 7])}
    return {f"{name}.gz": gzip.compress(idx(array)) for name, array in arrays.items()}


def test_fashion_mnist_is_debians_or_downloaded_and_checked(tmp_path, monkeypatch):
    """Small files stand in for the real ones, as Debian's package or behind an address."""
    (_, hashes), cache = data.DOWNLOADS["fashion-mnist"], tmp_path / "cache"
    here, nowhere = make(tmp_path / "here", IDX), (tmp_path / "nowhere").as_uri()
    monkeypatch.setattr(data, "FASHION_MNIST", here)
    assert np.array_equal(data.load("fashion-mnist").images, GRAY)
    monkeypatch.setattr(data, "FASHION_MNIST", tmp_path / "not installed")
    monkeypatch.setitem(data.DOWNLOADS, "fashion-mnist", (f"{here.as_uri()}/", hashes))
    message = error_of("fashion-mnist", cache)
    assert "train-images-idx3-ubyte.gz is damaged" in message and not list(cache.rglob("*.gz"))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in IDX.items()}
    for url in (here.as_uri(), nowhere):  # nothing is fetched twice
        monkeypatch.setitem(data.DOWNLOADS, "fashion-mnist", (f"{url}/", md5))
        test = data.load("fashion-mnist:test", cache)
        assert np.array_equal(test.images, GRAY[:2]) and test.labels.tolist() == [7, 7]
    message = error_of("fashion-mnist", tmp_path / "other")
    assert nowhere in message and str(tmp_path / "other" / "fashion-mnist") in message


def cifar10(path, n=4):
    """A small cifar-10-binary.tar.gz. Returns its images and labels."""
    records = np.random.default_rng(0).integers(0, 10, (6, n, 3073), np.uint8)
    with tarfile.open(path, "w:gz") as tar:
        for i in (6, 5, 4, 3, 2, 1):
            name = f"data_batch_{i}" if i < 6 else "test_batch"
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = n * 3073
            tar.addfile(member, io.BytesIO(records[i - 1].tobytes()))
    records = records.reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]


def test_cifar10_and_other_forms_of_it_name_the_archive_to_give(tmp_path):
    """Other forms: the Python version, an unpacked folder of either, and damaged files."""
    archive, bad = tmp_path / "cifar10" / "cifar-10-binary.tar.gz", tmp_path / "bad"
    make(tmp_path, {"cifar10/x": "", "bad/text.tar.gz": "this is text",
                    "bad/python/data_batch_1": "...", "bad/binary/data_batch_1.bin": "..."})
    images, labels = cifar10(archive)
    train = data.load("cifar10", cache=tmp_path)  # found in the cache folder, so not downloaded
    for found, part in ((train, slice(20)), (data.load(f"{archive}:test"), slice(20, 24))):
        assert np.array_equal(found.images, images[part])
        assert np.array_equal(found.labels, labels[part])
    with tarfile.open(bad / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("cifar-10-batches-py/data_batch_1"))
    (bad / "half.tar.gz").write_bytes(archive.read_bytes()[:20_000])
    for path in bad.iterdir():
        message = error_of(path)
        assert path.name in message and "give cifar-10-binary.tar.gz" in message


def test_each_folder_is_read_once_and_files_that_are_not_read_are_named(tmp_path, capsys):
    up, far = tmp_path / "up", tmp_path / "far"
    folder = make(up / "set", {"0.png": png(RGB[0]), "sub/1.png": png(RGB[1])})
    make(tmp_path, {"up/other.png": png(RGB[2]), "far/2.png": png(RGB[3])})
    for name, target in dict(self=folder, parent=up, twice=folder / "sub", far=far).items():
        (folder / name).symlink_to(target)
    assert np.array_equal(data.load(folder).images, RGB[[0, 3, 1]])  # 0, far/2, sub/1
    files = {"0.png": PNG, "1.JFIF": png(RGB[0], "JPEG"), "a.HEIC": "", "b.heic": "", "c.psd": ""}
    for name in ("other", "set.ZIP"):
        assert len(data.load(make(tmp_path / name.lower(), files).rename(tmp_path / name))) == 2
        assert "3 files not read: .heic .psd" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["set", "set.zip"])
@pytest.mark.parametrize("names, spelled, labels, classes", [
    *[([top + n for n in ("dog/x/1.png", "cat/1.png", "ant/b.png", "dog/0.png")], None,
       [0, 1, 2, 2], ["ant", "cat", "dog"]) for top in ("", "pets/", "some/where/")],
    (["pets/a/0.png", "pets/e\u0301.png", "pets/z/1.png"],  # decomposed, as macOS writes it
     [["a\\0.png", 2], ["\u00e9.png", 0], ["./z/1.png", 1]], [2, 0, 1], None),
])
def test_labels_from_class_folders_or_a_json(tmp_path, kind, names, spelled, labels, classes):
    """The dataset.json may lie one folder down and spell names differently."""
    files = {name: png(image) for name, image in zip(names, RGB)}
    files |= {"pets/dataset.json": json.dumps({"labels": spelled})} if spelled else {}
    dataset = data.load(make(tmp_path / kind, files))
    assert dataset.labels.tolist() == labels and dataset.classes == classes
    assert dataset.class_frequencies(3) == [labels.count(label) for label in range(3)]


def test_classes_without_images_are_left_out_where_labels_are_asked_for(capsys):
    dataset = data.Dataset("gaps", GRAY, np.array([9, 3, 3, 9, 3, 3]))
    assert dataset.label_dim == 10
    dataset.require_labels()
    assert dataset.labels.tolist() == [1, 0, 0, 1, 0, 0] and dataset.labels.dtype == np.int64
    assert dataset.class_frequencies(2) == [4, 2] and dataset.classes == ["3", "9"]
    assert "only classes 3 9 have images" in capsys.readouterr().err
    dataset.require_labels()
    assert not capsys.readouterr().err
    assert data.Dataset("ids", GRAY, np.full(6, 2**60)).class_frequencies(0) == []  # takes no memory


def test_latents_are_mean_plus_std_times_noise_then_normalised(tmp_path):
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=(3, 4, 8, 8)), rng.uniform(0.1, 1, (3, 4, 8, 8))
    arrays = np.concatenate([mean, std], axis=1).astype(np.float32)
    files = {f"00000/img-mean-std-{i}.npy": npy(a) for i, a in enumerate(arrays)}
    files["dataset.json"] = json.dumps({"labels": [[n, i] for i, n in enumerate(files)]})
    dataset = data.load(path := make(tmp_path / "latents.zip", files))
    assert dataset.is_latent and np.array_equal(dataset.images, arrays)
    assert (dataset.resolution, dataset.channels, dataset.label_dim) == (8, 4, 3)
    eps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    rt = training.Runtime("cpu", batch=2)
    rt.randn = lambda *shape: eps if shape == (4, 8, 8) else None
    x, labels = next(data.batches(dataset, rt, seed=0))
    raw, _ = dataset.batch(labels)
    # Some six float32 roundings of numbers below 10, divided by 4.62 * 2.
    channel = raw[:, 1] + raw[:, 5] * eps[:, 1]
    assert torch.allclose(x[:, 1], (channel - 3.25) / 4.62 * 0.5, atol=1e-6)
    assert torch.allclose(dataset.to_model(raw, "cpu")[:, 1], (raw[:, 1] - 3.25) / 4.62 * 0.5, atol=1e-6)
    with pytest.raises(UserError, match="flip"):
        next(data.batches(dataset, rt, seed=0, xflip=True))
    with pytest.raises(UserError, match="latents.zip: latents cannot be resized"):
        data.load(path, resolution=8)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_the_cache_is_never_unfinished_nor_outdated_and_damage_is_named(tmp_path, cache, error):
    folder = make(tmp_path / "set", images_and_labels(RGB, range(6)))
    interrupted = mock.patch.object(data, "_decode_image", side_effect=[*RGB[:3], error])
    with interrupted, pytest.raises(type(error)):
        data.load(folder, cache)
    assert list((cache / "datasets").iterdir()) == []
    assert np.array_equal(data.load(folder, cache).images, RGB)
    (folder / "00000/img0.png").write_bytes(png(RGB[1]))
    os.utime(folder / "00000/img0.png", (1, 1))
    assert np.array_equal(data.load(folder, cache).images[0], RGB[1])
    for cached in (cache / "datasets").iterdir():
        cached.write_bytes(cached.read_bytes()[:300])
    message = error_of(folder, cache)
    assert str(cache / "datasets") in message and "delete" in message


def take(count, n, batch, seed=0, start=0, rank=0, world_size=1):
    """The positions of the images in the first `count` batches of a data set of `n`."""
    rt = training.Runtime("cpu", batch=batch)
    rt.rank, rt.share = rank, batch // world_size
    dataset = data.Dataset("numbered", np.zeros((n, 2, 2, 1), np.uint8), np.arange(n))
    order = data.batches(dataset, rt, seed, start)
    return [next(order)[1].tolist() for _ in range(count)]


@pytest.mark.parametrize("size", [10, 3])  # 3: less than a batch
def test_every_image_comes_once_per_epoch_in_an_order_that_depends_on_the_seed_alone(size):
    """Not on the sizes of batches, nor ranks (each has its share), nor where a run continues."""
    alone = take(15, size, 4)
    seen = sum(alone, [])  # 60 images; batches straddle the boundaries of epochs
    epochs = [seen[i:i + size] for i in range(0, 60, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6  # three images have six orders, too
    assert seen != sum(take(15, size, 4, seed=1), [])
    assert take(8, size, 4, start=28) == alone[7:]
    assert sum(take(5, size, 12), []) == seen
    ranks = [take(15, size, 4, rank=rank, world_size=2) for rank in range(2)]
    assert [first + second for first, second in zip(*ranks)] == alone


def test_training_batches_are_flipped_and_in_minus_one_to_one_and_become_bytes_again():
    rt, draws = training.Runtime("cpu", batch=6), [0.1, 0.9, 0.9, 0.1, 0.49, 0.51]
    rt.rand = lambda: torch.tensor(draws)
    for xflip in (True, False):
        x, labels = next(data.batches(data.Dataset("rgb", RGB, np.arange(6)), rt, 0, xflip=xflip))
        expected = [RGB[i][:, ::-1 if xflip and u < 0.5 else 1] for i, u in zip(labels, draws)]
        assert np.array_equal(data.to_uint8(x), expected)
        assert x.shape == (6, 3, 8, 8) and x.dtype == torch.float32 and x.aminmax() == (-1, 1)
    x = torch.tensor([-9.0, 9.0, 0.001]).view(3, 1, 1, 1)  # to_uint8 rounds and clips
    assert data.to_uint8(x).ravel().tolist() == [0, 255, 128]


def test_save_grid_enlarges_by_whole_pixels_and_fills_row_by_row(tmp_path):
    data.save_grid(GRAY[:5], tmp_path / "new" / "grid.png", columns=3, scale=2, padding=1)
    grid = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert grid.shape == (2 * 17 + 1, 3 * 17 + 1)
    for i in range(2):  # the fourth image begins the second row
        assert np.array_equal(grid[18 + i:34:2, 1 + i:17:2], GRAY[3, ..., 0])
    assert (grid[17] == 255).all() and (grid[18:, 35:] == 255).all()
    assert os.listdir(tmp_path / "new") == ["grid.png"]


@pytest.mark.parametrize("out", ["samples.npz", "samples"])
@pytest.mark.parametrize("labelled", [True, False])
def test_what_is_written_can_be_loaded(tmp_path, out, labelled):
    images, labels = np.concatenate([RGB, 255 - RGB]), torch.arange(12)  # names sort as numbers do
    parts = [(images[i:j], labels[i:j] if labelled else None) for i, j in ((0, 7), (7, 12))]
    data.write_images(iter(parts), tmp_path / out)
    dataset = data.load(tmp_path / out)
    assert np.array_equal(dataset.images, images) and os.listdir(tmp_path) == [out]
    assert dataset.labels.tolist() == list(range(12)) if labelled else dataset.labels is None


def test_what_exists_stays(tmp_path):
    def stopped():
        yield GRAY, None
        raise KeyboardInterrupt

    data.write_images([(GRAY, np.arange(6))], tmp_path / "a.npz")
    make(tmp_path, {"mine.png": "precious"})
    for parts, out, error in (
        (stopped(), "a.npz", KeyboardInterrupt), (stopped(), "folder", KeyboardInterrupt),
        (None, ".", UserError), (None, "mine.png", UserError),  # before images are asked for
    ):
        with pytest.raises(error, match=None if parts else "exists already"):
            data.write_images(parts, tmp_path / out)
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["arr_0"], GRAY) and file["arr_1"].tolist() == [*range(6)]
    assert (tmp_path / "mine.png").read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "mine.png"]


def chunk(kind, content):
    """A chunk of a PNG file."""
    check_sum = zlib.crc32(kind + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + kind + content + check_sum


def png_header(size, depth, colours):
    """A PNG with nothing but its header, the only place that tells 16 bits of RGB from 8."""
    fields = size.to_bytes(4, "big") * 2 + bytes([depth, colours, 0, 0, 0])
    return PNG[:8] + chunk(b"IHDR", fields) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


PNG, JSON, NO, DEPTH = png(RGB[0]), "dataset.json", ["has no labels"], ["convert it to 8 bits"]
IDX, LATENT = idx_folder(GRAY[..., 0], range(6)), npy(np.zeros((8, 8, 8), np.float32))
BOTH, (IMAGES, LABELS, *_) = "set set.zip", IDX
BAD_IMAGES = [
    (BOTH, {"notes.txt": "no image"}, ["0 images"]),
    (BOTH, {"a.png": PNG, "b.png": png(np.zeros((9, 9, 3), np.uint8))},
     ["b.png", "[9, 9, 3]", "a.png", "[8, 8, 3]", "--resolution"]),
    (BOTH, {"a.png": png(RGB[0, :, :6])}, ["a.png", "6x8", "square", "--resolution"]),
    (BOTH, {"a.png": "this is text"}, ["a.png", "not an image"]),
    (BOTH, {"a.png": png_header(14000, 8, 2)}, ["a.png: too large"]),  # not damaged
    *[(BOTH, {"a.png": png_header(8, 16, colours)}, DEPTH) for colours in (0, 2, 4, 6)],
    *[(BOTH, {"a.tif": png(Image.new(mode, (8, 8)), "TIFF")}, DEPTH) for mode in ("F", "I;16")],
    (BOTH, {"a.png": PNG, "b.npy": LATENT}, ["1 images", "1 latents"]),
    (BOTH, {"a.npy": npy(np.zeros((4, 8, 8), np.float32))}, ["a.npy", "[N, 8, h, h]"]),
    (BOTH, {"a.npy": pickle.dumps([1])}, ["a.npy"]),
    ("a.npz", {"mu": np.eye(4), "sigma": np.eye(4)}, ["holds ['mu', 'sigma'], but no images"]),
    *[("a.npz", {"arr_0": np.zeros(shape, np.uint8)}, [words]) for shape, words in (
        ((2, 8, 8, 4), "[2, 8, 8, 4]"), ((0, 8, 8, 3), "no images"), ((2, 8, 9, 3), "square"))],
    ("nowhere", {}, ["digits"]), ("notes.txt text.zip text.npz", b"this is text", []),
    *[("set", IDX | {IMAGES: content}, [IMAGES, words]) for content, words in (
        (IDX[IMAGES][:-20], "ended before"),
        (gzip.compress(gzip.decompress(IDX[IMAGES])[:-1]), "size 383"))],
    ("set", IDX | {IMAGES: None}, [f"has no {IMAGES[:-3]}"]),
]
BAD_LABELS = [
    *[(BOTH, {"a.png": PNG, "b.png": PNG, JSON: f'{{"labels": [["a.png", {text}'}, [JSON, words])
      for text, words in (
        ('1], ["c.png", 0]]}',
         "1 images without a label ['b.png'], 1 labels without an image ['c.png']"),
        ('1], ["b.png", -1]]}', "b.png is -1"), ('1], ["b.png", 1.5]]}', "b.png is 1.5"),
        ('1], ["b.png", 0], ["./a.png", 0]]}', "a.png is listed with two labels"),
        ('1], 2]}', "not of the form"), ("", "not of the form"))],
    *[(BOTH, {name: PNG, "1.png": PNG}, NO) for name in ("cat/0.png", "0.png")],
    (BOTH, {"cat/0.png": PNG, "cat/1.png": PNG}, NO),
    (BOTH, {"00000/0.png": PNG, "00001/1.png": PNG}, ["five digits are no classes"]),  # write_images
    (BOTH, {"cat/0.png": PNG, "dog/1.png": PNG, JSON: '{"labels": null}'}, NO),
    *[("a.npz", {"arr_0": RGB[:2], "arr_1": np.array(labels)}, [words]) for labels, words in (
        ([0, 0, 0], "labels int64 [3] do not match 2 images"),
        ([0, -1], "an integer from 0"), ([0, 0.5], "an integer from 0"))],
    *[("set", IDX | {LABELS: labels and gzip.compress(labels)}, [words]) for labels, words in (
        (idx(np.arange(6))[:-1], "size 5"), (None, f"has no {LABELS[:-3]}"))],
]


@pytest.mark.parametrize("labels, kinds, files, words", [
    *[(False, *case) for case in BAD_IMAGES], *[(True, *case) for case in BAD_LABELS],
])
def test_bad_input_is_named_labels_where_they_are_asked_for(tmp_path, labels, kinds, files, words):
    for kind in kinds.split():
        message = error_of(make(tmp_path / kind, files), labels=labels)
        assert all(word in message for word in [kind, *words]), message


@pytest.mark.parametrize("error, kind, message", [
    *[(error, UserError, "^some/file: ") for error in (
        OSError(errno.EINVAL, "Invalid argument"), OSError("cut"), MemoryError(), RecursionError(),
        UserError("no name"))],
    *[(OSError(errno.EACCES, "Permission denied", name), PermissionError, f"denied: '{shown}'$")
      for name, shown in ((None, "some/file"), ("other/file", "other/file"))],  # the system's words
    (torch.OutOfMemoryError("CUDA's"), torch.OutOfMemoryError, "^CUDA's$"),  # the file is sound
])
def test_whatever_a_parser_raises_names_the_file(error, kind, message):
    with pytest.raises(kind, match=message), files.reading("some/file", "a picture"):
        raise error


def test_archives_are_checked_and_nothing_is_executed_nor_extracted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attack = np.array([Attack(os.mkdir, "executed")])  # numpy pickles arrays of objects
    for key in ("arr_0", "arr_1"):
        arrays = {"arr_0": RGB[:1], "arr_1": np.zeros(1, int), key: attack}
        path = make(tmp_path / "evil.npz", arrays)
        assert "evil.npz: " in (message := error_of(path, labels=key == "arr_1"))
        assert "Object arrays" in message and not (tmp_path / "executed").exists()
    files = {"x/../../a.png": PNG, "../up.png": PNG, "/abs.png": png(RGB[1])}
    dataset = data.load(make(tmp_path / "tricks.zip", files))
    assert np.array_equal(dataset.images, RGB[1:2])  # names with leading dots are hidden
    assert not list(tmp_path.rglob("*.png")) and not (tmp_path.parent / "a.png").exists()
    for name, content, part in (("a.zip", {"a.png": PNG}, PNG), ("a.npz", {"arr_0": RGB}, RGB)):
        path = make(tmp_path / name, content)
        path.write_bytes(path.read_bytes().replace(bytes(part)[-9:], bytes(9)))  # check sums
        assert name in error_of(path)
