"""Data: every format round trips, the order is a pure function, bad input is one clear line."""

import errno
import gzip
import hashlib
import io
import json
import os
import pickle
import tarfile
import types
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from machinery import data, files
from machinery.files import UserError


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)


@pytest.fixture
def gray():
    return np.random.default_rng(1).integers(0, 256, (6, 8, 8, 1), np.uint8)


def png(image, format="PNG", mode=None, **options):
    """The bytes of an image file from uint8 [H, W, C]."""
    image, file = data._to_pillow(np.asarray(image)), io.BytesIO()
    (image.convert(mode) if mode else image).save(file, format, **options)
    return file.getvalue()


def npy(array):
    np.save(file := io.BytesIO(), array)
    return file.getvalue()


def make(path, files):
    """A folder, or a zip if `path` ends in .zip, from {name: bytes or str}."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def images_and_labels(images, labels):
    files = {f"{i // 4:05d}/img{i}.png": png(image) for i, image in enumerate(images)}
    return {**files, "dataset.json": json.dumps({"labels": list(zip(files, map(int, labels)))})}


def error_of(spec, cache=None, labels=False):
    """The message with which `spec`, or its labels alone, are refused; it is one line."""
    if labels:
        dataset = data.load(spec, cache)
        assert dataset.labels is None
    with pytest.raises(UserError) as caught:
        dataset.require_labels() if labels else data.load(spec, cache)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------------------------------
# Formats.


def test_digits_are_embedded():
    digits = data.load("digits")
    assert (len(digits), digits.resolution, digits.channels, digits.label_dim) == (1797, 8, 1, 10)
    assert digits.images.max() == 255 and len(np.unique(digits.images)) == 17
    counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert digits.class_frequencies() == counts and digits.classes is None


@pytest.mark.parametrize("kind", ["folder", "set.zip"])
def test_images_with_labels_in_a_folder_or_a_zip(tmp_path, rgb, kind):
    labels = [3, 1, 4, 1, 5, 9]
    hidden = dict.fromkeys([".hidden.png", "@eaDir/0.png", "__MACOSX/0.png"], "not an image")
    dataset = data.load(make(tmp_path / kind, {**images_and_labels(rgb, labels), **hidden}))
    assert np.array_equal(dataset.images, rgb) and dataset.labels.tolist() == labels
    assert dataset.labels.dtype == np.int64 and dataset.label_dim == 10


@pytest.mark.parametrize("limit", [100, 2**28])  # through the cache, or in memory
def test_gray_stays_gray_and_one_colour_image_makes_all_rgb(
        tmp_path, gray, rgb, monkeypatch, limit):
    monkeypatch.setattr(data, "MEMORY_LIMIT", limit)
    files, cache = {f"{i}.png": png(image) for i, image in enumerate(gray)}, tmp_path / "cache"
    assert np.array_equal(data.load(make(tmp_path / "gray", files), cache).images, gray)
    for place, name in ((6, "9.png"), (0, "!.png")):
        mixed = make(tmp_path / f"colour {place}", {**files, name: png(rgb[0])})
        expected = np.insert(gray.repeat(3, axis=3), place, rgb[0], axis=0)
        assert np.array_equal(data.load(mixed, cache).images, expected)


@pytest.mark.parametrize("format, mode", [
    ("PNG", "P"), ("PNG", "LA"), ("PNG", "RGBA"), ("JPEG", "CMYK"), ("BMP", "RGB"),
    ("WEBP", "RGB"), ("PNG", "1"), ("PNG", "L"), ("TIFF", "RGB"), ("GIF", "P"), ("AVIF", "RGB"),
])
def test_every_mode_becomes_gray_or_rgb(tmp_path, format, mode):
    content = png(np.full((8, 8, 3), 255, np.uint8), format, mode)
    dataset = data.load(make(tmp_path / "set", {f"0.{format}": content}))  # upper case counts too
    assert dataset.channels == (1 if mode in ("1", "L", "LA") else 3)
    assert (dataset.images == 255).all()


@pytest.mark.parametrize("format, mode", [("PNG", "RGBA"), ("PNG", "LA"), ("WEBP", "RGBA")])
def test_transparent_images_lie_on_white(tmp_path, format, mode):
    """The colour under transparent parts is not seen, half-transparent parts are mixed."""
    colour = np.array([[[200, 30, 90]]]).repeat(3, axis=1)[..., :1 if mode == "LA" else 3]
    alpha = np.array([[[0], [128], [255]]])
    pixels = np.concatenate([colour, alpha], axis=2).astype(np.uint8).repeat(3, axis=0)
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    Image.fromarray(pixels).save(file := io.BytesIO(), format, **options)
    dataset = data.load(make(tmp_path / "set", {f"0.{format.lower()}": file.getvalue()}))
    row, seen = dataset.images[0, 0], np.round((colour * alpha + 255 * (255 - alpha)) / 255)[0]
    assert row.shape == seen.shape and np.abs(row.astype(float) - seen).max() <= 1  # two roundings
    assert (row[0] == 255).all() and (row[2] == colour[0, 2]).all()


@pytest.mark.parametrize("mode, hidden, shown, seen", [
    ("RGB", (200, 30, 90), (1, 2, 3), (1, 2, 3)), ("L", 77, 0, 0), ("1", 0, 1, 255),
    ("P", 0, 1, (4, 5, 6)),
])
def test_a_colour_that_is_declared_transparent_becomes_white(tmp_path, mode, hidden, shown, seen):
    """PNGs without an alpha channel can name one colour that is transparent (the chunk tRNS)."""
    image, file = Image.new(mode, (4, 4), hidden), io.BytesIO()
    if mode == "P":
        image.putpalette([1, 2, 3, 4, 5, 6])
    image.paste(shown, (0, 0, 2, 4))
    image.save(file, "PNG", transparency=hidden)
    images = data.load(make(tmp_path / "set", {"0.png": file.getvalue()})).images
    assert images.shape[3] == np.size(seen)
    assert (images[0, :, :2] == seen).all() and (images[0, :, 2:] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(tmp_path, rgb, orientation):
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions that undo EXIF's
    stored, exif = Image.fromarray(rgb[0]), Image.Exif()
    exif[0x0112] = orientation
    stored = stored.transpose(inverse[orientation]) if orientation > 1 else stored
    files = {"0.png": png(stored, exif=exif), "1.png": png(rgb[1], exif=b"Exif\0\0damaged")}
    assert np.array_equal(data.load(make(tmp_path / "set", files)).images, rgb[:2])


@pytest.mark.parametrize("colours, channels", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bit_files_are_refused(tmp_path, colours, channels):
    """By the depth in the file: Pillow gives RGB and gray with alpha the same modes as 8 bits."""
    def chunk(kind, content):
        crc = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + crc

    header = (8).to_bytes(4, "big") * 2 + bytes([16, colours, 0, 0, 0])
    pixels = zlib.compress((b"\0" + b"\x0f\xff" * 8 * channels) * 8)
    file = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    Image.new("F" if colours else "I;16", (8, 8)).save(tiff := io.BytesIO(), "TIFF")
    for name, content in {"0.png": b"\x89PNG\r\n\x1a\n" + file, "0.tif": tiff.getvalue()}.items():
        assert "convert it to 8 bits" in error_of(make(tmp_path / name, {name: content}))


@pytest.mark.parametrize("key, labels_key", [("arr_0", "arr_1"), ("images", "labels")])
def test_npz(tmp_path, rgb, gray, key, labels_key):
    np.savez_compressed(tmp_path / "a.npz", **{key: rgb, labels_key: np.arange(6, dtype=np.int32)})
    dataset = data.load((tmp_path / "a.npz").rename(tmp_path / "a.NPZ"))
    assert np.array_equal(dataset.images, rgb) and dataset.labels.tolist() == list(range(6))
    np.savez(tmp_path / "gray.npz", **{key: gray[..., 0]})  # without an axis for channels
    assert np.array_equal(data.load(tmp_path / "gray.npz").images, gray)


def idx(array):
    header = (0x800 + array.ndim, *array.shape)
    return b"".join(n.to_bytes(4, "big") for n in header) + array.astype(np.uint8).tobytes()


def idx_folder(images, labels):
    return {"train-images-idx3-ubyte.gz": gzip.compress(idx(images)),
            "train-labels-idx1-ubyte": idx(np.array(labels)),
            "t10k-images-idx3-ubyte": idx(images[:2]),
            "t10k-labels-idx1-ubyte.gz": gzip.compress(idx(np.array([7, 7])))}


@pytest.mark.parametrize("dash", ["-", "."])  # as published, and as Kaggle has them
def test_idx_folder_has_a_training_and_a_test_set(tmp_path, gray, dash):
    files = idx_folder(gray[..., 0], range(6)).items()
    folder = make(tmp_path / "mnist", {k.replace("-idx", f"{dash}idx"): v for k, v in files})
    train, test = data.load(folder), data.load(f"{folder}:test")
    assert np.array_equal(train.images, gray) and train.labels.tolist() == list(range(6))
    assert np.array_equal(test.images, gray[:2]) and test.labels.tolist() == [7, 7]


def test_fashion_mnist_is_debians_or_downloaded_and_checked(tmp_path, monkeypatch, gray):
    """Small files stand in for the real ones, as Debian's package or behind an address."""
    files = {f"{k.removesuffix('.gz')}.gz": gzip.compress(v) if v[:1] == b"\0" else v
             for k, v in idx_folder(gray[..., 0], range(6)).items()}
    (_, hashes), cache = data.DOWNLOADS["fashion-mnist"], tmp_path / "cache"
    here, nowhere = make(tmp_path / "here", files), (tmp_path / "nowhere").as_uri()
    assert sorted(hashes) == sorted(files)
    monkeypatch.setattr(data, "FASHION_MNIST", here)
    assert np.array_equal(data.load("fashion-mnist").images, gray)

    monkeypatch.setattr(data, "FASHION_MNIST", tmp_path / "not installed")
    monkeypatch.setitem(data.DOWNLOADS, "fashion-mnist", (f"{here.as_uri()}/", hashes))
    message = error_of("fashion-mnist", cache)
    assert "train-images-idx3-ubyte.gz is damaged" in message and not list(cache.rglob("*.gz"))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    for url in (here.as_uri(), nowhere):  # nothing is fetched twice
        monkeypatch.setitem(data.DOWNLOADS, "fashion-mnist", (f"{url}/", md5))
        test = data.load("fashion-mnist:test", cache)
        assert np.array_equal(test.images, gray[:2]) and test.labels.tolist() == [7, 7]
    message = error_of("fashion-mnist", tmp_path / "other")
    assert nowhere in message and str(tmp_path / "other" / "fashion-mnist") in message


