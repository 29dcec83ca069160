"""Draw and measure what the two stages made of the embedded digits. `make demo` runs it after both.

Writes OUTDIR/demo.png (data | Heun, 18 steps | one step before stage 2 | one step after) and prints a table of Fréchet
distances in the features of the stage-1 network (fid.py --features): between random halves of the data, and from the
samples to a half, at equal numbers of images.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from machinery import checkpoints  # noqa: E402
from machinery import data  # noqa: E402
import fid  # noqa: E402
from machinery import training  # noqa: E402
import sample  # noqa: E402

REPEATS = 4  # random halves over which distances are averaged
# Where runs of three seeds and two instruction sets ended, rounded outwards: see the README.
EXPECTED = {
    "two halves of the data": "0.002 to 0.003",
    "Heun, 18 steps": "0.0015 to 0.003",
    "one step, before stage 2": "0.2 to 0.6",
    "one step, after stage 2": "0.003 to 0.006",
}


def nearest_digit_shares(images, dataset):
    """Share of each digit [10] among images uint8 [N, H, W, 1], by nearest neighbour in the data."""
    x, known = (torch.from_numpy(a.reshape(len(a), -1).astype(np.float32)) for a in (images, dataset.images))
    nearest = torch.cat([torch.cdist(part, known).argmin(dim=1) for part in x.split(1000)])
    return np.bincount(dataset.labels[nearest.numpy()], minlength=10) / len(images)


def main():
    parser = training.Parser(__doc__)
    parser.add_argument("--pretrained", default="runs/digits/pretrain/network.pt", metavar="PATH", help="network of stage 1")
    parser.add_argument("--generator", default="runs/digits/dijs/network.pt", metavar="PATH", help="network of stage 2")
    parser.add_argument("--outdir", default="runs/digits", metavar="DIR", help="where demo.png goes")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the halves and the samples")
    args = parser.parse_args()
    rt = training.start(alone=True)
    dataset = data.load("digits")
    extractor = fid.network_features(rt, args.pretrained)

    heun = checkpoints.load_network(args.pretrained, role="denoiser").to(rt.device)
    before = checkpoints.load_network(args.pretrained).to(rt.device)
    after = checkpoints.load_network(args.generator, role="generator").to(rt.device)
    before.about = after.about  # the generator as stage 2 starts: a copy at one noise level

    half, whole = len(dataset) // 2, len(dataset)
    many = 4 * whole
    samples = {}
    for name, net, count in (
        ("Heun, 18 steps", heun, half), ("one step, before stage 2", before, many), ("one step, after stage 2", after, many)
    ):  # fmt: skip
        parts = sample.in_batches(net, range(count), args.seed, rt.device, 256)
        samples[name] = np.concatenate([data.to_uint8(x) for x, _ in parts])

    path = Path(args.outdir) / "demo.png"
    data.save_panels((dataset.images, *samples.values()), path, scale=3)

    def statistics(images):
        return fid.measure(extractor, np.array_split(images, 8), rt)

    distances = {name: [] for name in ("two halves of the data", *samples)}
    for i in range(REPEATS):
        a, b = (statistics(dataset.images[indices]) for indices in fid.split_half(whole, args.seed + i))
        distances["two halves of the data"].append(fid.frechet_distance(a, b))
        for name, images in samples.items():
            part = images[i * half % len(images) :][:half]
            distances[name].append(fid.frechet_distance(statistics(part), b))
    everything = statistics(dataset.images)

    def gain(count):
        """How many times closer to all of the data `count` samples have come by stage 2."""
        first, last = (statistics(samples[f"one step, {when} stage 2"][:count]) for when in ("before", "after"))
        return fid.frechet_distance(first, everything) / fid.frechet_distance(last, everything)

    mean = {name: np.mean(values) for name, values in distances.items()}
    shares = nearest_digit_shares(samples["one step, after stage 2"], dataset)

    print(f"\nFréchet distance of {half} images from {half} of the data, mean of {REPEATS} draws")
    print(f"  {'':26}{'here':>9}   expected")
    for name, value in mean.items():
        print(f"  {name:26}{value:9.5f}   {EXPECTED[name]}")
    ratio = mean["one step, after stage 2"] / mean["two halves of the data"]
    print(f"  one step after stage 2 is at {ratio:.2f} times the distance of two halves of the data (expected: below 3)")
    print(f"  and {gain(many):.0f} times closer to the data than before stage 2 ({many} samples against {whole} images; expected: above 100),")
    print(f"  {gain(whole):.0f} times with {whole} samples, where what chance leaves weighs more")
    print(f"  shares of the ten digits: {100 * shares.min():.1f} % to {100 * shares.max():.1f} % (expected: 4 % to 20 %)")
    print(f"\nlook at {path}: data | Heun, 18 steps | one step before stage 2 | one step after")


if __name__ == "__main__":
    training.run(main)
