"""Files, on which everything else stands: nothing half-written, nothing executed, no damage without a clear word.

Errors for the user, atomic writing, locks, checkpoints of plain data, pickles of unknown origin read without running
anything that they name, hashes, downloads and the cache folder.
"""

import contextlib
import errno
import functools
import hashlib
import http.client
import json
import os
import pickle
import shutil
import socket
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class UserError(Exception):
    """Bad input. The message is one line that names the cause and the remedy."""

    def __init__(self, message):
        text = "".join(c if c.isprintable() else " " for c in str(message)[:2000])  # parts may come from a hostile file
        text = " ".join(text.split())
        super().__init__(text if len(text) <= 500 else f"{text[:350]} ... {text[-150:]}")  # the remedy comes last


@contextlib.contextmanager
def reading(path, what, remedy="get it again"):
    """Around a parser: whatever a damaged or foreign file makes it raise becomes a `UserError`: path, `what`, `remedy`.

    A `UserError` from inside need not name the file: it does so afterwards. Errors of the system (no permission, a full
    disk) keep their words and get the file's name. Parsers raise OSError too: without a number, or "invalid argument" where
    damage sends them to a place before the file's beginning.
    """
    try:
        yield
    except FileNotFoundError as error:
        missing = str(error.filename or path)
        raise UserError(f"{missing}: no such file{f'; {remedy}' if missing != str(path) else ''}") from None
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None
    except torch.OutOfMemoryError:  # the device is full, the file is sound
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            error.filename = error.filename or str(path)
            raise
        cause = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"{path}: not {what}, or damaged ({cause}); {remedy}") from None


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure `path` stays as it was.

    What replaces `path` (a file, or a folder with its files) is on the disk by then: a power loss leaves the old or the new.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        yield part
        for written in (*part.glob("*"), part):
            flush(written)
        os.replace(part, path)
        flush(path.parent)
    finally:
        _remove(part)


def flush(path):
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    folder = path.is_dir()
    with contextlib.suppress(OSError) if folder else contextlib.nullcontext():  # not all systems can flush folders
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_parts(folder, name=""):
    """Remove what killed processes left half-written of `name` (or of all) in `folder`. Only for who has locked it."""
    for part in folder.glob(".*.part"):
        if part.name.startswith(f".{name}"):
            _remove(part)


def lock(path, what, wait=False):
    """Lock the file `path` until the returned file is closed or the process ends, in whatever way: the system releases it.

    If another process has locked it: wait for it, or raise `UserError` that says who is using `what`. None where there
    are no locks (Windows, some network drives): nothing is protected then, which a warning says.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")
    try:
        if fcntl is None:
            raise OSError("not on Windows")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read() or "another process"
            if not wait:
                raise UserError(f"{what} is in use by {owner}; wait for it, stop it, or choose another folder") from None
            print(f"waiting for {owner}, which makes {what}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        print(f"warning: {path} cannot be locked ({error}); let no second process write there", file=sys.stderr, flush=True)
        file.close()
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    return file


def save_checkpoint(data, path):
    """Write plain data (dicts, lists, numbers, strings, tensors) to `path`, atomically."""
    with atomic(path) as part, open(part, "wb") as file:
        try:
            torch.save(data, file)
        except RuntimeError as error:  # torch's writer hides the system's error, such as a full disk, behind its own
            if isinstance(cause := error.__context__, OSError):
                raise OSError(cause.errno, cause.strerror, str(path)) from None
            raise


def load_plain(path, what):
    """Read a file of tensors and plain data to the CPU; nothing in it is executed. `what` says what it should be."""
    with reading(path, what):
        if zipfile.is_zipfile(path):  # torch's current format; it does not look at the check sums itself
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"check sum of {damaged}")
        return torch_load(path)


def torch_load(file):
    """torch.load of tensors and plain data to the CPU, from a path or an open file."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's words advise to load it without this protection
        raise UserError("refused: damaged, or more than tensors and plain data; get it again") from None


def load_checkpoint(path):
    """Read what `save_checkpoint` wrote, to the CPU. Nothing but plain data is accepted."""
    data = load_plain(path, "a checkpoint of this project")
    if not isinstance(data, dict) or "kind" not in data:
        raise UserError(f"{path}: not a checkpoint of this project")
    return data


