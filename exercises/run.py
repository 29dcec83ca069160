"""Run an exercise: train its rows as a user would, measure them, print the table and whether yours lie where they should.

    python exercises/run.py 5                                  our reference results of exercise 5; nothing is run
    python exercises/run.py 5 --results my-runs.jsonl          train and measure its rows, seed 0
    python exercises/run.py 5 --results my-runs.jsonl --mine   the same of your working copy, whatever you changed in it
    python exercises/run.py 2 --results my-runs.jsonl --mine "--divergence hellinger"          with flags of your own

Rows without --mine run the pristine scripts (exercises/changes.py), so an edit of yours changes none of them. A row is a run
in a folder of runs/exercises/RESULTS and a line of RESULTS, both with a hash of scripts and flags. What has a line of the same
hash is not run again; other code or flags are another run. After a stop the same command continues.
"""

import datetime
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from project import HERE, ROOT
import changes

WORK = ROOT  # runs/ is in it

if __name__ == "__main__":  # an edit of a script changes nothing that measures
    sys.path.insert(0, str(changes.unpack(WORK)))
import sample
from machinery import checkpoints, data, files, training
from machinery.files import UserError
import measure
import plane
import verifier
from scipy import stats

# ---- Settings, as differences from the preset `digits` -----------------------------------------------

STAGE1 = "assets/digits-stage1.pt"  # pretrain.py --kimg 200, in half precision
KIMG = 24  # length of a run, thousands of images; --short: a quarter
COMMON = f"--init {STAGE1} --kimg {KIMG} --batch 64"
CURVE = f"--fid-every 4 --fid-features {STAGE1} --fid-images 1797"
SAMPLES = 3594  # of each generator: twice the data
ONE_LEVEL = "--kimg 200 --p-mean 0.9163 --p-std 0.001"  # ln 2.5: a stage 1 at a single noise level, for the exercise `stage-1`
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
        "2 ratio steps, equal time": "--ratio-steps 2 --kimg 17",  # 24 / 1.4: an iteration costs 1.4 times as much
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


def row_of(exercise, name, short=False):
    """(flags, changes) of a row."""
    row = EXERCISES[exercise][name]
    flags, *names = (row,) if isinstance(row, str) else row
    return shortened(flags) if short else flags, tuple(names)


def shortened(flags):
    """The flags of a quarter of the length."""
    return f"{flags} --kimg {kimg_of(flags) / 4:g}".strip()


def kimg_of(flags):
    return float(re.findall(r"--kimg ([\d.]+)", f"--kimg {KIMG} {flags}")[-1])


def run_name(flags, names):
    """Name of a run: its flags and its changes of code; of a working copy its hash as well."""
    name = "_".join([*flags.replace("--", "").replace("/", "-").split(), *(f"+{name}" for name in names)]) or "default"
    return f"{name}_{hash_of(flags, names)}" if "mine" in names else name


def hash_of(flags, names):
    """Hash of what a run runs: the scripts with their changes, the flags."""
    scripts = changes.texts(ROOT) if "mine" in names else changes.pristine()
    for name in set(names) & set(changes.CHANGES):
        scripts[f"{changes.SCRIPT} +{name}"] = repr(changes.CHANGES[name])
    return changes.fingerprint(scripts, COMMON, CURVE, flags, "teacher" in names)


def folder_of(flags, names, seed, results):
    """Folder of a run. Another file of results, other scripts or other flags mean another one."""
    name = f"{run_name(flags, names)}_{hash_of(flags, names)}-{seed}"
    return WORK / "runs" / "exercises" / Path(results).stem / name


