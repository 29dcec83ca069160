"""Draw an exercise of run.py: distance over training with the band over seeds, and samples of each row side by side.

    python exercises/figures.py order             assets/exercises/order.png

The curves come from exercises/results/runs.jsonl, the samples from the runs of seed 0 in runs/exercises/runs, if they are
there. The curves of `teacher` are over time. Needs matplotlib (`make exercises`).
"""

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import plane  # noqa: E402
import run  # noqa: E402
import sample  # noqa: E402
from machinery import checkpoints, data, training  # noqa: E402
from machinery.files import UserError, atomic  # noqa: E402

COLUMNS = 12  # samples of a row in the picture


def samples(folder):
    """One row of samples of a run, uint8 [H, COLUMNS * (W + 1)], or None if it is not there."""
    if not (folder / "network.pt").exists():
        return None
    net = checkpoints.load_network(folder / "network.pt", role="generator")
    images = data.to_uint8(next(sample.in_batches(net, range(COLUMNS), 0, "cpu", COLUMNS))[0])[..., 0]
    return np.pad(images, ((0, 0), (0, 0), (0, 1)), constant_values=255).transpose(1, 0, 2).reshape(images.shape[1], -1)


def iteration_seconds():
    """{row of the exercise `teacher`: seconds per thousand images}, as `teacher.py --cost digits` measured them side by side."""
    rows = map(json.loads, (HERE / "results" / "teacher-cost.jsonl").read_text().splitlines())
    names = {"diffratio": "DiffRatio", "vsd": "VSD", "sid": "SiD"}
    return {names[row["method"]]: 1000 * row["seconds_per_image"] for row in rows}


def draw(exercise, results, path):
    """Write the picture of an exercise, from the file `results` and the runs that belong to it."""
    plt = plane.pyplot()
    rows = {name: run.run_name(*run.row_of(exercise, name)) for name in run.EXERCISES[exercise]}
    found = run.results(results)
    curves = {name: [line["curve"] for (key, _), line in found.items() if key == rows[name]] for name in rows}
    if not any(curves.values()):
        raise UserError(f"{results} holds no results of {exercise}; "
                        f"`python exercises/run.py {exercise} --results {results}` trains and measures")
    grids = {name: samples(run.folder_of(*run.row_of(exercise, name), 0, results)) for name in rows}
    shown = {name: grid for name, grid in grids.items() if grid is not None}
    seconds = iteration_seconds() if exercise == "teacher" else {}
    figure = plt.figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    left, right = figure.subfigures(1, 2)
    axes = left.subplots()
    for i, (name, seeds) in enumerate(curves.items()):
        if seeds:
            kimg = np.array(seeds[0])[:, 0] / 1000 * seconds.get(name, 1)
            values = np.array(seeds)[:, :, 1]
            axes.plot(kimg, np.exp(np.log(values).mean(axis=0)), label=name, color=f"C{i}")  # the mean of a log axis
            axes.fill_between(kimg, values.min(axis=0), values.max(axis=0), color=f"C{i}", alpha=0.15, linewidth=0)
    axes.set(xlabel="seconds on one core" if seconds else "thousand images", ylabel="FD (stage 1)", yscale="log")
    axes.grid(alpha=0.3)
    left.legend(fontsize=7, loc="outside lower center", ncols=2)  # over no curve
    panels = np.atleast_1d(right.subplots(max(len(shown), 1), 1))
    for axis, (name, grid) in zip(panels, shown.items()):
        axis.imshow(grid, cmap="gray", vmin=0, vmax=255)
        axis.set_title(name, fontsize=7, loc="left", pad=2)
    for axis in panels:
        axis.axis("off")
    with atomic(path) as part:
        figure.savefig(part, format="png")
    plt.close(figure)


def main():
    parser = training.Parser(__doc__, dict(
        results=(str(run.REFERENCE), "the lines of run.py"),
        out=(None, "the picture (default: assets/exercises/NAME.png)", str)))
    parser.add_argument("exercise", choices=list(run.EXERCISES), help="which one")
    args = parser.parse_args()
    out = Path(args.out or HERE.parent / "assets" / "exercises" / f"{args.exercise}.png")
    draw(args.exercise, args.results, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    training.run(main)
