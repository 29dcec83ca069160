"""How fast is fid.py? Inception's images/s, and the seconds for one distance at 2048 dimensions.

Random weights do: the speed does not depend on them. Prints the median and the spread of the repeats.

    python tests/benchmark_fid.py [--batch 32] [--threads 2] [--device cpu]
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import fid


def timed(function, device, repeats=5):
    """Median, shortest and longest time of `function()` in seconds, after one call that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return np.median(seconds[1:]), min(seconds[1:]), max(seconds[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="images at once; default: 32")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; default: 2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    torch.manual_seed(0)
    net = fid.Inception().to(args.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    images = torch.randint(0, 256, (args.batch, 32, 32, 3), dtype=torch.uint8, device=args.device)
    function = lambda: net((fid.resize_tf1(images).permute(0, 3, 1, 2) - 128) / 128)
    median, shortest, longest = timed(function, args.device)
    print(f"Inception, 32x32 images, batch {args.batch}, {args.threads} threads, {args.device}, float32: "
          f"{args.batch / median:.1f} images/s ({args.batch / longest:.1f} to {args.batch / shortest:.1f})")

    rng = np.random.default_rng(0)
    scale = np.exp(-rng.uniform(0, 6, 2048))  # a spread of variances as features have it
    covariances = [np.cov(rng.normal(size=(4096, 2048)) * scale, rowvar=False) for _ in range(2)]
    a, b = (fid.Statistics(np.zeros(2048), covariance, "random") for covariance in covariances)
    median, shortest, longest = timed(lambda: fid.frechet_distance(a, b), "cpu")
    print(f"Frechet distance at 2048 dimensions: {median:.2f} s ({shortest:.2f} to {longest:.2f})")


if __name__ == "__main__":
    main()
