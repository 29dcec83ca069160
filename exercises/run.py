"""Run an exercise: train its rows as a user would, measure them, print the table and whether yours lie where they should.

    python exercises/run.py 5                                  our reference results of exercise 5; nothing is run
    python exercises/run.py 5 --results my-runs.jsonl          train and measure its rows, seed 0
    python exercises/run.py 5 --results my-runs.jsonl --mine   the same of your working copy, whatever you changed in it
    python exercises/run.py 2 --results my-runs.jsonl --mine "--divergence hellinger"          with flags of your own

Rows without --mine run the pristine scripts (exercises/changes.py). A row is a run in a folder of runs/exercises/RESULTS and a
line of RESULTS, both with a hash of scripts and flags. What has its line is not run again; the same command continues a run.
"""

import itertools
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

if __name__ == "__main__":  # an edit of a script changes nothing that measures
    sys.path.insert(0, str(changes.unpack(ROOT)))
from machinery import checkpoints, data, files, training
from machinery.files import UserError
import measure
import verifier
from scipy import stats

# ---- Settings, as differences from the preset `digits` -----------------------------------------------

WORK = ROOT  # runs/ is in it
STAGE1 = "assets/digits-stage1.pt"  # pretrain.py --kimg 200, in half precision
COMMON = f"--init {STAGE1} --kimg 24 --batch 64 --p-mean -1.2"  # --short: a quarter of the length
SAMPLES = 3594  # of each generator: twice the data
ONE_LEVEL = "--kimg 200 --p-mean 0.9163 --p-std 0.001"  # ln 2.5: a stage 1 at a single noise level, for the exercise `stage-1`
REFERENCE = HERE / "results" / "runs.jsonl"
NUMBERS = {  # of the pages in exercises/: names below, or a program of its own
    "0": "warmups.py", "1": "plane.py", "2": "divergences", "3": "stage-1", "4": "gan", "5": "order momentum", "6": "t-init",
    "7": "noise", "8": "ratio", "10": "teacher", "11": "verifier.py",
}
NO_NOISE, RANDOM = "--p-mean -4.6 --p-std 0.001", "--ratio-init random"

