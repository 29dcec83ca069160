"""Network files: ours, and NVIDIA's published pickles, of which nothing is ever executed.

`load_network(path)` returns a `Denoiser` or `RatioNetwork` from any network file of this project, or a `Denoiser` from any
published EDM or EDM2 pickle. `save_network` writes ours.
"""

import dataclasses
import io
import zipfile
from collections import OrderedDict

import torch

from machinery.files import NUMPY_STAND_INS, UserError, load_checkpoint, read_pickle, reading, save_checkpoint, torch_load
from networks import Config, Denoiser, RatioNetwork

NETWORK_KIND = "diffratio network"


def save_network(path, net, dtype=torch.float32, **about):
    """Write a `Denoiser` or `RatioNetwork` and plain values about it (role, t_init, nimg, ...) to `path`, atomically."""
    state = {k: v.detach().to("cpu", dtype) for k, v in net.state_dict().items()}
    save_checkpoint({"kind": NETWORK_KIND, "config": dataclasses.asdict(net.config), "about": about, "state": state}, path)


def load_network(path, role=None):
    """A `Denoiser` in eval mode on the CPU, from a network file of this project or a published EDM or EDM2 pickle.

    Architecture and sizes come from the file. `net.about` holds what the file says of itself: `role` is "denoiser"
    (stage 1), "generator" (stage 2, with `t_init`) or "ratio" (then a `RatioNetwork` comes back). With `role` given,
    any other role is an error. Raises `UserError` for anything that is not such a file; executes nothing in it.
    """
    with reading(path, "a usable network file"):
        return _load_network(path, role)


def _load_network(path, role):
    if zipfile.is_zipfile(path):  # ours
        data = load_checkpoint(path)
        if data["kind"] != NETWORK_KIND:
            raise UserError(f"{path} is a {data['kind']}, not a network; use the network.pt beside it")
        config, about, state = Config(**data["config"]), data["about"], data["state"]
    else:
        config, about, state = _read_published(path)
    if about["role"] not in ("denoiser", "generator", "ratio"):
        raise UserError(f"{path} holds a {about['role']}, which is no network of this project")
    if role and about["role"] != role:
        raise UserError(f"{path} holds a {about['role']}, but a {role} is needed here")
    if config.num_blocks * len(config.channel_mult) > len(state):  # before a network of any size is built
        raise UserError(f"{path}: weights do not fit the network it describes: {len(state)} tensors are too few")
    for key, value in state.items():
        if not value.is_floating_point() or value.layout != torch.strided or value.device.type != "cpu":
            raise UserError(f"{path}: {key} is no plain tensor of floating-point numbers")

    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        net = RatioNetwork(config) if about["role"] == "ratio" else Denoiser(config)
    wanted = {k: v.shape for k, v in net.state_dict().items()}
    found = {k: v.shape for k, v in state.items()}
    if wanted != found:
        key = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))[0]
        shapes = [list(s[key]) if key in s else "nothing" for s in (found, wanted)]
        raise UserError(f"{path}: weights do not fit the network it describes: {key} is {shapes[0]}, expected {shapes[1]}")
    net.load_state_dict({k: v.float().contiguous() for k, v in state.items()}, assign=True)
    net.about = about
    return net.eval()


class _Persistent:
    """Stands in for a persistent object of EDM's pickles: its class name and its attributes, no code."""

    class_name = state = None

    def __init__(self, meta):
        self.class_name, self.state = meta.get("class_name"), meta.get("state")

    def __setstate__(self, state):  # without it, a pickle could set attributes of this class
        pass


class _PlainModule:
    """Stands in for a torch module: its attributes, no code."""

    state = None

    def __setstate__(self, state):
        self.state = state


class _PlainDict(dict):
    """Stands in for dnnlib's EasyDict, a dict with attribute access."""

    def __setstate__(self, state):
        pass


def _nested_storage(data):
    """The bytes of a torch.save'd storage: itself a pickle, read under weights_only."""
    storage = torch_load(io.BytesIO(data))
    if not isinstance(storage, (torch.TypedStorage, torch.UntypedStorage)):  # weights_only also lets classes of torch pass
        raise UserError("refused: a tensor's storage is no storage")
    return storage


class _PlainTensor:
    """Stands in for a tensor. Not a real one, because a pickle can stretch those past their storage."""

    value = None

    def __init__(self, storage, offset, size, stride, *_):
        if not isinstance(storage, (torch.TypedStorage, torch.UntypedStorage)):
            raise UserError("refused: a tensor without a storage")
        dtype = storage.dtype if isinstance(storage, torch.TypedStorage) else torch.uint8
        self.value = torch.empty(0, dtype=dtype).set_(storage).as_strided(size, stride, offset)  # checks the bounds

    def __setstate__(self, state):
        pass


_PUBLISHED_STAND_INS = {
    **NUMPY_STAND_INS,
    "builtins.set": set,  # how protocols before 4 spell a set
    "__builtin__.set": set,
    "collections.OrderedDict": OrderedDict,
    "dnnlib.util.EasyDict": _PlainDict,
    "torch.nn.modules.container.ModuleDict": _PlainModule,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_tensor_v2": _PlainTensor,
    "torch.storage._load_from_bytes": _nested_storage,
    "torch_utils.persistence._reconstruct_persistent_obj": _Persistent,
}

