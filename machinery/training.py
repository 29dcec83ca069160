"""Ranks, random numbers, optimizer steps, the command line, runs, the log of stage 2."""

import argparse
import contextlib
import datetime
import hashlib
import io
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
import torch.nn.functional as F

import networks
from machinery import SIGNALS, files
from machinery.files import UserError

# ---- The end of a process

_at_end = contextlib.ExitStack()  # closed when a script ends: the lock of its folder, its handlers
_signals = argparse.Namespace(in_step=False, number=0, time=0.0)  # first signal of the step


class Stopped(BaseException):
    """A signal ends the script where nothing is lost: Stopped(line to print, exit code)."""


def run(main):
    """Call `main()`. Bad input: one line, exit code 2. After signal n the exit code is 128 + n."""
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be UTF-8
            sys.stdout.reconfigure(errors="backslashreplace")
        for number in SIGNALS:
            _at_end.callback(signal.signal, number, signal.signal(number, _on_signal))
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except (UserError, networks.ConfigError) as error:
        _end(f"error: {error}")
    except torch.OutOfMemoryError:
        _end("error: out of GPU memory; lower --micro-batch (training, same result) or --batch")
    except OSError as error:  # a full disk, no permission: the system's own words are clear
        _end(": ".join(filter(None, ["error", error.strerror or str(error), error.filename])))
    except Stopped as stop:
        _end(*stop.args)
    except Exception as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            cause = getattr(error, "inner_exception", error)  # no C++ compiler, for example
            _end(f"error: {UserError(f'torch.compile fails ({cause}); leave out --compile')}")
        if _place()[1] == 1:
            raise
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            _end(f"error: another rank has gone ({str(error).split('. ')[0]})", 1, wait=2)
        _end(traceback.format_exc(), 1)
    finally:
        _at_end.close()
        _signals.in_step, _signals.number = False, 0
        try:
            sys.stdout and sys.stdout.flush()
        except OSError:  # nobody reads it: Python's own attempt at its end would fail as well
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _on_signal(number, frame):
    if not _signals.in_step:
        raise Stopped("stopped; a training run continues from its last checkpoint", 128 + number)
    if not _signals.number:
        _signals.number, _signals.time = number, time.monotonic()
        with contextlib.suppress(OSError):  # a closed terminal; print may be what was interrupted
            if _place()[0] == 0:
                os.write(2, b"\nstopping after this step; a second signal ends it at once\n")
    elif time.monotonic() > _signals.time + 2:  # the cluster and torchrun may send the same one
        os._exit(128 + number)


def _place():
    """(rank, number of ranks) of this process, from torchrun's environment."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _end(message, code=2, wait=0):
    """Print `message` and end this process. Only one rank prints; no rank waits for another.

    The first one does, after `wait` seconds: another may have a better message. torchrun ends the
    others before their turn, a second later.
    """
    rank, world_size = _place()
    if world_size > 1:
        if code > 128 and rank:  # all ranks agreed to stop
            os._exit(code)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(wait + (rank > 0))
    name = Path(sys.argv[0]).name + (f", rank {rank}" if rank else "")
    with contextlib.suppress(OSError):  # a closed terminal
        print(f"{name}: {message.rstrip()}", file=sys.stderr, flush=True)
    if world_size == 1:
        sys.exit(code)
    os._exit(code)  # the shutdown of NCCL and of Python can wait for ranks that are gone


# ---- Device, ranks, precision, randomness

def seed_of(*key, bits=63):
    """A seed from integers and strings, the same everywhere; PyTorch's CPU uses 32 bits of it."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest(), "big") >> (256 - bits)


def rng(device, *key):
    """A random generator on `device` whose numbers depend only on `key`."""
    return torch.Generator(device).manual_seed(seed_of(*key))