# {exercise: {row: flags of the script and +CHANGE of its code}}; with +teacher teacher.py runs.
EXERCISES = {
    "divergences": {
        "DiJS": "", "DiKL": "--divergence dikl", "DiRM": "--divergence dirm", "forward KL": "--divergence fkl",
        "Jeffreys": "--divergence jeffreys +divergences",
        "squared Hellinger": "--divergence hellinger +divergences",
        "softened chi-square": "--divergence lecam +divergences",
    },
    "stage-1": {
        "both from stage 1": "", "ratio network at random": RANDOM,
        "generator at random": "+generator-random", "both at random": f"{RANDOM} +generator-random",
        "generator from one level": "+generator-one-level",
        "ratio network from one level": "+ratio-one-level",
    },
    "gan": {
        "noise at all levels, saturating (DiJS)": "",
        "noise at all levels, non-saturating (DiRM)": "--divergence dirm",
        "no noise, saturating": NO_NOISE,
        "no noise, non-saturating": f"--divergence dirm {NO_NOISE}",
        "noise at all levels, ratio network at random": RANDOM,
        "no noise, ratio network at random": f"{RANDOM} {NO_NOISE}",
    },
    "order": {
        "ratio step, then the same z": "",
        "fresh z": "+fresh-z", "same z, same noise": "+same-noise", "both at once": "+simultaneous",
        "ratio on the samples before": "+stale-samples",
    },
    "t-init": {f"t_init {t}": "" if t == "2.5" else f"--t-init {t}" for t in ("0.5", "1", "2.5", "5", "20", "80")},
    "noise": {
        "lognormal(-2, 1.2)": "--p-mean -2", "lognormal(-1.2, 1.2)": "", "lognormal(-0.4, 1.2)": "--p-mean -0.4",
        "Karras, share 0.5": "--noise karras --karras-share 0.5", "Karras, share 0.8": "--noise karras --karras-share 0.8",
        "0.1 only": "--p-mean -2.303 --p-std 0.001", "0.5 only": "--p-mean -0.693 --p-std 0.001",
    },
    "ratio": {
        "1 ratio step": "", "2 ratio steps": "--ratio-steps 2", "5 ratio steps": "--ratio-steps 5",
        "ratio network at random": RANDOM, "frozen encoder": "+frozen-encoder",
        "rate 1e-4": "--ratio-lr 1e-4", "rate 1e-3": "--ratio-lr 1e-3",
        "2 ratio steps, equal time": "--ratio-steps 2 --kimg 17",  # 24 / 1.4: an iteration costs 1.4 times as much
    },
    "momentum": {"beta1 0": "", "beta1 0.5": "--beta1 0.5", "beta1 0.9": "--beta1 0.9"},
    "teacher": {"DiffRatio": "", "VSD": "--method vsd +teacher", "SiD": "--method sid +teacher"},
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


def rows_of(exercise, short=False):
    """{row: (flags, names of changes)}. short: without the rows that need a stage 1 of their own."""
    rows = {}
    for name, text in EXERCISES[exercise].items():
        flags, *names = text.split("+")
        flags, names = flags.strip(), tuple(name.strip() for name in names)
        if not (short and "one-level" in text):
            rows[name] = shortened(flags) if short else flags, names
    return rows


def number_of(flag, flags):
    """The number after a flag; the last one counts."""
    return float(re.findall(rf"--{flag}[ =](\S+)", f"{COMMON} {flags}")[-1])


def shortened(flags):
    """The flags of a quarter of the length."""
    return f"{flags} --kimg {number_of('kimg', flags) / 4:g}".strip()


def run_name(flags, names):
    """Name of a run: its flags and its changes of code; of a working copy its hash as well."""
    name = "_".join([*flags.replace("--", "").replace("/", "-").split(), *(f"+{name}" for name in names)]) or "default"
    return f"{name}_{hash_of(flags, names)}" if "mine" in names else name


def hash_of(flags, names):
    """Hash of what a run runs: the scripts with their changes, the flags."""
    scripts = changes.texts(ROOT) if "mine" in names else changes.pristine()
    for name in set(names) & set(changes.CHANGES):
        scripts[f"{changes.SCRIPT} +{name}"] = repr(changes.CHANGES[name])
    return changes.fingerprint(scripts, COMMON, flags, "teacher" in names)


def folder_of(flags, names, seed, results):
    """Folder of a run. Another file of results, other scripts or other flags mean another one."""
    name = f"{run_name(flags, names)}_{hash_of(flags, names)}-{seed}"
    return WORK / "runs" / "exercises" / Path(results).stem / name


def train(folder, flags, names, seed):
    """Run the stage script in this folder: pristine with the changes `names`, or "mine"."""
    root = ROOT if "mine" in names else changes.unpack(WORK)
    script, one_step = root / changes.SCRIPT, "--ratio-steps 1"  # the preset takes two
    if any("one-level" in name for name in names):
        train_one_level(root)
    if "teacher" in names:
        script, one_step = root / "exercises" / "teacher.py", ""
    elif names and "mine" not in names:
        script = folder / changes.SCRIPT
        with files.atomic(script) as part:
            part.write_text(changes.changed(names))
    flags = shlex.split(f"{COMMON} {one_step} {flags}")
    call([script, *flags, "--seed", seed, "--outdir", folder], root)


def train_one_level(root):
    """Train the stage 1 of one noise level, if it is not finished."""
    path = WORK / changes.ONE_LEVEL
    if not path.exists() or checkpoints.load_network(path).about["nimg"] < 1000 * number_of("kimg", ONE_LEVEL):
        call([root / "pretrain.py", *ONE_LEVEL.split(), "--outdir", path.parent], root)


def call(command, root):
    """Run a script that imports from `root`, in a process of its own. If it fails, this one ends with its exit code."""
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))  # for imports of a changed copy
    command = [sys.executable, *map(str, command)]
    process = subprocess.Popen(command, cwd=WORK, env={**os.environ, "PYTHONPATH": path})
    while process.poll() is None:
        try:
            process.wait()
        except training.Stopped as stop:  # the script stops with a checkpoint; Ctrl-C has reached it already
            if (number := stop.args[1] - 128) != signal.SIGINT:
                process.send_signal(number)
    if (code := process.returncode) < 0:  # it crashed or was killed, without a message of its own
        print(f"run.py: {command[1]} was ended by signal {-code} ({signal.strsignal(-code)})", file=sys.stderr)
    if code:
        sys.exit(code if code > 0 else 128 - code)


