"""What the scripts share that is not about diffusion.

Devices and ranks, precision, random seeds, the optimiser's step, the folder of a run, logs, and the part of the command
line that both training scripts have. Nothing in this file knows what is being trained.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from machinery.files import UserError, atomic, flush, load_checkpoint, lock, reading, remove_parts, save_checkpoint

# ---------------------------------------------------------------------------------------------------------
# Errors, and the end of a process.

_at_end = contextlib.ExitStack()  # what `run` undoes when a script ends: the lock of its folder, its signal handlers


class Stopped(BaseException):
    """A signal ends the script where nothing is lost. Arguments: the line to print, the number of the signal."""


def run(main):
    """Call `main()`; turn bad input into one line on standard error and exit code 2 instead of a traceback.

    A signal gives 128 + its number (SIGINT 130, SIGTERM 143): the run is not finished, what waits for it must not start.
    """
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except UserError as error:
        _end(f"error: {error}")
    except torch.OutOfMemoryError:
        _end("error: out of GPU memory; lower --micro-batch (the result stays the same) or --batch")
    except OSError as error:  # a full disk, a path without permission: the system's own words are clear
        _end(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except Stopped as stop:
        _end(stop.args[0], 128 + stop.args[1])
    except KeyboardInterrupt:
        _end("stopped; a training run continues from its last checkpoint with the same command", 130)
    except Exception as error:
        if _place()[1] == 1:
            raise
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        _end(f"error: another rank has gone, perhaps killed ({str(error).split('. ')[0]})" if lost else traceback.format_exc(), 1)
    finally:
        _at_end.close()


def _place():
    """(rank, number of ranks) of this process, from torchrun's environment."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@functools.cache
def _meeting_point():
    """The small key-value store that all ranks share, under torchrun in torchrun's own process."""
    return next(dist.rendezvous("env://"))[0]


def _end(message, code=2):
    """End this process with `message`. Of several ranks one speaks, and none waits for the others.

    What all ranks meet is printed by the first of them, what one meets by that one. The others, which then lose contact
    to it, find that it has been said. Neither NCCL's shutdown nor Python's is run: both can wait for ranks that are gone.
    """
    name = Path(sys.argv[0]).name
    message = message.rstrip() if "Traceback" in message else " ".join(message.split())
    rank, world_size = _place()
    name += f", rank {rank}" if rank else ""
    if world_size > 1:
        with contextlib.suppress(Exception):  # the store may have gone with the first rank
            for _ in range(10 if rank else 0):  # which goes ahead by a second
                time.sleep(0.1)
                if _meeting_point().check(["ended"]):
                    os._exit(code)
            if _meeting_point().add("ended", 1) > 1:
                os._exit(code)
    with contextlib.suppress(OSError):  # a closed terminal
        print(f"{name}: {message}", file=sys.stderr, flush=True)
    if world_size == 1:
        sys.exit(code)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # for the last lines of torchrun's report
        about = {"message": {"message": message, "extraInfo": {"timestamp": int(time.time())}}}
        Path(path).write_text(json.dumps(about))
    os._exit(code)


# ---------------------------------------------------------------------------------------------------------
# Device, ranks, precision.


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Where this process computes: its device, its place among the ranks, its precision."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    precision: str = "fp32"
    local_rank: int = 0  # place among the ranks of this machine
    host_group: object = None  # of all ranks, for what concerns the host: gloo, with a time limit of days

    @property
    def is_main(self):
        return self.rank == 0

    def autocast(self):
        """Context in which matrix products and convolutions run in the chosen precision."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.precision != "fp32")

    def print(self, *args, **kwargs):
        """Print from the first rank only. A closed terminal or pipe is no reason to end a run."""
        if self.is_main:
            with contextlib.suppress(OSError):
                print(*args, **kwargs, flush=True)

    def sum(self, tensor):
        """Sum of `tensor` over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, value):
        """The largest of all ranks' `value` (an int). The hosts wait for each other, for days if need be; the GPUs do not.

        It takes 0.1 to 0.2 ms on one machine. A rank that has ended makes it fail at once on the others.
        """
        box = torch.tensor(value)
        if self.world_size > 1:
            dist.all_reduce(box, dist.ReduceOp.MAX, group=self.host_group)
        return box.item()

    def first(self, make):
        """Value of `make()` on the first rank, given to all. If it fails there, that rank ends and the others with it."""
        box = [make() if self.is_main else None]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def main_first(self, make):
        """`make()` on every rank, one of each machine ahead of the others: it fills the caches that they then find.

        The others wait as long as it takes, which may be the conversion of a large data set.
        """
        ahead = self.local_rank == 0
        value = make() if ahead else None
        self.agree(0)
        return value if ahead else make()


