"""Promises of the scripts: what they train and draw, and that bad input is one line. How runs end is in test_runs.py."""

import dataclasses
import io
import json
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHORT, alike, same, weights
from PIL import Image

from machinery import checkpoints
from machinery import data
import fid
from machinery import files
import networks
import pretrain
from machinery import training
import sample
import train_diffratio

pytestmark = pytest.mark.usefixtures("one_thread")

# ---------------------------------------------------------------------------------------------------------
# Stage 2 does what it is for.


def test_stage_2_brings_samples_closer_to_the_data(call, stage1, tmp_path, device):
    """A few kimg of stage 2 lower the distance to the digits, in the features of a short stage 1, by a fifth or more.

    On another CPU rounding makes this another run: ten seeds and CPUs reached 0.08 to 0.45 of the distance before.
    """
    call(train_diffratio, "--init", stage1 / "network.pt", "--outdir", tmp_path, "--kimg", "6", "--lr", "3e-4", "--device", device)
    rt = training.start(device)
    extractor = fid.network_features(rt, stage1 / "network.pt")
    digits = data.load("digits")
    reference, _ = fid.measure_dataset(extractor, digits, rt)

    def distance(net):
        networks.place(net, rt.device)

        def read(indices):
            return data.to_uint8(sample.generate(net, *sample.inputs(net, indices, 0, rt.device)))

        return fid.frechet_distance(fid.measure(extractor, read, 512, rt)[0], reference)

    before = checkpoints.load_network(stage1 / "network.pt")
    before.about = {"role": "generator", "t_init": 2.5}
    assert distance(checkpoints.load_network(tmp_path / "network.pt")) < 0.8 * distance(before)


def test_two_iterations_written_out_by_hand(call, stage1, tmp_path, device):
    """The script's loop equals the method in its plainest form: no shared forward, gradients asked for one network at a time."""
    call(train_diffratio, *SHORT, "--kimg", "0.064", "--lr", "1e-3", "--ratio-lr", "1e-3", "--lr-decay-kimg", "0", "--ratio-steps", "1",
         "--init", stage1 / "network.pt", "--outdir", tmp_path, "--device", device)  # fmt: skip

    digits, rt, seed = data.load("digits"), training.start(device, batch=32), 0
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

    batches = data.Batches(digits, rt, seed)
    for nimg in (0, 32):
        real = digits.to_model(next(batches)[0], device)
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


@pytest.mark.parametrize("divergence", list(train_diffratio.DIVERGENCES))
def test_every_divergence_trains_and_logs_the_noise_bands(call, stage1, tmp_path, divergence, device):
    call(train_diffratio, *SHORT, "--device", device, "--init", stage1 / "network.pt", "--outdir", tmp_path, "--divergence", divergence, "--log-kimg", "0.128")
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["nimg"] for r in records] == [128, 256]
    for band in records[-1]["bands"].values():
        assert set(band) == {"accuracy", "loss", "logit_mean", "logit_std", "gradient_share"} and 0 <= band["accuracy"] <= 1
    assert sum(band["gradient_share"] for band in records[-1]["bands"].values()) == pytest.approx(1, abs=0.2)  # bands without a logit are left out
    assert not same(weights(tmp_path / "network.pt"), weights(stage1 / "network.pt"))


def test_candidates_are_drawn_with_as_many_steps_as_asked(stage1):
    net = checkpoints.load_network(stage1 / "network.pt")
    ratio = networks.RatioNetwork(net.config).eval()
    chosen, _, _ = sample.choose(net, ratio, range(2), 0, "cpu", 1, 0.1, steps=3)
    with torch.no_grad():
        assert torch.equal(chosen, sample.generate(net, *sample.inputs(net, range(2), 0, "cpu"), 3))


def test_more_ratio_steps_and_random_starts_run(call, stage1, tmp_path):
    call(train_diffratio, *SHORT, "--init", stage1 / "network.pt", "--outdir", tmp_path / "a", "--ratio-steps", "2", "--ratio-init", "random")
    call(train_diffratio, *SHORT, "--init", "random", "--network", "digits", "--outdir", tmp_path / "b")
    assert checkpoints.load_network(tmp_path / "a" / "ratio.pt", role="ratio").about["t_init"] == 2.5


