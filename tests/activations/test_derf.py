"""Dynamic erf (2512.10938): values, derivatives and what it shares with dynamic tanh."""

import copy
import math

import pytest
import torch
from torch.func import functional_call

import normlab as nl
from activations.cases import build, sample

TIGHT = {"rtol": 1e-12, "atol": 1e-12}  # float64 rounding of single elements


def formula(layer, x):
    """With math.erf, element by element."""
    alpha, shift = layer.alpha.item(), layer.shift.item()
    values = [math.erf(alpha * v + shift) for v in x.reshape(-1).tolist()]
    y = torch.tensor(values, dtype=torch.float64).view(x.shape)
    shape = (1, -1, *[1] * (x.ndim - 2))
    return y * layer.weight.view(shape) + layer.bias.view(shape)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 5), (4, 6, 5, 3)])
def test_values(shape, training):
    layer, x = build("derf", {}).train(training), sample(shape)
    torch.testing.assert_close(layer(x), formula(layer, x), **TIGHT)


def test_initial_values_are_those_of_the_code():
    named = dict(nl.DynamicErf(6).named_parameters())
    assert {n: p.tolist() for n, p in named.items()} == {
        "alpha": 0.5, "shift": 0.0, "weight": [1.0] * 6, "bias": [0.0] * 6,
    }  # fmt: skip
    other = nl.DynamicErf(6, alpha=0.25, shift=-1.0)
    assert (other.alpha.item(), other.shift.item()) == (0.25, -1.0)
    assert repr(other) == "DynamicErf(6, alpha=0.25, shift=-1.0)"


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", ["derf", "dyt"])
def test_derivatives_of_both_orders_and_both_modes(name, affine):
    layer, x = build(name, {"affine": affine}), sample((4, 6, 3)).requires_grad_()
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[1, 1:] = False
    named = dict(layer.named_parameters())

    def function(x, *values):
        return functional_call(layer, dict(zip(named, values, strict=True)), (x, mask))

    inputs = (x, *named.values())
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_gradients_are_those_of_autograd():
    layer, x = build("derf", {}), sample((8, 6, 5)).requires_grad_()
    inputs = (x, *layer.parameters())
    shape = (1, -1, 1)
    u = torch.erf(layer.alpha * x + layer.shift)
    plain = u * layer.weight.view(shape) + layer.bias.view(shape)
    fast = torch.autograd.grad(layer(x).pow(3).sum(), inputs)
    slow = torch.autograd.grad(plain.pow(3).sum(), inputs)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)  # two orders of the same sums


def test_laws_of_the_curve():
    layer = nl.DynamicErf(6, affine=False).double()
    x = 50 * sample((8, 6, 5))
    y = layer(x)
    assert y.abs().max() <= 1
    torch.testing.assert_close(layer(-x), -y, **TIGHT)  # odd at s = 0
    layer.shift.data.fill_(0.7)
    layer.alpha.data.neg_()
    flipped = layer(x)
    layer.shift.data.neg_()
    layer.alpha.data.neg_()
    torch.testing.assert_close(layer(x), -flipped, **TIGHT)  # erf(−u) = −erf(u)


def test_only_the_input_is_kept():
    layer, x, kept = nl.DynamicErf(64), torch.randn(8, 64, 16, 16, requires_grad=True), 0

    def pack(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert kept <= 1.1 * x.numel()


def test_bfloat16_is_computed_in_float32():
    layer, x = nl.DynamicErf(6), torch.randn(8, 6, 5).bfloat16()
    assert torch.equal(layer(x), layer(x.float()).bfloat16())


def test_the_compiler_takes_it_whole():
    layer, x = nl.DynamicErf(6), torch.randn(8, 6, 5, requires_grad=True)
    z, other = x.detach().clone().requires_grad_(), copy.deepcopy(layer)
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).pow(3).sum().backward()
    other(z).pow(3).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-5, atol=1e-6)  # float32 rounding
    torch.testing.assert_close(layer.shift.grad, other.shift.grad, rtol=1e-4, atol=1e-5)  # sums