def cifar10(path, n=4, **replace):
    """A small cifar-10-binary.tar.gz. `replace`: content of a batch. Returns images, labels."""
    rng, names = np.random.default_rng(0), [f"data_batch_{i}" for i in range(1, 6)]
    records = rng.integers(0, 10, (6, n, 3073), np.uint8)
    contents = dict(zip([*names, "test_batch"], map(bytes, records))) | replace
    with tarfile.open(path, "w:gz") as tar:
        for name in sorted(contents, reverse=True):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = len(contents[name])
            tar.addfile(member, io.BytesIO(contents[name]))
    records = records.reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]


def test_cifar10(tmp_path):
    (tmp_path / "cifar10").mkdir()
    archive = tmp_path / "cifar10" / "cifar-10-binary.tar.gz"
    images, labels = cifar10(archive)
    train = data.load("cifar10", cache=tmp_path)  # found in the cache folder, so not downloaded
    assert train.images.flags.c_contiguous  # so that a batch is read in one piece per image
    for found, part in ((train, slice(20)), (data.load(f"{archive}:test"), slice(20, 24))):
        assert np.array_equal(found.images, images[part])
        assert np.array_equal(found.labels, labels[part])


def test_cifar10_in_other_forms_names_the_archive_to_give(tmp_path):
    """The Python version, an unpacked folder of either, and damaged files."""
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("cifar-10-batches-py/data_batch_1"))
    cifar10(tmp_path / "short.tar.gz", data_batch_1=bytes(3072))
    whole = (tmp_path / "short.tar.gz").read_bytes()
    make(tmp_path, {"half.tar.gz": whole[:len(whole) // 2], "text.tar.gz": b"this is text",
                    "python/data_batch_1": "...", "binary/data_batch_1.bin": "..."})
    for path in tmp_path.iterdir():
        message = error_of(path)
        assert path.name in message and "give cifar-10-binary.tar.gz" in message


class Attack:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("key", ["arr_0", "arr_1"])
def test_an_npz_that_runs_code_is_refused_and_not_run(tmp_path, rgb, key, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attack = np.array([Attack()])  # numpy pickles arrays of objects
    np.savez(tmp_path / "evil.npz", **{"arr_0": rgb[:1], "arr_1": np.zeros(1, int), key: attack})
    assert "evil.npz" in error_of(tmp_path / "evil.npz", labels=key == "arr_1")
    assert not (tmp_path / "executed").exists()


# --------------------------------------------------------------------------------------------------
# Nothing is decided silently: which files, which labels.


def test_each_folder_is_read_once_whatever_links_point_to(tmp_path, rgb):
    up, far = tmp_path / "up", tmp_path / "far"
    folder = make(up / "set", {"0.png": png(rgb[0]), "sub/1.png": png(rgb[1])})
    make(tmp_path, {"up/other.png": png(rgb[2]), "far/2.png": png(rgb[3])})
    links = {"self": folder, "parent": up, "twice": folder / "sub", "far": far}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    assert np.array_equal(data.load(folder).images, rgb[[0, 3, 1]])  # 0, far/2, sub/1


def test_files_that_are_not_read_are_named(tmp_path, rgb, capsys):
    files = {"0.png": png(rgb[0]), "1.JFIF": png(rgb[0], "JPEG")}
    files |= dict.fromkeys(["a.HEIC", "b.heic", "c.psd"], "x")
    for name in ("set", "set.ZIP"):
        assert len(data.load(make(tmp_path / name.lower(), files).rename(tmp_path / name))) == 2
        assert "3 files not read: .heic .psd" in capsys.readouterr().err


def test_a_folder_named_like_a_built_in_set_is_pointed_out(tmp_path, rgb, monkeypatch, capsys):
    make(tmp_path / "digits", {"0.png": png(rgb[0])})
    monkeypatch.chdir(tmp_path)
    assert len(data.load("digits")) == 1797 and "./digits" in capsys.readouterr().err
    assert len(data.load("./digits")) == 1 and not capsys.readouterr().err


@pytest.mark.parametrize("kind", ["folder", "set.zip"])
@pytest.mark.parametrize("top", ["", "pets/", "some/where/"])
def test_class_folders_give_labels(tmp_path, rgb, kind, top):
    names = ("dog/x/1.png", "cat/1.png", "ant/b.png", "dog/0.png")
    files = {f"{top}{name}": png(image) for name, image in zip(names, rgb)}
    dataset = data.load(make(tmp_path / kind, files))
    assert dataset.classes == ["ant", "cat", "dog"] and dataset.labels.tolist() == [0, 1, 2, 2]
    assert dataset.class_frequencies() == [1, 1, 2]


@pytest.mark.parametrize("names", [
    ["00000/0.png", "00001/1.png"],  # as write_images and EDM's tool number them
    ["cat/0.png", "cat/1.png"], ["cat/0.png", "1.png"], ["0.png", "1.png"],
    ["cat/0.png", "dog/1.png", "dataset.json"],
])
def test_other_folders_are_no_classes(tmp_path, rgb, names):
    contents = {"dataset.json": '{"labels": null}'}
    files = {name: contents.get(name, png(rgb[0])) for name in names}
    folder = make(tmp_path / "set", files)
    assert data.load(folder).label_dim == 0 and "has no labels" in error_of(folder, labels=True)


@pytest.mark.parametrize("kind", ["folder", "set.zip"])
def test_a_dataset_json_may_lie_one_folder_down_and_spell_names_differently(tmp_path, rgb, kind):
    names = ["pets/a/0.png", "pets/e\u0301.png", "pets/z/1.png"]  # decomposed, as macOS writes it
    spelled = [["a\\0.png", 2], ["\u00e9.png", 0], ["./z/1.png", 1]]
    files = {name: png(image) for name, image in zip(names, rgb)}
    files["pets/dataset.json"] = json.dumps({"labels": spelled})
    assert data.load(make(tmp_path / kind, files)).labels.tolist() == [2, 0, 1]


def test_classes_without_images_are_left_out_where_labels_are_asked_for(gray, capsys):
    dataset = data.Dataset("gaps", gray, np.array([9, 3, 3, 9, 3, 3]))
    assert dataset.label_dim == 10
    dataset.require_labels()
    assert dataset.labels.tolist() == [1, 0, 0, 1, 0, 0] and dataset.labels.dtype == np.int64
    assert dataset.class_frequencies() == [4, 2] and dataset.classes == ["3", "9"]
    assert "only classes 3 9 have images" in capsys.readouterr().err
    dataset.require_labels()
    assert not capsys.readouterr().err


@pytest.mark.parametrize("text, expected", [
    ('{"labels": [["a.png", 1], ["c.png", 0]]}',
     "1 images without a label ['b.png'], 1 labels without an image ['c.png']"),
    ('{"labels": [["a.png", 1], ["b.png", -1]]}', "b.png is -1"),
    ('{"labels": [["a.png", 1], ["b.png", 1.5]]}', "b.png is 1.5"),
    ('{"labels": [["a.png", [1, 0]], ["b.png", [0, 1]]]}', "a.png is [1, 0]"),
    ('{"labels": [["a.png", 1], ["b.png", 0], ["./a.png", 0]]}', "a.png is listed with two labels"),
    ('{"labels": [1, 2]}', "not of the form"),
    ('{"classes": []}', "not of the form"),
    ('{"labels": [["a.p', "not of the form"),
])
def test_labels_that_do_not_fit_are_refused_where_labels_are_asked_for(
        tmp_path, gray, text, expected):
    files = {"a.png": png(gray[0]), "b.png": png(gray[1]), "dataset.json": text}
    message = error_of(make(tmp_path / "set", files), labels=True)
    assert "dataset.json" in message and expected in message


# --------------------------------------------------------------------------------------------------
# What networks see.


def test_bytes_to_network_and_back():
    """x/127.5 - 1 takes 0..255 to [-1, 1]; to_uint8 inverts it for every byte, rounds and clips."""
    raw = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    dataset = data.Dataset("all bytes", raw)
    x = dataset.to_model(dataset.batch([0])[0], "cpu")
    assert x.shape == (1, 1, 16, 16) and x.dtype == torch.float32 and (x.min(), x.max()) == (-1, 1)
    assert np.array_equal(data.to_uint8(x), raw)
    x = torch.tensor([-9.0, 9.0, 0.001]).view(3, 1, 1, 1)
    assert data.to_uint8(x).ravel().tolist() == [0, 255, 128]


def test_batches_in_any_order_with_repeats_and_flips(rgb):
    dataset = data.Dataset("rgb", rgb, np.arange(6))
    raw, labels = dataset.batch([5, 0, 5])
    assert np.array_equal(raw, rgb[[5, 0, 5]]) and labels.tolist() == [5, 0, 5]
    assert data.Dataset("rgb", rgb).batch(torch.tensor([1]))[1] is None
    x = dataset.to_model(raw, "cpu", flip=torch.tensor([False, False, True]))
    assert np.array_equal(data.to_uint8(x), [rgb[5], rgb[0], rgb[5][:, ::-1]])


@pytest.fixture
def latents(tmp_path):
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=(3, 4, 8, 8)), rng.uniform(0.1, 1, (3, 4, 8, 8))
    arrays = np.concatenate([mean, std], axis=1).astype(np.float32)
    files = {f"00000/img-mean-std-{i}.npy": npy(a) for i, a in enumerate(arrays)}
    files["dataset.json"] = json.dumps({"labels": [[n, i] for i, n in enumerate(files)]})
    return arrays, make(tmp_path / "latents.zip", files)


def test_latents_are_mean_plus_std_times_noise_then_normalised(latents):
    arrays, path = latents
    dataset = data.load(path)
    assert dataset.is_latent and np.array_equal(dataset.images, arrays)
    assert (dataset.resolution, dataset.channels, dataset.label_dim) == (8, 4, 3)
    raw, labels = dataset.batch([2, 0])
    assert labels.tolist() == [2, 0]
    eps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x = dataset.to_model(raw, "cpu", eps=eps)
    # Some six float32 roundings of numbers below 10, divided by 4.62 * 2.
    channel = arrays[2, 1] + arrays[2, 5] * eps[0, 1].numpy()
    assert torch.allclose(x[0, 1], torch.from_numpy((channel - 3.25) / 4.62 * 0.5), atol=1e-6)
    mean = data.denormalise_latents(dataset.to_model(raw, "cpu"))
    assert torch.allclose(mean, raw[:, :4], atol=1e-5)
    with pytest.raises(UserError, match="flip"):
        dataset.to_model(raw, "cpu", flip=torch.tensor([True, False]))


def test_fingerprint_depends_on_shape_and_content_only(rgb, gray):
    def fingerprint(images, *labels):
        return data.Dataset("a", images, *labels).fingerprint()

    changed = rgb.copy()
    changed[5, 7, 7, 2] ^= 1
    assert fingerprint(rgb) == fingerprint(rgb.copy(), np.arange(6)) != fingerprint(changed)
    assert fingerprint(gray[:4]) != fingerprint(gray[:4].reshape(1, 16, 16, 1))


# --------------------------------------------------------------------------------------------------
# The cache of large data sets, and --resolution.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder to which even small sets are converted."""
    monkeypatch.setattr(data, "MEMORY_LIMIT", 100)
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", ["folder", "set.zip"])
def test_a_large_set_is_converted_once_and_memory_mapped(tmp_path, rgb, kind, cache, monkeypatch):
    path = make(tmp_path / kind, images_and_labels(rgb, range(6)))
    for decode in (data._decode_image, None):  # the second time nothing is converted
        monkeypatch.setattr(data, "_decode_image", decode)
        dataset = data.load(path, cache)
        assert isinstance(dataset.images, np.memmap) and np.array_equal(dataset.images, rgb)
        assert dataset.labels.tolist() == list(range(6))
        assert dataset.fingerprint() == data.Dataset("in memory", rgb).fingerprint()
        assert np.array_equal(dataset.batch([3, 1, 3])[0], rgb[[3, 1, 3]])


def test_a_changed_file_is_converted_again_and_a_damaged_cache_is_named(tmp_path, rgb, cache):
    folder = make(tmp_path / "set", images_and_labels(rgb, range(6)))
    data.load(folder, cache)
    (folder / "00000/img0.png").write_bytes(png(rgb[1]))
    os.utime(folder / "00000/img0.png", (1, 1))
    assert np.array_equal(data.load(folder, cache).images[0], rgb[1])
    for cached in (cache / "datasets").iterdir():
        cached.write_bytes(cached.read_bytes()[:300])
    message = error_of(folder, cache)
    assert str(cache / "datasets") in message and "delete" in message


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, rgb, cache, monkeypatch, error):
    folder, decode = make(tmp_path / "set", images_and_labels(rgb, range(6))), data._decode_image
    pictures = iter(range(3))

    def stop_halfway(*args):
        if next(pictures, None) is None:
            raise error
        return decode(*args)

    monkeypatch.setattr(data, "_decode_image", stop_halfway)
    with pytest.raises(type(error)):
        data.load(folder, cache)
    assert list((cache / "datasets").iterdir()) == []
    monkeypatch.setattr(data, "_decode_image", decode)
    assert np.array_equal(data.load(folder, cache).images, rgb)


