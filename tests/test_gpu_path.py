"""What matters on GPUs, without one: kernels, types, layouts, memory, waiting, compilation."""

import collections
import contextlib
import functools
import sys
import types
from unittest import mock

import gpu
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_networks import ARCHITECTURES, small
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import networks
import pretrain
import sample
import train_diffratio
from machinery import data, training


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("architecture", ["adm", "edm2"])
def test_attention_reaches_the_fused_kernels(architecture, memory_format, monkeypatch):
    """They need each head's channels side by side and one stride for q, k and v."""
    seen, fused = [], F.scaled_dot_product_attention

    def attend(q, k, v):
        seen.append(torch._fused_sdp_choice(q, k, v))
        assert {t.stride(-1) for t in (q, k, v)} == {1}
        assert all(t.stride(i) % 8 == 0 for t in (q, k, v) for i in range(3))
        return fused(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    net = networks.Denoiser(small(architecture)).to(memory_format=memory_format)
    net(torch.randn(2, 3, 16, 16), torch.ones(2))
    assert seen == [SDPBackend.FLASH_ATTENTION.value] * 4


class Log(TorchDispatchMode):
    """The operations that run, as rows: (name, input tensors, first output)."""

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs, outputs = ([t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
                           for tree in ((args, kwargs), out))
        self.rows += [(function.name().split("::")[-1], inputs, first) for first in outputs[:1]]
        return out


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_bf16_step_computes_in_bf16_and_copies_no_layout(architecture):
    """A step of stage 1 under CUDA's autocast: products, norms, SiLU and resampling run in bf16.
    Each attention copies a layout twice and reads both layouts twice; nothing else does."""
    n = 5  # marks activations: no weight has this first dimension
    with FakeTensorMode():
        net = networks.Denoiser(small(architecture, label_dim=3))
        for p in net.parameters():
            if p.ndim == 4:
                p.data = p.data.to(memory_format=networks.memory_format(net.config, "cuda"))
        x, sigma = torch.randn(n, 3, 16, 16), torch.ones(n)
        labels = torch.zeros(n, dtype=torch.int64)
        with Log() as log:
            log.rows = []
            with torch.autocast("cpu", torch.bfloat16), gpu.CudaRules():
                loss = pretrain.denoising_loss(net, x, sigma, x, labels).sum()
            loss.backward()

    words = ("convolution", "mm", "group_norm", "silu", "avg_pool2d", "upsample", "dot_product")
    found = {(name, inputs[0].dtype) for name, inputs, _ in log.rows if any(map(name.count, words))}
    names, dtypes = zip(*found)
    assert {"convolution", "convolution_backward", "silu", "silu_backward", "mm"} <= {*names}
    assert {*dtypes} == {torch.bfloat16}, found

    def layout_of(t):
        nchw, nhwc = t.is_contiguous(), t.is_contiguous(memory_format=torch.channels_last)
        return nchw if t.ndim == 4 and len(t) == n and nchw != nhwc else None  # None: no matter

    def changes_layout(name, inputs, out):
        copies = name == "clone" and n in out.shape and out.ndim > 3
        return copies or len({layout_of(t) for t in (*inputs, out)} - {None}) == 2

    changes = collections.Counter(row[0] for row in log.rows if changes_layout(*row))
    attentions = sum(getattr(module, "heads", 0) > 0 for module in net.modules())
    assert attentions > 2 and changes.total() <= 4 * attentions, changes


def test_memory_of_imagenet_64_is_within_half_a_gigabyte_an_image():
    """The full network, ratio step and generator step, as exercises/gpu.py counts them."""
    fixed, per_image = gpu.count("imagenet64")
    assert 0.3e9 < per_image <= 0.5e9 and fixed == pytest.approx(8.4e9, rel=0.05)


@pytest.mark.parametrize("iteration", [gpu.stage_1, gpu.stage_2])
@pytest.mark.parametrize("preset", list(train_diffratio.PRESETS))
def test_an_iteration_at_full_width_never_waits_for_the_device(preset, iteration, monkeypatch):
    """On `meta`, asking for a value (`.item()`) or an operand on another device is an error."""
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda *a, fused, **kw: adam(*a, foreach=True, **kw))
    # autocast does not know `meta`
    monkeypatch.setattr(torch, "autocast", lambda *a, **kw: contextlib.nullcontext())
    config = networks.NETWORKS[pretrain.PRESETS[preset]["network"]]
    with torch.device("meta"):
        step = iteration(config, training.Runtime("meta", batch=2))
    step()


def test_constants_are_copied_to_the_device_once(monkeypatch):
    """A tensor made from a Python list in each call would make a GPU wait."""
    net = networks.Denoiser(small("ncsnpp")).eval()
    latents = data.Dataset("latents", np.zeros((2, 8, 8, 8), np.float32))
    monkeypatch.setattr(torch, "tensor", None)
    monkeypatch.setattr(torch.Tensor, "new_tensor", None)
    net(torch.randn(1, 3, 16, 16), torch.ones(1))
    latents.to_model(torch.zeros(2, 8, 8, 8), "cpu")


def test_latents_are_decoded_eight_at_a_time(monkeypatch):
    """An image of 512x512 takes almost a gigabyte. As in EDM2 the decoder's [0, 1] is truncated."""
    sizes, diffusers = [], mock.Mock()

    def decode(x):
        sizes.append(len(x))
        return types.SimpleNamespace(sample=x[:, :3].repeat(1, 1, 8, 8))

    model = diffusers.AutoencoderKL.from_pretrained.return_value
    model.to.return_value.eval.return_value.decode = decode
    monkeypatch.setitem(sys.modules, "diffusers", diffusers)
    levels = torch.arange(20) * 13
    pixels = ((levels + 0.7) / 255).view(20, 1, 1, 1).expand(20, 4, 2, 2)
    centre, scale = data.LATENTS
    images = sample.latent_decoder(torch.device("cpu"), "vae")((pixels - centre) / scale * 0.5)
    assert max(sizes) <= 8 and images.shape == (20, 16, 16, 3)
    assert images[:, 5, 5, 0].tolist() == levels.tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_network_is_compiled_once_per_batch_size(architecture, monkeypatch):
    """No graph break, no dynamic shape, nothing compiled after the first iteration. Stage 2 has one
    graph of the generator and two of the ratio network (2N images; frozen, N)."""
    graphs = []

    def backend(graph, inputs):
        assert not any(isinstance(x, torch.SymInt) for x in inputs), "dynamic batch size"
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    config, rt = small(architecture, label_dim=3), training.Runtime("cpu", batch=2)
    for iteration, expected in ((gpu.stage_1, 1), (gpu.stage_2, 3)):
        torch._dynamo.reset()
        counters.clear()
        graphs.clear()
        step = iteration(config, rt, compiled=True)
        for _ in range(3):
            step()
            assert len(graphs) == expected and not counters["graph_break"], counters["graph_break"]


@pytest.mark.parametrize("native, expected", [(True, "bf16"), (False, "fp16")])
def test_auto_takes_bf16_only_where_it_is_not_emulated(native, expected, monkeypatch):
    """V100, T4 and RTX 20xx emulate bf16: `is_bf16_supported()` is true, but fp16 is far faster."""
    supported = {"is_bf16_supported": lambda including_emulation: native or including_emulation}
    monkeypatch.setattr(torch, "cuda", mock.Mock(device_count=lambda: 1, **supported))
    monkeypatch.setattr(torch.backends, "cudnn", mock.Mock())
    assert training.Runtime("cuda", "auto").precision == expected


def test_the_page_of_a_device_marks_what_is_wrong_and_goes_on(tmp_path, capsys):
    page = gpu.Page(tmp_path / "gpu.md")
    page.part("Part", ["", "error"])
    for error in (1e-6, 1e-4, float("nan")):
        page.row("error", lambda: [gpu.verdict(error, 1e-5)])
    page.row("broken", lambda: 1 / 0)
    page.row("next", lambda: [1])
    cells = [line.split("|")[2].strip() for line in (tmp_path / "gpu.md").read_text().splitlines()[5:]]
    assert cells == ["1.0e-06", "**1.0e-04, above 1e-05**", "**nan, above 1e-05**", "**ZeroDivisionError: division by zero**", "1"]


@pytest.mark.parametrize("architecture, precision, limits", [
    *((name, "fp32", (5e-5, 5e-5)) for name in ARCHITECTURES), ("ddpmpp", "bf16", (0.05, 0.2))])
def test_device_layout_and_precision_change_by_rounding(architecture, precision, limits, device):
    """Relative errors of output and gradients against float64 on the CPU in another layout. Some 40
    layers, sums of up to 1000 products: 6e-8 sqrt(40 * 1000) = 1e-5. TF32 has 5e-4."""
    rt = training.Runtime(device, precision=precision)
    for error, limit in zip(gpu.network_check(architecture, rt, compiled=False), limits):
        assert 0 < float(error) < limit
