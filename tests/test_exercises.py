"""The exercises do not rot: every row trains, every change of code fits, the classifier and the measures say what they should."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "exercises"))
import changes  # noqa: E402
from machinery import checkpoints  # noqa: E402
import classifier  # noqa: E402
from machinery import data  # noqa: E402
import figures  # noqa: E402
import measure  # noqa: E402
import pretrain  # noqa: E402
import run  # noqa: E402
import sample  # noqa: E402
import train_diffratio  # noqa: E402
from machinery.files import UserError  # noqa: E402
from test_method import F_OF_U  # noqa: E402

SHORT = "--kimg 0.064 --batch 32 --device cpu".split()  # two steps
ROWS = {run.run_name(*run.row_of(exercise, name)): (exercise, name) for exercise, rows in run.EXERCISES.items() for name in rows}


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def measures(digits, tmp_path_factory, stage1):
    """The measures of the digits, with a classifier that was trained briefly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRATIO_CACHE", str(tmp_path_factory.mktemp("cache")))
        full = classifier.load
        patch.setattr(classifier, "load", lambda dataset: full(dataset, images=20_000))
        result = measure.Measures("digits", stage1 / "network.pt")
    return result


@pytest.fixture
def work(tmp_path, monkeypatch, stage1):
    """A folder with the stage 1 of `make demo`, in which run.py runs its scripts in this process."""

    def call(command):
        monkeypatch.setattr(sys, "argv", command[1:])
        runpy.run_path(command[1], run_name="__main__")

    (tmp_path / run.STAGE1).parent.mkdir(parents=True)
    shutil.copy(stage1 / "network.pt", tmp_path / run.STAGE1)
    monkeypatch.setattr(run, "WORK", tmp_path)
    monkeypatch.setattr(run, "call", call)
    monkeypatch.setattr(run, "CURVE", f"--fid-every 0.064 --fid-features {run.STAGE1} --fid-images 64")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ROWS)
def test_every_row_trains(name, work):
    """For two steps; with the changes of code of its row. The flags are those that the log's settings then show."""
    exercise, row = ROWS[name]
    flags, names = run.row_of(exercise, row)
    folder = run.folder_of(flags, names, 0, "mine.jsonl")
    run.train(folder, flags, names, 0, SHORT)
    assert checkpoints.load_network(folder / "network.pt", role="generator").about["nimg"] == 64
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert any("fid" in line for line in log)
    assert (folder / "train_diffratio.py").exists() == (bool(names) and names != ("teacher",))


@pytest.mark.parametrize("name", changes.CHANGES)
def test_every_change_fits_its_script_and_changes_it(name):
    script, before, after = changes.changed([name])
    assert before == (ROOT / script).read_text() != after
    compile(after, script, "exec")
    shown = changes.diff([name]).splitlines()
    assert 1 <= sum(line[0] in "+-" for line in shown[2:]) <= 12  # a change that a student makes by hand


def test_a_change_that_no_longer_fits_is_an_error(monkeypatch):
    monkeypatch.setitem(changes.CHANGES, "lost", ("train_diffratio.py", [("no such line\n", "")]))
    with pytest.raises(UserError, match="does not fit train_diffratio.py"):
        changes.changed(["lost"])


def test_the_further_divergences_are_derivatives_of_their_f():
    """As test_method.py checks those of the table; the lines are the ones that the change puts into it."""
    f = {"jeffreys": lambda u: (u - 1) * u.log(), "hellinger": lambda u: (u.sqrt() - 1) ** 2, "lecam": lambda u: (u - 1) ** 2 / (u + 1)}
    namespace = {"torch": torch}
    exec("LOSSES = {" + "\n".join(changes.MORE_DIVERGENCES) + "\n}", namespace)
    assert namespace["LOSSES"].keys() == f.keys()
    h = torch.linspace(-4, 4, 41, dtype=torch.float64)
    for name, loss in namespace["LOSSES"].items():
        u = torch.cat([(-h).exp(), torch.ones(1, dtype=torch.float64)]).requires_grad_(True)
        derivative = torch.autograd.grad(f[name](u).sum(), u)[0]
        torch.testing.assert_close(loss(h) - loss(torch.zeros_like(h)), derivative[:-1] - derivative[-1])