@pytest.mark.parametrize("limit", [100, 2**28])  # through the cache, or in memory
@pytest.mark.parametrize("kind", ["folder", "set.zip", "set.npz", "idx"])
def test_resolution_cuts_out_the_middle_and_resizes(tmp_path, monkeypatch, kind, limit):
    """As EDM's dataset tool: Pillow's Lanczos filter on the largest square in the middle."""
    monkeypatch.setattr(data, "MEMORY_LIMIT", limit)
    channels, path, cache = 1 if kind == "idx" else 3, tmp_path / kind, tmp_path / "cache"
    images = np.random.default_rng(0).integers(0, 256, (6, 12, 17, channels), np.uint8)
    if kind == "set.npz":
        np.savez(path, arr_0=images, arr_1=np.arange(6))
    else:
        make(path, idx_folder(images[..., 0], range(6)) if kind == "idx"
             else images_and_labels(images, range(6)))
    squares = [Image.fromarray(image.squeeze()[:, 2:14]) for image in images]
    expected = [square.resize((8, 8), Image.Resampling.LANCZOS) for square in squares]
    for _ in range(2):
        dataset = data.load(path, cache, resolution=8)
        assert np.array_equal(dataset.images, np.reshape(expected, (6, 8, 8, -1)))
        assert dataset.labels.tolist() == list(range(6))
        mapped = limit == 100 and kind in ("folder", "set.zip")
        assert isinstance(dataset.images, np.memmap) == mapped
    assert data.load(path, cache, resolution=12).resolution == 12  # not the cache of the other
    assert "--resolution" in error_of(path, cache)


