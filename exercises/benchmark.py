"""How fast is this machine? Times a preset's networks on random images and prints a table for the README.

    python exercises/benchmark.py --preset cifar10 --batch 128

Measures a step of stage 1, an iteration of stage 2 (one ratio step, one generator step), one-step sampling and Inception
features; on GPUs (or with --compile) also with compiled networks. For comparison it times an iteration of variational
score distillation with the same networks: what a teacher costs. The functions are those that train; the weights are
random, for the speed does not depend on them. FLOP are those of matrix products and convolutions, as torch counts them.
"""

import argparse
import copy
import dataclasses
import datetime
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
from machinery import training  # noqa: E402
import sample  # noqa: E402
import teacher  # noqa: E402
import train_diffratio  # noqa: E402


class Batch:
    """Random stand-ins for a batch of data and all that is drawn in an iteration."""

    def __init__(self, config, n, device):
        shape = (n, config.img_channels, config.img_resolution, config.img_resolution)
        self.x, self.z, self.eps, self.eps_fake, self.eps_generator = (torch.randn(shape, device=device) for _ in range(5))
        self.sigma, self.sigma_generator = (torch.randn(n, device=device).exp() for _ in range(2))
        self.labels = torch.zeros(n, dtype=torch.int64, device=device) if config.label_dim else None


def stage_1(config, batch, rt, compiled=False):
    """Function that takes one step of stage 1; `batch` is the number of images."""
    net = networks.place(networks.Denoiser(config).train(), rt.device, compiled)
    ema, draw = copy.deepcopy(net), Batch(config, batch, rt.device)
    learner = training.Learner(net, rt, 1e-4, (0.9, 0.999), batch)

    def step():
        learner.step(1e-4, lambda *part: pretrain.denoising_loss(net, *part), draw.x, draw.sigma, draw.eps, draw.labels)
        networks.normalize_weights(net)
        networks.update_ema(ema, net, batch, 500_000, batch)

    return step


def stage_2(config, batch, rt, compiled=False):
    """Function that takes one iteration of stage 2 with the batch in one piece: a ratio step and a generator step."""
    config = dataclasses.replace(config, dropout=0.0)
    generator = networks.place(networks.Denoiser(config).train(), rt.device, compiled)
    ratio = networks.place(networks.RatioNetwork(config).train(), rt.device, compiled)
    ema, draw = copy.deepcopy(generator), Batch(config, batch, rt.device)
    generator_learner, ratio_learner = (training.Learner(net, rt, 1e-5, (0.0, 0.999), batch) for net in (generator, ratio))

    def ratio_objective(*part):
        return train_diffratio.ratio_loss(ratio, *part)[0]

    def generator_objective(fake, sigma, eps, labels):
        return train_diffratio.generator_loss(ratio, fake, sigma, eps, "dijs", labels)

    def step():
        ratio.requires_grad_(True)
        with rt.autocast():
            fake = sample.one_step(generator, draw.z, draw.labels)
        ratio_learner.step(1e-5, ratio_objective, draw.x, fake.detach(), draw.sigma, draw.eps, draw.eps_fake, draw.labels)
        networks.normalize_weights(ratio)
        ratio.requires_grad_(False)
        generator_learner.step(1e-5, generator_objective, fake, draw.sigma_generator, draw.eps_generator, draw.labels)
        networks.normalize_weights(generator)
        networks.update_ema(ema, generator, batch, 500_000, batch)

    return step


def distillation(config, batch, rt, compiled=False, method="vsd"):
    """Function that takes an iteration with a teacher, by `method` of exercises/teacher.py."""
    config = dataclasses.replace(config, dropout=0.0)
    nets = [networks.place(networks.Denoiser(config).train(), rt.device, compiled) for _ in range(3)]  # generator, student, teacher
    nets[2].requires_grad_(False)
    ema, draw = copy.deepcopy(nets[0]), Batch(config, batch, rt.device)
    learners = [training.Learner(net, rt, 1e-5, (0.0, 0.999), batch) for net in nets[:2]]
    noises = (draw.sigma, draw.eps), (draw.sigma_generator, draw.eps_generator)

    def step():
        teacher.iteration(method, nets, learners, (1e-5, 1e-5), draw.z, draw.labels, 2.5, *noises)
        networks.update_ema(ema, nets[0], batch, 500_000, batch)

    return step


