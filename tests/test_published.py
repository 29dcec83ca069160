"""Pickles of the structure that EDM and EDM2 publish load, and nothing in them is executed."""

import collections
import contextlib
import copy
import dataclasses
import functools
import io
import pickle
import resource
import sys
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from conftest import call
from test_networks import randomise, small

import sample
import train_diffratio
from machinery import files
from machinery.checkpoints import load_network, save_network
from machinery.files import UserError, read_pickle
from networks import Denoiser, EDMBlock


class EasyDict(dict):
    __module__ = "dnnlib.util"


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the published loader ran; it would have executed module_src")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
THEIRS = {"dnnlib": Mock(), "dnnlib.util": Mock(EasyDict=EasyDict),
          "torch_utils": Mock(), "torch_utils.persistence": Mock(
              _reconstruct_persistent_obj=_reconstruct_persistent_obj)}


class Attack:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def Persistent(class_name, **state):
    """Pickles as EDM's persistent objects: a call with a dict of source text, class and state."""
    return Attack(_reconstruct_persistent_obj, EasyDict(
        type="class", version=6, module_src="raise SystemExit('executed')", class_name=class_name,
        state=state))


def _convert(net, class_name="Any", **init):
    """A torch module as its persistent counterpart. ModuleDicts stay, with converted children."""
    children = {name: _convert(child) for name, child in net.named_children()}
    if isinstance(net, torch.nn.ModuleDict):
        made = torch.nn.ModuleDict()
        made.__dict__["_modules"] = children
        return made
    return Persistent(class_name, training=False, _modules=children, _init_args=(),
                      _parameters=collections.OrderedDict(net._parameters),
                      _buffers=dict(net._buffers, unused=None),
                      _init_kwargs=init, skip_scale=np.sqrt(0.5))


SONG = dict(model_type="SongUNet", decoder_type="standard", dropout=0.13, use_fp16=True)
KWARGS = {
    "ddpmpp": SONG | dict(embedding_type="positional", encoder_type="standard",
                          channel_mult_noise=1, resample_filter=[1, 1]),
    "ncsnpp": SONG | dict(embedding_type="fourier", encoder_type="residual",
                          channel_mult_noise=2, resample_filter=[1, 3, 3, 1]),
    "adm": dict(model_type="DhariwalUNet", dropout=0.10),
    "edm2": dict(logvar_channels=128, sigma_data=0.5),
}


def with_names_of_edm(net):
    """`net` with the names and the constant filters that EDM's checkpoints have."""
    net.model = net.unet
    del net.unet
    if net.config.architecture != "adm":
        size = net.config.img_resolution
        net.model.dec[f"{size}x{size}_aux_norm"] = net.model.out_norm
        net.model.dec[f"{size}x{size}_aux_conv"] = net.model.out_conv
        del net.model.out_norm, net.model.out_conv
    for module in net.modules():
        if isinstance(module, EDMBlock) and module.resample.keywords["mode"] != "keep":
            module.conv0.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))
    return net


def write_published(path, net, protocol=4, **changes):
    """Write the pickle of `net`, with `changes` of its arguments, to `path`, which it returns."""
    c = net.config
    kwargs = dict(KWARGS[c.architecture], img_resolution=c.img_resolution, img_channels=3,
                  label_dim=c.label_dim, model_channels=c.model_channels, num_blocks=c.num_blocks,
                  channel_mult=list(c.channel_mult), attn_resolutions=list(c.attn_resolutions))
    prefix = "" if c.architecture == "edm2" else c.preconditioning.upper()
    net = copy.deepcopy(net) if c.architecture == "edm2" else with_names_of_edm(copy.deepcopy(net))
    data = dict(ema=_convert(net, f"{prefix}Precond", **kwargs | changes), augment_pipe=None,
                loss_fn=Persistent("EDMLoss", P_mean=-1.2), dataset_kwargs=EasyDict(path="x.zip"))
    with patch.dict(sys.modules, THEIRS):
        path.write_bytes(pickle.dumps(data, protocol))
    return path


