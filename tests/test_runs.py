"""A run continues exactly after any stop, ranks and micro-batches change nothing, a failure is one
line. What happens at a step or in a rank is brought about there, without waiting."""

import functools
import io
import itertools
import json
import os
import resource
import signal
import sys
import types
from unittest import mock

import pytest
import torch
from conftest import SHORT, alike, call, python, weights
from torch.utils._pytree import tree_flatten

import fid
import networks
import pretrain
import sample
import train_diffratio
from machinery import SIGNALS, checkpoints, files, training

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(stage1, tmp_path_factory):
    """Function stage -> (script, its flags, the folder of a run of eight steps without a stop)."""

    @functools.cache
    def run(stage, device="cpu"):
        script, network = pretrain, stage1 / "network.pt"
        args = [*SHORT, "--log-kimg", "0.064", "--device", device]
        if stage == 2:  # its decay would follow the length
            script = train_diffratio
            args += ["--init", network, "--lr-decay-kimg", "0.256", "--fid-every", "0.064",
                     "--fid-images", "100", "--fid-features", network]
        folder = tmp_path_factory.mktemp("whole")
        call(script, *args, "--outdir", folder)
        return script, args, folder

    return run


def log_of(folder):
    """The records of a log without the speed, which depends on what else runs."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "images_per_second"} for r in records]


def assert_same_run(a, b):
    """The same log, networks and state, to the last bit, and nothing left of what was stopped."""
    assert sorted(f.name for f in a.iterdir()) == sorted(f.name for f in b.iterdir())
    assert log_of(a) == log_of(b)
    for path in a.glob("*.pt"):
        one, structure = tree_flatten(files.load_checkpoint(path))
        other, other_structure = tree_flatten(files.load_checkpoint(b / path.name))
        assert structure == other_structure
        for x, y in zip(one, other):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def line_of(failed):
    """The one line that a process which failed wrote on standard error, without torchrun's."""
    said = [line for line in failed.stderr.splitlines() if line.startswith("script.py")]
    assert len(said) == 1 and failed.returncode != 0, failed.stderr
    return said[0]


# ---- Any stop

@pytest.mark.parametrize("stage, numbers", [
    (1, (signal.SIGTERM, signal.SIGTERM)), (2, (signal.SIGINT, signal.SIGHUP)),
])
def test_a_run_continues_exactly_after_a_signal_and_after_its_end(
        refused, whole, tmp_path, monkeypatch, stage, numbers, device):
    """Between two log lines: their sums go on as well. A cluster and torchrun may both send one."""
    script, args, folder = whole(stage, device)
    short = [*args, "--outdir", tmp_path, "--kimg", "0.128"]
    handlers, advance = [signal.getsignal(number) for number in SIGNALS], training.Run.advance

    def signalled(run):
        for number in numbers if run.nimg == 64 else ():
            os.kill(os.getpid(), number)
        advance(run)

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "advance", signalled)
        patch.setattr(training, "time", types.SimpleNamespace(monotonic=lambda: 0.0))  # together
        line = refused(script, *short, code=128 + numbers[0])
    assert "stopped at 0.096 kimg; the same command continues it" in line
    assert handlers == [signal.getsignal(number) for number in SIGNALS]
    at_stop = weights(tmp_path / "network.pt")
    call(script, *short)
    with open(tmp_path / "log.jsonl", "a") as file:  # after the checkpoint, killed while it wrote
        file.write('{"nimg": 192, "loss": 1.0}\n{"nimg": 4')
    call(script, *args, "--outdir", tmp_path)
    if device == "cpu":
        assert_same_run(folder, tmp_path)
    else:  # cuDNN may choose other kernels
        assert alike(weights(folder / "network.pt"), weights(tmp_path / "network.pt"), at_stop)


