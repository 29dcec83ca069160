"""What GPUs would pay for, shown without one: fused attention, types, layouts, memory, waiting, compilation, precision.

Most of it runs on tensors without content: on the `meta` device, or fake ones that autograd and autocast treat as real.
"""

import collections
import contextlib
import dataclasses
import functools
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_networks import ARCHITECTURES, small
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from machinery import data
import networks
import pretrain
from machinery import training
import sample
import train_diffratio

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import benchmark
import memory

# ---------------------------------------------------------------------------------------------------------
# Types, layouts, memory.


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("architecture", ["adm", "edm2"])
def test_attention_reaches_the_fused_kernels(architecture, memory_format, monkeypatch):
    """They want each head's channels side by side, with one stride for all of q, k and v; math would keep [HW, HW]."""
    seen, fused = [], F.scaled_dot_product_attention

    def attend(q, k, v):
        seen.append(torch._fused_sdp_choice(q, k, v))
        assert {t.stride(-1) for t in (q, k, v)} == {1} and all(t.stride(i) % 8 == 0 for t in (q, k, v) for i in range(3))
        return fused(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    net = networks.Denoiser(small(architecture)).to(memory_format=memory_format)
    net(torch.randn(2, 3, 16, 16), torch.ones(2))
    assert seen == [1, 1, 1, 1]  # 1: flash attention, 0: math


class Log(TorchDispatchMode):
    """The operations that run: (name, tensors that go in, first tensor that comes out)."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        first = out[0] if isinstance(out, (tuple, list)) else out
        if isinstance(first, torch.Tensor):
            self.rows.append((function.name().split("::")[-1], tensors, first))
        return out


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_bf16_step_computes_in_bf16_and_copies_no_layout(architecture):
    """One step of stage 1 under CUDA's autocast: matrix products, norms, SiLU and resampling run in bf16, and no activation
    changes its layout but around attention: two copies and two operations that read both layouts."""
    n = 5  # activations are known by it: no weight begins with it
    with FakeTensorMode():
        net = networks.Denoiser(small(architecture, label_dim=3))
        for p in net.parameters():
            if p.ndim == 4:
                p.data = p.data.contiguous(memory_format=networks.memory_format(net.config, "cuda"))
        x, sigma, labels = torch.randn(n, 3, 16, 16), torch.ones(n), torch.zeros(n, dtype=torch.int64)
        with Log() as log:
            with torch.autocast("cpu", torch.bfloat16), memory.CudaRules():
                loss = pretrain.denoising_loss(net, x, sigma, x, labels).sum()
            loss.backward()

    in_bf16 = ("convolution", "mm", "group_norm", "silu", "avg_pool2d", "upsample", "scaled_dot_product")
    found = {(name, tensors[0].dtype) for name, tensors, _ in log.rows if any(word in name for word in in_bf16)}
    assert {"convolution", "convolution_backward", "silu", "silu_backward", "mm"} <= {name for name, _ in found}
    assert {dtype for _, dtype in found} == {torch.bfloat16}, found

    def layout(t):
        if t.ndim != 4 or len(t) != n or t.is_contiguous() == t.is_contiguous(memory_format=torch.channels_last):
            return None  # not an activation, or the same in both
        return "NCHW" if t.is_contiguous() else "NHWC"

    def changes_layout(name, tensors, out):
        return name == "clone" and n in out.shape and out.ndim > 3 or len({layout(t) for t in (*tensors, out)} - {None}) == 2

    changes = collections.Counter(row[0] for row in log.rows if changes_layout(*row))
    attentions = sum(getattr(module, "heads", 0) > 0 for module in net.modules())
    assert attentions > 2 and changes.total() <= 4 * attentions, changes


def test_memory_of_imagenet_64_is_within_half_a_gigabyte_an_image():
    """The full network, ratio step and generator step, counted as exercises/memory.py does for any preset."""
    config = dataclasses.replace(networks.NETWORKS["imagenet64"], dropout=0.0)
    fixed, per_image = memory.count(config, batch=2048)
    assert 0.3e9 < per_image <= 0.5e9 and fixed == pytest.approx(8.4e9, rel=0.05)


# ---------------------------------------------------------------------------------------------------------
# Nothing waits for the device, nothing leaves it.


@pytest.mark.parametrize("iteration", [benchmark.stage_1, benchmark.stage_2])
@pytest.mark.parametrize("preset", list(train_diffratio.PRESETS))
def test_an_iteration_at_full_width_never_waits_for_the_device(preset, iteration, monkeypatch):
    """On `meta` a value that is asked for, as by `.item()`, and an operand on another device are errors."""
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, fused, **kwargs: adam(*args, foreach=True, **kwargs))
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # which does not know `meta`
    config = networks.NETWORKS[pretrain.PRESETS[preset]["network"]]
    with torch.device("meta"):
        step = iteration(config, 2, training.Runtime(torch.device("meta")))
    step()


def test_constants_are_copied_to_the_device_once(monkeypatch):
    """Filters are buffers and the statistics of latents are cached: a copy from a Python list would make a GPU wait."""
    net = networks.Denoiser(small("ncsnpp")).eval()
    latents = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(data.denormalise_latents(data.normalise_latents(latents)), latents)
    monkeypatch.setattr(torch, "tensor", None)
    monkeypatch.setattr(torch.Tensor, "new_tensor", None)
    net(torch.randn(1, 3, 16, 16), torch.ones(1))
    data.denormalise_latents(data.normalise_latents(latents))


def test_latents_are_decoded_eight_at_a_time(monkeypatch):
    """The decoder needs most of a gigabyte for an image of 512x512. What it makes is taken as [0, 1] (EDM2), in order."""
    sizes = []

    class AutoencoderKL(torch.nn.Module):
        @classmethod
        def from_pretrained(cls, name, use_safetensors):
            return cls()

        def decode(self, x):
            sizes.append(len(x))
            return types.SimpleNamespace(sample=x[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3))

    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoencoderKL=AutoencoderKL))
    pixels = torch.linspace(0, 1, 20).view(20, 1, 1, 1).expand(20, 4, 2, 2)
    images = sample.latent_decoder(torch.device("cpu"), "vae")(data.normalise_latents(pixels))
    assert max(sizes) <= 8 and images.shape == (20, 16, 16, 3)
    np.testing.assert_allclose(images[:, 5, 5, 0], np.linspace(0, 255, 20), atol=0.5 + 1e-3)


# ---------------------------------------------------------------------------------------------------------
# Compilation.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_network_is_compiled_once_per_batch_size(architecture, monkeypatch):
    """No graph break, no dynamic shape, nothing compiled after the first iteration, in both stages: one graph in stage 1; in
    stage 2 one of the generator and two of the ratio network, which trains on 2N images and is frozen on N."""
    graphs = []

    def backend(graph, inputs):
        assert not any(isinstance(x, torch.SymInt) for x in inputs), "compiled for a batch size that is not known"
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    config, rt = small(architecture, label_dim=3), training.Runtime(torch.device("cpu"))
    for iteration, expected in ((benchmark.stage_1, 1), (benchmark.stage_2, 3)):
        torch._dynamo.reset()
        counters.clear()
        graphs.clear()
        step = iteration(config, 2, rt, compiled=True)
        for _ in range(3):
            step()
            seen = len(graphs)
            assert seen == expected and not counters["graph_break"], (seen, counters["graph_break"])


# ---------------------------------------------------------------------------------------------------------
# Precision.


@pytest.mark.parametrize("native, expected", [(True, "bf16"), (False, "fp16")])
def test_auto_takes_bf16_only_where_it_is_not_emulated(native, expected, monkeypatch):
    """V100, T4 and RTX 20xx emulate bf16: `is_bf16_supported()` is true there, and float16 is faster by far."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    for name in ("benchmark", "allow_tf32"):  # `start` sets them; put back afterwards
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    assert training.start("cuda", "auto").precision == expected


def test_a_run_continues_in_the_precision_it_was_started_with(monkeypatch, tmp_path, capsys):
    """"auto" is stored as what it came to: on another machine it may come to something else."""
    argv = ["pretrain.py", "--kimg", "0.032", "--batch", "32", "--outdir", str(tmp_path), "--device", "cpu", "--grid-kimg", "9"]
    monkeypatch.setattr(sys, "argv", argv)
    training.run(pretrain.main)
    monkeypatch.setattr(sys, "argv", [*argv, "--precision", "fp32"])
    training.run(pretrain.main)  # the same
    monkeypatch.setattr(sys, "argv", [*argv, "--precision", "bf16"])
    with pytest.raises(SystemExit):
        training.run(pretrain.main)
    assert "was trained with --precision fp32, not bf16" in capsys.readouterr().err