@pytest.mark.parametrize("label_dim", [0, 10])
@pytest.mark.parametrize("architecture, kind, protocol, dtype", [
    ("ddpmpp", "edm", 2, "float"), ("ncsnpp", "edm", 3, "half"), ("adm", "edm", 4, "float"),
    ("edm2", "edm", 4, "half"), ("ddpmpp", "vp", 4, "half"), ("ncsnpp", "ve", 5, "float"),
])
def test_published_networks_load_by_name(tmp_path, architecture, kind, protocol, dtype, label_dim):
    """And our own files of them: outputs equal at four noise levels, with classes."""
    config = small(architecture, label_dim=label_dim, preconditioning=kind)
    net = getattr(randomise(Denoiser(config)), dtype)().eval()  # EDM2 publishes float16
    path, augment = tmp_path / "network-snapshot.pkl", {}
    if architecture == "ddpmpp":  # its augmentation gets zeros outside EDM's training, so it goes
        net.unet.map_augment, augment = torch.nn.Linear(9, 32, bias=False), {"augment_dim": 9}
    loaded = load_network(write_published(path, net, protocol, **augment), role="denoiser")
    save_network(tmp_path / "network.pt", loaded, role="generator", t_init=2.5)
    back = load_network(tmp_path / "network.pt", role="generator")
    assert back.config == loaded.config
    assert back.about == loaded.about | {"role": "generator", "t_init": 2.5}
    x, sigma = torch.randn(4, 3, 16, 16), torch.tensor([0.002, 0.5, 2.5, 80.0])
    labels = torch.arange(4) if label_dim else None
    for found in (loaded, back):
        assert {p.dtype for p in found.parameters()} == {torch.float32} and not found.training
        with torch.no_grad():
            assert torch.equal(found(x, sigma, labels), net.float()(x, sigma, labels))


def test_scripts_start_from_a_published_checkpoint(tmp_path):
    """`sample.py --network X.pkl` samples with Heun's method; `--init X.pkl` starts stage 2."""
    net = randomise(Denoiser(small("ddpmpp")))
    path, grid = write_published(tmp_path / "network-snapshot.pkl", net), tmp_path / "grid.png"
    np.savez(tmp_path / "data.npz", images=np.eye(16, dtype=np.uint8)[None, ..., None].repeat(3, 3))
    call(sample, "--network", path, "--n", 2, "--steps", 3, "--out", grid, "--device", "cpu")
    call(train_diffratio, "--init", path, "--data", tmp_path / "data.npz", "--batch", 2, "--kimg",
         0.004, "--outdir", tmp_path / "run", "--device", "cpu")
    generator = load_network(tmp_path / "run" / "network.pt", role="generator")
    assert grid.exists() and generator.config == dataclasses.replace(net.config, dropout=0.0)


