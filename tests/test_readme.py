"""README.md stays true: its commands exist with the flags they are given, its files exist and are about as long as it says."""

import io
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import fid
import pretrain
import sample
import train_diffratio

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "METHOD.md", "assets/README.md")}
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


def test_files_of_the_reading_order_are_about_as_long_as_the_readme_says():
    rows = re.findall(r"^\| `([\w/]+\.\w+)` \| (\d+) \|", PAGES["README.md"], re.MULTILINE)
    assert {"train_diffratio.py", "pretrain.py", "networks.py", "METHOD.md"} <= {name for name, _ in rows}
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