@pytest.mark.parametrize("flags, kind, limit", [
    (["--noise", "lognormal", "--p-mean", "-0.4", "--p-std", "1"], "lognormal", None),
    (["--noise", "karras", "--karras-share", "0.8"], "karras", 24.5),
])  # fmt: skip
def test_noise_levels_have_the_distribution_that_the_flags_name(monkeypatch, flags, kind, limit):
    monkeypatch.setattr(sys, "argv", ["train_diffratio.py", *flags])
    n = 20_000
    rt = training.start("cpu", batch=n)
    rt.seed(0, "test")
    sigma = train_diffratio.noise_levels(train_diffratio.arguments(), rt)
    assert sigma.shape == (n,)
    if kind == "lognormal":
        assert abs(sigma.log().mean() + 0.4) < 5 / n**0.5 and abs(sigma.log().std() - 1) < 5 / (2 * n) ** 0.5
    else:  # the share of sigma above 3.3 from Karras' schedule: 1 - (3.3^(1/7) - a) / (0.8 (b - a)), a, b = 0.002, 80 to the 1/7
        assert 0.002 <= sigma.min() and 24 < sigma.max() < limit
        assert abs((sigma > 3.3).double().mean() - 0.336) < 5 * (0.336 * 0.664 / n) ** 0.5


def test_learning_rates_fall_over_the_run_unless_told_otherwise(monkeypatch):
    def factor(nimg, *flags):
        monkeypatch.setattr(sys, "argv", ["train_diffratio.py", "--kimg", "10", *flags])
        return train_diffratio.learning_rate_factor(train_diffratio.arguments(), nimg)

    assert [factor(nimg) for nimg in (0, 5_000, 10_000)] == pytest.approx([1, 0.5, 0])
    assert [factor(nimg, "--lr-decay-kimg", "20") for nimg in (0, 10_000)] == pytest.approx([1, 0.5])
    assert factor(10_000, "--lr-decay-kimg", "0") == 1


def test_every_divergence_has_a_folder_of_its_own(monkeypatch):
    folders = set()
    for name in train_diffratio.DIVERGENCES:
        monkeypatch.setattr(sys, "argv", ["train_diffratio.py", "--divergence", name])
        folders.add(train_diffratio.arguments().outdir)
    assert folders == {f"runs/digits/{name}" for name in train_diffratio.DIVERGENCES}


def test_fid_during_training_keeps_the_best_generator(call, stage1, tmp_path, device):
    call(train_diffratio, *SHORT, "--device", device, "--init", stage1 / "network.pt", "--outdir", tmp_path, "--fid-every", "0.128",
         "--fid-images", "100", "--fid-features", stage1 / "network.pt")  # fmt: skip
    values = [json.loads(line)["fid"] for line in (tmp_path / "log.jsonl").read_text().splitlines() if '"fid"' in line]
    best = [checkpoints.load_network(tmp_path / f"{name}-best.pt").about for name in ("network", "ratio")]
    assert len(values) == 2 and best[0]["fid"] == best[1]["fid"] == min(values)


def test_lower_precisions_stay_close_to_fp32(call, stage1, tmp_path, device):
    loss = {}
    for precision in ("fp32", "bf16", "fp16")[: 2 + (device == "cuda")]:
        folder = tmp_path / precision
        call(train_diffratio, *SHORT, "--init", stage1 / "network.pt", "--outdir", folder, "--device", device, "--precision", precision)
        loss[precision] = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["ratio_loss"]
    # The loss is 0.004 below the ln 2 of a blind network, and bf16 rounds to 0.4 % in each of some ten layers.
    assert loss["bf16"] == pytest.approx(loss["fp32"], abs=1e-3)
    assert loss.get("fp16", 0) < 0.693  # steps whose gradients overflow are left out, until the loss is scaled less


