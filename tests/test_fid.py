"""fid.py: distances known in closed form, Inception against other implementations, and bad input.

The real weights are not needed: random ones of a fixed recipe stand in for them.
"""

import dataclasses
import json
import math
import pickle
import re
import subprocess
import sys
import types
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist

import fid
import networks
from benchmark import inception_shapes  # in exercises/
from machinery import checkpoints, data, training
from machinery.files import UserError

CPU = torch.device("cpu")
ONE_RANK = training.Runtime(CPU)
PAIRS = ("kid_mean", "kid_std", "precision", "recall")


def random_weights(seed=0):
    """A full set of Inception weights that keeps activations at one size.

    RandomState never changes its numbers.
    """
    rng, state = np.random.RandomState(seed), {}
    for name, shape in sorted(inception_shapes().items()):
        last = name.split(".")[-1]
        low, high = (0.8, 1.2) if last in ("weight", "running_var") else (-0.3, 0.3)
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
    config = networks.Config(img_resolution=8, img_channels=1, model_channels=16,
                             channel_mult=(1, 2), num_blocks=1, attn_resolutions=())
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


def statistics(x, **about):
    """`fid.Statistics` of features [n, d], by NumPy."""
    about = {"features": "test", "n": len(x), **about}
    return fid.Statistics(x.mean(0, np.float64), np.cov(x, rowvar=False), **about)


def pass_over(features, logits=None, batch=64):
    """`fid.measure` of images that have these features [n, d] and logits [n, 1008] or None."""
    def function(indices):
        return features[indices], None if logits is None else logits[indices]

    tag = "test" if logits is None else "inception test"
    extractor = fid.Extractor("a test", tag, features.shape[1], None, CPU, function)
    return fid.measure(extractor, list, len(features), ONE_RANK, batch)


def npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


# --------------------------------------------------------------------------------------------------
# The distance.


@pytest.mark.parametrize("zeros_a, zeros_b", [(0, 0), (30, 0), (0, 30), (30, 10), (60, 60)])
def test_distance_of_gaussians_that_share_their_axes(zeros_a, zeros_b):
    """|mu_a - mu_b|^2 + sum (sqrt(a_i) - sqrt(b_i))^2, whether or not some variances are zero."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(64, 64)))[0]
    a, b = 10 * np.exp(-rng.uniform(0, 12, 64)), np.exp(-rng.uniform(0, 12, 64))
    shift = rng.normal(size=64)
    a[:zeros_a], b[:zeros_b] = 0, 0
    one, other = (fid.Statistics(mu, (axes * v) @ axes.T, "test")
                  for mu, v in ((shift, a), (np.zeros(64), b)))
    expected = (shift**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    # Eigenvalues of the product are off by 64 eps 10 at most, their roots (2e-5 or more) by 4e-9,
    # 64 of them by 2e-7.
    assert abs(fid.frechet_distance(one, other) - expected) < 1e-6
    assert abs(fid.frechet_distance(other, one) - expected) < 1e-6


def test_distance_of_gaussians_with_other_axes():
    """In two dimensions tr((A B)^1/2) = sqrt(tr(A B) + 2 sqrt(det(A B)))."""
    a, b = np.array([[2.0, 0.6], [0.6, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    expected = np.trace(a + b) - 2 * np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    one, other = (fid.Statistics(np.zeros(2), s, "test") for s in (a, b))
    assert abs(fid.frechet_distance(one, other) - expected) < 1e-12


def test_distance_is_that_of_the_matrix_square_root():
    """The formula as it is written, with scipy's general square root, which is slow."""
    rng = np.random.default_rng(0)
    a, b = (statistics(rng.normal(size=(200, 64)) @ rng.normal(size=(64, 64))) for _ in range(2))
    root = scipy.linalg.sqrtm(a.sigma @ b.sigma)
    expected = ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma + b.sigma - 2 * root.real)
    # Eigenvalues of the product, not symmetric, are off by some eps times its norm (4e4) times
    # their condition (100). With the smallest at 1e-3 the roots add up to some 2e-8; the distance
    # is 2400.
    assert abs(fid.frechet_distance(a, b) / expected - 1) < 1e-9


