"""Check your change of code in seconds: what it does, not which numbers come out.

    python exercises/check.py 5            says which of the variants (b) to (e) your train_diffratio.py is
    python exercises/check.py 5 c          says whether it is (c)
    python exercises/check.py 1            plane_blank.py; --script FILE checks another file

Exercises 3, 5 and 8 run your script for two iterations of eight images and watch each optimizer step: which samples and which
noise the ratio network was asked about, after how many of its own steps, and which tensors moved. Exercises 1, 2, 7 and 10
take your functions and differentiate them. Prints what was seen and what was wanted. Exit code 0: right; 1: not yet.
"""

import argparse
import contextlib
import io
import itertools
import runpy
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

import torch

from project import ROOT
from machinery import checkpoints, training
from machinery.files import UserError
import networks
import plane

STAGE1 = str(ROOT / "assets" / "digits-stage1.pt")
FLAGS = [*"--batch 8 --kimg 0.016 --ratio-steps 1 --device cpu --precision fp32 --init".split(), STAGE1]


class Watch:
    """Runs a script for two iterations: start and last step of each network. Noised images are samples[i] + sigma * draws[j]."""

    def __init__(self, script):
        self.draws, self.samples, self.versions, self.made = [], [], [], 0
        self.starts, self.steps = {}, {}
        with contextlib.ExitStack() as stack:
            for owner, name, method in (
                    (training.Runtime, "randn", self.randn), (training.Optimizer, "step", self.step),
                    (training.Run, "due", lambda *_: False), (networks.Denoiser, "forward", self.denoise),
                    (networks.RatioNetwork, "forward", self.ask)):
                def wrapped(*args, method=method, original=getattr(owner, name), **more):
                    return method(original, *args, **more)

                stack.enter_context(mock.patch.object(owner, name, wrapped))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            stack.enter_context(mock.patch.object(sys, "argv", [str(script), *FLAGS, "--outdir", folder]))
            runpy.run_path(str(script), run_name="student")["main"]()

    def randn(self, original, rt, *shape):
        numbers = original(rt, *shape)
        if len(shape) == 3:  # an image
            self.draws.append(numbers.detach().clone())
        return numbers

    def denoise(self, original, net, x, sigma, labels=None):
        y = original(net, x, sigma, labels)
        if net.training:  # the generator, not its average
            z = self.draw(x / sigma[:, None, None, None])
            self.samples.append(dict(images=y.detach().clone(), made=self.made, z=z))
        return y

    def ask(self, original, net, x, sigma, labels=None):
        self.asked = x.detach().clone(), sigma, state_of(net)
        return original(net, x, sigma, labels)

    def draw(self, eps):
        """Number of the draw that `eps` is, or None."""
        return next((i for i, known in enumerate(self.draws) if torch.allclose(known, eps, rtol=0, atol=1e-4)), None)

    def origin(self, x, sigma):
        """(samples, number of the draw) that noised images x [n, C, H, W] consist of, or Nones."""
        s = sigma[:, None, None, None]
        for sample, (j, eps) in itertools.product(reversed(self.samples), enumerate(self.draws)):
            apart = (sample["images"] + s * eps - x).abs()
            if (apart <= 1e-5 * (1 + s)).all():  # up to rounding
                return sample, j
        return None, None

    def step(self, original, optimizer, lr, objective, *tensors):
        net, self.asked = optimizer.net, None
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        who = "ratio" if isinstance(net, networks.RatioNetwork) else "generator"
        self.starts.setdefault(who, before)
        result = original(optimizer, lr, objective, *tensors)
        moved = {name for name, p in net.named_parameters() if not torch.equal(before[name], p.detach())}
        beta1 = optimizer.adam.param_groups[0]["betas"][0]
        self.steps[who] = found = dict(moved=moved, beta1=beta1, samples=None)
        self.made += who == "generator"
        if self.asked:
            x, sigma, version = self.asked
            if who == "ratio":
                x, sigma = x.chunk(2)[1], sigma.chunk(2)[1]  # the second half is samples
                self.versions = [*(self.versions or [version]), state_of(net)]
            found["samples"], found["noise"] = self.origin(x, sigma)
            found["version"] = version
        return result