# ---------------------------------------------------------------------------------------------------------
# The paper's systems: real shapes, reduced width.


def small_data(folder, preset):
    """A data set of the preset's shape, kind and number of classes: four images of CIFAR-10's, ImageNet's or latent size."""
    rng = np.random.default_rng(0)
    if preset.startswith("cifar10"):
        np.savez(folder / "data.npz", images=rng.integers(0, 256, (4, 32, 32, 3), np.uint8), labels=np.array([0, 3, 9, 9]))
        return folder / "data.npz"
    labels = {"labels": []}
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        for i, label in enumerate([0, 207, 999, 207]):
            file = io.BytesIO()
            if preset == "imagenet64":
                Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(file, format="PNG")
            else:
                np.save(file, rng.random((8, 64, 64), np.float32) * 5)
            name = f"00000/img{i:08d}.{'png' if preset == 'imagenet64' else 'npy'}"
            archive.writestr(name, file.getvalue())
            labels["labels"].append([name, label])
        archive.writestr("dataset.json", json.dumps(labels))
    return folder / "data.zip"


NARROW = {"cifar10": ("cifar10", 32), "cifar10-cond": ("cifar10", 32), "imagenet64": ("imagenet64", 32), "imagenet512": ("edm2-s", 32)}


@pytest.mark.parametrize("preset", NARROW)
def test_every_preset_takes_a_step_on_real_shapes(call, tmp_path, monkeypatch, preset, device):
    """One iteration of both stages, on GPUs in bf16, at 32 channels instead of 128 or 192, with the preset's own settings otherwise."""
    network, width = NARROW[preset]
    narrow = dataclasses.replace(networks.NETWORKS[network], model_channels=width, num_blocks=1)
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


# ---------------------------------------------------------------------------------------------------------
# Sampling.


@pytest.mark.parametrize("stage", [0, 1])
def test_images_of_a_seed_do_not_depend_on_the_batch(call, stage1, tmp_path, stage, device):
    network = stage1 / "network.pt"
    if stage:
        call(train_diffratio, *SHORT, "--init", network, "--outdir", tmp_path / "run")
        network = tmp_path / "run" / "network.pt"
    args = ["--network", network, "--n", "10", "--seed", "5", "--steps", "6", "--device", device]
    for name, batch in (("a", 10), ("b", 3)):
        call(sample, *args, "--batch", batch, "--out", tmp_path / f"{name}.npz")
    a, b = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in "ab")
    assert a.shape == (10, 8, 8, 1) and a.dtype == np.uint8
    assert np.abs(a.astype(int) - b).max() <= 1  # a grey level, where rounding falls on the other side
    assert np.mean(a != b) < 0.01


def test_the_weights_in_assets_draw_digits_without_any_flag(call, tmp_path, device):
    """Right after the installation, near the data: a few times as far as its halves from each other, and all ten digits."""
    call(sample, "--n", "1797", "--batch", "600", "--device", device, "--out", tmp_path / "digits.npz")
    images, digits = np.load(tmp_path / "digits.npz")["arr_0"], data.load("digits")
    x, known = (torch.tensor(a.reshape(len(a), -1)).float() for a in (images, digits.images))
    nearest = digits.labels[torch.cdist(x, known).argmin(dim=1).numpy()]
    assert np.bincount(nearest, minlength=10).min() > 0.04 * len(images)
    assert abs(images.mean() - digits.images.mean()) < 5 and abs(images.std() - digits.images.std()) < 5
    call(sample, "--ratio", Path(sample.DIGITS).with_name("digits-ratio.pt"), "--candidates", "2", "--device", device, "--out", tmp_path / "x.png")