class Runtime:
    """Where this process computes: device, place among the ranks, precision, share of a batch.

    batch: images of a training step, of all ranks; micro_batch: images on the device at once, by
    default the `share` of this rank. alone: for scripts with one rank only.
    """

    def __init__(self, device="auto", precision="fp32", batch=None, micro_batch=None, alone=False):
        self.rank, self.world_size = _place()
        self.is_main = self.rank == 0
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))  # of this machine
        if alone and self.world_size > 1:
            raise UserError("this script runs on one rank; start it with python, without torchrun")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":
            if self.local_rank >= (count := torch.cuda.device_count()):
                raise UserError(f"this PyTorch sees {count} CUDA devices; lower --nproc-per-node "
                                "or use --device cpu")
            torch.cuda.set_device(self.local_rank)
            torch.backends.cudnn.benchmark = True
            torch.backends.cudnn.allow_tf32 = False
        if precision == "auto":
            bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            precision = "fp32" if device == "cpu" else "bf16" if bf16 else "fp16"
        if precision == "fp16" and device == "cpu":
            raise UserError("--precision fp16 is for GPUs; on the CPU use --precision bf16 or fp32")
        self.device = torch.device(device, self.local_rank if device == "cuda" else None)
        self.precision, self.batch = precision, batch or self.world_size
        self.share, rest = divmod(self.batch, self.world_size)
        if rest:
            raise UserError(f"--batch must be a multiple of the number of ranks, {self.world_size}")
        self.micro_batch = min(micro_batch or self.share, self.share)
        if self.share % self.micro_batch:
            raise UserError(f"--micro-batch must divide the {self.share} images of each rank")
        if self.world_size > 1 and not dist.is_initialized():
            # The limit is for connections that hang. Converting a data set must take less.
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=24))

    def autocast(self):
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def print(self, text):
        """Print from the first rank only. A closed terminal does not end a run."""
        if self.is_main:
            with contextlib.suppress(OSError):
                print(text, flush=True)

    def seed(self, *key):
        """Make what `randn`, `rand` and dropout draw next depend on `key` alone (and the rank)."""
        self.generator = rng(self.device, *key)
        torch.manual_seed(seed_of(*key, self.rank))

    def randn(self, *shape):
        """Standard normal [images of this rank, *shape]: a share of the numbers of all ranks."""
        return self._share(torch.randn, *shape)

    def rand(self):
        """Uniform in [0, 1), [images of this rank]."""
        return self._share(torch.rand)

    def _share(self, draw, *shape):  # each rank draws the whole batch: more ranks change nothing
        numbers = draw(self.batch, *shape, device=self.device, generator=self.generator)
        if self.world_size == 1:
            return numbers
        return numbers.chunk(self.world_size)[self.rank].clone()  # a view would keep them all

    def parts(self, *tensors):
        """Iterate over the micro-batches of tensors [images of this rank, ...] or None."""
        for i in range(0, self.share, self.micro_batch):
            yield [None if t is None else t[i : i + self.micro_batch] for t in tensors]

    def in_parts(self, function, *tensors, graph=True):
        """function(*tensors) by micro-batches; its graph is kept only if there is just one."""
        with self.autocast(), torch.set_grad_enabled(graph and self.micro_batch == self.share):
            return torch.cat([function(*part) for part in self.parts(*tensors)])

    def sum(self, tensor, operation=dist.ReduceOp.SUM):
        """Sum of `tensor` over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, operation)
        return tensor

    def agree(self, value):
        """The largest of all ranks' `value`, an int. On the CPU: no GPU is waited for."""
        return self.sum(torch.tensor(int(value)), dist.ReduceOp.MAX).item()

    def main_first(self, make):
        """`make()` on every rank, one of each machine first: it fills the caches for the others."""
        ahead = self.local_rank == 0
        value = make() if ahead else None
        self.agree(0)
        return value if ahead else make()


