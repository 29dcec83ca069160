"""Run an exercise: train its rows with the stage scripts as a user would, measure them, print the table.

    python exercises/run.py divergences                        seed 0
    python exercises/run.py divergences --seeds 3              seeds 0, 1, 2; what is measured already is not run again
    python exercises/run.py order --rows "fresh z" "same z, same noise"
    python exercises/run.py --list                             all exercises and their rows
    python exercises/run.py --diff fresh-z                     a change of code, as a diff
    python exercises/run.py order --table --seeds 3            the table of what is measured; nothing is run
    python exercises/run.py momentum --results mine.jsonl      your own numbers instead of those in the repository

All rows start from the stage-1 network of `make demo`. A row is a run of fixed length (never the best checkpoint) in
runs/exercises, and a line of exercises/results/runs.jsonl: its measures (exercises/measure.py) and its distance over
training. A run that several exercises share is made once. Stopped, the same command continues it. The lines of the repository
are complete, so without --results nothing is run: with `--results mine.jsonl` the runs are made anew, in runs/exercises/mine.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WORK = ROOT  # runs/ is in it
sys.path[:0] = [str(ROOT), str(HERE)]
import changes  # noqa: E402
from machinery import checkpoints  # noqa: E402
from machinery import data  # noqa: E402
from machinery import files  # noqa: E402
import measure  # noqa: E402
from machinery import training  # noqa: E402
import sample  # noqa: E402
import verifier  # noqa: E402
from machinery.files import UserError  # noqa: E402

# ---------------------------------------------------------------------------------------------------------
# The settings of all exercises, as differences from the preset `digits` of the stage scripts.

STAGE1 = "runs/digits/pretrain/network.pt"  # of `make demo`
KIMG = 24  # length of every run, thousands of images
COMMON = f"--init {STAGE1} --kimg {KIMG} --batch 64"  # less than a third of the demo's time, with the rates falling over it
CURVE = f"--fid-every 4 --fid-features {STAGE1} --fid-images 1797"
SAMPLES = 3594  # of each generator: twice the data
ONE_LEVEL = "--p-mean 0.9163 --p-std 0.001"  # ln 2.5: a stage 1 at a single noise level, for the exercise `stage-1`
LEVELS = (0.1, 0.5, 1.0)  # noise levels at which the ratio network's calibration is read, for the exercise `ratio`

# {exercise: {row: (flags of the script, changes of its code)}}; a row with the change "teacher" runs teacher.py instead.
EXERCISES = {
    "divergences": {
        "DiJS": "", "DiKL": "--divergence dikl", "DiRM": "--divergence dirm", "forward KL": "--divergence fkl",
        "Jeffreys": ("--divergence jeffreys", "divergences"),
        "squared Hellinger": ("--divergence hellinger", "divergences"),
        "softened chi-square": ("--divergence lecam", "divergences"),
    },
    "stage-1": {
        "both from stage 1": "",
        "ratio network at random": "--ratio-init random",
        "generator at random": ("", "generator-random"),
        "both at random": ("--ratio-init random", "generator-random"),
        "generator from one level": ("", "generator-one-level"),
        "ratio network from one level": ("", "ratio-one-level"),
    },
    "gan": {
        "noise at all levels, saturating (DiJS)": "",
        "noise at all levels, non-saturating (DiRM)": "--divergence dirm",
        "no noise, saturating": "--p-mean -4.6 --p-std 0.001",
        "no noise, non-saturating": "--divergence dirm --p-mean -4.6 --p-std 0.001",
        "noise at all levels, ratio network at random": "--ratio-init random",
        "no noise, ratio network at random": "--ratio-init random --p-mean -4.6 --p-std 0.001",
    },
    "order": {
        "ratio step, then the same z": "",
        "fresh z": ("", "fresh-z"),
        "same z, same noise": ("", "same-noise"),
        "both at once": ("", "simultaneous"),
        "ratio on the samples before": ("", "stale-samples"),
    },
    "t-init": {f"t_init {t}": "" if t == "2.5" else f"--t-init {t}" for t in ("0.5", "1", "2.5", "5", "20", "80")},
    "noise": {
        "lognormal(-2, 1.2)": "--p-mean -2", "lognormal(-1.2, 1.2)": "", "lognormal(-0.4, 1.2)": "--p-mean -0.4",
        "Karras, share 0.5": "--noise karras --karras-share 0.5", "Karras, share 0.8": "--noise karras --karras-share 0.8",
        "0.1 only": "--p-mean -2.303 --p-std 0.001", "0.5 only": "--p-mean -0.693 --p-std 0.001",
    },
    "ratio": {
        "1 ratio step": "", "2 ratio steps": "--ratio-steps 2", "5 ratio steps": "--ratio-steps 5",
        "random, full width": "--ratio-init random",
        "random, half the width": "--ratio-init random --ratio-width 16",
        "random, a quarter of the width": "--ratio-init random --ratio-width 8",
        "frozen encoder": ("", "frozen-encoder"),
        "rate 1e-4": "--ratio-lr 1e-4", "rate 1e-3": "--ratio-lr 1e-3",
    },
    "momentum": {f"beta1 {b}": "" if b == "0" else f"--beta1 {b}" for b in ("0", "0.5", "0.9")},
    "teacher": {"DiffRatio": "", "VSD": ("--method vsd", "teacher"), "SiD": ("--method sid", "teacher")},
}  # fmt: skip
SHOWN = ("FD, classifier", "FD, stage 1", "precision", "recall", "nearest", "rarest class, %", "most frequent, %")  # of measure.py
EXTRA_COLUMNS = {  # beside these
    "ratio": {
        **{f"right at {s}, %": (lambda r, s=s: 100 * r["calibration"][str(s)]["accuracy"], "{:.1f}") for s in LEVELS},
        **{f"calibration error at {s}": (lambda r, s=s: r["calibration"][str(s)]["error"], "{:.3f}") for s in LEVELS},
        **{f"E_q[exp h] at {s}": (lambda r, s=s: r["calibration"][str(s)]["mean_ratio"], "{:.2f}") for s in LEVELS},
    },
    "noise": {
        f"right at sigma {band}, %": (lambda r, band=band: 100 * r["bands"][band] if band in r["bands"] else None, "{:.1f}")
        for band in ("<0.1", "0.1-0.3", "0.3-1.0", "1.0-3.0")
    },
}


# ---------------------------------------------------------------------------------------------------------
# A run.


def row_of(exercise, name):
    """(flags, changes) of a row."""
    row = EXERCISES[exercise][name]
    return (row, ()) if isinstance(row, str) else (row[0], row[1:])


def run_name(flags, names):
    """What identifies a run: its flags and its changes of code, also as the name of its folder."""
    return " ".join([*flags.replace("--", "").split(), *(f"+{name}" for name in names)]).replace(" ", "_") or "default"


def folder_of(flags, names, seed, results):
    """Where a run lies; those of each file of results apart, so that another file means another run."""
    return WORK / "runs" / "exercises" / Path(results).stem / f"{run_name(flags, names)}-{seed}"


def train(folder, flags, names, seed, length=()):
    """Run the stage script with these flags and changes of code, in this folder.

    length: further flags that come last, such as a shorter --kimg.
    """
    script = ROOT / "train_diffratio.py"
    if names == ("teacher",):
        script = HERE / "teacher.py"
    elif names:
        if any("one-level" in name for name in names):
            one_level(length)
        script = folder / "train_diffratio.py"
        with files.atomic(script) as part:
            part.write_text(changes.changed(names)[2])
    command = [sys.executable, str(script), *shlex.split(f"{COMMON} {CURVE} {flags}"), *length]
    call([*command, "--seed", str(seed), "--outdir", str(folder)])


def one_level(length=()):
    """Stage 1 at the noise level 2.5 alone, for as many images as that of `make demo`; nothing is done if it is there."""
    folder = (WORK / changes.ONE_LEVEL).parent
    call([sys.executable, str(ROOT / "pretrain.py"), *ONE_LEVEL.split(), *length, "--outdir", str(folder)])


def call(command):
    """Run a script in a process of its own; its output goes through. An error of it ends this one, with its exit code."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # where a changed copy finds the others
    process = subprocess.Popen(command, cwd=WORK, env={**os.environ, "PYTHONPATH": path})
    while process.poll() is None:
        with contextlib.suppress(KeyboardInterrupt):  # the script has had it too, and stops with a checkpoint
            process.wait()
    if (code := process.returncode) < 0:  # a crash, or killed: the script itself had no time to say so
        print(f"run.py: {command[1]} was ended by signal {-code} ({signal.strsignal(-code)})", file=sys.stderr)
    if code:
        sys.exit(code if code > 0 else 128 - code)


