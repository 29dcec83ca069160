"""What the tests of the scripts share."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Whoever starts the tests in the background may have these ignored.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "exercises")]
from machinery import checkpoints  # noqa: E402
from machinery import training  # noqa: E402

# Eight steps. A later --device takes precedence.
SHORT = ["--device", "cpu", "--precision", "fp32", "--kimg", "0.256", "--batch", "32", "--grid-kimg", "100"]


@pytest.fixture(params=["cpu", *["cuda"] * torch.cuda.is_available()])
def device(request):
    """"cpu" and, where there is one, "cuda", with the settings that the scripts make for it: no TF32."""
    training.start(request.param)
    return request.param


@pytest.fixture
def one_thread():
    """Sums in one order, so that equal runs are equal to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def call(monkeypatch):
    """Function (script module, *arguments): run a script in this process, as the command line would."""

    def run(script, *args):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, args)])
        training.run(script.main)

    return run


@pytest.fixture
def refused(call, capsys):
    """Function (script, *arguments) -> the one line with which the script refuses them, at exit code 2."""

    def run(script, *args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            call(script, *args)
        assert stop.value.code == 2
        error = capsys.readouterr().err.strip()
        assert "Traceback" not in error and "\n" not in error, error
        return error

    return run


@pytest.fixture(scope="session")
def stage1(tmp_path_factory):
    """The folder of a stage 1 on the digits: a run of eight steps, with the network.pt of a run of full length from assets/."""
    out = tmp_path_factory.mktemp("stage1")
    command = [sys.executable, ROOT / "pretrain.py", *SHORT, "--outdir", out]
    subprocess.run([str(c) for c in command], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    shutil.copy(ROOT / "assets" / "digits-stage1.pt", out / "network.pt")
    return out


def weights(path):
    """The tensors of a network file."""
    return checkpoints.load_network(path).state_dict()


def same(a, b):
    """Whether two sets of tensors are equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def alike(a, b, start, share=0.01):
    """Whether two trainings from the weights `start` differ by rounding alone: by less than `share` of the way they went.

    No bound on single weights would hold: Adam with beta1 = 0 begins with a full step along the sign of each gradient, and
    where that is nearly zero, rounding decides the sign.
    """
    apart, way = (torch.cat([(a[k] - other[k]).flatten() for k in a]).norm() for other in (b, start))
    return a.keys() == b.keys() == start.keys() and apart < share * way
