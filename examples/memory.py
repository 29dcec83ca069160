"""Compute, not measure, the GPU memory that a preset of stage 2 needs: python examples/memory.py cifar10 imagenet64

Fixed part: weights, gradients, Adam's two moments and the average of the generator (20 bytes a parameter), the same
without the average for the ratio network (16), and the random numbers of a global batch. Part per image: what autograd
keeps for the backward passes, counted by running the real networks under bf16 autocast on the CPU on one and two images.
The allocator's overhead and the workspaces of cuDNN come on top. Sizes in GB = 10^9 bytes.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import networks  # noqa: E402
import runtime  # noqa: E402
import sample  # noqa: E402
import train_diffratio  # noqa: E402

NETWORK_OF = {"imagenet512": "edm2-s", "cifar10-cond": "cifar10"}  # what each preset's --init holds


def kept_for_backward(net, run):
    """Bytes that autograd keeps for the backward pass of `run()`, without the weights themselves."""
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor is held so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        out = run()
    total = sum(size for size, _ in kept.values())
    del out
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runtime.HelpFormatter)
    parser.add_argument("presets", nargs="*", default=["cifar10"], metavar="PRESET", help="presets of train_diffratio.py")
    print(f"{'preset':14}{'fixed':>8}{'per image':>11}   GB at micro-batch")
    for name in parser.parse_args().presets:
        if name not in train_diffratio.PRESETS:
            raise runtime.UserError(f"unknown preset {name}; known: {', '.join(train_diffratio.PRESETS)}")
        config = dataclasses.replace(networks.NETWORKS[NETWORK_OF.get(name, name)], dropout=0.0)
        batch = train_diffratio.PRESETS[name]["batch"]
        generator, ratio = networks.Denoiser(config), networks.RatioNetwork(config)
        pixels = config.img_channels * config.img_resolution**2
        fixed = 20 * networks.parameter_count(generator) + 16 * networks.parameter_count(ratio) + 6 * 4 * pixels * batch

        def activations(n):
            """Of one generator forward and of the ratio network on real and fake, n images each."""
            x = torch.randn(n, config.img_channels, config.img_resolution, config.img_resolution)
            labels = torch.zeros(n, dtype=torch.int64) if config.label_dim else None
            twice = None if labels is None else labels.repeat(2)
            return kept_for_backward(generator, lambda: sample.one_step(generator, x, labels)) + kept_for_backward(
                ratio, lambda: ratio(x.repeat(2, 1, 1, 1), torch.ones(2 * n), twice)
            )

        one, two = activations(1), activations(2)
        per_image, fixed = two - one, fixed + 2 * one - two  # what does not grow with the images: weights cast to bf16
        sizes = "   ".join(f"{n}: {(fixed + n * per_image) / 1e9:.0f}" for n in (4, 8, 16, 32, 64, 128))
        print(f"{name:14}{fixed / 1e9:8.1f}{per_image / 1e9:11.3f}   {sizes}", flush=True)


if __name__ == "__main__":
    runtime.run(main)
