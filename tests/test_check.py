"""exercises/check.py tells a right change of code from a wrong one, for each exercise with code."""

import changes
import check
import plane_blank
import pytest
import run
from conftest import ROOT

PLANE = {  # blanks of plane_blank.py, filled in
    '"dijs": lambda h: ...': '"dijs": lambda h: -0.5 * F.softplus(h)', '"dikl": lambda h: ...': '"dikl": lambda h: -h',
    '"dirm": lambda h: ...': '"dirm": lambda h: F.softplus(-h)', '"fkl": lambda h: ...': '"fkl": lambda h: -torch.exp(h)',
    "from their logits: [N].\"\"\"\n    return ...":
        'from their logits: [N]."""\n    return 0.5 * (F.softplus(-h_real) + F.softplus(h_fake))',
    "h at x [N, 2].\"\"\"\n    return ...":
        'h at x [N, 2]."""\n    return DIVERGENCES[divergence](ratio(fake + sigma[:, None] * eps, sigma))',
}


def edited(tmp_path, script, *edits):
    """Path of a copy of a script with (old, new) replaced."""
    text = (ROOT / script).read_text()
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = tmp_path / "exercises" / "student.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text.replace("Path(__file__).resolve().parent.parent", f"Path({str(ROOT)!r})"))
    return path


@pytest.fixture
def verdict(call, capsys):
    """Function (exercise, script, *variant) -> (whether it is right, what is printed)."""

    def judge(exercise, script, *variant):
        try:
            call(check, exercise, *variant, "--script", script)
            return True, capsys.readouterr().out
        except SystemExit as stop:
            assert stop.code == 1
            return False, capsys.readouterr().out

    return judge


def changed(tmp_path, name):
    """Path of train_diffratio.py with a change of the exercises."""
    path = tmp_path / f"{name}.py"
    path.write_text(changes.changed([name])[1])
    return path


ORDERS = {"b": "fresh-z", "c": "same-noise", "d": "simultaneous", "e": "stale-samples"}


@pytest.mark.parametrize("variant, other", zip("bcde", "cdeb"))
def test_each_order_of_the_steps_is_told_from_the_others(variant, other, tmp_path, verdict):
    """By what the steps got. The neighbour's change is told apart, with a hint and without the solution."""
    script = changed(tmp_path, ORDERS[variant])
    right, shown = verdict("5", script, variant)
    assert right and "hint" not in shown
    right, shown = verdict("5", script, other)
    assert not right and "wanted: " in shown and "hint: " in shown and "not yet" in shown
    assert not any(line.strip("+- ") in shown for line in changes.diff(*changes.changed([ORDERS[other]])).splitlines()[3:])


def test_the_script_as_it_is_is_variant_a_and_an_error_names_its_line(tmp_path, verdict, refused):
    right, shown = verdict("5", ROOT / "train_diffratio.py")
    assert not right and "your script is: a" in shown
    broken = edited(tmp_path, "train_diffratio.py", ("            real, labels = batches", "            real, labels = batch"))
    assert "fails in line" in refused(check, "5", "--script", broken) and "NameError" in refused(check, "5", "--script", broken)
    blind = edited(tmp_path, "train_diffratio.py", ("args.lr * factor, generator_objective, z, fake,",
                                                    "args.lr * factor, generator_objective, z, fake.detach().requires_grad_(),"))
    right, shown = verdict("5", blind, "a")
    assert not right and "does not move" in shown


def test_where_networks_start_and_what_is_trained(tmp_path, verdict, refused):
    """Exercise 3: the generator alone at random. Exercise 8: the head alone is trained."""
    assert verdict("3", changed(tmp_path, "generator-random"))[0]
    right, shown = verdict("3", edited(tmp_path, "train_diffratio.py", (changes.ENCODER, "        pass\n")))
    assert not right and "ratio starts from: random weights" in shown
    assert verdict("8", changed(tmp_path, "frozen-encoder"))[0]
    wrong = changes.UNFROZEN.replace("(True)", "(True).head.requires_grad_(False)")
    right, shown = verdict("8", edited(tmp_path, "train_diffratio.py", (changes.UNFROZEN, wrong)))
    assert not right and "move: none" in shown  # behind a head of zeros no gradient reaches the encoder
    frozen = edited(tmp_path, "train_diffratio.py", (changes.UNFROZEN, changes.UNFROZEN.replace("True", "False")))
    assert "does not require grad" in refused(check, "8", "--script", frozen)
    right, shown = verdict("8", ROOT / "train_diffratio.py")
    assert not right and "encoder and head" in shown


