"""Compute, not measure, the GPU memory that a preset of stage 2 needs: python exercises/memory.py cifar10 imagenet64

Fixed part: weights, Adam's two moments and the gradients of both networks, the average of the generator (20 bytes a
parameter; 12 for the ratio network, whose gradients are gone when the generator's come), and the random numbers of a
global batch. Part per image: what autograd keeps for the backward passes of a batch in one piece, under bf16 autocast
with the rules of CUDA. It is counted on fake tensors, which have shapes and types but no content, so no GPU is needed
and any network takes seconds. Not counted: the allocator's overhead and the workspaces of cuDNN, for which the advice
leaves 15 % of the card; `--compile`, which needs less. Sizes in GB = 10^9 bytes.
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


class CudaRules(TorchFunctionMode):
    """Makes the CPU's autocast compute in float32 what CUDA's does, and gives GroupNorm the one layout its GPU kernel takes.

    For the other operations of the networks the two autocasts agree.
    """

    FLOAT32 = {"group_norm", "layer_norm", "interpolate", "softmax", "softplus", "exp", "log", "pow", "__pow__", "sum", "norm"}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in self.FLOAT32 and torch.is_autocast_enabled("cpu"):
            to_float32 = lambda t: t.float() if t.is_floating_point() else t  # noqa: E731
            args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, to_float32, (args, kwargs))
        if function.__name__ == "group_norm":
            args = (args[0].contiguous(), *args[1:])
        return function(*args, **(kwargs or {}))


def kept_for_backward(net, run):
    """Bytes that autograd keeps for the backward pass of `run()`, without the weights of `net` themselves."""
    weights = {p.untyped_storage()._cdata for p in net.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage.nbytes(), tensor)  # the tensor is held so that no address is used twice
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16), CudaRules():
        out = run()
    total = sum(size for size, _ in kept.values())
    del out
    return total


def count(config, batch):
    """(fixed bytes, bytes per image) of stage 2 with networks of this configuration and this global batch."""
    with FakeTensorMode():
        generator, ratio = networks.Denoiser(config), networks.RatioNetwork(config)

        def activations(n):
            """Of one generator forward and of the ratio network on real and fake, n images each."""
            x = torch.randn(n, config.img_channels, config.img_resolution, config.img_resolution)
            sigma, labels = torch.ones(n), torch.zeros(n, dtype=torch.int64) if config.label_dim else None
            kept = kept_for_backward(generator, lambda: sample.one_step(generator, x, labels))
            return kept + kept_for_backward(ratio, lambda: train_diffratio.ratio_loss(ratio, x, x, sigma, x, x, labels))

        two, four = activations(2), activations(4)
    numbers = 6 * 4 * batch * config.img_channels * config.img_resolution**2
    weights = 20 * networks.parameter_count(generator) + 12 * networks.parameter_count(ratio)
    return weights + numbers + 2 * two - four, (four - two) / 2  # what does not grow with n: weights cast to bf16


def main():
    parser = training.Parser(__doc__)
    parser.add_argument("presets", nargs="+", choices=list(train_diffratio.PRESETS), metavar="PRESET", help="%(choices)s")
    args = parser.parse_args()
    cards = "".join(f" {f'{card} GB':>7}" for card in CARDS)
    print(f"{'preset':14}{'fixed':>8}{'per image':>11}   --micro-batch for a card of{cards}")
    for name in args.presets:
        config = dataclasses.replace(networks.NETWORKS[pretrain.PRESETS[name]["network"]], dropout=0.0)
        fixed, per_image = count(config, train_diffratio.PRESETS[name]["batch"])
        fitting = [int((0.85e9 * card - fixed) / per_image) for card in CARDS]
        advice = "".join(f" {2 ** (n.bit_length() - 1) if n > 0 else 'none':>7}" for n in fitting)
        print(f"{name:14}{fixed / 1e9:8.1f}{per_image / 1e9:11.3f}   {'':27}{advice}", flush=True)


if __name__ == "__main__":
    training.run(main)
