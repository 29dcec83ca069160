"""Draw and measure what the two stages made of the embedded digits. `make demo` runs it after both.

Writes OUTDIR/demo.png (data | Heun, 18 steps | one step before stage 2 | one step after) and prints a table of Fréchet
distances in the features of the stage-1 network (`fid.py --features`), between random halves of the data and between the
samples and a half, with equal numbers of images.
"""

from pathlib import Path

import numpy as np
import torch

import project  # noqa: F401
import fid
import sample
from machinery import checkpoints, data, training

REPEATS = 4  # random halves over which distances are averaged
# What seeds 0 to 2 gave, widened by a half.
EXPECTED = {
    "two halves of the data": "0.001 to 0.002",
    "Heun, 18 steps": "0.001 to 0.003",
    "one step, before stage 2": "0.1 to 0.5",
    "one step, after stage 2": "0.001 to 0.005",
}


def save_panels(sets, path, side=8, scale=1):
    """Write one PNG with the first side x side images (or fewer) of sets of uint8 [N, H, W, C]."""
    sets = list(sets)
    side = min(side, *(int(len(images)**0.5) for images in sets))
    panels = [images[: side**2].reshape(side, side, *images.shape[1:]) for images in sets]
    gap = np.full_like(panels[0][:, :1], 255)
    rows = np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=1)
    data.save_grid(rows.reshape(-1, *rows.shape[2:]), path, rows.shape[1], scale, padding=1)


def main():
    args = training.Parser(__doc__, dict(
        pretrained=("runs/digits/pretrain/network.pt", "network of stage 1"),
        generator=("runs/digits/dijs/network.pt", "network of stage 2"),
        outdir=("runs/digits", "where demo.png goes"),
        seed=(0, "seed of the halves and the samples", training.integer))).parse_args()
    rt = training.start(alone=True)
    dataset = data.load("digits")
    extractor = fid.network_features(rt, args.pretrained)

    heun = checkpoints.load_network(args.pretrained, role="denoiser").to(rt.device)
    before = checkpoints.load_network(args.pretrained).to(rt.device)
    after = checkpoints.load_network(args.generator, role="generator").to(rt.device)
    before.about = after.about  # the generator as stage 2 starts: a copy at one noise level

    half, whole = len(dataset) // 2, len(dataset)
    samples = {}
    for name, net, count in (("Heun, 18 steps", heun, half), ("one step, before stage 2", before, 4 * whole),
                             ("one step, after stage 2", after, 4 * whole)):
        parts = sample.in_batches(net, range(count), args.seed, rt.device, 256)
        samples[name] = np.concatenate([data.to_uint8(x) for x, _ in parts])

    path = Path(args.outdir) / "demo.png"
    save_panels((dataset.images, *samples.values()), path, scale=3)

    def statistics(images):
        return fid.measure(extractor, lambda indices: images[indices], len(images), rt)[0]

    distances = {name: [] for name in ("two halves of the data", *samples)}
    for i in range(REPEATS):
        a, b = (statistics(dataset.images[indices]) for indices in fid.split_half(whole, args.seed + i))
        distances["two halves of the data"].append(fid.frechet_distance(a, b))
        for name, images in samples.items():
            part = images[i * half % len(images) :][:half]
            distances[name].append(fid.frechet_distance(statistics(part), b))
    everything = statistics(dataset.images)

    first, last = (statistics(samples[f"one step, {when} stage 2"]) for when in ("before", "after"))
    gain = fid.frechet_distance(first, everything) / fid.frechet_distance(last, everything)
    mean = {name: np.mean(values) for name, values in distances.items()}
    x, known = (torch.from_numpy(a.reshape(len(a), -1)).float() for a in (samples["one step, after stage 2"], dataset.images))
    shares = np.bincount(dataset.labels[torch.cdist(x, known).argmin(dim=1).numpy()], minlength=10) / len(x)  # nearest digit

    print(f"\nFD (stage 1) of {half} images from {half} of the data, mean of {REPEATS} draws")
    print(f"  {'':26}{'here':>9}   expected")
    for name, value in mean.items():
        print(f"  {name:26}{value:9.5f}   {EXPECTED[name]}")
    ratio = mean["one step, after stage 2"] / mean["two halves of the data"]
    print(f"""\
  one step after stage 2 is at {ratio:.2f} times the distance of two halves of the data (expected: below 3)
  and, with {4 * whole} samples, {gain:.0f} times closer to the data than before stage 2 (expected: above 100)
  shares of the ten digits: {100 * shares.min():.1f} % to {100 * shares.max():.1f} % (expected: 4 % to 20 %)

look at {path}: data | Heun, 18 steps | one step before stage 2 | one step after""")


if __name__ == "__main__":
    training.run(main)