def steps(work, *names):
    """The weights of the generator after two steps with these changes of code."""
    return trained(work / "-".join(["steps", *names]), names, SHORT)


def trained(folder, names, length):
    run.train(folder, "", names, 0, length)
    return checkpoints.load_network(folder / "network.pt").state_dict()


def test_each_order_of_the_steps_is_another_training(work, one_thread):
    """All begin with the same numbers: only what the change says differs, and it does."""
    orders = {name: steps(work, *name) for name in ((), ("fresh-z",), ("same-noise",), ("simultaneous",), ("stale-samples",))}
    again = train_diffratio_in(work)
    assert all(torch.equal(orders[()][key], again[key]) for key in again)
    for a in orders:
        for b in orders:
            assert a == b or any(not torch.equal(orders[a][key], orders[b][key]) for key in again), (a, b)


def train_diffratio_in(work):
    """The product's own script with the default row's flags."""
    sys.argv = ["train_diffratio.py", *run.COMMON.split(), *SHORT, "--outdir", str(work / "own")]
    train_diffratio.main()
    return checkpoints.load_network(work / "own" / "network.pt").state_dict()


def test_in_the_simultaneous_order_the_generator_is_judged_by_the_older_ratio_network(work, one_thread):
    """Its first ratio network is blind, its head being zero: so the generator's first gradient is zero and it stays."""
    blind = SHORT[:1] + ["0.032"] + SHORT[2:]  # one step
    start = checkpoints.load_network(work / run.STAGE1).state_dict()
    after = trained(work / "simultaneous", ("simultaneous",), blind)
    assert all(torch.equal(start[key], after[key]) for key in start)
    moved = trained(work / "in turn", (), blind)
    assert any(not torch.equal(start[key], moved[key]) for key in start)


def test_results_are_not_measured_twice_and_the_table_shows_mean_and_spread(work, measures, call, capsys, monkeypatch):
    monkeypatch.setattr(measure, "Measures", lambda *_: measures)
    monkeypatch.setattr(run, "COMMON", f"{run.COMMON} {' '.join(SHORT)}")
    monkeypatch.setattr(run, "SAMPLES", 300)
    monkeypatch.setattr(run, "KIMG", 0)
    results, rows = work / "runs.jsonl", ["--rows", "1 ratio step", "rate 1e-3"]
    call(run, "ratio", "--seeds", "2", *rows, "--results", results)
    found = run.results(results)
    assert set(found) == {("default", 0), ("default", 1), ("ratio-lr_1e-3", 0), ("ratio-lr_1e-3", 1)}
    lines = results.read_text()
    line = found["default", 0]
    assert line["images"] == 300 and line["curve"][0][0] == 64 and set(line["calibration"]) == {"0.1", "0.5", "1.0"}
    a, b = (found["default", seed]["fd_classifier"] for seed in (0, 1))
    shown = capsys.readouterr().out
    assert f"| 1 ratio step | {(a + b) / 2:.1f} ± {abs(a - b) / 2**0.5:.1f} |" in shown and "| right at 0.5, % |" in shown
    monkeypatch.setattr(run, "train", None)  # a further run would fail
    with pytest.raises(UserError, match="0.064 instead of 24 kimg"):
        monkeypatch.setattr(run, "KIMG", 24)
        run.measured(run.folder_of("", (), 0, results), measures, 0)
    call(run, "ratio", "--seeds", "2", *rows, "--results", results)
    call(run, "order", "--table", "--results", results)
    assert results.read_text() == lines and "ratio step, then the same z" in capsys.readouterr().out


def test_run_refuses_what_it_does_not_know(refused, monkeypatch, tmp_path):
    assert "no row 'fresh x' in order" in refused(run, "order", "--rows", "fresh x")
    assert "say which exercise" in refused(run)
    monkeypatch.setattr(run, "WORK", tmp_path)
    assert "make demo" in refused(run, "order", "--results", tmp_path / "none.jsonl")


