"""Promises of the scripts: what they train and draw, and that bad input is one line. How runs end is in test_runs.py."""

import argparse
import contextlib
import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import SHORT, alike, call, same, stage_2_arguments, weights
from test_data import make, npy

import fid
import networks
import pretrain
import sample
import train_diffratio
from machinery import checkpoints, data, files, training

pytestmark = pytest.mark.usefixtures("one_thread")
ASSETS = Path(sample.DIGITS).parent

# ---- Stage 2 does what it is for


def test_stage_2_brings_samples_closer_to_the_data(stage1, tmp_path, capsys, device):
    """A few kimg lower the distance to the digits, in the features of stage 1, by a fifth or more.
    On another CPU rounding makes this another run: four seeds reached 0.09 to 0.13."""
    start, on = stage1 / "network.pt", ["--device", device]

    def distance(*flags):
        call(sample, *flags, "--n", "512", *on, "--out", tmp_path / "samples.npz")
        call(fid, "--json", "--features", start, *on, tmp_path / "samples.npz", "digits")
        return json.loads(capsys.readouterr().out.splitlines()[-1])["fid"]

    before = distance("--network", start, "--one-step", "2.5")
    call(train_diffratio, "--init", start, "--outdir", tmp_path, "--kimg", "3", "--lr", "3e-4", *on)
    assert distance("--network", tmp_path / "network.pt") < 0.8 * before


def test_two_iterations_written_out_by_hand(stage1, tmp_path, device):
    """The script's loop equals the method in its plainest form: no shared forward, gradients asked for one network at a time."""
    call(train_diffratio, *SHORT, *"--kimg 0.064 --lr 1e-3 --ratio-lr 1e-3 --lr-decay-kimg 0 --ratio-steps 1 --p-mean -1.2".split(),
         "--init", stage1 / "network.pt", "--outdir", tmp_path, "--device", device)

    digits, rt, seed = data.load("digits"), training.Runtime(device, batch=32), 0
    generator = checkpoints.load_network(stage1 / "network.pt").to(device)
    ratio = networks.RatioNetwork(generator.config).to(device)
    ratio.load_encoder(generator)
    ratio_start = {k: v.to("cpu", copy=True) for k, v in ratio.state_dict().items()}
    steps = [torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.0, 0.999)) for net in (ratio, generator)]

    def follow(optimizer, loss):
        parameters = optimizer.param_groups[0]["params"]
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters)):
            p.grad = g
        optimizer.step()

    batches = data.batches(digits, rt, seed)
    for nimg in (0, 32):
        real, _ = next(batches)
        rt.seed(seed, nimg, 0, "stage 2")
        z, sigma = rt.randn(1, 8, 8), (1.2 * rt.randn() - 1.2).exp()
        eps_real, eps_fake = rt.randn(1, 8, 8), rt.randn(1, 8, 8)

        def noised(x, sigma, eps):
            return x + sigma.view(-1, 1, 1, 1) * eps

        level = torch.full((32,), 2.5, device=device)
        fake = generator(2.5 * z, level).detach()
        right = ratio(noised(real, sigma, eps_real), sigma).sigmoid().log()  # log probability of "data"
        wrong = (1 - ratio(noised(fake, sigma, eps_fake), sigma).sigmoid()).log()
        follow(steps[0], -(right + wrong).mean() / 2)

        sigma, eps = (1.2 * rt.randn() - 1.2).exp(), rt.randn(1, 8, 8)
        h = ratio(noised(generator(2.5 * z, level), sigma, eps), sigma)
        follow(steps[1], -0.5 * (1 + h.exp()).log().mean())  # Jensen-Shannon

    saved = files.load_checkpoint(tmp_path / "checkpoint.pt")
    assert alike(saved["ratio"], ratio.cpu().state_dict(), ratio_start)
    assert alike(saved["generator"], generator.cpu().state_dict(), weights(stage1 / "network.pt"))


@pytest.mark.parametrize("name, flags", [
    *((name, f"--divergence {name}") for name in train_diffratio.DIVERGENCES),
    ("dijs", "--ratio-steps 2 --ratio-init random"),
])
def test_stage_2_trains_and_logs_noise_bands(stage1, tmp_path, monkeypatch, name, flags, device):
    monkeypatch.chdir(tmp_path)
    call(train_diffratio, *SHORT, "--device", device, "--init", stage1 / "network.pt",
         "--kimg", "0.128", "--log-kimg", "0.064", *flags.split())
    folder = Path("runs/digits", name)
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["nimg"] for r in records] == [64, 128]
    bands = records[-1]["bands"].values()
    for band in bands:
        assert set(band) == {"accuracy", "loss", "logit_mean", "logit_std", "gradient_share"}
        assert 0 <= band["accuracy"] <= 1
    # Bands without a logit are left out.
    assert sum(band["gradient_share"] for band in bands) == pytest.approx(1, abs=0.2)
    assert not same(weights(folder / "network.pt"), weights(stage1 / "network.pt"))
    assert checkpoints.load_network(folder / "ratio.pt", role="ratio").about["t_init"] == 2.5


