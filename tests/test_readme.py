"""README.md stays true: its commands exist with the flags they are given, its files exist and are about as long as it says."""

import io
import json
import re
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import fid
import pretrain
import sample
import train_diffratio

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "exercises"))
import changes  # noqa: E402
import measure  # noqa: E402
import run  # noqa: E402

PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "docs/method.md", "assets/README.md", "exercises/README.md")}
SCRIPTS = {f"{script.__name__}.py": script for script in (pretrain, train_diffratio, sample, fid)}


def commands():
    """(page, script, arguments) of every line of a code block that runs one of the four scripts."""
    for page, text in PAGES.items():
        for block in re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            for line in block.splitlines():
                if line.startswith(("python ", "torchrun ")):
                    words = shlex.split(line, comments=True)
                    script = next((word for word in words[1:] if word.endswith(".py")), None)
                    if script in SCRIPTS:
                        yield page, script, words[words.index(script) + 1 :]


def test_there_are_commands_of_every_script():
    assert {script for _, script, _ in commands()} == set(SCRIPTS)


@pytest.mark.parametrize("page, script, words", commands(), ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_commands_take_the_flags_they_are_shown_with(monkeypatch, page, script, words):
    """Parsed by the script's own parser, which refuses unknown flags and values; nothing is run."""
    monkeypatch.setattr("sys.argv", [script, *(word for word in words if word != "...")])
    if "--help" in words:
        with redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit) as stop:
            SCRIPTS[script].arguments()
        assert stop.value.code == 0 and "usage" in text.getvalue()
    else:
        SCRIPTS[script].arguments()


def test_commands_of_the_exercises_exist_with_their_flags(capsys):
    """Every `python exercises/NAME.py ...` and `python exercises/NAME.py ...` of the pages; flags as the script's --help shows them."""
    lines = {line for text in PAGES.values() for line in re.findall(r"^python (?:exercises|examples)/.*$", text, re.MULTILINE)}
    assert len(lines) > 15
    for line in sorted(lines):
        words = shlex.split(line, comments=True)[1:]
        assert (ROOT / words[0]).exists(), line
        flags = [word for word in words[1:] if word.startswith("--")]
        script = (ROOT / words[0]).read_text()
        for flag in flags:
            own = f'"{flag}"' in script or flag[2:] in ("samples", "pool", "steps")  # of verifier.py, added in a loop
            assert own or f'"{flag}"' in (ROOT / "training.py").read_text(), f"{line}: {flag}"
        if words[0] == "exercises/run.py" and words[1] not in ("NAME", "--list", "--diff", "--table"):
            assert words[1] in run.EXERCISES, line


def test_the_page_of_exercises_shows_the_changes_as_they_are():
    """Each diff that run.py makes and the page shows; and every exercise has all of its parts."""
    page = PAGES["exercises/README.md"]
    shown = [name for name in changes.CHANGES if changes.diff([name]) in page]
    assert {"divergences", "generator-random", "fresh-z", "frozen-encoder"} <= set(shown)
    parts = re.split(r"^## (\d+)\. ", page, flags=re.MULTILINE)
    assert [int(number) for number in parts[1::2]] == list(range(13))
    for number, text in zip(parts[1::2], parts[2::2]):
        for heading in ("Question", "Predict first", "Read", "Do", "Run", "Expect", "Pitfall", "Go on"):
            assert f"**{heading}" in text, f"exercise {number}: {heading}"
        assert "<summary>What to conclude</summary>" in text and not re.search(r"@[A-Z]+|TABLE-", text), number


def test_the_tables_of_the_exercises_are_those_of_their_results():
    """What `run.py NAME --seeds 3 --table` prints from the lines in the repository."""
    found, page = run.results(ROOT / "exercises" / "results" / "runs.jsonl"), PAGES["exercises/README.md"]
    for exercise, rows in run.EXERCISES.items():
        assert run.table(exercise, list(rows), found, 3) in page, exercise


def test_files_of_the_reading_order_are_about_as_long_as_the_readme_says():
    rows = re.findall(r"^\| `([\w/]+\.\w+)` \| (\d+) \|", PAGES["README.md"], re.MULTILINE)
    assert {"train_diffratio.py", "pretrain.py", "networks.py", "docs/method.md"} <= {name for name, _ in rows}
    lines = {name: len((ROOT / name).read_text().splitlines()) for name, _ in rows}
    for name, count in rows:  # within a tenth, so that a small change of one's own does not fail here
        assert abs(int(count) - lines[name]) <= 0.1 * lines[name], f"{name} has {lines[name]} lines"
    assert set(path.name for path in ROOT.glob("*.py")) <= lines.keys()


def test_our_rows_among_the_settings_of_others_are_the_presets():
    rows = re.findall(r"^\| \*\*ours\*\*, `(\w+)`[^|]*\|(.*)$", PAGES["README.md"], re.MULTILINE)
    assert [name for name, _ in rows] == ["cifar10", "imagenet64", "imagenet512"]
    for name, row in rows:
        preset = train_diffratio.PRESETS[name]
        keys = ("lr", "ratio_lr", "beta1", "beta2", "batch", "kimg", "ema_halflife_kimg", "karras_share", "t_init")
        found = [float(number) for number in re.findall(r"\d[\de.-]*", row.replace("K[0, ", "K["))]
        found[5:7] = [1000 * million for million in found[5:7]]
        assert found == [preset[key] for key in keys] and preset["noise"] == "karras"


def test_links_and_pictures_exist():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)[)#]", text):
            assert target.startswith("http") or ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_the_table_of_fashion_mnist_is_that_of_its_results():
    """What exercises/measure.py printed, less two columns, from runs of the preset's length."""
    results, rows = ROOT / "exercises" / "results", {}
    for line in map(json.loads, (results / "fashion-mnist.jsonl").read_text().splitlines()):
        rows.setdefault(line["row"], []).append(line)
    columns = {name: column for name, column in measure.COLUMNS.items() if name not in ("precision, stage 1", "recall, stage 1")}
    assert measure.table(rows, columns) in PAGES["README.md"]
    heun, before = (rows[name][0]["fd_classifier"] for name in ("Heun, 18 steps", "one step, before stage 2"))
    after = [row["fd_classifier"] for row in rows["one step, after stage 2"]]
    text = f"{', '.join(f'{x:.1f}' for x in after)} ({', '.join(f'{x / heun:.2f}' for x in after)} times Heun's distance, {', '.join(f'{before / x:.0f}' for x in after)} times nearer than before)"
    assert text in PAGES["README.md"].replace("\n", " ")
    assert len(after) == 3 and max(after) < 2 * heun and 50 * max(after) < before and all(0.05 <= share <= 0.15 for row in rows["one step, after stage 2"] for share in row["shares"])
    logs = {path.stem: json.loads(path.read_text().splitlines()[-1])["nimg"] for path in (results / "fashion-mnist").glob("*.jsonl")}
    lengths = {script: 1000 * script.PRESETS["fashion-mnist"]["kimg"] for script in (pretrain, train_diffratio)}
    expected = {"pretrain": lengths[pretrain], "pretrain-cond": lengths[pretrain]}
    expected["dijs-cond"] = 1000 * int(re.search(r"--kimg (\d+) --init runs/fashion-mnist/pretrain-cond/network.pt", PAGES["README.md"])[1])
    assert logs == expected | {f"dijs-{seed}": lengths[train_diffratio] for seed in range(len(after))}