def state_of(net):
    """A number that tells two states of a network apart."""
    return hash(tuple(p.detach().double().sum().item() for p in net.parameters()))


# ---- Exercises. Each yields (what, seen, wanted, hint); equal seen and wanted are right

AS_IT_IS = {  # what a script does: (as it is, hint)
    "samples of the generator's step": ("those of the ratio's step", "which z makes `fake`, and where is it drawn?"),
    "noise of the generator's step": ("a new draw", "which eps reaches generator_optimizer.step?"),
    "ratio network that the generator follows": (
        "as its step left it", "which weights does `ratio` hold when generator_optimizer.step runs?"),
    "samples of the ratio's step": (
        "of the present generator", "which `fake` reaches ratio_optimizer.step, and when was it made?"),
    "generator": ("moves", "samples without a graph (detached, or made without one) move nothing"),
    "beta1 of generator and ratio": ("0 and 0", "these variants leave Adam as it is"),
}
SAMPLES, NOISE, FOLLOWED, SEEN, *_ = AS_IT_IS
ORDERS = {
    "a": {}, "b": {SAMPLES: "others than in the ratio's step"}, "c": {NOISE: "that of the ratio's step"},
    "d": {FOLLOWED: "as it was 1 step before"},
    "e": {SEEN: "of the generator 1 step before", SAMPLES: "others than in the ratio's step"},
}


def order(watch):
    """What the last iteration did, with the questions of AS_IT_IS: {question: answer}."""
    steps, newest_first = watch.steps, watch.versions[::-1]
    if steps.keys() != {"ratio", "generator"} or None in (step["samples"] for step in steps.values()):
        raise UserError("both networks must step, on samples of the generator plus sigma times a draw of rt.randn")
    ratio, generator = steps["ratio"], steps["generator"]
    of_ratio, of_generator = ratio["samples"], generator["samples"]
    same_z = of_ratio["z"] is not None and of_ratio["z"] == of_generator["z"]
    older = of_generator["made"] - of_ratio["made"]
    version = generator["version"]
    behind = newest_first.index(version) if version in newest_first else None
    followed = {0: "as its step left it", None: "in a state that no step left"}
    return dict(zip(AS_IT_IS, (
        "those of the ratio's step" if same_z or of_ratio is of_generator else "others than in the ratio's step",
        "that of the ratio's step" if generator["noise"] == ratio["noise"] else "a new draw",
        followed.get(behind, f"as it was {behind} step before"),
        f"of the generator {older} step before" if older else "of the present generator",
        "moves" if generator["moved"] else "does not move",
        f"{generator['beta1']:g} and {ratio['beta1']:g}")))


def check_order(script, variant):
    """Exercise 5."""
    if variant and variant not in ORDERS:
        raise UserError(f"exercise 5 has variants a to e, not {variant}; (f) and (g) are flags")
    found = order(Watch(script))
    usual = {question: answer for question, (answer, _) in AS_IT_IS.items()}
    if not variant:
        print("".join(f"  {question}: {answer}\n" for question, answer in found.items()), end="")
        fits = next((letter for letter, change in ORDERS.items() if found == usual | change), "none of a to e")
        return [("your script is", fits, fits if fits in ORDERS and fits != "a" else "one of b, c, d, e",
                 "`check.py 5 b` says what differs from (b)")]
    wanted = usual | ORDERS[variant]
    return [(question, found[question], wanted[question], hint) for question, (_, hint) in AS_IT_IS.items()]