def test_resolution_unites_sizes_keeps_what_fits_and_leaves_latents_alone(tmp_path, rgb, latents):
    tall, large = np.concatenate([rgb[1][:2], rgb[1], rgb[1][:3]]), rgb[2].repeat(5, 0).repeat(5, 1)
    files = {"a.png": png(rgb[0]), "b.png": png(tall), "c.png": png(large)}
    folder = make(tmp_path / "set", files)
    assert "--resolution" in error_of(folder)
    images = data.load(folder, resolution=8).images
    assert np.array_equal(images[:2], rgb[:2]) and images.shape == (3, 8, 8, 3)
    assert np.array_equal(data.load("digits", resolution=8).images, data.load("digits").images)
    with pytest.raises(UserError, match="latents.zip: latents cannot be resized"):
        data.load(latents[1], resolution=8)


# --------------------------------------------------------------------------------------------------
# The order of the data.


def batches(dataset, batch, seed=0, start=0, rank=0, world_size=1):
    rt = types.SimpleNamespace(
        batch=batch, rank=rank, world_size=world_size, device=torch.device("cpu"))
    return data.Batches(dataset, rt, seed, start)


def take(count, n, *args, **kwargs):
    """The positions of the images in the first `count` batches of a data set of `n`."""
    dataset = data.Dataset("numbered", np.zeros((n, 2, 2, 1), np.uint8), np.arange(n))
    order = batches(dataset, *args, **kwargs)
    return [next(order)[1].tolist() for _ in range(count)]


