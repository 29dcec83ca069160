"""Promises of a run: it continues exactly after any stop, ranks and micro-batches change nothing, a failure is one line.

What happens at a chosen step or in a chosen rank is brought about there, never by waiting.
"""

import functools
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT, alike, weights

from machinery import data
import fid
from machinery import files
import networks
import pretrain
from machinery import training
import train_diffratio

pytestmark = pytest.mark.usefixtures("one_thread")


def scripts(stage1):
    """(module, its flags) of both stages; the decay would follow the length."""
    return [(pretrain, []), (train_diffratio, ["--init", stage1 / "network.pt", "--lr-decay-kimg", "0.256"])]


def log_of(folder):
    """The records of a log without what depends on the machine and on what else runs."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("images_per_second", "peak_memory_gb")} for r in records]


def assert_equal(a, b):
    """Plain data with tensors, equal to the last bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_alike_logs(a, b):
    """One of 128 logits may change its sign: 2 % of the accuracy."""
    one, other = log_of(a), log_of(b)
    assert [r.keys() for r in one] == [r.keys() for r in other]
    for x, y in zip(one, other):
        for key in x.keys() - {"bands"}:
            assert x[key] == pytest.approx(y[key], rel=0 if key == "nimg" else 0.02), key


def assert_same_run(a, b, at_stop=None):
    """The folders hold the same state, the same log and the same networks, and nothing is left of what was stopped.

    at_stop: for runs on a GPU, whose sums have no fixed order, the checkpoint at which one of them was stopped. From there on
    all networks went the same way, up to rounding.
    """
    assert sorted(f.name for f in a.iterdir()) == sorted(f.name for f in b.iterdir())
    if at_stop:
        x, y = (files.load_checkpoint(folder / "checkpoint.pt") for folder in (a, b))
        assert all(alike(x[name], y[name], at_stop[name]) for name in x.keys() & {"net", "generator", "ratio", "ema"})
        assert x.keys() == y.keys() and x["nimg"] == y["nimg"] and x["settings"] == y["settings"]
        return assert_alike_logs(a, b)
    assert_equal(files.load_checkpoint(a / "checkpoint.pt"), files.load_checkpoint(b / "checkpoint.pt"))
    assert log_of(a) == log_of(b)
    for network in a.glob("network*.pt"):
        assert_equal(weights(network), weights(b / network.name))


def python(text, *args, ranks=0):
    """Run the program `text` in a process of its own, or in several ranks that torchrun starts."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, "--no-python", sys.executable] if ranks else []
    path = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nsys.argv[0] = 'script.py'\n"
    command = [sys.executable, *launcher, "-c", path + text, *args]
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def said(done):
    """The lines that the program itself wrote on standard error, without torchrun's."""
    return [line for line in done.stderr.splitlines() if line.startswith("script.py")]


# ---------------------------------------------------------------------------------------------------------
# Any stop.