def check_start(script, variant):
    """Exercise 3: the generator starts from random weights, the ratio network from stage 1."""
    watch, denoiser = Watch(script), checkpoints.load_network(STAGE1, role="denoiser")
    ratio = networks.RatioNetwork(denoiser.config)
    ratio.load_encoder(denoiser)
    for who, net, wanted in (("generator", denoiser, "random weights"), ("ratio", ratio, "stage 1")):
        known, start = net.state_dict(), watch.starts[who]
        shared = [name for name in start if start[name].dim() > 1 and "head" not in name]  # norms start alike
        share = sum(torch.equal(start[name], known[name]) for name in shared) / len(shared)
        seen = "stage 1" if share > 0.9 else "random weights" if share < 0.1 else f"stage 1 for {share:.0%} of its tensors"
        yield f"{who} starts from", seen, wanted, f"which line of main fills the {who} with weights?"


def check_head(script, variant):
    """Exercise 8: only the head of the ratio network is trained."""
    steps = Watch(script).steps
    parts = {who: sorted({name.split(".")[0] for name in step["moved"]}) for who, step in steps.items()}
    yield ("parts of the ratio network that move", " and ".join(parts["ratio"]) or "none", "head",
           "which tensors require a gradient in block 1?")
    yield ("generator", "moves" if parts["generator"] else "does not move", "moves",
           "the generator's step needs a graph through the ratio network")


F_OF_U = {
    "dijs": lambda u: 0.5 * (u * u.log() - (u + 1) * ((u + 1) / 2).log()), "dikl": lambda u: u * u.log(),
    "dirm": lambda u: (1 + u) * (1 + u).log() - u, "fkl": lambda u: -u.log(),
    "jeffreys": lambda u: (u - 1) * u.log(), "hellinger": lambda u: (u.sqrt() - 1) ** 2,
    "lecam": lambda u: (u - 1) ** 2 / (u + 1),
}


def judge_divergence(name, loss):
    """(what, seen, wanted, hint) of the slope of loss(h) against that of f'(exp(-h)), and of its value at large |h|."""
    h = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    u, value = (-h).exp().detach(), loss(h)
    truth = -u * torch.vmap(torch.func.grad(torch.func.grad(F_OF_U[name])))(u)  # du/dh = -u
    if value is Ellipsis:
        return f"slope of {name}", "no line yet", "a line", f"{name}: f'(u), then u = exp(-h)"
    if not value.requires_grad:
        return f"slope of {name}", "no graph", "the slope of f'(exp(-h))", "the loss must be computed from h by torch"
    found = torch.autograd.grad(value.sum(), h)[0]
    i = (found - truth).abs().argmax().item()
    if not torch.allclose(found, truth):
        kind = ("the sign is wrong" if torch.allclose(found, -truth) else
                "a constant factor is wrong" if torch.allclose(found * truth[0], truth * found[0]) else
                "differentiate f by u first; only then put u = exp(-h)")
        return f"slope of {name} at h = {h[i]:g}", f"{found[i]:.4g}", f"{truth[i]:.4g}", kind
    seen = wanted = "right, finite where f' is"
    for far in (200.0, -200.0):
        h = torch.tensor(far, requires_grad=True)  # float32, as in training
        value, grows = loss(h), far > 0 and name in ("fkl", "jeffreys", "hellinger")
        if not grows and not (value.isfinite() and torch.autograd.grad(value, h)[0].isfinite()):
            seen = f"not finite at h = {far:g}"
    return name, seen, wanted, "exp overflows at 88.7: which function of PyTorch is ln(1 + exp(h))?"


def check_divergences(script, variant):
    """Exercise 2."""
    table = functions(script, "DIVERGENCES")["DIVERGENCES"]
    for name in ("jeffreys", "hellinger", "lecam"):
        yield judge_divergence(name, table[name]) if name in table else (name, "no line yet", "a line", "the table of the page")