def test_every_image_comes_once_per_epoch_in_a_new_order_that_the_seed_gives():
    seen = sum(take(15, 10, 4), [])  # 6 epochs; batches straddle their boundaries
    epochs = [seen[i:i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert seen != sum(take(15, 10, 4, seed=1), [])


@pytest.mark.parametrize("size", [10, 3])  # 3: less than a batch
def test_the_order_depends_on_the_number_of_images_seen_alone(size):
    """Not on the sizes of batches, nor ranks (each has its share), nor where a run continues."""
    alone = take(10, size, 4)
    assert take(3, size, 4, start=28) == alone[7:]
    assert sum(take(5, size, 8), []) == sum(alone, [])
    ranks = [take(10, size, 4, rank=rank, world_size=2) for rank in range(2)]
    assert [first + second for first, second in zip(*ranks)] == alone


def test_a_training_batch_is_what_the_runtime_draws(rgb, latents):
    dataset, eps = data.Dataset("rgb", rgb, np.arange(6)), torch.full((2, 4, 8, 8), 0.5)
    order = batches(dataset, 6)
    order.rt.rand = lambda: torch.tensor([0.1, 0.9, 0.9, 0.1, 0.49, 0.51])
    for xflip in (True, False):
        x, labels = order.training_batch(xflip)
        flip = torch.tensor([True, False, False, True, True, False]) if xflip else None
        assert torch.equal(x, dataset.to_model(dataset.batch(labels)[0], "cpu", flip))
    order = batches(dataset := data.load(latents[1]), 2)
    order.rt.randn = lambda *shape: eps if shape == (4, 8, 8) else None
    x, labels = order.training_batch(xflip=False)
    assert torch.equal(x, dataset.to_model(dataset.batch(labels)[0], "cpu", eps=eps))


# --------------------------------------------------------------------------------------------------
# Writing.


def test_save_grid_enlarges_by_whole_pixels_and_fills_row_by_row(tmp_path, gray):
    data.save_grid(gray[:5], tmp_path / "new" / "grid.png", columns=3, scale=2, padding=1)
    grid = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert grid.shape == (2 * 17 + 1, 3 * 17 + 1)
    for i in range(2):  # the fourth image begins the second row
        assert np.array_equal(grid[18 + i:34:2, 1 + i:17:2], gray[3, ..., 0])
    assert (grid[17] == 255).all() and (grid[18:, 35:] == 255).all()
    assert os.listdir(tmp_path / "new") == ["grid.png"]


@pytest.mark.parametrize("out", ["samples.npz", "samples"])
@pytest.mark.parametrize("labelled", [True, False])
def test_what_is_written_can_be_loaded(tmp_path, rgb, out, labelled):
    images, labels = np.concatenate([rgb, 255 - rgb]), torch.arange(12)  # names sort as numbers do
    parts = [(images[i:j], labels[i:j] if labelled else None) for i, j in ((0, 7), (7, 12))]
    data.write_images(iter(parts), tmp_path / out)
    dataset = data.load(tmp_path / out)
    assert np.array_equal(dataset.images, images) and os.listdir(tmp_path) == [out]
    assert dataset.labels.tolist() == list(range(12)) if labelled else dataset.labels is None


def test_npz_is_what_numpy_reads_and_stays_if_the_next_fails(tmp_path, gray):
    def stopped():
        yield gray, None
        raise KeyboardInterrupt

    latents = np.ones((2, 4, 8, 8), np.float32)
    data.write_images([(gray, np.arange(6))], tmp_path / "a.npz")
    data.write_images([(latents, None)], tmp_path / "b.npz")
    for parts, out, error in ((stopped(), "a.npz", KeyboardInterrupt),
                              ([(latents, None)], "folder", UserError),
                              (stopped(), "folder", KeyboardInterrupt)):
        with pytest.raises(error):
            data.write_images(parts, tmp_path / out)
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert np.array_equal(a["arr_0"], gray) and a["arr_1"].tolist() == list(range(6))
        assert np.array_equal(b["latents"], latents) and b.files == ["latents"]
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "b.npz"]


def test_a_folder_with_something_in_it_is_not_touched(tmp_path):
    (tmp_path / "mine.png").write_bytes(b"precious")
    for out in (tmp_path, tmp_path / "mine.png"):
        with pytest.raises(UserError, match="exists already"):
            data.write_images(None, out)  # refused before images are asked for
    assert (tmp_path / "mine.png").read_bytes() == b"precious"


# --------------------------------------------------------------------------------------------------
# Bad input.


def blank(*shape):
    """A black picture [H, W, C], or a latent of zeros."""
    return png(np.zeros(shape, np.uint8)) if shape[-1] == 3 else npy(np.zeros(shape, np.float32))


@pytest.mark.parametrize("kind", ["folder", "set.zip"])
@pytest.mark.parametrize("files, expected", [
    ({"notes.txt": "no image"}, ["0 images"]),
    ({"a.png": blank(8, 8, 3), "b.png": blank(9, 9, 3)},
     ["b.png", "[9, 9, 3]", "a.png", "[8, 8, 3]", "--resolution"]),
    ({"a.png": blank(8, 6, 3)}, ["a.png", "6x8", "square", "--resolution"]),
    ({"a.png": "this is text"}, ["a.png", "not an image"]),
    ({"a.png": png(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))[:5000]},
     ["a.png", "truncated"]),
    ({"a.png": blank(8, 8, 3), "b.npy": blank(8, 8, 8)}, ["1 images", "1 latents"]),
    ({"a.npy": blank(4, 8, 8)}, ["a.npy", "[N, 8, h, h]"]),
    ({"a.npy": blank(8, 8, 8), "b.npy": blank(8, 4, 4)}, ["b.npy", "[8, 4, 4]", "[8, 8, 8]"]),
    ({"a.npy": blank(8, 8, 8)[:200]}, ["a.npy"]),
    ({"a.npy": pickle.dumps([1])}, ["a.npy"]),
])
def test_bad_files_are_named(tmp_path, kind, files, expected):
    (tmp_path / "folder").mkdir()
    message = error_of(make(tmp_path / kind, files))
    assert all(words in message for words in [kind, *expected]), message


