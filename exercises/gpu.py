"""Errors of the networks, speed and memory on a device. (`make test` runs the tests on CUDA, too.)

    python exercises/gpu.py                              everything; the page goes to gpu.md as it grows
    python exercises/gpu.py --parts speed --preset cifar10 --batch 4 --device cpu
    python exercises/gpu.py --parts memory --preset cifar10 imagenet64            computed; needs no GPU

Parts: `memory` computes that of stage 2 on a GPU; `correctness` compares each architecture with the CPU in float64; `speed`
times training and sampling on random images and weights, with variational score distillation (VSD) and SiD for the cost of a
teacher; `compiled` does the last two with torch.compile. FLOP are those of matrix products and convolutions.
"""

import copy
import dataclasses
import datetime
import functools
import itertools
import platform
import statistics
import time
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import project  # noqa: F401
import fid
import networks
import pretrain
import sample
import teacher
import train_diffratio
from machinery import training

PARTS = ("memory", "correctness", "speed", "compiled")


class Batch:
    """Random stand-ins for a batch of `rt.batch` images and all that is drawn in an iteration."""

    def __init__(self, config, rt):
        shape = rt.batch, config.img_channels, config.img_resolution, config.img_resolution
        with rt.device:
            self.x, self.z, self.eps, self.eps_fake, self.eps_generator = (torch.randn(shape) for _ in range(5))
            self.sigma, self.sigma_generator = (torch.randn(rt.batch).exp() for _ in range(2))
            self.labels = torch.zeros(rt.batch, dtype=torch.int64) if config.label_dim else None


def config_of(preset):
    return networks.NETWORKS[pretrain.PRESETS[preset]["network"]]


def randomise(net):
    """Random weights everywhere: what starts at zero would hide differences."""
    for p in net.parameters():
        p.data = torch.randn_like(p) * (0.5 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.3)
    return net


def build(kind, config, rt, compiled=False):
    """A network of random weights, in training mode."""
    with rt.device:
        net = randomise(kind(config)).train()
    return networks.place(net, rt.device, compiled)


def stage_1(config, rt, compiled=False):
    """Function that takes one step of stage 1 with `rt.batch` images."""
    net = build(networks.Denoiser, config, rt, compiled)
    ema, draw = copy.deepcopy(net), Batch(config, rt)
    optimizer = training.Optimizer(net, rt, (0.9, 0.999))

    def step():
        optimizer.step(1e-4, lambda *part: [pretrain.denoising_loss(net, *part)], draw.x, draw.sigma, draw.eps, draw.labels)
        networks.update_ema(ema, net, rt.batch, 500_000, rt.batch)

    return step


def stage_2(config, rt, compiled=False):
    """Function that takes one iteration of stage 2: a ratio step and a generator step."""
    config = dataclasses.replace(config, dropout=0.0)
    generator = build(networks.Denoiser, config, rt, compiled)
    ratio = build(networks.RatioNetwork, config, rt, compiled)
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
    nets = [build(networks.Denoiser, config, rt, compiled) for _ in range(3)]
    nets[2].requires_grad_(False)  # generator, student, teacher
    ema, draw = copy.deepcopy(nets[0]), Batch(config, rt)
    optimizers = [training.Optimizer(net, rt, (0.0, 0.999)) for net in nets[:2]]
    noises = (draw.sigma, draw.eps), (draw.sigma_generator, draw.eps_generator)

    def step():
        teacher.iteration(method, nets, optimizers, (1e-5, 1e-5), draw.z, draw.labels, 2.5, *noises)
        networks.update_ema(ema, nets[0], rt.batch, 500_000, rt.batch)

    return step


def sampling(config, rt, compiled=False, draw=sample.one_step):
    """Function that samples a batch, in one step or by `draw`."""
    net, inputs = build(networks.Denoiser, config, rt, compiled).eval(), Batch(config, rt)
    return lambda: rt.in_parts(functools.partial(draw, net), inputs.z, inputs.labels, graph=False)


