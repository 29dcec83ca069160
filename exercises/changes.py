"""Changes of code that the exercises try, as text, and the pristine scripts that they and the reference rows start from.

A student edits the working copy, so exercises/pristine.zip holds what is compared with it. After a change of the scripts that the
exercises should follow, `python exercises/changes.py` stores those of this folder.
"""

import difflib
import hashlib
import json
import os
import zipfile

from project import HERE, ROOT

PRISTINE = HERE / "pristine.zip"
SCRIPT = "train_diffratio.py"
ONE_LEVEL = "runs/exercises/pristine-one-level/network.pt"  # a stage 1 that was trained at sigma = 2.5 only

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


def texts(folder):
    """{path: text} of the scripts of a working copy that decide what a run does."""
    paths = [folder / name for name in ("train_diffratio.py", "pretrain.py", "sample.py", "fid.py", "networks.py")]
    paths += [*sorted((folder / "machinery").glob("*.py")), folder / "exercises" / "teacher.py"]
    return {path.relative_to(folder).as_posix(): path.read_bytes().decode().replace("\r\n", "\n") for path in paths}


def pristine():
    """{path: text} of the scripts as the exercises were written for them."""
    with zipfile.ZipFile(PRISTINE) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def unpack(work):
    """The folder in `work` in which the pristine scripts lie. A file that was edited there is put back."""
    folder = work / "runs" / "exercises" / f"pristine-{fingerprint(pristine())}"
    contents = {name: text.encode() for name, text in pristine().items()}
    contents["assets/digits.npz"] = (ROOT / "assets" / "digits.npz").read_bytes()
    for name, content in contents.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part")  # another process may be reading
            part.write_bytes(content)
            part.replace(path)
    return folder


def fingerprint(*what):
    """Twelve hexadecimal digits of texts, numbers and dicts of them."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def changed(names):
    """The pristine script with the changes `names`; each must fit exactly once."""
    text = pristine()[SCRIPT]
    for name in names:
        for old, new in CHANGES[name].items():
            if text.count(old) != 1:
                from machinery.files import UserError  # not above: run.py decides whose machinery it takes

                raise UserError(f"the change {name} does not fit {SCRIPT} in exercises/{PRISTINE.name}: adapt changes.py")
            text = text.replace(old, new)
    return text


def diff(before, after):
    """The unified diff of two {path: text}."""
    lines = []
    for name in before | after:
        sides = (texts.get(name, "").splitlines() for texts in (before, after))
        lines += difflib.unified_diff(*sides, name, name, n=1, lineterm="")
    return "\n".join(lines)


if __name__ == "__main__":
    with zipfile.ZipFile(PRISTINE, "w") as archive:
        for name, text in texts(ROOT).items():
            archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)  # of 1980: no time, no mode
    print(f"wrote {PRISTINE}: exercises now compare with the scripts as they are in this folder")