def calibration(folder, dataset, seed):
    """{"0.1": `verifier.calibration` at that level}, on data and fresh samples."""
    net, ratio = (checkpoints.load_network(folder / name) for name in ("network.pt", "ratio.pt"))
    indices = range(10_000, 10_000 + len(dataset))
    fake = torch.cat(list(measure.in_batches(net, indices, seed, "cpu", 300)))
    real = dataset.to_model(torch.tensor(dataset.images), "cpu")
    both = [verifier.logits(ratio, x[:, None], 0.1, (seed, side))[:, 0] for side, x in enumerate((real, fake))]
    return {"0.1": verifier.calibration(*both)}


def measured(folder, flags, measures, seed):
    """The measures of a finished run."""
    log = measure.json_lines(folder / "log.jsonl", "nimg")
    last = [line for line in log if "images_per_second" in line][-1]
    kimg, wanted = last["nimg"] / 1000, number_of("kimg", flags)
    if not 0 <= last["nimg"] - round(1000 * wanted) < number_of("batch", flags):  # the loop of --mine may end early
        raise UserError(f"{folder} is a run of {kimg:g} instead of {wanted:g} kimg; remove it")
    net = checkpoints.load_network(folder / "network.pt", role="generator")
    images = np.concatenate([data.to_uint8(x) for x in measure.in_batches(net, range(SAMPLES), seed, "cpu", 300)])
    line = measures(images, kid=False)
    if "bands" in last:  # of a method with a ratio network
        line["bands"] = {name: band["accuracy"] for name, band in last["bands"].items()}
        line["calibration"] = calibration(folder, measures.train, seed)
    return line


