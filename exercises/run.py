"""Run an exercise: train its rows with train_diffratio.py as a user would, measure them, print the table.

    python exercises/run.py 5                                  our reference results of exercise 5; nothing is run
    python exercises/run.py 5 --results my-runs.jsonl          train and measure yours, seed 0
    python exercises/run.py order --results my-runs.jsonl --seeds 3 --rows "fresh z" "same z, same noise"
    python exercises/run.py --list                             all exercises and their rows
    python exercises/run.py --diff fresh-z                     a change of code, as a diff

All rows start from assets/digits-stage1.pt. A row is a run of fixed length in runs/exercises/NAME, where NAME is
that of the results file, and a line of this file: its measures (exercises/measure.py) and its distance over training. A run
that several exercises share is made once, and what has a line is not run again. After a stop the same command continues.
"""

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
import measure  # noqa: E402
import sample  # noqa: E402
import verifier  # noqa: E402
from machinery import checkpoints, data, files, training  # noqa: E402
from machinery.files import UserError  # noqa: E402

# ---- Settings, as differences from the preset `digits` -----------------------------------------------

STAGE1 = "assets/digits-stage1.pt"  # pretrain.py --kimg 200, in half precision
KIMG = 24  # length of every run, thousands of images
COMMON = f"--init {STAGE1} --kimg {KIMG} --batch 64"
CURVE = f"--fid-every 4 --fid-features {STAGE1} --fid-images 1797"
SAMPLES = 3594  # of each generator: twice the data
ONE_LEVEL = "--kimg 200 --p-mean 0.9163 --p-std 0.001"  # ln 2.5: a stage 1 at a single noise level, for the exercise `stage-1`
LEVELS = (0.1, 0.5, 1.0)  # noise levels at which the ratio network's calibration is measured
REFERENCE = HERE / "results" / "runs.jsonl"
NUMBERS = {  # of the pages in exercises/: names below, or a program of its own
    "0": "warmups.py", "1": "plane.py", "2": "divergences", "3": "stage-1", "4": "gan", "5": "order momentum", "6": "t-init",
    "7": "noise", "8": "ratio", "10": "teacher", "11": "verifier.py",
}

# {exercise: {row: (flags of the script, changes of its code)}}; a row with the change "teacher" runs teacher.py instead.
EXERCISES = {
    "divergences": {
        "DiJS": "", "DiKL": "--divergence dikl", "DiRM": "--divergence dirm", "forward KL": "--divergence fkl",
        "Jeffreys": ("--divergence jeffreys", "divergences"),
        "squared Hellinger": ("--divergence hellinger", "divergences"),
        "softened chi-square": ("--divergence lecam", "divergences"),
    },
    "stage-1": {
        "both from stage 1": "", "ratio network at random": "--ratio-init random",
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
        "ratio network at random": "--ratio-init random", "frozen encoder": ("", "frozen-encoder"),
        "rate 1e-4": "--ratio-lr 1e-4", "rate 1e-3": "--ratio-lr 1e-3",
    },
    "momentum": {f"beta1 {b}": "" if b == "0" else f"--beta1 {b}" for b in ("0", "0.5", "0.9")},
    "teacher": {"DiffRatio": "", "VSD": ("--method vsd", "teacher"), "SiD": ("--method sid", "teacher")},
}
# Columns of measure.py, and more of some exercises: {heading: (value in a line, format)}.
SHOWN = ("FD (classifier)", "FD (stage 1)", "precision", "recall", "nearest", "rarest class, %", "most frequent, %")
EXTRA_COLUMNS = {
    "ratio": {
        "right at 0.1, %": (lambda r: 100 * r["calibration"]["0.1"]["accuracy"], "{:.1f}"),
        "calibration error at 0.1": (lambda r: r["calibration"]["0.1"]["error"], "{:.3f}"),
        "E_q[exp h] at 0.1": (lambda r: r["calibration"]["0.1"]["mean_ratio"], "{:.2f}"),
    },
    "noise": {
        f"right at sigma {band}, %": (lambda r, band=band: 100 * r["bands"][band] if band in r["bands"] else None, "{:.1f}")
        for band in ("<0.1", "0.1-0.3", "0.3-1.0", "1.0-3.0")
    },
}


def row_of(exercise, name):
    """(flags, changes) of a row."""
    row = EXERCISES[exercise][name]
    return (row, ()) if isinstance(row, str) else (row[0], row[1:])


def run_name(flags, names):
    """Name of a run and of its folder: its flags and its changes of code."""
    return " ".join([*flags.replace("--", "").split(), *(f"+{name}" for name in names)]).replace(" ", "_") or "default"


def folder_of(flags, names, seed, results):
    """Folder of a run; another file of results means another run."""
    return WORK / "runs" / "exercises" / Path(results).stem / f"{run_name(flags, names)}-{seed}"


