"""Compute, not measure, the GPU memory of stage 2: python exercises/memory.py cifar10 imagenet64

Fixed: weights, Adam's two moments and the gradients of both networks, the average of the generator
(20 bytes a parameter; 12 for the ratio network, whose gradients go before the generator's) and
the random numbers of a global batch. Per image: what autograd keeps for a batch in one piece under
bf16 autocast with CUDA's rules, counted on fake tensors, which need no GPU. Not counted: allocator
and cuDNN, for which the advice leaves 15 % of the card; `--compile`, which needs less. GB: 10^9.
"""

import dataclasses

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import project  # noqa: F401
import networks
import pretrain
import sample
import train_diffratio
from machinery import training

CARDS = (24, 40, 80)  # GB


def network_of(preset):
    """The configuration of a preset's network in stage 2, without dropout."""
    return dataclasses.replace(networks.NETWORKS[pretrain.PRESETS[preset]["network"]], dropout=0.0)


class CudaRules(TorchFunctionMode):
    """Make the CPU's autocast use float32 where CUDA's does, and GroupNorm the GPU's layout."""

    FLOAT32 = {"group_norm", "layer_norm", "interpolate", "softmax", "softplus", "exp", "log",
               "pow", "__pow__", "sum", "norm"}

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


def count(config, batch):
    """(fixed bytes, bytes per image) of stage 2 with these networks and this global batch."""
    with FakeTensorMode():
        generator, ratio = networks.Denoiser(config), networks.RatioNetwork(config)

        def activations(n):
            x = torch.randn(n, config.img_channels, config.img_resolution, config.img_resolution)
            sigma = torch.ones(n)
            labels = torch.zeros(n, dtype=torch.int64) if config.label_dim else None
            inputs = ratio, x, x, sigma, x, x, labels
            kept = kept_for_backward(generator, lambda: sample.one_step(generator, x, labels))
            return kept + kept_for_backward(ratio, lambda: train_diffratio.ratio_loss(*inputs))

        two, four = activations(2), activations(4)
    numbers = 6 * 4 * batch * config.img_channels * config.img_resolution**2
    weights = 20 * networks.parameter_count(generator) + 12 * networks.parameter_count(ratio)
    cast = 2 * two - four  # weights cast to bf16 do not grow with n
    return weights + numbers + cast, (four - two) / 2


def images_that_fit(fixed, per_image, card):
    """The largest power of two of images on a card of so many bytes; 0 if not even one fits."""
    n = max(0, int((0.85 * card - fixed) / per_image))
    return 2 ** (n.bit_length() - 1) if n else 0


def main():
    parser = training.Parser(__doc__)
    presets = list(train_diffratio.PRESETS)
    parser.add_argument("presets", nargs="+", choices=presets, metavar="PRESET", help="%(choices)s")
    args = parser.parse_args()
    cards = "".join(f" {f'{card} GB':>7}" for card in CARDS)
    print(f"{'preset':14}{'fixed':>8}{'per image':>11}   --micro-batch for a card of{cards}")
    for name in args.presets:
        fixed, per_image = count(network_of(name), train_diffratio.PRESETS[name]["batch"])
        fitting = [images_that_fit(fixed, per_image, 1e9 * card) or "none" for card in CARDS]
        advice = "".join(f" {n:>7}" for n in fitting)
        print(f"{name:14}{fixed / 1e9:8.1f}{per_image / 1e9:11.3f}{'':30}{advice}", flush=True)


if __name__ == "__main__":
    training.run(main)
