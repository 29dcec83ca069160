"""Network files: this project's, and published pickles of EDM and EDM2, of which nothing is run."""

import dataclasses
import re

import torch

from machinery.files import Stub, UserError, load_checkpoint, read_pickle, reading, save_checkpoint
from networks import NETWORKS, Config, Denoiser, RatioNetwork

NETWORK_KIND = "diffratio network"


def save_network(path, net, dtype=torch.float32, **about):
    """Write a `Denoiser` or `RatioNetwork`, `net.about` and `about` (nimg, ...)."""
    state = {k: v.detach().to("cpu", dtype) for k, v in net.state_dict().items()}
    config, about = dataclasses.asdict(net.config), net.about | about
    save_checkpoint({"kind": NETWORK_KIND, "config": config, "about": about, "state": state}, path)


def load_network(path, role=None):
    """A `Denoiser` in eval mode on the CPU, from a file of this project or an EDM or EDM2 pickle.

    `net.about` holds what the file says of itself: `role` is "denoiser" (stage 1), "generator"
    (stage 2, with `t_init`) or "ratio" (then a `RatioNetwork` comes back). Raises `UserError` for
    any other file, or if `role` is given and differs; executes nothing in it.
    """
    with reading(path, "a usable network file"):
        with open(path, "rb") as file:
            start = file.read(1000)
        if start[:1] == b"\x80":
            config, about, state = _published(read_pickle(path))
        elif re.search(b"torch_utils|dnnlib", start):
            raise UserError("a training state of EDM; give the network-snapshot-*.pkl beside it")
        else:
            data = load_checkpoint(path)
            if data["kind"] != NETWORK_KIND:
                raise UserError(f"a {data['kind']}, not a network; give the network.pt beside it")
            config, about, state = Config(**data["config"]), data["about"], data["state"]
        if about["role"] not in ([role] if role else ["denoiser", "generator", "ratio"]):
            raise UserError(f"holds a {about['role']}, but a {role or 'network'} is needed here; "
                            "give another file")
        # Names of EDM's checkpoints that differ here. Their filters are constants.
        state = {re.sub(r"^model\.", "unet.", re.sub(r"dec\.\d+x\d+_aux_", "out_", k)): v
                 for k, v in state.items() if not k.endswith("resample_filter")}
        if config.num_blocks * len(config.channel_mult) > len(state):  # no huge network is built
            raise UserError(f"only {len(state)} tensors, too few for the network; get it again")
        with torch.device("meta"):  # no memory and no random numbers for weights to be replaced
            net = RatioNetwork(config) if about["role"] == "ratio" else Denoiser(config)
        wanted = {k: list(v.shape) for k, v in net.state_dict().items()}
        found = {k: list(v.shape) for k, v in state.items() if v.is_floating_point()
                 and v.layout == torch.strided and v.device.type == "cpu"
                 and v.numel() * v.element_size() <= v.untyped_storage().nbytes()}  # not expanded
        if wanted != found:
            key = min(k for k in wanted | found if wanted.get(k) != found.get(k))
            raise UserError(f"weights do not fit the network: {key} is {found.get(key, 'missing')}"
                            f", expected {wanted.get(key, 'nothing')}; get it again")
        net.load_state_dict({k: v.float().contiguous() for k, v in state.items()}, assign=True)
        net.about = about
        return net.eval()


_PRECONDITIONING = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "Precond": "edm"}
_UNETS = {  # with the default arguments of EDM and EDM2
    "SongUNet": dataclasses.replace(NETWORKS["cifar10"], channel_mult=(1, 2, 2, 2), dropout=0.1),
    "DhariwalUNet": NETWORKS["imagenet64"], "EDM2": NETWORKS["edm2-s"],
}
# Arguments that do not change what a trained network computes.
_IGNORED = {"use_fp16", "sigma_min", "sigma_max", "augment_dim", "label_dropout"}
# Arguments that do, with the only value that is implemented; below those of NCSN++.
_FIXED = {
    "embedding_type": "positional", "encoder_type": "standard", "decoder_type": "standard",
    "channel_mult_noise": 1, "resample_filter": [1, 1], "channel_mult_emb": 4, "beta_d": 19.9,
    "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5, "logvar_channels": 128, "label_balance": 0.5,
    "concat_balance": 0.5, "res_balance": 0.3, "attn_balance": 0.3, "clip_act": 256,
    "channels_per_head": 64,
}
_NCSNPP = {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2,
           "resample_filter": [1, 3, 3, 1]}


def _published(data):
    """(config, about, state dict) of an EDM or EDM2 pickle."""
    net = data.get("ema") if isinstance(data, dict) else None
    if not isinstance(net, Stub):
        holds = ", ".join(map(str, data)) if isinstance(data, dict) else type(data).__name__
        raise UserError(f"a pickle of {holds}, without a network named ema; "
                        "give a network-snapshot-*.pkl of EDM or EDM2")
    state, modules = {}, [("", net)]
    for prefix, module in modules:  # grows as it goes
        attributes = module.args[0]["state"] if module.args else module.state
        tensors = attributes["_parameters"] | attributes["_buffers"]
        state |= {prefix + name: v for name, v in tensors.items() if v is not None}
        for name, child in attributes.pop("_modules").items():  # a second visit fails: no cycles
            if name != "map_augment":  # its input is zero outside EDM's training
                modules.append((f"{prefix}{name}.", child))

    name, attributes = net.args[0]["class_name"], net.args[0]["state"]
    kwargs = {"label_dim": 0, **attributes["_init_kwargs"]}
    default = {"EDMPrecond": "DhariwalUNet", "Precond": "EDM2"}.get(name, "SongUNet")
    unet = kwargs.pop("model_type", default)
    if name not in _PRECONDITIONING or unet not in _UNETS or attributes.get("_init_args"):
        raise UserError(f"a {name} {unet} is not implemented; give a published EDM or EDM2 network")
    config, fixed = _UNETS[unet], _FIXED
    if unet == "SongUNet" and kwargs.get("embedding_type") == "fourier":
        config, fixed = dataclasses.replace(config, architecture="ncsnpp"), _FIXED | _NCSNPP
    sizes = {k: tuple(v) if isinstance(v, list) else v
             for k, v in kwargs.items() if k in vars(config)}
    for key in kwargs.keys() - sizes.keys() - _IGNORED:
        if kwargs[key] not in (None, fixed.get(key)):
            raise UserError(f"{key}={kwargs[key]!r} is not implemented; "
                            "give a published EDM or EDM2 network")
    config = dataclasses.replace(config, **sizes, preconditioning=_PRECONDITIONING[name])
    return config, {"role": "denoiser", "source": "published"}, state
