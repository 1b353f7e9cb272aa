"""What a layer keeps for its backward pass: its input, once."""

import pytest
import torch

import normlab as nl
from activations.cases import CASES


def saved_bytes(layer, x):
    """Bytes of all tensors that the forward pass saves, counted as often as they are saved."""
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    assert y.requires_grad
    return total


def check(layer, dtype):
    # 64 channels: statistics of each position, in float32, are 2/64 of the input (4/64 in bf16).
    x = torch.randn(8, 64, 16, 16, dtype=dtype, requires_grad=True)
    saved = saved_bytes(layer.to(dtype), x)
    assert saved <= 1.1 * x.numel() * x.element_size()
    return saved / (x.numel() * x.element_size())


def build(name, options, **more):
    options = {k: v for k, v in options.items() if k not in ("rmax", "dmax")}
    if "groups" in options:
        options["groups"] = 8
    return nl.norm(name, 64, **{**options, **more})


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_input_is_saved_once(name, options, dtype, training):
    check(build(name, options).train(training), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["relu", "silu", "tlu"])
@pytest.mark.parametrize("name", ["batch", "group", "rms", "filter_response", "ghost_batch"])
def test_a_fused_activation_saves_no_more(name, activation, dtype):
    check(build(name, {}, activation=activation), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_saves_one_bit_an_element(dtype):
    check(build("ic", {}, dropout=0.05), dtype)


def test_channels_last_input_is_not_copied():
    layer = nl.BatchNorm(64)
    x = torch.randn(8, 64, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    assert saved_bytes(layer, x) <= 1.1 * x.numel() * 4
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_the_measure_counts():
    """A layer written plainly saves more, so the law can fail."""
    with nl.kernels.backend("reference"), pytest.raises(AssertionError):
        check(nl.BatchNorm(64), torch.float32)
