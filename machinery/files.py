"""Files: one-line errors, atomic writing, checkpoints, downloads; nothing read is executed."""

import contextlib
import errno
import hashlib
import io
import os
import pickle
import re
import shutil
import socket
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch


class UserError(Exception):
    """Bad input. The message is one line that names the cause and the remedy."""

    def __init__(self, message):
        text = "".join(c if c.isprintable() else " " for c in str(message)[:2000])
        text = " ".join(text.split())
        super().__init__(text if len(text) <= 500 else f"{text[:350]} ... {text[-150:]}")


@contextlib.contextmanager
def reading(path, what, remedy="get it again"):
    """Turn any parsing error into a `UserError`: the path, `what` it should be, the remedy."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or path}: no such file; give another") from None
    except UserError as error:
        named = str(error).startswith(str(path))
        raise error if named else UserError(f"{path}: {error}") from None
    except torch.OutOfMemoryError:  # the device is full, the file is sound
        raise
    except Exception as error:
        # Parsers raise OSError without a number, or EINVAL when they seek to before the start.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            error.filename = error.filename or str(path)
            raise
        cause = f"{type(error).__name__}: {error}"[:200]
        if "weights_only" in str(error):  # torch advises to load without this protection
            cause = "it holds more than tensors and plain data"
        raise UserError(f"{path}: not {what}, or damaged ({cause}); {remedy}") from None


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path, which replaces `path` on success; a crash or a power loss leaves
    the old or the new file (of a folder: the files directly in it)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        yield part
        for file in (part, *part.glob("*")):
            if file.is_file():
                flush(file)
        os.replace(part, path)
    except OSError as error:
        if error.errno and not error.filename:  # a full disk comes without a name
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        part.unlink(missing_ok=True)


def check_writable(path):
    """Raise unless a file can be made beside `path`, and `path` is no folder named as a file."""
    path = Path(path)
    if path.suffix.lower() in (".png", ".npz") and path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def flush(path):
    """Wait until a file is on the disk."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def lock(folder):
    """Context in which no other process locks `folder`; `UserError` if one has already.

    It does nothing on systems and disks without locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a+")
    try:
        import fcntl  # not on Windows
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(f"{folder} is in use by process {file.read()}; wait for it, stop it, "
                        "or choose another folder") from None
    except (ImportError, OSError):
        return file
    for part in folder.glob(".*.pt.*.part"):  # what killed processes left half-written
        part.unlink(missing_ok=True)
    file.truncate(0)
    print(os.getpid(), "on", socket.gethostname(), end="", file=file, flush=True)
    return file


def save_checkpoint(data, path):
    """Write plain data (dicts, lists, numbers, strings, tensors) to `path`, atomically."""
    with atomic(path) as part, open(part, "wb") as file:
        try:
            torch.save(data, file)
        except RuntimeError as error:  # torch's writer hides a full disk behind its own error
            raise error.__context__ if isinstance(error.__context__, OSError) else error


def load_plain(path, mmap=False):
    """Read a file of tensors and plain data to the CPU. mmap: processes share the tensors."""
    if zipfile.is_zipfile(path):  # torch's format, of which torch ignores the check sums
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"check sum of {damaged}")
    mmap = mmap and str(path).isprintable()  # torch maps no file whose name is not UTF-8
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def load_checkpoint(path, mmap=False):
    """Read what `save_checkpoint` wrote, with a `kind`."""
    what, remedy = "a checkpoint of this project", "restore a copy, or delete it and train again"
    with reading(path, what, remedy):
        data = load_plain(path, mmap)
        if not isinstance(data, dict) or "kind" not in data:
            raise UserError(f"not {what}; give another file")
        return data


class Stub(dict):
    """Stands for whatever a pickle names: keeps its items, `args` and `state`, and runs nothing."""

    args, state = (), None

    def __init__(self, *args):
        self.args = args


def _tensor(data, offset, size, stride, *_):
    storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return torch.empty(0, dtype=storage.dtype).set_(storage).as_strided(size, stride, offset)


_BUILDERS = {  # stands for a name in a pickle, whatever its module
    "encode": lambda text, *_: text.encode("latin1"),  # how protocol 2 spells bytes
    "_reconstruct": lambda *_: np.empty(0),  # a numpy array, until its state comes
    "_load_from_bytes": lambda data: data,  # a tensor's storage
    "_rebuild_tensor_v2": _tensor,
    "_rebuild_parameter": lambda tensor, *_: tensor,
}


class _Unpickler(pickle._Unpickler):  # in Python: C's believes lengths of gigabytes in a file
    dispatch = dict(pickle._Unpickler.dispatch)
    del dispatch[pickle.BYTEARRAY8[0]]  # so does this

    def find_class(self, module, name):
        return _BUILDERS.get(name) or type(f"{module}.{name}", (Stub,), {})

    def load_build(self):  # sets the state of stubs and arrays only
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, Stub):
            made.state = state
        elif isinstance(made, np.ndarray):
            _, shape, dtype, fortran, raw = state
            if not re.fullmatch("[biuf][0-9]+", dtype.args[0]):
                raise ValueError("an array of other things than numbers")
            dtype = np.dtype(dtype.args[0]).newbyteorder(dtype.state[1])
            made.__setstate__((1, shape, dtype, fortran, raw))

    dispatch[pickle.BUILD[0]] = load_build


def read_pickle(path):
    """Unpickle plain data, arrays, tensors, and a `Stub` for all else: nothing named is run."""
    with reading(path, "a pickle of plain data"), open(path, "rb") as file:
        return _Unpickler(file).load()


def file_hash(path, algorithm="sha256"):
    """Hexadecimal hash of a file's content."""
    return hashlib.new(algorithm, Path(path).read_bytes()).hexdigest()


def cache_dir():
    """Folder for downloads and converted data sets: $DIFFRATIO_CACHE, else ~/.cache/diffratio."""
    return Path(os.environ.get("DIFFRATIO_CACHE") or Path.home() / ".cache" / "diffratio")


def download(url, path, algorithm, expected):
    """Fetch `url` to `path`; nothing is kept unless its hash begins with `expected`."""
    with atomic(path) as part:
        socket.setdefaulttimeout(30)  # seconds without an answer
        try:
            torch.hub.download_url_to_file(url, str(part), progress=sys.stderr.isatty())
        except Exception as error:
            raise UserError(f"cannot download {path.name} ({getattr(error, 'reason', error)}); "
                            f"get it from {url} and put it at {path}") from None
        found = file_hash(part, algorithm)
        if not found.startswith(expected):
            raise UserError(f"{url} is damaged: {algorithm} {found[:32]}, expected {expected}; "
                            "nothing was kept, try again")