def test_a_later_second_signal_ends_the_run_at_once(refused, tmp_path, monkeypatch):
    def signalled(run):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("still here")

    clock = types.SimpleNamespace(monotonic=itertools.count(step=60).__next__)
    monkeypatch.setattr(training, "time", clock)
    monkeypatch.setattr(training.Run, "advance", signalled)
    monkeypatch.setattr(os, "_exit", sys.exit)
    refused(pretrain, *SHORT, "--outdir", tmp_path, code=128 + signal.SIGTERM)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_fid_keeps_the_best_and_a_signal_loses_nothing(refused, whole, tmp_path, monkeypatch):
    """All is saved before a measurement, which is made up for at the next start."""
    script, args, folder = whole(2)

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the measurement went on")

    with monkeypatch.context() as patch:
        patch.setattr(fid, "measure", signalled)
        refused(script, *args, "--outdir", tmp_path, code=128 + signal.SIGTERM)
    assert files.load_checkpoint(tmp_path / "checkpoint.pt")["nimg"] == 64
    call(script, *args, "--outdir", tmp_path)
    assert_same_run(folder, tmp_path)
    values = [record["fid"] for record in log_of(folder) if "fid" in record]
    best = [checkpoints.load_network(path).about["fid"] for path in folder.glob("*-best.pt")]
    assert len(values) == 4 and best == [min(values)] * 2


def test_a_kill_between_the_network_and_the_checkpoint_is_made_good(whole, tmp_path):
    """At the second save, when one of the two has its name and the other not yet."""
    script, args, folder = whole(1)
    done = python("""
import os, pretrain, signal; from machinery import training
done, replace = [], os.replace
def killed(part, path):
    done.append(path.suffix)
    if done.count(".pt") == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(part, path)
os.replace = killed
training.run(pretrain.main)""", *args, "--save-kimg", "0.128", "--outdir", tmp_path)
    assert done.returncode == -signal.SIGKILL and len(list(tmp_path.glob(".*.part"))) == 1
    call(script, *args, "--outdir", tmp_path)
    assert_same_run(folder, tmp_path)


def test_a_second_process_is_refused_with_a_line_that_names_the_first(refused, tmp_path):
    args = [*SHORT, "--kimg", "0.032", "--outdir", tmp_path]
    with files.lock(tmp_path):
        line = refused(pretrain, *args)
    assert f"{tmp_path} is in use by process {os.getpid()} on " in line
    assert [f.name for f in tmp_path.iterdir()] == [".lock"]
    call(pretrain, *args)


@pytest.mark.parametrize("inside", ["", "file in a folder"])
def test_content_is_on_the_disk_before_it_replaces_a_file(tmp_path, monkeypatch, inside):
    system = mock.Mock()
    monkeypatch.setattr(os, "fsync", system.fsync)
    monkeypatch.setattr(os, "replace", system.replace)
    with files.atomic(tmp_path / "x") as part:
        if inside:
            part.mkdir()
        (part / inside).write_text("content")
    assert [name for name, *_ in system.mock_calls] == ["fsync", "replace"]


def test_a_closed_terminal_does_not_end_even_the_shortest_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", mock.Mock(encoding="utf-8"))
    sys.stdout.write.side_effect = OSError(5, "Input/output error")
    call(pretrain, *SHORT, "--kimg", "0.0001", "--outdir", tmp_path)
    assert files.load_checkpoint(tmp_path / "checkpoint.pt")["nimg"] == 32  # one step


def test_names_of_folders_need_not_be_utf_8_and_a_finished_run_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    for kimg in ("0.032", "0.064", "0.064"):
        call(pretrain, *SHORT, "--kimg", kimg, "--outdir", tmp_path / os.fsdecode(b"caf\xe9"))
    sys.stdout.flush()
    shown = sys.stdout.buffer.getvalue()
    assert rb"caf\udce9 at 0.064 kimg" in shown and shown.count(b"is done already") == 1


@pytest.mark.parametrize("stdout", ["None", "os.fdopen(os.dup(pipe), 'w', 1)"])
def test_a_closed_output_costs_no_image(tmp_path, stdout):
    text = ("import os, sys, sample\nfrom machinery import training\nread, pipe = os.pipe()\n"
            f"os.close(read)\nos.dup2(pipe, 1)\nsys.stdout = {stdout}\n"
            "sys.argv[1:] = ['--n', '4', '--out', sys.argv[1]]\ntraining.run(sample.main)")
    result = python(text, tmp_path / "x.png")
    assert (result.returncode, result.stderr) == (0, "") and (tmp_path / "x.png").exists()


def test_a_place_that_cannot_be_written_is_named_before_the_work(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "generate", None)
    (tmp_path / "file").write_text("")
    (tmp_path / "x.npz").mkdir()
    assert "file" in refused(sample, "--out", tmp_path / "file" / "x.npz")
    assert "is a folder" in refused(sample, "--out", tmp_path / "x.npz").lower()


