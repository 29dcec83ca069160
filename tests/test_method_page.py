"""docs/method.md: the functions it names exist, its table of divergences is the one in the code, its formulas survive Markdown."""

import ast
import re
from pathlib import Path

import pytest
import torch
from test_method import F_OF_U

from train_diffratio import DIVERGENCES

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/method.md").read_text()


def defined(path):
    """Names of the functions, classes and constants at the top level of a Python file."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def test_functions_named_on_the_page_exist():
    """They are written as `file.py`: `name`."""
    named = re.findall(r"`([\w/]+\.py)`:\s+`(\w+)`", PAGE)
    assert {"denoising_loss", "one_step", "noise_levels", "ratio_loss", "generator_loss"} <= {name for _, name in named}
    missing = [f"{file}: {name}" for file, name in named if name not in defined(ROOT / file)]
    assert not missing


def value(formula, **variables):
    """What a formula of the table, as `$\\frac{1}{2} (u + 1) \\ln u$`, comes to. What stands side by side is multiplied."""
    text = re.sub(r"e\^\{([^{}]*)\}", r"exp(\1)", formula.strip().strip("$"))
    text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1) / (\2))", text)
    text = re.sub(r"\\ln (\w)", r"log(\1)", text).replace("\\ln", "log")
    product, before = "", "("
    for token in re.findall(r"\w+|\S", text):
        juxtaposed = re.match(r"[\w)]", before) and re.match(r"[\w(]", token) and before not in ("exp", "log")
        product += " * " + token if juxtaposed else token
        before = token
    return eval(product, {"__builtins__": {}, "exp": torch.exp, "log": torch.log, **variables})


@pytest.mark.parametrize("name", F_OF_U)
def test_table_of_divergences_is_true(name):
    """f is that of test_method.py, the loss that of the code and, up to a constant, f'(exp(-h)); the weight is -dloss/dh."""
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]
    f, loss, weight = row.split("|")[2:5]
    h = torch.linspace(-4, 4, 41, dtype=torch.float64, requires_grad=True)
    u = (-h).exp().detach().requires_grad_(True)
    torch.testing.assert_close(value(f, u=u), F_OF_U[name](u))
    torch.testing.assert_close(value(loss, h=h), DIVERGENCES[name](h))
    derivative = torch.autograd.grad(value(f, u=u).sum(), u)[0]
    constant = (derivative - DIVERGENCES[name](h)).detach()
    torch.testing.assert_close(constant, constant[:1].expand(41))
    slope = torch.autograd.grad(value(loss, h=h).sum(), h)[0]
    torch.testing.assert_close(value(weight, h=h) + 0 * h, -slope)


def test_formulas_survive_markdown():
    """Markdown reads `$...$` before the formulas are set: emphasis, escapes, tags and bars there would be taken for its own."""
    prose = re.sub(r"```math\n.*?```", "", PAGE, flags=re.DOTALL)
    for line in prose.splitlines():
        assert line.count("$") % 2 == 0, f"a formula goes on over the end of the line: {line}"
        for formula in line.split("$")[1::2]:
            assert not re.search(r"[})\]]_|\\[^a-zA-Z]|[*<>|]|^\s|\s$", formula), formula