def train(folder, flags, names, seed, length=()):
    """Run the stage script with these flags and changes of code, in this folder.

    length: further flags that come last, such as a shorter --kimg.
    """
    script, one_step = ROOT / changes.SCRIPT, "--ratio-steps 1"  # the preset takes two
    if names == ("teacher",):
        script, one_step = HERE / "teacher.py", ""
    elif names:
        if any("one-level" in name for name in names):  # a finished stage 1 is not trained again
            outdir = (WORK / changes.ONE_LEVEL).parent
            call([sys.executable, str(ROOT / "pretrain.py"), *ONE_LEVEL.split(), *length, "--outdir", str(outdir)])
        script = folder / changes.SCRIPT
        with files.atomic(script) as part:
            part.write_text(changes.changed(names)[1])
    command = [sys.executable, str(script), *shlex.split(f"{COMMON} {CURVE} {one_step} {flags}"), *length]
    call([*command, "--seed", str(seed), "--outdir", str(folder)])


def call(command):
    """Run a script in a process of its own. If it fails, this one ends with its exit code."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # for imports of a changed copy
    process = subprocess.Popen(command, cwd=WORK, env={**os.environ, "PYTHONPATH": path})
    while process.poll() is None:
        try:
            process.wait()
        except training.Stopped as stop:  # the script stops with a checkpoint; Ctrl-C has reached it already
            if stop.args[1] != signal.SIGINT:
                process.send_signal(stop.args[1])
    if (code := process.returncode) < 0:  # it crashed or was killed, without a message of its own
        print(f"run.py: {command[1]} was ended by signal {-code} ({signal.strsignal(-code)})", file=sys.stderr)
    if code:
        sys.exit(code if code > 0 else 128 - code)


@torch.no_grad()
def calibration(folder, dataset, seed):
    """Of a run's ratio network, on data and fresh samples of the averaged generator: {level: {accuracy, error, mean_ratio}}.

    accuracy: how often it is right; 0.5 is blind. error and mean_ratio: see `verifier.calibration`.
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


def table(exercise, rows, path):
    """The exercise's table, of all seeds that the results file `path` holds."""
    columns = {**{name: measure.COLUMNS[name] for name in SHOWN}, **EXTRA_COLUMNS.get(exercise, {})}
    found = results(path)
    lines = {name: [line for (run, _), line in found.items() if run == run_name(*row_of(exercise, name))] for name in rows}
    if not any(lines.values()):
        raise UserError(f"{path} holds no results of {exercise}; without --table they are trained and measured")
    return measure.table({name: line for name, line in lines.items() if line}, columns)


def main():
    parser = training.Parser(__doc__, dict(
        results=(None, "train and measure what this file lacks, and add it (default: print our reference results)", str),
        seeds=(1, "seeds 0 to N - 1"),
        first_seed=(0, "leave out seeds below this, for two processes side by side", training.integer),
        table=(False, "print what --results holds and run nothing"),
        list=(False, "print all exercises with their rows"),
        diff=(None, "print a change of code", list(changes.CHANGES))))
    parser.add_argument("exercise", nargs="?", choices=[*NUMBERS, *EXERCISES], metavar="EXERCISE", help="number or name")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows (default: all)")
    args = parser.parse_args()
    if args.list:
        numbers = {name: number for number, names in NUMBERS.items() for name in names.split()}
        print("\n".join(f"{numbers[name]:>2} {name:12} {' | '.join(rows)}" for name, rows in EXERCISES.items()))
        return
    if args.diff:
        print(changes.diff([args.diff]))
        return
    if not args.exercise:
        parser.error("say which exercise: a number or one of " + ", ".join(EXERCISES))
    names = NUMBERS.get(args.exercise, args.exercise)
    if names.endswith(".py"):
        parser.error(f"exercise {args.exercise} has a program of its own: python exercises/{names}")
    known = [row for name in names.split() for row in EXERCISES[name]]
    if unknown := set(args.rows or ()) - set(known):
        parser.error(f"--rows: no row {min(unknown)!r} in {names}; there are: {' | '.join(known)}")
    rows = {name: [row for row in EXERCISES[name] if row in (args.rows or known)] for name in names.split()}
    if args.results and not args.table:
        run_all(args, rows)
    elif not args.results:
        print("Reference results of the authors: nothing was run. --results my-runs.jsonl trains and measures yours.")
    for name, wanted in rows.items():
        if wanted:
            print(f"\n{name}\n\n{table(name, wanted, args.results or REFERENCE)}")


def run_all(args, rows):
    """Train and measure the rows {exercise: names} that have no line yet."""
    if not (WORK / STAGE1).exists():
        raise UserError(f"{STAGE1} is missing; get it from the repository")
    Path(args.results).parent.mkdir(parents=True, exist_ok=True)
    measures = None
    for seed in range(args.first_seed, args.seeds):
        for exercise, name in ((exercise, name) for exercise in rows for name in rows[exercise]):
            flags, names = row_of(exercise, name)
            run = run_name(flags, names)
            if (run, seed) in results(args.results):
                continue
            print(f"\n--- {exercise}: {name}, seed {seed}", flush=True)
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