def test_other_files_are_named_for_what_they_are(tmp_path):
    """Each line says what the file holds or what is not implemented, and what to give instead."""
    network, path = Denoiser(small("ddpmpp")), tmp_path / "file"
    save_network(path, network, role="denoiser")
    whole = path.read_bytes()
    state = files.load_checkpoint(path)
    state["state"] = {k: torch.zeros(1).expand(v.shape) for k, v in state["state"].items()}
    files.save_checkpoint(state, tmp_path / "expanded.pt")  # tensors larger than what is stored

    def saved(value):
        with patch.dict(sys.modules, THEIRS):
            torch.save(value, path)
        return path.read_bytes()

    def changed(**changes):
        return write_published(path, network, **changes).read_bytes()

    for content, expected in (
        ((tmp_path / "expanded.pt").read_bytes(), "do not fit"),
        (changed(decoder_type="skip"), "decoder_type='skip' is not implemented"),
        (changed(encoder_type="residual"), "encoder_type='residual' is not implemented"),
        (changed(channel_mult=[1, 2, 2]), "do not fit"), (changed(img_resolution=15), "15"),
        (changed(model_type="Transformer"), "Transformer is not implemented"),
        (changed(colour="red"), "colour='red' is not implemented"),
        (b"", "damaged"), (b"\x80\x04", "damaged"), (pickle.dumps([1]), "a pickle of list, with"),
        (pickle.dumps({"fid": 1, "fd": 2}), "of fid, fd, without.*; give a network-snapshot-.*pkl"),
        (saved({"net": _convert(network)}), "a training state of EDM; give the network-snapshot"),
        (saved({"state": EasyDict(cur_nimg=0)}), "a training state of EDM; give the network-snap"),
        (whole[:5000] + b"?" + whole[5001:], "damaged .*; restore a copy, or delete it and train"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^{path}: .*{expected}"):
            load_network(path)


def tensor(content, offset=0, size=1):
    """What a pickle holds for a tensor whose storage is `content`."""
    torch.save(content, buffer := io.BytesIO(), _use_new_zipfile_serialization=False)
    storage = Attack(torch.storage._load_from_bytes, buffer.getvalue())
    return Attack(torch._utils._rebuild_tensor_v2, storage, offset, (size,), (1,), False, {})


@pytest.mark.parametrize("kind", ["call", "network", "storage", "state", "checkpoint"])
def test_hostile_files_do_nothing(tmp_path, monkeypatch, kind):
    ran, path = tmp_path / "ran", tmp_path / "hostile.pkl"
    call = Attack(exec, f"open({str(ran)!r}, 'w').close()")
    content = {"call": call, "network": {"ema": call}, "storage": {"ema": tensor(call)},
               "state": {"ema": Persistent("EDMPrecond", _init_kwargs=call)},
               "checkpoint": {"kind": call}}[kind]
    unsafe = functools.partial(torch.load, weights_only=False)
    save, load = (torch.save, unsafe) if kind == "checkpoint" else (pickle.dump, pickle.load)
    with patch.dict(sys.modules, THEIRS), open(path, "wb") as file:
        save(content, file)
    with pytest.raises(UserError, match="^[^\n]*hostile.pkl: [^\n]*$"):
        load_network(path)
    assert not ran.exists()
    monkeypatch.setattr(torch.storage, "_load_from_bytes", lambda b: unsafe(io.BytesIO(b)))
    with patch.dict(sys.modules, THEIRS), open(path, "rb") as file, contextlib.suppress(Exception):
        load(file)  # fails after the attack
    assert ran.exists(), "the attack does not work without protection either"


def read(tmp_path, content):
    (tmp_path / "file.pkl").write_bytes(content)
    return read_pickle(tmp_path / "file.pkl")


def test_a_pickle_cannot_change_what_its_names_stand_for(tmp_path):
    """BUILD (`b`) would set attributes of classes and functions in plain pickle."""
    state = pickle.dumps((None, {"args": 1, "__defaults__": (2,)}), protocol=2)[2:-1]
    for name in (b"cos\nsystem\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"cbuiltins\nset\n"):
        read(tmp_path, name + state + b"b.")
    assert files.Stub.args == () and files._tensor.__defaults__ is None


def test_tensors_stay_within_their_storage_arrays_hold_numbers_and_memory_stays_free(tmp_path):
    storage = torch.arange(6.0).untyped_storage()
    storage = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    assert read(tmp_path, pickle.dumps(tensor(storage, 2, 4))).tolist() == [2, 3, 4, 5]
    array = np.random.default_rng(0).normal(size=(3, 5)).T  # as in the reference files of EDM2
    found = read(tmp_path, pickle.dumps({"fid": {"mu": array}}))["fid"]["mu"]
    assert type(found) is np.ndarray and found.dtype == float and np.array_equal(found, array)
    for content in (tensor(storage, 2, 5), tensor(storage, -1, 2), tensor(storage, 0, 2**60),
                    tensor("text"), np.array([{}, None])):
        with pytest.raises(UserError, match="file.pkl: "):
            read(tmp_path, pickle.dumps(content))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for content in (b"\x80\x02K\x01r" + (2**26).to_bytes(4, "little"),  # "remember as number 2^26"
                    b"\x80\x05\x96" + (2**30).to_bytes(8, "little")):  # "2^30 bytes follow"
        (tmp_path / "file.pkl").write_bytes(content + b".")
        with pytest.raises(UserError, match="file.pkl: "):
            load_network(tmp_path / "file.pkl")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # kB