def train(folder, flags, names, seed, length=()):
    """Run the stage script with these flags in this folder: pristine with the changes `names`, or the working copy ("mine").

    length: further flags that come last, such as a shorter --kimg.
    """
    root = ROOT if "mine" in names else changes.unpack(WORK)
    script, one_step = root / changes.SCRIPT, "--ratio-steps 1"  # the preset takes two
    if "teacher" in names:
        script, one_step = root / "exercises" / "teacher.py", ""
    elif edits := [name for name in names if name != "mine"]:
        if any("one-level" in name for name in edits):  # a finished stage 1 is not trained again
            outdir = (WORK / changes.ONE_LEVEL).parent
            call([sys.executable, str(root / "pretrain.py"), *ONE_LEVEL.split(), *length, "--outdir", str(outdir)], root)
        script = folder / changes.SCRIPT
        with files.atomic(script) as part:
            part.write_text(changes.changed(edits)[1])
    command = [sys.executable, str(script), *shlex.split(f"{COMMON} {CURVE} {one_step} {flags}"), *length]
    call([*command, "--seed", str(seed), "--outdir", str(folder)], root)


def call(command, root):
    """Run a script that imports from `root`, in a process of its own. If it fails, this one ends with its exit code."""
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))  # for imports of a changed copy
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


def calibration(folder, dataset, seed):
    """{"0.1": `verifier.calibration` of a run's ratio network at that level, on data and fresh samples of the averaged generator}."""
    net = checkpoints.load_network(folder / "network.pt", role="generator")
    ratio = checkpoints.load_network(folder / "ratio.pt", role="ratio")
    indices = range(10_000, 10_000 + len(dataset))  # others than those that are measured
    fake = torch.cat([x for x, _ in sample.in_batches(net, indices, seed, "cpu", 300)])
    real = dataset.to_model(dataset.batch(np.arange(len(dataset)))[0], "cpu")
    both = [verifier.logits(ratio, x[:, None], 0.1, (seed, side))[:, 0] for side, x in enumerate((real, fake))]
    return {"0.1": verifier.calibration(*both)}