_UNKNOWN = "not implemented; use a network that was published with EDM or EDM2"
_PRECONDITIONING = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "Precond": "edm"}
_EDM_SHAPE_DEFAULTS = {
    "SongUNet": dict(model_channels=128, channel_mult=(1, 2, 2, 2), num_blocks=4, attn_resolutions=(16,), dropout=0.10),
    "DhariwalUNet": dict(
        model_channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3, attn_resolutions=(32, 16, 8), dropout=0.10
    ),
    "EDM2": dict(model_channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3, attn_resolutions=(16, 8), dropout=0.0),
}
# Arguments that do not change what the network computes once it is trained.
_IGNORED = {"use_fp16", "sigma_min", "sigma_max", "augment_dim", "label_dropout"}
# Arguments that would change it, with the only value that the published checkpoints use and this file implements.
_FIXED = {
    "decoder_type": "standard", "channel_mult_emb": 4, "beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5,
    "logvar_channels": 128, "label_balance": 0.5, "concat_balance": 0.5, "res_balance": 0.3, "attn_balance": 0.3,
    "clip_act": 256, "channels_per_head": 64,
}  # fmt: skip


def _read_published(path):
    """(config, about, state dict) of an EDM or EDM2 pickle."""
    with open(path, "rb") as file:
        data = read_pickle(file, _PUBLISHED_STAND_INS, path)
    net = data.get("ema") if isinstance(data, dict) else None
    if not isinstance(net, _Persistent) or not isinstance(net.state, dict):
        raise UserError("no network under the key 'ema', as a published EDM or EDM2 checkpoint has; give another file")
    if net.class_name not in _PRECONDITIONING:
        raise UserError(f"a network of class {net.class_name} is {_UNKNOWN}")
    state = {k: v for k, v in _flatten(net) if "map_augment" not in k}  # augmentation labels are zero outside EDM's training
    return _published_config(net), {"role": "denoiser", "source": "published"}, state


def _published_config(net):
    names = ("img_resolution", "img_channels", "label_dim")  # arguments that may come by position
    args = net.state.get("_init_args", ())
    if len(args) > len(names):
        raise UserError(f"more than {len(names)} arguments by position are {_UNKNOWN}")
    kwargs = {**dict(zip(names, args)), **net.state["_init_kwargs"]}
    edm2 = net.class_name == "Precond"
    model_type = "EDM2" if edm2 else kwargs.pop("model_type", "DhariwalUNet" if net.class_name == "EDMPrecond" else "SongUNet")
    if model_type not in _EDM_SHAPE_DEFAULTS:
        raise UserError(f"network type {model_type!r} is {_UNKNOWN}")

    architecture = {"EDM2": "edm2", "DhariwalUNet": "adm", "SongUNet": "ddpmpp"}[model_type]
    if model_type == "SongUNet":
        kind = (
            kwargs.pop("embedding_type", "positional"), kwargs.pop("encoder_type", "standard"),
            kwargs.pop("channel_mult_noise", 1), list(kwargs.pop("resample_filter", [1, 1])),
        )  # fmt: skip
        known = {"ddpmpp": ("positional", "standard", 1, [1, 1]), "ncsnpp": ("fourier", "residual", 2, [1, 3, 3, 1])}
        architecture = next((name for name, value in known.items() if value == kind), None)
        if architecture is None:
            raise UserError(f"a SongUNet with {kind} is neither DDPM++ nor NCSN++: {_UNKNOWN}")

    fields = {f.name for f in dataclasses.fields(Config)} - {"architecture", "preconditioning"}
    values = {k: kwargs.pop(k) for k in list(kwargs) if k in fields}
    for key, value in kwargs.items():
        allowed = _FIXED.get(key, [1, 1] if key == "resample_filter" else None)
        if key not in _IGNORED and value is not None and value != allowed:
            raise UserError(f"argument {key}={value!r} is {_UNKNOWN}")
    values.setdefault("label_dim", 0)
    return Config(
        **{**_EDM_SHAPE_DEFAULTS[model_type], **values},
        architecture=architecture, preconditioning=_PRECONDITIONING[net.class_name],
    )  # fmt: skip


def _flatten(module, prefix="", seen=None):
    """(name, tensor) for all parameters and buffers of a stand-in module and those inside it."""
    state = module.state if isinstance(module, (_Persistent, _PlainModule)) else None
    if not isinstance(state, dict):
        return
    seen = set() if seen is None else seen
    if id(state) in seen:
        raise UserError(f"module {prefix} appears twice")
    seen.add(id(state))
    for group in ("_parameters", "_buffers"):
        for name, value in (state.get(group) or {}).items():
            if isinstance(value, _PlainTensor):
                yield prefix + name, value.value
    for name, child in (state.get("_modules") or {}).items():
        yield from _flatten(child, f"{prefix}{name}.", seen)
