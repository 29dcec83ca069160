"""Exercises 2 to 8: every row trains, every change of code fits, the classifier and the measures are right; the demo runs."""

import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys

import changes
import demo
import measure
import numpy as np
import pytest
import run
from conftest import ROOT, call, same, stage_2_arguments, weights
from PIL import Image

import pretrain
import sample
import train_diffratio
from machinery import checkpoints, data
from machinery.files import UserError

DIGITS = data.load("digits")
SHORT = "--kimg 0.064 --batch 32 --device cpu"  # two steps
ROWS = {run.run_name(*row): row for exercise in run.EXERCISES for row in run.rows_of(exercise).values()}


@pytest.fixture(scope="module", autouse=True)
def brief_classifiers(tmp_path_factory):
    """Classifiers are trained briefly and kept apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRATIO_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(measure.load_classifier, "__defaults__", (20_000, "cpu"))
        yield


@pytest.fixture(scope="module")
def measures(stage1):
    return measure.Measures("digits", stage1 / "network.pt")


@pytest.fixture
def work(tmp_path, monkeypatch, stage1):
    """A folder with a stage 1, in which run.py runs scripts in this process, for two steps each."""

    def call(command, root):
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        runpy.run_path(sys.argv[0], run_name="__main__")

    (tmp_path / run.STAGE1).parent.mkdir(parents=True)
    shutil.copy(stage1 / "network.pt", tmp_path / run.STAGE1)
    brief = dict(COMMON=f"{run.COMMON} {SHORT}", ONE_LEVEL=SHORT, SAMPLES=300)
    for name, value in dict(brief, WORK=tmp_path, call=call).items():
        monkeypatch.setattr(run, name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [name for name, (_, names) in ROWS.items() if names or name == "default"])
def test_every_changed_row_trains(name, work, one_thread):
    """For two steps, with its change of code or with teacher.py; without any it is train_diffratio.py."""
    flags, names = ROWS[name]
    folder = run.folder_of(flags, names, 0, "mine.jsonl")
    run.train(folder, flags, names, 0)
    assert checkpoints.load_network(folder / "network.pt", role="generator").about["nimg"] == 64
    assert (folder / "train_diffratio.py").exists() == (bool(names) and names != ("teacher",))
    if not names:
        call(train_diffratio, *run.COMMON.split(), "--ratio-steps", 1, "--outdir", "own")
        assert same(weights(folder / "network.pt"), weights("own/network.pt"))


def test_a_finished_stage_1_of_one_level_is_not_trained_again(work):
    """Not even resumed: its checkpoint may be of an earlier version."""
    run.train(work / "first", "", ("ratio-one-level",), 0)
    (work / changes.ONE_LEVEL).with_name("checkpoint.pt").write_text("of an earlier version")
    run.train(work / "second", "", ("ratio-one-level",), 0)
    assert same(weights(work / "first" / "network.pt"), weights(work / "second" / "network.pt"))


def test_changes_of_code_are_small_and_fit_or_are_refused(monkeypatch):
    before = changes.pristine()["train_diffratio.py"]
    for name in changes.CHANGES:
        lines = changes.diff({"x": before}, {"x": changes.changed([name])}).splitlines()[2:]
        assert 1 <= sum(line[0] in "+-" for line in lines) <= 6  # made by hand
    monkeypatch.setitem(changes.CHANGES, name, {"no such line\n": ""})
    with pytest.raises(UserError, match="does not fit train_diffratio.py"):
        changes.changed([name])


def test_pristine_scripts_are_those_of_the_project():
    """If this fails after a change of the project that the exercises should follow: python exercises/changes.py."""
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *changes.texts(ROOT)], cwd=ROOT).returncode:
        pytest.skip("the scripts are edited, or there is no git")  # a student's edit is no fault of the project
    assert changes.pristine() == changes.texts(ROOT)


def test_an_edit_of_the_working_copy_reaches_the_row_mine_alone(tmp_path, stage1):
    """In a copy whose scripts were edited, and even committed, a reference row trains as before, an edited unpacked script too."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "fashion*", "*.md", "tests"))
    shutil.copy(stage1 / "network.pt", copy / run.STAGE1)
    edited = "raise SystemExit('the edited networks')"
    (copy / "networks.py").write_text(edited)
    table = subprocess.run([sys.executable, "exercises/run.py", "5"], cwd=copy, capture_output=True, text=True)
    assert "fresh z" in table.stdout, table.stderr  # what measures is pristine, too
    script = ("import sys; sys.path.insert(0, 'exercises'); import changes\n"
              "sys.path.insert(0, str(changes.unpack(changes.ROOT)))\n"
              "import fid, networks, pretrain, sample, train_diffratio, run\n"
              f"run.train(run.Path('runs') / sys.argv[1], '{SHORT}', tuple(sys.argv[2:]), 0)")
    for change in ("", "fresh-z", "mine"):
        command = [sys.executable, "-c", script, f"run-{change}", *change.split()]
        found = subprocess.run(command, cwd=copy, capture_output=True, text=True,
                               env={**os.environ, "PYTHONPATH": ""})
        assert ("the edited networks" in found.stderr) == (change == "mine"), found.stderr
        assert (copy / "runs" / f"run-{change}" / "network.pt").exists() == (change != "mine")
        for path in copy.glob("runs/exercises/pristine-*/train_diffratio.py"):
            path.write_text(edited)


