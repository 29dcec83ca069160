"""How fast is this machine? Times a preset's networks on random images and prints a table.

    python exercises/benchmark.py --preset cifar10 --batch 128

Measures a step of stage 1, an iteration of stage 2 (one ratio step, one generator step), one-step sampling and Inception
features; on GPUs (or with --compile) also with compiled networks. For comparison it times an iteration of variational
score distillation with the same networks, which shows the cost of a teacher. It calls the functions that train; the weights
are random, on which the speed does not depend. FLOP are those of matrix products and convolutions, as torch counts them.
"""

import copy
import dataclasses
import datetime
import functools
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "exercises")]
import fid  # noqa: E402
import networks  # noqa: E402
import pretrain  # noqa: E402
import sample  # noqa: E402
import teacher  # noqa: E402
import train_diffratio  # noqa: E402
from machinery import training  # noqa: E402


class Batch:
    """Random stand-ins for a batch of `rt.batch` images and all that is drawn in an iteration."""

    def __init__(self, config, rt):
        n, shape = rt.batch, (rt.batch, config.img_channels, config.img_resolution, config.img_resolution)
        self.x, self.z, self.eps, self.eps_fake, self.eps_generator = (torch.randn(shape, device=rt.device) for _ in range(5))
        self.sigma, self.sigma_generator = (torch.randn(n, device=rt.device).exp() for _ in range(2))
        self.labels = torch.zeros(n, dtype=torch.int64, device=rt.device) if config.label_dim else None


def stage_1(config, rt, compiled=False):
    """Function that takes one step of stage 1 with `rt.batch` images."""
    net = networks.place(networks.Denoiser(config).train(), rt.device, compiled)
    ema, draw = copy.deepcopy(net), Batch(config, rt)
    optimizer = training.Optimizer(net, rt, (0.9, 0.999))

    def step():
        optimizer.step(1e-4, lambda *part: [pretrain.denoising_loss(net, *part)], draw.x, draw.sigma, draw.eps, draw.labels)
        networks.update_ema(ema, net, rt.batch, 500_000, rt.batch)

    return step


def stage_2(config, rt, compiled=False):
    """Function that takes one iteration of stage 2: a ratio step and a generator step."""
    config = dataclasses.replace(config, dropout=0.0)
    generator = networks.place(networks.Denoiser(config).train(), rt.device, compiled)
    ratio = networks.place(networks.RatioNetwork(config).train(), rt.device, compiled)
    ema, draw = copy.deepcopy(generator), Batch(config, rt)
    generator_optimizer, ratio_optimizer = (training.Optimizer(net, rt, (0.0, 0.999)) for net in (generator, ratio))
    ratio_objective = functools.partial(train_diffratio.ratio_loss, ratio)

    def generator_objective(fake, sigma, eps, labels):
        return [train_diffratio.generator_loss(ratio, fake, sigma, eps, "dijs", labels)]

    def step():
        ratio.requires_grad_(True)
        fake = rt.in_parts(functools.partial(sample.one_step, generator), draw.z, draw.labels)
        ratio_optimizer.step(1e-5, ratio_objective, draw.x, fake.detach(), draw.sigma, draw.eps, draw.eps_fake, draw.labels)
        ratio.requires_grad_(False)
        generator_optimizer.step(1e-5, generator_objective, fake, draw.sigma_generator, draw.eps_generator, draw.labels)
        networks.update_ema(ema, generator, rt.batch, 500_000, rt.batch)

    return step


def distillation(config, rt, compiled=False, method="vsd"):
    """Function that takes an iteration with a teacher, by `method` of exercises/teacher.py."""
    config = dataclasses.replace(config, dropout=0.0)
    nets = [networks.place(networks.Denoiser(config).train(), rt.device, compiled) for _ in range(3)]
    nets[2].requires_grad_(False)  # generator, student, teacher
    ema, draw = copy.deepcopy(nets[0]), Batch(config, rt)
    optimizers = [training.Optimizer(net, rt, (0.0, 0.999)) for net in nets[:2]]
    noises = (draw.sigma, draw.eps), (draw.sigma_generator, draw.eps_generator)

    def step():
        teacher.iteration(method, nets, optimizers, (1e-5, 1e-5), draw.z, draw.labels, 2.5, *noises)
        networks.update_ema(ema, nets[0], rt.batch, 500_000, rt.batch)

    return step


