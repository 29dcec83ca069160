"""exercises/check.py tells a right change of code from a wrong one, for each exercise with code."""

import changes
import check
import plane_blank
import pytest
import run
from conftest import ROOT, call

from machinery.files import UserError

STAGE2, TEACHER, BLANK = (ROOT / name for name in (
    "train_diffratio.py", "exercises/teacher.py", "exercises/plane_blank.py"))
PLANE = {  # blanks of plane_blank.py, filled in
    '"dijs": lambda h: ...': '"dijs": lambda h: -0.5 * F.softplus(h)', '"dikl": lambda h: ...': '"dikl": lambda h: -h',
    '"dirm": lambda h: ...': '"dirm": lambda h: F.softplus(-h)', '"fkl": lambda h: ...': '"fkl": lambda h: -torch.exp(h)',
    "from their logits: [N].\"\"\"\n    return ...":
        'from their logits: [N]."""\n    return 0.5 * (F.softplus(-h_real) + F.softplus(h_fake))',
    "h at x [N, 2].\"\"\"\n    return ...":
        'h at x [N, 2]."""\n    return DIVERGENCES[divergence](ratio(fake + sigma[:, None] * eps, sigma))',
    "h_fake = ...  #": "h_fake = ratio(fake.detach() + sigma[:, None] * normal(), sigma)  #",
    "    ...  # one step": "    follow.step(generator_loss(ratio, fake, levels(), normal(), divergence))  # one step",
}


@pytest.fixture
def edited(tmp_path):
    """Function (script, {old: new}) -> the path of an edited copy."""

    def edit(script, edits):
        text = script.read_text()
        for old, new in edits.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        path = tmp_path / "exercises" / "student.py"
        path.parent.mkdir(exist_ok=True)
        root = "Path(__file__).resolve().parent.parent"
        path.write_text(text.replace(root, f"Path({str(ROOT)!r})"))
        return path

    return edit


@pytest.fixture
def verdict(capsys):
    """Function (exercise, script, *variant) -> (whether it is right, what is printed)."""

    def judge(exercise, script, *variant):
        try:
            call(check, exercise, *variant, "--script", script)
            return True, capsys.readouterr().out
        except SystemExit as stop:
            assert stop.code == 1
            return False, capsys.readouterr().out

    return judge


ORDERS = {"b": "fresh-z", "c": "same-noise", "d": "simultaneous", "e": "stale-samples"}


@pytest.mark.parametrize("variant, other", zip("bcde", "cdeb"))
def test_each_order_of_the_steps_is_told_from_the_others(variant, other, edited, verdict):
    """By what the steps got. The neighbour's change is told apart, with a hint and without the solution."""
    script = edited(STAGE2, changes.CHANGES[ORDERS[variant]])
    right, shown = verdict("5", script, variant)
    assert right and "hint" not in shown
    right, shown = verdict("5", script, other)
    assert not right and "wanted: " in shown and "hint: " in shown and "not yet" in shown
    solution = "".join(changes.CHANGES[ORDERS[other]].values()).splitlines()
    assert not any(line.strip() in shown for line in solution)


def test_another_way_to_do_both_at_once_is_right_too(edited, verdict):
    """The generator's step stands before the ratio network's."""
    text = STAGE2.read_text()
    start = text.index("            _, h_real, h_fake = ratio_optimizer.step(")
    middle = text.index("        # 2. Generator: the same samples")
    end = text.index("        run.advance()  # counts")
    ratio_step, generator_step = text[start:middle], text[middle:end]
    thawed = "        ratio.requires_grad_(True)" + ("\n" + ratio_step).replace("\n    ", "\n")
    assert verdict("5", edited(STAGE2, {ratio_step + generator_step: generator_step + thawed}), "d")[0]


def test_the_script_as_it_is_is_variant_a_and_an_error_names_its_line(edited, verdict, refused):
    right, shown = verdict("5", STAGE2)
    assert not right and "your script is: a" in shown
    broken = edited(STAGE2, {"real, labels = next": "real, labels = nexts"})
    error = refused(check, "5", "--script", broken)
    assert "fails in line" in error and "NameError" in error
    broken = edited(STAGE2, {"real, labels = next": "raise NotImplementedError; real, labels = next"})
    assert "fails in line" in refused(check, "5", "--script", broken)
    broken = edited(STAGE2, {"def main():": "def main()):"})
    assert "fails in line" in refused(check, "2", "--script", broken)
    assert "has no SETTINGS" in refused(check, "7", "--script", BLANK)
    frozen = edited(STAGE2, {changes.UNFROZEN: changes.UNFROZEN.replace("True", "False")})
    assert "does not require grad" in refused(check, "8", "--script", frozen)
    of_fake = "generator_objective, z, fake"
    blind = edited(STAGE2, {f"{of_fake},": f"{of_fake}.detach().requires_grad_(),"})
    right, shown = verdict("5", blind, "a")
    assert not right and "does not move" in shown


