"""Damaged files are read, or refused by a line that names the file and what to do: quickly and
without much memory. FUZZ=20000 tries more than 500 of them, FUZZ_SEED other ones."""

import collections
import contextlib
import functools
import gzip
import io
import os
import pickle
import re
import resource
import shutil
import time
import warnings
import zipfile

import numpy as np
import torch
from test_data import chunk, cifar10, idx_folder, images_and_labels, make, npy, png
from test_networks import small
from test_published import write_published

import fid
from machinery import checkpoints, data, files
from networks import Denoiser, RatioNetwork

SECONDS, MEGABYTES = 5, 500  # of processor time, and of memory beyond the most used before


def write_intact_files(folder):
    """A file of every kind that is read."""
    rng, tiny = np.random.default_rng(0), functools.partial(small, channel_mult=(1,))
    pictures, labels = rng.integers(0, 256, (2, 16, 16, 3), np.uint8), np.arange(2)
    labelled, idx_set = images_and_labels(pictures, labels), idx_folder(pictures[..., 0], labels)
    latents = {f"{i}.npy": npy(rng.normal(size=(8, 8, 8)).astype(np.float32)) for i in range(2)}
    for name, content in (("named", labelled), ("named.zip", labelled), ("latents", latents),
                          ("latents.zip", latents), ("idx", dict(list(idx_set.items())[:2]))):
        make(folder / name, content)
    for format, mode, options in (
        ("PNG", "RGB", {}), ("PNG", "RGBA", {}), ("PNG", "P", {"transparency": 3}),
        ("JPEG", "RGB", {}), ("JPEG", "CMYK", {"progressive": True}), ("BMP", "RGB", {}),
        ("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True}), ("GIF", "P", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ):
        content = png(pictures[0], format, mode, **options)
        make(folder / "set", {f"{mode}.{format.lower()}": content})
    data.write_images([(pictures, labels)], folder / "ours.npz")
    np.savez_compressed(folder / "numpys.npz", images=pictures[..., 0], labels=labels)
    cifar10(folder / "cifar.tar.gz", n=2)
    net = Denoiser(tiny("ddpmpp"))
    checkpoints.save_network(folder / "network.pt", net, role="generator", t_init=2.5)
    checkpoints.save_network(folder / "ratio.pt", RatioNetwork(tiny("adm")), role="ratio")
    for name, protocol in (("ddpmpp", 4), ("adm", 2), ("edm2", 4)):
        write_published(folder / f"{name}.pkl", Denoiser(tiny(name)), protocol)
    state = {"kind": "training state", "nimg": 7, "list": [1, "a", None], "net": net.state_dict()}
    torch.save(state, folder / "checkpoint.pt")
    torch.save(state, folder / "old.checkpoint.pt", _use_new_zipfile_serialization=False)
    fid.Statistics(np.zeros(8), np.eye(8), "test", 100, "name").save(folder / "statistics.npz")
    make(folder / "statistics.pkl", pickle.dumps({"fid": dict(mu=np.zeros(8), sigma=np.eye(8))}))


def read(path):
    """As the scripts read a file of this name."""
    if path.stem == "statistics":
        fid.open_side(str(path))
    elif path.name.endswith("checkpoint.pt"):
        files.load_checkpoint(path)
    elif path.suffix in (".pt", ".pkl"):
        checkpoints.load_network(path)
    else:
        dataset = data.load(path, cache=path.parent / "cache")
        dataset.fingerprint()
        if dataset.label_error:
            dataset.require_labels()


MARKS = (b"PK\1\2 PK\3\4 PK\5\6 \x1f\x8b ustar \x93NUMPY shape descr \0\0\x08 \x89PNG IHDR PLTE "
         b"tRNS IDAT \xff\xc0 \xff\xc2 \xff\xc4 \xff\xda BM RIFF VP8 ALPH GIF8 II*\0 \x80\x02 "
         b"\x80\x04 _init_kwargs channel_mult labels").split(b" ")
VALUES = [b"\0", b"\1", b"\xff", b"\x7f", bytes(4), b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f",
          b"\x7f\xff\xff\xff", b"\0\0\1\0", b"9", b"-", b"'",
          b"\1\0", b"\x0c\0", b"\x0e\0", b"\x5f\0"]  # zip: an encrypted file; bzip2, LZMA, xz


def damage(content, rng):
    """Flip a bit; overwrite, remove, insert, cut off, clear or copy a piece; change a header."""
    content, (start, other) = bytearray(content), rng.integers(len(content) + 1, size=2)
    size = rng.integers(1, rng.choice([2, 16, 512, 4096]))
    piece = content[start:start + size]
    old, new = [
        (1, bytes(byte ^ 1 << rng.integers(8) for byte in piece[:1])),
        (8, rng.bytes(8)), (size, b""), (0, rng.bytes(min(size, 64))), (len(content), b""),
        (size, bytes(len(piece))), (rng.choice([0, size]), content[other:other + size]),
    ][rng.integers(7)]
    if rng.random() < 0.2:  # a value into a field behind one of the marks
        found = [m.start() for mark in MARKS for m in re.finditer(re.escape(mark), content)] or [0]
        start, new = rng.choice(found) + rng.integers(48), VALUES[rng.integers(len(VALUES))]
        old = len(new)
    content[start:start + old] = new
    return bytes(content)


def damage_inside(content, rng):
    """Damage under an intact check sum: a member of a zip, a gzip file, a PNG's chunk."""
    if content[:4] == b"PK\3\4":
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            members = {name: file.read(name) for name in file.namelist()}
        chosen, method = rng.choice(list(members)), rng.choice([0, zipfile.ZIP_DEFLATED])
        members[chosen] = damage(members[chosen], rng)
        with zipfile.ZipFile(out := io.BytesIO(), "w", int(method)) as file:
            for name, member in members.items():
                file.writestr(name, member)
        return out.getvalue()
    if content[:2] == b"\x1f\x8b":
        return gzip.compress(damage(gzip.decompress(content), rng), 1)
    if content[:4] == b"\x89PNG":
        start = rng.choice([m.start() for m in re.finditer(b"IHDR|PLTE|tRNS|IDAT", content)])
        end = start + 4 + int.from_bytes(content[start - 4:start], "big")
        body = damage(content[start + 4:end], rng)
        return content[:start - 4] + chunk(content[start:start + 4], body) + content[end + 4:]
    return damage(content, rng)


def test_no_damaged_file_leads_to_a_traceback_or_a_line_without_its_name(tmp_path, monkeypatch):
    count, seed = int(os.environ.get("FUZZ", 500)), int(os.environ.get("FUZZ_SEED", 1))
    write_intact_files(intact := tmp_path / "intact")
    paths = sorted(path.relative_to(intact) for path in intact.rglob("*.*"))
    refused = collections.Counter()
    for number in range(-len(paths), count):
        path, rng = paths[number % len(paths)], np.random.default_rng([seed, max(number, 0)])
        print(number, path)  # pytest shows the last one after a failure
        content, trial, part = (intact / path).read_bytes(), tmp_path / "trial", path.parts[0]
        trial.mkdir()
        if path.name != part:
            shutil.copytree(intact / part, trial / part)
        if number >= 0:
            content = (damage, damage_inside)[rng.integers(2)](content, rng)
        (trial / path).write_bytes(content)
        monkeypatch.setattr(data, "MEMORY_LIMIT", int(rng.choice([1000, 2**28])))  # mapped, or not
        memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(trial / part)
        except files.UserError as error:
            refused[path] += 1
            assert number >= 0 and str(trial / part) in str(error)
            assert re.search("; |expected|give|use", str(error))  # what to do
        assert time.process_time() - started < SECONDS
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
        assert grown < MEGABYTES * 1024
        shutil.rmtree(trial)
    assert all(refused[path] for path in paths)