@torch.no_grad()
def calibration(folder, dataset, seed):
    """Of the ratio network, on fresh samples, at each of LEVELS: {level: {accuracy, error, mean_ratio}}.

    error and mean_ratio: as `verifier.calibration` says. The samples are those of the averaged generator.
    """
    net = checkpoints.load_network(folder / "network.pt", role="generator")
    ratio = checkpoints.load_network(folder / "ratio.pt", role="ratio")
    indices = range(10_000, 10_000 + len(dataset))  # others than those that are measured
    fake = torch.cat([x for x, _ in sample.in_batches(net, indices, seed, "cpu", 300)])
    real, result = dataset.to_model(dataset.batch(np.arange(len(dataset)))[0], "cpu"), {}
    for level in LEVELS:
        generator = training.rng("cpu", seed, "calibration", str(level))
        noised = [x + level * torch.randn(x.shape, generator=generator) for x in (real, fake)]
        h_real, h_fake = (torch.cat([ratio(a, torch.full((len(a),), level)) for a in x.split(300)]) for x in noised)
        found = verifier.calibration(h_real, h_fake)
        accuracy = ((h_real > 0).float().mean() + (h_fake < 0).float().mean()) / 2
        result[str(level)] = dict(accuracy=accuracy.item(), error=found["calibration_error"], mean_ratio=found["mean_ratio"])
    return result