@pytest.mark.parametrize("flags, shares", [  # {sigma: share of the noise levels above it}
    ("--noise lognormal --p-mean -0.4 --p-std 1", {math.exp(-0.4): 0.5, math.exp(0.6): 0.1587}),
    # Karras' schedule: 1 - (3.3^(1/7) - a) / (0.8 (b - a)) with a, b = 0.002, 80 to the 1/7
    ("--noise karras --karras-share 0.8", {0.00199: 1, 3.3: 0.336, 24: 0.0032, 24.5: 0}),
])
def test_noise_levels_have_the_distribution_that_the_flags_name(flags, shares):
    n = 20_000
    rt = training.Runtime("cpu", batch=n)
    rt.seed(0, "test")
    sigma = train_diffratio.noise_levels(stage_2_arguments(*flags.split()), rt)
    assert sigma.shape == (n,)
    for level, share in shares.items():
        by_chance = (share * (1 - share) / n) ** 0.5
        assert abs((sigma > level).double().mean() - share) <= 3 * by_chance


@pytest.mark.parametrize("labels, folders, numbers", [
    ([0, 1, 2], None, [0, 1, 2]), ([0, 1, 1], None, [0, 1, 1]), ([0, 3, 7], None, [0, 1, 2]),
    ([0, 0, 7], None, None), ([0, 1, 2], "abc", [0, 1, 2]), ([0, 1, 1], "bc", None),
    ([0, 1, 2], "bcd", None)])
def test_stage_2_numbers_the_classes_as_stage_1_or_refuses(tmp_path, labels, folders, numbers):
    """Of classes 0 and 7, or folders b and c, nobody knows which of three they were."""
    net = networks.Denoiser(dataclasses.replace(networks.NETWORKS["digits"], label_dim=3))
    names = "abc" if folders else None
    checkpoints.save_network(tmp_path / "network.pt", net, role="denoiser", classes=names)
    args = argparse.Namespace(init=str(tmp_path / "network.pt"), preset="digits", outdir="x")
    dataset = data.Dataset("some", np.zeros((3, 8, 8, 1), np.uint8), np.array(labels), folders)
    refusal = pytest.raises(files.UserError, match="choose the data of stage 1")
    with contextlib.nullcontext() if numbers else refusal:
        pretrain.load_init(args, dataset)
        assert dataset.labels.tolist() == numbers


def test_an_interval_of_a_length_that_no_float_has_is_due_in_time():
    run = Mock(nimg=16_100, total_nimg=10**6, rt=Mock(batch=100))  # 16.1 * 1000 is 16100.000000000002
    assert training.Run.due(run, 16.1) and not training.Run.due(run, 16.2)


def test_learning_rates_fall_over_the_run_unless_told_otherwise():
    def factor(nimg, *flags):
        return train_diffratio.learning_rate_factor(stage_2_arguments("--kimg", "10", *flags), nimg)

    assert [factor(nimg) for nimg in (0, 5_000, 10_000)] == pytest.approx([1, 0.5, 0])
    assert [factor(nimg, "--lr-decay-kimg", "20") for nimg in (0, 10_000)] == pytest.approx([1, 0.5])
    assert factor(10_000, "--lr-decay-kimg", "0") == 1


def test_lower_precisions_stay_close_to_fp32(stage1, tmp_path, device):
    loss = {}
    for precision in ("fp32", "bf16", "fp16")[: 2 + (device == "cuda")]:
        folder = tmp_path / precision
        call(train_diffratio, *SHORT, "--init", stage1 / "network.pt", "--outdir", folder, "--device", device, "--precision", precision)
        loss[precision] = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["ratio_loss"]
    # The loss is 0.004 below the ln 2 of a blind network, and bf16 rounds to 0.4 % in each of some ten layers.
    assert loss["bf16"] == pytest.approx(loss["fp32"], abs=1e-3)
    assert loss.get("fp16", 0) < 0.693  # steps whose gradients overflow are left out, until the loss is scaled less


# ---- The paper's systems: real shapes, reduced width

