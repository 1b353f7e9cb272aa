"""A layer that has seen a shape asks no more what computes it, but sees all changes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import normlab as nl
from normlab.core.operation import Scale, Standardize
from normlab.core.partition import partition
from normlab.core.recovery import Affine
from normlab.core.statistics import Current, Renormalized
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
    "operation": lambda m: setattr(m, "operation", Scale(eps=2.0)),
    "statistics": lambda m: setattr(m, "statistics", Current(reduce=lambda t: 2 * t)),
    "partition": lambda m: setattr(m, "partition", partition("n (g c) * -> (g c) (n *)")),
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


def test_axes_hold_from_the_next_pass():
    layer, x = nl.GroupNorm(2, 8), torch.randn(4, 8, 8)
    layer(x)
    layer.channel_dim = -1
    equal(layer, nl.GroupNorm(2, 8, channel_dim=-1), x)
    ghosts = nl.GhostBatchNorm(8, batch_size=4)
    ghosts(x)
    ghosts.batch_size = 2
    equal(ghosts, nl.GhostBatchNorm(8, batch_size=2), x)


def test_parameters_are_asked_for_once_a_pass():
    """A parametrization may draw: recomputed activations would meet other weights."""

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.count = 0

        def forward(self, w):
            self.count += 1
            return w * 1

    for layer in (nl.GroupNorm(2, 8), nl.BatchNorm(8), nl.BatchRenorm(8)):
        counted = Counted()
        parametrize.register_parametrization(layer, "weight", counted)
        counted.count = 0
        for mode in (True, True, False, False):
            layer.train(mode)(torch.randn(3, 8, 5))
        assert counted.count == 4


def bounded(name, value):
    """A bound as a number, and as a function, which gives a tensor."""
    return {name: value}, {name: lambda step: torch.full_like(step, value)}


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("parts", [(True, True), (True, False), (False, True), (False, False)])
def test_corrections_towards_stored_statistics_are_the_kernels_own(parts, channel_dim):
    """Unless a bound is a function, which gives tensors: then by operations, and the same."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4, 6, 6, dtype=torch.float64, generator=g) * 1.2 + 0.2
    near = x.movedim(channel_dim, 0).flatten(1).mean(1)
    near = near + torch.linspace(-0.6, 0.6, 6)  # bounds that some channels meet and others do not
    results = []
    for rmax, dmax in zip(bounded("rmax", 1.25), bounded("dmax", 0.3), strict=True):
        layer = nl.Normalize(
            6,
            "n c * -> c (n *)",
            operation=Standardize(),
            statistics=Renormalized(**rmax, **dmax),
            recovery=Affine(*parts, activation="silu"),
            channel_dim=channel_dim,
        ).double()
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(torch.linspace(0, 1, 6))
            layer.running_mean.copy_(near)
        x, r = (t.detach().requires_grad_() for t in (x, x.flip(0)))
        y = layer(x, residual=r)
        own = {type(n).__name__ for n, _ in y.grad_fn.next_functions if n is not None}
        assert (own == {"AccumulateGrad"}) == (not callable(rmax["rmax"])) or not any(parts)
        wanted = [x, r, *layer.parameters()]
        first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
        results.append([y, *first, *second, layer.running_mean, layer.running_std])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)  # float64, sums of 24 terms


def test_a_correction_of_ones_own_is_heeded():
    class Plain(Renormalized):
        def correction(self, mean, deviation, old_mean, old_std, step):
            return torch.ones_like(mean), torch.zeros_like(mean)

    layer, x = nl.BatchRenorm(5, rmax=3.0, dmax=5.0), torch.randn(4, 5, 6)
    with torch.no_grad():
        layer.running_mean.add_(5)
    layer.statistics = Plain(3.0, 5.0)
    equal(layer, nl.BatchNorm(5), x)