@pytest.fixture
def brief(work, measures, monkeypatch):
    """The file of results of exercises with two rows, of two steps."""
    monkeypatch.setattr(measure, "Measures", lambda *_: measures)
    fewer = {"1 ratio step": "", "rate 1e-3": "--ratio-lr 1e-3"}
    monkeypatch.setitem(run.EXERCISES, "ratio", fewer)
    monkeypatch.setitem(run.EXERCISES, "order", {"ratio step, then the same z": ""})
    monkeypatch.setitem(run.NUMBERS, "5", "order")
    return work / "runs.jsonl"


def test_each_seed_and_hash_is_measured_once_and_the_table_shows_spread(brief, capsys, monkeypatch):
    args = ["--seeds", "2", "--first-seed", "17", "--results", brief]
    call(run, "8", *args)
    found = run.results(brief)
    seeds = {name: [line["seed"] for line in lines] for name, lines in found.items()}
    assert seeds == {"default": [17, 18], "ratio-lr_1e-3": [17, 18]}
    text, (line, _) = brief.read_text(), found["default"]
    assert line["images"] == 300 and set(line["calibration"]) == {"0.1"}
    a, b = (line["fd_classifier"] for line in found["default"])
    shown = capsys.readouterr().out
    assert "| FD (classifier) | FD (stage 1) |" in shown and "| right at 0.1, % |" in shown
    assert f"| 1 ratio step | {(a + b) / 2:.1f} ± {abs(a - b) / 2**0.5:.1f} |" in shown
    expected = run.between("FD (classifier)", run.intervals(run.results(run.REFERENCE))["default"])
    assert f"| 1 ratio step, seed 17 | {a:.1f} OUTSIDE {expected} |" in shown  # it is short
    with monkeypatch.context() as patch:
        patch.setattr(run, "train", None)  # a further run would fail
        call(run, "ratio", *args)
        call(run, "5", "--table", "--results", brief)
        assert "ratio step, then the same z" in capsys.readouterr().out
    assert brief.read_text() == text
    with pytest.raises(UserError, match="0.064 instead of 24 kimg"):
        run.measured(run.folder_of("", (), 17, brief), "--kimg 24", None, 17)
    older = changes.pristine  # of other scripts neither line nor folder is taken
    monkeypatch.setattr(changes, "pristine", lambda: older() | {"machinery/new.py": "x = 1\n"})
    call(run, "order", "--first-seed", "17", "--results", brief)
    newer = run.results(brief)["default"][0]
    assert newer["hash"] != line["hash"] and newer["folder"] != line["folder"]
    assert "line of other scripts or flags" in capsys.readouterr().out
    assert len(brief.read_text().splitlines()) == 5


@pytest.mark.parametrize("nimg, flags, message", [
    (6144, "--batch 256", "no such file"), (6016, "", "no such file"),  # of the network: the length fits
    (5952, "", "5.952 instead of 6 kimg"), (6080, "", "6.08 instead of 6 kimg")])
def test_a_run_of_the_wanted_length_in_whole_batches_is_measured(nimg, flags, message, tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps(dict(nimg=nimg, images_per_second=1.0)) + "\n")
    with pytest.raises(UserError, match=message):
        run.measured(tmp_path, f"{flags} --kimg=6e0", None, 0)