def measured(folder, flags, measures, seed):
    """The measures of a finished run."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [line for line in log if "images_per_second" in line]
    if abs(steps[-1]["nimg"] / 1000 - kimg_of(flags)) > 0.1:  # the loop of --mine may end early
        raise UserError(f"{folder} is a run of {steps[-1]['nimg'] / 1000:g} instead of {kimg_of(flags):g} kimg; remove it")
    net = checkpoints.load_network(folder / "network.pt", role="generator")
    images = np.concatenate([data.to_uint8(x) for x, _ in sample.in_batches(net, range(SAMPLES), seed, "cpu", 300)])
    line = dict(measures(images), curve=[[line["nimg"], line["fid"]] for line in log if "fid" in line])
    if "bands" in steps[-1]:  # of a method with a ratio network
        line["bands"] = {name: band["accuracy"] for name, band in steps[-1]["bands"].items()}
        line["calibration"] = calibration(folder, measures.train, seed)
    return line


# ---- Results: tables, intervals ----------------------------------------------------------------------

# {heading: whether it varies by a factor, so that its logarithm is taken}
JUDGED = {"FD (classifier)": True, "FD (stage 1)": True, "precision": False, "recall": False}
FAR = 30  # FD (classifier) from which on runs of one setting differ more


def results(path):
    """{(run, seed): its newest line} of a file of results."""
    return {(line["run"], line["seed"]): line for line in measure.json_lines(path, "run", "seed")}


def by_run(found):
    """{run: its lines} of `results`."""
    return {run: [line for (name, _), line in found.items() if name == run] for run, _ in found}


def intervals(runs):
    """{run: {heading: (low, high)}}: where 95 % of single further runs lie, from {run: lines of its n seeds}.

    mean +- t s sqrt(1 + 1/n) (Hahn and Meeker, Statistical Intervals, 1991, section 4.7). Three seeds give no deviation s of
    their own: it is pooled over the rows whose mean FD (classifier) is below `FAR`, or over those above. Distances: of the log.
    """
    result = {}
    for far in (False, True):
        group = {run: lines for run, lines in runs.items()
                 if len(lines) > 1 and (np.mean([line["fd_classifier"] for line in lines]) >= FAR) == far}
        freedom = sum(len(lines) - 1 for lines in group.values())
        for heading, factor in JUDGED.items():
            values = {run: np.array([measure.COLUMNS[heading][0](line) for line in lines]) for run, lines in group.items()}
            values = {run: np.log(found) if factor else found for run, found in values.items()}
            if freedom:
                s = (sum(((found - found.mean()) ** 2).sum() for found in values.values()) / freedom) ** 0.5
            for run, found in values.items():
                half = stats.t.ppf(0.975, freedom) * s * (1 + 1 / len(found)) ** 0.5
                ends = found.mean() - half, found.mean() + half
                result.setdefault(run, {})[heading] = tuple(np.exp(ends) if factor else np.clip(ends, 0, 1))
    return result


def between(heading, expected):
    """Text of an interval of `intervals`."""
    (low, high), (_, form) = expected[heading], measure.COLUMNS[heading]
    form = "{:.0f}" if form == "{:.1f}" and high > 150 else form
    return f"{form.format(low)} to {form.format(high)}"


def judged(heading, line, expected):
    """Text: the value of a line and whether it lies in its interval."""
    (low, high), (value, form) = expected[heading], measure.COLUMNS[heading]
    return f"{form.format(value(line))} {'inside' if low <= value(line) <= high else 'OUTSIDE'} {between(heading, expected)}"


def table(exercise, rows, path, short=False):
    """The exercise's tables, of all seeds that the results file `path` holds; None if it holds none of these rows."""
    columns = {**{name: measure.COLUMNS[name] for name in SHOWN}, **EXTRA_COLUMNS.get(exercise, {})}
    runs, expected = by_run(results(path)), intervals(by_run(results(REFERENCE)))
    names = {name: run_name(*row_of(exercise, name, short)) for name in rows}
    names |= {f"mine {lines[0]['hash'][:6]} {lines[0]['flags']}".strip(): run
              for run, lines in runs.items() if "+mine" in run and lines[0].get("exercise") == exercise}
    found = {name: runs[run] for name, run in names.items() if run in runs}
    if not found:
        return None
    known, text = [name for name in found if names[name] in expected], [measure.table(found, columns)]
    if Path(path).resolve() == REFERENCE:
        text.append("95 % of single runs of one more seed lie in these intervals:")
        cells = {name: [between(heading, expected[names[name]]) for heading in JUDGED] for name in known}
    else:
        cells = {f"{name}, seed {line['seed']}": [judged(heading, line, expected[names[name]]) for heading in JUDGED]
                 for name in known for line in found[name]}
        inside = [" inside " in cell for row in cells.values() for cell in row]
        text.append(f"{sum(inside)} of {len(inside)} cells lie inside the interval of our results, which holds 95 % of honest runs:")
    if known:
        text.append(measure.markdown(JUDGED, cells))
    if without := [name for name in found if name not in known]:
        text = [*text[: None if known else 1], f"no reference exists for: {', '.join(without)}"]
    return "\n\n".join(text)


# ---- Pictures ----------------------------------------------------------------------------------------


def strip(folder):
    """Twelve samples of a run side by side, uint8 [H, 12 * (W + 1)]."""
    net = checkpoints.load_network(folder / "network.pt", role="generator")
    images = data.to_uint8(next(sample.in_batches(net, range(12), 0, "cpu", 12))[0])[..., 0]
    return np.pad(images, ((0, 0), (0, 0), (0, 1)), constant_values=255).transpose(1, 0, 2).reshape(images.shape[1], -1)


