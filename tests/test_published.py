"""Published EDM and EDM2 checkpoints are pickles. They load without executing anything; hostile ones are refused.

The pickles here have the published structure, written through stand-in modules of the right names.
"""

import collections
import dataclasses
import functools
import io
import os
import pickle
import resource
import sys
import types
import unittest.mock

import numpy as np
import pytest
import torch
from test_networks import randomise, small

from machinery import checkpoints
import sample
import train_diffratio
from machinery.checkpoints import load_network
from machinery.files import UserError
from networks import Denoiser

# ---------------------------------------------------------------------------------------------------------
# Writing what EDM's training writes.


def module(name, **members):
    made = types.ModuleType(name)
    for key, value in members.items():
        setattr(made, key, value)
        if isinstance(value, (type, types.FunctionType)):
            value.__module__, value.__qualname__ = name, key
    return made


class EasyDict(dict):
    pass


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the published loader ran; it would have executed module_src")


class Persistent:
    """Pickles as EDM's persistent objects do: one call with a dict of source text, class name and attributes."""

    def __init__(self, class_name, **state):
        self.class_name, self.state = class_name, state

    def __reduce__(self):
        meta = EasyDict(type="class", version=6, module_src="raise SystemExit('executed')",
                        class_name=self.class_name, state=self.state)  # fmt: skip
        return _reconstruct_persistent_obj, (meta,)


def _convert(net, class_name="Any", **init):
    """A torch module as its persistent counterpart. ModuleDicts stay what they are, with converted children."""
    children = collections.OrderedDict((k, _convert(v)) for k, v in net.named_children())
    if isinstance(net, torch.nn.ModuleDict):
        made = torch.nn.ModuleDict()
        made.__dict__["_modules"] = children
        return made
    state = dict(training=False, _parameters=collections.OrderedDict(net._parameters),
                 _buffers=collections.OrderedDict(net._buffers), _modules=children, _init_args=(), _init_kwargs=init)  # fmt: skip
    return Persistent(class_name, **state)


# The modules that such a pickle names, for as long as one is written.
THEIRS = {made.__name__: made for made in (
    module("dnnlib"), module("dnnlib.util", EasyDict=EasyDict), module("torch_utils"),
    module("torch_utils.persistence", _reconstruct_persistent_obj=_reconstruct_persistent_obj),
)}  # fmt: skip


def write_published(path, net, class_name, kwargs, protocol=4, **others):
    """Write the pickle of `net` with the top-level keyword arguments `kwargs` and other entries. Returns `path`."""
    data = dict(ema=_convert(net, class_name, **kwargs), loss_fn=Persistent("EDMLoss", P_mean=-1.2), augment_pipe=None,
                dataset_kwargs=EasyDict(path="x.zip"), **others)  # fmt: skip
    with unittest.mock.patch.dict(sys.modules, THEIRS):
        path.write_bytes(pickle.dumps(data, protocol=protocol))
    return path


@pytest.fixture
def published(monkeypatch, tmp_path):
    for name, made in THEIRS.items():  # one of the tests unpickles with them
        monkeypatch.setitem(sys.modules, name, made)
    return functools.partial(write_published, tmp_path / "network-snapshot.pkl")


KWARGS = {
    "ddpmpp": dict(model_type="SongUNet", embedding_type="positional", encoder_type="standard", decoder_type="standard",
                   channel_mult_noise=1, resample_filter=[1, 1], dropout=0.13, use_fp16=True),
    "ncsnpp": dict(model_type="SongUNet", embedding_type="fourier", encoder_type="residual", decoder_type="standard",
                   channel_mult_noise=2, resample_filter=[1, 3, 3, 1], dropout=0.13),
    "adm": dict(model_type="DhariwalUNet", dropout=0.10),
    "edm2": dict(logvar_channels=128, sigma_data=0.5),
}  # fmt: skip
CASES = [("ddpmpp", "EDMPrecond"), ("ncsnpp", "EDMPrecond"), ("adm", "EDMPrecond"), ("edm2", "Precond"),
         ("ddpmpp", "VPPrecond"), ("ncsnpp", "VEPrecond")]  # fmt: skip


