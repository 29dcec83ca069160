"""Draw images from a trained network: one step from a generator (stage 2), Heun's method from a denoiser (stage 1).

Reads a network file (`network.pt` of either stage, or a published EDM or EDM2 pickle) and says which it is.
Writes a PNG grid (`--out grid.png`), a folder of PNGs (`--out folder`) or a batch of images for measurement
(`--out samples.npz`: array `arr_0`, uint8, N x H x W x C, the format of the ADM evaluation suite).

    python sample.py --network runs/digits/dijs/network.pt --n 100 --out digits.png
    python sample.py --network runs/cifar10/dijs/network.pt --n 50000 --out samples.npz
    python sample.py --network edm-imagenet-64x64-cond-adm.pkl --n 64 --class 207 --out dogs.png
"""

import argparse
import math

import torch

import data
import networks
import runtime
from runtime import UserError


def sigma_steps(steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Noise levels of EDM, Equation 5, from sigma_max down to sigma_min, then 0: [steps + 1] float64."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


@torch.no_grad()
def heun(net, z, labels=None, steps=18, **levels):
    """Heun's second order method for the probability flow ODE; EDM, Algorithm 1. 2 steps - 1 evaluations of `net`.

    z [N, C, H, W] standard normal, labels [N] or None -> images [N, C, H, W] float32. The state is float64, as in EDM.
    """
    sigmas = sigma_steps(steps, **levels).tolist()
    x = z.double() * sigmas[0]

    def slope(x, sigma):  # dx/dsigma of the probability flow
        return (x - net(x.float(), x.new_full((len(x),), sigma).float(), labels).double()) / sigma

    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        d = slope(x, sigma)
        x_next = x + (sigma_next - sigma) * d
        if sigma_next > 0:
            x_next = x + (sigma_next - sigma) * (d + slope(x_next, sigma_next)) / 2
        x = x_next
    return x.float()


def one_step(net, z, labels=None, t_init=2.5):
    """The one-step generator G(z) = D(t_init z; sigma = t_init); arXiv 2502.08005. z [N, C, H, W] standard normal."""
    return net(t_init * z, torch.full((len(z),), t_init, device=z.device), labels)


@torch.no_grad()
def generate(net, z, labels=None, steps=18):
    """Images [N, C, H, W] in [-1, 1] from a network of either stage; `net.about` says which it is."""
    if net.about["role"] == "generator":
        return one_step(net, z, labels, net.about["t_init"])
    return heun(net, z, labels, steps)


def inputs(config, indices, seed, device, label=None):
    """(z [n, C, H, W] standard normal, labels [n] or None) of the images with these indices.

    Each image has random numbers of its own, drawn on the CPU, so that image i of a seed is the same in any batch and
    on any device. `label` fixes the class; otherwise it is uniformly random.
    """
    shape = (config.img_channels, config.img_resolution, config.img_resolution)
    generators = [runtime.generator("cpu", seed, int(i), "sample") for i in indices]
    labels = None
    if config.label_dim:
        labels = [torch.randint(config.label_dim, [], generator=g) if label is None else torch.tensor(label) for g in generators]
        labels = torch.stack(labels).to(device)
    z = torch.stack([torch.randn(shape, generator=g) for g in generators])
    return z.to(device), labels


def preview(net, path, seed, device, n=64):
    """Write a PNG grid of n samples, to look at while training. Of latents, the first three channels stand for RGB."""
    z, labels = inputs(net.config, range(n), seed, device)
    images = data.to_uint8(generate(net, z, labels)[:, :3])
    data.save_grid(images, path, columns=8, scale=max(1, 32 // net.config.img_resolution))