@pytest.mark.parametrize("wrong, hint", [
    ("-torch.exp(h / 2)|torch.exp(h / 2)", "sign"), ("-4 * torch.sigmoid(h) ** 2|-torch.sigmoid(h) ** 2", "constant factor"),
    ("-h - torch.exp(h),|-h - torch.exp(-h),", "differentiate f by u")])
def test_a_new_divergence_is_derived_from_its_f(wrong, hint, tmp_path, verdict):
    script = changed(tmp_path, "divergences")
    assert verdict("2", script)[0]
    text, (old, new) = script.read_text(), wrong.split("|")
    assert text.count(old) == 1
    script.write_text(text.replace(old, new))
    right, shown = verdict("2", script)
    assert not right and hint in shown and old not in shown
    assert not verdict("2", ROOT / "train_diffratio.py")[0]  # no line yet


def test_noise_and_weight(tmp_path, verdict):
    """Exercise 7: ln sigma is uniform. Exercise 10: the weight of a sample."""
    choice = ('["lognormal", "karras"]', '["lognormal", "karras", "mine"]')
    body = '    if args.noise == "karras":  # uniform in the index'
    new = '    if args.noise == "mine":\n        return (math.log(0.05) + rt.rand() * math.log(100)).exp()\n'
    assert verdict("7", edited(tmp_path, "train_diffratio.py", choice, (body, new + body)))[0]
    linear = new.replace("(math.log(0.05) + rt.rand() * math.log(100)).exp()", "0.05 + rt.rand() * 4.95")
    right, shown = verdict("7", edited(tmp_path, "train_diffratio.py", choice, (body, linear + body)))
    assert not right and "uniform in ln sigma" in shown
    line, weight = "        direction = sample_weight(fake, right) * (wrong - right)\n", "sigma[:, None, None, None] ** 2\n"
    one = edited(tmp_path, "exercises/teacher.py", (line, "        direction = wrong - right\n"))
    assert verdict("10", one)[0] and not verdict("10", one, "1/sigma^2")[0]
    assert verdict("10", edited(tmp_path, "exercises/teacher.py", (line, f"        direction = (wrong - right) / {weight}")), "1/sigma^2")[0]
    assert not verdict("10", ROOT / "exercises/teacher.py")[0]


def test_blanks_of_the_plane(tmp_path, verdict, refused, capsys):
    """Filled in they are right, and the program runs. ln(1 + exp(h)) by hand overflows; forward KL itself may."""
    solved = edited(tmp_path, "exercises/plane_blank.py", *PLANE.items())
    assert verdict("1", solved)[0] and not verdict("1", ROOT / "exercises" / "plane_blank.py")[0]
    for old, new, said in (("F.softplus(-h),", "torch.log(1 + torch.exp(-h)),", "not finite at h = -200"),
                           ("0.5 * (F.softplus(-h_real) +", "(F.softplus(-h_real) +", "twice"),
                           ("ratio(fake + sigma[:, None] * eps, sigma))", "ratio(fake, sigma))", "not asked about noised samples")):
        text = solved.read_text()
        assert text.count(old) == 1
        wrong = tmp_path / "wrong.py"
        wrong.write_text(text.replace(old, new))
        right, shown = verdict("1", wrong)
        assert not right and said in shown
    assert "blanks left" in refused(plane_blank, "--no-picture")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["plane_blank.py", "--steps", "3", "--iterations", "2", "--no-picture"])
        check.functions(solved)["main"]()
    assert "of 8 modes" in capsys.readouterr().out


def test_exercises_without_code_say_so(call, capsys, refused):
    call(check, "6")
    assert "no code to check" in capsys.readouterr().out
    assert "variants a to e" in refused(check, "5", "g")
    assert set(check.CHECKS) <= set(run.NUMBERS)
