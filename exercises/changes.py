"""Changes of code that the exercises try, as text: what is replaced in train_diffratio.py, and by what.

A student makes them in an editor, `run.py` in a copy of the script. `python exercises/run.py --diff NAME` prints one.
"""

import difflib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from machinery.files import UserError  # noqa: E402

SCRIPT = "train_diffratio.py"
ONE_LEVEL = "runs/exercises/one-level/network.pt"  # a stage 1 that was trained at sigma = 2.5 only

LAST_DIVERGENCE = '    "fkl": lambda h: -torch.exp(h),  # forward Kullback-Leibler, f = -ln u\n'
MORE_DIVERGENCES = """\
    "jeffreys": lambda h: -h - torch.exp(h),  # both Kullback-Leibler divergences, f = (u - 1) ln u
    "hellinger": lambda h: -torch.exp(h / 2),  # squared Hellinger distance, f = (sqrt(u) - 1)^2
    "lecam": lambda h: -4 * torch.sigmoid(h) ** 2,  # softened chi-square, f = (u - 1)^2 / (u + 1)
"""
COPY = "    generator.load_state_dict(init.state_dict())\n"
ENCODER = "        ratio.load_encoder(init)\n"
UNFROZEN = "        ratio.requires_grad_(True)\n"
LOOP = "    while run.unfinished():\n"
RATIO_STEP = "            _, h_real, h_fake = ratio_optimizer.step(\n"
RATIO_BATCH = "                real, fake.detach(), sigma, eps_real, eps_fake, labels)\n"
NEW_NOISE = "        sigma, eps = noise_levels(args, rt), rt.randn(*shape)\n"
AFTER_GENERATOR = "        run.add(generator_loss=loss.sum())\n"

CHANGES = {  # name: {old: new}
    "divergences": {LAST_DIVERGENCE: LAST_DIVERGENCE + MORE_DIVERGENCES},
    # Exercise 3: where the two networks start.
    "generator-random": {COPY: ""},
    "generator-one-level": {COPY: COPY.replace("init.", f'checkpoints.load_network("{ONE_LEVEL}").')},
    "ratio-one-level": {ENCODER: ENCODER.replace("init", f'checkpoints.load_network("{ONE_LEVEL}")')},
    # Exercise 5: the order of the two steps.
    "fresh-z": {NEW_NOISE: NEW_NOISE + "        z = rt.randn(*shape)\n        fake = rt.in_parts(G, z, labels)\n"},
    "same-noise": {NEW_NOISE: "        eps = eps_fake\n"},
    "simultaneous": {  # the generator follows the ratio network as it was before its step
        RATIO_STEP: "            before = copy.deepcopy(ratio.state_dict())\n" + RATIO_STEP,
        NEW_NOISE: NEW_NOISE + "        after = copy.deepcopy(ratio.state_dict())\n        ratio.load_state_dict(before)\n",
        AFTER_GENERATOR: "        ratio.load_state_dict(after)\n" + AFTER_GENERATOR,
    },
    "stale-samples": {  # the ratio network learns from the samples of the iteration before
        LOOP: "    start = run.nimg\n" + LOOP,
        RATIO_STEP: "            older, fresh = (fresh, fake) if run.nimg > start else (fake, fake)\n" + RATIO_STEP,
        RATIO_BATCH: RATIO_BATCH.replace("fake.detach()", "older.detach()"),
    },
    # Exercise 8: the encoder stays as stage 1 left it, and only the head is trained.
    "frozen-encoder": {UNFROZEN: UNFROZEN.replace("(True)", "(False).head.requires_grad_(True)")},
}


def changed(names):
    """(text of the script, the same with the changes `names`). Raises `UserError` if one does not fit exactly once."""
    before = after = (ROOT / SCRIPT).read_text()
    for name in names:
        for old, new in CHANGES[name].items():
            if after.count(old) != 1:
                raise UserError(f"the change {name} does not fit {SCRIPT}, which was edited there; put your edit back, "
                                "or leave this row out with --rows")
            after = after.replace(old, new)
    return before, after


def diff(names):
    """The changes as a unified diff."""
    before, after = (text.splitlines() for text in changed(names))
    return "\n".join(difflib.unified_diff(before, after, SCRIPT, SCRIPT, n=1, lineterm=""))
