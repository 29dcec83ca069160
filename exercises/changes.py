"""Changes of code that the exercises try, as text: what is replaced in which script, and by what.

A student makes them in an editor; `run.py` makes them in a copy of the script, so that what was measured is what is shown
(`python exercises/run.py --diff NAME`), and a test sees that each still fits its script.
"""

import difflib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from machinery.files import UserError  # noqa: E402

MORE_DIVERGENCES = (  # further lines for the table of divergences: exercise 2
    '"jeffreys": lambda h: -h - torch.exp(h),  # both Kullback-Leibler divergences, f(u) = (u - 1) ln u',
    '"hellinger": lambda h: -torch.exp(h / 2),  # squared Hellinger distance, f(u) = (sqrt(u) - 1)^2',
    '"lecam": lambda h: -4 * torch.sigmoid(h) ** 2,  # a chi-square softened at both ends, f(u) = (u - 1)^2 / (u + 1)',
)
_LAST_LINE = '    "fkl": lambda h: -torch.exp(h),  # forward Kullback-Leibler, f(u) = -ln u\n'
_SAME_Z = """            z, sigma = draw.normal(*shape), noise_levels(args, draw)
            fake = samples(z, labels, keep_graph=whole and step == args.ratio_steps - 1)
"""
_RE_NOISE = "        sigma, eps = noise_levels(args, draw), draw.normal(*shape)\n"
_RATIO_STEP = """            ratio_learner.step(
                args.ratio_lr * factor, ratio_objective, real, fake.detach(), sigma, eps_real, eps_fake, labels
            )
"""
_COPY = """    generator.load_state_dict(init.state_dict())
    if args.ratio_init == "pretrained":
        ratio.load_encoder(init)
"""
ONE_LEVEL = "runs/exercises/one-level/network.pt"  # a stage 1 that was trained at sigma = 2.5 only

# name: (script, [(old, new), ...])
CHANGES = {
    "divergences": ("train_diffratio.py", [(_LAST_LINE, _LAST_LINE + "".join(f"    {line}\n" for line in MORE_DIVERGENCES))]),
    # Exercise 3: where the two networks start.
    "generator-random": ("train_diffratio.py", [(_COPY, _COPY.replace(
        "    generator.load_state_dict(init.state_dict())\n", ""))]),
    "generator-one-level": ("train_diffratio.py", [(_COPY, _COPY.replace(
        "init.state_dict()", f'checkpoints.load_network("{ONE_LEVEL}").state_dict()'))]),
    "ratio-one-level": ("train_diffratio.py", [(_COPY, _COPY.replace(
        "ratio.load_encoder(init)", f'ratio.load_encoder(checkpoints.load_network("{ONE_LEVEL}"))'))]),
    # Exercise 5: the order of the two steps.
    "fresh-z": ("train_diffratio.py", [(_RE_NOISE, _RE_NOISE
        + "        z = draw.normal(*shape)\n        fake = samples(z, labels, keep_graph=True)\n")]),
    "same-noise": ("train_diffratio.py", [(_RE_NOISE, "        eps = eps_fake\n")]),
    "simultaneous": ("train_diffratio.py", [  # the generator is judged by the ratio network as it was before its step
        (_RATIO_STEP, "            before = copy.deepcopy(ratio.state_dict())\n" + _RATIO_STEP),
        (_RE_NOISE, _RE_NOISE + "        after = copy.deepcopy(ratio.state_dict())\n        ratio.load_state_dict(before)\n"),
        ("        networks.normalize_weights(generator)\n        run.advance()\n",
         "        ratio.load_state_dict(after)\n        networks.normalize_weights(generator)\n        run.advance()\n"),
    ]),
    "stale-samples": ("train_diffratio.py", [  # the ratio network learns from the samples of the iteration before
        (_SAME_Z, _SAME_Z + "            older, fresh = (fresh, fake) if run.nimg > start else (fake, fake)\n"),
        (_RATIO_STEP, _RATIO_STEP.replace("fake.detach()", "older.detach()")),
        ("    while run.goes_on():\n", "    start = run.nimg\n    while run.goes_on():\n"),
    ]),
    # Exercise 8: the encoder stays as stage 1 left it, and only the head is trained.
    "frozen-encoder": ("train_diffratio.py", [(
        "        ratio.requires_grad_(True)\n", "        ratio.requires_grad_(False).head.requires_grad_(True)\n")]),
}  # fmt: skip


def changed(names):
    """(script, its text, its text with the changes `names`, all of one script). `UserError` if one does not fit exactly once."""
    script = CHANGES[names[0]][0]
    before = after = (ROOT / script).read_text()
    for name in names:
        for old, new in CHANGES[name][1]:
            if after.count(old) != 1:
                raise UserError(f"the change {name} does not fit {script}, which was edited there; put your edit back, or leave "
                                "this row out with --rows")
            after = after.replace(old, new)
    return script, before, after


def diff(names):
    """The changes as a unified diff."""
    script, before, after = changed(names)
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), script, script, n=1, lineterm="")
    return "\n".join(lines)