@pytest.mark.parametrize("stage", [0, 1])
def test_a_longer_run_continues_a_shorter_one_exactly(call, stage1, tmp_path, stage, device):
    script, args = scripts(stage1)[stage]
    args = [*args, *SHORT, "--log-kimg", "0.064", "--device", device]
    call(script, *args, "--outdir", tmp_path / "whole")
    call(script, *args, "--outdir", tmp_path / "parts", "--kimg", "0.128")
    at_stop = files.load_checkpoint(tmp_path / "parts" / "checkpoint.pt") if device == "cuda" else None
    call(script, *args, "--outdir", tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", at_stop)


@pytest.mark.parametrize("stage, number", [(0, signal.SIGTERM), (1, signal.SIGINT), (1, signal.SIGHUP)])
def test_a_signal_ends_the_step_and_the_run_continues_exactly(call, stage1, tmp_path, monkeypatch, capsys, stage, number, device):
    """Between two log lines: their sums go on as well. The same signal comes twice, as from a cluster and from torchrun."""
    script, args = scripts(stage1)[stage]
    args = [*args, *SHORT, "--log-kimg", "0.128", "--device", device]
    call(script, *args, "--outdir", tmp_path / "whole")
    before = signal.signal(number, signal.default_int_handler)  # whoever started the tests may have it ignored
    advance = training.Run.advance

    def signalled(run):
        if run.nimg == 64:
            os.kill(os.getpid(), number)
            training._signals.time += 60  # together, however slow the machine is
            os.kill(os.getpid(), number)
        advance(run)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(training.Run, "advance", signalled)
        call(script, *args, "--outdir", tmp_path / "parts")
    assert stop.value.code == 128 + number
    assert f"stage {stage + 1} stopped at 0.096 kimg; the same command continues it" in capsys.readouterr().err
    assert signal.signal(number, before) is signal.default_int_handler  # the run has put back what it found
    at_stop = files.load_checkpoint(tmp_path / "parts" / "checkpoint.pt") if device == "cuda" else None
    call(script, *args, "--outdir", tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", at_stop)


def test_a_second_signal_ends_the_run_at_once(tmp_path):
    done = python("""
import os, pretrain, signal; from machinery import training
def signalled(run):
    os.kill(os.getpid(), signal.SIGTERM)
    training._signals.time -= 60
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
training.Run.advance = signalled
training.run(pretrain.main)""", *SHORT, "--outdir", tmp_path)  # fmt: skip
    assert done.returncode == 128 + signal.SIGTERM and "still here" not in done.stdout
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_signal_during_fid_loses_nothing(call, stage1, tmp_path, monkeypatch):
    """Everything is saved before the measurement, which is made up for at the next start."""
    script, args = scripts(stage1)[1]
    args = [*args, *SHORT, "--fid-every", "0.128", "--fid-images", "100", "--fid-features", stage1 / "network.pt"]
    call(script, *args, "--outdir", tmp_path / "whole")
    assert len([r for r in log_of(tmp_path / "whole") if "fid" in r]) == 2

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the measurement went on")

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(fid, "measure", signalled)
        call(script, *args, "--outdir", tmp_path / "parts")
    assert stop.value.code == 143 and files.load_checkpoint(tmp_path / "parts" / "checkpoint.pt")["nimg"] == 128
    call(script, *args, "--outdir", tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_kill_between_the_network_and_the_checkpoint_is_made_good(call, tmp_path):
    """SIGKILL at the last save, when one of the two has its name and the other not yet: the next start makes both."""
    args = [*SHORT, "--save-kimg", "0.128", "--outdir"]
    call(pretrain, *args, tmp_path / "whole")
    done = python("""
import os, pretrain, signal; from machinery import training
done, replace = [], os.replace
def killed(part, path):
    done.append(path.suffix)
    if done.count(".pt") == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(part, path)
os.replace = killed
training.run(pretrain.main)""", *args, tmp_path / "parts")  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "parts").glob(".*.part"))) == 1
    call(pretrain, *args, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_second_process_is_refused_with_a_line_that_names_the_first(call, refused, tmp_path):
    call(pretrain, *SHORT, "--kimg", "0.032", "--outdir", tmp_path)
    checkpoint = (tmp_path / "checkpoint.pt").read_bytes()
    with files.lock(tmp_path / ".lock", tmp_path):
        line = refused(pretrain, *SHORT, "--outdir", tmp_path)
    assert f"{tmp_path} is in use by process {os.getpid()} on " in line
    assert (tmp_path / "checkpoint.pt").read_bytes() == checkpoint
    call(pretrain, *SHORT, "--outdir", tmp_path)


@pytest.mark.parametrize("folder", [False, True])
def test_what_replaces_a_file_is_on_the_disk_by_then(tmp_path, monkeypatch, folder):
    """The content, then the new name: each is flushed, in this order."""
    order, fsync, replace = [], os.fsync, os.replace

    def noted(descriptor):
        order.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(str(tmp_path)).split(".")[-1])
        fsync(descriptor)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", lambda *args: (order.append("replace"), replace(*args)))
    with files.atomic(tmp_path / "x") as part:
        if folder:
            part.mkdir()
            (part / "inside.txt").write_text("content")
        else:
            part.write_text("content")
    assert order == ["txt" if folder else "part", "replace"]