def small_data(folder, preset):
    """A file of four labelled images or latents of the preset's size."""
    rng, labels = np.random.default_rng(0), [0, 207, 999, 207]
    size = 32 if preset == "cifar10" else 64
    if preset != "imagenet512":
        images = rng.integers(0, 256, (4, size, size, 3), np.uint8)
        return make(folder / "data.npz", {"arr_0": images, "arr_1": labels})
    content = {f"{i}.npy": npy(rng.random((8, size, size), np.float32) * 5) for i in range(4)}
    content["dataset.json"] = json.dumps({"labels": list(zip(content, labels))})
    return make(folder / "data.zip", content)


@pytest.mark.parametrize("preset", ["cifar10", "imagenet64", "imagenet512"])
def test_every_preset_takes_a_step_on_real_shapes(tmp_path, monkeypatch, preset, device):
    """One iteration of both stages, on GPUs in bf16, with 32 channels and one block a level."""
    network = pretrain.PRESETS[preset]["network"]
    narrow = dataclasses.replace(networks.NETWORKS[network], model_channels=32, num_blocks=1)
    monkeypatch.setitem(networks.NETWORKS, network, narrow)
    args = ["--preset", preset, "--data", small_data(tmp_path, preset), "--batch", "2", "--kimg", "0.002"]
    args += ["--device", device, "--precision", "fp32" if device == "cpu" else "bf16"]
    call(pretrain, *args, "--outdir", tmp_path / "a")
    config = checkpoints.load_network(tmp_path / "a" / "network.pt").config
    assert config.label_dim == (0 if preset == "cifar10" else 3)  # of those that have images
    call(train_diffratio, *args, "--outdir", tmp_path / "b", "--init", tmp_path / "a" / "network.pt")

    generator, ratio = (files.load_checkpoint(tmp_path / "b" / "checkpoint.pt")[name] for name in ("generator", "ratio"))
    assert not same(generator, weights(tmp_path / "a" / "network.pt"))
    if preset == "imagenet512":  # both networks kept the magnitudes of EDM2's weights through their steps
        matrices = [v for net in (generator, ratio) for k, v in net.items() if v.ndim > 1 and "head" not in k]
        assert len(matrices) > 50
        for v in matrices:
            assert v.flatten(1).square().mean(dim=1).sqrt().sub(1).abs().max() < 1e-3


# ---- Sampling

@pytest.mark.parametrize("network", ["digits-stage1.pt", "digits.pt"])
def test_images_depend_on_the_seed_alone(tmp_path, network, device):
    """Not on the batch, and not on the kind of file."""
    for out, batch in (("a.npz", 10), ("b", 3), ("c.png", 10)):
        call(sample, "--network", ASSETS / network, "--n", "10", "--seed", "5", "--steps", "6",
             "--device", device, "--batch", batch, "--out", tmp_path / out)
    a, b = (data.load(str(tmp_path / out)).images for out in ("a.npz", "b"))
    assert a.shape == b.shape == (10, 8, 8, 1) and a.dtype == np.uint8
    assert np.abs(a.astype(int) - b).max() <= 1  # a grey level: float32 sums round differently
    assert np.mean(a != b) < 0.01
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_the_weights_in_assets_draw_digits_without_any_flag(tmp_path, device):
    """Right after the installation, near the data: a few times as far as its halves from each other, and all ten digits."""
    call(sample, "--n", "1797", "--batch", "600", "--device", device, "--out", tmp_path / "digits.npz")
    images, digits = np.load(tmp_path / "digits.npz")["arr_0"], data.load("digits")
    x, known = (torch.tensor(a.reshape(len(a), -1)).float() for a in (images, digits.images))
    nearest = digits.labels[torch.cdist(x, known).argmin(dim=1).numpy()]
    assert np.bincount(nearest, minlength=10).min() > 0.04 * len(images)
    assert abs(images.mean() - digits.images.mean()) < 5 and abs(images.std() - digits.images.std()) < 5
    call(sample, "--ratio", ASSETS / "digits-ratio.pt", "--candidates", "2", "--device", device,
         "--out", tmp_path / "x.png")


def test_the_weights_in_assets_draw_garments(tmp_path):
    """As bright and as varied as Fashion-MNIST (mean 72.9, std 90.0), and no two alike."""
    call(sample, "--network", ASSETS / "fashion-mnist.pt", "--n", "200", "--device", "cpu",
         "--out", tmp_path / "garments.npz")
    images = np.load(tmp_path / "garments.npz")["arr_0"]
    assert abs(images.mean() - 72.9) < 10 and abs(images.std() - 90.0) < 10
    x = torch.tensor(images.reshape(200, 28 * 28)).float()
    assert torch.pdist(x).min() > 10 * 28  # ten grey levels in every pixel