def start(device="auto", precision="fp32", alone=False):
    """Join the ranks that torchrun started (if it did) and choose the device and the precision.

    `device` is "auto", "cpu" or "cuda". `precision` is "fp32", "bf16", "fp16" or "auto": bf16 on GPUs that compute
    in it (older ones emulate it, slowly), fp16 on older GPUs, fp32 on the CPU. "fp32" means float32 throughout: TF32
    stays off. `alone`: for scripts that do not share their work among ranks.
    """
    rank, world_size = _place()
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    if alone and world_size > 1:
        raise UserError("this script does not share its work among ranks; start it with python, without torchrun")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"more ranks than GPUs: lower --nproc-per-node to {torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False
    if precision == "auto":
        precision = "fp32" if kind == "cpu" else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision == "fp16" and kind == "cpu":
        raise UserError("--precision fp16 is for GPUs; on the CPU use --precision bf16 or fp32")
    host_group = None
    if world_size > 1:  # a rank that fails ends the others at once; time limits are for connections that hang
        hour = datetime.timedelta(hours=1)
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", None, hour, world_size, rank, _meeting_point())
        host_group = dist.new_group(timeout=168 * hour, backend="gloo")
    index = torch.cuda.current_device() if kind == "cuda" else None
    return Runtime(torch.device(kind, index), rank, world_size, precision, local_rank, host_group)


class Learner:
    """The optimiser of one network: Adam (arXiv 1412.6980), loss scaling for float16, micro-batches, the sum over ranks.

    `batch` is global and decides the result. `micro_batch` (at most so many images on a device at once, or None)
    decides only the memory: the gradient is that of the mean over the global batch, however it is divided.
    """

    def __init__(self, net, rt, lr, betas, batch, micro_batch=None):
        if batch < 1 or batch % rt.world_size:
            raise UserError(f"--batch {batch} does not divide among {rt.world_size} ranks; use a multiple of {rt.world_size}")
        share = batch // rt.world_size
        self.rt, self.batch, self.micro_batch = rt, batch, min(micro_batch or share, share)
        if share % self.micro_batch:
            raise UserError(f"--micro-batch {self.micro_batch} does not divide the {share} images of each rank; use a divisor")
        self.parts = [slice(i, i + self.micro_batch) for i in range(0, share, self.micro_batch)]
        self.optimizer = torch.optim.Adam(net.parameters(), lr=lr, betas=betas, fused=True)
        self.scaler = torch.amp.GradScaler(rt.device.type, enabled=rt.precision == "fp16")  # the others need no scaling

    def split(self, *tensors):
        """Iterator over the micro-batches of tensors [images of this rank, ...] or None."""
        for part in self.parts:
            yield [None if t is None else t[part] for t in tensors]

    def step(self, lr, loss, *tensors):
        """One step of Adam down the mean over the global batch of `loss(*tensors)`, which gives a value per image, [N].

        The tensors are [images of this rank, ...] or None; `loss` sees a micro-batch of each.
        """
        self.optimizer.param_groups[0]["lr"] = lr
        for part in self.split(*tensors):
            with self.rt.autocast():
                total = loss(*part).sum()
            self.scaler.scale(total / self.batch).backward()
        if self.rt.world_size > 1:  # all gradients in one message, each in the order of its memory: channels-last or not
            grads = [p.grad for p in self.optimizer.param_groups[0]["params"] if p.grad is not None]
            grads = [g.as_strided((g.numel(),), (1,)) for g in grads]
            flat = torch.cat(grads)
            dist.all_reduce(flat)
            torch._foreach_copy_(grads, flat.split([len(g) for g in grads]))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------------------------------------------
# Randomness. Each draw depends on a key such as (seed, images seen, purpose) and on nothing else, so a run that
# was interrupted continues with the very numbers it would have drawn.


def seed_of(*key):
    """A 63-bit seed from integers and strings, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def rng(device, *key):
    """A random generator on `device` whose numbers depend only on `key`."""
    return torch.Generator(device).manual_seed(seed_of(*key))


# ---------------------------------------------------------------------------------------------------------
# Logs.


class Log:
    """A JSON-lines log. `resume_at` drops what an interrupted run logged after its last checkpoint.

    Every record holds `nimg`, the number of images seen.
    """

    def __init__(self, path, resume_at=0):
        self.path = Path(path)
        if self.path.exists():
            # A line that a killed run left half-written is later than its last checkpoint: only whole lines are read.
            with reading(self.path, "the log of a run", "move it elsewhere"), atomic(self.path) as part:
                whole = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
                part.write_text("".join(line for line in whole if json.loads(line)["nimg"] <= resume_at))

    def write(self, record):
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")

    def values(self, name):
        """{nimg: value} of the records that have a field `name`."""
        records = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        return {record["nimg"]: record[name] for record in records if name in record}

    def flush(self):
        """Wait until all is on the disk."""
        if self.path.exists():
            flush(self.path)


def peak_memory_gb(device):
    """The most memory that this process has held so far: on a GPU its tensors, on the CPU all of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