def own_code(exercise):
    """{"diff", "check"}: what the working copy changes, and what check.py says of it, which is also printed."""
    number = next(number for number, names in NUMBERS.items() if exercise in names.split())
    check = subprocess.run([sys.executable, HERE / "check.py", number], cwd=ROOT, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
    print(check, flush=True)
    return dict(diff=changes.diff(changes.pristine(), changes.texts(ROOT)), check=check)


def run_all(args, exercises):
    """Train and measure the rows, or the working copy, where there is no line of the same hash."""
    wanted = [(exercise, name, *row) for exercise in exercises for name, row in rows_of(exercise, args.short).items()]
    if args.mine is not None:
        teacher = ("teacher",) * (exercises[0] == "teacher")
        flags = args.mine or ("--method vsd" if teacher else "")
        flags = shortened(flags) if args.short else flags
        wanted = [(exercises[0], "mine", flags, ("mine", *teacher))]
        if changes.texts(ROOT) == changes.pristine():
            print("Your scripts are the pristine ones: only flags can make a difference.")
    measures = None
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for exercise, name, flags, names in wanted:
            about = dict(run=run_name(flags, names), seed=seed, hash=hash_of(flags, names))
            before = [line for line in results(args.results).get(about["run"], ()) if line["seed"] == seed]
            if before and before[0].get("hash") == about["hash"]:
                continue
            print(f"\n--- {exercise}: {name}, seed {seed}", flush=True)
            if before:
                print(f"--- {args.results} has a line of other scripts or flags: trained anew")
            start = time.monotonic()
            folder = folder_of(flags, names, seed, args.results)
            about |= dict(exercise=exercise, flags=flags, folder=str(folder.relative_to(WORK)))
            about |= own_code(exercise) if "mine" in names else {}
            train(folder, flags, names, seed)
            measures = measures or measure.Measures("digits", WORK / STAGE1)
            about |= measured(folder, flags, measures, seed) | dict(time=now(), seconds=round(time.monotonic() - start))
            measure.add_lines(args.results, about)
            print(f"--- {name}, seed {seed}: {about['seconds']} s", flush=True)


# {heading: whether it varies by a factor, so that its logarithm is taken}
JUDGED = {"FD (classifier)": True, "FD (stage 1)": True, "precision": False, "recall": False}
FAR = 30  # FD (classifier) from which on runs of one setting differ more


def results(path):
    """{run: [the newest line of each seed]} of a file of results."""
    newest = {}
    for line in measure.json_lines(path, "run", "seed"):
        newest.setdefault(line["run"], {})[line["seed"]] = line
    return {run: list(lines.values()) for run, lines in newest.items()}


def intervals(runs):
    """{run: {heading: (low, high)}}: where 95 % of single further runs lie, from {run: lines of its n seeds}.

    mean +- t s sqrt(1 + 1/n) (Hahn and Meeker, Statistical Intervals, 1991, section 4.7). Few seeds give no deviation s of their
    own: it is pooled over rows of one length whose mean FD (classifier) is below `FAR`, or above. Distances: of the log.
    """
    result = {run: {} for run, lines in runs.items() if len(lines) > 1}
    short = {run: number_of("kimg", runs[run][0].get("flags", "")) < number_of("kimg", "") / 2 for run in result}
    far = {run: np.mean([line["fd_classifier"] for line in runs[run]]) >= FAR for run in result}
    for kind in itertools.product((False, True), repeat=2):
        group = [run for run in result if (short[run], far[run]) == kind]
        freedom = sum(len(runs[run]) - 1 for run in group)
        for heading, factor in JUDGED.items():
            value, _ = measure.COLUMNS[heading]
            found = {run: np.array([value(line) for line in runs[run]]) for run in group}
            found = {run: np.log(x) if factor else x for run, x in found.items()}
            squares = sum(((x - x.mean()) ** 2).sum() for x in found.values())
            for run, x in found.items():
                half = stats.t.ppf(0.975, freedom) * (squares / freedom * (1 + 1 / len(x))) ** 0.5
                ends = x.mean() - half, x.mean() + half
                result[run][heading] = tuple(np.exp(ends) if factor else np.clip(ends, 0, 1))
    return result


def between(heading, expected, line=None):
    """Text of an interval of `intervals`; before it the value of a line, if given, and whether that is inside."""
    (low, high), (value, form) = expected[heading], measure.COLUMNS[heading]
    rounded = "{:.0f}" if form == "{:.1f}" and high > 150 else form
    text = f"{rounded.format(low)} to {rounded.format(high)}"
    if line is None:
        return text
    return f"{form.format(value(line))} {'inside' if low <= value(line) <= high else 'OUTSIDE'} {text}"


def table(exercise, path, short=False):
    """The exercise's tables, of all seeds that the file `path` holds; None if it holds none."""
    columns = {name: measure.COLUMNS[name] for name in SHOWN} | EXTRA_COLUMNS.get(exercise, {})
    runs, expected = results(path), intervals(results(REFERENCE))
    names = {name: run_name(*row) for name, row in rows_of(exercise, short).items()}
    names |= {f"mine {lines[0]['hash'][:6]} {lines[0]['flags']}".strip(): run
              for run, lines in runs.items() if "+mine" in run and lines[0].get("exercise") == exercise}
    found = {name: runs[run] for name, run in names.items() if run in runs}
    if not found:
        return None
    known = {name: expected[names[name]] for name in found if names[name] in expected}
    if Path(path).resolve() == REFERENCE:
        said = "95 % of single runs of one more seed lie in these intervals:"
        cells = {name: [between(heading, ends) for heading in JUDGED] for name, ends in known.items()}
    else:
        cells = {f"{name}, seed {line['seed']}": [between(heading, ends, line) for heading in JUDGED]
                 for name, ends in known.items() for line in found[name]}
        inside = [" inside " in cell for row in cells.values() for cell in row]
        said = f"{sum(inside)} of {len(inside)} cells lie inside the interval of our results, which holds 95 % of honest runs:"
    text = [measure.table(found, columns)]
    if cells:
        text += [said, measure.markdown(JUDGED, cells)]
    if without := [name for name in found if name not in known]:
        text.append(f"no reference exists for: {', '.join(without)}")
    return "\n\n".join(text)


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())