@pytest.mark.parametrize("path", sorted(ASSETS.glob("*.pt")), ids=lambda path: path.stem)
def test_the_weights_in_assets_draw_different_images_of_full_contrast(path):
    net = checkpoints.load_network(path)
    if net.about["role"] != "ratio":
        images = sample.generate(net, *sample.inputs(net, range(4), 0, "cpu"), steps=9)
        assert images.isfinite().all() and 0.2 < images.std() < 1 and torch.pdist(images.flatten(1)).min() > 1


def test_one_step_from_stage_1_is_the_generator_that_stage_2_starts_from(refused, stage1, tmp_path, device):
    call(sample, "--network", stage1 / "network.pt", "--device", device, "--one-step", "1.5", "--n", "4", "--out", tmp_path / "a.npz")
    net = checkpoints.load_network(stage1 / "network.pt")
    with torch.no_grad():
        images = sample.one_step(net, sample.inputs(net, range(4), 0, "cpu")[0], None, 1.5)
    found = np.load(tmp_path / "a.npz")["arr_0"].astype(int)
    assert np.abs(found - data.to_uint8(images)).max() <= 1  # with another layout or device float32 sums round differently
    assert "holds a generator" in refused(sample, "--one-step", "2", "--out", tmp_path / "x.png")


def test_classes_are_fixed_in_turn_or_uniform(refused, tmp_path, device):
    network, png = ["--network", ASSETS / "fashion-mnist-cond.pt"], ["--out", tmp_path / "a.png"]

    def classes(*flags):
        call(sample, *network, *flags, "--device", device, "--out", tmp_path / "a.npz")
        return np.load(tmp_path / "a.npz")["arr_1"].tolist()

    counts = np.bincount(classes("--n", "300"), minlength=10)
    assert counts.min() > 10 and len(counts) == 10
    assert classes("--n", "5", "--class", "7") == [7] * 5
    assert classes("--n", "13", "--batch", "4", "--class", "each") == [*range(10), 0, 1, 2]
    for wrong in ("10", "-1"):
        assert "classes 0 to 9" in refused(sample, *network, "--class", wrong, *png)
    assert "no classes" in refused(sample, "--class", "each", *png)


def test_pictures_of_edm2_are_drawn_and_latents_need_diffusers(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)

    def command(channels):
        config = networks.Config("edm2", 16, channels, 10, 64, (1, 2), 1, (8,))
        path = tmp_path / f"{channels}.pt"
        checkpoints.save_network(path, networks.Denoiser(config), role="generator", t_init=2.5)
        return "--network", path, "--n", "2", "--out", tmp_path / "x.npz"

    assert "`pip install diffusers`" in refused(sample, *command(4))
    call(sample, *command(3))
    assert data.load(tmp_path / "x.npz").images.shape == (2, 16, 16, 3)


# ---- Bad input: one clear line, exit code 2, nothing lost

def test_a_run_continues_with_its_own_settings_and_undamaged_files(refused, stage1, tmp_path):
    """"auto" is stored as what it meant: on another machine it may mean another precision."""
    shutil.copytree(stage1, tmp_path, dirs_exist_ok=True)
    before = {f: f.read_bytes() for f in stage1.iterdir() if f.name != ".lock"}
    args = [*SHORT, "--outdir", tmp_path]
    assert "--lr 0.001" in refused(pretrain, *args, "--lr", "0.5")
    assert "--precision fp32, not bf16" in refused(pretrain, *args, "--precision", "bf16")
    stage2 = ["--init", stage1 / "network.pt"]
    assert "training state of stage 1" in refused(train_diffratio, *args, *stage2)
    assert all((tmp_path / f.name).read_bytes() == content for f, content in before.items())
    call(pretrain, *args, "--precision", "auto")
    log, checkpoint = tmp_path / "log.jsonl", tmp_path / "checkpoint.pt"
    whole, state = log.read_bytes(), files.load_checkpoint(checkpoint)
    log.write_bytes(whole[:9] + bytes(9) + whole[18:])
    assert f"{log}: not the log of a run" in refused(pretrain, *args)
    log.write_bytes(whole)
    for changes, message in (
        ({"net": None}, "not a checkpoint of such a run"), ({"kind": "training state of stage 1"}, "holds a"),
        ({"net": {**state["net"], "more": torch.zeros(1)}}, "not a checkpoint of such a run"),
    ):
        files.save_checkpoint({**state, **changes}, checkpoint)
        assert f"{checkpoint}: {message}" in refused(pretrain, *args)


