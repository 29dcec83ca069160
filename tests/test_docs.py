"""README and docs stay true: commands parse, links and names exist, code and formulas are those of the scripts."""

import argparse
import importlib
import re
import shlex
import sys
from unittest import mock

import pytest
import sympy  # comes with PyTorch
import torch
from check import F_OF_U
from conftest import ROOT

from machinery import training
from train_diffratio import DIVERGENCES

PAGES = [ROOT / "README.md", *(path for folder in ("docs", "exercises", "exercises/solutions", "assets")
                               for path in (ROOT / folder).glob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(PAGES)}


def commands():
    """Every `python X.py ...` and `torchrun ... X.py ...` in a code block: (page, path of the script, its arguments)."""
    for page, text in PAGES.items():
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            for line in re.findall(r"^ *((?:python(?! -)|torchrun) .*)$", block.replace("\\\n", " "), re.MULTILINE):
                words = shlex.split(line.replace("$s", "0"), comments=True)
                for i in [i for i, word in enumerate(words) if word.endswith(".py")][:1]:
                    yield pytest.param(words[i], words[i + 1 :], id=f"{page}: {line}")


@pytest.mark.parametrize("script, words", commands())
def test_commands_parse(monkeypatch, script, words):
    """The script's own parser accepts them, and for the scripts of the top level what `main` checks before it starts."""
    Parsed = type("Parsed", (Exception,), {})
    stop = mock.Mock(side_effect=Parsed)
    for name in ("parse_args", "parse_intermixed_args") if "/" in script else ():
        parse = getattr(argparse.ArgumentParser, name)
        monkeypatch.setattr(argparse.ArgumentParser, name, lambda *args, parse=parse: stop(parse(*args)))
    monkeypatch.setattr(training, "Runtime", stop)
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    with pytest.raises(Parsed):
        importlib.import_module((ROOT / script).stem).main()


def anchors(text):
    """GitHub's anchors of a page's headings."""
    return [re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]


@pytest.mark.parametrize("page", PAGES)
def test_links_files_and_names_exist(page):
    """Links with their anchors; files in backquotes; functions, classes and constants written as `file.py`: `name`."""
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", prose):
        if not target.startswith("http"):
            path = (ROOT / page).parent / target if target else ROOT / page
            assert path.exists() and (not anchor or anchor in anchors(path.read_text())), f"{target}#{anchor}"
    for file in re.findall(r"`((?:tests|machinery|exercises|docs|assets)/[\w./-]+\.\w+)`", prose):
        assert (ROOT / file).exists(), file
    for file, name in re.findall(r"`([\w/]+\.py)`:\s+`(\w+)`", prose):
        assert re.search(rf"^((def|class) {name}\b|{name} = )", (ROOT / file).read_text(), re.MULTILINE), (file, name)


def test_method_in_the_readme_is_the_code():
    code = (ROOT / "train_diffratio.py").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGES["README.md"], re.DOTALL | re.MULTILINE)
    assert all(name in block for name in ("DIVERGENCES = {", "def ratio_loss", "def generator_loss"))
    assert all(f"\n{part.strip()}\n" in code for part in block.split("\n\n\n"))


def value(formula, **variables):
    """The value of a formula such as `$\\frac{1}{2} (u + 1) \\ln u$`."""
    text = re.sub(r"e\^\{([^{}]*)\}", r"exp(\1)", formula.strip(" $")).replace("\\ln", "log")
    text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1) / (\2))", text)
    parsed = sympy.parse_expr(text, transformations="all")
    return sympy.lambdify([*variables], parsed, torch)(*variables.values())


@pytest.mark.parametrize("name", DIVERGENCES)
def test_table_of_divergences_is_the_code(name):
    """f is that of exercises/check.py, the loss that of the code, the weight -dloss/dh."""
    (row,) = [line for line in PAGES["docs/method.md"].splitlines() if line.startswith(f"| `{name}` |")]
    f, loss, weight = row.split("|")[2:5]
    h = torch.linspace(-4, 4, 41, dtype=torch.float64, requires_grad=True)
    u = (-h).exp().detach()
    torch.testing.assert_close(value(f, u=u), F_OF_U[name](u))
    torch.testing.assert_close(value(loss, h=h), DIVERGENCES[name](h))
    torch.testing.assert_close(value(weight, h=h) + 0 * h, -torch.autograd.grad(value(loss, h=h).sum(), h)[0])
