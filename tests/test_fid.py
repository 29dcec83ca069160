"""fid.py: distances known in closed form, Inception (with random weights), and bad input."""

import json
import pickle
import re
import urllib.error
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, call, python
from scipy.spatial.distance import cdist
from test_data import make

import fid
import gpu
import measure
from machinery import data, files, training
from machinery.files import UserError

pytestmark = pytest.mark.usefixtures("one_thread")  # more threads slow small problems down
NETWORK = ROOT / "assets" / "digits-stage1.pt"
ONE_RANK = training.Runtime("cpu")
PAIRS = ("kid_mean", "kid_std", "precision", "recall")


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A file of Inception weights of a fixed recipe that keeps activations at one size."""
    rng, state = np.random.RandomState(0), {}  # the same numbers in every version of NumPy
    for name, shape in sorted(gpu.inception_shapes().items()):
        low, high = (0.8, 1.2) if name.endswith((".weight", ".running_var")) else (-0.3, 0.3)
        if len(shape) > 1:  # He's uniform distribution
            low, high = (sign * (6 / np.prod(shape[1:])) ** 0.5 for sign in (-1, 1))
        state[name] = torch.from_numpy(rng.uniform(low, high, shape).astype(np.float32))
    torch.save(state, path := tmp_path_factory.mktemp("inception") / "random.pth")
    return path


def pictures(n, size=8, channels=1, seed=1):
    """Smooth random images, uint8 [n, size, size, channels]."""
    coarse = np.random.RandomState(seed).uniform(0, 256, (n, 4, 4, channels))
    return np.kron(coarse, np.ones((1, size // 4, size // 4, 1))).astype(np.uint8)


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFRATIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def pass_over(rt, features, logits=None, batch=64):
    """`fid.measure` of images that have these features [n, d] and logits [n, 1008] or None."""
    def function(indices):
        return tuple(t if t is None else t.to(rt.device)[indices] for t in (features, logits))
    tag = "test" if logits is None else "inception test"
    extractor = fid.Extractor("a test", tag, features.shape[1], None, rt.device, function)
    return fid.measure(extractor, list, len(features), rt, batch)


@pytest.mark.parametrize("n, m", [(400, 200), (20, 90)])
def test_distance_of_two_sets_and_of_one_from_itself(n, m):
    """Also with fewer images than features (128), of which one is constant. 128 roundings of sums
    of some 1e5 are 3e-9; of a product that is not graded small roots are off by 1e-4."""
    rng, scale = np.random.default_rng(0), 100 * np.logspace(0, -4, 128)
    scale[5] = 0
    x, y = (torch.from_numpy(rng.normal(size=(images, 128)) * scale) for images in (n, m))
    a, again, b = (measure.statistics(features, "test") for features in (x, x, y))
    assert 0 <= fid.frechet_distance(a, again) < 1e-6
    # Centred features are roots of the covariances; the trace sums their product's singular values.
    cross = (x - x.mean(dim=0)) @ (y - y.mean(dim=0)).T / ((n - 1) * (m - 1)) ** 0.5
    trace = torch.linalg.svdvals(cross).sum().item()
    expected = ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma + b.sigma) - 2 * trace
    assert fid.frechet_distance(a, b) == fid.frechet_distance(b, a)
    assert abs(fid.frechet_distance(a, b) / expected - 1) < 1e-12


def test_one_pass_gives_moments_and_rows(monkeypatch, device):
    """NumPy's moments, also far from 0; all rows in order, or always the same choice of them."""
    rows = 1e6 + np.random.default_rng(0).normal(size=(257, 12))  # plain sums lose every digit
    features = torch.from_numpy(rows)
    rt = training.Runtime(device)
    every = pass_over(rt, features, batch=20)[0]
    for found in (every, measure.statistics(features, "test")):
        assert found.n == 257
        np.testing.assert_allclose(found.mu, rows.mean(0), rtol=1e-13)  # 257 roundings: 6e-14
        # A difference of features is off by eps 1e6 = 2e-10, and counts times another one, 3.
        np.testing.assert_allclose(found.sigma, np.cov(rows, rowvar=False), rtol=0, atol=1e-8)
    assert np.array_equal(every.rows, rows.astype(np.float32))
    monkeypatch.setattr(fid, "PAIRS_LIMIT", 20)
    some, other = (pass_over(rt, features, batch=batch)[0].rows for batch in (257, 7))
    places = cdist(some, every.rows).argmin(axis=1)
    assert np.array_equal(some, other) and np.array_equal(some, every.rows[places])
    assert len(set(places)) == 20 and places.max() > 171


