"""Draw an exercise of run.py: distance over training with the band over seeds, and samples of each row side by side.

    python exercises/figures.py order             assets/exercises/order.png

The curves come from exercises/results/runs.jsonl, the samples from the runs of seed 0 in runs/exercises/runs, if they are
there. The curves of `teacher` are over time. Needs matplotlib (`make exercises`).
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import measure  # noqa: E402
import plane  # noqa: E402
import run  # noqa: E402
import sample  # noqa: E402
from machinery import checkpoints, data, training  # noqa: E402
from machinery.files import UserError  # noqa: E402

COLUMNS = 12  # samples of a row in the picture


def samples(folder):
    """One row of samples of a run, uint8 [H, COLUMNS * (W + 1)]."""
    net = checkpoints.load_network(folder / "network.pt", role="generator")
    images = data.to_uint8(next(sample.in_batches(net, range(COLUMNS), 0, "cpu", COLUMNS))[0])[..., 0]
    return np.pad(images, ((0, 0), (0, 0), (0, 1)), constant_values=255).transpose(1, 0, 2).reshape(images.shape[1], -1)


def draw(exercise, results, path):
    """Write the picture of an exercise, from the file `results` and the runs that belong to it."""
    plt, runs = plane.pyplot(), run.by_run(run.results(results))
    rows = {name: run.row_of(exercise, name) for name in run.EXERCISES[exercise]}
    curves = {name: [line["curve"] for line in runs.get(run.run_name(*row), [])] for name, row in rows.items()}
    if not any(curves.values()):
        raise UserError(f"{results} holds no results of {exercise}; "
                        f"`python exercises/run.py {exercise} --results {results}` trains and measures")
    folders = {name: run.folder_of(*row, 0, results) for name, row in rows.items()}
    folders = {name: folder for name, folder in folders.items() if (folder / "network.pt").exists()}
    figure = plt.figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    left, right = figure.subfigures(1, 2)
    axes, seconds = left.subplots(), {}
    if exercise == "teacher":  # seconds per thousand images, as `teacher.py --cost digits` measured them side by side
        costs = {row["method"]: 1000 * row["seconds_per_image"] for row in measure.json_lines(HERE / "results" / "teacher-cost.jsonl")}
        seconds = {name: costs[name.lower()] for name in rows}
    for i, (name, seeds) in enumerate(curves.items()):
        if seeds:
            x, values = np.array(seeds[0])[:, 0] / 1000 * seconds.get(name, 1), np.array(seeds)[:, :, 1]
            axes.plot(x, np.exp(np.log(values).mean(axis=0)), label=name, color=f"C{i}")  # the mean of a log axis
            axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=f"C{i}", alpha=0.15, linewidth=0)
    axes.set(xlabel="seconds on one core" if seconds else "thousand images", ylabel="FD (stage 1)", yscale="log")
    axes.grid(alpha=0.3)
    left.legend(fontsize=7, loc="outside lower center", ncols=2)  # over no curve
    for axis, (name, folder) in zip(right.subplots(len(folders), 1, squeeze=False).flat if folders else (), folders.items()):
        axis.imshow(samples(folder), cmap="gray", vmin=0, vmax=255)
        axis.set_title(name, fontsize=7, loc="left", pad=2)
        axis.axis("off")
    plane.save(figure, Path(path), "figure")
    plt.close(figure)


def main():
    parser = training.Parser(__doc__, dict(
        results=(str(run.REFERENCE), "the lines of run.py"),
        out=(None, "the picture (default: assets/exercises/NAME.png)", str)))
    parser.add_argument("exercise", choices=list(run.EXERCISES), help="which one")
    args = parser.parse_args()
    out = Path(args.out or HERE.parent / "assets" / "exercises" / f"{args.exercise}.png")
    draw(args.exercise, args.results, out)


if __name__ == "__main__":
    training.run(main)
