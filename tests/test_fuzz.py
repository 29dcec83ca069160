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


def read_data(path):
    dataset = data.load(path, cache=path.parent / "cache")
    dataset.batch([0])
    dataset.fingerprint()
    if dataset.label_error:
        dataset.require_labels()


def intact_files(folder):
    """{kind: (name, content, what reads it or its folder)}, {folder/name: content beside it}."""
    rng, kinds, tiny = np.random.default_rng(0), {}, functools.partial(small, channel_mult=(1,))
    pictures, labels = rng.integers(0, 256, (6, 16, 16, 3), np.uint8), np.arange(6)

    def add(kind, name, read, content):
        kinds[kind] = name, content if isinstance(content, bytes) else content.read_bytes(), read

    data.write_images([(pictures, labels)], folder / "a.npz")
    add("npz", "a.npz", read_data, folder / "a.npz")
    np.savez_compressed(folder / "a.npz", images=pictures[..., 0], labels=labels)
    add("npz, compressed", "a.npz", read_data, folder / "a.npz")
    labelled, idx_set = images_and_labels(pictures, labels), idx_folder(pictures[..., 0], labels)
    add("zip of PNG", "a.zip", read_data, make(folder / "a.zip", labelled))
    latents = {f"{i}.npy": npy(rng.normal(size=(8, 8, 8)).astype(np.float32)) for i in range(4)}
    add("zip of latents", "a.zip", read_data, make(folder / "latents.zip", latents))
    add("latent", "latents/a.npy", read_data, latents["0.npy"])
    for format, mode, options in (
        ("PNG", "RGB", {}), ("PNG", "RGBA", {}), ("PNG", "P", {"transparency": 3}),
        ("JPEG", "RGB", {}), ("JPEG", "CMYK", {"progressive": True}), ("BMP", "RGB", {}),
        ("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True}), ("GIF", "P", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ):
        content = png(pictures[0], format, mode, **options)
        add(f"{format}, {mode}", f"set/a.{format.lower()}", read_data, content)
    add("dataset.json", "named/dataset.json", read_data, labelled["dataset.json"].encode())
    for name in list(idx_set)[:2]:
        add(name, f"idx/{name}", read_data, idx_set[name])
    others = {"set/b.png": png(pictures[1]), **{f"named/{k}": v for k, v in labelled.items()},
              **{f"idx/{k}": v for k, v in idx_set.items()}}
    cifar10(folder / "a.tar.gz", n=2)
    add("CIFAR-10", "a.tar.gz", read_data, folder / "a.tar.gz")
    net, path = Denoiser(tiny("ddpmpp")), folder / "network.pt"
    checkpoints.save_network(path, net, role="generator", t_init=2.5)
    add("network", "network.pt", checkpoints.load_network, path)
    checkpoints.save_network(path, RatioNetwork(tiny("adm")), role="ratio")
    add("ratio network", "ratio.pt", checkpoints.load_network, path)
    for name, protocol in (("ddpmpp", 4), ("adm", 2), ("edm2", 4)):
        write_published(path, Denoiser(tiny(name)), protocol)
        add(f"pickle, {name}", "a.pkl", checkpoints.load_network, path)
    statistics = pickle.dumps({"fid": {"mu": np.zeros(8), "sigma": np.eye(8)}})
    add("EDM2 reference", "a.pkl", files.read_pickle, statistics)
    state = {"kind": "training state", "nimg": 7, "list": [1, "a", None], "net": net.state_dict()}
    for new in (True, False):
        torch.save(state, path, _use_new_zipfile_serialization=new)
        add(f"checkpoint, zip {new}", "checkpoint.pt", files.load_checkpoint, path)
    fid.Statistics(np.zeros(8), np.eye(8), "test", 100, "name").save(path)
    add("statistics", "a.npz", lambda path: fid.open_side(str(path)), path)
    return kinds, others


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
    kinds, others = intact_files(tmp_path)
    refused = collections.Counter()
    for number in range(-len(kinds), count):
        label, rng = list(kinds)[number % len(kinds)], np.random.default_rng([seed, max(number, 0)])
        print(number, label)  # pytest shows the last one after a failure
        name, content, read = kinds[label]
        if number >= 0:
            content = (damage, damage_inside)[rng.integers(2)](content, rng)
        folder, part = tmp_path / "trial", name.split("/")[0]
        beside = {k: v for k, v in others.items() if "/" in name and k.startswith(part)}
        folder.mkdir()
        make(folder, {**beside, name: content})
        # Mapped, through the cache, or in memory.
        monkeypatch.setattr(data, "MEMORY_LIMIT", int(rng.choice([1000, 2**28])))
        memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(folder / part)
        except files.UserError as error:
            refused[label] += 1
            assert number >= 0 and str(folder / part) in str(error)
            assert re.search("; |expected|give|use", str(error))  # what to do
        assert time.process_time() - started < SECONDS
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
        assert grown < MEGABYTES * 1024
        shutil.rmtree(folder)
    assert all(refused[label] for label in kinds)