NO_ENCODER = {changes.ENCODER: "        pass\n"}
NO_HEAD = {changes.UNFROZEN: changes.UNFROZEN.replace("\n", ".head.requires_grad_(False)\n")}
UNIFORM, LINEAR = "(math.log(0.05) + rt.rand() * math.log(100)).exp()", "0.05 + rt.rand() * 4.95"
VSD, ONE = "direction = sample_weight(fake, right) * (wrong - right)", "direction = (wrong - right)"


def levels(formula):
    """The edits that add these noise levels to the choices."""
    first = '    if args.noise == "karras":  # uniform in the index'
    return {'["lognormal", "karras"]': '["lognormal", "karras", "mine"]',
            first: f'    if args.noise == "mine":\n        return {formula}\n{first}'}


@pytest.mark.parametrize("command, script, edits, said", [
    ("3", STAGE2, changes.CHANGES["generator-random"], "right"),  # the generator alone
    ("3", STAGE2, NO_ENCODER, "ratio starts from: random weights"),
    ("8", STAGE2, changes.CHANGES["frozen-encoder"], "right"),  # the head alone is trained
    ("8", STAGE2, {}, "encoder and head"),
    ("8", STAGE2, NO_HEAD, "move: none"),  # behind a head of zeros no gradient reaches the encoder
    ("7", STAGE2, levels(UNIFORM), "right"),
    ("7", STAGE2, levels(LINEAR), "uniform in ln sigma"),
    ("10", TEACHER, {VSD: ONE}, "right"),
    ("10 1/sigma^2", TEACHER, {VSD: ONE}, "weight of a sample: 1\n"),
    ("10 1/sigma^2", TEACHER, {VSD: f"{ONE} / sigma.view(-1, 1, 1, 1) ** 2"}, "right"),
    ("10", TEACHER, {}, "at sigma 0.1, 0.5, 1, 2"),
    ("2", STAGE2, changes.CHANGES["divergences"], "right"),
    ("2", STAGE2, {}, "no line yet"), ("1", BLANK, {}, "no line yet"),
])
def test_starts_trained_parts_noise_and_weights(command, script, edits, said, edited, verdict):
    exercise, *variant = command.split()
    right, shown = verdict(exercise, edited(script, edits), *variant)
    assert right == (said == "right") and said in shown and right == ("not yet" not in shown)


@pytest.mark.parametrize("exercise, old, new, hint", [
    ("2", "-torch.exp(h / 2)", "torch.exp(h / 2)", "sign"),
    ("2", "-4 * torch.sigmoid(h) ** 2", "-torch.sigmoid(h) ** 2", "constant factor"),
    ("2", "-h - torch.exp(h),", "-h - torch.exp(-h),", "differentiate f by u"),
    ("1", "F.softplus(-h),", "torch.log(1 + torch.exp(-h)),", "not finite at h = -200"),
    ("1", "0.5 * (F.softplus(-h_real) +", "(F.softplus(-h_real) +", "twice"),
    ("1", "ratio(fake + sigma[:, None] * eps,", "ratio(fake,", "not asked about noised samples"),
    ("1", "ratio(fake.detach() + sigma[:, None] * normal()", "ratio(fake + sigma[:, None] * normal()", "moves: generator and ratio network"),
    ("1", "generator_loss(ratio, fake, levels(), normal(), div", "generator_loss(ratio, fake.detach(), levels(), normal(), div",
     "wanted: generator"),
    ("1", "h_fake = ratio(fake.detach()", "h_fake = ratios(fake.detach()", "NameError: name 'ratios'"),
])
def test_what_is_wrong_with_a_line_is_said(exercise, old, new, hint, edited, verdict):
    solutions = {"1": (BLANK, PLANE), "2": (STAGE2, changes.CHANGES["divergences"])}
    right, shown = verdict(exercise, edited(edited(*solutions[exercise]), {old: new}))
    assert not right and hint in shown and old not in shown


def test_filled_blanks_are_right_and_run(edited, verdict, refused, capsys, monkeypatch):
    solved = edited(BLANK, PLANE)
    assert verdict("1", solved)[0]
    assert "blanks left" in refused(plane_blank, "--no-picture")
    command = "plane_blank.py --steps 3 --iterations 2 --no-picture"
    monkeypatch.setattr("sys.argv", command.split())
    check.functions(solved)["main"]()
    assert "of 8 modes" in capsys.readouterr().out
    last = edited(BLANK, {old: new for old, new in PLANE.items() if "ratio(" not in new})
    with pytest.raises(UserError, match="blanks left"):
        check.functions(last)["main"]()


def test_exercises_without_code_say_so(capsys, refused):
    call(check, "6")
    assert "no code to check" in capsys.readouterr().out
    assert "variants a to e" in refused(check, "5", "g")
    assert set(check.CHECKS) <= set(run.NUMBERS)
