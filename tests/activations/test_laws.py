"""Laws of the methods as properties: invariances, moments, identities, special cases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import normlab as nl
from activations.cases import ONE_EACH, build, sample

CATALOGUE = nl.catalogue("activation")
SHAPE = (8, 6, 5)
TIGHT = {"rtol": 1e-10, "atol": 1e-11}  # float64 rounding, as in the tests of values
PER = {
    "tensor": lambda: (1, 1, 1), "channel": lambda: (1, 6, 1), "sample": lambda: (8, 1, 1),
    "sample and channel": lambda: (8, 6, 1), "position": lambda: (8, 1, 5),
}  # fmt: skip
DECLARED = [
    pytest.param(c.values[0], c.values[1], i, id=f"{c.values[0]}-{i}")
    for c in ONE_EACH for i in CATALOGUE[c.values[0]].declared
]  # fmt: skip


def family(per, low, high):
    """Factors or offsets, one for each member of a family."""
    if per == "sample and group":
        return torch.empty(8, 3, 1).uniform_(low, high).double().repeat_interleave(2, 1)
    return torch.empty(PER[per]()).uniform_(low, high).double()


def without_eps(name, options):
    """ε = 0, at which invariance to scale is exact."""
    takes = CATALOGUE[name].options
    options = {k: v for k, v in options.items() if k != "learned_eps"}
    return build(name, options | ({"eps": 0.0} if "eps" in takes else {}))


@pytest.mark.parametrize(("name", "options", "law"), DECLARED)
def test_declared_invariances(name, options, law):
    layer, x = without_eps(name, options), sample(SHAPE)
    scale = law.kind == "scale"
    changed = x * family(law.per, 0.1, 10) if scale else x + family(law.per, -5, 5)
    torch.testing.assert_close(layer(changed), layer(x), rtol=1e-9, atol=1e-9)  # cancels 1–2 digits


NOT = [("rms", "shift", "sample"), ("filter_response", "shift", "sample and channel"),
       ("variance", "shift", "channel"), ("mean_only_batch", "scale", "channel"),
       ("none", "scale", "tensor"), ("dyt", "scale", "tensor"), ("batch", "scale", "sample"),
       ("layer", "scale", "channel"), ("instance", "scale", "position"),
       ("lp_batch", "shift", "channel")]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "per"), NOT)
def test_invariances_that_are_not_declared_do_not_hold(name, kind, per):
    layer, x = without_eps(name, {}), sample(SHAPE)
    changed = x * family(per, 0.1, 10) if kind == "scale" else x + family(per, -5, 5)
    assert (layer(changed) - layer(x)).abs().max() > 0.1
    assert not any(i.kind == kind and i.per == per for i in CATALOGUE[name].declared)


@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_areas_have_the_declared_moments(name, options):
    if not CATALOGUE[name].moments:
        pytest.skip("none declared")
    layer = nl.norm(name, 6, **{**options, "eps": 0.0, "affine": False}).double()
    y = layer(sample((8, 6, 5, 3)))
    sizes = layer._sizes(8)
    z = layer.partition.bind(y.shape, sizes=sizes).regroup(y)
    torch.testing.assert_close(z.mean(-1), torch.zeros(z.shape[0]).double(), **TIGHT)
    torch.testing.assert_close(z.pow(2).mean(-1), torch.ones(z.shape[0]).double(), **TIGHT)


@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_gradients_are_orthogonal_to_what_the_output_ignores(name, options):
    """Σ∂ℓ/∂x = 0 over the invariant family of shifts, Σx·∂ℓ/∂x = 0 over that of scales."""
    layer = without_eps(name, options)
    x = sample(SHAPE).requires_grad_()
    layer(x).pow(3).sum().backward()
    for law in CATALOGUE[name].declared:
        product = x.grad if law.kind == "shift" else x.detach() * x.grad
        if law.per == "sample and group":
            sums = product.view(8, 3, 2, 5).sum((2, 3))
        else:
            sums = product.sum([i for i, n in enumerate(PER[law.per]()) if n == 1])
        torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-10)


@given(st.integers(0, 50), st.integers(2, 9), st.integers(1, 4), st.floats(0.2, 5.0))
def test_the_exact_size_of_batch_normalizations_gradient(seed, n, p, gamma):
    """‖∂L/∂x‖² = (γ²/σ²)(‖g‖² − ⟨1,g⟩²/m − ⟨g,x̂⟩²/m), with 1/m on both terms (1805.11604)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, p, generator=generator).double().requires_grad_()
    g = torch.randn(n, 1, p, generator=generator).double()
    layer = nl.BatchNorm(1, eps=0.0).double()
    layer.weight.data.fill_(gamma)
    m, sigma = n * p, x.detach().std(correction=0)
    xhat = (x.detach() - x.detach().mean()) / sigma
    layer(x).backward(g)
    want = gamma**2 / sigma**2 * (g.pow(2).sum() - g.sum() ** 2 / m - (g * xhat).sum() ** 2 / m)
    # A difference of numbers of size ‖g‖²·γ²/σ².
    scale = (gamma**2 / sigma**2 * g.pow(2).sum()).item()
    torch.testing.assert_close(x.grad.pow(2).sum(), want, rtol=0, atol=1e-12 * scale)