def test_a_full_disk_is_one_line_and_keeps_the_file_before(refused, tmp_path):
    """As the system says it; torch's writer would say "unexpected pos"."""
    path, limits = tmp_path / "c.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    files.save_checkpoint({"kind": "a test", "a": torch.ones(3)}, path)

    def main():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            files.save_checkpoint({"a": torch.zeros(10_000)}, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert "File too large" in refused(types.SimpleNamespace(__name__="script", main=main))
    assert files.load_checkpoint(path)["a"].sum() == 3 and [*tmp_path.iterdir()] == [path]


def test_a_missing_compiler_is_one_line(refused):
    error = type("Failed", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    script = mock.Mock(__name__="script", main=mock.Mock(side_effect=error("No working\nC++ tool")))
    assert "No working C++ tool); leave out --compile" in refused(script)


# ---- Any division of the work

@pytest.mark.parametrize("stage", [1, 2])
def test_ranks_micro_batches_layout_and_compilation_may_change(whole, tmp_path, monkeypatch, stage):
    """One rank in another layout; two with micro-batches, one of which gets SIGTERM; one, compiled:
    up to rounding the result of one rank throughout (the digits have no dropout)."""
    script, args, folder = whole(stage)
    args = [*args, "--outdir", tmp_path]
    with monkeypatch.context() as patch:  # the optimiser's averages must follow the layout
        patch.setattr(networks, "memory_format", lambda *_: torch.contiguous_format)
        call(script, *args, "--kimg", "0.064")
    start = weights(tmp_path / "network.pt")

    done = python(f"""
import os, signal, {script.__name__} as script; from machinery import training
advance = training.Run.advance
def signalled(run):
    if run.nimg == 128 and run.rt.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    advance(run)
training.Run.advance = signalled
training.run(script.main)""", *args, "--micro-batch", "8", ranks=2)
    assert "stopped at 0.16 kimg; the same command continues it" in line_of(done)

    compiled = functools.partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(networks.Denoiser, "compile", compiled)
    monkeypatch.setattr(networks.RatioNetwork, "compile", compiled)
    call(script, *args, "--compile", "--micro-batch", "16")
    assert alike(weights(folder / "network.pt"), weights(tmp_path / "network.pt"), start)
    for one, other in zip(log_of(folder), log_of(tmp_path), strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"bands"}:  # one of 128 logits may change its sign
            assert one[key] == pytest.approx(other[key], rel=0.02), key


def test_sampling_is_for_one_rank(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(files.UserError, match="without torchrun"):
        sample.main()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_of_one_rank_is_printed_by_it_and_ends_all(rank):
    """The other would go on for long."""
    done = python(f"""
import torch; from machinery import training
def main():
    rt = training.Runtime("cpu")
    if rt.rank == {rank}:
        raise OSError(28, "No space left on device", "checkpoint.pt")
    for i in range(100_000):
        rt.sum(torch.ones(1))
training.run(main)""", ranks=2)
    name = ["script.py: ", "script.py, rank 1: "][rank]
    assert line_of(done) == f"{name}error: No space left on device: checkpoint.pt"


@pytest.mark.parametrize("place, order", [(0, ["make", "wait"]), (1, ["wait", "make"])])
def test_one_rank_of_each_machine_goes_first(monkeypatch, place, order):
    """It converts the data; the others of its machine find it in the cache."""
    found = []
    monkeypatch.setenv("LOCAL_RANK", str(place))
    monkeypatch.setattr(training.Runtime, "agree", lambda *_: found.append("wait"))
    training.Runtime("cpu").main_first(lambda: found.append("make"))
    assert found == order


def test_ranks_that_do_not_share_the_folder_are_stopped(tmp_path):
    """Both make the same mistake; one of them says it."""
    call(pretrain, *SHORT, "--kimg", "0.064", "--outdir", tmp_path / "0")
    done = python("""
import os, pretrain; from machinery import training
sys.argv[-1] += os.environ["RANK"]
training.run(pretrain.main)""", *SHORT, "--outdir", f"{tmp_path}/", ranks=2)
    assert "at 0.064 kimg on one machine" in line_of(done)
    assert "--outdir must be on a disk that all machines share" in line_of(done)