class _NumpyDtype:
    """Stands in for numpy.dtype in a pickle: keeps the name and the byte order, knows only plain numbers."""

    def __init__(self, name, *_):
        self.name, self.order = (name.decode() if isinstance(name, bytes) else name), "|"

    def __setstate__(self, state):
        self.order = state[1].decode() if isinstance(state[1], bytes) else state[1]

    def real(self):
        if self.name.lstrip("<>|=")[:1] not in ("b", "i", "u", "f"):
            raise UserError(f"a pickle holds an array of type {self.name!r}; only plain numbers are read")
        return np.dtype(self.name).newbyteorder(self.order)


class PickledArray:
    """Stands in for numpy.ndarray in a pickle: keeps the raw bytes; `array()` makes the real one, or fails in any way."""

    state = None

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        self.state = state

    def array(self):
        _, shape, dtype, fortran, raw = self.state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        return np.frombuffer(raw, dtype.real()).reshape(shape, order="F" if fortran else "C")


def _numpy_scalar(dtype, raw=b"\0"):
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    return np.frombuffer(raw, dtype.real())[0].item()


def _encode(text, encoding="utf-8"):  # how Python 2 and old protocols spell bytes
    return str(text).encode("latin1" if encoding == "latin1" else "utf-8")


# What numpy data needs in a pickle. Every entry is inert: a class or function of this file.
NUMPY_STAND_INS = {
    "_codecs.encode": _encode,
    "numpy.dtype": _NumpyDtype,
    "numpy.ndarray": PickledArray,
    **{f"numpy.{core}.multiarray._reconstruct": PickledArray for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _numpy_scalar for core in ("core", "_core")},
}


class _StandInUnpickler(pickle._Unpickler):  # the one in Python: that in C fills gigabytes if a damaged pickle says so
    dispatch = {k: v for k, v in pickle._Unpickler.dispatch.items() if k != pickle.BYTEARRAY8[0]}  # it would too

    def __init__(self, file, stand_ins, **kwargs):
        super().__init__(file, **kwargs)
        self.stand_ins = stand_ins

    def find_class(self, module, name):
        found = self.stand_ins.get(f"{module}.{name}")
        if found is not None:  # a pickle can set attributes of what it is given: not of our own functions
            return found if isinstance(found, type) else functools.partial(found)
        raise UserError(f"refused: it asks for {module}.{name}, which no data file of this kind needs")


def read_pickle(file, stand_ins, what, encoding="ASCII"):
    """Unpickle `file` (an open binary file) with the callables in `stand_ins` {"module.name": callable} and no others.

    Nothing that the pickle names is imported or run: a name outside `stand_ins` raises `UserError` with that name.
    `what` names the file in error messages. Arrays come back as `PickledArray`.
    """
    with reading(what, "a pickle of this kind"):
        return _StandInUnpickler(file, stand_ins, encoding=encoding).load()


def file_hash(path, algorithm="sha256"):
    """Hexadecimal hash of a file's content."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def json_lines(path, *keys):
    """The values of a file of results, one of JSON a line; none if there is no such file.

    Raises `UserError` if it is damaged, or if a line lacks one of `keys`: then it is of another program.
    """
    with reading(path, "a file of results", "correct it or give another --results"):
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()] if Path(path).exists() else []
        if not all(row.keys() >= set(keys) for row in rows):
            raise ValueError("lines of another program")
        return rows


def status(text, end=""):
    """Show `text` in place of the status before, if somebody is watching."""
    if sys.stderr.isatty():
        print(f"\r{text}", end=end, file=sys.stderr, flush=True)


def cache_dir():
    """Folder for downloads and converted data sets: $DIFFRATIO_CACHE, else ~/.cache/diffratio."""
    return Path(os.environ.get("DIFFRATIO_CACHE") or Path.home() / ".cache" / "diffratio")


def download(url, path, algorithm, expected):
    """Fetch `url` to `path`, with progress, and keep it only if its hash begins with `expected`.

    Raises `UserError` that says where to get the file and where to put it when there is no connection.
    """
    path = Path(path)
    with atomic(path) as part:
        try:
            with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as file:
                total, done = int(response.headers.get("Content-Length") or 0), 0
                while block := response.read(1 << 20):
                    file.write(block)
                    done += len(block)
                    status(f"downloading {path.name}: {done / 1e6:.1f} / {total / 1e6:.1f} MB", "\n" * (done == total))
        except (OSError, http.client.HTTPException) as error:  # URLError, HTTPError and time-outs are OSErrors
            cause = getattr(error, "reason", error)
            raise UserError(f"cannot download {path.name} ({cause}); get it from {url} and put it at {path}") from None
        found = file_hash(part, algorithm)
        if not found.startswith(expected):
            raise UserError(f"{path.name} from {url} is damaged: {algorithm} {found[:32]}, expected {expected}; nothing was kept")