@pytest.mark.parametrize("error", [
    OSError(errno.EINVAL, "Invalid argument"), OSError("truncated"), MemoryError(),
    RecursionError(), AttributeError("x"), NotImplementedError(), UserError("no name"),
])
def test_whatever_a_parser_raises_names_the_file(error):
    with pytest.raises(UserError, match="^some/file: "), files.reading("some/file", "a picture"):
        raise error


@pytest.mark.parametrize("name", ["other/file", None])
def test_errors_of_the_system_keep_their_words(name):
    with pytest.raises(OSError) as caught, files.reading("some/file", "a picture"):
        raise OSError(errno.EACCES, "Permission denied", name)
    assert (caught.value.errno, caught.value.filename) == (errno.EACCES, name or "some/file")


def test_a_picture_above_pillows_limit_is_too_large_not_damaged(tmp_path, rgb, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    message = error_of(make(tmp_path / "set", {"big.png": png(rgb[0])}))
    assert "big.png" in message and "too large" in message and "damaged" not in message


def test_unknown_and_damaged_files_are_named(tmp_path, rgb):
    message = error_of(tmp_path / "nowhere")
    assert "nowhere" in message and "digits" in message
    assert "test set" in error_of("digits:test")
    make(tmp_path, dict.fromkeys(["notes.txt", "text.zip", "text.npz"], "this is text"))
    whole = make(tmp_path / "whole.zip", {"a.png": png(rgb[0])}).read_bytes()
    (tmp_path / "damaged.zip").write_bytes(whole.replace(b"IDAT", b"IDOT"))  # wrong check sum
    assert "damaged.zip/a.png" in error_of(tmp_path / "damaged.zip")
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "whole.npz", rgb.repeat(8, axis=1).repeat(8, axis=2).repeat(8, axis=0))
        whole = (tmp_path / "whole.npz").read_bytes()
        half = len(whole) // 2
        (tmp_path / "half.npz").write_bytes(whole[:half])
        (tmp_path / "changed.npz").write_bytes(whole[:half] + b"x" + whole[half + 1:])
        for name in ("notes.txt", "text.zip", "text.npz", "half.npz", "changed.npz"):
            assert name in error_of(tmp_path / name)