def test_the_log_forgets_what_came_after_the_checkpoint(call, tmp_path):
    args = [*SHORT, "--log-kimg", "0.064", "--outdir", tmp_path]
    call(pretrain, *args, "--kimg", "0.128")
    before = log_of(tmp_path)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"nimg": 192, "loss": 1.0}\n{"nimg": 4')  # the process was killed while it wrote
    call(pretrain, *args, "--kimg", "0.128")
    assert log_of(tmp_path) == before and [record["nimg"] for record in before] == [64, 128]


def test_a_closed_terminal_does_not_end_a_run(call, tmp_path, monkeypatch):
    class Closed:
        def write(self, text):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stdout", Closed())
    call(pretrain, *SHORT, "--outdir", tmp_path)
    assert (tmp_path / "checkpoint.pt").exists()


# ---------------------------------------------------------------------------------------------------------
# Any division of the work.


@pytest.mark.parametrize("stage", [0, 1])
def test_micro_batches_do_not_change_the_result(call, stage1, tmp_path, stage, device):
    """Up to rounding: sums are taken in another order. Dropout is off (the digits have none)."""
    script, args = scripts(stage1)[stage]
    args = [*args, *SHORT, "--device", device]
    call(script, *args, "--outdir", tmp_path / "one")
    call(script, *args, "--outdir", tmp_path / "four", "--micro-batch", "8")
    call(script, *args, "--outdir", tmp_path / "start", "--kimg", "0.032")  # the first step
    assert alike(*(weights(tmp_path / name / "network.pt") for name in ("one", "four", "start")))


@pytest.mark.parametrize("stage, precision", [(0, "bf16"), (1, "fp32")])
def test_ranks_micro_batches_and_compilation_may_change_within_a_run(call, stage1, tmp_path, monkeypatch, stage, precision):
    """One rank; two with micro-batches and FID, one of which gets SIGTERM; one, compiled: the result of one rank throughout.

    Up to rounding. In bfloat16 gradients are rounded to 0.2 %, so for 0.2 % of the weights Adam's first steps, which follow
    signs, may go the other way: that is sqrt(0.002) * 2, or 9 % of the way of all.
    """
    script, args = scripts(stage1)[stage]
    args = [*args, *SHORT, "--precision", precision, "--log-kimg", "0.064"]
    if stage == 1:
        args += ["--fid-every", "0.064", "--fid-images", "100", "--fid-features", stage1 / "network.pt"]
    call(script, *args, "--outdir", tmp_path / "one")
    call(script, *args, "--outdir", tmp_path / "parts", "--kimg", "0.064")
    start = weights(tmp_path / "parts" / "network.pt")

    done = python(f"""
import os, signal, {script.__name__} as script; from machinery import training
advance = training.Run.advance
def signalled(run):
    if run.nimg == 128 and run.rt.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    advance(run)
training.Run.advance = signalled
training.run(script.main)""", *args, "--outdir", tmp_path / "parts", "--micro-batch", "8", ranks=2)  # fmt: skip
    assert [line.split("error: ")[-1] for line in said(done)] == [
        f"script.py: stage {stage + 1} stopped at 0.16 kimg; the same command continues it"
    ], done.stderr
    assert done.returncode != 0 and files.load_checkpoint(tmp_path / "parts" / "checkpoint.pt")["nimg"] == 160

    compiled = functools.partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(networks.Denoiser, "compile", compiled)
    monkeypatch.setattr(networks.RatioNetwork, "compile", compiled)
    call(script, *args, "--outdir", tmp_path / "parts", "--compile")
    ends = (weights(tmp_path / name / "network.pt") for name in ("one", "parts"))
    assert alike(*ends, start, share=0.01 if precision == "fp32" else 0.2)
    assert_alike_logs(tmp_path / "one", tmp_path / "parts")


@pytest.mark.parametrize("stage", [0, 1])
def test_a_run_continues_in_another_memory_layout(call, stage1, tmp_path, monkeypatch, stage):
    """--compile and the device decide the layout of the weights; the optimiser's averages must follow it."""
    script, args = scripts(stage1)[stage]
    call(script, *args, *SHORT, "--outdir", tmp_path / "one")
    monkeypatch.setattr(networks, "memory_format", lambda *_: torch.contiguous_format)
    call(script, *args, *SHORT, "--outdir", tmp_path / "parts", "--kimg", "0.064")
    start = weights(tmp_path / "parts" / "network.pt")
    monkeypatch.undo()
    call(script, *args, *SHORT, "--outdir", tmp_path / "parts")
    assert alike(weights(tmp_path / "one" / "network.pt"), weights(tmp_path / "parts" / "network.pt"), start, share=0.01)


def test_the_shortest_run_is_one_step(call, tmp_path):
    call(pretrain, *SHORT, "--kimg", "0.0001", "--outdir", tmp_path)
    assert files.load_checkpoint(tmp_path / "checkpoint.pt")["nimg"] == 32 and (tmp_path / "network.pt").exists()


def test_a_full_disk_is_one_line_and_keeps_the_file_before(tmp_path):
    """As the system says it; torch's writer would say "unexpected pos"."""
    files.save_checkpoint({"kind": "a test", "a": torch.ones(3)}, tmp_path / "c.pt")
    done = python("""
import resource, signal, torch; from machinery import files, training
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
training.run(lambda: files.save_checkpoint({"a": torch.zeros(10_000)}, sys.argv[1]))""", tmp_path / "c.pt")
    assert done.returncode == 2 and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert files.load_checkpoint(tmp_path / "c.pt")["a"].sum() == 3 and [f.name for f in tmp_path.iterdir()] == ["c.pt"]


def test_a_full_gpu_is_not_a_damaged_file():
    with pytest.raises(torch.OutOfMemoryError), files.reading("checkpoint.pt", "a checkpoint"):
        raise torch.OutOfMemoryError("CUDA out of memory")


# ---------------------------------------------------------------------------------------------------------
# Several ranks, several machines.


def test_a_mistake_that_all_ranks_make_is_printed_once(stage1, tmp_path):
    done = python("import sample; from machinery import training; training.run(sample.main)", "--network", stage1 / "network.pt", ranks=2)
    assert len(said(done)) == 1 and "without torchrun" in said(done)[0] and done.returncode != 0


def test_a_mistake_of_one_rank_is_printed_by_it_and_ends_all(tmp_path):
    """A full disk on the first rank while the others wait for it; a missing file on the second while the first goes on."""
    for rank in (0, 1):
        done = python(f"""
import torch; from machinery import training
from machinery.files import UserError
def main():
    rt = training.start("cpu")
    if {rank} == 1 == rt.rank:
        raise UserError("no such file on this machine")
    def fail():
        raise OSError(28, "No space left on device", "checkpoint.pt")
    if {rank} == 0 == rt.rank:
        fail()
    for i in range(100_000):
        rt.sum(torch.ones(1))
training.run(main)""", ranks=2)  # fmt: skip
        expected = ["error: No space left on device: checkpoint.pt", "script.py, rank 1: error: no such file on this machine"][rank]
        assert len(said(done)) == 1 and said(done)[0].endswith(expected) and done.returncode != 0, done.stderr


def test_one_rank_of_each_machine_goes_first(tmp_path):
    """Two ranks of one machine: the first converts the data, the second finds it. Of two machines both convert."""
    data.write_images([(np.zeros((5, 8, 8, 3), np.uint8), None)], tmp_path / "set")
    done = python("""
import dataclasses, os, pathlib; from machinery import data, training
data.MEMORY_LIMIT = 0
def main():
    rt, rank = training.start("cpu"), int(os.environ["RANK"])
    for local_rank, place in ((rank, "one machine"), (0, f"machine {rank}")):
        rt = dataclasses.replace(rt, local_rank=local_rank)
        os.environ["DIFFRATIO_CACHE"] = str(pathlib.Path(sys.argv[2], place))
        assert len(rt.main_first(lambda: data.load(sys.argv[1]))) == 5
training.run(main)""", tmp_path / "set", tmp_path / "cache", ranks=2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    places = re.findall(r"converting .*? to .*?/cache/([^/]+)/", done.stderr)  # two processes may write into one line
    assert sorted(places) == ["machine 0", "machine 1", "one machine"], done.stderr


def test_ranks_that_do_not_share_the_folder_are_stopped(call, tmp_path):
    call(pretrain, *SHORT, "--kimg", "0.064", "--outdir", tmp_path / "0")
    done = python("""
import os, pretrain; from machinery import training
sys.argv[-1] += os.environ["RANK"]
training.run(pretrain.main)""", *SHORT, "--outdir", f"{tmp_path}/", ranks=2)  # fmt: skip
    assert len(said(done)) == 1 and "at 0.064 kimg on one machine" in said(done)[0], done.stderr
    assert "--outdir must be on a disk that all machines share" in said(done)[0]