heun = functools.partial(sampling, draw=sample.heun)


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
    pixels = config.img_resolution * (8 if config.architecture == "edm2" else 1)  # the images behind latents
    images = torch.zeros(rt.batch, pixels, pixels, 3, dtype=torch.uint8, device=rt.device)
    return lambda: net(images)


MEASURED = {  # name of the row: the function that prepares it
    "stage 1, step": stage_1,
    "stage 2, iteration": stage_2,
    "VSD, iteration": distillation,
    "SiD, iteration": functools.partial(distillation, method="sid"),
    "sampling, one step": sampling,
    "sampling, Heun, 18 steps": heun,
    "Inception features, fp32": features,
}


def measure(function, device, repeats):
    """(median seconds, peak memory in GB) of a call: of tensors on a GPU, of the process on a CPU if Linux tells it, else NaN."""
    module, clear, peak = torch.get_device_module(device), Path("/proc/self/clear_refs"), float("nan")
    module.synchronize()
    if device.type == "cuda":
        module.reset_peak_memory_stats(device)
    elif clear.exists():
        clear.write_text("5")  # forget the peak of this process
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        module.synchronize()
        seconds.append(time.perf_counter() - begin)
    if device.type == "cuda":
        peak = module.max_memory_allocated(device) / 1e9
    elif clear.exists():
        peak = int(clear.with_name("status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9
    return statistics.median(seconds), peak


class Page:
    """Lines of Markdown, printed and written to a file as they come."""

    def __init__(self, path):
        self.file = open(path, "w")

    def line(self, text=""):
        print(text, flush=True)
        self.file.write(text + "\n")
        self.file.flush()

    def part(self, title, columns):
        """Start a table."""
        self.line(f"\n## {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")

    def row(self, name, function):
        """A row with the cells that function() returns, or with what kept it from returning."""
        try:
            cells = function()
        except Exception as error:  # the page is the report: the next row may still run
            text = str(error).strip().splitlines() or [""]
            cells = [f"**{type(error).__name__}: {text[0][:150]}**"]
        torch.cuda.empty_cache()
        self.line(f"| {name} | {' | '.join(map(str, cells))} |")


class CudaRules(TorchFunctionMode):
    """Make the CPU's autocast use float32 where CUDA's does, and GroupNorm the GPU's layout."""

    FLOAT32 = {"group_norm", "layer_norm", "interpolate", "softmax", "softplus", "exp", "log", "pow", "__pow__", "sum", "norm"}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in self.FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = torch.utils._pytree.tree_map_only(
                torch.Tensor, lambda t: t.float() if t.is_floating_point() else t, (args, kwargs))
        if function.__name__ == "group_norm":
            args = (args[0].contiguous(), *args[1:])
        return function(*args, **(kwargs or {}))


def kept_for_backward(net, run):
    """Bytes that autograd keeps for the backward pass of `run()`, without the weights of `net`."""
    weights = {p.untyped_storage()._cdata for p in net.parameters()}
    kept = {}

    def pack(tensor):
        address = tensor.untyped_storage()._cdata
        if address not in weights:
            kept[address] = tensor  # held, so that no address is used twice
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16), CudaRules():
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@functools.cache
def count(preset):
    """(fixed bytes, bytes per image) of stage 2 with a preset's networks and global batch.

    Fixed: weights, Adam's two moments, gradients and the generator's average: 20 bytes a parameter; 12 for the ratio network,
    whose gradients go before the generator's; and the random numbers of a batch. Per image: what autograd keeps for a batch in
    one piece under bf16 autocast with CUDA's rules, on fake tensors. Not counted: allocator, cuDNN, and what `--compile` saves.
    """
    config = dataclasses.replace(config_of(preset), dropout=0.0)
    with FakeTensorMode():
        generator, ratio = networks.Denoiser(config), networks.RatioNetwork(config)

        def activations(n):
            draw = Batch(config, training.Runtime("cpu", batch=n))
            x, labels = draw.x, draw.labels
            kept = kept_for_backward(generator, lambda: sample.one_step(generator, x, labels))
            return kept + kept_for_backward(ratio, lambda: train_diffratio.ratio_loss(ratio, x, x, draw.sigma, x, x, labels))

        two, four = activations(2), activations(4)
    numbers = 6 * 4 * train_diffratio.PRESETS[preset]["batch"] * config.img_channels * config.img_resolution**2
    weights = 20 * networks.parameter_count(generator) + 12 * networks.parameter_count(ratio)
    cast = 2 * two - four  # weights cast to bf16 do not grow with n
    return weights + numbers + cast, (four - two) / 2


def images_that_fit(fixed, per_image, card):
    """The largest power of two of images on a card of so many bytes, less 15 % for allocator and cuDNN; 0 if none fits."""
    n = max(0, int((0.85 * card - fixed) / per_image))
    return 2 ** (n.bit_length() - 1) if n else 0


def memory(page, presets):
    """A table of the memory of stage 2, and the largest `--micro-batch` on a card of 24, 40 and 80 GB."""
    page.part("Memory of stage 2, computed; `--micro-batch`", ["", "fixed, GB", "per image, GB", "on 24 GB", "40 GB", "80 GB"])
    for preset in presets:
        fixed, per_image = count(preset)
        fitting = [images_that_fit(fixed, per_image, card) or "none" for card in (24e9, 40e9, 80e9)]
        page.row(preset, lambda: [f"{fixed / 1e9:.1f}", f"{per_image / 1e9:.3f}", *fitting])


ARCHITECTURES = {"ddpmpp": 32, "ncsnpp": 32, "adm": 64, "edm2": 64}  # base channels
LIMITS = {"fp32": (1e-4, 1e-3), "bf16": (0.05, 0.2), "fp16": (0.01, 0.05)}  # relative errors: output, gradients


def small(architecture):
    return networks.Config(architecture, 16, 3, 5, ARCHITECTURES[architecture], (1, 2), 1, (8,))


def apart(found, wanted):
    """|found - wanted| / |wanted| over all tensors of two lists."""
    found, wanted = (torch.cat([t.detach().double().cpu().flatten() for t in side]) for side in (found, wanted))
    return ((found - wanted).norm() / wanted.norm()).item()


def verdict(error, limit):
    return f"{error:.1e}" if error < limit else f"**{error:.1e}, above {limit:g}**"  # a NaN is above


def network_check(architecture, rt, compiled):
    """Errors of a network's output and gradients against the CPU in float64, relative."""
    torch.manual_seed(0)
    net = randomise(networks.UNet(small(architecture)))
    x, c_noise, labels = torch.randn(8, 3, 16, 16), torch.randn(8), torch.arange(8) % 5

    def run(net, x, c_noise, labels):
        out = net(x.requires_grad_(), c_noise, labels)
        return out, torch.autograd.grad(out.double().square().sum(), [x, *net.parameters()])

    out, grads = run(copy.deepcopy(net).double(), x.double(), c_noise.double(), labels)
    net = networks.place(net, rt.device, compiled)
    with rt.autocast():
        seen, seen_grads = run(net, *(t.to(rt.device) for t in (x, c_noise, labels)))
    limits = LIMITS[rt.precision]
    return verdict(apart([seen], [out]), limits[0]), verdict(apart(seen_grads, grads), limits[1])


def correctness(page, rt, compiled):
    """A table of the errors of all architectures in each precision."""
    page.part(f"Relative errors against the CPU in float64{', compiled' * compiled}", ["", "output", "gradients"])
    precisions = ("fp32", "bf16", "fp16") if rt.device.type == "cuda" and not compiled else ("fp32", "bf16")
    for precision, architecture in itertools.product(precisions, ARCHITECTURES):
        here = training.Runtime(rt.device.type, precision)
        torch._dynamo.reset()
        page.row(f"{architecture}, {precision}", lambda: network_check(architecture, here, compiled))


def matrix_rate(rt):
    """TFLOP/s of a large matrix product of random numbers in the precision of training."""
    n = 8192 if rt.device.type == "cuda" else 2048
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[rt.precision]
    a, b = (torch.randn(n, n, device=rt.device, dtype=dtype) for _ in range(2))
    a @ b
    return 2e-12 * n**3 / measure(lambda: a @ b, rt.device, 10)[0]


def speed(page, rt, presets, batch, repeats, compiled):
    """A table of the time and memory of what trains and samples, preset by preset."""
    rate = matrix_rate(rt)
    page.part(f"Speed{', compiled' * compiled} ({rt.precision}; matrix products run at {rate:.3g} TFLOP/s)",
              ["", "images/s", "seconds", "TFLOP/s", "share of the matrix rate", "peak memory, GB"])
    both = {", channels-last": lambda *_: torch.channels_last, ", NCHW": lambda *_: torch.contiguous_format}
    on_gpu = rt.device.type == "cuda"

    def cells(prepare, config, here):
        torch.manual_seed(0)
        torch._dynamo.reset()
        function = prepare(config, here)
        with FlopCounterMode(display=False) as counter:
            function()
        if compiled:
            function = prepare(config, here, compiled)
            function()
        seconds, peak = measure(function, rt.device, 1 if prepare is heun else repeats)
        teraflops = counter.get_total_flops() / seconds / 1e12
        share = f"{100 * teraflops / rate:.0f} %"
        return f"{here.batch / seconds:.4g}", f"{seconds:.3g}", f"{teraflops:.3g}", share, f"{peak:.1f}"

    for preset in presets:
        config, n = config_of(preset), batch or 32
        if on_gpu and not batch:
            card = torch.cuda.get_device_properties(rt.device).total_memory
            n = min(512, images_that_fit(*count(preset), card) or 1)
        here = training.Runtime(rt.device.type, rt.precision, n)
        for name, prepare in MEASURED.items():
            if compiled and prepare in (features, heun):
                continue  # one is not compiled, the other is one step 35 times
            layouts = both if on_gpu and prepare in (stage_1, stage_2) else {"": networks.memory_format}
            for layout, function in layouts.items():
                with mock.patch.object(networks, "memory_format", function):
                    page.row(f"{preset}, {here.batch} images: {name}{layout}", lambda: cells(prepare, config, here))


def hardware(device):
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        name = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def main():
    parser = training.Parser(__doc__, dict(
        batch=(None, "speed: images at once (default: what the memory takes, at most 512; 32 on a CPU)", int),
        device=training.DEVICE,
        precision=training.PRECISION,
        repeats=(5, "speed: timed calls of each; their median is shown"),
        out=("gpu.md", "the page")))
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART",
                        help="%(choices)s (default: all; on a CPU correctness and speed)")
    parser.add_argument("--preset", nargs="+", choices=list(pretrain.PRESETS), metavar="NAME",
                        help="memory, speed: whose networks (default: cifar10 imagenet64 imagenet512; on a CPU fashion-mnist)")
    args = parser.parse_args()
    rt = training.Runtime(args.device, args.precision, alone=True)
    if rt.device.type == "cuda":
        parts, presets = PARTS, ("cifar10", "imagenet64", "imagenet512")
    else:
        parts, presets = PARTS[1:3], ("fashion-mnist",)
    parts, presets, page = args.parts or parts, args.preset or presets, Page(args.out)
    page.line(f"{hardware(rt.device)}; PyTorch {torch.__version__}, Python {platform.python_version()}; {datetime.date.today()}")
    for part in parts:
        compiled = part == "compiled"
        if part == "memory":
            memory(page, presets)
        if part == "correctness" or compiled:
            correctness(page, rt, compiled)
        if part == "speed" or compiled:
            speed(page, rt, presets, args.batch, args.repeats, compiled)


if __name__ == "__main__":
    training.run(main)
