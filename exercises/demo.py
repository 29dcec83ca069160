"""Draw and measure what the two stages made of the embedded digits: `make demo` runs it after both.

Writes OUTDIR/demo.png. Prints Fréchet distances in stage-1 features, of half the data and of as many samples from the other half.
"""

from pathlib import Path

import numpy as np
import torch

import project  # noqa: F401
import fid
import measure
from machinery import checkpoints, data, training

REPEATS = 4  # random halves over which distances are averaged
HALVES, HEUN = "two halves of the data", "Heun, 18 steps"
BEFORE, AFTER = "one step, before stage 2", "one step, after stage 2"
EXPECTED = {  # what seeds 0 to 2 gave, widened by a half
    HALVES: "0.001 to 0.002", HEUN: "0.001 to 0.003", BEFORE: "0.1 to 0.5", AFTER: "0.001 to 0.005"}


def save_panels(sets, path, side=8):
    """Write one PNG with the first side x side images of each of `sets` uint8 [N, H, W, C]."""
    panels = [images[: side**2].reshape(side, side, *images.shape[1:]) for images in sets]
    gap = np.full_like(panels[0][:, :1], 255)
    rows = np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=1)
    data.save_grid(rows.reshape(-1, *rows.shape[2:]), path, rows.shape[1], scale=3, padding=1)


def main():
    args = training.Parser(__doc__, dict(
        pretrained=("runs/digits/pretrain/network.pt", "network of stage 1"),
        generator=("runs/digits/dijs/network.pt", "network of stage 2"),
        outdir=("runs/digits", "where demo.png goes"),
        seed=(0, "seed of the halves and the samples", training.integer))).parse_args()
    rt, dataset = training.Runtime(alone=True), data.load("digits")
    extractor = fid.network_features(rt, args.pretrained)
    half, whole = len(dataset) // 2, len(dataset)
    stage_1, generator = (checkpoints.load_network(path).to(rt.device) for path in (args.pretrained, args.generator))

    def samples(net, count):
        parts = measure.in_batches(net, range(count), args.seed, rt.device, 256)
        return np.concatenate([data.to_uint8(x) for x in parts])

    images = {HEUN: samples(stage_1, half)}
    stage_1.about = generator.about  # as stage 2 starts
    images |= {BEFORE: samples(stage_1, 4 * whole), AFTER: samples(generator, 4 * whole)}
    path = Path(args.outdir) / "demo.png"
    save_panels((dataset.images, *images.values()), path)
    known = measure.features(extractor, dataset.images)
    drawn = {name: measure.features(extractor, x) for name, x in images.items()}
    distances = {name: [] for name in EXPECTED}
    for i in range(REPEATS):
        a, b = (known[indices] for indices in measure.halves(whole, args.seed + i))
        parts = {HALVES: a} | {name: x[i * half % len(x) :][:half] for name, x in drawn.items()}
        for name, part in parts.items():
            distances[name].append(measure.distance(extractor, part, b))
    mean = {name: np.mean(values) for name, values in distances.items()}
    before, after = (measure.distance(extractor, drawn[name], known) for name in (BEFORE, AFTER))
    x, y = (torch.tensor(a).flatten(1).float() for a in (images[AFTER], dataset.images))
    nearest = dataset.labels[torch.cdist(x, y).argmin(dim=1).numpy()]
    shares = 100 * np.bincount(nearest, minlength=10) / len(x)

    print(f"\nFD (stage 1) of {half} images from {half} of the data, mean of {REPEATS} draws")
    print(f"  {'':26}{'here':>9}   expected")
    for name, value in mean.items():
        print(f"  {name:26}{value:9.5f}   {EXPECTED[name]}")
    print(f"""\
  one step after stage 2 is at {mean[AFTER] / mean[HALVES]:.2f} times the distance of two halves of the data (expected: below 3)
  and, with {4 * whole} samples, {before / after:.0f} times closer to the data than before stage 2 (expected: above 100)
  shares of the ten digits: {shares.min():.1f} % to {shares.max():.1f} % (expected: 4 % to 20 %)

look at {path}: data | {HEUN} | one step before stage 2 | one step after""")


if __name__ == "__main__":
    training.run(main)