def test_mine_predictions_and_submission(brief, refused, capsys, monkeypatch, tmp_path):
    """--mine stores what was run with its diff. A prediction comes before results. A submission holds all that is graded."""
    call(run, "5", "--results", brief, "--predict", "b before d. " * 50)  # longer than a file's name
    call(run, "5", "--results", brief, "--mine")
    shown = capsys.readouterr().out
    assert "only flags can make a difference" in shown and "your script is: a" in shown
    pristine = changes.pristine()
    monkeypatch.setattr(changes, "pristine", lambda: pristine | {run.changes.SCRIPT: "# as it was\n"})
    monkeypatch.setattr(run, "own_code", lambda _, own=run.own_code("order"): own)  # seen once; it takes seconds
    call(run, "5", "--results", brief, "--mine", "--beta1 0.5", "--short")
    shown, ((plain,), (short,)) = capsys.readouterr().out, run.results(brief).values()
    assert plain["diff"] == "" and "-# as it was" in short["diff"] and short["flags"] == "--beta1 0.5 --kimg 0.016"
    assert f"| mine {short['hash'][:6]} --beta1 0.5 --kimg 0.016 |" in shown and "no reference exists for: mine" in shown
    assert "comes before them" in refused(run, "5", "--results", brief, "--predict", "d before b")
    call(run, "5", "--results", brief, "--submit", tmp_path / "me.json")
    handed = json.loads((tmp_path / "me.json").read_text())
    assert [p["prediction"] for p in handed["predictions"]] == [("b before d. " * 50).strip()] and len(handed["results"]) == 2
    assert "-# as it was" in handed["diff"] and all("your script is: a" in line["check"] for line in handed["results"])
    assert all("ratio_loss" in log for log in handed["logs"].values())
    assert "--first-seed" in refused(run, "5", "--results", brief, "--mine", "--beta1 0.5 --seed 3")
    assert "no results of gan to submit" in refused(run, "4", "--results", brief, "--submit", tmp_path / "x.json")