def draw(exercise, path, picture):
    """Draw the distance over training of the lines of `path`, with the band over seeds, and samples of their runs of seed 0."""
    plt, runs = plane.pyplot(), by_run(results(path))
    rows = {name: row_of(exercise, name) for name in EXERCISES[exercise]}
    folders = {name: folder_of(*row, 0, path) for name, row in rows.items()}
    folders = {name: folder for name, folder in folders.items() if (folder / "network.pt").exists()}
    figure = plt.figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    left, right = figure.subfigures(1, 2)
    axes = left.subplots()
    seconds = {}
    if exercise == "teacher":  # per thousand images, measured side by side
        costs = {row["method"]: 1000 * row["seconds_per_image"] for row in measure.json_lines(REFERENCE.with_name("teacher-cost.jsonl"))}
        seconds = {name: costs[name.lower()] for name in rows}
    for i, (name, row) in enumerate(rows.items()):
        if seeds := [line["curve"] for line in runs.get(run_name(*row), [])]:
            x, values = np.array(seeds[0])[:, 0] / 1000 * seconds.get(name, 1), np.array(seeds)[:, :, 1]
            axes.plot(x, np.exp(np.log(values).mean(axis=0)), label=name, color=f"C{i}")  # the mean of a log axis
            axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=f"C{i}", alpha=0.15, linewidth=0)
    axes.set(xlabel="seconds on one core" if seconds else "thousand images", ylabel="FD (stage 1)", yscale="log")
    axes.grid(alpha=0.3)
    left.legend(fontsize=7, loc="outside lower center", ncols=2)  # over no curve
    for axis, (name, folder) in zip(right.subplots(len(folders), 1, squeeze=False).flat if folders else (), folders.items()):
        axis.imshow(strip(folder), cmap="gray", vmin=0, vmax=255)
        axis.set_title(name, fontsize=7, loc="left", pad=2)
        axis.axis("off")
    plane.save(figure, picture, "figure")
    plt.close(figure)


# ---- Predictions and submissions ---------------------------------------------------------------------


def now():
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def predictions(path):
    """The file of the predictions that belong to a file of results."""
    return Path(path).with_suffix(".predictions.jsonl")


def predict(args, exercises):
    """Store a prediction, with the time. Refused once there is a result of the exercise."""
    if any(line.get("exercise") in exercises for line in results(args.results).values()):
        raise UserError(f"{args.results} holds results of {' and '.join(exercises)} already; a prediction comes before them")
    text = Path(args.predict).read_text() if Path(args.predict).is_file() else args.predict
    measure.add_lines(predictions(args.results), dict(exercise=args.exercise, time=now(), prediction=text.strip()))
    print(f"stored in {predictions(args.results)}; now the rows: the same command without --predict")


def submit(args, exercises, rows):
    """Write one JSON file: predictions, lines and logs of the exercise, the working copy's present diff and hash."""
    runs = {run_name(*row_of(name, row, args.short)) for name in exercises for row in rows[name]}
    lines = [line for (run, _), line in results(args.results).items()
             if run in runs or "+mine" in run and line["exercise"] in exercises]
    if not lines:
        raise UserError(f"{args.results} holds no results of {' and '.join(exercises)} to submit")
    pristine, mine, logs = changes.pristine(), changes.texts(ROOT), {}
    for line in lines:
        log = WORK / line.get("folder", "") / "log.jsonl"
        logs[f"{line['run']}-{line['seed']}"] = log.read_text() if log.exists() else None
    foretold = [p for p in measure.json_lines(predictions(args.results), "exercise", "time") if p["exercise"] == args.exercise]
    content = dict(exercise=args.exercise, time=now(), predictions=foretold, results=lines, diff=changes.diff(pristine, mine),
                   hash=changes.fingerprint(mine), pristine=changes.fingerprint(pristine), logs=logs)
    with files.atomic(args.submit) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {args.submit}: {len(lines)} lines, {len(foretold)} predictions, a diff of {len(content['diff'])} characters")