class Progress:
    """Status text with images/s and the time left. Counts only what this process did."""

    def __init__(self, nimg, total_nimg):
        self.last_nimg = nimg
        self.total_nimg = total_nimg
        self.last_time = time.monotonic()

    def tick(self, nimg):
        """(images per second since the last call, status text)."""
        now = time.monotonic()
        rate = (nimg - self.last_nimg) / max(now - self.last_time, 1e-9)
        self.last_time, self.last_nimg = now, nimg
        left = int((self.total_nimg - nimg) / max(rate, 1e-9))
        left = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        return rate, f"{nimg / 1000:.1f}/{self.total_nimg / 1000:.0f} kimg  {rate:.0f} images/s  {left} left"


# ---------------------------------------------------------------------------------------------------------
# What the two training scripts have in common around their loops.

# Flags that may change between one part of a run and its continuation: they do not decide what a step computes, but for
# kimg where the learning rate falls over the length of the run.
FREE_FLAGS = {
    "preset", "outdir", "kimg", "micro_batch", "device", "compile", "log_kimg", "grid_kimg", "save_kimg",
    "fid_every", "fid_images", "fid_reference", "fid_features", "inception",
}  # fmt: skip


def parse_args(parser, presets):
    """Parse the command line; `--preset NAME` sets the defaults that every other flag overrides.

    `presets` is {name: {flag: default}}; the first is the default one. Adds the flags that all training has.
    """
    add = parser.add_argument
    add("--preset", choices=list(presets), default=next(iter(presets)), help="settings that the other flags override")
    add("--data", metavar="NAME|PATH", help="digits, fashion-mnist, cifar10, or a folder, zip, .npz or IDX folder")
    add("--resolution", type=positive(int), metavar="N", help="cut the middle out of images of other sizes and resize it to NxN")
    add("--outdir", metavar="DIR", help="where everything is written; an unfinished run found there is continued "
        "(default: runs/PRESET/pretrain or runs/PRESET/DIVERGENCE)")  # fmt: skip
    add("--kimg", type=positive(float), metavar="N", help="length of the run, in thousands of images; a larger N continues "
        "a finished run")  # fmt: skip
    add("--batch", type=positive(int), metavar="N", help="images per step, over all ranks")
    add("--micro-batch", type=positive(int), metavar="N", help="images at once on each rank (default: all of its share); "
        "changes the memory only, up to rounding; masks of dropout follow it")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="seed of everything random")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is any")
    add("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto",
        help="auto: on GPUs bf16, or fp16 where that is missing; on the CPU fp32")  # fmt: skip
    add("--compile", action="store_true", help="compile the networks with torch.compile (slow start, faster steps)")
    add("--log-kimg", type=positive(float), metavar="N", help="a log line every N thousand images")
    add("--grid-kimg", type=positive(float), metavar="N", help="a sample grid every N thousand images")
    add("--save-kimg", type=positive(float), metavar="N", help="a checkpoint every N thousand images")
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--preset", nargs="?", default=next(iter(presets)))
    parser.set_defaults(**presets.get(finder.parse_known_args()[0].preset, {}))
    args = parser.parse_args()
    if args.data is None:
        parser.error(f"--preset {args.preset} needs --data: a folder or a zip of images")
    return args


class Parser(argparse.ArgumentParser):
    """The command line of a script: `--help` shows its docstring and every default, a mistake is one line as all others."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message}; --help explains all flags")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each default (of the preset on the command line) and leaves the description as it was written."""

    def _get_help_string(self, action):
        if action.default is None or "default" in action.help:
            return action.help
        return super()._get_help_string(action)


def positive(kind):
    """An argparse type: a number of this kind above zero."""

    def parse(text):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def not_negative(text):
    """An argparse type: a finite number from 0 on."""
    if not 0 <= float(text) < float("inf"):
        raise ValueError
    return float(text)


def fraction(text):
    """An argparse type: a number in [0, 1)."""
    if not 0 <= float(text) < 1:
        raise ValueError
    return float(text)