@pytest.mark.parametrize("n", [20, 400])
def test_distance_of_a_set_from_itself(n):
    """Zero, also with fewer images (20) than features (128) and with a feature that is constant.

    Zero is the difference of sums of some 1e5, and 128 roundings of these are 3e-9. The product is
    graded: were it not, its small eigenvalues would be off by eps times the largest, 1e8, and their
    roots by 1e-4.
    """
    rows = 100 * np.random.default_rng(0).normal(size=(n, 128)) * np.logspace(0, -4, 128)
    rows[:, 5] = 0
    assert 0 <= fid.frechet_distance(statistics(rows), statistics(rows)) < 1e-6


def test_distance_with_fewer_images_than_features():
    """The same in either order, and that of the singular values of a product of exact roots."""
    rng = np.random.default_rng(0)
    scale = np.logspace(0, -2, 256)
    x, y = rng.normal(size=(90, 256)) * scale, rng.normal(size=(150, 256)) * scale
    a, b = statistics(x), statistics(y)
    cross = (x - x.mean(0)) @ (y - y.mean(0)).T / np.sqrt(89 * 149)
    trace = np.linalg.svd(cross, compute_uv=False).sum()
    expected = ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma + b.sigma) - 2 * trace
    assert fid.frechet_distance(a, b) == fid.frechet_distance(b, a)
    assert abs(fid.frechet_distance(a, b) / expected - 1) < 1e-10


def test_moments_are_those_of_numpy():
    """One pass, the last batch smaller, far from the origin: there plain sums lose every digit."""
    rows = 1e6 + np.random.default_rng(0).normal(size=(257, 12))
    features = torch.from_numpy(rows)
    for found in (pass_over(features, batch=20)[0], fid.Statistics.of(features, "test")):
        assert found.n == 257
        np.testing.assert_allclose(found.mu, rows.mean(0), rtol=1e-13)  # 257 roundings: 6e-14
        # A difference of features is off by eps 1e6 = 2e-10, and counts times another one, 3.
        np.testing.assert_allclose(found.sigma, np.cov(rows, rowvar=False), rtol=0, atol=1e-8)


# --------------------------------------------------------------------------------------------------
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
    assert mean == pytest.approx(expected, abs=1e-13) and std < 1e-13  # all subsets are the set


@pytest.mark.parametrize("mean, scale", [(0.0, 1.0), (0.5, 0.8)])
def test_kernel_distance_has_no_bias(mean, scale):
    """Of x ~ N(0, 1), y ~ N(m, s^2) it is the sum of binom(3, j) (E[x^j] - E[y^j])^2.

    Sets of 50 points: with the pairs of a point with itself it would be too large by 24/50.
    """
    moments = (0 - mean, 1 - (mean**2 + scale**2), 0 - (mean**3 + 3 * mean * scale**2))
    expected = 3 * moments[0] ** 2 + 3 * moments[1] ** 2 + moments[2] ** 2
    x, y = torch.randn(2, 2000, 50, 1, generator=torch.Generator().manual_seed(0))
    found = [fid.kernel_distance(a, mean + scale * b, subsets=1)[0] for a, b in zip(x, y)]
    error = np.std(found) / 2000**0.5
    assert abs(np.mean(found) - expected) < 4 * error and 4 * error < 24 / 50
    assert min(found) < 0  # the sign is kept


