"""What the tests of the scripts share."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job has these ignored
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "exercises")]
import pretrain  # noqa: E402
import train_diffratio  # noqa: E402
from machinery import checkpoints, training  # noqa: E402

# Eight steps. A later --device takes precedence.
SHORT = "--device cpu --precision fp32 --kimg 0.256 --batch 32 --grid-kimg 100".split()


@pytest.fixture(params=["cpu", *["cuda"] * torch.cuda.is_available()])
def device(request):
    """"cpu" and, where there is one, "cuda", set up as the scripts do."""
    training.Runtime(request.param)
    return request.param


@pytest.fixture
def one_thread():
    """Sums in one order, so that equal runs are equal to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def refused(capsys):
    """Function (script, *arguments) -> its last line, an error; it ends with this exit code."""

    def run(script, *args, code=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            call(script, *args)
        assert stop.value.code == code
        error = capsys.readouterr().err.strip()
        assert "Traceback" not in error and "\n" not in error, error
        return error

    return run


@pytest.fixture(scope="session")
def stage1(tmp_path_factory):
    """A run of eight steps of stage 1 on the digits, with the network of a full run."""
    out = tmp_path_factory.mktemp("stage1")
    call(pretrain, *SHORT, "--outdir", out)
    shutil.copy(ROOT / "assets" / "digits-stage1.pt", out / "network.pt")
    return out


def stage_2_arguments(*flags):
    """What train_diffratio.py makes of them."""
    with mock.patch.object(sys, "argv", ["train_diffratio.py", *flags]):
        return training.arguments("", train_diffratio.SETTINGS, train_diffratio.PRESETS)


def call(script, *args):
    """Run a script, given as its module, in this process."""
    with mock.patch.object(sys, "argv", [f"{script.__name__}.py", *map(str, args)]):
        training.run(script.main)


def python(text, *args, ranks=0):
    """Run the program `text` in a process, or in several ranks that torchrun starts."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks,
                "--no-python", sys.executable] if ranks else []
    named = "import sys\nsys.argv[0] = 'script.py'\n" + text
    command = [sys.executable, *launcher, "-c", named, *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env)


def weights(path):
    """The tensors of a network file."""
    return checkpoints.load_network(path).state_dict()


def same(a, b):
    """Whether two sets of tensors are equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def alike(a, b, start, share=0.01):
    """Whether two trainings from `start` differ by less than `share` of the way they went.
    No bound on single weights holds: Adam's first step is full even where rounding decides it."""
    apart, way = (torch.cat([(a[k] - c[k]).flatten() for k in a]).norm() for c in (b, start))
    return a.keys() == b.keys() == start.keys() and apart < share * way
