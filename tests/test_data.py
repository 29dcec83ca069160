"""data.py: every format round trips, the order of the data is a pure function, bad input is one clear line."""

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


def png(image, format="PNG", mode=None):
    """The bytes of an image file from uint8 [H, W, C]."""
    image = Image.fromarray(image.squeeze(-1) if image.shape[2] == 1 else image)
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, format)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
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
    return {**files, "dataset.json": json.dumps({"labels": [[n, l] for n, l in zip(files, labels)]})}


def error_of(spec, cache=None, labels=False):
    """The message with which `spec`, or its labels alone, are refused; it is one line."""
    if labels:
        dataset = data.load(spec, cache)
        assert dataset.labels is None
    with pytest.raises(UserError) as caught:
        dataset.require_labels() if labels else data.load(spec, cache)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------
# Formats.


def test_digits_are_embedded():
    digits = data.load("digits")
    assert (len(digits), digits.resolution, digits.channels, digits.label_dim) == (1797, 8, 1, 10)
    assert digits.images.max() == 255 and len(np.unique(digits.images)) == 17
    assert np.bincount(digits.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@pytest.mark.parametrize("kind", ["folder", "set.zip"])
def test_images_with_labels_in_a_folder_or_a_zip(tmp_path, rgb, kind):
    labels = [3, 1, 4, 1, 5, 9]
    hidden = dict.fromkeys([".hidden.png", "@eaDir/0.png", "__MACOSX/0.png"], "not an image")
    files = {**images_and_labels(rgb, labels), **hidden}
    dataset = data.load(make(tmp_path / kind, files))
    assert np.array_equal(dataset.images, rgb)
    assert dataset.labels.dtype == np.int64 and dataset.labels.tolist() == labels and dataset.label_dim == 10


@pytest.mark.parametrize("limit", [100, 2**28])  # through the cache, or in memory
def test_gray_stays_gray_and_one_colour_image_makes_all_rgb(tmp_path, gray, rgb, monkeypatch, limit):
    monkeypatch.setattr(data, "MEMORY_LIMIT", limit)
    files, cache = {f"{i}.png": png(image) for i, image in enumerate(gray)}, tmp_path / "cache"
    assert np.array_equal(data.load(make(tmp_path / "gray", files), cache).images, gray)
    for place, name in ((6, "9.png"), (0, "!.png")):
        images = data.load(make(tmp_path / f"colour {place}", {**files, name: png(rgb[0])}), cache).images
        assert np.array_equal(images, np.insert(gray.repeat(3, axis=3), place, rgb[0], axis=0))


@pytest.mark.parametrize("format, mode", [("PNG", "P"), ("PNG", "LA"), ("PNG", "RGBA"), ("JPEG", "CMYK"),
                                          ("BMP", "RGB"), ("WEBP", "RGB"), ("PNG", "1"), ("PNG", "L"),
                                          ("TIFF", "RGB"), ("GIF", "P"), ("AVIF", "RGB")])
def test_every_mode_becomes_gray_or_rgb(tmp_path, format, mode):
    if f".{format.lower()}" == ".avif" not in data.SUFFIXES:
        pytest.skip("this Pillow reads no AVIF")
    flat = np.full((8, 8, 3), 255, np.uint8)
    suffix = {"JPEG": "JPEG"}.get(format, format.lower())  # upper case counts too
    dataset = data.load(make(tmp_path / "set", {f"0.{suffix}": png(flat, format, mode)}))
    assert dataset.channels == (1 if mode in ("1", "L", "LA") else 3) and (dataset.images == 255).all()


@pytest.mark.parametrize("format, mode", [("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "PA"), ("WEBP", "RGBA")])
def test_transparent_images_lie_on_white(tmp_path, format, mode):
    """Whatever colour is hidden under the transparent parts does not come to light, half-transparent parts are mixed."""
    colour, alpha = np.array([[[200, 30, 90]]]).repeat(3, axis=1), np.array([[[0], [128], [255]]])
    if mode == "LA":
        colour = colour[..., :1]
    pixels = np.concatenate([colour, alpha], axis=2).astype(np.uint8).repeat(3, axis=0)
    file = io.BytesIO()
    image = Image.fromarray(pixels, "LA" if mode == "LA" else "RGBA")
    if mode == "PA":  # a palette with an opacity for each of its entries
        palette = Image.fromarray(np.arange(3, dtype=np.uint8)[None].repeat(3, axis=0), "P")
        palette.putpalette([200, 30, 90] * 3)
        palette.save(file, format, transparency=bytes([0, 128, 255]))
    else:
        image.save(file, format, **({"lossless": True, "exact": True} if format == "WEBP" else {}))
    dataset = data.load(make(tmp_path / "set", {f"0.{format.lower()}": file.getvalue()}))
    assert dataset.channels == colour.shape[2]
    seen = np.round((colour * alpha + 255 * (255 - alpha)) / 255)
    assert np.abs(dataset.images[0, 0].astype(float) - seen[0]).max() <= 1  # two roundings
    assert (dataset.images[0, :, 0] == 255).all() and (dataset.images[0, :, 2] == colour[0, 2]).all()


@pytest.mark.parametrize("mode, hidden", [("RGB", (200, 30, 90)), ("L", 77), ("1", 0)])
def test_a_colour_that_is_declared_transparent_becomes_white(tmp_path, mode, hidden):
    """PNGs without an alpha channel can name one colour that is transparent (the chunk tRNS)."""
    image = Image.new(mode, (4, 4), hidden)
    image.paste(0 if mode == "L" else 1 if mode == "1" else (1, 2, 3), (0, 0, 2, 4))
    file = io.BytesIO()
    image.save(file, "PNG", transparency=hidden)
    images = data.load(make(tmp_path / "set", {"0.png": file.getvalue()})).images
    assert images.shape[3] == (3 if mode == "RGB" else 1) and (images[0, :, 2:] == 255).all()
    assert (images[0, 0, 0] == {"RGB": (1, 2, 3), "L": 0, "1": 255}[mode]).all()


@pytest.mark.parametrize("key, labels_key", [("arr_0", "arr_1"), ("images", "labels")])
def test_npz(tmp_path, rgb, gray, key, labels_key):
    np.savez_compressed(tmp_path / "a.NPZ", **{key: rgb, labels_key: np.arange(6, dtype=np.int32)})
    dataset = data.load((tmp_path / "a.NPZ.npz").rename(tmp_path / "a.NPZ"))
    assert np.array_equal(dataset.images, rgb) and dataset.labels.tolist() == list(range(6))
    np.savez(tmp_path / "gray.npz", **{key: gray[..., 0]})  # without an axis for channels
    assert np.array_equal(data.load(tmp_path / "gray.npz").images, gray)


def idx(array):
    magic = {3: 0x803, 1: 0x801}[array.ndim]
    return b"".join(int(n).to_bytes(4, "big") for n in (magic, *array.shape)) + array.astype(np.uint8).tobytes()


def idx_folder(images, labels):
    return {"train-images-idx3-ubyte.gz": gzip.compress(idx(images)),
            "train-labels-idx1-ubyte": idx(np.array(labels)),
            "t10k-images-idx3-ubyte": idx(images[:2]),
            "t10k-labels-idx1-ubyte.gz": gzip.compress(idx(np.array([7, 7])))}


@pytest.mark.parametrize("dash", ["-", "."])  # as published, and as Kaggle has them
def test_idx_folder_has_a_training_and_a_test_set(tmp_path, gray, dash):
    files = {name.replace("-idx", f"{dash}idx"): content for name, content in idx_folder(gray[..., 0], range(6)).items()}
    folder = make(tmp_path / "mnist", files)
    train, test = data.load(folder), data.load(f"{folder}:test")
    assert np.array_equal(train.images, gray) and train.labels.tolist() == list(range(6))
    assert np.array_equal(test.images, gray[:2]) and test.labels.tolist() == [7, 7]


def test_fashion_mnist_is_debians_or_downloaded_and_checked(tmp_path, monkeypatch, gray):
    """Small files stand in for the real ones: on disk where Debian's package has them, then behind an address."""
    files = {name if name.endswith(".gz") else f"{name}.gz": content if name.endswith(".gz") else gzip.compress(content)
             for name, content in idx_folder(gray[..., 0], range(6)).items()}
    here, nowhere = make(tmp_path / "here", files), tmp_path / "nowhere"
    _, hashes = data.DOWNLOADS["fashion-mnist"]
    assert sorted(hashes) == sorted(files)
    monkeypatch.setattr(data, "FASHION_MNIST", here)
    assert np.array_equal(data.load("fashion-mnist").images, gray)

    monkeypatch.setattr(data, "FASHION_MNIST", make(tmp_path / "part", dict(list(files.items())[:3])))  # a half-removed package
    monkeypatch.setitem(data.DOWNLOADS, "fashion-mnist", (f"{here.as_uri()}/", hashes))
    message = error_of("fashion-mnist", cache=tmp_path / "cache")
    assert "damaged" in message and "train-images-idx3-ubyte.gz" in message and not list((tmp_path / "cache").rglob("*.gz"))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setitem(data.DOWNLOADS, "fashion-mnist", (f"{here.as_uri()}/", md5))
    test = data.load("fashion-mnist:test", cache=tmp_path / "cache")
    assert np.array_equal(test.images, gray[:2]) and test.labels.tolist() == [7, 7]

    monkeypatch.setitem(data.DOWNLOADS, "fashion-mnist", (f"{nowhere.as_uri()}/", md5))
    assert len(data.load("fashion-mnist", cache=tmp_path / "cache")) == 6  # nothing is fetched twice
    message = error_of("fashion-mnist", cache=tmp_path / "other")
    assert nowhere.as_uri() in message and str(tmp_path / "other" / "fashion-mnist") in message


def cifar10(path, n=4, **replace):
    """A small cifar-10-binary.tar.gz. `replace`: content of a batch. Returns images [6n, 32, 32, 3], labels."""
    rng, images, labels = np.random.default_rng(0), [], []
    with tarfile.open(path, "w:gz") as tar:
        for name in ["data_batch_2", "data_batch_1", *(f"data_batch_{i}" for i in (3, 4, 5)), "test_batch"]:
            images.append(rng.integers(0, 256, (n, 32, 32, 3), np.uint8))
            labels.append(rng.integers(0, 10, n, np.uint8))
            planes = images[-1].transpose(0, 3, 1, 2).reshape(n, 3072)
            content = replace.get(name, np.concatenate([labels[-1][:, None], planes], axis=1).tobytes())
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    order = [1, 0, 2, 3, 4, 5]
    return np.concatenate([images[i] for i in order]), np.concatenate([labels[i] for i in order])


def test_cifar10(tmp_path):
    (tmp_path / "cifar10").mkdir()
    images, labels = cifar10(tmp_path / "cifar10" / "cifar-10-binary.tar.gz")
    train = data.load("cifar10", cache=tmp_path)  # found in the cache folder, so not downloaded
    test = data.load(f"{tmp_path}/cifar10/cifar-10-binary.tar.gz:test")
    assert train.images.flags.c_contiguous  # NHWC in memory too, so that a batch is read in whole images
    assert np.array_equal(train.images, images[:20]) and np.array_equal(train.labels, labels[:20])
    assert np.array_equal(test.images, images[20:]) and np.array_equal(test.labels, labels[20:])


@pytest.mark.parametrize("batch, expected", [(bytes(3072), "damaged"), (b"", "no images")])
def test_damaged_cifar10_batches(tmp_path, batch, expected):
    cifar10(tmp_path / "a.tar.gz", **{f"data_batch_{i}": batch for i in range(1, 6)})
    assert expected in error_of(tmp_path / "a.tar.gz")


def test_cifar10_in_other_forms_names_the_archive_to_give(tmp_path):
    """The Python version, an unpacked folder of either, and files that are no archive."""
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("cifar-10-batches-py/data_batch_1"))
    assert "cifar-10-binary.tar.gz" in error_of(tmp_path / "cifar-10-python.tar.gz")
    for name in ("data_batch_1", "data_batch_1.bin"):
        assert "cifar-10-binary.tar.gz" in error_of(make(tmp_path / f"folder of {name}", {name: "..."}))
    cifar10(tmp_path / "whole.tar.gz")
    whole = (tmp_path / "whole.tar.gz").read_bytes()
    for name, content in {"half.tar.gz": whole[:len(whole) // 2], "text.tar.gz": b"this is text"}.items():
        (tmp_path / name).write_bytes(content)
        assert name in error_of(tmp_path / name)


class Attack:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("key", ["arr_0", "arr_1"])
def test_an_npz_that_runs_code_is_refused_and_not_run(tmp_path, rgb, key):
    attack = np.array([Attack(f"touch {tmp_path}/executed")])  # numpy pickles arrays of objects
    np.savez(tmp_path / "evil.npz", **{"arr_0": rgb[:1], "arr_1": np.zeros(1, int), key: attack})
    assert "evil.npz" in error_of(tmp_path / "evil.npz", labels=key == "arr_1")
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------------------------------------
# Nothing is decided silently: which files, which labels, which pixels.


def test_each_folder_is_read_once_whatever_links_point_to(tmp_path, rgb):
    folder = make(tmp_path / "up" / "set", {"0.png": png(rgb[0]), "sub/1.png": png(rgb[1])})
    make(tmp_path, {"up/other.png": png(rgb[2]), "far/2.png": png(rgb[3])})
    for name, target in {"self": folder, "parent": folder.parent, "twice": folder / "sub", "far": tmp_path / "far"}.items():
        (folder / name).symlink_to(target)
    assert np.array_equal(data.load(folder).images, rgb[[0, 3, 1]])  # 0.png, far/2.png, sub/1.png


def test_files_that_are_not_read_are_named(tmp_path, rgb, capsys):
    files = {"0.png": png(rgb[0]), "1.JFIF": png(rgb[0], "JPEG"), "a.HEIC": "x", "b.heic": "x", "c.psd": "x"}
    for name in ("set", "set.ZIP"):
        assert len(data.load(make(tmp_path / name.lower(), files).rename(tmp_path / name))) == 2
        assert "3 files not read: .heic .psd" in capsys.readouterr().err


def test_a_folder_with_the_name_of_a_built_in_set_is_pointed_out(tmp_path, rgb, monkeypatch, capsys):
    make(tmp_path / "digits", {"0.png": png(rgb[0])})
    monkeypatch.chdir(tmp_path)
    assert len(data.load("digits")) == 1797 and "./digits" in capsys.readouterr().err
    assert len(data.load("./digits")) == 1 and not capsys.readouterr().err


@pytest.mark.parametrize("kind", ["folder", "set.zip"])
@pytest.mark.parametrize("top", ["", "pets/", "some/where/"])
def test_class_folders_give_labels(tmp_path, rgb, kind, top):
    files = {f"{top}{name}": png(image) for name, image in zip(("dog/x/1.png", "cat/1.png", "ant/b.png", "dog/0.png"), rgb)}
    dataset = data.load(make(tmp_path / kind, files))
    assert dataset.classes == ["ant", "cat", "dog"] and dataset.labels.tolist() == [0, 1, 2, 2]
    assert dataset.class_frequencies() == [1, 1, 2]
    assert data.load("digits").classes is None


@pytest.mark.parametrize("names", [
    ["00000/0.png", "00001/1.png"],  # as write_images and EDM's tool number them
    ["cat/0.png", "cat/1.png"], ["cat/0.png", "1.png"], ["0.png", "1.png"],
    ["cat/0.png", "dog/1.png", "dataset.json"],
])
def test_other_folders_are_no_classes(tmp_path, rgb, names):
    files = {name: png(rgb[0]) for name in names if name.endswith(".png")}
    files.update({"dataset.json": '{"labels": null}'} if "dataset.json" in names else {})
    folder = make(tmp_path / "set", files)
    assert data.load(folder).label_dim == 0 and "has no labels" in error_of(folder, labels=True)


@pytest.mark.parametrize("kind", ["folder", "set.zip"])
def test_a_dataset_json_one_folder_down_counts_and_names_may_be_spelled_differently(tmp_path, rgb, kind):
    names = ["pets/a/0.png", "pets/e\u0301.png", "pets/z/1.png"]  # decomposed, as macOS writes it
    spelled = [["a\\0.png", 2], ["\u00e9.png", 0], ["./z/1.png", 1]]
    files = {name: png(image) for name, image in zip(names, rgb)}
    dataset = data.load(make(tmp_path / kind, {**files, "pets/dataset.json": json.dumps({"labels": spelled})}))
    assert dataset.labels.tolist() == [2, 0, 1]


def test_classes_without_images_are_left_out_where_labels_are_asked_for(gray, capsys):
    dataset = data.Dataset("gaps", gray, np.array([9, 3, 3, 9, 3, 3]))
    assert dataset.label_dim == 10
    dataset.require_labels()
    assert dataset.labels.tolist() == [1, 0, 0, 1, 0, 0] and dataset.labels.dtype == np.int64
    assert dataset.class_frequencies() == [4, 2] and dataset.classes == ["3", "9"]
    assert "only classes 3 9 have images" in capsys.readouterr().err
    dataset.require_labels()
    assert not capsys.readouterr().err


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(tmp_path, rgb, orientation):
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's numbers of the transpositions that undo EXIF's
    stored, exif = Image.fromarray(rgb[0]), Image.Exif()
    exif[0x0112] = orientation
    stored = stored.transpose(inverse[orientation]) if orientation > 1 else stored
    file = io.BytesIO()
    stored.save(file, "PNG", exif=exif)
    assert np.array_equal(data.load(make(tmp_path / "set", {"0.png": file.getvalue()})).images, rgb[:1])


def test_damaged_exif_does_not_block_the_picture(tmp_path, rgb):
    file = io.BytesIO()
    Image.fromarray(rgb[0]).save(file, "PNG", exif=b"Exif\0\0no TIFF header")
    assert np.array_equal(data.load(make(tmp_path / "set", {"0.png": file.getvalue()})).images, rgb[:1])


@pytest.mark.parametrize("colours, channels", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bit_files_are_refused(tmp_path, colours, channels):
    """By the depth in the file: Pillow gives RGB and gray with alpha the same modes as 8 bits."""
    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = (8).to_bytes(4, "big") * 2 + bytes([16, colours, 0, 0, 0])
    pixels = zlib.compress((b"\0" + b"\x0f\xff" * 8 * channels) * 8)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    assert "16 bits" in error_of(make(tmp_path / "png", {"0.png": file}))
    tiff = io.BytesIO()
    Image.new("I;16", (8, 8)).save(tiff, "TIFF")
    assert "16 bits" in error_of(make(tmp_path / "tiff", {"0.tif": tiff.getvalue()}))


# ---------------------------------------------------------------------------------------------------------
# What networks see.


def test_bytes_to_network_and_back():
    """x/127.5 - 1 takes 0..255 to [-1, 1]; to_uint8 inverts it for every byte, rounds and clips."""
    raw = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    dataset = data.Dataset("all bytes", raw)
    x = dataset.to_model(dataset.batch([0])[0], "cpu")
    assert x.shape == (1, 1, 16, 16) and x.dtype == torch.float32 and (x.min(), x.max()) == (-1, 1)
    assert np.array_equal(data.to_uint8(x), raw)
    assert data.to_uint8(torch.tensor([-9.0, 9.0, 0.001]).view(3, 1, 1, 1)).ravel().tolist() == [0, 255, 128]


def test_flip_mirrors_the_chosen_images_left_to_right(rgb):
    dataset = data.Dataset("rgb", rgb)
    raw, _ = dataset.batch([4, 4])
    x = dataset.to_model(raw, "cpu", flip=torch.tensor([False, True]))
    assert np.array_equal(data.to_uint8(x), [rgb[4], rgb[4][:, ::-1]])


@pytest.fixture
def latents(tmp_path):
    rng = np.random.default_rng(0)
    arrays = np.concatenate([rng.normal(size=(3, 4, 8, 8)), rng.uniform(0.1, 1, (3, 4, 8, 8))], axis=1)
    arrays = arrays.astype(np.float32)
    files = {f"00000/img-mean-std-{i}.npy": npy(a) for i, a in enumerate(arrays)}
    files["dataset.json"] = json.dumps({"labels": [[n, i] for i, n in enumerate(files)]})
    return arrays, make(tmp_path / "latents.zip", files)


def test_latents_are_mean_plus_std_times_noise_then_normalised(latents):
    arrays, path = latents
    dataset = data.load(path)
    assert dataset.is_latent and (dataset.resolution, dataset.channels, dataset.label_dim) == (8, 4, 3)
    assert np.array_equal(dataset.images, arrays)
    raw, labels = dataset.batch([2, 0])
    assert labels.tolist() == [2, 0]
    eps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x = dataset.to_model(raw, "cpu", eps=eps)
    # Some six float32 roundings of numbers below 10: 4e-6 before the division by 4.62 * 2, the same after its inverse.
    channel = arrays[2, 1] + arrays[2, 5] * eps[0, 1].numpy()
    assert torch.allclose(x[0, 1], torch.from_numpy((channel - 3.25) / 4.62 * 0.5), atol=1e-6)
    assert torch.allclose(data.denormalise_latents(dataset.to_model(raw, "cpu")), raw[:, :4], atol=1e-5)
    with pytest.raises(UserError, match="flip"):
        dataset.to_model(raw, "cpu", flip=torch.tensor([True, False]))


def test_batch_takes_any_order_with_repeats(rgb):
    raw, labels = data.Dataset("rgb", rgb, np.arange(6)).batch([5, 0, 5])
    assert np.array_equal(raw, rgb[[5, 0, 5]]) and labels.tolist() == [5, 0, 5]
    assert data.Dataset("rgb", rgb).batch(torch.tensor([1]))[1] is None


def test_fingerprint_depends_on_shape_and_content_only(rgb, gray):
    fingerprint = data.Dataset("a", rgb).fingerprint()
    changed = rgb.copy()
    changed[5, 7, 7, 2] ^= 1
    assert fingerprint == data.Dataset("b", rgb.copy(), np.arange(6)).fingerprint()
    assert fingerprint != data.Dataset("a", changed).fingerprint()
    assert data.Dataset("a", gray[:4]).fingerprint() != data.Dataset("a", gray[:4].reshape(1, 16, 16, 1)).fingerprint()


# ---------------------------------------------------------------------------------------------------------
# The cache of large data sets.


@pytest.fixture
def small_memory(monkeypatch):
    monkeypatch.setattr(data, "MEMORY_LIMIT", 100)


@pytest.fixture
def folder(tmp_path, rgb):
    return make(tmp_path / "set", images_and_labels(rgb, range(6)))


@pytest.mark.parametrize("kind", ["folder", "set.zip"])
def test_a_large_set_is_converted_once_and_memory_mapped(tmp_path, rgb, kind, small_memory, monkeypatch):
    path = make(tmp_path / kind, images_and_labels(rgb, range(6)))
    for atomic in (data.atomic, None):  # the second time nothing is converted
        monkeypatch.setattr(data, "atomic", atomic)
        dataset = data.load(path, tmp_path / "cache")
        assert isinstance(dataset.images, np.memmap) and np.array_equal(dataset.images, rgb)
        assert dataset.labels.tolist() == list(range(6))
        assert dataset.fingerprint() == data.Dataset("in memory", rgb).fingerprint()
        assert np.array_equal(dataset.batch([3, 1, 3])[0], rgb[[3, 1, 3]])


def test_a_changed_file_is_converted_again(tmp_path, rgb, small_memory, folder):
    data.load(folder, tmp_path / "cache")
    (folder / "00000/img0.png").write_bytes(png(rgb[1]))
    os.utime(folder / "00000/img0.png", (1, 1))
    assert np.array_equal(data.load(folder, tmp_path / "cache").images[0], rgb[1])


@pytest.mark.parametrize("limit", [100, 2**28])  # through the cache, or in memory
@pytest.mark.parametrize("kind", ["folder", "set.zip", "set.npz", "compressed.npz", "idx"])
def test_resolution_cuts_out_the_middle_and_resizes(tmp_path, monkeypatch, kind, limit):
    """The very pixels that Pillow's Lanczos filter makes of the largest square in the middle, as EDM's dataset tool does."""
    monkeypatch.setattr(data, "MEMORY_LIMIT", limit)
    images = np.random.default_rng(0).integers(0, 256, (6, 12, 17, 1 if kind == "idx" else 3), np.uint8)
    files = {f"{i}.png": png(image) for i, image in enumerate(images)}
    files["dataset.json"] = json.dumps({"labels": [[f"{i}.png", i] for i in range(6)]})
    if kind.endswith("npz"):
        (np.savez if kind == "set.npz" else np.savez_compressed)(tmp_path / kind, arr_0=images, arr_1=np.arange(6))
    else:
        make(tmp_path / kind, idx_folder(images[..., 0], range(6)) if kind == "idx" else files)
    expected = [Image.fromarray(image.squeeze()[:, 2:14]).resize((8, 8), Image.Resampling.LANCZOS) for image in images]
    for _ in range(2):
        dataset = data.load(tmp_path / kind, tmp_path / "cache", resolution=8)
        assert np.array_equal(dataset.images, np.reshape(expected, (6, 8, 8, -1))) and dataset.labels.tolist() == list(range(6))
        assert isinstance(dataset.images, np.memmap) == (limit == 100 and kind in ("folder", "set.zip"))
    assert data.load(tmp_path / kind, tmp_path / "cache", resolution=12).resolution == 12  # not the cache of the other
    assert "--resolution" in error_of(tmp_path / kind, tmp_path / "cache")


def test_resolution_unites_sizes_keeps_what_fits_and_leaves_latents_alone(tmp_path, rgb, latents):
    tall = np.concatenate([rgb[1][:2], rgb[1], rgb[1][:3]])
    folder = make(tmp_path / "set", {"a.png": png(rgb[0]), "b.png": png(tall), "c.png": png(rgb[2].repeat(5, 0).repeat(5, 1))})
    assert "--resolution" in error_of(folder)
    images = data.load(folder, resolution=8).images
    assert np.array_equal(images[:2], rgb[:2]) and images.shape == (3, 8, 8, 3)
    assert np.array_equal(data.load("digits", resolution=8).images, data.load("digits").images)
    with pytest.raises(UserError, match="latents.zip: latents cannot be resized"):
        data.load(latents[1], resolution=8)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, rgb, folder, small_memory, monkeypatch, error):
    decode = data._decode_all

    def stop_halfway(*args):
        yield from list(decode(*args))[:3]
        raise error

    monkeypatch.setattr(data, "_decode_all", stop_halfway)
    with pytest.raises(type(error) if isinstance(error, OSError) else error) as caught:
        data.load(folder, tmp_path / "cache")
    assert error is KeyboardInterrupt or str(tmp_path / "cache") in caught.value.filename  # where there is no space
    assert list((tmp_path / "cache" / "datasets").iterdir()) == []
    monkeypatch.setattr(data, "_decode_all", decode)
    assert np.array_equal(data.load(folder, tmp_path / "cache").images, rgb)


def test_two_processes_may_convert_at_the_same_time(tmp_path, rgb, folder, small_memory, monkeypatch):
    decode, first = data._decode_all, []

    def overtaken(*args):
        monkeypatch.setattr(data, "_decode_all", decode)
        with monkeypatch.context() as other_process:
            other_process.setattr(os, "getpid", lambda: 0)
            first.append(data.load(folder, tmp_path / "cache"))  # it finishes first
        yield from decode(*args)

    monkeypatch.setattr(data, "_decode_all", overtaken)
    second = data.load(folder, tmp_path / "cache")
    assert np.array_equal(first[0].images, rgb) and np.array_equal(second.images, rgb)
    assert len(list((tmp_path / "cache" / "datasets").iterdir())) == 1


def test_a_damaged_cache_is_named(tmp_path, folder, small_memory):
    data.load(folder, tmp_path / "cache")
    cached, = (tmp_path / "cache" / "datasets").iterdir()
    (cached / "images.npy").write_bytes((cached / "images.npy").read_bytes()[:300])
    message = error_of(folder, tmp_path / "cache")
    assert str(cached) in message and "delete" in message


# ---------------------------------------------------------------------------------------------------------
# The order of the data.


def numbered(n):
    """A data set whose labels are the positions in it."""
    return data.Dataset("numbered", np.zeros((n, 2, 2, 1), np.uint8), np.arange(n))


def batches(dataset, batch, seed=0, start=0, rank=0, world_size=1):
    rt = types.SimpleNamespace(batch=batch, rank=rank, world_size=world_size, device=torch.device("cpu"))
    return data.Batches(dataset, rt, seed, start)


def take(count, *args, **kwargs):
    """The labels of the first `count` batches."""
    order = batches(*args, **kwargs)
    return [next(order)[1].tolist() for _ in range(count)]


def test_every_image_comes_once_per_epoch_in_a_new_order():
    seen = sum(take(15, numbered(10), 4), [])  # 6 epochs; batches straddle their boundaries
    epochs = [seen[i:i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert seen != sum(take(15, numbered(10), 4, seed=1), [])


@pytest.mark.parametrize("size, batch", [(10, 4), (3, 8)])  # the second: a batch larger than the data set
def test_the_ranks_shares_together_are_the_batch_of_one_rank(size, batch):
    alone = take(5, numbered(size), batch)
    ranks = [take(5, numbered(size), batch, rank=rank, world_size=2) for rank in range(2)]
    assert [first + second for first, second in zip(*ranks)] == alone


def test_the_order_depends_on_the_number_of_images_seen_alone():
    """A run continues where it stopped, and the size of its batches is of no influence."""
    assert take(3, numbered(10), 4, start=28) == take(10, numbered(10), 4)[7:]
    assert sum(take(4, numbered(10), 6), []) == sum(take(8, numbered(10), 3), [])


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


# ---------------------------------------------------------------------------------------------------------
# Writing.


def test_save_grid_enlarges_by_whole_pixels_and_fills_row_by_row(tmp_path, gray):
    data.save_grid(gray[:5], tmp_path / "new" / "grid.png", columns=3, scale=2, padding=1)
    grid = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert grid.shape == (2 * 17 + 1, 3 * 17 + 1)
    assert np.array_equal(grid[18:34:2, 1:17:2], gray[3, ..., 0])  # the fourth image begins the second row
    assert np.array_equal(grid[19:34:2, 2:17:2], gray[3, ..., 0])
    assert (grid[17] == 255).all() and (grid[18:, 35:] == 255).all()
    assert os.listdir(tmp_path / "new") == ["grid.png"]


@pytest.mark.parametrize("out", ["samples.npz", "samples"])
@pytest.mark.parametrize("labelled", [True, False])
def test_what_is_written_can_be_loaded(tmp_path, rgb, out, labelled):
    images, labels = np.concatenate([rgb, 255 - rgb]), torch.arange(12)  # more than ten: names must sort as numbers do
    batches = ((images[i:j], labels[i:j] if labelled else None) for i, j in ((0, 7), (7, 12)))
    data.write_images(batches, tmp_path / out)
    dataset = data.load(tmp_path / out)
    assert np.array_equal(dataset.images, images)
    assert dataset.labels.tolist() == list(range(12)) if labelled else dataset.labels is None
    assert os.listdir(tmp_path) == [out]


def test_npz_is_what_numpy_reads_and_stays_if_the_next_fails(tmp_path, gray):
    def stopped():
        yield gray, None
        raise KeyboardInterrupt

    latents = np.ones((2, 4, 8, 8), np.float32)
    data.write_images([(gray, np.arange(6))], tmp_path / "a.npz")
    data.write_images([(latents, None)], tmp_path / "b.npz")
    with pytest.raises(KeyboardInterrupt):
        data.write_images(stopped(), tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert np.array_equal(a["arr_0"], gray) and a["arr_1"].tolist() == list(range(6))
        assert np.array_equal(b["latents"], latents) and b.files == ["latents"]
    for batches, error in (([(latents, None)], UserError), (stopped(), KeyboardInterrupt)):
        with pytest.raises(error):
            data.write_images(batches, tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "b.npz"]


def test_a_folder_with_something_in_it_is_not_touched(tmp_path):
    (tmp_path / "mine.png").write_bytes(b"precious")
    with pytest.raises(UserError, match="exists already"):
        data.write_images(None, tmp_path)  # refused before images are asked for
    assert (tmp_path / "mine.png").read_bytes() == b"precious"


# ---------------------------------------------------------------------------------------------------------
# Bad input.


def test_missing_or_unknown_paths(tmp_path):
    message = error_of(tmp_path / "nowhere")
    assert "nowhere" in message and "digits" in message
    (tmp_path / "notes.txt").write_text("hello")
    assert "notes.txt" in error_of(tmp_path / "notes.txt")
    assert "test set" in error_of("digits:test")


@pytest.mark.parametrize("kind", ["folder", "set.zip"])
@pytest.mark.parametrize("files, expected", [
    ({"notes.txt": "no image"}, ["0 images"]),
    ({"a.png": png(np.zeros((8, 8, 3), np.uint8)), "b.png": png(np.zeros((9, 9, 3), np.uint8))},
     ["b.png", "[9, 9, 3]", "a.png", "[8, 8, 3]", "--resolution"]),
    ({"a.png": png(np.zeros((8, 6, 3), np.uint8))}, ["a.png", "6x8", "square", "--resolution"]),
    ({"a.png": "this is text"}, ["a.png", "not an image"]),
    ({"a.png": ""}, ["a.png", "not an image"]),
    ({"a.png": png(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))[:5000]}, ["a.png", "truncated"]),
    ({"a.png": png(np.zeros((8, 8, 1), np.uint8), mode="I;16")}, ["a.png", "8 bits"]),
    ({"a.png": png(np.zeros((8, 8, 1), np.uint8)), "b.npy": npy(np.zeros((8, 8, 8), np.float32))}, ["1 images", "1 latents"]),
    ({"a.npy": npy(np.zeros((4, 8, 8), np.float32))}, ["a.npy", "[N, 8, h, h]"]),
    ({"a.npy": npy(np.zeros((8, 8, 8), np.float32)), "b.npy": npy(np.zeros((8, 4, 4), np.float32))},
     ["b.npy", "[8, 4, 4]", "[8, 8, 8]"]),
    ({"a.npy": npy(np.zeros((8, 8, 4), np.float32))}, ["a.npy", "[N, 8, h, h]"]),
    ({"a.npy": npy(np.zeros((8, 8, 8), np.float32))[:200]}, ["a.npy"]),
    ({"a.npy": pickle.dumps([1])}, ["a.npy"]),
])
def test_bad_files_are_named(tmp_path, kind, files, expected):
    (tmp_path / "folder").mkdir()
    message = error_of(make(tmp_path / kind, files))
    assert all(words in message for words in [kind, *expected]), message


@pytest.mark.parametrize("error", [OSError(errno.EINVAL, "Invalid argument"), OSError("truncated"), MemoryError(),
                                   RecursionError(), AttributeError("x"), NotImplementedError(), UserError("no name")])
def test_whatever_a_parser_raises_names_the_file(error):
    with pytest.raises(UserError, match="^some/file: "), files.reading("some/file", "a picture"):
        raise error


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOSPC])
def test_errors_of_the_system_keep_their_words(number):
    for name in ("other/file", None):
        with pytest.raises(OSError) as caught, files.reading("some/file", "a picture"):
            raise OSError(number, os.strerror(number), name)
        assert (caught.value.errno, caught.value.filename) == (number, name or "some/file")


@pytest.mark.parametrize("text, expected", [
    ('{"labels": [["a.png", 1], ["c.png", 0]]}', "1 images without a label ['b.png'], 1 labels without an image ['c.png']"),
    ('{"labels": [["a.png", 1], ["b.png", -1]]}', "b.png is -1"),
    ('{"labels": [["a.png", 1], ["b.png", 1.5]]}', "b.png is 1.5"),
    ('{"labels": [["a.png", [1, 0]], ["b.png", [0, 1]]]}', "a.png is [1, 0]"),
    ('{"labels": [["a.png", 1], ["b.png", 0], ["./a.png", 0]]}', "a.png is listed with two labels"),
    ('{"labels": [1, 2]}', "not of the form"),
    ('{"classes": []}', "not of the form"),
    ('{"labels": [["a.p', "not of the form"),
])
def test_labels_that_do_not_fit_are_refused_where_labels_are_asked_for(tmp_path, gray, text, expected):
    folder = make(tmp_path / "set", {"a.png": png(gray[0]), "b.png": png(gray[1]), "dataset.json": text})
    message = error_of(folder, labels=True)
    assert "dataset.json" in message and expected in message


def test_a_picture_above_pillows_limit_is_too_large_not_damaged(tmp_path, rgb, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    message = error_of(make(tmp_path / "set", {"big.png": png(rgb[0])}))
    assert "big.png" in message and "too large" in message and "damaged" not in message


def test_zip_files_that_are_none_and_members_that_point_outside(tmp_path, rgb):
    (tmp_path / "text.zip").write_text("this is text")
    assert "text.zip" in error_of(tmp_path / "text.zip")
    whole = make(tmp_path / "whole.zip", {"a.png": png(rgb[0])}).read_bytes()
    (tmp_path / "damaged.zip").write_bytes(whole.replace(b"IDAT", b"IDOT"))  # the check sum is now wrong
    assert "damaged.zip/a.png" in error_of(tmp_path / "damaged.zip")
    make(tmp_path / "tricks.zip", {"x/../../a.png": png(rgb[0]), "/abs.png": png(rgb[1])})
    with pytest.raises(UserError, match="0 images"):  # names with leading dots are hidden; nothing is ever extracted
        data.load(make(tmp_path / "up.zip", {"../up.png": png(rgb[0])}))
    assert len(data.load(tmp_path / "tricks.zip")) == 1
    assert not (tmp_path.parent / "up.png").exists()


@pytest.mark.parametrize("arrays, expected", [
    ({"mu": np.zeros(4), "sigma": np.zeros((4, 4))}, "statistics"),
    ({"something": np.zeros(4)}, "something"),
    ({"latents": np.zeros((2, 4, 8, 8), np.float32)}, "latents"),
    ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, "float32"),
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


def test_npz_that_is_text_or_damaged(tmp_path, rgb):
    (tmp_path / "text.npz").write_text("this is text")
    assert "text.npz" in error_of(tmp_path / "text.npz")
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "whole.npz", rgb.repeat(8, axis=1).repeat(8, axis=2).repeat(8, axis=0))
        whole = (tmp_path / "whole.npz").read_bytes()
        middle = len(whole) // 2
        for name, content in {"half.npz": whole[:middle], "changed.npz": whole[:middle] + b"x" + whole[middle + 1:]}.items():
            (tmp_path / name).write_bytes(content)
            assert name in error_of(tmp_path / name)


@pytest.mark.parametrize("name, change, expected", [
    ("train-images-idx3-ubyte.gz", lambda raw: raw[:-20], "ended before"),
    ("train-images-idx3-ubyte.gz", lambda raw: b"this is no gzip file", "gzip"),
    ("train-images-idx3-ubyte.gz", lambda raw: gzip.compress(gzip.decompress(raw)[:-1]), "size 383"),
    ("train-images-idx3-ubyte.gz", lambda raw: gzip.compress(b"\0" * 400), "damaged"),
    ("train-images-idx3-ubyte.gz", lambda raw: gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12), "damaged"),
    ("train-labels-idx1-ubyte", lambda raw: raw[:-1], "size 5"),
    ("train-labels-idx1-ubyte", lambda raw: raw + b"\0", "damaged"),
    ("train-labels-idx1-ubyte", lambda raw: b"", "damaged"),
    ("train-labels-idx1-ubyte", lambda raw: idx(np.arange(5)), "labels uint8 [5] do not match 6 images"),
    ("train-labels-idx1-ubyte", None, "has no train-labels-idx1-ubyte"),
    ("train-images-idx3-ubyte.gz", None, "has no train-images-idx3-ubyte"),
])
def test_missing_and_damaged_idx_files(tmp_path, gray, name, change, expected):
    files = idx_folder(gray[..., 0], range(6))
    raw = files.pop(name)
    files.update({name: change(raw)} if change else {})
    message = error_of(make(tmp_path / "mnist", files), labels="labels" in name)
    assert expected in message and ("match" in expected or name.removesuffix(".gz") in message)