def test_a_run_continues_where_its_data_has_moved_and_on_no_others(refused, tmp_path):
    """Pictures of any size fit; --resolution decides what is trained on."""
    for folder, value in (("here", 90), ("there", 90), ("other", 200)):
        (tmp_path / folder).mkdir()
        images = np.full((8, 20, 16, 1), value, np.uint8)
        np.savez(tmp_path / folder / "data.npz", images=images)

    def args(folder, *flags):
        path = tmp_path / folder / "data.npz"
        return pretrain, *SHORT, "--data", path, "--outdir", tmp_path / "run", *flags

    assert "--resolution" in refused(*args("here"))
    call(*args("here", "--resolution", "8", "--kimg", "0.032"))
    call(*args("there", "--resolution", "8", "--kimg", "0.064"))
    assert "8 images, 0 classes, content" in refused(*args("other", "--resolution", "8"))
    assert "--resolution 8" in refused(*args("here", "--resolution", "16"))
    net = checkpoints.load_network(tmp_path / "run" / "network.pt")
    assert net.about["nimg"] == 64 and net.config.img_resolution == 8
    path, images = tmp_path / "labelled.npz", np.zeros((4, 8, 8, 1), np.uint8)
    for labels, outcome in (([0, 1, 2, 1], call), ([1, 2, 0, 2], refused)):  # corrected meanwhile
        np.savez(path, images=images, labels=labels)
        said = outcome(pretrain, *SHORT, "--data", path, "--cond", "--outdir", tmp_path / "cond")
    assert "was trained with --data" in said


def test_divergence_of_the_loss_leaves_the_last_checkpoint(refused, tmp_path):
    args = [*SHORT, "--outdir", tmp_path, "--lr", "1e30", "--lr-rampup-kimg", "0"]
    call(pretrain, *args, "--kimg", "0.032")
    saved = (tmp_path / "checkpoint.pt").read_bytes()
    assert "diverged" in refused(pretrain, *args)
    assert (tmp_path / "checkpoint.pt").read_bytes() == saved


def test_input_that_does_not_fit_is_named(refused, stage1, tmp_path):
    for size in (16, 9):
        np.savez(tmp_path / f"{size}.npz", images=np.zeros((4, size, size, 1), np.uint8))
    init = "--init", ASSETS / "digits-stage1.pt"
    for script, flag, value, message, *more in (
        (pretrain, "--data", tmp_path / "9.npz", "cannot be halved"),
        (pretrain, "--data", tmp_path / "16.npz", "no labels", "--cond"),
        (train_diffratio, "--data", tmp_path / "16.npz", "(8, 1, 0)", *init),
        (train_diffratio, "--init", tmp_path / "none", "python pretrain.py --preset digits"),
        (train_diffratio, "--preset", "cifar10", "pkl is missing; download it", "--data", tmp_path / "16.npz"),
        (train_diffratio, "--init", ASSETS / "digits.pt", "holds a generator"),
        (train_diffratio, "--init", stage1 / "checkpoint.pt", "training state of stage 1"),
    ):
        assert message in refused(script, flag, value, *more, "--outdir", tmp_path / "x")
        assert not (tmp_path / "x").exists()
    own = shutil.copy(init[1], tmp_path / "network.pt")  # the run would replace its own start
    assert "would be overwritten" in refused(train_diffratio, *SHORT, "--init", own, "--outdir", tmp_path)
    data.write_images([(np.zeros((2, 8, 8, 1), np.uint8), None)], tmp_path / "pictures")
    inside = "--data", tmp_path / "pictures", "--outdir", tmp_path / "pictures" / "run"
    assert "would become data" in refused(pretrain, *SHORT, *inside)
    network = "--network", ASSETS / "digits-ratio.pt"
    assert "ratio network" in refused(sample, *network, "--out", tmp_path / "x.png")


@pytest.mark.parametrize("script, flag", [
    *((pretrain, flag) for flag in (
        "--kimg=-1", "--batch=0", "--lr=nan", "--preset=imagenet", "--lr-rampup-kimg=-1",
        "--lr-decay-batches=inf", "--p-mean=nan", "--beta2=1", "--dropout=1", "--micro-batch=3",
        "--seed=99999999999999999999", "--grid-kimg=1e306")),
    *((train_diffratio, flag) for flag in (
        "--lr-decay-kimg=-1", "--fid-images=1", "--beta1=1", "--beta2=-0.3", "--karras-share=1.1", "--t-init=1e39")),
])
def test_nonsense_flags_are_refused(refused, tmp_path, script, flag):
    assert flag.split("=")[0] in refused(script, flag, "--outdir", tmp_path / "x")
    assert not (tmp_path / "x").exists()