def test_kernel_distance_by_definition(device):
    """Without the pairs of a point with itself: no bias, so that some values are negative."""
    x, y = np.random.default_rng(0).normal(size=(2, 6, 4))
    for other in (y, x):
        xx, yy, xy = ((a @ b.T / 4 + 1) ** 3 for a, b in ((x, x), (other, other), (x, other)))
        within = sum(kernel[~np.eye(6, dtype=bool)].mean() for kernel in (xx, yy))
        mean, std = fid.kernel_distance(*(torch.from_numpy(a).to(device) for a in (x, other)))
        assert mean == pytest.approx(within - 2 * xy.mean(), abs=1e-13)
        assert std < 1e-13  # each subset is the set
    assert mean < 0  # of a set from itself: the sign is kept


def test_kernel_distance_over_subsets():
    """Subsets follow the seed, and their mean is that of the whole sets up to their spread."""
    x, y = torch.randn(2, 100, 8, generator=torch.Generator().manual_seed(0))
    whole, _ = fid.kernel_distance(x, 1.3 * y)
    mean, std = fid.kernel_distance(x, 1.3 * y, subsets=900, size=20)
    assert std > 0.01 and abs(mean - whole) < 4 * std / 900**0.5
    first, again, other = (fid.kernel_distance(x, y, size=20, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_definition(k, device):
    """The same counts as from all distances at once; 3000 points take two chunks. Whole numbers put
    many points on the edge of a ball, which counts, also far from 0."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 50, (3000, 3)) + 3e4, rng.integers(9, 60, (2500, 3)) + 3e4
    radius_a, radius_b = (np.partition(cdist(x, x), k, axis=1)[:, k] for x in (a, b))
    d = cdist(b, a)
    expected = (d <= radius_a).any(1).mean(), (d <= radius_b[:, None]).any(0).mean()
    sides = [torch.from_numpy(side).float().to(device) for side in (a, b)]
    assert fid.precision_recall(*sides, k) == pytest.approx(expected, abs=1e-12)
    assert all(0.2 < share < 0.99 for share in expected) and expected[0] != expected[1]


def test_equal_points_are_in_each_others_balls(device):
    """Also in balls of radius 0, in any order: rounding errors are not distances."""
    rows = torch.randn(1003, 2048, generator=torch.Generator().manual_seed(0)) + 30
    rows[:500] = rows[:50].repeat(10, 1)  # balls of radius 0
    rows = rows.to(device)
    assert fid.precision_recall(rows, rows.flip(0)) == (1, 1)
    assert fid.precision_recall(rows, rows[:4])[0] == 1
    same = torch.full((5, 3), 0.1, device=device)
    assert fid.precision_recall(same, same + 1e-3) == (0, 0)
    with pytest.raises(UserError, match="at least 4 images"):
        fid.precision_recall(same[:3], same)


def test_inception_score(device):
    """Ten contiguous splits in the order given, with the population's standard deviation. Blind
    predictions score 1; certain ones, spread evenly over K classes, score K."""
    def score(logits):
        return pass_over(training.Runtime(device), torch.randn(len(logits), 1), logits, batch=7)[1]
    certain = 1e4 * torch.eye(1008)
    # Sums over 1008 classes of p ln p, 7 in all, are off by 1008 eps 7 = 2e-12 at most.
    assert score(torch.zeros(40, 1008)) == pytest.approx((1, 0), abs=1e-11)
    assert score(certain[torch.arange(200) % 5]) == pytest.approx((5, 0), abs=1e-11)
    certain[:51] = 0  # of 103 images: splits 0 to 4 hold images 0..50, splits 5 to 9 images 51..102
    sizes = np.diff([103 * s // 10 for s in range(11)])
    expected = np.array([1] * 5 + list(sizes[5:]))  # certain and different: the number of images
    assert score(certain[:103]) == pytest.approx((expected.mean(), expected.std()))


@pytest.mark.parametrize("h, w, size", [(8, 8, 299), (5, 7, 37), (64, 50, 37), (37, 37, 37)])
def test_resize_is_tensorflow_1(h, w, size, device):
    """Linear in each axis, without a half-pixel shift; np.interp clamps at the far edge."""
    images = np.random.default_rng(0).integers(0, 256, (2, h, w, 3), np.uint8)
    maps = [[np.interp(np.arange(size) * n / size, np.arange(n), pixel) for pixel in np.eye(n)]
            for n in (h, w)]
    expected = np.einsum("nhwc,hi,wj->nijc", images.astype(np.float64), *maps, optimize=True)
    resized = fid.resize_tf1(torch.from_numpy(images).to(device), size).cpu().numpy()
    # A float32 position up to 64 is off by 64 * 2^-23 pixels at most, in two axes, by 255 levels.
    assert np.abs(resized - expected).max() < 4e-3


def test_features_and_logits_equal_another_implementation(weights, device):
    """Projections of what torch-fidelity 0.4.0 gives in float64 with the same random weights.
    An average that counts the padding, the wrong pool in 7b or 7c, another resize or another eps of
    BatchNorm are off by 0.3 or more. Gray images are taken as three equal channels."""
    inception, found = fid.inception(training.Runtime(device), weights), []
    expected = torch.tensor([
        [-23.052959, 13.485928, 12.640119, -7.283963, -44.854845, -44.270556],
        [-22.130392, 12.972211, 13.691726, -7.495573, -42.945262, -42.962137]], dtype=torch.double)
    features, logits = inception(pictures(2, 32, 3))
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)
    assert features.dtype == torch.float32
    for x in (features, logits):
        waves = torch.outer(torch.arange(x.shape[1]), torch.arange(1, 4)).double().cos()
        found.append(x.cpu().double() @ waves)
    # 2048 features of size 0.6, each off by 1e-6 of that after 48 float32 layers: at most 1e-3.
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=5e-3)
    gray = pictures(1, 32)
    colour = inception(np.repeat(gray, 3, axis=3))[0]
    torch.testing.assert_close(inception(gray)[0], colour, rtol=1e-4, atol=1e-4)


def test_missing_and_damaged_weights(weights, tmp_path, monkeypatch):
    """Offline it is said where to get the file and where to put it, and nothing half-written stays.
    With one changed byte torch would load it, and the FID would be another."""
    monkeypatch.setattr("torch.hub.urlopen", Mock(side_effect=urllib.error.URLError("offline")))
    path, content = tmp_path / "hub/checkpoints" / fid.INCEPTION_FILE, weights.read_bytes()
    with pytest.raises(UserError, match=f"{fid.INCEPTION_URL}{fid.INCEPTION_FILE}.* {path}"):
        fid.inception(ONE_RANK)
    assert not list(path.parent.iterdir())
    half = len(content) // 2
    changed = content[:half] + bytes([content[half] ^ 1]) + content[half + 1:]
    wrong = {**torch.load(weights), "Conv2d_1a_3x3.conv.weight": torch.zeros(32, 1, 3, 3)}
    for state, message in ((changed, "check sum"), (content[:1_000_000], "damaged"),
                           ([], "damaged"), (wrong, r"\[32, 1, 3, 3\]"),
                           ({"fc.weight": torch.zeros(1008, 2048)}, "Conv2d_1a_3x3")):
        if isinstance(state, bytes):
            path.write_bytes(state)
        else:
            torch.save(state, path)
        with pytest.raises(UserError, match=f"{path}: not the weights of Inception.*{message}"):
            fid.inception(ONE_RANK)


def test_reference_statistics_are_computed_once(recwarn):
    """The cached file keeps everything. Images of a mapped file, read-only, give no warning."""
    extractor, images = fid.network_features(ONE_RANK, NETWORK), pictures(60)
    features, changed = extractor(images)[0].numpy(), images.copy()
    changed[59, 7, 7] ^= 1
    images.flags.writeable = False
    first = fid.reference_statistics(extractor, data.Dataset("mine", images), ONE_RANK)
    extractor.function = None  # a second computation fails
    again = fid.reference_statistics(extractor, data.Dataset("mine", images), ONE_RANK)
    assert all(np.array_equal(value, vars(again)[key]) for key, value in vars(first).items())
    assert again.n == 60 and again.features == extractor.tag and not recwarn.list
    assert np.array_equal(again.rows, features) and len(again.mu) == features.shape[1]
    for other in (changed, images.reshape(15, 16, 16, 1)):
        with pytest.raises(TypeError):
            fid.reference_statistics(extractor, data.Dataset("mine", other), ONE_RANK)
    (path,) = (files.cache_dir() / "stats").iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="delete it"):
        fid.reference_statistics(extractor, data.Dataset("mine", images), ONE_RANK)


def measure_two_sets(rt):
    """Statistics and Inception Scores of 101 images and of three, in float64."""
    features = torch.linspace(0, 1000, 101 * 48).double().sin().view(101, 48)
    logits = 5 * torch.linspace(0, 9000, 101 * 1008).double().sin().view(101, 1008)
    return [pass_over(rt, features[:n], logits[:n], 16) for n in (101, 3)]


def test_two_ranks_measure_what_one_does(tmp_path, monkeypatch):
    """Sums, scores and the features that are kept (of 70 images at most) are merged. 101 images do
    not divide evenly; of three the second rank gets none. In float64 rounding hides no image."""
    done = python("""
import pickle, test_fid
rt, test_fid.fid.PAIRS_LIMIT = test_fid.training.Runtime("cpu"), 70
pickle.dump(test_fid.measure_two_sets(rt), open(f"{sys.argv[1]}/{rt.rank}.pkl", "wb"))
test_fid.training.run(lambda: None)""", tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(fid, "PAIRS_LIMIT", 70)
    found = measure_two_sets(ONE_RANK), pickle.loads((tmp_path / "0.pkl").read_bytes())
    for n, (one, one_score), (two, two_score) in zip((101, 3), *found):
        assert two.n == one.n == n and np.array_equal(two.rows, one.rows)
        np.testing.assert_allclose(two.mu, one.mu, rtol=1e-12)
        np.testing.assert_allclose(two.sigma, one.sigma, atol=1e-12 * np.abs(one.sigma).max())
        np.testing.assert_allclose(two_score, one_score, rtol=0, atol=1e-11)  # 1008 classes
        assert one.rows.shape == (min(n, 70), 48) and one.rows.any(axis=1).all()
        assert n == 3 or one_score[0] > 1.01  # the logits differ: there is something to merge


@pytest.mark.parametrize("samples, reference, message", [
    (pictures(4, 16), None, r"mine: images .*\[16, 16, 1\], but .* has \[8, 8, 1\]"),
    (pictures(4), dict(mu=np.zeros(2048), sigma=np.eye(2048)), "from one network"),
    (np.zeros((4, 8, 1, 1), "f"), None, "no latents"),
    *[(np.zeros((4, 8, 1, 1), "f"), dict(arr_0=pictures(4, size)), r"generator: .*\[8, 8, 3\]")
      for size in (8, 16)],  # the reference of latents is cropped to the size that they decode to
])
def test_sizes_before_training(samples, reference, message, tmp_path, monkeypatch):
    monkeypatch.setattr(fid.sample, "latent_decoder", lambda *args: len)
    path = reference and str(make(tmp_path / "reference.npz", reference))
    args = Mock(fid_features=NETWORK, inception=None, fid_reference=path, resolution=None)
    with pytest.raises(UserError, match=message):
        fid.training_fid(args, data.Dataset("mine", samples), Mock(rt=ONE_RANK), None, None)


def test_the_best_network_is_the_best_of_measurements_alike(monkeypatch):
    """A run that resumes with other features, another reference or number of samples has another scale."""
    run, written = Mock(rt=ONE_RANK, log=[{"nimg": 32, "fid": 0.001, "features": "others", "images": 50}]), []
    run.write = lambda record, text: run.log.append({"nimg": 0, **record})
    args = Mock(fid_features=NETWORK, inception=None, fid_reference=None, fid_images=2)
    monkeypatch.setattr(fid, "measure", lambda *args: (None, None))
    reference = Mock()
    monkeypatch.setattr(fid, "reference_statistics", lambda *args: reference)
    for reference.name, value, best in (("a/x.npz", 5.0, [5.0]), ("b/x.npz", 6.0, [5.0]), ("b/x.npz", 4.0, [5.0, 4.0])):
        monkeypatch.setattr(fid, "frechet_distance", lambda *args, value=value: value)
        fid.training_fid(args, data.Dataset("mine", pictures(4)), run, None, lambda suffix, fid: written.append(fid))
        assert written == best


@pytest.fixture
def command(capsys):
    """Run `fid.py` with arguments and --json: (its result, standard error)."""
    def run(*arguments, device="cpu"):
        call(fid, *arguments, "--json", "--device", device)
        out, err = capsys.readouterr()
        return json.loads(out), err
    return run


@pytest.fixture
def npz(tmp_path):
    return lambda name, images: make(tmp_path / f"{name}.npz", {"arr_0": images})


def test_command_with_inception(command, npz, weights, tmp_path):
    """FID and IS of a few images, two warnings, and saved statistics, those of the reference."""
    a, b, stats = npz("a", pictures(3)), npz("b", pictures(2, seed=2)), tmp_path / "stats.npz"
    result, err = command(a, b, "--inception", weights, "--save-stats", stats)
    assert list(result) == [
        "fid", "is_mean", "is_std", *PAIRS, "n_samples", "n_reference", "features"]
    assert all(result[key] is None for key in PAIRS)  # which take four images or more
    assert result["fid"] > 0 and result["is_mean"] == pytest.approx(1)  # three splits of one
    assert (result["n_samples"], result["n_reference"]) == (3, 2)
    assert "3 images; published numbers use 50,000" in err
    assert "6726825d" in err and result["features"].startswith("inception sha256:")
    saved = fid.Statistics.load(stats)
    assert (saved.n, saved.name, saved.features) == (2, str(b), result["features"])


@pytest.mark.parametrize("name, tag", [("b.NPZ", "test"), ("b.PKL", fid.INCEPTION_TAG)])
def test_command_with_statistics_on_both_sides(name, tag, command, tmp_path):
    """Needs neither network nor images: |mu_a - mu_b|^2 + d (2 - 1)^2. EDM2 publishes pickles."""
    fid.Statistics(np.array([3.0, 0.0]), 4 * np.eye(2), tag).save(tmp_path / "a.npz")
    moments = dict(mu=np.zeros(2), sigma=np.eye(2))
    pickled = pickle.dumps({"fid": moments, "fd_dinov2": {}})
    make(tmp_path / name, pickled if name == "b.PKL" else moments | {"features": tag})
    result, _ = command(tmp_path / "a.npz", tmp_path / name)
    assert result["fid"] == pytest.approx(9 + 2, abs=1e-6)
    assert result["n_samples"] is result["is_mean"] is None and result["features"] == tag
    assert all(result[key] is None for key in PAIRS)


def test_command_with_pairs(command, capsys, npz, tmp_path, device):
    """KID, precision and recall of images, cached and saved statistics; not of others' ones. With
    statistics beside images (ADM's VIRTUAL_*.npz) FID uses the former, which is said."""
    whole, options, stats = pictures(60, seed=2) // 2, ("--features", NETWORK), tmp_path / "b.npz"
    a, b, some, results = npz("a", pictures(40)), npz("all", whole), npz("some", whole[:8]), []
    for reference in (b, b, stats):
        result, err = command(a, reference, *options, "--save-stats", stats, device=device)
        results.append([result[key] for key in PAIRS])
        assert err == ""
    extractor = fid.network_features(ONE_RANK, NETWORK)
    rows = [extractor(np.load(path)["arr_0"])[0] for path in (b, a)]
    expected = [*fid.kernel_distance(*rows), *fid.precision_recall(*rows)]
    assert results[0] == results[1] == results[2] == pytest.approx(expected, rel=1e-4)
    moments = {key: np.load(stats)[key] for key in ("mu", "sigma", "features")}
    both = make(tmp_path / "both.npz", moments | {"arr_0": whole[:8]})
    (found, err), (pairs, _) = (command(a, side, *options) for side in (both, some))
    assert found["fid"] == pytest.approx(result["fid"], rel=1e-6) and found["n_reference"] is None
    assert [found[key] for key in PAIRS] == [pairs[key] for key in PAIRS]
    assert abs(found["fid"] / pairs["fid"] - 1) > 0.01
    assert "both.npz: FID of its mu and sigma" in err
    bare = make(tmp_path / "bare.npz", moments)
    for pair in ((a, bare), (bare, a)):
        result, _ = command(*pair, *options)
        assert all(result[key] is None for key in PAIRS) and result["fid"] >= 0
    call(fid, *pair, *options, "--device", "cpu")
    assert not re.search("kid|precision|recall|None", capsys.readouterr().out)


def test_a_set_against_itself_and_with_count_and_resolution(command, capsys, npz, tmp_path):
    """Precision and recall are 1, also of another file; each side keeps its own name."""
    a, b, stats = npz("a", pictures(60)), npz("b", pictures(60)), tmp_path / "stats.npz"
    command(b, a, "--features", NETWORK)  # leaves the statistics of both in the cache
    call(fid, a, b, "--features", NETWORK, "--save-stats", stats, "--device", "cpu")
    out, err = capsys.readouterr()
    assert err == "" and out.startswith(f"FD (stage 1) of {a} from {b}\nfid ")
    assert re.search(r"precision +1\nrecall +1\nn_samples +60\n", out) and "is_mean" not in out
    assert fid.Statistics.load(stats).name == str(b)
    result, _ = command(a, a, "--features", NETWORK, "--count", 40)
    assert result["n_samples"] == result["n_reference"] == 40
    assert result["fid"] > 1e-6 and result["is_mean"] is None  # of two choices
    larger, folder = npz("larger", pictures(60, 24)), tmp_path / "folder"
    data.write_images([(data.load(larger, resolution=8).images, None)], folder)
    result, _ = command(larger, folder, "--features", NETWORK, "--resolution", 8)
    assert result["fid"] == pytest.approx(0, abs=1e-9)  # the same images


STATS = dict(mu=np.zeros(8), sigma=np.eye(8), features="test")
BAD = STATS | dict(sigma=np.eye(8) + 2 * np.eye(8)[::-1])
PUBLISHED = dict(mu=np.zeros(2048), sigma=np.eye(2048))  # NVIDIA's files name no features


@pytest.mark.parametrize("samples, reference, message", [
    *[(dict(arr_0=images), None, message) for images, message in (
        (pictures(1), "a.npz: FID needs two images or more"), (pictures(0), "no images"),
        (pictures(4, 8, 3), r"\[8, 8, 3\], but .* has \[8, 8, 1\]"),
        (pictures(4, 16), r"\[16, 16, 1\], but .* has \[8, 8, 1\]"),
        (pictures(4).astype(np.float32), "uint8"))],
    (b"this is not an archive", None, "not a readable .npz"), (None, None, "no such file"),
    (pickle.dumps({"mu": np.zeros(2)}), None, "a reference of EDM2"),
    (PUBLISHED, None, "2048 features of the kind 'inception-2015-12-05'.*from one network"),
    (STATS, STATS | dict(features="other"), "a.npz .*'test', .*b.npz has 8 of the kind 'other'"),
    (STATS, dict(mu=np.zeros(3), sigma=np.eye(3), features="test"), "8 features.* 3 of the kind"),
    (dict(mu=np.zeros(8), sigma=np.eye(8)), STATS, "does not say which features"),
    (dict(mu=np.zeros(4)), STATS, "not a readable .npz of statistics `mu` and `sigma`"),
    *[(a, b, f"{name}.npz: sigma has negative eigenvalues")
      for a, b, name in ((BAD, BAD, "a"), (BAD, STATS, "a"), (STATS, BAD, "b"))],
    *[(STATS | {key: value}, STATS, r"a.npz: .*expected finite float64 \[d\] and a covariance")
      for key, value in (
        ("mu", np.zeros((8, 1))), ("mu", np.full(8, np.inf)), ("mu", np.float64(0)),
        ("sigma", np.eye(7)), ("sigma", np.eye(8).astype("U")), ("sigma", np.tri(8)),
        ("sigma", np.full((8, 8), np.nan)), ("sigma", -np.eye(8)))],
    *[(STATS | {"rows": rows}, STATS, r"a.npz: .*expected finite float32 rows \[m, 8\]")
      for rows in (np.ones((9, 7), "f"), np.ones(8, "f"), np.ones((9, 8)),
                   np.full((1, 8), np.nan, "f"))],
])
def test_bad_input_is_one_line(samples, reference, message, refused, tmp_path):
    path = tmp_path / ("a.pkl" if "EDM2" in message else "a.npz")
    if samples:
        make(path, samples)
    other = make(tmp_path / "b.npz", reference) if reference else "digits"
    error = refused(fid, path, other, "--features", NETWORK, "--device", "cpu")
    assert re.search(message, error), error


def test_a_place_for_the_statistics_that_cannot_be_written_is_named_first(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(fid, "load_extractor", None)  # no features are computed
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "stats.npz"
    assert f"{place}" in refused(fid, "digits", "digits", "--save-stats", place, "--device", "cpu")