@given(st.sampled_from([1.0, 2.0, 3.0, 4.5, "max"]), st.sampled_from(["zero", "mean"]))
def test_the_lp_norm_of_what_is_divided_is_one(p, about):
    x = sample(SHAPE)
    y = nl.LpBatchNorm(6, p=p, about=about, eps=0.0, affine=False).double()(x)
    # D is the norm of x − b·μ, so the same shift of y has norm 1.
    centred = x - x.mean((0, 2), keepdim=True)
    divided = x if about == "zero" else centred
    z = y * (divided / centred)
    norm = z.abs().amax((0, 2)) if p == "max" else (z.abs() ** p).mean((0, 2)) ** (1 / p)
    torch.testing.assert_close(norm, torch.ones(6).double(), **TIGHT)


def agree(a, b, x, **tolerance):
    y, z = x.clone().requires_grad_(), x.clone().requires_grad_()
    for layer, given_x in ((a, y), (b, z)):
        layer(given_x).pow(3).sum().backward()
    torch.testing.assert_close(a(y), b(z), **tolerance)
    torch.testing.assert_close(y.grad, z.grad, **tolerance)


SAME = {
    "l2 about the mean is batch": (("lp_batch", {"p": 2.0, "about": "mean"}), ("batch", {})),
    "a ghost batch of all samples is batch": (("ghost_batch", {"batch_size": 8}), ("batch", {})),
    "a ghost batch of more is batch": (("ghost_batch", {"batch_size": 99}), ("batch", {})),
    "ghost batches of one are instance": (("ghost_batch", {"batch_size": 1}), ("instance", {})),
    "as many groups as channels are instance": (("group", {"groups": 6}), ("instance", {})),
    "one group is layer": (("group", {"groups": 1}), ("layer", {"over": "sample"})),
    "layer over positions is position": (("layer", {"over": "position"}), ("position", {})),
    "sub-batches of one are group": (("batch_group", {"groups": 3, "batch_size": 1}),
                                     ("group", {"groups": 3})),
    "groups of one channel are ghost": (("batch_group", {"groups": 6, "batch_size": 4}),
                                        ("ghost_batch", {"batch_size": 4})),
    "renormalization without room is batch": (("batch_renorm", {"rmax": 1.0, "dmax": 0.0}),
                                              ("batch", {})),
    "independent components without dropout": (("ic", {"dropout": 0.0}), ("batch", {})),
}  # fmt: skip


@pytest.mark.parametrize("case", list(SAME))
def test_methods_that_coincide(case):
    (a, options), (b, others) = SAME[case]
    agree(build(a, options), build(b, others), sample(SHAPE), **TIGHT)


