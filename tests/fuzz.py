"""Damages files of every kind that the project reads, and has them read.

    python tests/fuzz.py --files 20000 --seed 0

Each damaged file must be read, or refused by a `UserError` that names the file and says what to do; quickly, and without
much memory. Prints how often what happened to each kind, and every violation with the number that repeats it
(`--only NUMBER`). Exit code 1 if there is any.
"""

import argparse
import collections
import contextlib
import gzip
import io
import re
import resource
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import conftest  # noqa: F401  it finds the project
import numpy as np
import torch
from PIL import Image
from test_data import cifar10, idx, idx_folder, images_and_labels, make, npy, png
from test_networks import small
from test_published import KWARGS, write_published

from machinery import checkpoints
from machinery import data
import fid
from machinery import files
from networks import Denoiser, RatioNetwork

SECONDS, MEGABYTES = 5, 500  # of processor time and of more memory than ever before, which no small file may take


# ---------------------------------------------------------------------------------------------------------
# Whole files: {kind: (name, content, what reads it)}. A name with a folder is one file of a set, `others` the rest of it.


def read_data(path):
    dataset = data.load(path, cache=path.parent / "cache")
    dataset.batch([0])
    dataset.fingerprint()


def read_folder(path):
    read_data(path.parent)


def whole_files(folder):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (6, 16, 16, 3), np.uint8)
    gray, labels, kinds, others = pictures[..., :1], np.arange(6), {}, {}

    def add(kind, name, read, path_or_content):
        kinds[kind] = name, path_or_content if isinstance(path_or_content, bytes) else path_or_content.read_bytes(), read

    def image(format, mode, **options):
        file = io.BytesIO()
        Image.fromarray(pictures[0]).convert(mode).save(file, format, **options)
        return file.getvalue()

    data.write_images([(pictures, labels)], folder / "ours.npz", 6)
    np.savez(folder / "numpys.npz", images=gray[..., 0], labels=labels)
    np.savez_compressed(folder / "compressed.npz", arr_0=pictures, arr_1=labels)
    for name in ("ours", "numpys", "compressed"):
        add(f"{name}.npz", "a.npz", read_data, folder / f"{name}.npz")
    add("zip of PNG", "a.zip", read_data, make(folder / "a.zip", images_and_labels(pictures, range(6))))
    latents = {f"{i}.npy": npy(rng.normal(size=(8, 8, 8)).astype(np.float32)) for i in range(4)}
    with zipfile.ZipFile(folder / "latents.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in latents.items():
            archive.writestr(name, content)
    add("zip of latents", "a.zip", read_data, folder / "latents.zip")
    for kind, format, mode, options in (
        ("PNG", "PNG", "RGB", {}), ("PNG, alpha", "PNG", "RGBA", {}), ("PNG, palette", "PNG", "P", {"transparency": 3}),
        ("JPEG", "JPEG", "RGB", {}), ("JPEG, progressive", "JPEG", "CMYK", {"progressive": True}), ("BMP", "BMP", "RGB", {}),
        ("WebP", "WEBP", "RGB", {}), ("WebP, lossless", "WEBP", "RGBA", {"lossless": True}),
    ):  # fmt: skip
        add(kind, f"set/a.{format.lower()}", read_folder, image(format, mode, **options))
    others["set/b.png"] = png(pictures[1])
    add("latent", "latents/a.npy", read_folder, latents["0.npy"])
    add("dataset.json", "labelled/dataset.json", read_folder, images_and_labels(pictures, range(6))["dataset.json"].encode())
    others.update({f"labelled/{k}": v for k, v in images_and_labels(pictures, range(6)).items()})
    idx_files = idx_folder(gray[..., 0], labels)
    add("IDX, gzip", "idx/train-images-idx3-ubyte.gz", read_folder, idx_files["train-images-idx3-ubyte.gz"])
    add("IDX", "idx/train-labels-idx1-ubyte", read_folder, idx(labels))
    others.update({f"idx/{k}": v for k, v in idx_files.items()})
    cifar10(folder / "a.tar.gz", n=2)
    add("CIFAR-10", "a.tar.gz", read_data, folder / "a.tar.gz")

    net = Denoiser(small("ddpmpp"))
    net.about = {"role": "generator", "t_init": 2.5}
    checkpoints.save_network(folder / "network.pt", net, **net.about)
    checkpoints.save_network(folder / "ratio.pt", RatioNetwork(small("adm")), role="ratio")
    add("network", "network.pt", checkpoints.load_network, folder / "network.pt")
    add("ratio network", "ratio.pt", checkpoints.load_network, folder / "ratio.pt")
    for kind, architecture, class_name, protocol in (
        ("EDM pickle", "ddpmpp", "EDMPrecond", 4), ("EDM pickle, old", "adm", "EDMPrecond", 2),
        ("EDM2 pickle", "edm2", "Precond", 4),
    ):  # fmt: skip
        config = small(architecture)
        shape = dict(img_resolution=16, img_channels=3, model_channels=config.model_channels,
                     channel_mult=list(config.channel_mult), num_blocks=config.num_blocks,
                     attn_resolutions=list(config.attn_resolutions))  # fmt: skip
        path = write_published(folder / "a.pkl", Denoiser(config), class_name, {**KWARGS[architecture], **shape}, protocol)
        add(kind, "a.pkl", checkpoints.load_network, path)
    state = {"kind": "training state", "nimg": 7, "list": [1, "a", None], "net": net.state_dict()}
    files.save_checkpoint(state, folder / "checkpoint.pt")
    add("checkpoint", "checkpoint.pt", files.load_checkpoint, folder / "checkpoint.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    add("checkpoint, old", "checkpoint.pt", files.load_checkpoint, folder / "old.pt")
    fid.Statistics(np.zeros(8), np.eye(8), "test", 100, "name", "hash").save(folder / "statistics.npz")
    add("statistics", "statistics.npz", lambda path: fid.open_side(str(path)), folder / "statistics.npz")
    return kinds, others


# ---------------------------------------------------------------------------------------------------------
# Damage: functions (content as bytearray, rng) -> content.


def place(content, rng, most=64):
    """A slice of 1 to `most` bytes somewhere in `content`."""
    start = rng.integers(len(content) + 1)
    return slice(start, start + rng.integers(1, most + 1))


def flip(content, rng):
    for _ in range(rng.integers(1, 5)):
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    return content


def overwrite(content, rng):
    where = place(content, rng, 8)
    content[where] = rng.bytes(where.stop - where.start)
    return content


def remove(content, rng):
    del content[place(content, rng, int(rng.choice([1, 16, 4096])))]
    return content


def insert(content, rng):
    content[(start := rng.integers(len(content) + 1)):start] = rng.bytes(rng.integers(1, 65))
    return content


def truncate(content, rng):
    return content[:rng.integers(len(content))]


def zero(content, rng):
    where = place(content, rng, 512)
    content[where] = bytes(len(content[where]))
    return content


def splice(content, rng):
    """A piece of the file over another place of it, or between."""
    piece = content[place(content, rng, 512)]
    start = rng.integers(len(content) + 1)
    content[start:start + rng.choice([0, len(piece)])] = piece
    return content


MARKS = [b"PK\1\2", b"PK\3\4", b"PK\5\6", b"\x1f\x8b", b"ustar", b"\x93NUMPY", b"shape", b"descr", b"\0\0\x08",
         b"\x89PNG", b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"\xff\xc0", b"\xff\xc2", b"\xff\xc4", b"\xff\xda", b"BM", b"RIFF",
         b"VP8", b"ALPH", b"\x80\x02", b"\x80\x04", b"_init_kwargs", b"channel_mult", b"labels"]  # fmt: skip
VALUES = [b"\0", b"\1", b"\xff", b"\x7f", bytes(4), b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\0\0\1\0",
          b"9", b"-", b"'"]  # fmt: skip


def header(content, rng):
    """Some value into one of the fields behind a mark that formats begin with."""
    found = [m.start() for mark in MARKS for m in re.finditer(re.escape(mark), content)] or [0]
    start, value = rng.choice(found) + rng.integers(48), VALUES[rng.integers(len(VALUES))]
    content[start:start + len(value)] = value
    return content


def zip_header(content, rng):
    """Another compression method, or other flags (encryption and the like), for one or all members of a zip file."""
    flags = rng.random() < 0.5
    value = int(1 << rng.integers(16)) if flags else int(rng.choice([0, 1, 6, 8, 9, 12, 14, 93, 95, 97, 98, 99]))
    for mark, offset in ((b"PK\1\2", 8 if flags else 10), (b"PK\3\4", 6 if flags else 8)):
        for match in re.finditer(re.escape(mark), content):
            if rng.random() < 0.7:
                content[match.start() + offset:match.start() + offset + 2] = value.to_bytes(2, "little")
    return content


def inside(content, rng):
    """Damage under an intact check sum: to a member of a zip, to what is in a gzip file, to a chunk of a PNG."""
    damage = SIMPLE[rng.integers(len(SIMPLE))]
    if content[:4] == b"PK\3\4":
        out, method = io.BytesIO(), int(rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", method) as new:
            chosen = rng.choice(old.namelist())
            for name in old.namelist():
                new.writestr(name, bytes(damage(bytearray(old.read(name)), rng)) if name == chosen else old.read(name))
        return out.getvalue()
    if content[:2] == b"\x1f\x8b":
        return gzip.compress(bytes(damage(bytearray(gzip.decompress(content)), rng)), 1)
    if content[:4] == b"\x89PNG":
        chunks, at = [], 8
        while at < len(content):
            size = int.from_bytes(content[at:at + 4], "big")
            chunks.append((bytes(content[at + 4:at + 8]), bytearray(content[at + 8:at + 8 + size])))
            at += size + 12
        chosen = rng.integers(len(chunks))
        out = bytes(content[:8])
        for i, (kind, body) in enumerate(chunks):
            body = bytes(damage(body, rng)) if i == chosen and body else bytes(body)
            out += len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
        return out
    return damage(content, rng)


SIMPLE = [flip, overwrite, remove, insert, truncate, zero, splice, header]
DAMAGE = [*SIMPLE, zip_header, inside, inside, inside]


# ---------------------------------------------------------------------------------------------------------
# The trial.


def intact(content, rng):
    return content


def trial(kind, folder, others, seed, number, damage=None):
    """(outcome, text): "read", "refused", or a violation."""
    name, content, read = kind
    rng = np.random.default_rng([seed, number])
    damage = damage or DAMAGE[rng.integers(len(DAMAGE))]
    beside = {other: whole for other, whole in others.items() if "/" in name and other.startswith(Path(name).parts[0])}
    make(folder, {**beside, name: bytes(damage(bytearray(content), rng))})
    data.MEMORY_LIMIT = int(rng.choice([1000, 2**28]))  # mapped, through the cache, or in memory
    before, started, text = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), ""
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(folder / name)
        outcome = "read"
    except files.UserError as error:
        outcome, text = "refused", str(error)
        if str(folder / Path(name).parts[0]) not in text:
            outcome = "A LINE THAT DOES NOT NAME THE FILE"
        elif not re.search("; |expected|give|use", text):
            outcome = "A LINE THAT DOES NOT SAY WHAT TO DO"
    except Exception as error:
        outcome, text = "A TRACEBACK", f"{type(error).__name__}: {error}"
    seconds = time.process_time() - started
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if seconds > SECONDS or megabytes > MEGABYTES:
        outcome, text = "A SLOW OR LARGE FILE", f"{seconds:.1f} s, {megabytes:.0f} MB ({outcome}: {text})"
    return outcome, f"{damage.__name__}: {text}"


def run(count, seed, only=None):
    """Damage and read `count` files. Returns {kind: Counter of outcomes} and the violations, a line each."""
    limit, outcomes, violations = data.MEMORY_LIMIT, collections.defaultdict(collections.Counter), []
    with tempfile.TemporaryDirectory() as where:
        (whole := Path(where) / "whole").mkdir()
        kinds, others = whole_files(whole)
        try:
            for label, kind in kinds.items():
                with tempfile.TemporaryDirectory(dir=where) as folder:
                    outcome, text = trial(kind, Path(folder), others, seed, 0, intact)
                assert outcome == "read", f"{label}: {text}"
            for number in range(count) if only is None else [only]:
                label = list(kinds)[number % len(kinds)]
                with tempfile.TemporaryDirectory(dir=where) as folder:
                    outcome, text = trial(kinds[label], Path(folder), others, seed, number)
                outcomes[label][outcome] += 1
                if outcome not in ("read", "refused") or only is not None:
                    violations.append(f"{outcome}, --seed {seed} --only {number}, {label}, {text}")
        finally:
            data.MEMORY_LIMIT = limit
    return outcomes, violations


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this file alone")
    args = parser.parse_args()
    outcomes, violations = run(args.files, args.seed, args.only)
    for label, counts in outcomes.items():
        print(f"{label:20}", "  ".join(f"{outcome} {n}" for outcome, n in counts.most_common()))
    print("in all".ljust(20), "  ".join(f"{k} {n}" for k, n in sum(outcomes.values(), collections.Counter()).most_common()))
    print("\n".join(violations))
    sys.exit(bool(violations) and args.only is None)


if __name__ == "__main__":
    main()