def sampling(config, rt, compiled=False):
    """Function that draws a batch in one step. (Heun's method with 18 steps takes 35 times as long.)"""
    net, draw = networks.place(networks.Denoiser(config).eval(), rt.device, compiled), Batch(config, rt)
    return lambda: rt.in_parts(functools.partial(sample.one_step, net), draw.z, draw.labels, graph=False)


def inception_shapes():
    """{name: shape} of the 472 tensors of the Inception weights."""
    shapes = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for line in Path(__file__).with_name("inception_shapes.txt").read_text().splitlines():
        name, *shape = line.split()
        shapes[f"{name}.conv.weight"] = tuple(map(int, shape))
        for key in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{key}"] = (int(shape[0]),)
    return shapes


def features(config, rt, compiled=False):
    """Function that takes the Inception features of a batch, in float32, with weights of one."""
    net = fid.Inception({k: torch.ones(shape) for k, shape in inception_shapes().items()}, rt.device)
    net = torch.compile(net, dynamic=False) if compiled else net
    pixels = config.img_resolution * (8 if config.architecture == "edm2" else 1)  # the images behind latents
    images = torch.zeros(rt.batch, pixels, pixels, 3, dtype=torch.uint8, device=rt.device)
    return lambda: net((fid.resize_tf1(images).permute(0, 3, 1, 2) - 128) / 128)


MEASURED = {  # name of the row: the function that prepares it
    "stage 1, step": stage_1,
    "stage 2, iteration": stage_2,
    "VSD, iteration": distillation,
    "sampling, one step": sampling,
    "Inception features, fp32": features,
}


def peak_memory_gb(device):
    """The most memory that was held: on a GPU by tensors, on the CPU by the process; NaN on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def measure(function, device, repeats):
    """(median seconds, peak memory in GB) of one call of `function`, after one that does not count."""
    function()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak of this process
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), peak_memory_gb(device)


def hardware(device):
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    try:
        name = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def main():
    args = training.Parser(__doc__, dict(
        preset=("cifar10", "whose networks to measure", list(train_diffratio.PRESETS)),
        batch=(None, "images at once (default: 64 on GPUs, 8 on the CPU)", int),
        device=training.DEVICE,
        precision=training.PRECISION,
        compile=(False, "measure compiled networks too (always done on GPUs)"),
        repeats=(5, "timed calls of each; their median is shown"))).parse_args()
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    rt = training.start(args.device, args.precision, alone=True, batch=args.batch or (64 if on_gpu else 8))
    config = networks.NETWORKS[pretrain.PRESETS[args.preset]["network"]]

    print(f"{hardware(rt.device)}; PyTorch {torch.__version__}; {rt.precision}; {datetime.date.today()}\n")
    print(f"| {args.preset}, {rt.batch} images | images/s | seconds | TFLOP/s | peak memory, GB |\n|---|---|---|---|---|")
    flop, seen = {}, {}
    for suffix in ("", ", compiled") if on_gpu or args.compile else ("",):
        for name, prepare in MEASURED.items():
            torch.manual_seed(0)
            function = prepare(config, rt, bool(suffix))
            if not suffix:
                with FlopCounterMode(display=False) as counter:
                    function()
                flop[name] = counter.get_total_flops()
            seconds, memory = seen[name] = measure(function, rt.device, args.repeats)
            del function
            speed = f"{rt.batch / seconds:.4g} | {seconds:.3g} | {flop[name] / seconds / 1e12:.3g} | {memory:.1f}"
            print(f"| {name}{suffix} | {speed} |", flush=True)
        time_ratio, memory_ratio = (a / b for a, b in zip(seen["stage 2, iteration"], seen["VSD, iteration"]))
        print(f"| stage 2 : VSD{suffix} | | {time_ratio:.2f} | | {memory_ratio:.2f} |", flush=True)


if __name__ == "__main__":
    training.run(main)
