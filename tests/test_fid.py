"""fid.py: distances known in closed form, Inception against other implementations, and one line for bad input.

The real weights are not needed: random ones of a fixed recipe stand in for them.
"""

import dataclasses
import json
import re
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist

from machinery import checkpoints
from machinery import data
import fid
import networks
from machinery import training
from machinery.files import UserError

ONE_RANK = training.Runtime(torch.device("cpu"))
PAIRS = ("kid_mean", "kid_std", "precision", "recall")


def random_weights(seed=0):
    """A full set of Inception weights that keeps activations at one size. RandomState never changes its numbers."""
    rng = np.random.RandomState(seed)
    state = {}
    with torch.device("meta"):
        shapes = fid.file_shapes(fid.Inception())
    for name, shape in sorted(shapes.items()):
        low, high = {"weight": (0.8, 1.2), "running_var": (0.8, 1.2)}.get(name.split(".")[-1], (-0.3, 0.3))
        if len(shape) > 1:  # He's uniform distribution
            high = (6 / np.prod(shape[1:])) ** 0.5
            low = -high
        state[name] = torch.from_numpy(rng.uniform(low, high, tuple(shape)).astype(np.float32))
    return state


def pictures(n, size=32, channels=3, seed=1):
    """Smooth random images, uint8 [n, size, size, channels]."""
    coarse = np.random.RandomState(seed).uniform(0, 256, (n, 4, 4, channels))
    return np.kron(coarse, np.ones((1, size // 4, size // 4, 1))).astype(np.uint8)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(random_weights(), path)
    return path


@pytest.fixture(scope="session")
def inception(weights):
    return fid.inception(ONE_RANK, weights)


@pytest.fixture(scope="session")
def network(tmp_path_factory):
    """The file of a small stage-1 network for 8x8 gray images, with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("network") / "network.pt"
    config = networks.Config(img_resolution=8, img_channels=1, model_channels=16, channel_mult=(1, 2), num_blocks=1,
                             attn_resolutions=())
    checkpoints.save_network(path, networks.Denoiser(config), role="denoiser")
    return path


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On a busy machine, threads that wait for each other make small problems slower by far."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFRATIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def statistics(rows, **about):
    """`fid.Statistics` of feature rows [n, d]."""
    rows = np.asarray(rows, np.float64)
    return fid.Statistics(rows.mean(0), np.cov(rows, rowvar=False), **{"features": "test", "n": len(rows), **about})


def npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


# ---------------------------------------------------------------------------------------------------------
# The distance.


@pytest.mark.parametrize("zeros_a, zeros_b", [(0, 0), (30, 0), (0, 30), (30, 10), (60, 60)])
def test_distance_of_gaussians_that_share_their_axes(zeros_a, zeros_b):
    """There it is |mu_a - mu_b|^2 + sum (sqrt(a_i) - sqrt(b_i))^2, whether or not some variances are zero."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(64, 64)))[0]
    a, b, shift = 10 * np.exp(-rng.uniform(0, 12, 64)), np.exp(-rng.uniform(0, 12, 64)), rng.normal(size=64)
    a[:zeros_a], b[:zeros_b] = 0, 0
    one, other = (fid.Statistics(mu, (axes * v) @ axes.T, "test") for mu, v in ((shift, a), (np.zeros(64), b)))
    expected = (shift**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    # Eigenvalues of the product are off by 64 eps 10 at most, their roots (2e-5 or more) by 4e-9, 64 of them by 2e-7.
    assert abs(fid.frechet_distance(one, other) - expected) < 1e-6
    assert abs(fid.frechet_distance(other, one) - expected) < 1e-6


def test_distance_of_gaussians_with_other_axes():
    """In two dimensions tr((A B)^1/2) = sqrt(tr(A B) + 2 sqrt(det(A B)))."""
    a, b = np.array([[2.0, 0.6], [0.6, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    expected = np.trace(a + b) - 2 * np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    one, other = (fid.Statistics(np.zeros(2), s, "test") for s in (a, b))
    assert abs(fid.frechet_distance(one, other) - expected) < 1e-12


def test_distance_is_that_of_the_matrix_square_root():
    """The formula as it is written, with scipy's general square root, which fid.py does without: slow, and complex."""
    rng = np.random.default_rng(0)
    a, b = (statistics(rng.normal(size=(200, 64)) @ rng.normal(size=(64, 64))) for _ in range(2))
    root = scipy.linalg.sqrtm(a.sigma @ b.sigma)
    expected = ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma + b.sigma - 2 * root.real)
    # Eigenvalues of the product, not symmetric, are off by some eps times its norm (4e4) times their condition (100). With
    # the smallest at 1e-3 the roots add up to some 2e-8; the distance is 2400.
    assert abs(fid.frechet_distance(a, b) / expected - 1) < 1e-9


@pytest.mark.parametrize("n", [20, 400])
def test_distance_of_a_set_from_itself(n):
    """Zero, also with fewer images (20) than dimensions (128) and with a feature that never fires.

    Zero is the difference of sums of some 1e5, and 128 roundings of these are 3e-9. The product is graded (see `_root`):
    were it not, its small eigenvalues would be off by eps times the largest, 1e8, and their roots by 1e-4.
    """
    rows = 100 * np.random.default_rng(0).normal(size=(n, 128)) * np.logspace(0, -4, 128)
    rows[:, 5] = 0
    assert 0 <= fid.frechet_distance(statistics(rows), statistics(rows)) < 1e-6


def test_moments_are_those_of_numpy():
    """One pass, in batches of odd sizes, far from the origin: where sums of squares would lose every digit."""
    rows = 1e6 + np.random.default_rng(0).normal(size=(257, 12))
    moments = fid.Moments(12)
    for part in np.split(rows, [1, 3, 64, 200]):
        moments.add(torch.from_numpy(part))
    n, mean, covariance = moments.result(ONE_RANK)
    assert n == 257
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-13)  # 257 roundings: 6e-14
    # The mean of a batch is off by 137 eps 1e6 = 3e-8 at most, and counts times its distance from another mean, 0.2.
    np.testing.assert_allclose(covariance, np.cov(rows, rowvar=False), rtol=0, atol=1e-8)


# ---------------------------------------------------------------------------------------------------------
# KID.


def line(*values):
    return torch.tensor(values, dtype=torch.float32)[:, None]


def test_kernel_distance_by_definition():
    """Pair by pair, without the pairs of a point with itself."""
    x, y = np.random.default_rng(0).normal(size=(2, 6, 4))
    pairs = [(i, j) for i in range(6) for j in range(6)]

    def k(a, b):
        return (sum(a[c] * b[c] for c in range(4)) / 4 + 1) ** 3

    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / 30
    expected = within - 2 * sum(k(x[i], y[j]) for i, j in pairs) / 36
    mean, std = fid.kernel_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert mean == pytest.approx(expected, abs=1e-13) and std < 1e-13  # all subsets are the whole set


@pytest.mark.parametrize("mean, scale", [(0.0, 1.0), (0.5, 0.8)])
def test_kernel_distance_has_no_bias(mean, scale):
    """Of x ~ N(0, 1) and y ~ N(m, s^2) it is the sum of binom(3, j) (E[x^j] - E[y^j])^2: zero where they are equal.

    Sets of 50 points: with the pairs of a point with itself it would be too large by 24/50 from x alone.
    """
    moments = (0 - mean, 1 - (mean**2 + scale**2), 0 - (mean**3 + 3 * mean * scale**2))
    expected = 3 * moments[0] ** 2 + 3 * moments[1] ** 2 + moments[2] ** 2
    x, y = torch.randn(2, 2000, 50, 1, generator=torch.Generator().manual_seed(0))
    found = np.array([fid.kernel_distance(a, mean + scale * b, subsets=1)[0] for a, b in zip(x, y)])
    error = found.std() / 2000**0.5
    assert abs(found.mean() - expected) < 4 * error and 4 * error < 24 / 50
    assert found.min() < 0  # the sign is kept


def test_kernel_distance_over_subsets():
    """Subsets are random, follow the seed, and their mean is the value of the whole sets up to their spread."""
    x, y = torch.randn(2, 100, 8, generator=torch.Generator().manual_seed(0))
    whole, _ = fid.kernel_distance(x, 1.3 * y)
    mean, std = fid.kernel_distance(x, 1.3 * y, subsets=900, size=20)
    assert std > 0.01 and abs(mean - whole) < 4 * std / 900**0.5
    first, again, other = (fid.kernel_distance(x, y, size=20, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    with pytest.raises(UserError, match="at least 2 images"):
        fid.kernel_distance(x[:1], y)


# ---------------------------------------------------------------------------------------------------------
# Precision and recall.


@pytest.mark.parametrize("k, expected", [(1, (2 / 4, 1 / 4)), (2, (2 / 4, 4 / 4))])
def test_precision_and_recall_on_a_line(k, expected):
    """k = 1: the balls of the reference reach 1, 1, 1, 8 far, those of the samples 1.5, 1.5, 3, 3. The edge counts: 3 is in.

    k = 2: 2, 1, 2, 9 and 27, 25.5, 25.5, 28.5.
    """
    reference, samples = line(0, 1, 2, 10), line(3, 4.5, 30, 33)
    assert fid.precision_recall(reference, samples, k) == expected
    assert fid.precision_recall(samples, reference, k) == expected[::-1]
    assert fid.precision_recall(reference + 2**20, samples + 2**20, k) == expected  # where the squares are 1e12


def test_precision_and_recall_by_definition():
    """The same counts as from all distances at once. 3000 points take two chunks."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3000, 3)), 0.8 * rng.normal(size=(2500, 3)) + 0.3
    radius_a, radius_b = (np.sort(cdist(x, x), axis=1)[:, 3] for x in (a, b))
    between = cdist(b, a)
    expected = (between <= radius_a).any(1).mean(), (between <= radius_b[:, None]).any(0).mean()
    assert fid.precision_recall(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, abs=1e-12)
    assert all(0.5 < share < 0.99 for share in expected)


def test_precision_and_recall_tell_fidelity_from_variety():
    """Five modes far apart: a generator that knows one has precision 1 and recall 1/5, one that adds a sixth misses 1/6."""
    modes = torch.randn(6, 100, 8, generator=torch.Generator().manual_seed(0)) + 100 * torch.arange(6)[:, None, None]
    reference, everything = modes[:5].flatten(0, 1), modes.flatten(0, 1)
    assert fid.precision_recall(reference, modes[2]) == (1, pytest.approx(1 / 5))
    assert fid.precision_recall(reference, everything) == (pytest.approx(5 / 6), 1)
    assert fid.precision_recall(reference, modes[5]) == (0, 0)


def test_equal_points_are_in_each_others_balls():
    """Also in balls of no size, in any order: rounding errors of a product, which vary with its size, are no distances."""
    rows = torch.randn(1003, 2048, generator=torch.Generator().manual_seed(0)) + 30
    rows[:500] = rows[:50].repeat(10, 1)  # balls of no size
    assert fid.precision_recall(rows, rows.flip(0)) == (1, 1)
    assert fid.precision_recall(rows, rows[:4])[0] == 1
    same = torch.full((5, 3), 0.1)
    assert fid.precision_recall(same, same) == (1, 1) and fid.precision_recall(same, same + 1e-3) == (0, 0)
    with pytest.raises(UserError, match="at least 4 images"):
        fid.precision_recall(same[:3], same)


# ---------------------------------------------------------------------------------------------------------
# The Inception Score.


def score(logits, batch=7):
    total = fid.InceptionScore(len(logits), classes=logits.shape[1])
    for part in logits.split(batch):
        total.add(part)
    return total.result(ONE_RANK)


def test_inception_score_of_known_predictions():
    """Predictions that say nothing score 1; certain ones, spread evenly over K classes, score K."""
    # Sums over 1008 classes of p ln p, 7 in all, are off by 1008 eps 7 = 2e-12 at most.
    assert score(torch.zeros(40, 1008)) == pytest.approx((1, 0), abs=1e-11)
    certain = 1e4 * F.one_hot(torch.arange(200) % 5, 1008).float()
    assert score(certain) == pytest.approx((5, 0), abs=1e-11)


def test_inception_score_splits():
    """Ten contiguous splits in the order given, with the population's standard deviation over them."""
    certain = 1e4 * F.one_hot(torch.arange(103) % 1008, 1008).float()
    certain[:51] = 0  # splits 0 to 4 hold images 0..50, splits 5 to 9 images 51..102
    sizes = np.diff([103 * s // 10 for s in range(11)])
    expected = np.array([1] * 5 + list(sizes[5:]))  # all certain and all different: as many as there are images
    assert score(certain) == pytest.approx((expected.mean(), expected.std()))


# ---------------------------------------------------------------------------------------------------------
# Inception.


def resize_by_definition(image, size):
    """TensorFlow 1's bilinear resize of image [H, W], pixel by pixel."""
    height, width = image.shape
    out = np.empty((size, size))
    for i in range(size):
        for j in range(size):
            y, x = i * height / size, j * width / size
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
            lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * (x - left)
            out[i, j] = upper + (lower - upper) * (y - top)
    return out


@pytest.mark.parametrize("height, width, size", [(8, 8, 299), (5, 7, 37), (64, 50, 37), (37, 37, 37)])
def test_resize_is_tensorflow_1(height, width, size):
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    resized = fid.resize_tf1(torch.from_numpy(images), size).numpy()
    expected = resize_by_definition(images[1, :, :, 2].astype(np.float64), size)
    # A float32 position up to 64 is off by 64 * 2^-23 pixels at most, along two axes, times 255 gray levels.
    assert np.abs(resized[1, :, :, 2] - expected).max() < 4e-3


def test_weight_file_has_472_tensors():
    """94 convolutions with five tensors each and the last layer; 23.9 M numbers."""
    with torch.device("meta"):
        shapes = fid.file_shapes(fid.Inception())
    assert len(shapes) == 472 and sum(name.endswith(".conv.weight") for name in shapes) == 94
    assert sum(shape.numel() for shape in shapes.values()) == 23_885_392
    assert shapes["Conv2d_4a_3x3.bn.running_var"] == (192,)
    assert shapes["Mixed_6d.branch7x7dbl_2.conv.weight"] == (160, 160, 7, 1)
    assert shapes["Mixed_7a.branch7x7x3_4.conv.weight"] == (192, 192, 3, 3)
    assert shapes["Mixed_7c.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)
    assert shapes["fc.weight"] == (1008, 2048)


def test_folded_batch_norm_is_batch_norm():
    state = {name: value.double() for name, value in random_weights().items()}
    name = "Mixed_5b.branch5x5_2"
    x = torch.randn(2, 48, 9, 9, dtype=torch.float64)
    gain, bias, mean, variance = (state[f"{name}.bn.{key}"] for key in fid.BATCH_NORM)
    expected = F.batch_norm(F.conv2d(x, state[f"{name}.conv.weight"], padding=2), mean, variance, gain, bias, eps=1e-3)
    folded = fid.fold(state)
    found = F.conv2d(x, folded[f"{name}.weight"].double(), folded[f"{name}.bias"].double(), padding=2)
    # The folded weights are float32: 1200 products of 0.03, each off by 2^-24, are off by 2e-6 at most.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_features_and_logits_equal_another_implementation(inception):
    """Projections of the features and logits that torch-fidelity 0.4.0 gives in float64 with the same random weights.

    An average that counts the padding, the wrong pool in 7b or 7c or another resize are off by 0.06 or more.
    """
    expected = torch.tensor([
        [-23.052959, 13.485928, 12.640119, -7.283963, -44.854845, -44.270556],
        [-22.130392, 12.972211, 13.691726, -7.495573, -42.945262, -42.962137],
        [-23.432332, 15.539804, 12.703240, -8.200340, -44.462641, -44.429563],
    ], dtype=torch.float64)  # fmt: skip
    features, logits = inception(pictures(3))
    assert features.shape == (3, 2048) and logits.shape == (3, 1008) and features.dtype == torch.float32
    found = []
    for x in (features, logits):
        waves = torch.outer(torch.arange(x.shape[1]), torch.arange(1, 4)).double().cos()
        found.append(x.double() @ waves)
    # 2048 features of size 0.6, each off by 1e-6 of that after 48 float32 layers: 1e-3 if all errors had one sign.
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=5e-3)


def test_gray_is_three_equal_channels(inception):
    gray = pictures(2, channels=1)
    torch.testing.assert_close(inception(gray)[0], inception(np.repeat(gray, 3, axis=3))[0], rtol=1e-4, atol=1e-4)


def test_average_does_not_count_the_padding():
    x = torch.arange(9.0).view(1, 1, 3, 3)
    assert fid.average(x)[0, 0, 0, 0] == (0 + 1 + 3 + 4) / 4


# ---------------------------------------------------------------------------------------------------------
# Weight files.


def test_given_weights_of_another_hash_are_used_with_a_warning(weights, capsys):
    extractor = fid.inception(ONE_RANK, weights)
    assert "6726825d" in capsys.readouterr().err and extractor.tag != fid.INCEPTION_TAG


def test_cached_weights_of_another_hash_are_refused(tmp_path):
    path = tmp_path / "hub" / "checkpoints" / fid.INCEPTION_FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a download")
    with pytest.raises(UserError, match=f"{fid.INCEPTION_FILE}.*expected 6726825d"):
        fid.inception(ONE_RANK)


def test_no_internet_and_no_weights(tmp_path, monkeypatch):
    """The message says where to get the file and where to put it; nothing half-written stays."""
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(UserError) as error:
        fid.inception(ONE_RANK)
    path = tmp_path / "hub" / "checkpoints" / fid.INCEPTION_FILE
    assert fid.INCEPTION_URL in str(error.value) and str(path) in str(error.value)
    assert not list(path.parent.iterdir())


def test_damaged_weights(weights, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(weights.read_bytes()[:1_000_000])
    with pytest.raises(UserError, match="damaged"):
        fid.inception(ONE_RANK, path)

    torch.save({"fc.weight": torch.zeros(1008, 2048)}, path)
    with pytest.raises(UserError, match="Conv2d_1a_3x3.conv.weight is missing"):
        fid.inception(ONE_RANK, path)

    state = dict.fromkeys(random_weights())
    torch.save({**state, "Conv2d_1a_3x3.conv.weight": torch.zeros(32, 1, 3, 3)}, path)
    with pytest.raises(UserError, match=r"\[32, 1, 3, 3\], expected \[32, 3, 3, 3\]"):
        fid.inception(ONE_RANK, path)


# ---------------------------------------------------------------------------------------------------------
# Statistics.


def test_statistics_files_keep_everything(tmp_path):
    rows = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    written = dataclasses.replace(statistics(rows, name="mine", hash="abc", features="network x"), rows=rows)
    written.save(tmp_path / "stats.npz")
    read = fid.Statistics.load(tmp_path / "stats.npz")
    assert (read.n, read.name, read.hash, read.features) == (9, "mine", "abc", "network x")
    assert np.array_equal(read.mu, written.mu) and np.array_equal(read.sigma, written.sigma)
    assert np.array_equal(read.rows, rows) and read.rows.dtype == np.float32


def test_published_statistics_go_with_inception_only(tmp_path):
    """NVIDIA's files hold mu [2048] and sigma, and nothing else."""
    read = fid.Statistics.load(npz(tmp_path / "cifar10-32x32.npz", mu=np.zeros(2048), sigma=np.eye(2048)))
    assert read.n is None and read.rows is None
    read.check(fid.INCEPTION_TAG, 2048, "Inception")
    with pytest.raises(UserError, match="one network"):
        read.check("network sha256:0123", 2048, "network.pt")
    read.features = fid.INCEPTION_TAG  # a file that does say
    with pytest.raises(UserError, match="one network"):
        read.check("inception sha256:0123", 2048, "Inception with other weights")
    with pytest.raises(UserError, match="does not say which features"):
        fid.Statistics.load(npz(tmp_path / "small.npz", mu=np.zeros(64), sigma=np.eye(64)))


def test_features_of_two_kinds_or_sizes_have_no_distance():
    rows = np.random.default_rng(0).normal(size=(9, 4))
    with pytest.raises(UserError, match="kind 'other'"):
        fid.frechet_distance(statistics(rows), statistics(rows, features="other"))
    with pytest.raises(UserError, match="4 features .* 3 of the kind"):
        fid.frechet_distance(statistics(rows), statistics(rows[:, :3]))


@pytest.mark.parametrize("mu, sigma, message", [
    (np.zeros(8), np.eye(7), r"expected \[d\]"),
    (np.zeros((8, 1)), np.eye(8), r"expected \[d\]"),
    (np.zeros(8), np.full((8, 8), np.nan), "NaN"),
    (np.full(8, np.inf), np.eye(8), "NaN or infinity"),
    (np.zeros(8), np.tri(8), "not symmetric"),
    (np.zeros(8), -np.eye(8), "negative variance"),
    (np.zeros(8), np.eye(8).astype("U"), "expected float64"),
])  # fmt: skip
def test_damaged_statistics(mu, sigma, message, tmp_path):
    with pytest.raises(UserError, match=f"stats.npz: .*{message}"):
        fid.Statistics.load(npz(tmp_path / "stats.npz", mu=mu, sigma=sigma, features="test"))


@pytest.mark.parametrize("rows", [np.zeros((9, 7), np.float32), np.zeros(8, np.float32), np.float32(1), np.zeros((9, 8)),
                                  np.full((9, 8), np.nan, np.float32)])  # fmt: skip
def test_damaged_rows(rows, tmp_path):
    with pytest.raises(UserError, match=r"stats.npz: .*expected finite float32 \[m, 8\]"):
        fid.Statistics.load(npz(tmp_path / "stats.npz", mu=np.zeros(8), sigma=np.eye(8), features="test", rows=rows))


def test_sigma_that_is_no_covariance():
    with pytest.raises(UserError, match="negative eigenvalues"):
        bad = fid.Statistics(np.zeros(2), np.array([[1.0, 2.0], [2.0, 1.0]]), "test")
        fid.frechet_distance(bad, bad)


def test_reference_statistics_are_computed_once(network):
    extractor, dataset = fid.network_features(ONE_RANK, network), data.Dataset("mine", pictures(60, 8, 1))
    first = fid.reference_statistics(extractor, dataset, ONE_RANK)
    extractor.function = None  # a second computation would fail
    again = fid.reference_statistics(extractor, dataset, ONE_RANK)
    assert np.array_equal(first.mu, again.mu) and np.array_equal(first.sigma, again.sigma)
    assert again.n == 60 and again.hash == dataset.fingerprint() and np.array_equal(first.rows, again.rows)


def test_rows_are_the_features_of_a_random_choice(network, monkeypatch):
    """Of fewer images than the limit all in order, else as many as the limit, always the same, and not the first ones."""
    extractor, dataset = fid.network_features(ONE_RANK, network), data.Dataset("mine", pictures(60, 8, 1))
    features = extractor(dataset.images)[0].numpy()
    every, _ = fid.measure_dataset(extractor, dataset, ONE_RANK, batch=60)
    assert np.array_equal(every.rows, features)
    monkeypatch.setattr(fid, "PAIRS_LIMIT", 20)
    some, other = (fid.measure_dataset(extractor, dataset, ONE_RANK, batch)[0].rows for batch in (60, 7))
    places = cdist(some, features).argmin(axis=1)
    assert np.array_equal(some, features[places]) and len(set(places)) == 20 and places.max() > 40
    np.testing.assert_allclose(some, other, rtol=0, atol=1e-4 * np.abs(some).max())  # other batches, see below


def test_network_features_do_not_depend_on_the_batch(network):
    extractor, dataset = fid.network_features(ONE_RANK, network), data.Dataset("mine", pictures(60, 8, 1))
    one, _ = fid.measure_dataset(extractor, dataset, ONE_RANK, batch=7)
    other, score = fid.measure_dataset(extractor, dataset, ONE_RANK, batch=1000)
    # Other batches, other float32 sums: 1e-6 of a feature after some ten layers. An image too few would be 1 in 60.
    np.testing.assert_allclose(one.sigma, other.sigma, rtol=0, atol=1e-4 * np.abs(one.sigma).max())
    assert score is None and len(one.mu) == extractor.dim == 32


def test_halves_are_disjoint_and_random():
    a, b = fid.split_half(101, seed=3)
    assert len(a) == len(b) == 50 and not set(a) & set(b)
    assert not np.array_equal(a, fid.split_half(101, seed=4)[0]) and np.array_equal(a, fid.split_half(101, seed=3)[0])


def test_two_ranks_measure_what_one_does(tmp_path):
    """Each rank takes a contiguous part; moments and scores are merged. 101 images do not divide evenly.

    So are the features that are kept: of 70 here, chosen among all.
    In float64, since the two divide the images into other batches, and the sums of a matrix product follow its size.
    """
    (tmp_path / "ranks.py").write_text(f"""
import sys
sys.path.insert(0, {str(Path(fid.__file__).parent)!r})
import numpy as np, torch, fid; from machinery import data, training
rt, fid.PAIRS_LIMIT = training.start("cpu"), 70
dataset = data.Dataset("random", np.random.default_rng(0).integers(0, 256, (101, 4, 4, 3), np.uint8))
weight = torch.linspace(0, 1000, 48 * 1008).sin().view(48, 1008) / 200
def function(images):
    x = images.flatten(1).double()
    return x, x @ weight.double()
extractor = fid.Extractor("test", "inception test", 48, None, rt.device, function)
stats, score = fid.measure_dataset(extractor, dataset, rt, batch=16)
if rt.is_main:
    stats.save("stats.npz")
    np.save("score.npy", score)
training.run(lambda: None)
""")
    found = []
    for launch in (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], []):
        call = [sys.executable, *launch, "ranks.py"]
        subprocess.run(call, cwd=tmp_path, check=True, capture_output=True)
        found.append((fid.Statistics.load(tmp_path / "stats.npz"), np.load(tmp_path / "score.npy")))
    (two, two_score), (one, one_score) = found
    assert two.n == one.n == 101
    np.testing.assert_allclose(two.mu, one.mu, rtol=1e-12)
    np.testing.assert_allclose(two.sigma, one.sigma, atol=1e-12 * np.abs(one.sigma).max())
    np.testing.assert_allclose(two_score, one_score, rtol=0, atol=1e-11)  # 1008 classes, as in the tests of the score
    assert np.array_equal(two.rows, one.rows) and one.rows.shape == (70, 48) and one.rows.any(axis=1).all()
    assert one_score[0] > 1.01  # the logits differ, so there is something to merge


# ---------------------------------------------------------------------------------------------------------
# The command.


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `fid.py` with arguments: (exit code, standard output, standard error)."""
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, arguments)])
        code = 0
        try:
            training.run(fid.main)
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_command_with_inception(command, weights, tmp_path):
    """FID and IS of a few images; one line of JSON; the saved statistics are those of the reference."""
    samples, reference = npz(tmp_path / "a.npz", arr_0=pictures(3)), npz(tmp_path / "b.npz", arr_0=pictures(2, seed=2))
    stats = tmp_path / "stats.npz"
    code, out, err = command(samples, reference, "--inception", weights, "--json", "--save-stats", stats)
    result = json.loads(out)
    assert code == 0 and list(result) == ["fid", "is_mean", "is_std", *PAIRS, "n_samples", "n_reference", "features"]
    assert all(result[key] is None for key in PAIRS)  # which take four images or more
    assert result["fid"] > 0 and result["is_mean"] == pytest.approx(1)  # three images make three splits of one
    assert (result["n_samples"], result["n_reference"]) == (3, 2)
    assert "3 samples images; published numbers use 50,000" in err

    saved = fid.Statistics.load(stats)
    assert (saved.n, saved.name, saved.features) == (2, reference, result["features"])
    assert saved.hash == data.load(reference).fingerprint()


def test_command_with_statistics_on_both_sides(command, tmp_path):
    """Needs no network and no images: |mu_a - mu_b|^2 + d (2 - 1)^2."""
    for name, mean, scale in (("a", 3.0, 4.0), ("b", 0.0, 1.0)):
        fid.Statistics(np.array([mean, 0.0]), scale * np.eye(2), "test").save(tmp_path / f"{name}.npz")
    code, out, _ = command(tmp_path / "a.npz", tmp_path / "b.npz", "--json")
    result = json.loads(out)
    assert code == 0 and result["fid"] == pytest.approx(9 + 2, abs=1e-6)
    assert result["n_samples"] is result["is_mean"] is None and result["features"] == "test"
    assert all(result[key] is None for key in PAIRS)


def test_command_with_pairs(command, network, tmp_path):
    """KID, precision and recall, from images, from the cache and from saved statistics; none from others' statistics."""
    a, b = npz(tmp_path / "a.npz", arr_0=pictures(40, 8, 1)), npz(tmp_path / "b.npz", arr_0=pictures(60, 8, 1, seed=2) // 2)
    stats, bare = tmp_path / "stats.npz", tmp_path / "bare.npz"
    results = []
    for reference in (b, b, stats):
        code, out, err = command(a, reference, "--features", network, "--json", "--save-stats", stats)
        results.append([json.loads(out)[key] for key in PAIRS])
        assert code == 0 and err == ""
    extractor = fid.network_features(ONE_RANK, network)
    both = (fid.measure_dataset(extractor, data.load(path), ONE_RANK)[0].rows for path in (b, a))
    reference, samples = map(torch.from_numpy, both)
    expected = [*fid.kernel_distance(reference, samples), *fid.precision_recall(reference, samples)]
    assert results[0] == results[1] == results[2] == pytest.approx(expected, rel=1e-4)
    _, out, _ = command(a, b, "--features", network)
    assert re.search(r"KID +\S+ ± \S+\nprecision +\S+\nrecall +\S+\n", out)
    _, out, _ = command(a, a, "--features", network, "--json")
    assert (json.loads(out)["precision"], json.loads(out)["recall"]) == (1, 1)

    dataclasses.replace(fid.Statistics.load(stats), rows=None).save(bare)
    for pair in ((a, bare), (bare, a), (bare, bare)):
        assert not re.search("KID|precision|recall|None", command(*pair, "--features", network)[1])
        result = json.loads(command(*pair, "--features", network, "--json")[1])
        assert all(result[key] is None for key in PAIRS) and result["fid"] >= 0


def test_command_with_network_features(command, network, tmp_path):
    images = npz(tmp_path / "images.npz", arr_0=pictures(60, 8, 1))
    code, out, err = command(images, images, "--features", network)
    assert code == 0 and err == "" and "60 images" in out and "IS" not in out
    assert not (tmp_path / "cache").exists()  # a set against itself is measured once, not also as a reference
    code, out, _ = command(images, images, "--features", network, "--count", 40, "--json")
    result = json.loads(out)
    assert result["n_samples"] == result["n_reference"] == 40 and result["fid"] > 1e-6 and result["is_mean"] is None

    larger = npz(tmp_path / "larger.npz", arr_0=np.load(images)["arr_0"].repeat(3, axis=1).repeat(3, axis=2))
    folder = tmp_path / "folder"
    data.write_images([(data.load(larger, resolution=8).images, None)], folder, 60)
    code, out, _ = command(larger, folder, "--features", network, "--resolution", 8, "--json")
    assert code == 0 and json.loads(out)["fid"] == pytest.approx(0, abs=1e-9)  # the same images, resized by the loader

    stats = npz(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    code, _, err = command("digits", stats, "--features", network)
    assert code == 2 and "both sides must come from one network" in err


@pytest.mark.parametrize("samples, message", [
    (dict(arr_0=pictures(1, 8, 1)), "samples.npz: has 1 image; a covariance needs at least 2"),
    (dict(arr_0=pictures(0, 8, 1)), "no images"),
    (dict(arr_0=pictures(4, 8, 3)), r"\[8, 8, 3\], but .* is for \[8, 8, 1\]"),
    (dict(arr_0=pictures(4, 16, 1)), "different sizes: .*16x16, digits has 8x8; give --resolution"),
    (dict(arr_0=pictures(4, 8, 1).astype(np.float32)), "uint8"),
    (dict(mu=np.zeros(4)), "statistics `mu` and `sigma`"),
    ("this is not an archive", "not a readable .npz"),
    ("", "not a readable .npz"),
    (None, "no such file"),
])  # fmt: skip
def test_bad_input_is_one_line(samples, message, command, network, tmp_path):
    path = tmp_path / "samples.npz"
    if isinstance(samples, dict):
        npz(path, **samples)
    elif samples is not None:
        path.write_text(samples)
    code, out, err = command(path, "digits", "--features", network)
    assert code == 2 and out == "" and err.count("\n") == 1 and re.search(message, err), err


def test_images_of_a_mapped_file_are_taken_without_a_warning(recwarn):
    """PyTorch warns once a process of arrays that cannot be written to."""
    images = np.zeros((2, 4, 4, 1), np.uint8)
    images.flags.writeable = False
    seen = []
    fid.Extractor("a test", "a test", 1, None, torch.device("cpu"), seen.append)(images)
    seen[0].add_(1)
    assert images.sum() == 0 and not recwarn.list