def check_noise(script, variant):
    """Exercise 7: ln sigma uniform between ln 0.05 and ln 5."""
    student = functions(script, "SETTINGS", "noise_levels")
    new = [name for name in student["SETTINGS"]["noise"][2] if name not in ("lognormal", "karras")]
    yield "new choices of the setting noise", len(new), 1, "SETTINGS, `noise`: the list of its choices"
    rt, defaults = training.Runtime("cpu", batch=20_000), {n: s[0] for n, s in student["SETTINGS"].items()}
    for name in new[:1]:
        rt.seed(0)
        log = student["noise_levels"](argparse.Namespace(**defaults | dict(noise=name)), rt).log()
        ends, middle = [round(log.min().exp().item(), 2), round(log.max().exp().item(), 1)], log.median().exp().item()
        yield f"least and greatest sigma of {name}", ends, [0.05, 5.0], "rt.rand() is uniform in [0, 1)"
        yield "half of the levels are below", round(middle, 1), 0.5, "uniform in ln sigma, not in sigma"


def check_vsd(script, variant):
    """Exercise 10: the weight of a sample in `vsd_loss` is 1 or 1/sigma^2."""
    sigma, rng = torch.tensor([0.1, 0.5, 1.0, 2.0]), torch.Generator().manual_seed(0)
    fake, eps, right, wrong = (torch.randn(4, 1, 8, 8, generator=rng) for _ in range(4))
    fake.requires_grad_(True)
    loss = functions(script, "vsd_loss")["vsd_loss"](lambda *_: right, lambda *_: wrong, fake, sigma, eps)
    weight = torch.autograd.grad(loss.sum(), fake)[0] / (wrong - right)
    ones = weight.flatten(1).mean(dim=1)
    seen = ("1" if torch.allclose(weight, torch.ones(())) else "1/sigma^2" if torch.allclose(ones, sigma**-2, rtol=1e-3)
            else ", ".join(f"{w:.3g}" for w in ones) + " at sigma 0.1, 0.5, 1, 2")
    yield "weight of a sample", seen, variant or ("1/sigma^2" if seen == "1/sigma^2" else "1"), "what does `direction` multiply?"


def check_plane(script, variant):
    """Exercise 1: plane_blank.py."""
    student = functions(script, "DIVERGENCES", "ratio_loss", "generator_loss", "iteration")
    for name in ("dijs", "dikl", "dirm", "fkl"):
        yield judge_divergence(name, student["DIVERGENCES"][name])
    h = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    for name, sign, hint in (("data", -1, "the label is 1: minus ln P(data), P = sigmoid(h)"), ("samples", 1, "the label is 0")):
        both = (h, 0 * h.detach()) if name == "data" else (0 * h.detach(), h)
        value = student["ratio_loss"](*both)
        seen = "no line yet"
        if torch.is_tensor(value):
            slope, wanted = torch.autograd.grad(value.sum(), h)[0], 0.5 * sign * (sign * h.detach()).sigmoid()
            kinds = {"that of the cross-entropy": 1, "twice that of the cross-entropy": 2, "of the wrong sign": -1}
            seen = next((kind for kind, factor in kinds.items() if torch.allclose(slope, factor * wanted)), "another one")
        yield f"slope of ratio_loss at {name}", seen, "that of the cross-entropy", hint + "; each side weighs one half"
    fake, sigma, eps, asked = torch.ones(5, 2, requires_grad=True), torch.arange(5.0), torch.randn(5, 2), []

    def ratio(x, sigma):
        asked.append(x.detach())
        return x.sum(1)

    value, noised = student["generator_loss"](ratio, fake, sigma, eps, "dikl"), fake + sigma[:, None] * eps
    seen = "no line yet"
    if torch.is_tensor(value):
        seen = ("the ratio is not asked about noised samples" if not asked or not torch.allclose(asked[0], noised) else
                "no graph to the samples" if not value.requires_grad else
                "f' of h at noised samples" if torch.allclose(value, -noised.sum(1)) else "another loss")
    yield "generator_loss", seen, "f' of h at noised samples", "noise as in block 1 of `iteration`; the rest is in DIVERGENCES"
    yield from check_iteration(student)