def test_intervals_hold_95_percent_of_further_runs():
    """Of rows that differ by a factor with one deviation, as the docstring assumes; the bounds are six deviations of the count."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(200):
        values = np.exp(rng.normal(2, 0.2, (20, 4)))
        lines = {str(i): [dict(fd_classifier=v, fd_stage1=v, precision_classifier=0.5, recall_classifier=0.5) for v in row[:3]]
                 for i, row in enumerate(values)}
        ends = [found["FD (classifier)"] for found in run.intervals(lines).values()]
        inside += sum(low <= row[3] <= high for row, (low, high) in zip(values, ends))
    assert 0.93 < inside / 4000 < 0.97


@pytest.mark.parametrize("exercise", run.EXERCISES)
def test_pages_hold_the_means_and_intervals_that_the_program_prints(exercise):
    number = next(int(number) for number, names in run.NUMBERS.items() if exercise in names.split())
    (page,), runs = (ROOT / "exercises").glob(f"{number:02}-*.md"), run.results(run.REFERENCE)
    for name, row in run.rows_of(exercise).items():
        if (key := run.run_name(*row)) in runs and name != "beta1 0":  # which is the first row of `order`
            values = [line["fd_classifier"] for line in runs[key]]
            interval = run.between("FD (classifier)", run.intervals(runs)[key])
            mean, spread = np.mean(values), np.std(values, ddof=1)
            assert f"| {name} | {mean:.1f} ± {spread:.1f} | {interval} |" in page.read_text()


def test_without_results_the_reference_is_printed_and_nothing_runs(capsys, monkeypatch, tmp_path):
    """By the number of the page or by name. The reference holds three seeds of every row in full length."""
    monkeypatch.setattr(run, "WORK", tmp_path)
    call(run, "5")
    shown = capsys.readouterr().out
    assert "Reference results, nothing was run" in shown and "--mine" in shown and not list(tmp_path.iterdir())
    assert all(shown.count(f"\n| {row} |") == 2 for name in ("order", "momentum") for row in run.EXERCISES[name])  # means, intervals
    found = run.results(run.REFERENCE)
    assert all({line["seed"] for line in found[name]} >= {0, 1, 2} for name in ROWS)
    for flags in [flags for flags, names in ROWS.values() if not names]:  # those without a change of code are known
        stage_2_arguments(*shlex.split(f"{run.COMMON} {flags}"))


def test_run_refuses_what_it_does_not_know_and_names_a_script_that_is_killed(refused, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "WORK", tmp_path)
    assert "python exercises/plane.py" in refused(run, "1")
    assert "holds no results of gan" in refused(run, "4", "--table", "--results", tmp_path / "none.jsonl")
    assert "--mine needs --results" in refused(run, "5", "--mine")
    (tmp_path / "crash.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(SystemExit) as stop:
        run.call([tmp_path / "crash.py"], ROOT)
    assert stop.value.code == 137 and "crash.py was ended by signal 9" in capsys.readouterr().err  # as a shell's


def test_halves_are_disjoint_and_random():
    (a, b), (again, _), (other, _) = (measure.halves(101, seed) for seed in (3, 3, 4))
    assert len(a) == len(b) == 50 and not set(a) & set(b)
    assert np.array_equal(a, again) and not np.array_equal(a, other)


def test_the_classifier_tells_digits_and_is_kept(monkeypatch):
    first = data.Dataset("first", DIGITS.images[:1500], DIGITS.labels[:1500])
    net = measure.load_classifier(first)
    assert (measure.predict(net, DIGITS.images[1500:]) == DIGITS.labels[1500:]).mean() > 0.85  # that it has not seen
    monkeypatch.setattr(measure, "train_classifier", None)  # a second training would fail
    assert same(net.state_dict(), measure.load_classifier(first).state_dict())
    with pytest.raises(UserError, match="labelled images"):
        measure.load_classifier(data.Dataset("bare", DIGITS.images))
    with pytest.raises(TypeError):  # other labels of the same images are another classifier
        measure.load_classifier(data.Dataset("corrected", first.images, (first.labels + 1) % 10))


def test_held_out_images_are_the_reference_and_the_first_row(monkeypatch):
    """Coloured digits. Of the test images the first row has nearest and accuracy."""
    images = DIGITS.images.repeat(2, axis=1).repeat(2, axis=2) // np.array([1, 2, 3], np.uint8)
    parts = {"cifar10": slice(1000), "cifar10:test": slice(1000, 1797), "own": slice(1500, 1797)}
    sets = {name: data.Dataset(name, images[part], DIGITS.labels[part])
            for name, part in parts.items()}
    monkeypatch.setattr(data, "load", lambda name, **_: sets[name])
    assert measure.Measures("cifar10", test="own").reference is sets["own"]
    held = measure.Measures("cifar10")
    row = held.floors()["data: training against test images"]
    right = measure.predict(held.classifier, images[1000:]) == DIGITS.labels[1000:]
    assert row["images"] == 797
    assert row["accuracy"] == right.mean() and 0.5 < right.mean() < 0.99  # mirrored ones are hard
    assert row["nearest"] == held.nearest(images[1000:]).median().item() > row["nearest_low"] > 5


def test_classes_are_numbered_as_training_numbers_them(monkeypatch):
    """Digits 0 and 3 alone: --cond makes them 0 and 1. A test set of other classes, or without any, tells no accuracy."""
    some = np.isin(DIGITS.labels, (0, 3))
    images, labels = DIGITS.images[some], DIGITS.labels[some]
    sets = {"gaps": data.Dataset("gaps", images, labels), "bare": data.Dataset("bare", images)}
    monkeypatch.setattr(data, "load", lambda name, **_: sets[name])
    measures = measure.Measures("gaps")
    row = measures(images, labels // 3)
    assert row["accuracy"] > 0.95 and len(row["shares"]) == 2 and min(row["shares"]) > 0.4
    (row,) = measure.Measures("gaps", test="bare").floors().values()
    assert "accuracy" not in row


def test_measures_tell_good_from_bad_and_from_memory(measures):
    """Data is near data; noise covers nothing; copies of one image are precise, cover nothing, are at distance zero."""
    rng = np.random.default_rng(0)
    good = measures.floors()["data: one half against the other"]
    noise = measures(rng.integers(0, 256, (300, 8, 8, 1)).astype(np.uint8))
    copies = measures(DIGITS.images[:1].repeat(300, axis=0), labels=DIGITS.labels[:1].repeat(300))
    for view in ("classifier", "stage1"):
        assert good[f"fd_{view}"] < 0.1 * noise[f"fd_{view}"] and good[f"fd_{view}"] < 0.1 * copies[f"fd_{view}"]
        assert good[f"precision_{view}"] > 0.8 > 0.5 > noise[f"precision_{view}"] and copies[f"precision_{view}"] == 1
        assert good[f"recall_{view}"] > 0.8 > 0.1 > max(noise[f"recall_{view}"], copies[f"recall_{view}"])
        assert good[f"kid_{view}"] < 0.1 * noise[f"kid_{view}"]
    assert copies["nearest"] == pytest.approx(0, abs=0.1) and 20 < good["nearest"] < noise["nearest"]
    assert max(copies["shares"]) == 1 and copies["accuracy"] in (0, 1) and max(good["shares"]) < 0.2


def test_nearest_training_image_and_choice_of_large_sets(measures, monkeypatch):
    """3 % of copies show in the lowest percentile. A set that is sorted by class is not judged by its first classes."""
    shifted = np.where(DIGITS.images[:1] > 127, DIGITS.images[:1] - 3, DIGITS.images[:1] + 3)
    assert measures.nearest(shifted).item() == pytest.approx(3, abs=0.01)  # the root mean square
    assert measures.nearest(DIGITS.images[:1], skip_self=True).item() > 10
    noise = np.random.default_rng(0).integers(-40, 41, (300, 8, 8, 1))
    images = (DIGITS.images[:300].astype(int) + noise).clip(0, 255).astype(np.uint8)
    new, copied = measures.memory(images), measures.memory(np.concatenate([images[9:], DIGITS.images[300:309]]))
    assert copied["nearest"] > 0.95 * new["nearest"] and copied["nearest_low"] < 0.5 < 10 < new["nearest_low"]
    order = DIGITS.labels.argsort(kind="stable")
    monkeypatch.setattr(measure.chosen, "__defaults__", (500,))
    found = measures(DIGITS.images[order], DIGITS.labels[order])
    assert found["images"] == 500 and min(found["shares"]) > 0.05 and found["accuracy"] > 0.8
    assert np.array_equal(measure.chosen(DIGITS.images, 5000), DIGITS.images)


def test_measure_command(refused, capsys, measures, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "Measures", lambda *_: measures)
    for seed in (0, 1):
        np.savez(tmp_path / f"{seed}.npz", arr_0=DIGITS.images[300 * seed : 300 * (seed + 1)])
    files = [f"mine={tmp_path}/{seed}.npz" for seed in (0, 1)]
    call(measure, "digits", "--json", tmp_path / "out.jsonl", *files)
    out = capsys.readouterr().out
    assert "| FD (classifier) | FD (stage 1) |" in out and "FID" not in out
    assert "| data: one half against the other |" in out and out.count("| mine |") == 1 and "±" in out
    lines = measure.json_lines(tmp_path / "out.jsonl")
    assert [line["row"] for line in lines] == ["data: one half against the other", "mine", "mine"]
    monkeypatch.setattr(measures, "floors", None)  # other images are refused before anything is measured
    for name, shape in (("large", (4, 28, 28, 1)), ("colour", (4, 8, 8, 3)), ("one", (1, 8, 8, 1))):
        np.savez(tmp_path / f"{name}.npz", arr_0=np.zeros(shape, np.uint8))
        assert f"{name}.npz" in refused(measure, "digits", f"x={tmp_path}/{name}.npz")
    assert "no such file" in refused(measure, "digits", f"x={tmp_path}/none.npz")


def test_demo(capsys, stage1, tmp_path, monkeypatch):
    """With the flags of the Makefile: a picture of four panels, distances, shares of the digits."""
    monkeypatch.setattr(data, "load", lambda name: data.Dataset(name, DIGITS.images[:300], DIGITS.labels[:300]))
    files = dict(pretrained=stage1 / "network.pt", generator=sample.DIGITS, outdir=tmp_path, seed=1)
    call(demo, *[word for name, value in files.items() for word in (f"--{name}", value)])
    shown = capsys.readouterr().out
    assert "FD (stage 1) of 150 images" in shown and all(f"  {name:26}" in shown for name in demo.EXPECTED)
    assert "times closer to the data than before stage 2" in shown
    with Image.open(tmp_path / "demo.png") as image:  # 8 x 8 images of 24 x 24, white columns
        assert image.size == (35 * 25 + 1, 8 * 25 + 1)
    assert all(f"--{name} " in (ROOT / "Makefile").read_text() for name in files)


def test_own_pictures_from_a_folder_to_a_class_of_the_generator(tmp_path, monkeypatch):
    """docs/own-data.md, two steps of each stage: the classes in dataset.json are those of the generator."""
    monkeypatch.chdir(tmp_path)
    data.write_images([(DIGITS.images[:200], DIGITS.labels[:200].tolist())], "my-pictures")
    common = ["--data", "my-pictures", *SHORT.split(), "--outdir"]
    call(pretrain, "--cond", *common, "runs/mine/pretrain")
    call(train_diffratio, "--init", "runs/mine/pretrain/network.pt", *common, "runs/mine/dijs")
    call(sample, "--network", "runs/mine/dijs/network.pt", "--class", "7", "--n", "6", "--device", "cpu", "--out", "sevens.npz")
    assert data.load("sevens.npz").labels.tolist() == [7] * 6