def test_l1_scales_gaussian_data_as_the_deviation_does():
    x = torch.randn(200_000, 1).double()
    ratio = nl.L1BatchNorm(1).double()(x) / nl.BatchNorm(1).double()(x)
    # The ratio of the two estimates deviates by about 0.24/√m = 5e-4; six times that.
    assert abs(ratio.mean().item() - 1) < 3e-3


def test_renormalization_unclipped_computes_the_evaluation_function():
    layer = build("batch_renorm", {"rmax": 1e9, "dmax": 1e9, "momentum": 0.1})
    for seed in range(4):
        x = sample(SHAPE, seed=seed)
        with nl.statistics(layer, use="stored", update=False):
            expected = layer(x)
        torch.testing.assert_close(layer(x), expected, **TIGHT)


@given(st.floats(1.0, 3.0), st.floats(0.0, 5.0), st.integers(0, 20))
def test_renormalizations_gradient_ignores_shift_and_scale(rmax, dmax, seed):
    layer = build("batch_renorm", {"rmax": rmax, "dmax": dmax, "eps": 0.0})
    layer(sample(SHAPE, seed=seed + 1))
    x = sample(SHAPE, seed=seed).requires_grad_()
    layer(x).pow(3).sum().backward()
    for product in (x.grad, x.detach() * x.grad):  # rounding relative to the terms of the sum
        sums, scale = product.sum((0, 2)), product.abs().sum((0, 2)) + 1e-6
        assert (sums.abs() / scale).max() < 1e-11


def test_renormalizations_default_schedule_is_the_papers():
    layer = nl.BatchRenorm(2)
    at = {5_000: (1.0, 0.0), 15_000: (1 + 2 * 10 / 35, 2.5), 25_000: (1 + 2 * 20 / 35, 5.0),
          40_000: (3.0, 5.0), 90_000: (3.0, 5.0), 0: (1.0, 0.0)}  # fmt: skip
    for step, (rmax, dmax) in at.items():
        given_step = torch.tensor(step)
        # Float32 rounding of the share.
        assert math.isclose(layer.statistics.rmax(given_step).item(), rmax, rel_tol=1e-6)
        assert math.isclose(layer.statistics.dmax(given_step).item(), dmax, rel_tol=1e-6)
    assert layer.statistics.momentum == 0.01


@given(st.integers(2, 23), st.integers(2, 23))
def test_ghost_batches_of_any_sizes(samples, size):
    layer = nl.GhostBatchNorm(2, batch_size=size, affine=False).double()
    x = torch.randn(samples, 2, 3).double()
    y = layer(x)
    parts = x.tensor_split(math.ceil(samples / size))
    assert max(len(p) for p in parts) <= size
    each = [nl.BatchNorm(2, affine=False).double()(p) for p in parts]
    torch.testing.assert_close(y, torch.cat(each), **TIGHT)
    mean = torch.stack([p.mean((0, 2)) for p in parts]).mean(0)
    torch.testing.assert_close(layer.running_mean, 0.1 * mean, **TIGHT)
    assert layer.eval()(x).shape == x.shape


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 30.0])
def test_the_gradient_of_a_map_of_one_position_keeps_its_digits(scale):
    """dx = ε·dy/(x² + ε)^(3/2), which the general form computes as a difference near 1 − 1."""
    eps = 1e-6 + 1e-4
    layer = nl.FilterResponseNorm(6, learned_eps=True, activation=None)
    x = (scale * torch.randn(8, 6, 1, 1)).requires_grad_()
    dy = torch.randn(8, 6, 1, 1)
    layer(x).backward(dy)
    exact = eps * dy.double() * (x.detach().double() ** 2 + eps) ** -1.5
    # ε itself is rounded to float32, and the power to a few units of 2⁻²⁴.
    torch.testing.assert_close(x.grad.double(), exact, rtol=2e-6, atol=0)