class Optimizer:
    """Adam (arXiv 1412.6980) for one network, with micro-batches, ranks and fp16 loss scaling."""

    def __init__(self, net, rt, betas):
        self.net, self.rt = net, rt
        networks.normalize_weights(net)
        self.adam = torch.optim.Adam(net.parameters(), betas=betas, fused=True)
        self.scaler = torch.amp.GradScaler(rt.device.type, enabled=rt.precision == "fp16")

    def step(self, lr, objective, *tensors):
        """One Adam step on a loss, averaged over the global batch.

        tensors: [images of this rank, ...] or None. objective(*tensors) sees a micro-batch of each
        and returns (loss [n], *outputs [n, ...]). Returns the same, joined and detached.
        """
        self.adam.param_groups[0]["lr"] = lr
        results = []
        for part in self.rt.parts(*tensors):
            with self.rt.autocast():
                loss, *outputs = objective(*part)
                total = loss.sum()
            self.scaler.scale(total / self.rt.batch).backward()
            results.append([value.detach() for value in (loss, *outputs)])
        if self.rt.world_size > 1:  # all gradients as one flat tensor, in their memory's order
            grads = [p.grad for p in self.net.parameters() if p.grad is not None]
            grads = [g.as_strided((g.numel(),), (1,)) for g in grads]
            flat = self.rt.sum(torch.cat(grads))
            torch._foreach_copy_(grads, flat.split([len(g) for g in grads]))
        self.scaler.step(self.adam)
        self.scaler.update()
        self.adam.zero_grad(set_to_none=True)
        networks.normalize_weights(self.net)
        return [torch.cat(values) for values in zip(*results)]

    def state_dict(self):
        return {"adam": self.adam.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state):
        self.adam.load_state_dict(state["adam"])
        self.scaler.load_state_dict(state["scaler"])
        for p, moments in self.adam.state.items():  # in the memory layout of the weights
            for key in ("exp_avg", "exp_avg_sq"):
                moments[key] = torch.empty_like(p).copy_(moments[key])


# ---- Command line

class Parser(argparse.ArgumentParser):
    """settings: {flag: (default, help[, type or choices])}; int and float are numbers above 0."""

    def __init__(self, doc, settings):
        plain = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=plain, allow_abbrev=False)
        for flag, (default, text, *kind) in settings.items():
            kind = kind[0] if kind else type(default)
            if kind is bool:
                how = {"action": argparse.BooleanOptionalAction}
            elif isinstance(kind, list):
                how = {"choices": kind}
            else:
                how = {"type": POSITIVE.get(kind, kind), "metavar": "X"}
            how["help"] = text if "default" in text else text + " (default: %(default)s)"
            self.add_argument(f"--{flag.replace('_', '-')}", default=default, **how)

    def error(self, message):
        raise UserError(f"{message}; --help explains all flags")


def number(name, kind, low, high=math.inf):
    """An argparse type: a number in [low, high). `name` is for the error message."""

    def parse(text):
        if low <= (value := kind(text)) < high:
            return value
        raise ValueError

    parse.__name__ = name
    return parse


POSITIVE = {int: number("positive int below 2^31", int, 1, 2**31),
            float: number("positive float below 1e38", float, 5e-324, 1e38)}
finite = number("finite number", float, -sys.float_info.max)
not_negative = number("non-negative number", float, 0)
fraction = number("number in [0, 1)", float, 0, 1)
share = number("number above 0, at most 1", float, 5e-324, math.nextafter(1, 2))
integer = number("64-bit integer", int, -(2**63), 2**63)
DEVICE = ("auto", "auto: CUDA where there is any", ["auto", "cpu", "cuda"])
PRECISION = ("auto", "auto: on GPUs bf16, or fp16 where that is missing; on CPUs fp32",
             ["auto", "bf16", "fp16", "fp32"])
SHARED_SETTINGS = dict(
    data=(None, "digits, fashion-mnist, cifar10, or a folder, zip, .npz or IDX folder", str),
    resolution=(None, "crop the centre of images and resize it to N x N", int),
    outdir=(None, "folder of the run, which continues there if it is unfinished "
            "(default: runs/PRESET/pretrain or runs/PRESET/DIVERGENCE)", str),
    kimg=(None, "length in thousands of images; a larger one continues a finished run, and a "
          "learning rate that had fallen rises again", float),
    batch=(None, "images per step, over all ranks", int),
    micro_batch=(None, "images at once on each rank (default: all of its share); changes the "
                 "memory only, up to rounding and dropout", int),
    seed=(0, "seed of everything random", integer),
    device=DEVICE,
    precision=PRECISION,
    compile=(False, "compile the networks with torch.compile (slow start, faster steps)"),
    log_kimg=(50.0, "interval of log lines, thousands of images"),
    grid_kimg=(1000.0, "interval of sample grids, thousands of images"),
    save_kimg=(1000.0, "interval of checkpoints, thousands of images"),
)