def test_the_weights_in_assets_draw_garments(call, tmp_path):
    """As bright and as varied as Fashion-MNIST (mean 72.9, standard deviation 90.0), on black, and no two alike."""
    assets = Path(sample.DIGITS).parent
    call(sample, "--network", assets / "fashion-mnist.pt", "--n", "200", "--device", "cpu", "--out", tmp_path / "garments.npz")
    images = np.load(tmp_path / "garments.npz")["arr_0"]
    assert images.shape == (200, 28, 28, 1) and abs(images.mean() - 72.9) < 10 and abs(images.std() - 90.0) < 10
    assert np.mean(images[:, [0, -1]][:, :, [0, -1]] < 40) > 0.9
    x = torch.tensor(images.reshape(200, -1)).float()
    assert (torch.cdist(x, x) + 1e9 * torch.eye(200)).min() > 10 * 28  # ten grey levels in every pixel
    more = ["--ratio", assets / "fashion-mnist-ratio.pt", "--candidates", "2", "--n", "4"]
    call(sample, "--network", assets / "fashion-mnist.pt", *more, "--out", tmp_path / "x.png")


def test_one_step_from_stage_1_is_the_generator_that_stage_2_starts_from(call, refused, stage1, tmp_path, device):
    call(sample, "--network", stage1 / "network.pt", "--device", device, "--one-step", "1.5", "--n", "4", "--out", tmp_path / "a.npz")
    net = checkpoints.load_network(stage1 / "network.pt")
    with torch.no_grad():
        images = sample.one_step(net, sample.inputs(net, range(4), 0, "cpu")[0], None, 1.5)
    found = np.load(tmp_path / "a.npz")["arr_0"].astype(int)
    assert np.abs(found - data.to_uint8(images)).max() <= 1  # with another layout or device float32 sums round differently
    checkpoints.save_network(tmp_path / "g.pt", net, role="generator", t_init=2.5)
    assert "holds a generator" in refused(sample, "--network", tmp_path / "g.pt", "--one-step", "2", "--out", tmp_path / "x.png")