def test_members_of_a_zip_that_point_outside_are_never_extracted(tmp_path, rgb):
    files = {"x/../../a.png": png(rgb[0]), "../up.png": png(rgb[0]), "/abs.png": png(rgb[1])}
    dataset = data.load(make(tmp_path / "tricks.zip", files))
    assert np.array_equal(dataset.images, rgb[1:2])  # names with leading dots are hidden
    assert not list(tmp_path.rglob("*.png")) and not (tmp_path.parent / "a.png").exists()


@pytest.mark.parametrize("arrays, expected", [
    ({"mu": np.zeros(4), "sigma": np.zeros((4, 4))}, "holds ['mu', 'sigma'], but no images"),
    ({"arr_0": np.zeros((2, 8, 8, 4), np.uint8)}, "[2, 8, 8, 4]"),
    ({"arr_0": np.zeros((8, 8), np.uint8)}, "[8, 8]"),
    ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "no images"),
    ({"arr_0": np.zeros((2, 8, 9, 3), np.uint8)}, "square"),
    ({"arr_0": np.array([{}, {}])}, "Object arrays"),
    ({"arr_1": np.zeros(3, int)}, "labels int64 [3] do not match 2 images"),
    ({"arr_1": np.array([0, -1])}, "an integer from 0"),
    ({"arr_1": np.array([0, 0.5])}, "an integer from 0"),
    ({"arr_1": np.array([{}, {}])}, "a.npz"),
])
def test_npz_with_something_else_in_it(tmp_path, arrays, expected):
    images = {"arr_0": np.zeros((2, 8, 8, 3), np.uint8)} if "arr_1" in arrays else {}
    np.savez(tmp_path / "a.npz", **images, **arrays)
    message = error_of(tmp_path / "a.npz", labels="arr_1" in arrays)
    assert "a.npz" in message and expected in message


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"


@pytest.mark.parametrize("name, change, expected", [
    (IMAGES, lambda raw: raw[:-20], "ended before"),
    (IMAGES, lambda raw: b"this is no gzip file", "gzip"),
    (IMAGES, lambda raw: gzip.compress(gzip.decompress(raw)[:-1]), "size 383"),
    (IMAGES, lambda raw: gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12), "damaged"),
    (LABELS, lambda raw: raw[:-1], "size 5"),
    (LABELS, lambda raw: idx(np.arange(5)), "labels uint8 [5] do not match 6 images"),
    (LABELS, None, f"has no {LABELS}"),
    (IMAGES, None, f"has no {IMAGES[:-3]}"),
])
def test_missing_and_damaged_idx_files(tmp_path, gray, name, change, expected):
    files = idx_folder(gray[..., 0], range(6))
    raw = files.pop(name)
    files |= {name: change(raw)} if change else {}
    message = error_of(make(tmp_path / "mnist", files), labels="labels" in name)
    assert expected in message and ("match" in expected or name.removesuffix(".gz") in message)