def arguments(doc, settings, presets, outdir=""):
    """Parse the command line of a training script; every other flag overrides the preset's.

    presets: {name: {flag: default}}, the default one first. outdir: with names of flags in {}.
    """
    parser, first = Parser(doc, settings | SHARED_SETTINGS), next(iter(presets))
    parser.add_argument("--preset", choices=list(presets), default=first, help="sets the defaults")
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--preset", nargs="?", default=first)
    parser.set_defaults(**presets.get(finder.parse_known_args()[0].preset, {}))
    args = parser.parse_args()
    if args.data is None:
        parser.error(f"--preset {args.preset} needs --data: a folder or a zip of images")
    args.outdir = args.outdir or outdir.format(**vars(args))
    return args


# ---- A training run

FREE_FLAGS = {  # may change on resumption. Only kimg, and device by its random numbers, matter.
    "preset", "outdir", "kimg", "micro_batch", "device", "compile", "log_kimg", "grid_kimg",
    "save_kimg", "fid_every", "fid_images", "fid_reference", "fid_features", "inception", "vae",
}
FORMAT = 7  # of checkpoint.pt


class Run:
    """A training run and its folder: checkpoint, log, what is due.

    `parts` {name: network or optimizer} is what a checkpoint holds, the averaged weights as "ema".
    A checkpoint in the folder is resumed; with other settings that is refused, and so is a second
    process. After a signal all ranks stop at the same step, at `save`.
    """

    def __init__(self, args, rt, stage, dataset, **parts):
        self.dir, self.rt, self.stage, self.parts = Path(args.outdir), rt, stage, parts
        folder = Path(os.path.expanduser(args.data))
        if folder.is_dir() and folder.resolve() in self.dir.resolve().parents:
            raise UserError(f"--outdir {self.dir} is in --data {args.data}, where its sample grids "
                            "would become data; choose another")
        self.kind = f"training state of {stage}, version {FORMAT}"
        self.settings = {k: v for k, v in vars(args).items() if k not in {*FREE_FLAGS, "data"}}
        described = dataset.describe(parts["ema"].config.label_dim > 0)
        self.settings |= {"precision": rt.precision, "data": described}  # data last
        images = max(round(args.kimg * 1000), 1)
        self.total_nimg = -(-images // rt.batch) * rt.batch  # whole batches
        self.nimg = self.logged_nimg = 0
        self.sums = {}  # for the log: of all ranks, since its last line
        self.step = {}  # the same of this rank, in the present step
        self.stopping = False  # whether a rank got a signal
        self.path, self.log_path = self.dir / "checkpoint.pt", self.dir / "log.jsonl"
        if rt.is_main:
            _at_end.enter_context(files.lock(self.dir))
        if self.path.exists():
            state = files.load_checkpoint(self.path, mmap=True)  # the ranks share its memory
            with files.reading(self.path, "a checkpoint of such a run", "choose another --outdir"):
                self._restore(state)
        if (most := rt.agree(self.nimg)) != -rt.agree(-self.nimg):
            raise UserError(f"{self.path} is at {most / 1000:g} kimg on one machine and not on "
                            "another; --outdir must be on a disk that all machines share")
        if self.nimg:
            rt.print(f"continuing {self.dir} at {self.nimg / 1000:g} kimg")
        self.log = self._open_log() if rt.is_main else []
        self.last = time.monotonic(), self.nimg
        labels = "labels not used" if dataset.label_dim else "no labels"
        if parts["ema"].config.label_dim:
            labels = " ".join([f"{dataset.label_dim} classes", *(dataset.classes or [])[:10]])
        sizes = " + ".join(f"{networks.parameter_count(part.net) / 1e6:.2f}"
                           for part in parts.values() if isinstance(part, Optimizer))
        rt.print(f"{stage}: {sizes} M parameters, {dataset.name} ({len(dataset)} images, "
                 f"{labels}), {rt.world_size} x {rt.device.type}, {rt.precision}, "
                 f"batch {rt.batch} in parts of {rt.micro_batch}")
        if self.nimg >= self.total_nimg:
            rt.print(f"{stage} is done already; a larger --kimg continues it")

    def _restore(self, state):
        if state["kind"] != self.kind:
            raise UserError(f"holds a {state['kind']}, but this program reads only a {self.kind}; "
                            "choose another --outdir")
        for key, new in self.settings.items():
            if (old := state["settings"].get(key)) != new:
                raise UserError(f"{self.path} was trained with --{key.replace('_', '-')} {old}, "
                                f"not {new}; continue with {old} or choose another --outdir")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.nimg, self.logged_nimg = state["nimg"], state["logged_nimg"]
        self.sums = {name: value.to(self.rt.device) for name, value in state["sums"].items()}

    def _open_log(self):
        """The log's records up to the checkpoint. Later and half-written ones are dropped."""
        if not self.log_path.exists():
            return []
        with files.reading(self.log_path, "the log of a run", "move it elsewhere"):
            lines = self.log_path.read_text().splitlines(keepends=True)
            records = [json.loads(line) for line in lines if line.endswith("\n")]
            records = [record for record in records if record["nimg"] <= self.nimg]
        with files.atomic(self.log_path) as part:
            part.write_text("".join(json.dumps(record) + "\n" for record in records))
        return records

    def unfinished(self):
        """Whether there is another step to take. During a step signals wait for its end."""
        _signals.in_step = self.nimg < self.total_nimg
        return _signals.in_step

    def advance(self):
        """Count the step, add its sums over the ranks. After a signal to one all are `stopping`."""
        for name, value in self.step.items():
            self.sums[name] = self.rt.sum(value) + self.sums.get(name, 0)
        self.step = {}
        self.nimg += self.rt.batch
        self.stopping = bool(self.rt.agree(_signals.number))

    def due(self, kimg):
        """Whether the last step crossed a multiple of `kimg` thousand images, or ended the run."""
        if not kimg or not self.nimg:
            return False
        interval = max(round(kimg * 1000), 1)
        return self.nimg % interval < self.rt.batch or self.nimg >= self.total_nimg

    def add(self, **values):
        """Add tensors to the sums of the next log line. They stay on the device: nothing waits."""
        for name, value in values.items():
            self.step[name] = value.detach().double() + self.step.get(name, 0)

    def add_gradient(self, sigma, fake):
        """In the backward pass add the size of each sample's gradient to its noise level's sum."""
        def add(grad):
            size = grad.flatten(1).norm(dim=1).nan_to_num(0, 0, 0)  # fp16 skips infinite steps
            self.add(gradient=by_band(sigma, size[None]))

        fake.register_hook(add)

    def pop_means(self):
        """{name: sum over the ranks, per image} of what was added since the last call."""
        images = self.nimg - self.logged_nimg
        means = {name: value / images for name, value in self.sums.items()}
        self.sums, self.logged_nimg = {}, self.nimg
        return means

    def report(self, record, text):
        """Write a log line with the speed, and print `text`. NaN or infinity ends the run."""
        self._check({k: torch.tensor(v) for k, v in record.items() if isinstance(v, float)})
        (before, nimg), self.last = self.last, (time.monotonic(), self.nimg)
        rate = (self.nimg - nimg) / max(self.last[0] - before, 1e-9)
        left = int(min((self.total_nimg - self.nimg) / max(rate, 1e-9), 1e12))
        self.write({**record, "images_per_second": rate},
                   f"{self.nimg / 1000:.1f}/{self.total_nimg / 1000:.0f} kimg  "
                   f"{rate:.0f} images/s  {datetime.timedelta(seconds=left)} left  {text}")

    def _check(self, tensors):
        for name, value in tensors.items():
            if not value.isfinite().all():
                raise UserError(f"{name} is not finite at {self.nimg / 1000:g} kimg: training "
                                "diverged and was not saved; try a lower --lr or --precision fp32")

    def write(self, record, text):
        if self.rt.is_main:
            self.log.append({"nimg": self.nimg, **record})
            with open(self.log_path, "a") as file:
                file.write(json.dumps(self.log[-1]) + "\n")
        self.rt.print(text)

    def save(self, write_networks):
        """On the first rank write the network files by `write_networks()`, then the checkpoint.

        A run that is killed between the two repeats its steps and writes both. Afterwards, until
        the next step, a signal ends the script.
        """
        state = {name: part.state_dict() for name, part in self.parts.items()}
        self._check(state["ema"])
        if self.rt.is_main:
            write_networks()
            if self.log_path.exists():
                files.flush(self.log_path)
            about = dict(kind=self.kind, nimg=self.nimg, logged_nimg=self.logged_nimg,
                         settings=self.settings, sums=self.sums)
            files.save_checkpoint({**about, **state}, self.path)
        _signals.in_step = False
        if number := self.rt.agree(_signals.number):
            raise Stopped(f"{self.stage} stopped at {self.nimg / 1000:g} kimg; the same command "
                          "continues it", 128 + number)
        if self.nimg >= self.total_nimg:
            self.rt.print(f"{self.stage} is done: {self.dir / 'network.pt'}")


# ---- The log of stage 2

BANDS = (0.1, 0.3, 1.0, 3.0)  # edges of the noise-level bands in the log


def band_sums(sigma, h_real, h_fake):
    """Sums over logits [N] at noise levels sigma [N], per noise-level band: [5, bands] float64.

    Rows: number of logits, how many are right, binary cross-entropy, logit, logit squared.
    """
    h, margin = torch.stack([h_real, h_fake]).double(), torch.stack([h_real, -h_fake]).double()
    right = (margin > 0) + 0.5 * (margin == 0)
    values = torch.stack([torch.ones_like(h), right, F.softplus(-margin), h, h * h]).sum(dim=1)
    return by_band(sigma, values)


def by_band(sigma, values):
    """Sums of values [k, N] at noise levels sigma [N] over the images of each band, [k, bands]."""
    band = sum(sigma > edge for edge in BANDS)
    sums = torch.zeros(len(values), len(BANDS) + 1, dtype=torch.float64, device=values.device)
    return sums.index_add_(1, band, values.double())


def stage2_line(means):
    """(record, text) for the log from `Run.pop_means`.

    generator_loss: as it is minimised; it says that the run is alive, not how good samples are.
    ratio_loss: ln 2 = 0.693 where data and samples cannot be told apart; ratio_accuracy: 0.5 there.
    bands: the same by noise level, mean and deviation of the logit h, and the band's share of the
    generator's gradient on the samples (summed norms). How to read them: docs/own-data.md.
    """
    names = [f"<{BANDS[0]}", *(f"{a}-{b}" for a, b in zip(BANDS, BANDS[1:])), f">{BANDS[-1]}"]
    bands = {}
    shares = (means["gradient"][0] / means["gradient"].sum()).nan_to_num(0).tolist()
    for name, share, (n, *values) in zip(names, shares, means["bands"].T.tolist()):
        if n:
            right, loss, h, h2 = (value / n for value in values)
            std = max(h2 - h * h, 0) ** 0.5
            bands[name] = dict(accuracy=right, loss=loss, logit_mean=h, logit_std=std,
                               gradient_share=share)
    n, right, loss, *_ = means["bands"].sum(dim=1).tolist()
    record = dict(generator_loss=means["generator_loss"].item(), ratio_loss=loss / n,
                  ratio_accuracy=right / n, bands=bands)
    return record, "generator {generator_loss:+.4f}  ratio {ratio_loss:.4f}".format(**record)