def measured(folder, measures, seed):
    """The line of a finished run."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [line for line in log if "images_per_second" in line]
    if steps[-1]["nimg"] // 1000 != KIMG:
        raise UserError(f"{folder} is a run of {steps[-1]['nimg'] / 1000:g} instead of {KIMG} kimg; remove it")
    net = checkpoints.load_network(folder / "network.pt", role="generator")
    images = np.concatenate([data.to_uint8(x) for x, _ in sample.in_batches(net, range(SAMPLES), seed, "cpu", 300)])
    line = dict(measures(images), curve=[[line["nimg"], line["fid"]] for line in log if "fid" in line])
    if "bands" in steps[-1]:  # of a method with a ratio network
        line["bands"] = {name: band["accuracy"] for name, band in steps[-1]["bands"].items()}
        line["calibration"] = calibration(folder, measures.train, seed)
    return line


def results(path):
    """{(run, seed): its line} of a file of results."""
    return {(line["run"], line["seed"]): line for line in files.json_lines(path, "run", "seed")}


def table(exercise, rows, found, seeds):
    """The exercise's table, of those seeds of each row that are measured."""
    columns = {**{name: measure.COLUMNS[name] for name in SHOWN}, **EXTRA_COLUMNS.get(exercise, {})}
    lines = {name: [found[key] for seed in range(seeds) if (key := (run_name(*row_of(exercise, name)), seed)) in found] for name in rows}
    return measure.table({name: line for name, line in lines.items() if line}, columns)


def main():
    parser = training.Parser(__doc__)
    add = parser.add_argument
    add("exercise", nargs="?", choices=list(EXERCISES), help="which one")
    add("--seeds", type=training.positive(int), default=1, metavar="N", help="seeds 0 to N - 1")
    add("--first-seed", type=int, default=0, metavar="N", help="leave out those before N, for two processes side by side (after `stage-1` has "
        "made its network of one level)")  # fmt: skip
    add("--rows", nargs="+", metavar="ROW", help="only these rows (default: all)")
    add("--results", default=str(HERE / "results" / "runs.jsonl"), metavar="PATH", help="where the lines are read and added")
    add("--table", action="store_true", help="print the table of what is measured, and run nothing")
    add("--list", action="store_true", help="print all exercises with their rows")
    add("--diff", choices=list(changes.CHANGES), metavar="CHANGE", help="print a change of code")
    args = parser.parse_args()
    if args.list:
        for exercise, rows in EXERCISES.items():
            print(f"{exercise:12} {' | '.join(rows)}")
        return
    if args.diff:
        print(changes.diff([args.diff]))
        return
    if not args.exercise:
        parser.error("say which exercise: " + ", ".join(EXERCISES))
    rows = args.rows or list(EXERCISES[args.exercise])
    if unknown := set(rows) - EXERCISES[args.exercise].keys():
        parser.error(f"--rows: no row {sorted(unknown)[0]!r} in {args.exercise}; there are: {' | '.join(EXERCISES[args.exercise])}")
    if not args.table:
        run_all(args, rows)
    print(table(args.exercise, rows, results(args.results), args.seeds))


def run_all(args, rows):
    """Train and measure the rows that have no line yet."""
    if not (WORK / STAGE1).exists():
        raise UserError(f"the exercises start from {STAGE1}, which is missing; run `make demo` first, or `python pretrain.py`")
    Path(args.results).parent.mkdir(parents=True, exist_ok=True)
    measures = None
    for seed in range(args.first_seed, args.seeds):
        for name in rows:
            flags, names = row_of(args.exercise, name)
            run = run_name(flags, names)
            if (run, seed) in results(args.results):
                continue
            print(f"\n--- {args.exercise}: {name}, seed {seed}", flush=True)
            start = time.monotonic()
            folder = folder_of(flags, names, seed, args.results)
            train(folder, flags, names, seed)
            measures = measures or measure.Measures("digits", WORK / STAGE1)
            line = dict(run=run, seed=seed, **measured(folder, measures, seed))
            with open(args.results, "a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"--- {name}, seed {seed}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    training.run(main)
