"""Damaged files are read, or refused by a line that names the file and what to do: quickly and
without much memory. FUZZ=20000 tries more than 500 of them, FUZZ_SEED other ones."""

import collections
import contextlib
import gzip
import io
import os
import pickle
import re
import resource
import tempfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from test_data import cifar10, idx_folder, images_and_labels, make, npy, png
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
    rng = np.random.default_rng(0)
    pictures, labels = rng.integers(0, 256, (6, 16, 16, 3), np.uint8), np.arange(6)
    gray, kinds = pictures[..., 0], {}

    def add(kind, name, read, content):
        kinds[kind] = name, content if isinstance(content, bytes) else content.read_bytes(), read

    data.write_images([(pictures, labels)], folder / "ours.npz")
    np.savez(folder / "numpys.npz", images=gray, labels=labels)
    np.savez_compressed(folder / "compressed.npz", arr_0=pictures, arr_1=labels)
    for name in ("ours.npz", "numpys.npz", "compressed.npz"):
        add(name, "a.npz", read_data, folder / name)
    labelled, idx_set = images_and_labels(pictures, labels), idx_folder(gray, labels)
    add("zip of PNG", "a.zip", read_data, make(folder / "a.zip", labelled))
    latents = {f"{i}.npy": npy(rng.normal(size=(8, 8, 8)).astype(np.float32)) for i in range(4)}
    add("zip of latents", "a.zip", read_data, make(folder / "latents.zip", latents))
    add("latent", "latents/a.npy", read_data, latents["0.npy"])
    for kind, format, mode, options in (
        ("PNG", "PNG", "RGB", {}), ("PNG, alpha", "PNG", "RGBA", {}),
        ("PNG, palette", "PNG", "P", {"transparency": 3}), ("BMP", "BMP", "RGB", {}),
        ("JPEG", "JPEG", "RGB", {}), ("JPEG, progressive", "JPEG", "CMYK", {"progressive": True}),
        ("WebP", "WEBP", "RGB", {}), ("WebP, lossless", "WEBP", "RGBA", {"lossless": True}),
        ("GIF", "GIF", "P", {}), ("TIFF", "TIFF", "RGB", {"compression": "tiff_lzw"}),
    ):
        add(kind, f"set/a.{format.lower()}", read_data, png(pictures[0], format, mode, **options))
    add("dataset.json", "named/dataset.json", read_data, labelled["dataset.json"].encode())
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"):
        add(name, f"idx/{name}", read_data, idx_set[name])
    others = {"set/b.png": png(pictures[1]), **{f"named/{k}": v for k, v in labelled.items()},
              **{f"idx/{k}": v for k, v in idx_set.items()}}
    cifar10(folder / "a.tar.gz", n=2)
    add("CIFAR-10", "a.tar.gz", read_data, folder / "a.tar.gz")
    load, net = checkpoints.load_network, Denoiser(small("ddpmpp"))
    checkpoints.save_network(folder / "network.pt", net, role="generator", t_init=2.5)
    checkpoints.save_network(folder / "ratio.pt", RatioNetwork(small("adm")), role="ratio")
    for name in ("network.pt", "ratio.pt"):
        add(name, name, load, folder / name)
    for name, protocol in (("ddpmpp", 4), ("adm", 2), ("edm2", 4)):
        path = write_published(folder / "a.pkl", Denoiser(small(name)), protocol)
        add(f"pickle, {name}", "a.pkl", load, path)
    statistics = pickle.dumps({"fid": {"mu": np.zeros(8), "sigma": np.eye(8)}})
    add("EDM2 reference", "a.pkl", files.read_pickle, statistics)
    state = {"kind": "training state", "nimg": 7, "list": [1, "a", None], "net": net.state_dict()}
    files.save_checkpoint(state, folder / "checkpoint.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    add("checkpoint", "checkpoint.pt", files.load_checkpoint, folder / "checkpoint.pt")
    add("checkpoint, old", "checkpoint.pt", files.load_checkpoint, folder / "old.pt")
    path = folder / "statistics.npz"
    fid.Statistics(np.zeros(8), np.eye(8), "test", 100, "name").save(path)
    add("statistics", "statistics.npz", lambda path: fid.open_side(str(path)), path)
    return kinds, others


def flip(content, rng):
    for _ in range(rng.integers(1, 5) if content else 0):
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    return content


def change(content, rng):
    """Overwrite, remove, insert, cut off, clear, or copy a piece to another place."""
    start, other = rng.integers(len(content) + 1, size=2)
    size = rng.integers(1, rng.choice([2, 16, 512, 4096]))
    old, new = [
        (8, rng.bytes(8)), (size, b""), (0, rng.bytes(min(size, 64))), (len(content), b""),
        (size, bytes(len(content[start:start + size]))),
        (rng.choice([0, size]), content[other:other + size]),
    ][rng.integers(6)]
    content[start:start + old] = new
    return content


MARKS = (b"PK\1\2 PK\3\4 PK\5\6 \x1f\x8b ustar \x93NUMPY shape descr \0\0\x08 \x89PNG IHDR PLTE "
         b"tRNS IDAT \xff\xc0 \xff\xc2 \xff\xc4 \xff\xda BM RIFF VP8 ALPH GIF8 II*\0 \x80\x02 "
         b"\x80\x04 _init_kwargs channel_mult labels").split(b" ")
VALUES = [b"\0", b"\1", b"\xff", b"\x7f", bytes(4), b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f",
          b"\x7f\xff\xff\xff", b"\0\0\1\0", b"9", b"-", b"'"]


def header(content, rng):
    """Some value into one of the fields behind a mark that formats begin with."""
    found = [m.start() for mark in MARKS for m in re.finditer(re.escape(mark), content)] or [0]
    start, value = rng.choice(found) + rng.integers(48), VALUES[rng.integers(len(VALUES))]
    content[start:start + len(value)] = value
    return content


def zip_header(content, rng):
    """Another compression method, or other flags, for one or all members of a zip file."""
    flags, methods = rng.random() < 0.5, [0, 1, 6, 8, 9, 12, 14, 93, 95, 97, 98, 99]
    value = int(1 << rng.integers(16)) if flags else int(rng.choice(methods))
    for mark, offset in ((b"PK\1\2", 8 if flags else 10), (b"PK\3\4", 6 if flags else 8)):
        found = [m.start() + offset for m in re.finditer(re.escape(mark), content)]
        for start in [start for start in found if rng.random() < 0.7]:
            content[start:start + 2] = value.to_bytes(2, "little")
    return content


def inside(content, rng):
    """Damage under an intact check sum: a member of a zip, a gzip file, a PNG's chunk."""
    damage = SIMPLE[rng.integers(len(SIMPLE))]
    if content[:4] == b"PK\3\4":
        out, method = io.BytesIO(), int(rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", method) as new:
            chosen = rng.choice(old.namelist())
            for name in old.namelist():
                member = bytearray(old.read(name))
                new.writestr(name, bytes(damage(member, rng) if name == chosen else member))
        return out.getvalue()
    if content[:2] == b"\x1f\x8b":
        return gzip.compress(bytes(damage(bytearray(gzip.decompress(content)), rng)), 1)
    if content[:4] == b"\x89PNG":
        out, at, chosen = bytes(content[:8]), 8, rng.integers(len(content))
        while at < len(content):
            size = int.from_bytes(content[at:at + 4], "big")
            kind, body = bytes(content[at + 4:at + 8]), content[at + 8:at + 8 + size]
            if at <= chosen < at + 12 + size:
                body = damage(body, rng)
            out += len(body).to_bytes(4, "big") + kind + body
            out += zlib.crc32(kind + body).to_bytes(4, "big")
            at += size + 12
        return out
    return damage(content, rng)


SIMPLE = [flip, change, change, change, header]
DAMAGE = [*SIMPLE, zip_header, inside, inside, inside]


def trial(kind, folder, others, rng, damage):
    """(outcome, text): "read", "refused", or a violation."""
    name, content, read = kind
    part = Path(name).parts[0]
    beside = {k: v for k, v in others.items() if "/" in name and k.startswith(part)}
    make(folder, {**beside, name: bytes(damage(bytearray(content), rng))})
    data.MEMORY_LIMIT = int(rng.choice([1000, 2**28]))  # mapped, through the cache, or in memory
    before, text = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, ""
    started = time.process_time()
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(folder / part)
        outcome = "read"
    except files.UserError as error:
        outcome, text = "refused", str(error)
        if str(folder / part) not in text:
            outcome = "A LINE THAT DOES NOT NAME THE FILE"
        elif not re.search("; |expected|give|use", text):
            outcome = "A LINE THAT DOES NOT SAY WHAT TO DO"
    except Exception as error:
        outcome, text = "A TRACEBACK", f"{type(error).__name__}: {error}"
    seconds = time.process_time() - started
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if seconds > SECONDS or megabytes > MEGABYTES:
        text = f"{seconds:.1f} s, {megabytes:.0f} MB ({outcome}: {text})"
        outcome = "A SLOW OR LARGE FILE"
    return outcome, f"{damage.__name__}: {text}"


def test_no_damaged_file_leads_to_a_traceback_or_a_line_without_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MEMORY_LIMIT", None)  # each trial sets its own
    count, seed = int(os.environ.get("FUZZ", 500)), int(os.environ.get("FUZZ_SEED", 1))
    refused, violations = collections.Counter(), []
    kinds, others = intact_files(tmp_path)
    for number in range(-len(kinds), count):
        label, rng = list(kinds)[number % len(kinds)], np.random.default_rng([seed, max(number, 0)])
        damage = DAMAGE[rng.integers(len(DAMAGE))] if number >= 0 else lambda content, rng: content
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            outcome, text = trial(kinds[label], Path(folder), others, rng, damage)
        assert number >= 0 or outcome == "read", f"{label}: {text}"
        refused[label] += outcome == "refused"
        if outcome not in ("read", "refused"):
            violations.append(f"{outcome}, number {number}, {label}, {text}")
    assert violations == [] and all(refused[label] for label in kinds)