def test_a_script_that_is_killed_is_named(capsys, tmp_path):
    """It cannot say anything itself; its exit code is that of a shell, 128 + the signal's number."""
    (tmp_path / "crash.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(SystemExit) as stop:
        run.call([sys.executable, str(tmp_path / "crash.py")])
    assert stop.value.code == 137 and "crash.py was ended by signal 9" in capsys.readouterr().err


def test_the_classifier_tells_digits_and_is_kept(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFRATIO_CACHE", str(tmp_path))
    first = data.Dataset("first", digits.images[:1500], digits.labels[:1500])
    net = classifier.load(first, images=20_000)
    right = classifier.predict(net, digits.images[1500:]) == digits.labels[1500:]
    assert right.mean() > 0.85  # of those that it has not seen
    monkeypatch.setattr(classifier, "train", None)  # a second training would fail
    again = classifier.load(first, images=20_000)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters()))
    with pytest.raises(UserError, match="needs them"):
        classifier.load(data.Dataset("bare", digits.images))
    with pytest.raises(TypeError):  # other labels of the same images are another classifier
        classifier.load(data.Dataset("corrected", first.images, (first.labels + 1) % 10), images=20_000)


def test_measures_tell_good_from_bad_and_from_memory(measures, digits):
    """Data against data is near; noise covers nothing; copies of one image are precise, cover nothing, are at distance zero."""
    rng = np.random.default_rng(0)
    good = measures.floors()["data: one half against the other"]
    noise = measures(rng.integers(0, 256, (300, 8, 8, 1)).astype(np.uint8))
    copies = measures(digits.images[:1].repeat(300, axis=0), labels=digits.labels[:1].repeat(300))
    for view in ("classifier", "stage1"):
        assert good[f"fd_{view}"] < 0.1 * noise[f"fd_{view}"] and good[f"fd_{view}"] < 0.1 * copies[f"fd_{view}"]
        assert good[f"precision_{view}"] > 0.8 > 0.5 > noise[f"precision_{view}"] and copies[f"precision_{view}"] == 1
        assert good[f"recall_{view}"] > 0.8 > 0.1 > max(noise[f"recall_{view}"], copies[f"recall_{view}"])
        assert good[f"kid_{view}"] < 0.1 * noise[f"kid_{view}"]
    assert copies["nearest"] == pytest.approx(0, abs=0.1) and 20 < good["nearest"] < noise["nearest"]
    assert max(copies["shares"]) == 1 and copies["accuracy"] in (0, 1) and max(good["shares"]) < 0.2


def test_a_few_copies_show_in_the_nearest_percent(measures, digits):
    """3 % of copies leave the median where it is."""
    images = (digits.images[:300].astype(int) + np.random.default_rng(0).integers(-40, 41, (300, 8, 8, 1))).clip(0, 255).astype(np.uint8)
    mixed = np.concatenate([images[9:], digits.images[300:309]])
    new, copied = measures(images), measures(mixed)
    assert copied["nearest"] > 0.95 * new["nearest"] and copied["nearest_low"] < 0.5 < 10 < new["nearest_low"]


def test_of_large_sets_a_random_choice_is_measured(measures, digits, monkeypatch):
    """A set that is sorted by class is not judged by its first classes."""
    order = digits.labels.argsort(kind="stable")
    monkeypatch.setattr(measure.chosen, "__defaults__", (500,))
    found = measures(digits.images[order], digits.labels[order])
    assert found["images"] == 500 and min(found["shares"]) > 0.05 and found["accuracy"] > 0.8
    assert np.array_equal(measure.chosen(digits.images, 5000), digits.images)


def test_measure_refuses_other_images_before_it_measures(call, refused, measures, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "Measures", lambda *_: measures)
    monkeypatch.setattr(measures, "floors", None)  # to measure would fail
    for name, shape in (("large", (4, 28, 28, 1)), ("colour", (4, 8, 8, 3)), ("one", (1, 8, 8, 1))):
        np.savez(tmp_path / f"{name}.npz", arr_0=np.zeros(shape, np.uint8))
        assert f"{name}.npz" in refused(measure, "digits", f"x={tmp_path}/{name}.npz")
    assert "no such file" in refused(measure, "digits", f"x={tmp_path}/none.npz")


def test_the_nearest_training_image_is_by_root_mean_square(measures, digits):
    image = digits.images[:1].astype(int)
    shifted = np.where(image > 127, image - 3, image + 3).astype(np.uint8)
    assert measures.nearest(shifted).item() == pytest.approx(3, abs=0.01)
    assert measures.nearest(digits.images[:1], skip_self=True).item() > 10