def sampling(config, batch, rt, compiled=False):
    """Function that draws a batch in one step. (Heun's method with 18 steps takes 35 times as long.)"""
    net, draw = networks.place(networks.Denoiser(config).eval(), rt.device, compiled), Batch(config, batch, rt.device)

    def draw_samples():
        with torch.no_grad(), rt.autocast():
            sample.one_step(net, draw.z, draw.labels)

    return draw_samples


def features(config, batch, rt, compiled=False):
    """Function that takes the Inception features of a batch, in float32 as always."""
    net = fid.Inception().to(rt.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    if compiled:
        net.compile(dynamic=False)
    pixels = config.img_resolution * (8 if config.architecture == "edm2" else 1)  # the images behind latents
    images = torch.zeros(batch, pixels, pixels, 3, dtype=torch.uint8, device=rt.device)
    return lambda: net((fid.resize_tf1(images).permute(0, 3, 1, 2) - 128) / 128)


MEASURED = {  # what a row says: the function that prepares it
    "stage 1, step": stage_1,
    "stage 2, iteration": stage_2,
    "score distillation, iteration": distillation,
    "sampling, one step": sampling,
    "Inception features, fp32": features,
}


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
    return statistics.median(seconds), training.peak_memory_gb(device)


def hardware(device):
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    try:
        name = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=training.HelpFormatter)
    add = parser.add_argument
    add("--preset", choices=list(train_diffratio.PRESETS), default="cifar10", help="whose networks to measure")
    add("--batch", type=training.positive(int), metavar="N", help="images at once (default: 64 on GPUs, 8 on the CPU)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is any")
    add("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="of the networks' arithmetic")
    add("--compile", action="store_true", help="measure compiled networks too (always done on GPUs)")
    add("--repeats", type=training.positive(int), default=5, metavar="N", help="timed calls of each; their median is shown")
    args = parser.parse_args()
    rt = training.start(args.device, args.precision, alone=True)
    on_gpu = rt.device.type == "cuda"
    batch = args.batch or (64 if on_gpu else 8)
    config = networks.NETWORKS[pretrain.PRESETS[args.preset]["network"]]

    rows, seen = [], {}
    for compiled in (False, True) if on_gpu or args.compile else (False,):
        for name, prepare in MEASURED.items():
            torch.manual_seed(0)
            function = prepare(config, batch, rt, compiled)
            if not compiled:
                with FlopCounterMode(display=False) as counter:
                    function()
                seen[name] = counter.get_total_flops()
            seconds, memory = seen[name, compiled] = measure(function, rt.device, args.repeats)
            del function
            speed = f"{batch / seconds:.4g} | {seconds:.3g} | {seen[name] / seconds / 1e12:.3g} | {memory:.1f}"
            rows.append(f"| {name}{', compiled' if compiled else ''} | {speed} |")
            print(rows[-1], flush=True)
        ours, theirs = seen["stage 2, iteration", compiled], seen["score distillation, iteration", compiled]
        rows.append(f"| stage 2 : score distillation{', compiled' if compiled else ''} | | {ours[0] / theirs[0]:.2f} | | "
                    f"{ours[1] / theirs[1]:.2f} |")  # fmt: skip
    print(f"\n{hardware(rt.device)}; PyTorch {torch.__version__}; {rt.precision}; {datetime.date.today()}\n")
    print(f"| {args.preset}, {batch} images | images/s | seconds | TFLOP/s | peak memory, GB |\n|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    training.run(main)