def predict(args, exercises, path):
    """Store a prediction, with the time. Refused once there is a result of the exercise."""
    lines = measure.json_lines(args.results, "run", "seed")
    if any(line.get("exercise") in exercises for line in lines):
        raise UserError(f"{args.results} holds results of {' and '.join(exercises)} already; a prediction comes before them")
    text = Path(args.predict).read_text() if os.path.isfile(args.predict) else args.predict
    measure.add_lines(path, dict(exercise=args.exercise, time=now(), prediction=text.strip()))
    print(f"stored in {path}; now the rows: the same command without --predict")


def submit(args, exercises, path):
    """Write one JSON file: predictions, lines and logs of the exercise, the working copy's present diff and hash."""
    known = {run_name(*row) for exercise in exercises for row in rows_of(exercise, args.short).values()}
    lines = [line for run, lines in results(args.results).items() for line in lines
             if run in known or "+mine" in run and line["exercise"] in exercises]
    if not lines:
        raise UserError(f"{args.results} holds no results of {' and '.join(exercises)} to submit")
    diff, logs = changes.diff(changes.pristine(), changes.texts(ROOT)), {}
    for line in lines:
        log = WORK / line.get("folder", "") / "log.jsonl"
        logs[f"{line['run']}-{line['seed']}"] = log.read_text() if log.exists() else None
    foretold = [line for line in measure.json_lines(path, "exercise") if line["exercise"] == args.exercise]
    content = dict(exercise=args.exercise, time=now(), predictions=foretold, results=lines,
                   diff=diff, hash=changes.fingerprint(changes.texts(ROOT)), logs=logs)
    with files.atomic(args.submit) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {args.submit}: {len(lines)} lines, {len(foretold)} predictions, a diff of {len(diff)} characters")


def main():
    parser = training.Parser(__doc__, dict(
        results=(None, "train and measure what this file lacks, and add it (default: print our reference results)", str),
        seeds=(1, "number of seeds"),
        first_seed=(0, "the first of them", training.number("whole number from 0 on", int, 0)),
        short=(False, "rows a quarter as long, with intervals of their own"),
        predict=(None, "store this text, or this file, as your prediction and end", str),
        submit=(None, "write predictions, results with their diffs and checks, and logs to this file and end", str),
        table=(False, "print what --results holds and run nothing")))
    parser.add_argument("exercise", choices=[*NUMBERS, *EXERCISES], metavar="EXERCISE",
                        help="number or name; put it before --mine")
    parser.add_argument("--mine", nargs="?", const="", metavar="FLAGS", help="run your working copy, with these flags")
    args = parser.parse_args()
    exercises = NUMBERS.get(args.exercise, args.exercise).split()
    if exercises[0].endswith(".py"):
        parser.error(f"exercise {args.exercise} has a program of its own: python exercises/{exercises[0]}")
    for flag in ("mine", "table", "predict", "submit", "short"):
        if getattr(args, flag) not in (None, False) and not args.results:
            parser.error(f"--{flag} needs --results, for example --results my-runs.jsonl")
    if re.search("--(seed|outdir)", args.mine or ""):
        parser.error("--mine takes no --seed and no --outdir; give --first-seed")
    if args.predict or args.submit:
        end = predict if args.predict else submit
        return end(args, exercises, Path(args.results).with_suffix(".predictions.jsonl"))
    if not args.results:
        print("Reference results, nothing was run; --results my-runs.jsonl runs these rows, with --mine your working copy.")
    elif not args.table:
        run_all(args, exercises)
    path = args.results or REFERENCE
    tables = {name: text for name in exercises if (text := table(name, path, args.short))}
    if not tables:
        raise UserError(f"{path} holds no results of {' '.join(exercises)}; without --table they are trained and measured")
    for name, text in tables.items():
        print(f"\n{name}\n\n{text}")


if __name__ == "__main__":
    training.run(main)
