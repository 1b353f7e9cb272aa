"""Global response normalization (2301.00808): values, masks, and the edges of its norms."""

import copy

import numpy as np
import pytest
import torch
from torch.func import functional_call

import normlab as nl
from activations.cases import build, sample

TIGHT = {"rtol": 1e-11, "atol": 1e-11}  # float64 rounding of two orders of the same sums


def formula(layer, x, valid=None, eps=1e-6):
    """In numpy."""
    z = x if valid is None else np.where(valid[:, None], x, 0.0)
    g = np.sqrt((z**2).sum(tuple(range(2, x.ndim)), keepdims=True))
    n = g / (g.mean(1, keepdims=True) + eps)
    shape = (1, -1, *[1] * (x.ndim - 2))
    weight, bias = (p.detach().numpy().reshape(shape) for p in (layer.weight, layer.bias))
    y = weight * (z * n) + bias + z
    return torch.as_tensor(y if valid is None else np.where(valid[:, None], y, 0.0))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 5), (4, 6, 5, 3), (3, 6, 2, 3, 2)])
def test_values(shape, training):
    layer, x = build("global_response", {"eps": 0.1}).train(training), sample(shape)
    torch.testing.assert_close(layer(x), formula(layer, x.numpy(), eps=0.1), **TIGHT)
    last = build("global_response", {"eps": 0.1}, channel_dim=-1)
    torch.testing.assert_close(last(x.movedim(1, -1)).movedim(-1, 1), layer(x), **TIGHT)


def test_masked_positions_have_no_energy():
    layer, x = build("global_response", {}), sample((8, 6, 5, 3))
    mask = torch.rand(8, 5, 3) > 0.4
    mask[2] = False
    spoilt = x.masked_fill(~mask[:, None], float("nan"))
    y = layer(spoilt.requires_grad_(), mask)
    torch.testing.assert_close(y, formula(layer, x.detach().numpy(), mask.numpy()), **TIGHT)
    y.pow(2).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_it_starts_as_the_identity():
    layer, x = nl.GlobalResponseNorm(6), torch.randn(8, 6, 5)
    assert torch.equal(layer(x), x)
    assert [p.tolist() for p in layer.parameters()] == [[0.0] * 6] * 2


@pytest.mark.parametrize("shape", [(4, 6, 3), (4, 6)])
def test_derivatives(shape):
    layer, x = build("global_response", {}), sample(shape).requires_grad_()
    named = dict(layer.named_parameters())

    def function(x, *values):
        return functional_call(layer, dict(zip(named, values, strict=True)), (x,))

    inputs = (x, *named.values())
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_a_channel_or_a_sample_of_zeros_has_finite_gradients():
    """As channels after a ReLU often are."""
    x = sample((8, 6, 5))
    x[:, 2] = 0
    x[3] = 0
    x.requires_grad_()
    layer = build("global_response", {})
    y = layer(x)
    assert torch.equal(y[3], layer.bias[:, None].expand(6, 5))
    y.pow(2).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("mask", [None, torch.tensor([[True], [False]]).expand(2, 5)])
def test_a_sample_without_energy_is_left_alone_without_eps_too(mask):
    layer, x = build("global_response", {"eps": 0.0}), sample((2, 6, 5))
    x = (x if mask is not None else x * torch.tensor([1.0, 0.0]).view(2, 1, 1)).requires_grad_()
    y = layer(x, mask)
    expected = layer.bias[:, None].expand(6, 5) if mask is None else torch.zeros(6, 5).double()
    assert torch.equal(y[1], expected)
    y.pow(2).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_exact_laws():
    """At ε = 0 and β = 0: the shares of a sample have mean 1, and f(a·x) = a·f(x) per sample."""
    layer, x = build("global_response", {"eps": 0.0}), sample((8, 6, 5))
    layer.bias.data.zero_()
    factors = torch.linspace(0.1, 9, 8, dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(layer(factors * x), factors * layer(x), **TIGHT)
    layer.weight.data.fill_(1.0)
    shares = ((layer(x) - x) / x).mean(2)
    torch.testing.assert_close(shares.mean(1), torch.ones(8, dtype=torch.float64), **TIGHT)


def test_only_the_input_is_kept():
    layer, x = nl.GlobalResponseNorm(64), torch.randn(8, 64, 16, 16, requires_grad=True)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert sum(kept.values()) <= 1.1 * x.untyped_storage().nbytes()


def test_large_numbers_in_low_precision():
    """Squares of 10³ do not fit float16; norms are taken in float32."""
    layer, x = nl.GlobalResponseNorm(6).half(), 1e3 * torch.randn(8, 6, 5).half()
    layer.weight.data.fill_(0.5)
    y = layer(x)
    assert y.dtype == torch.float16
    expected = layer.float()(x.float())
    torch.testing.assert_close(y.float(), expected, rtol=1e-3, atol=0)  # one rounding to float16


@pytest.mark.parametrize("eps", [-1e-6, float("nan"), float("inf")])
def test_eps_out_of_range(eps):
    with pytest.raises(ValueError, match="eps is a finite number of at least 0; received"):
        nl.GlobalResponseNorm(6, eps)


def test_the_compiler_takes_it_whole():
    layer, x = nl.GlobalResponseNorm(6), torch.randn(8, 6, 5, requires_grad=True)
    layer.weight.data.fill_(0.7)
    z, other = x.detach().clone().requires_grad_(), copy.deepcopy(layer)
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).pow(3).sum().backward()
    other(z).pow(3).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-5)  # float32 sums