def test_all_outputs_hold_the_same_images(call, stage1, tmp_path):
    for out in ("grid.png", "batch.npz", "folder"):
        call(sample, "--network", stage1 / "network.pt", "--n", "4", "--steps", "4", "--device", "cpu", "--out", tmp_path / out)
    batch, folder = data.load(str(tmp_path / "batch.npz")), data.load(str(tmp_path / "folder"))
    assert np.array_equal(batch.images, folder.images)
    assert (tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG"


def test_classes_are_fixed_in_turn_or_uniform(call, refused, stage1, tmp_path, device):
    config = networks.Config(img_resolution=8, img_channels=1, label_dim=10, model_channels=32, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    checkpoints.save_network(tmp_path / "n.pt", networks.Denoiser(config), role="generator", t_init=2.5)
    call(sample, "--network", tmp_path / "n.pt", "--n", "300", "--device", device, "--out", tmp_path / "any.npz")
    counts = np.bincount(np.load(tmp_path / "any.npz")["arr_1"], minlength=10)
    assert counts.min() > 10 and len(counts) == 10
    call(sample, "--network", tmp_path / "n.pt", "--n", "5", "--class", "7", "--device", device, "--out", tmp_path / "seven.npz")
    assert np.load(tmp_path / "seven.npz")["arr_1"].tolist() == [7] * 5
    call(sample, "--network", tmp_path / "n.pt", "--n", "13", "--batch", "4", "--class", "each", "--device", device, "--out", tmp_path / "each.npz")
    assert np.load(tmp_path / "each.npz")["arr_1"].tolist() == [*range(10), 0, 1, 2]
    for wrong in ("10", "-1"):
        assert "classes 0 to 9" in refused(sample, "--network", tmp_path / "n.pt", "--class", wrong, "--out", tmp_path / "x.png")
    assert "no classes" in refused(sample, "--network", stage1 / "network.pt", "--class", "each", "--out", tmp_path / "x.png")


def test_latents_are_written_where_diffusers_is_missing(call, refused, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    config = networks.Config("edm2", 16, 4, 10, 64, (1, 2), 1, (8,))
    checkpoints.save_network(tmp_path / "n.pt", networks.Denoiser(config), role="generator", t_init=2.5)
    call(sample, "--network", tmp_path / "n.pt", "--n", "2", "--device", "cpu", "--out", tmp_path / "latents.npz")
    assert "pip install diffusers" in capsys.readouterr().out
    assert np.load(tmp_path / "latents.npz")["latents"].shape == (2, 4, 16, 16)
    assert "pip install diffusers" in refused(sample, "--network", tmp_path / "n.pt", "--out", tmp_path / "x.png")
    pictures = networks.Denoiser(dataclasses.replace(config, img_channels=3))  # of this architecture, and no latents
    checkpoints.save_network(tmp_path / "n.pt", pictures, role="generator", t_init=2.5)
    call(sample, "--network", tmp_path / "n.pt", "--n", "2", "--device", "cpu", "--out", tmp_path / "pictures.npz")
    assert data.load(tmp_path / "pictures.npz").images.shape == (2, 16, 16, 3)


# ---------------------------------------------------------------------------------------------------------
# Bad input: one clear line, exit code 2, nothing lost.


def test_stage_2_without_stage_1_says_what_to_run(refused, tmp_path):
    assert "python pretrain.py --preset digits" in refused(train_diffratio, "--init", tmp_path / "none.pt", "--outdir", tmp_path)


def test_a_damaged_log_or_a_foreign_checkpoint_is_named(refused, stage1, tmp_path):
    shutil.copytree(stage1, tmp_path / "run")
    args = [*SHORT, "--outdir", tmp_path / "run"]
    log, checkpoint = tmp_path / "run" / "log.jsonl", tmp_path / "run" / "checkpoint.pt"
    whole = log.read_bytes()
    log.write_bytes(whole[:9] + bytes(9) + whole[18:])
    assert f"{log}: not the log of a run" in refused(pretrain, *args)
    log.write_bytes(whole)
    state = files.load_checkpoint(checkpoint)
    files.save_checkpoint({key: value for key, value in state.items() if key != "net"}, checkpoint)
    assert f"{checkpoint}: not a checkpoint of such a run" in refused(pretrain, *args)
    files.save_checkpoint({**state, "net": {**state["net"], "more": torch.zeros(1)}}, checkpoint)
    assert str(checkpoint) in refused(pretrain, *args)


def test_wrong_kinds_of_checkpoint(call, refused, stage1, tmp_path):
    call(train_diffratio, *SHORT, "--init", stage1 / "network.pt", "--outdir", tmp_path)
    assert "training state of stage 1" in refused(train_diffratio, "--init", stage1 / "checkpoint.pt", "--outdir", tmp_path / "x")
    assert "holds a generator" in refused(train_diffratio, "--init", tmp_path / "network.pt", "--outdir", tmp_path / "x")
    assert "ratio network" in refused(sample, "--network", tmp_path / "ratio.pt", "--out", tmp_path / "x.png")
    assert "training state of stage 1" in refused(train_diffratio, *SHORT, "--init", stage1 / "network.pt", "--outdir", stage1)
    old = {**files.load_checkpoint(stage1 / "checkpoint.pt"), "format": 1}
    files.save_checkpoint(old, tmp_path / "old" / "checkpoint.pt")
    assert "another version" in refused(pretrain, *SHORT, "--outdir", tmp_path / "old")


def test_other_settings_do_not_overwrite_a_run(call, refused, stage1, tmp_path):
    args = [*SHORT, "--init", stage1 / "network.pt", "--outdir", tmp_path]
    call(train_diffratio, *args)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.name != ".lock"}
    assert "--lr 0.0001" in refused(train_diffratio, *args, "--lr", "0.5")
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.name != ".lock"} == before


def test_a_run_does_not_continue_on_other_data_of_the_same_name(call, refused, tmp_path):
    for name, value in (("red", 200), ("blue", 90)):
        np.savez(tmp_path / "data.npz", images=np.full((8, 8, 8, 1), value, np.uint8))
        args = [*SHORT, "--data", tmp_path / "data.npz", "--outdir", tmp_path / "run"]
        if name == "red":
            call(pretrain, *args, "--kimg", "0.032")
    assert "8 images, 0 classes, content" in refused(pretrain, *args)


def test_a_run_continues_when_its_data_has_moved(call, tmp_path):
    for folder, kimg in (("here", "0.032"), ("there", "0.064")):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / "data.npz", images=np.full((8, 8, 8, 1), 90, np.uint8))
        call(pretrain, *SHORT, "--data", tmp_path / folder / "data.npz", "--outdir", tmp_path / "run", "--kimg", kimg)
    assert [json.loads(line)["nimg"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()] == [32, 64]


def test_divergence_of_the_loss_leaves_the_last_checkpoint(call, refused, tmp_path):
    args = [*SHORT, "--outdir", tmp_path, "--lr", "1e30", "--lr-rampup-kimg", "0"]
    call(pretrain, *args, "--kimg", "0.032")
    saved = (tmp_path / "checkpoint.pt").read_bytes()
    assert "diverged" in refused(pretrain, *args)
    assert (tmp_path / "checkpoint.pt").read_bytes() == saved


def test_momentum_and_dropout_are_fractions(refused):
    for script, flag in ((train_diffratio, "--beta1"), (train_diffratio, "--beta2"), (pretrain, "--beta2"), (pretrain, "--dropout")):
        for value in ("1", "-0.3", "much"):
            assert f"{flag}: invalid number in [0, 1)" in refused(script, flag, value)


def test_data_that_does_not_fit(refused, stage1, tmp_path):
    np.savez(tmp_path / "big.npz", images=np.zeros((4, 16, 16, 1), np.uint8))
    np.savez(tmp_path / "odd.npz", images=np.zeros((4, 9, 9, 1), np.uint8))
    out = ["--outdir", tmp_path / "x"]
    assert "(8, 1, 0)" in refused(train_diffratio, "--init", stage1 / "network.pt", "--data", tmp_path / "big.npz", *out)
    assert "cannot be halved" in refused(pretrain, "--data", tmp_path / "odd.npz", *out)
    assert "no labels" in refused(pretrain, "--data", tmp_path / "big.npz", "--cond", *out)
    assert "no such file" in refused(pretrain, "--data", tmp_path / "none", *out)
    assert not (tmp_path / "x").exists()


def test_resolution_makes_pictures_of_any_size_fit(call, refused, tmp_path):
    np.savez(tmp_path / "tall.npz", images=np.random.default_rng(0).integers(0, 256, (40, 20, 16, 1), np.uint8))
    args = [*SHORT, "--data", tmp_path / "tall.npz", "--outdir", tmp_path / "run"]
    assert "--resolution" in refused(pretrain, *args)
    call(pretrain, *args, "--resolution", 8)
    assert checkpoints.load_network(tmp_path / "run" / "network.pt").config.img_resolution == 8
    assert "--resolution 8" in refused(pretrain, *args, "--resolution", 16)  # of a run, it decides what is trained on


def test_batches_that_do_not_divide(refused, tmp_path):
    assert "--micro-batch" in refused(pretrain, "--batch", "10", "--micro-batch", "3", "--outdir", tmp_path)


@pytest.mark.parametrize("script, flags", [
    (pretrain, ["--kimg", "-1"]), (pretrain, ["--batch", "0"]), (pretrain, ["--lr", "nan"]), (pretrain, ["--preset", "imagenet"]),
    (pretrain, ["--lr-rampup-kimg", "-1"]), (pretrain, ["--lr-decay-batches", "inf"]), (pretrain, ["--p-mean", "nan"]),
    (train_diffratio, ["--lr-decay-kimg", "-1"]), (train_diffratio, ["--fid-images", "1"]), (train_diffratio, ["--ratio-width", "8"]),
    (train_diffratio, ["--network", "digits"]),
])  # fmt: skip
def test_nonsense_flags_are_refused(refused, tmp_path, script, flags):
    assert flags[0] in refused(script, f"{flags[0]}={flags[1]}", "--outdir", tmp_path / "x") and not (tmp_path / "x").exists()