fraction.__name__ = "number in [0, 1)"  # in argparse's message


class Draw:
    """Random numbers of one training step, as a function of `key` alone.

    All of the global batch's numbers are drawn on every rank and the rank's share is kept, so that the result does
    not depend on how many ranks and micro-batches share the work.
    """

    def __init__(self, rt, batch, *key):
        self.device, self.batch, share = rt.device, batch, batch // rt.world_size
        self.mine = slice(rt.rank * share, (rt.rank + 1) * share)
        self.whole = rt.world_size == 1
        self.rng = rng(rt.device, *key)

    def normal(self, *shape):
        """[images of this rank, *shape] standard normal."""
        return self._share(torch.randn(self.batch, *shape, device=self.device, generator=self.rng))

    def uniform(self):
        """[images of this rank], uniform in [0, 1)."""
        return self._share(torch.rand(self.batch, device=self.device, generator=self.rng))

    def coin(self):
        """[images of this rank] bool, fair."""
        return self.uniform() < 0.5

    def _share(self, numbers):  # a copy: a view would keep the other ranks' numbers in memory
        return numbers if self.whole else numbers[self.mine].clone()


class Run:
    """A training run and its folder: what is trained, how far it is, checkpoint, log and cadence.

    `parts` {name: network, optimiser or scaler} is what a continuation needs, the averaged weights under "ema". If the
    folder holds a checkpoint, they are restored from it: the same command again continues the run. Other settings than
    those it was started with are refused, and so is a second process in the same folder. While the run `goes_on`, a
    signal (Ctrl-C, a cluster's SIGTERM, a closed terminal) makes all ranks stop after the same step, with a checkpoint.
    """

    def __init__(self, args, rt, stage, parts):
        self.dir, self.rt, self.kind, self.stage = Path(args.outdir), rt, f"training state of {stage}", stage
        self.parts = parts
        self.settings = {k: v for k, v in vars(args).items() if k not in FREE_FLAGS} | {"precision": rt.precision}
        self.total_nimg = -(-max(round(args.kimg * 1000), 1) // args.batch) * args.batch  # whole batches
        self.batch, self.nimg = args.batch, 0
        self.sums, self.logged_nimg = {}, 0  # of the log: sums over the images since the last line
        self.signal, self.signal_time = 0, 0.0  # number of the signal that this rank got, or 0
        self.stopping = 0  # number of the signal after which all ranks agreed to stop, or 0
        self.listening = self.resting = False
        path = self.dir / "checkpoint.pt"
        if rt.is_main:
            if locked := lock(self.dir / ".lock", self.dir):
                _at_end.enter_context(locked)
                remove_parts(self.dir)
        if path.exists():
            state = load_checkpoint(path)
            with reading(path, "a checkpoint of such a run", "choose another --outdir"):
                self._check(path, state)
                for name, part in parts.items():
                    part.load_state_dict(state[name])
                    if isinstance(part, torch.optim.Optimizer):  # in the weights' layout: --compile and the device decide it
                        for p, moments in part.state.items():
                            moments |= {k: torch.empty_like(p).copy_(v) for k, v in moments.items() if v.shape == p.shape}
                self.nimg = state["nimg"]
                self.logged_nimg = state.get("logged_nimg", self.nimg)
                if rt.is_main:  # the sums over the ranks
                    self.sums = {name: value.to(rt.device) for name, value in state.get("sums", {}).items()}
        if (nimg := rt.first(lambda: self.nimg)) != self.nimg:
            raise UserError(f"{path} is at {self.nimg / 1000:g} kimg here and at {nimg / 1000:g} where the first rank runs; "
                            "--outdir must be on a disk that all machines share")  # fmt: skip
        if self.nimg:
            rt.print(f"continuing {self.dir} at {self.nimg / 1000:g} kimg")
        if rt.is_main:
            self.log = Log(self.dir / "log.jsonl", self.nimg)
        self.progress = Progress(self.nimg, self.total_nimg)
        self.advice = f"training diverged; the last checkpoint in {self.dir} is untouched. Try a lower --lr, or --precision fp32"

    def _check(self, path, state):
        if state["kind"] != self.kind:
            raise UserError(f"{path} is a {state['kind']}, not a {self.kind}; choose another --outdir")
        before = state["settings"]
        for key in sorted(self.settings.keys() & before.keys()):  # a flag that came later had no effect then
            old, new = before[key], self.settings[key]
            if old != new and old != "auto":  # a precision that older checkpoints do not tell
                flag = "--" + key.replace("_", "-")
                raise UserError(f"{path} was trained with {flag} {old}, not {new}; "
                                f"continue with {old} or choose another --outdir")  # fmt: skip

    def goes_on(self):
        """Whether there is another step to take. From the first call on, signals wait for the end of a step."""
        if not self.listening:
            self.listening = True
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number and signal.getsignal(number) is not signal.SIG_IGN:  # which is what nohup does
                    _at_end.callback(signal.signal, number, signal.signal(number, self._on_signal))
        return self.nimg < self.total_nimg and not self.stopping

    def _on_signal(self, number, frame):
        if self.resting:
            self._stop(number)
        now = time.monotonic()
        if not self.signal:
            self.signal, self.signal_time = number, now
            with contextlib.suppress(OSError):  # a closed terminal; not by print, in which the signal may have come
                if self.rt.is_main:
                    os.write(2, b"\nstopping after this step; a second signal ends the run at once\n")
        elif now > self.signal_time + 2:  # the same one can come twice, from the cluster and from torchrun
            os._exit(128 + number)

    def _stop(self, number):
        raise Stopped(f"{self.stage} stopped at {self.nimg / 1000:g} kimg; the same command continues it", number)

    @contextlib.contextmanager
    def at_rest(self):
        """Around long work that changes nothing, after `save`: there a signal ends the script at once."""
        self.resting = True
        if self.signal:
            self._stop(self.signal)
        yield
        self.resting = False

    def advance(self):
        """Count the step that was just taken. If any rank got a signal, all of them are `stopping` from here on."""
        self.nimg += self.batch
        self.stopping = self.rt.agree(self.signal)

    def due(self, kimg):
        """Whether the step that has just reached `nimg` images crossed a multiple of `kimg`, or was the last."""
        every = kimg * 1000
        return self.nimg // every > (self.nimg - self.batch) // every or self.nimg >= self.total_nimg

    def since(self, kimg):
        """Number of images since something was due every `kimg`, before this step."""
        every = kimg * 1000
        return int(self.nimg - (self.nimg - self.batch) // every * every)

    def lacks(self, name, kimg):
        """Whether `name` is due for the log here and not yet in it: a stop can have come between a step and its measurement."""
        return self.nimg > 0 and self.due(kimg) and self.rt.first(lambda: self.nimg not in self.log.values(name))

    def add(self, **values):
        """Add tensors to the sums that the next log line is made of. Stays on the device: nothing waits for it."""
        for name, value in values.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def summed(self):
        """{name: float64 tensor on the CPU} summed over the ranks."""
        return {name: self.rt.sum(value.clone()).cpu() for name, value in sorted(self.sums.items())}

    def take(self):
        """`summed()` and the number of images since the last call; the sums start again from nothing."""
        sums, images = self.summed(), self.nimg - self.logged_nimg
        self.sums, self.logged_nimg = {}, self.nimg
        return sums, images

    def report(self, record, text):
        """Write a log line and a status line. A value that is not finite ends the run, before anything is saved."""
        rate, status = self.progress.tick(self.nimg)
        bad = [key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
        if bad:
            raise UserError(f"{bad[0]} is {record[bad[0]]} at {self.nimg / 1000:g} kimg: {self.advice}")
        memory = peak_memory_gb(self.rt.device)
        self.note({**record, "images_per_second": rate, "peak_memory_gb": memory}, f"{status}  {memory:.1f} GB  {text}")

    def note(self, record, text):
        """Write a log line and show `text`."""
        if self.rt.is_main:
            self.log.write({"nimg": self.nimg, **record})
        self.rt.print(text)

    def save(self, write_networks):
        """Write the network files by `write_networks()`, then the checkpoint from which the run continues.

        In this order, and both by the first rank: a run that is killed in between takes the steps again, and writes both.
        """
        state = {name: part.state_dict() for name, part in self.parts.items()}
        if not all(bool(v.isfinite().all()) for v in state["ema"].values()):
            raise UserError(f"the weights are not finite at {self.nimg / 1000:g} kimg: {self.advice}")
        sums = self.summed()
        if self.rt.is_main:
            write_networks()
            self.log.flush()
            about = {"kind": self.kind, "settings": self.settings, "nimg": self.nimg, "logged_nimg": self.logged_nimg}
            save_checkpoint({**about, "sums": sums, **state}, self.dir / "checkpoint.pt")

    def finish(self):
        """Say how the run ended; after a signal, end the script."""
        self.rt.agree(0)  # torchrun ends all ranks when one is gone: the first has its files written by now
        if self.nimg < self.total_nimg:
            self._stop(self.stopping)
        self.rt.print(f"{self.stage} is done: {self.dir / 'network.pt'}")