def test_kernel_distance_over_subsets():
    """Subsets follow the seed, and their mean is that of the whole sets up to their spread."""
    x, y = torch.randn(2, 100, 8, generator=torch.Generator().manual_seed(0))
    whole, _ = fid.kernel_distance(x, 1.3 * y)
    mean, std = fid.kernel_distance(x, 1.3 * y, subsets=900, size=20)
    assert std > 0.01 and abs(mean - whole) < 4 * std / 900**0.5
    first, again, other = (fid.kernel_distance(x, y, size=20, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    with pytest.raises(UserError, match="at least 2 images"):
        fid.kernel_distance(x[:1], y)


# --------------------------------------------------------------------------------------------------
# Precision and recall.


@pytest.mark.parametrize("k, expected", [(1, (2 / 4, 1 / 4)), (2, (2 / 4, 4 / 4))])
def test_precision_and_recall_on_a_line(k, expected):
    """The balls of the reference reach 1, 1, 1, 8 far, those of the samples 1.5, 1.5, 3, 3.

    That is k = 1; the edge counts: 3 is in. k = 2: 2, 1, 2, 9 and 27, 25.5, 25.5, 28.5.
    """
    reference, samples = line(0, 1, 2, 10), line(3, 4.5, 30, 33)
    assert fid.precision_recall(reference, samples, k) == expected
    assert fid.precision_recall(samples, reference, k) == expected[::-1]
    far = 2**20  # where the squares are 1e12
    assert fid.precision_recall(reference + far, samples + far, k) == expected


def test_precision_and_recall_by_definition():
    """The same counts as from all distances at once. 3000 points take two chunks."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3000, 3)), 0.8 * rng.normal(size=(2500, 3)) + 0.3
    radius_a, radius_b = (np.sort(cdist(x, x), axis=1)[:, 3] for x in (a, b))
    d = cdist(b, a)
    expected = (d <= radius_a).any(1).mean(), (d <= radius_b[:, None]).any(0).mean()
    found = fid.precision_recall(torch.from_numpy(a), torch.from_numpy(b))
    assert found == pytest.approx(expected, abs=1e-12)
    assert all(0.5 < share < 0.99 for share in expected)


def test_precision_and_recall_tell_fidelity_from_variety():
    """Of five modes a generator that knows one has recall 1/5; with a sixth it misses 1/6."""
    modes = torch.randn(6, 100, 8, generator=torch.Generator().manual_seed(0))
    modes += 100 * torch.arange(6)[:, None, None]
    reference, everything = modes[:5].flatten(0, 1), modes.flatten(0, 1)
    assert fid.precision_recall(reference, modes[2]) == (1, pytest.approx(1 / 5))
    assert fid.precision_recall(reference, everything) == (pytest.approx(5 / 6), 1)
    assert fid.precision_recall(reference, modes[5]) == (0, 0)


def test_equal_points_are_in_each_others_balls():
    """Also in balls of radius 0, in any order: rounding errors are not distances."""
    rows = torch.randn(1003, 2048, generator=torch.Generator().manual_seed(0)) + 30
    rows[:500] = rows[:50].repeat(10, 1)  # balls of radius 0
    assert fid.precision_recall(rows, rows.flip(0)) == (1, 1)
    assert fid.precision_recall(rows, rows[:4])[0] == 1
    same = torch.full((5, 3), 0.1)
    assert fid.precision_recall(same, same) == (1, 1)
    assert fid.precision_recall(same, same + 1e-3) == (0, 0)
    with pytest.raises(UserError, match="at least 4 images"):
        fid.precision_recall(same[:3], same)


# --------------------------------------------------------------------------------------------------
# The Inception Score.


def score(logits):
    return pass_over(torch.randn(len(logits), 1), logits, batch=7)[1]


def test_inception_score_of_known_predictions():
    """Predictions that say nothing score 1; certain ones, spread evenly over K classes, score K."""
    # Sums over 1008 classes of p ln p, 7 in all, are off by 1008 eps 7 = 2e-12 at most.
    assert score(torch.zeros(40, 1008)) == pytest.approx((1, 0), abs=1e-11)
    certain = 1e4 * F.one_hot(torch.arange(200) % 5, 1008).float()
    assert score(certain) == pytest.approx((5, 0), abs=1e-11)


def test_inception_score_splits():
    """Ten contiguous splits in the order given, with the population's standard deviation."""
    certain = 1e4 * F.one_hot(torch.arange(103) % 1008, 1008).float()
    certain[:51] = 0  # splits 0 to 4 hold images 0..50, splits 5 to 9 images 51..102
    sizes = np.diff([103 * s // 10 for s in range(11)])
    expected = np.array([1] * 5 + list(sizes[5:]))  # certain and different: the number of images
    assert score(certain) == pytest.approx((expected.mean(), expected.std()))


# --------------------------------------------------------------------------------------------------
# Inception.


def resize_by_definition(image, size):
    """TensorFlow 1's bilinear resize of image [H, W], pixel by pixel."""
    height, width = image.shape
    out = np.empty((size, size))
    for i in range(size):
        for j in range(size):
            y, x = i * height / size, j * width / size
            top, left = int(y), int(x)
            rows = image[[top, min(top + 1, height - 1)]]
            upper, lower = rows[:, left] + (rows[:, min(left + 1, width - 1)] - rows[:, left]) * (x - left)
            out[i, j] = upper + (lower - upper) * (y - top)
    return out


@pytest.mark.parametrize("height, width, size", [(8, 8, 299), (5, 7, 37), (64, 50, 37), (37, 37, 37)])
def test_resize_is_tensorflow_1(height, width, size):
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    resized = fid.resize_tf1(torch.from_numpy(images), size).numpy()
    expected = resize_by_definition(images[1, :, :, 2].astype(np.float64), size)
    # A float32 position up to 64 is off by 64 * 2^-23 pixels at most, in two axes, times 255 levels.
    assert np.abs(resized[1, :, :, 2] - expected).max() < 4e-3


def test_every_tensor_of_the_weight_file_is_used():
    """94 convolutions with five tensors each and the last layer; 23.9 M numbers."""
    shapes = inception_shapes()
    assert len(shapes) == 472 and sum(map(math.prod, shapes.values())) == 23_885_392
    net, used = fid.Inception(random_weights(), "cpu"), []
    conv = net.conv
    net.conv = lambda x, name, valid=False: (used.append(name), conv(x, name, valid))[1]
    net(torch.zeros(1, 3, 299, 299))
    assert {name.split("/")[0] for name in used} == net.layers.keys() and len(net.layers) == 94


def test_features_and_logits_equal_another_implementation(inception):
    """Projections of what torch-fidelity 0.4.0 gives in float64 with the same random weights.

    An average that counts the padding, the wrong pool in 7b or 7c, another resize or another eps of
    BatchNorm are off by 0.06 or more.
    """
    expected = torch.tensor([
        [-23.052959, 13.485928, 12.640119, -7.283963, -44.854845, -44.270556],
        [-22.130392, 12.972211, 13.691726, -7.495573, -42.945262, -42.962137],
        [-23.432332, 15.539804, 12.703240, -8.200340, -44.462641, -44.429563],
    ], dtype=torch.float64)
    features, logits = inception(pictures(3))
    assert features.shape == (3, 2048) and logits.shape == (3, 1008)
    assert features.dtype == torch.float32
    found = []
    for x in (features, logits):
        waves = torch.outer(torch.arange(x.shape[1]), torch.arange(1, 4)).double().cos()
        found.append(x.double() @ waves)
    # 2048 features of size 0.6, each off by 1e-6 of that after 48 float32 layers: 1e-3 if all
    # errors had one sign.
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=5e-3)


def test_gray_is_three_equal_channels(inception):
    gray = pictures(2, channels=1)
    colour = inception(np.repeat(gray, 3, axis=3))[0]
    torch.testing.assert_close(inception(gray)[0], colour, rtol=1e-4, atol=1e-4)


def test_given_weights_of_another_hash_are_used_with_a_warning(weights, capsys):
    extractor = fid.inception(ONE_RANK, weights)
    assert "6726825d" in capsys.readouterr().err and extractor.tag != fid.INCEPTION_TAG


def test_no_internet_and_no_weights(tmp_path, monkeypatch):
    """The message says where to get the file and where to put it; nothing half-written stays."""
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(UserError) as error:
        fid.inception(ONE_RANK)
    path = tmp_path / "hub" / "checkpoints" / fid.INCEPTION_FILE
    assert fid.INCEPTION_URL + fid.INCEPTION_FILE in str(error.value)
    assert str(path) in str(error.value) and not list(path.parent.iterdir())


def test_damaged_weights(weights, tmp_path):
    cached, path = tmp_path / "hub/checkpoints" / fid.INCEPTION_FILE, tmp_path / "weights.pth"
    cached.parent.mkdir(parents=True)
    for damaged, given in ((cached, None), (path, path)):
        damaged.write_bytes(weights.read_bytes()[:1_000_000])
        with pytest.raises(UserError, match=f"{damaged}: .*damaged"):
            fid.inception(ONE_RANK, given)
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, path)
    with pytest.raises(UserError, match="not the weights of Inception.*Conv2d_1a_3x3"):
        fid.inception(ONE_RANK, path)
    torch.save({**random_weights(), "Conv2d_1a_3x3.conv.weight": torch.zeros(32, 1, 3, 3)}, path)
    with pytest.raises(UserError, match=r"Inception.*\[32, 1, 3, 3\]"):
        fid.inception(ONE_RANK, path)
    torch.save([], path)
    with pytest.raises(UserError, match="not the weights of Inception"):
        fid.inception(ONE_RANK, path)


# --------------------------------------------------------------------------------------------------
# Statistics.


def test_statistics_files_keep_everything(tmp_path):
    rows = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    written = statistics(rows, name="mine", hash="abc", features="network x", rows=rows)
    written.save(tmp_path / "stats.npz")
    read = fid.Statistics.load(tmp_path / "stats.npz")
    assert (read.n, read.name, read.hash, read.features) == (9, "mine", "abc", "network x")
    assert np.array_equal(read.mu, written.mu) and np.array_equal(read.sigma, written.sigma)
    assert np.array_equal(read.rows, rows) and read.rows.dtype == np.float32


def test_published_statistics_go_with_inception_only(tmp_path):
    """NVIDIA's files hold mu [2048] and sigma, and nothing else."""
    path = npz(tmp_path / "cifar10-32x32.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    read = fid.Statistics.load(path)
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


SHAPES, ROWS = r"expected finite float64 \[d\] and a covariance", r"finite float32 rows \[m, 8\]"


@pytest.mark.parametrize("message, damage", [
    *((SHAPES, dict(sigma=sigma)) for sigma in (
        np.eye(7), np.eye(8).astype("U"), np.full((8, 8), np.nan), np.tri(8), -np.eye(8))),
    *((SHAPES, dict(mu=mu)) for mu in (np.zeros((8, 1)), np.full(8, np.inf), np.float64(0))),
    *((ROWS, dict(rows=rows)) for rows in (
        np.zeros((9, 7), np.float32), np.zeros(8, np.float32), np.float32(1), np.zeros((9, 8)),
        np.full((9, 8), np.nan, np.float32))),
])
def test_damaged_statistics(message, damage, tmp_path):
    arrays = dict(mu=np.zeros(8), sigma=np.eye(8), features="test") | damage
    with pytest.raises(UserError, match=f"stats.npz: .*{message}"):
        fid.Statistics.load(npz(tmp_path / "stats.npz", **arrays))


def test_sigma_that_is_no_covariance():
    bad = fid.Statistics(np.zeros(2), np.array([[1.0, 2.0], [2.0, 1.0]]), "test", name="bad")
    good = fid.Statistics(np.zeros(2), np.eye(2), "test", name="good")
    for pair in ((bad, bad), (bad, good), (good, bad)):
        with pytest.raises(UserError, match="bad: .*negative eigenvalues"):
            fid.frechet_distance(*pair)


def test_reference_statistics_are_computed_once(network):
    extractor = fid.network_features(ONE_RANK, network)
    dataset = data.Dataset("mine", pictures(60, 8, 1))
    first = fid.reference_statistics(extractor, dataset, ONE_RANK)
    extractor.function = None  # a second computation would fail
    again = fid.reference_statistics(extractor, dataset, ONE_RANK)
    assert np.array_equal(first.mu, again.mu) and np.array_equal(first.sigma, again.sigma)
    assert np.array_equal(first.rows, again.rows)
    assert again.n == 60 and again.hash == dataset.fingerprint()


def test_rows_are_the_features_of_a_random_choice(network, monkeypatch, recwarn):
    """Up to the limit all in order, else always the same choice, and not the first ones.

    The images lie in a mapped file, of whose arrays PyTorch warns if they are not copied.
    """
    extractor, images = fid.network_features(ONE_RANK, network), pictures(60, 8, 1)
    features = extractor(images)[0].numpy()
    images.flags.writeable = False
    dataset = data.Dataset("mine", images)
    every, none = fid.measure_dataset(extractor, dataset, ONE_RANK, batch=60)
    assert np.array_equal(every.rows, features) and none is None and len(every.mu) == 32
    monkeypatch.setattr(fid, "PAIRS_LIMIT", 20)
    some, other = (fid.measure_dataset(extractor, dataset, ONE_RANK, batch)[0] for batch in (60, 7))
    places = cdist(some.rows, features).argmin(axis=1)
    assert np.array_equal(some.rows, features[places])
    assert len(set(places)) == 20 and places.max() > 40 and not recwarn.list
    # Other batches, other float32 sums: 1e-6 of a feature after some ten layers. An image too few
    # would be 1 in 60.
    for a, b in ((some.rows, other.rows), (some.sigma, other.sigma)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(a).max())


def test_halves_are_disjoint_and_random():
    a, b = fid.split_half(101, seed=3)
    assert len(a) == len(b) == 50 and not set(a) & set(b)
    assert not np.array_equal(a, fid.split_half(101, seed=4)[0])
    assert np.array_equal(a, fid.split_half(101, seed=3)[0])


def test_two_ranks_measure_what_one_does(tmp_path):
    """Sums, scores and the features that are kept (of 70 images at most) are merged.

    101 images do not divide evenly; of three the second rank gets none. In float64, where rounding
    is far below what a missing image would change.
    """
    (tmp_path / "ranks.py").write_text(f"""
import sys
sys.path.insert(0, {str(Path(fid.__file__).parent)!r})
import numpy as np, torch, fid; from machinery import data, training
rt, fid.PAIRS_LIMIT = training.start("cpu"), 70
images = np.random.default_rng(0).integers(0, 256, (101, 4, 4, 3), np.uint8)
weight = torch.linspace(0, 1000, 48 * 1008).sin().view(48, 1008) / 200
def function(images):
    x = images.flatten(1).double()
    return x, x @ weight.double()
extractor = fid.Extractor("test", "inception test", 48, None, rt.device, function)
for n in 101, 3:
    found, score = fid.measure_dataset(extractor, data.Dataset("x", images[:n]), rt, batch=16)
    if rt.is_main:
        found.save(f"{{n}}-{{rt.world_size}}.npz")
        np.save(f"{{n}}-{{rt.world_size}}.npy", score)
training.run(lambda: None)
""")
    for launch in (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], []):
        call = [sys.executable, *launch, "ranks.py"]
        subprocess.run(call, cwd=tmp_path, check=True, capture_output=True)
    for n in 101, 3:
        one, two = (fid.Statistics.load(tmp_path / f"{n}-{ranks}.npz") for ranks in (1, 2))
        one_score, two_score = (np.load(tmp_path / f"{n}-{ranks}.npy") for ranks in (1, 2))
        assert two.n == one.n == n
        np.testing.assert_allclose(two.mu, one.mu, rtol=1e-12)
        np.testing.assert_allclose(two.sigma, one.sigma, atol=1e-12 * np.abs(one.sigma).max())
        np.testing.assert_allclose(two_score, one_score, rtol=0, atol=1e-11)  # 1008 classes
        assert np.array_equal(two.rows, one.rows) and one.rows.shape == (min(n, 70), 48)
        assert one.rows.any(axis=1).all()
        assert n == 3 or one_score[0] > 1.01  # the logits differ: there is something to merge


# --------------------------------------------------------------------------------------------------
# FID during training: what does not fit is found before.


@pytest.mark.parametrize("samples, reference, message", [
    (pictures(4, 16, 1), None, r"\[16, 16, 1\], but .* is for \[8, 8, 1\]"),
    (pictures(4, 8, 1), dict(arr_0=pictures(4, 16, 1)), "8x8, .*reference.npz has 16x16"),
    (pictures(4, 8, 1), dict(mu=np.zeros(2048), sigma=np.eye(2048)), "from one network"),
    (np.zeros((4, 8, 1, 1), np.float32), None, "holds latents"),
])
def test_sizes_are_compared_before_training(samples, reference, message, network, tmp_path, monkeypatch):
    monkeypatch.setattr(fid.sample, "latent_decoder", lambda *args: len)
    args = types.SimpleNamespace(fid_every=1, fid_features=network, inception=None, resolution=None,
                                 fid_reference=reference and str(tmp_path / "reference.npz"))
    if reference:
        npz(tmp_path / "reference.npz", **reference)
    run = types.SimpleNamespace(rt=ONE_RANK)
    with pytest.raises(UserError, match=message):
        fid.training_fid(args, data.Dataset("mine", samples), run, None, None)


# --------------------------------------------------------------------------------------------------
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
        return code, *capsys.readouterr()

    return call


def test_command_with_inception(command, weights, tmp_path):
    """FID and IS of a few images; one line of JSON; saved statistics are those of the reference."""
    a, b = (npz(tmp_path / f"{n}.npz", arr_0=pictures(n, seed=n)) for n in (3, 2))
    stats = tmp_path / "stats.npz"
    code, out, err = command(a, b, "--inception", weights, "--json", "--save-stats", stats)
    result = json.loads(out)
    keys = ["fid", "is_mean", "is_std", *PAIRS, "n_samples", "n_reference", "features"]
    assert code == 0 and list(result) == keys
    assert all(result[key] is None for key in PAIRS)  # which take four images or more
    assert result["fid"] > 0 and result["is_mean"] == pytest.approx(1)  # three splits of one
    assert (result["n_samples"], result["n_reference"]) == (3, 2)
    assert "3 samples images; published numbers use 50,000" in err
    saved = fid.Statistics.load(stats)
    assert (saved.n, saved.name, saved.features) == (2, b, result["features"])
    assert saved.hash == data.load(b).fingerprint()


def test_statistics_with_some_of_the_images(command, network, tmp_path):
    """ADM's VIRTUAL_*.npz: FID uses mu and sigma, the other measures the images; it is said."""
    features = fid.network_features(ONE_RANK, network)
    whole = pictures(40, 8, 1, seed=2)
    samples = npz(tmp_path / "samples.npz", arr_0=pictures(30, 8, 1))
    full, some = (npz(tmp_path / f"{n}.npz", arr_0=whole[:n]) for n in (40, 8))
    of = fid.measure_dataset(features, data.load(full), ONE_RANK)[0]
    both = npz(tmp_path / "both.npz", mu=of.mu, sigma=of.sigma, features=of.features, arr_0=whole[:8])
    options = "--features", network, "--json"
    found, fids, pairs = (json.loads(command(samples, r, *options)[1]) for r in (both, full, some))
    assert found["fid"] == pytest.approx(fids["fid"], rel=1e-6) and found["n_reference"] is None
    assert [found[key] for key in PAIRS] == [pairs[key] for key in PAIRS]
    assert abs(found["fid"] / pairs["fid"] - 1) > 0.01
    assert "both.npz: FID of its mu and sigma" in command(samples, both, *options)[2]


def test_command_with_statistics_on_both_sides(command, tmp_path):
    """Needs no network and no images: |mu_a - mu_b|^2 + d (2 - 1)^2."""
    for name, mean, scale in (("a", 3.0, 4.0), ("b", 0.0, 1.0)):
        side = fid.Statistics(np.array([mean, 0.0]), scale * np.eye(2), "test")
        side.save(tmp_path / f"{name}.npz")
    code, out, _ = command(tmp_path / "a.npz", tmp_path / "b.npz", "--json")
    result = json.loads(out)
    assert code == 0 and result["fid"] == pytest.approx(9 + 2, abs=1e-6)
    assert result["n_samples"] is result["is_mean"] is None and result["features"] == "test"
    assert all(result[key] is None for key in PAIRS)


def test_command_with_pairs(command, network, tmp_path):
    """KID, precision and recall of images, cached and saved statistics; not of others' ones."""
    a = npz(tmp_path / "a.npz", arr_0=pictures(40, 8, 1))
    b = npz(tmp_path / "b.npz", arr_0=pictures(60, 8, 1, seed=2) // 2)
    stats, bare, results = tmp_path / "stats.npz", tmp_path / "bare.npz", []
    for reference in (b, b, stats):
        code, out, err = command(a, reference, "--features", network, "--json", "--save-stats", stats)
        results.append([json.loads(out)[key] for key in PAIRS])
        assert code == 0 and err == ""
    extractor = fid.network_features(ONE_RANK, network)
    both = (fid.measure_dataset(extractor, data.load(path), ONE_RANK)[0].rows for path in (b, a))
    rows = list(map(torch.from_numpy, both))
    expected = [*fid.kernel_distance(*rows), *fid.precision_recall(*rows)]
    assert results[0] == results[1] == results[2] == pytest.approx(expected, rel=1e-4)
    _, out, _ = command(a, b, "--features", network)
    assert re.search(r"KID +\S+ ± \S+\nprecision +\S+\nrecall +\S+\n", out)

    dataclasses.replace(fid.Statistics.load(stats), rows=None).save(bare)
    for pair in ((a, bare), (bare, a), (bare, bare)):
        assert not re.search("KID|precision|recall|None", command(*pair, "--features", network)[1])
        result = json.loads(command(*pair, "--features", network, "--json")[1])
        assert all(result[key] is None for key in PAIRS) and result["fid"] >= 0


def test_a_set_against_itself_is_measured_once(command, network, tmp_path):
    """Precision and recall are 1, also of another file; each side keeps its own name."""
    a, b = (npz(tmp_path / f"{name}.npz", arr_0=pictures(60, 8, 1)) for name in "ab")
    stats = tmp_path / "stats.npz"
    code, out, err = command(a, b, "--features", network, "--save-stats", stats)
    assert code == 0 and err == "" and "IS " not in out and out.startswith("FD (stage 1) ")
    assert re.search(rf"precision +1\nrecall +1\nsamples +60 images, {a}\nreference +60 .* {b}\n", out)
    assert fid.Statistics.load(stats).name == b
    assert not (tmp_path / "cache").exists()


def test_count_and_resolution(command, network, tmp_path):
    images = npz(tmp_path / "images.npz", arr_0=pictures(60, 8, 1))
    code, out, _ = command(images, images, "--features", network, "--count", 40, "--json")
    result = json.loads(out)
    assert result["n_samples"] == result["n_reference"] == 40  # two choices
    assert code == 0 and result["fid"] > 1e-6 and result["is_mean"] is None

    large = np.load(images)["arr_0"].repeat(3, axis=1).repeat(3, axis=2)
    larger, folder = npz(tmp_path / "larger.npz", arr_0=large), tmp_path / "folder"
    data.write_images([(data.load(larger, resolution=8).images, None)], folder)
    options = "--features", network, "--resolution", 8, "--json"
    code, out, _ = command(larger, folder, *options)
    assert code == 0 and json.loads(out)["fid"] == pytest.approx(0, abs=1e-9)  # the same images

    stats = npz(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    code, _, err = command("digits", stats, "--features", network)
    assert code == 2 and "both sides must come from one network" in err


@pytest.mark.parametrize("samples, message", [
    (dict(arr_0=pictures(1, 8, 1)), "samples.npz: has 1 image; a covariance needs at least 2"),
    (dict(arr_0=pictures(0, 8, 1)), "no images"),
    (dict(arr_0=pictures(4, 8, 3)), r"\[8, 8, 3\], but .* is for \[8, 8, 1\]"),
    (dict(arr_0=pictures(4, 16, 1)), "different sizes: .*16x16, digits has 8x8; give --resolution"),
    (dict(arr_0=pictures(4, 8, 1).astype(np.float32)), "uint8"),
    (dict(mu=np.zeros(4)), "not a readable .npz of statistics `mu` and `sigma`"),
    ("this is not an archive", "not a readable .npz"),
    ("", "not a readable .npz"),
    (None, "no such file"),
])
def test_bad_input_is_one_line(samples, message, command, network, tmp_path):
    path = tmp_path / "samples.npz"
    if isinstance(samples, dict):
        npz(path, **samples)
    elif samples is not None:
        path.write_text(samples)
    code, out, err = command(path, "digits", "--features", network)
    assert code == 2 and out == "" and err.count("\n") == 1 and re.search(message, err), err


def test_a_reference_of_edm2_is_read_and_nothing_in_it_is_run(command, tmp_path):
    """`{"fid": {"mu", "sigma"}}`, a pickle of NumPy arrays; anything else is one line."""
    x = np.random.default_rng(0).normal(size=(3000, 2048))
    own = fid.Statistics(x.mean(0), np.cov(x, rowvar=False), "inception")
    own.save(tmp_path / "own.npz")
    with open(tmp_path / "edm2.pkl", "wb") as file:
        pickle.dump({"fid": {"mu": own.mu, "sigma": own.sigma}, "fd_dinov2": {}}, file)
    code, out, _ = command(tmp_path / "own.npz", tmp_path / "edm2.pkl", "--json")
    assert code == 0 and json.loads(out)["fid"] < 1e-6
    with open(tmp_path / "other.pkl", "wb") as file:
        pickle.dump({"mu": own.mu}, file)
    code, _, error = command(tmp_path / "own.npz", tmp_path / "other.pkl")
    assert code == 2 and "EDM2" in error and error.count("\n") == 1