@pytest.mark.parametrize("label_dim", [0, 10])
@pytest.mark.parametrize("architecture, class_name", CASES)
def test_every_published_architecture_loads_by_name(published, architecture, class_name, label_dim):
    """Outputs equal those of the network that was written: at four noise levels, with and without classes."""
    kind = {"VPPrecond": "vp", "VEPrecond": "ve"}.get(class_name, "edm")
    net = randomise(Denoiser(small(architecture, label_dim=label_dim, preconditioning=kind))).eval()
    config = net.config
    kwargs = dict(
        KWARGS[architecture], img_resolution=config.img_resolution, img_channels=3, label_dim=label_dim,
        model_channels=config.model_channels, channel_mult=list(config.channel_mult), num_blocks=config.num_blocks,
        attn_resolutions=list(config.attn_resolutions),
    )  # fmt: skip
    loaded = load_network(published(net, class_name, kwargs), role="denoiser")
    x, sigma = torch.randn(4, 3, 16, 16), torch.tensor([0.002, 0.5, 2.5, 80.0])
    labels = torch.arange(4) if label_dim else None
    with torch.no_grad():
        assert torch.equal(loaded(x, sigma, labels), net(x, sigma, labels))
    assert not loaded.training


def test_augmentation_layer_is_left_out(published):
    """`map_augment` gets zeros outside EDM's own training, so it can be dropped."""
    net = randomise(Denoiser(small("ddpmpp"))).eval()
    net.model.map_augment = torch.nn.Linear(9, 32, bias=False)
    kwargs = dict(KWARGS["ddpmpp"], img_resolution=16, img_channels=3, model_channels=32, channel_mult=[1, 2], num_blocks=1,
                  attn_resolutions=[8], augment_dim=9)  # fmt: skip
    loaded = load_network(published(net, "EDMPrecond", kwargs))
    assert not any("map_augment" in key for key in loaded.state_dict())


def test_half_precision_weights_become_float32(published):
    """EDM2 publishes float16."""
    net = randomise(Denoiser(small("edm2"))).half()
    kwargs = dict(KWARGS["edm2"], img_resolution=16, img_channels=3, model_channels=64, channel_mult=[1, 2], num_blocks=1,
                  attn_resolutions=[8])  # fmt: skip
    loaded = load_network(published(net, "Precond", kwargs))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.state_dict()["unet.out_conv.weight"], net.unet.out_conv.weight.float())


def test_scripts_start_from_a_published_checkpoint(published, monkeypatch, tmp_path):
    """`sample.py --network X.pkl` samples with Heun's method; `train_diffratio.py --init X.pkl` trains a generator from it."""
    net = randomise(Denoiser(small("ddpmpp")))
    kwargs = dict(KWARGS["ddpmpp"], img_resolution=16, img_channels=3, model_channels=32, channel_mult=[1, 2], num_blocks=1,
                  attn_resolutions=[8])  # fmt: skip
    path = published(net, "EDMPrecond", kwargs)
    np.savez(tmp_path / "data.npz", images=np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8))
    for script, args in (
        (sample, ["--network", path, "--n", 2, "--steps", 3, "--out", tmp_path / "grid.png"]),
        (train_diffratio, ["--init", path, "--data", tmp_path / "data.npz", "--batch", 2, "--kimg", 0.004, "--outdir", tmp_path / "run"]),
    ):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, args), "--device", "cpu"])
        script.main()
    assert (tmp_path / "grid.png").exists()
    generator = load_network(tmp_path / "run" / "network.pt", role="generator")
    assert generator.config == dataclasses.replace(net.config, dropout=0.0)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_any_pickle_protocol(published, protocol):
    net = randomise(Denoiser(small("ddpmpp"))).eval()
    kwargs = dict(KWARGS["ddpmpp"], img_resolution=16, img_channels=3, model_channels=32, channel_mult=[1, 2], num_blocks=1,
                  attn_resolutions=[8])  # fmt: skip
    load_network(published(net, "EDMPrecond", kwargs, protocol=protocol))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(decoder_type="skip"), "decoder_type"),
        (dict(encoder_type="residual"), "neither DDPM"),
        (dict(channel_mult=[1, 2, 2]), "do not fit"),
        (dict(model_type="Transformer"), "Transformer"),
        (dict(colour="red"), "colour"),
    ],
)
def test_what_is_not_implemented_is_named(published, changes, message):
    net = Denoiser(small("ddpmpp"))
    kwargs = dict(KWARGS["ddpmpp"], img_resolution=16, img_channels=3, model_channels=32, channel_mult=[1, 2], num_blocks=1,
                  attn_resolutions=[8])  # fmt: skip
    with pytest.raises(UserError, match=message):
        load_network(published(net, "EDMPrecond", {**kwargs, **changes}))