def test_measure_command(call, capsys, measures, monkeypatch, tmp_path, digits):
    monkeypatch.setattr(measure, "Measures", lambda *_: measures)
    floors = measures.floors()
    monkeypatch.setattr(measures, "floors", lambda: {name: row | {"accuracy": 0.9} for name, row in floors.items()})  # as of a test set
    for seed in (0, 1):
        np.savez(tmp_path / f"{seed}.npz", arr_0=digits.images[300 * seed : 300 * (seed + 1)])
    picture = tmp_path / "panels.png"
    call(measure, "digits", "--json", tmp_path / "out.jsonl", f"mine={tmp_path}/0.npz", f"mine={tmp_path}/1.npz", "--picture", picture)
    out = capsys.readouterr().out
    assert "| data: one half against the other |" in out and out.count("| mine |") == 1 and "±" in out
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    with Image.open(picture) as image:  # two panels of 8 x 8 images of 8 x 8, and a column of white images
        assert image.size == (17 * 9 + 1, 8 * 9 + 1)
    assert [line["row"] for line in lines] == ["data: one half against the other", "mine", "mine"]
    assert "class asked for" not in out and not any("accuracy" in line for line in lines)


def test_with_a_test_set_the_first_row_shows_training_against_test_images(digits, tmp_path, monkeypatch):
    """Its distances to the nearest training image, and how often the classifier is right, are those of the test images."""
    halves = {name: data.Dataset(name, digits.images[part], digits.labels[part])
              for name, part in (("fashion-mnist", slice(900)), ("fashion-mnist:test", slice(900, 1797)))}  # fmt: skip
    monkeypatch.setattr(data, "load", halves.__getitem__)
    monkeypatch.setenv("DIFFRATIO_CACHE", str(tmp_path))
    full = classifier.load
    monkeypatch.setattr(classifier, "load", lambda dataset: full(dataset, images=20_000))
    held = measure.Measures("fashion-mnist")
    row = held.floors()["data: training against test images"]
    right = classifier.predict(held.classifier, digits.images[900:]) == digits.labels[900:]
    assert row["images"] == 897 and row["accuracy"] == right.mean() and 0.8 < right.mean() < 0.99
    assert row["nearest"] == held.nearest(digits.images[900:]).median().item() > row["nearest_low"] > 5


def test_pictures(work, tmp_path):
    pytest.importorskip("matplotlib", reason="an optional extra")
    line = dict(run="default", seed=0, curve=[[64, 0.5], [128, 0.25]])
    (tmp_path / "mine.jsonl").write_text(json.dumps(line) + "\n")
    for exercise in ("order", "teacher"):
        figures.draw(exercise, tmp_path / "mine.jsonl", tmp_path / f"{exercise}.png")
        assert (tmp_path / f"{exercise}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="run.py order"):
        figures.draw("order", tmp_path / "none.jsonl", tmp_path / "none.png")


def test_the_results_in_the_repository_are_complete():
    """Three seeds of every row, each of the full length."""
    found = run.results(ROOT / "exercises" / "results" / "runs.jsonl")
    assert set(found) == {(name, seed) for name in ROWS for seed in range(3)}
    assert all(line["curve"][-1][0] == 1000 * run.KIMG for line in found.values())


def test_own_pictures_from_a_folder_to_a_class_of_the_generator(call, digits, tmp_path, monkeypatch):
    """Exercise 12, for two steps of each stage: the classes in dataset.json are those of the generator."""
    monkeypatch.chdir(tmp_path)
    data.write_images([(digits.images[:200], digits.labels[:200].tolist())], "my-pictures")
    short = SHORT[:4]
    call(pretrain, "--data", "my-pictures", "--cond", *short, "--outdir", "runs/mine/pretrain")
    call(train_diffratio, "--data", "my-pictures", "--init", "runs/mine/pretrain/network.pt", *short, "--outdir", "runs/mine/dijs")
    call(sample, "--network", "runs/mine/dijs/network.pt", "--class", "7", "--n", "6", "--out", "sevens.npz")
    assert data.load("sevens.npz").labels.tolist() == [7] * 6