def main():
    parser = training.Parser(__doc__, dict(
        results=(None, "train and measure what this file lacks, and add it (default: print our reference results)", str),
        seeds=(1, "number of seeds"),
        first_seed=(0, "the first of them", training.number("whole number from 0 on", int, 0)),
        short=(False, "rows of a quarter of the length, for which there is no reference"),
        predict=(None, "store this text, or this file, as your prediction and end", str),
        submit=(None, "write predictions, results with their diffs and checks, and logs to this file and end", str),
        table=(False, "print what --results holds and run nothing"),
        pictures=(None, "draw the results into this folder (matplotlib: `make exercises`)", Path)))
    parser.add_argument("exercise", nargs="?", choices=[*NUMBERS, *EXERCISES], metavar="EXERCISE", help="number or name")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows (default: all)")
    parser.add_argument("--mine", nargs="?", const="", metavar="FLAGS", help="run your working copy, with these flags")
    args = parser.parse_args()
    if not args.exercise:
        parser.error("say which exercise: a number or one of " + ", ".join(EXERCISES) + " (before --mine)")
    exercises = NUMBERS.get(args.exercise, args.exercise).split()
    if exercises[0].endswith(".py"):
        parser.error(f"exercise {args.exercise} has a program of its own: python exercises/{exercises[0]}")
    known = [row for name in exercises for row in EXERCISES[name]]
    if unknown := set(args.rows or ()) - set(known):
        parser.error(f"--rows: no row {min(unknown)!r} in {' '.join(exercises)}; there are: {' | '.join(known)}")
    for flag in ("mine", "table", "predict", "submit", "short"):
        if getattr(args, flag) not in (None, False) and not args.results:
            parser.error(f"--{flag} needs --results, for example --results my-runs.jsonl")
    rows = {name: [row for row in EXERCISES[name] if row in (args.rows or known)] for name in exercises}
    if args.pictures:
        plane.pyplot()  # a missing package is told now, not after the work
    if args.predict:
        return predict(args, exercises)
    if args.submit:
        return submit(args, exercises, rows)
    if not args.results:
        print("Reference results, nothing was run; --results my-runs.jsonl runs these rows, with --mine your working copy.")
    elif not args.table:
        run_all(args, rows)
    tables = {name: table(name, wanted, args.results or REFERENCE, args.short) for name, wanted in rows.items() if wanted}
    if not any(tables.values()):
        raise UserError(f"{args.results} holds no results of {' '.join(exercises)}; without --table they are trained and measured")
    print("\n".join(f"\n{name}\n\n{text}" for name, text in tables.items() if text))
    for name in [name for name, text in tables.items() if text and args.pictures]:
        draw(name, args.results or REFERENCE, args.pictures / f"{name}.png")


def own_code(exercise):
    """{"diff", "check"}: what the working copy changes, and what check.py says of it, which is also printed."""
    number = next(number for number, names in NUMBERS.items() if exercise in names.split())
    check = subprocess.run([sys.executable, str(HERE / "check.py"), number], capture_output=True, text=True, cwd=ROOT)
    print(check.stdout + check.stderr, flush=True)
    return dict(diff=changes.diff(changes.pristine(), changes.texts(ROOT)), check=check.stdout + check.stderr)


def run_all(args, rows):
    """Train and measure the rows {exercise: names}, or the working copy, where the results have no line of the same hash."""
    if not (WORK / STAGE1).exists():
        raise UserError(f"{STAGE1} is missing; get it from the repository")
    wanted = [(exercise, name, *row_of(exercise, name, args.short)) for exercise in rows for name in rows[exercise]]
    if args.mine is not None:
        first = next(iter(rows))
        flags = args.mine or ("--method vsd" if first == "teacher" else "")
        flags = shortened(flags) if args.short else flags
        wanted = [(first, "mine", flags, ("mine", "teacher") if first == "teacher" else ("mine",))]
        if changes.texts(ROOT) == changes.pristine():
            print("Your scripts are the pristine ones: only flags can make a difference.")
    measures = None
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for exercise, name, flags, names in wanted:
            run, now_hash = run_name(flags, names), hash_of(flags, names)
            before = results(args.results).get((run, seed))
            if before and before.get("hash") == now_hash:
                continue
            print(f"\n--- {exercise}: {name}, seed {seed}", flush=True)
            if before:
                print(f"--- {args.results} has a line of other scripts or flags ({before.get('hash')}); it is trained anew")
            start = time.monotonic()
            folder = folder_of(flags, names, seed, args.results)
            own = own_code(exercise) if "mine" in names else {}
            train(folder, flags, names, seed)
            measures = measures or measure.Measures("digits", WORK / STAGE1)
            line = dict(run=run, seed=seed, hash=now_hash, exercise=exercise, flags=flags, folder=str(folder.relative_to(WORK)),
                        **measured(folder, flags, measures, seed), time=now(), seconds=round(time.monotonic() - start), **own)
            measure.add_lines(args.results, line)
            print(f"--- {name}, seed {seed}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    training.run(main)