def check_iteration(student):
    """The loop of plane_blank.py: what each step is told, and which network it moves."""
    generator, ratio, made, asked, draws, steps = torch.nn.Linear(2, 2), plane.Ratio(8), [], [], [], {}
    nets = {"generator": generator, "ratio network": ratio}
    generator.register_forward_hook(lambda net, args, out: made.append(out.detach()))
    ratio.register_forward_hook(lambda net, args, named, out: asked.append((*args, *named.values())), with_kwargs=True)

    def normal():
        draws.append(torch.randn(6, 2))
        return draws[-1]

    def stepper(name):
        def step(loss):
            if loss.requires_grad:
                loss.sum().backward(retain_graph=True)
            moved = [who for who, net in nets.items() if any(p.grad is not None for p in net.parameters())]
            for net in nets.values():
                net.zero_grad()
            x, sigma = asked[-1]
            noise = [i for i, eps in enumerate(draws) if torch.allclose(x, made[-1] + sigma[:, None] * eps, atol=1e-6)]
            steps[name] = " and ".join(moved) or "nothing", noise
        return argparse.Namespace(step=step)

    inputs = torch.randn(6, 2), normal, lambda: torch.rand(6) + 0.1, "dikl"
    try:
        student["iteration"](generator, ratio, stepper("ratio"), stepper("generator"), *inputs)
    except Exception as error:
        yield ("iteration", f"{type(error).__name__}: {str(error)[:200]}", "two steps",
               "is one of its lines still a blank? The message of Python says what was there instead")
    (of_ratio, first), (of_generator, second) = (steps.get(name, ("nothing", [])) for name in ("ratio", "generator"))
    yield "the ratio's step moves", of_ratio, "ratio network", "samples with a graph to the generator move it, too"
    yield "it sees noised samples", bool(first), True, "fake plus sigma times a draw of normal()"
    yield "the generator's step moves", of_generator, "generator", "`generator_loss` of `fake`, which carries the graph"
    yield "its samples are noised anew", bool(second) and second != first, True, "a new level and a new draw of normal()"


def functions(script, *names):
    """What the script defines, with at least these names."""
    with contextlib.redirect_stdout(io.StringIO()):
        found = runpy.run_path(str(script), run_name="student")
    if missing := set(names) - set(found):
        raise UserError(f"{script} has no {min(missing)}; give the script that the page names")
    return found


CHECKS = {"1": check_plane, "2": check_divergences, "3": check_start, "5": check_order, "7": check_noise, "8": check_head,
          "10": check_vsd}
SCRIPTS = {"1": "exercises/plane_blank.py", "10": "exercises/teacher.py"}  # of the others train_diffratio.py


def main():
    parser = training.Parser(__doc__, dict(script=(None, "the file to check (default: the one that the page names)", str)))
    parser.add_argument("exercise", help=f"one of {', '.join(CHECKS)}")
    parser.add_argument("variant", nargs="?", help="of exercise 5: a to e; of 10: 1 or 1/sigma^2")
    args = parser.parse_args()
    if args.exercise not in CHECKS:
        print(f"exercise {args.exercise}: no code to check; there are checks of {', '.join(CHECKS)}")
        return
    script = Path(args.script or ROOT / SCRIPTS.get(args.exercise, "train_diffratio.py")).resolve()
    print(f"exercise {args.exercise}{f' ({args.variant})' if args.variant else ''}: {script.name}", flush=True)
    torch.set_num_threads(1)
    try:
        found = list(CHECKS[args.exercise](script, args.variant))
    except UserError:
        raise
    except Exception as error:
        where = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(script)]
        raise UserError(f"{script} fails in line {where[-1] if where else getattr(error, 'lineno', '?')}: "
                        f"{type(error).__name__}: {str(error)[:200]}") from None
    for what, seen, wanted, hint in found:
        print(f"  {what}: {seen}" + ("" if seen == wanted else f"\n      wanted: {wanted}\n      hint: {hint}"))
    right = all(seen == wanted for _, seen, wanted, _ in found)
    print("right" if right else "not yet")
    if not right:
        sys.exit(1)


if __name__ == "__main__":
    training.run(main)
