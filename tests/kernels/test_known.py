"""A layer that has seen a shape asks no more what computes it, but sees all changes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import normlab as nl
from normlab.core.operation import Standardize
from normlab.core.recovery import Affine
from normlab.kernels import dispatch
from normlab.kernels.cpu import call, function

pytestmark = pytest.mark.skipif(dispatch.compiled_kernels() is None, reason="no compiled kernels")


@pytest.fixture
def asked(monkeypatch):
    """How often it was looked up what computes a case."""
    times = []
    supports = call.supports
    monkeypatch.setattr(call, "supports", lambda *given: times.append(1) or supports(*given))
    return times


def equal(layer, other, x):
    """Both give the same, of the input's gradient too; some kernels are not used."""
    found = []
    for each in (layer, other):
        x = x.detach().requires_grad_()
        y = each(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        found += [y, dx]
    # Torch operations and kernels sum in other orders, in float32, numbers near 1.
    torch.testing.assert_close(found[:2], found[2:], rtol=1e-4, atol=1e-4)


def test_it_is_asked_once_a_shape_and_order_of_memory(asked):
    layer, x = nl.GroupNorm(2, 8), torch.randn(3, 8, 4, 5)
    for given in (x, x, x.requires_grad_(), x.detach() + 1):
        layer(given)
    assert len(asked) == 1
    layer(x.contiguous(memory_format=torch.channels_last))
    layer(x.bfloat16())
    layer(x[:2])
    assert len(asked) == 4
    layer(x), layer(x[:2])
    assert len(asked) == 4


CHANGES = {
    "operation": lambda m: setattr(m, "operation", Standardize(eps=2.0)),
    "recovery": lambda m: setattr(m, "recovery", Affine(activation="relu")),
    "groups": lambda m: setattr(m, "groups", 4),
    "weight": lambda m: setattr(m, "weight", nn.Parameter(torch.rand(8))),
    "no weight": lambda m: setattr(m, "weight", None),
    "narrow": lambda m: m.bfloat16(),
    "parametrized": lambda m: parametrize.register_parametrization(m, "weight", nn.Softplus()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_options_and_parameters_hold_from_the_next_pass(change):
    x = torch.randn(3, 8, 6)
    seen, new = nl.GroupNorm(2, 8), nl.GroupNorm(2, 8)
    seen(x)
    for layer in (seen, new):
        torch.manual_seed(0)
        change(layer)
    equal(seen, new, x)


def test_policies_hold_from_the_next_pass():
    x = torch.randn(4, 3, 5) + 2
    layer = nl.BatchNorm(3)
    layer(x)
    trained = layer(x)
    evaluated = layer.eval()(x)
    assert (trained - evaluated).abs().max() > 0.1
    layer.use = "batch"
    torch.testing.assert_close(layer(x), trained, rtol=0, atol=0)
    before = layer.running_mean.clone()
    layer(x)
    assert torch.equal(layer.running_mean, before)  # evaluation updates nothing
    layer.update = True
    layer(x)
    assert not torch.equal(layer.running_mean, before)


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_another_backend_holds_from_the_next_pass(name, monkeypatch):
    x, layer = torch.randn(3, 8, 6), nl.GroupNorm(2, 8)
    expected = layer(x)
    monkeypatch.setattr(function, "apply", lambda *given: pytest.fail("kernels were used"))
    with nl.kernels.backend(name):
        # In float32, as in `equal`.
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_a_mask_a_residual_and_transforms_go_their_own_way():
    x, layer = torch.randn(3, 8, 6), nl.GroupNorm(2, 8)
    y = layer(x)
    torch.testing.assert_close(layer(x, residual=y), 2 * y)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[:, 3:] = False
    assert not layer(x, mask)[:, :, 3:].any()
    each = torch.func.vmap(layer)(x.expand(2, 3, 8, 6))
    torch.testing.assert_close(each[1], y, rtol=1e-4, atol=1e-4)  # as in `equal`
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        tangent = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
    # x scaled changes nothing, but for epsilon
    assert tangent.abs().max() < 1e-3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_leave_it_behind(copied):
    x, layer = torch.randn(3, 8, 6), nl.GroupNorm(2, 8)
    y = layer(x)
    again = copied(layer)
    assert layer._jobs
    assert not again._jobs
    torch.testing.assert_close(again(x), y, rtol=0, atol=0)


def test_a_subclass_that_changes_the_input_still_does():
    class Doubled(nl.GroupNorm):
        def _normalize(self, x, mask, measured):
            return super()._normalize(x * 2 - 1, mask, measured)

    x = torch.randn(3, 8, 6)
    layer = Doubled(2, 8)
    torch.testing.assert_close(layer(x), layer(x), rtol=0, atol=0)
    equal(layer, lambda x: nl.GroupNorm(2, 8)(x * 2 - 1), x)


def test_faults_are_told_as_at_the_first_pass():
    layer = nl.GroupNorm(2, 8)
    layer(torch.randn(3, 8, 6))
    with pytest.raises(ValueError, match="has 8 channels"):
        layer(torch.randn(3, 4, 6))
    layer.weight = nn.Parameter(torch.ones(4))
    with pytest.raises(RuntimeError):
        layer(torch.randn(3, 8, 6))


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_corrections_towards_stored_statistics_are_the_kernels_own(channel_dim):
    """Unless a bound is a function, which gives tensors: then by operations, and the same."""
    x = torch.randn(4, 5, 6) * 2 + 1
    results = []
    for bound in (1.3, lambda step: torch.full_like(step, 1.3)):
        layer = nl.BatchRenorm(x.shape[channel_dim], rmax=bound, dmax=0.4, channel_dim=channel_dim)
        with torch.no_grad():
            layer.weight.add_(torch.linspace(0, 1, layer.num_channels))
        x = x.detach().requires_grad_()
        y = layer(x)
        first = {type(n).__name__ for n, _ in y.grad_fn.next_functions if n is not None}
        assert (first == {"AccumulateGrad"}) == (bound == 1.3)
        grads = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
        results.append([y, *grads, layer.running_mean, layer.running_std])
    # r and d in float64 here, there in float32: some roundings of gradients of up to 40.
    torch.testing.assert_close(*results, rtol=1e-5, atol=2e-5)