# ---------------------------------------------------------------------------------------------------------
# Hostile files. Each would create the file `ran`; a control shows that it does under plain pickle.


class Attack:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class FakeStorage:
    """A tensor's storage whose bytes are a pickle that runs code when it is read."""

    def __init__(self, path):
        buffer = io.BytesIO()
        torch.save(Attack(os.system, f"touch {path}"), buffer, _use_new_zipfile_serialization=False)
        self.data = buffer.getvalue()

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.data,)


@pytest.mark.parametrize("kind", ["reduce", "builtin", "nested in a storage", "inside the state"])
def test_hostile_pickles_fail_before_they_do_anything(tmp_path, monkeypatch, kind, published):
    ran, path = tmp_path / "ran", tmp_path / "hostile.pkl"
    attacks = {
        "reduce": Attack(os.system, f"touch {ran}"),
        "builtin": Attack(eval, f"open({str(ran)!r}, 'w').close()"),
        "nested in a storage": FakeStorage(ran),
        "inside the state": {"ema": Persistent("EDMPrecond", _init_kwargs=Attack(exec, f"open({str(ran)!r}, 'w').close()"))},
    }
    path.write_bytes(pickle.dumps(attacks[kind]))
    with pytest.raises(UserError, match="refused.*(system|eval|exec|plain data)"):
        load_network(path)
    assert not ran.exists()

    monkeypatch.setattr(torch.storage, "_load_from_bytes", lambda b: torch.load(io.BytesIO(b), weights_only=False))
    try:
        pickle.loads(path.read_bytes())
    except AssertionError:
        pass  # the last attack runs before the published loader is reached
    assert ran.exists(), "the attack does not work under plain pickle either, so the test shows nothing"


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"not a pickle", pickle.dumps([1, 2]), pickle.dumps({"ema": 3})])
def test_files_that_are_no_network_are_named(tmp_path, content):
    path = tmp_path / "file.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="file.pkl"):
        load_network(path)


@pytest.mark.parametrize("content", [
    b"\x80\x02K\x01r" + (2**26).to_bytes(4, "little") + b".",  # "remember this as number 2^26"
    b"\x80\x05\x96" + (2**30).to_bytes(8, "little") + b".",  # "a bytearray of 2^30 bytes follows"
])  # fmt: skip
def test_a_few_damaged_bytes_do_not_fill_the_memory(tmp_path, content):
    (tmp_path / "file.pkl").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="file.pkl"):
        load_network(tmp_path / "file.pkl")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # kB


def test_dotted_names_reach_nothing(tmp_path):
    """Protocol 4 can name attributes of allowed objects; only whole names on the list are accepted."""
    path = tmp_path / "file.pkl"
    path.write_bytes(b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.")
    with pytest.raises(UserError, match="OrderedDict.__init__"):
        load_network(path)


def test_a_nested_storage_holds_data_only():
    buffer = io.BytesIO()
    torch.save(torch.arange(3.0).untyped_storage(), buffer)
    assert checkpoints._nested_storage(buffer.getvalue()).nbytes() == 12
    with pytest.raises(UserError, match="refused"):
        checkpoints._nested_storage(pickle.dumps(Attack(os.getcwd), protocol=2))
