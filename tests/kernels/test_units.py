"""Compiled rows of weights and gradients against formulas of their own, in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import normlab as nl
from normlab.kernels import units
from normlab.kernels.cpu import units as compiled
from normlab.kernels.dispatch import compiled_kernels
from normlab.networks import signs

pytestmark = pytest.mark.skipif(compiled_kernels() is None, reason="no compiled kernels here")
CARDS = nl.catalogue("weight")

FORMS = ("inside", "floor", "outside", "stored")
# Sums are in float64, so that results are off by their own rounding: half a unit in the last
# place, and as much for the gain.
ULP = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-9}


def standardized(v, eps, form):
    """ẑ of rows, by its definition."""
    if form == "stored":
        return v
    n = v.shape[1]
    z = v - v.mean(1, keepdim=True)
    m = (z * z).mean(1, keepdim=True)
    if form == "inside":
        return z / (m + eps).sqrt()
    if form == "floor":
        return z / (n * m).clamp(min=eps).sqrt()
    root = torch.where(m > 0, m, 1).sqrt() * (m > 0)  # has no derivative at 0
    return z / (root + eps) / math.sqrt(n)


def formula(how, v, gain):
    """The definition, with clamp(ẑ, −1, 1) in the place of signs for the gradient."""
    shape, v = v.shape, v.flatten(1)
    w = standardized(v, how.eps, how.form)
    if how.signs is not None:
        size = w.detach().abs().mean(1, keepdim=True) if how.signs == "mean" else 1.0
        exact = torch.where(w == 0, how.zero, w.sign()).detach()
        inside = w.clamp(-1, 1)
        w = exact * size + (inside - inside.detach())
    w = w * how.constant
    return (w if gain is None else w * gain.flatten()[:, None]).view(shape)


def how_of(eps, form, constant=1.0, signs=None, zero=1.0):
    made = compiled.How(None, eps, form, constant, signs, zero)
    return made._replace(formula=lambda v, gain: formula(made, v, gain))


def ordered(x, order):
    if order == "last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return torch.stack([x, -x], 1)[:, 0] if order == "strided" else x.contiguous()


@given(
    st.integers(1, 9), st.integers(1, 17), st.integers(1, 7), st.sampled_from(FORMS),
    st.sampled_from([None, "none", "mean"]), st.booleans(),
    st.sampled_from(["plain", "last", "strided"]), st.sampled_from(list(ULP)),
    st.sampled_from([0.0, 3.0, 1e3]), st.integers(0, 2**16),
)  # fmt: skip
def test_values_and_gradients(units_, i, k, form, signs_, with_gain, order, dtype, mean, seed):
    generator = torch.Generator().manual_seed(seed)
    v = (torch.randn(units_, i, k, generator=generator) + mean).to(dtype)
    v = ordered(v, order).requires_grad_()
    gain = (torch.rand(units_, 1, 1, generator=generator) + 0.5).to(dtype).requires_grad_()
    inputs = (v, gain) if with_gain else (v,)
    how = how_of(1e-3, form, 1.3, signs_)
    dy = torch.randn(v.shape, generator=generator).to(dtype)
    used = units.standardize(v, gain if with_gain else None, how)
    found = torch.autograd.grad(used, inputs, dy)
    assert used.dtype == v.dtype
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = formula(how, wide[0], wide[1] if with_gain else None)
    slopes = torch.autograd.grad(expected, wide, dy.double())
    # The reference rounds too, in float64: relative to the mean that it subtracts.
    lost = 2.0**-52 * (1 + mean) / max(float(standardized_scale(wide[0])), 1e-3)
    for a, b in zip((used, *found), (expected, *slopes), strict=True):
        size = float(b.detach().abs().max())
        tolerance = {"rtol": 2 * ULP[dtype], "atol": 64 * i * k * lost * (size + 1)}
        torch.testing.assert_close(a.double(), b, **tolerance)


def standardized_scale(v):
    """The least deviation of a unit."""
    return v.detach().flatten(1).var(1, correction=0).min().sqrt()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("signs_", [None, "mean"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_unit_that_is_not_finite_is_nan_and_the_others_are_as_they_were(form, signs_, bad):
    torch.manual_seed(0)
    v = torch.randn(3, 5)
    how = how_of(1e-5, form, signs=signs_)
    good = units.standardize(v, None, how)
    v[1, 2] = bad
    used = units.standardize(v, None, how)
    assert torch.equal(used[::2], good[::2])
    if form == "stored" and signs_ is None:
        assert torch.equal(used, v) or math.isnan(bad)
    elif form != "stored" or math.isnan(bad):
        assert used[1].isnan().all()


def test_equal_weights():
    flat = torch.full((2, 7), 0.1, requires_grad=True)
    for form, value in (("inside", 0.0), ("floor", 0.0), ("outside", 0.0)):
        used = units.standardize(flat, None, how_of(1e-4, form))
        (slope,) = torch.autograd.grad(used.sum(), flat)
        assert torch.equal(used, torch.full_like(flat, value))
        assert slope.isfinite().all()
    # sign(0) is what is asked for, however 0.1 is rounded.
    ones = units.standardize(flat, None, how_of(1e-4, "outside", signs="none"))
    assert torch.equal(ones, torch.ones_like(flat))
    assert units.standardize(flat, None, how_of(1e-4, "outside", signs="none", zero=0)).sum() == 0


LAYERS = [
    lambda: nn.Linear(7, 4),
    lambda: nn.Conv2d(4, 6, 3, groups=2),
    lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    lambda: nn.Conv3d(2, 3, 2),
    lambda: nn.Conv2d(5, 3, 3).to(memory_format=torch.channels_last),
    lambda: nn.Conv2d(5, 3, 3).to(torch.bfloat16),
]
METHODS = [
    ("standardization", {}),
    *(
        ("scaled_standardization", {"eps_form": form, "gain": gain, "relu_gain": not gain})
        for form in ("floor", "inside", "outside")
        for gain in (True, False)
    ),
]


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize(("name", "options"), METHODS)
def test_weight_methods_are_those_of_torch_operations(name, options, make):
    torch.manual_seed(0)
    layer = nl.weight(name, make(), **options)
    parameters = list(layer.parametrizations.weight.parameters())
    dy = torch.randn_like(layer.weight)
    found = [layer.weight.detach(), *torch.autograd.grad(layer.weight, parameters, dy)]
    with nl.kernels.backend("torch"):
        expected = [layer.weight.detach(), *torch.autograd.grad(layer.weight, parameters, dy)]
    for a, b in zip(found, expected, strict=True):
        # The torch path sums about 50 numbers in float32; bfloat16 is rounded to once.
        once = 2.0**-8 if b.dtype == torch.bfloat16 else 0
        torch.testing.assert_close(
            a, b, rtol=2e-5 + once, atol=2e-6 * float(b.detach().abs().max())
        )


def test_the_kernels_run_where_they_can():
    layer = nl.weight("standardization", nn.Conv2d(3, 4, 3))
    graph = layer.weight.grad_fn
    seen = []
    while graph is not None:
        seen.append(graph.name())
        graph = graph.next_functions[0][0] if graph.next_functions else None
    assert any("Standardize" in name for name in seen), seen
    used = signs.effective(torch.randn(4, 3, 3, 3, requires_grad=True), None, "mean")
    assert "Standardize" in used.grad_fn.name()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("signs_", [None, "mean"])
def test_derivatives_of_any_order(form, signs_):
    torch.manual_seed(1)
    v = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    gain = torch.rand(3, 1, 1, dtype=torch.float64, requires_grad=True)
    how = how_of(1e-3, form, 0.7, signs_)

    def used(v, gain):
        return units.standardize(v, gain, how)

    if signs_ is None:  # finite differences do not see stand-ins
        assert torch.autograd.gradcheck(used, (v, gain))
        assert torch.autograd.gradgradcheck(used, (v, gain))
    dy = torch.randn_like(v)
    for a, b in zip(second(used, v, gain, dy), second(how.formula, v, gain, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    many = torch.randn(4, *v.shape, dtype=torch.float64)
    together = torch.autograd.grad(used(v, gain), v, many, is_grads_batched=True)[0]
    for one, each in zip(together, many, strict=True):
        (alone,) = torch.autograd.grad(used(v, gain), v, each)
        torch.testing.assert_close(one, alone, rtol=1e-10, atol=1e-12)


def second(f, v, gain, dy):
    """Gradients of a function of the gradient."""
    first = torch.autograd.grad(f(v, gain), (v, gain), dy, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), (v, gain))


def test_transforms_of_torch_func():
    torch.manual_seed(2)
    v, t = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    how = how_of(1e-3, "outside")
    each = torch.func.vmap(lambda v: units.standardize(v, None, how))(v)
    for one, row in zip(each, v, strict=True):
        torch.testing.assert_close(one, units.standardize(row, None, how), rtol=1e-12, atol=0)
    v, t = v[0], t[0]
    _, forward = torch.func.jvp(lambda v: units.standardize(v, None, how), (v,), (t,))
    _, expected = torch.func.jvp(lambda v: how.formula(v, None), (v,), (t,))
    torch.testing.assert_close(forward, expected, rtol=1e-12, atol=1e-14)


def model():
    """Every kind of unit; some orders of memory."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=4).to(memory_format=torch.channels_last),
        nn.ConvTranspose2d(8, 4, 3), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6),
        nn.Linear(6, 5),
    )  # fmt: skip
    net.register_parameter("scale", nn.Parameter(torch.randn(1, 6, 1, 1)))
    net.register_parameter("number", nn.Parameter(torch.randn(())))
    return net


def rewritten(name, net, change=lambda net: None, **options):
    """Gradients after the method, by name."""
    torch.manual_seed(4)
    for p in net.parameters():
        p.grad = torch.randn_like(p) * torch.rand(()).to(p.dtype)
    change(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    nl.gradient(name, net, **options).attach(optimizer)
    optimizer.step()
    return {n: p.grad.clone() for n, p in net.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "options"),
    [("centralization", {}), ("adaptive_clip", {}), ("adaptive_clip", {"units": "released"})],
)
def test_gradients_of_a_model(name, options, dtype):
    net = model().to(dtype)
    found = rewritten(name, net, **options)
    with nl.kernels.backend("torch"):
        expected = rewritten(name, net, **options)
    changed = 0
    for n, gradient in expected.items():
        # The torch path sums up to 36 numbers in the gradients' precision, float32 at least.
        rounding = {torch.float32: 1e-6, torch.float64: 0, torch.bfloat16: 2.0**-8}[dtype]
        atol = 2e-7 if dtype == torch.float32 else 0
        torch.testing.assert_close(found[n], gradient, rtol=rounding, atol=atol)
        changed += not torch.equal(gradient, net.get_parameter(n).grad * 0)
    assert changed


@pytest.mark.parametrize("name", ["centralization", "adaptive_clip"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_stays(name, bad):
    net = model()
    before = {}

    def spoil(net):
        net[0].weight.grad[3, 1, 2, 0] = bad
        before.update({n: p.grad.clone() for n, p in net.named_parameters()})

    found = rewritten(name, net, spoil)
    same = {n for n, g in found.items() if torch.equal(g.nan_to_num(), before[n].nan_to_num())}
    assert "0.weight" in same
    assert "1.weight" not in same


@pytest.mark.parametrize("size", [1e-38, 1e30, 3e38])
def test_squares_do_not_overflow(size):
    net = nn.Linear(50, 3)
    found = rewritten("adaptive_clip", net, lambda net: net.weight.grad.fill_(size))
    norms = net.weight.detach().double().norm(dim=1, keepdim=True).clamp(min=1e-3)
    allowed = 0.02 * norms / math.sqrt(50)
    # Two roundings to float32 at most; the smallest gradients are too short to be clipped.
    expected = torch.minimum(allowed, torch.tensor(size, dtype=torch.float64)).expand(3, 50)
    torch.testing.assert_close(found["weight"].double(), expected, rtol=3e-7, atol=0)


def test_strided_gradients_and_weights():
    net = nn.Linear(6, 4)
    wide = torch.randn(8, 6)

    def stride(net):
        net.weight.grad = wide[::2].clone()[:, torch.arange(6)]
        net.weight.grad = torch.stack([net.weight.grad, net.weight.grad], 2)[..., 0]

    found = rewritten("adaptive_clip", net, stride)["weight"]
    rows = zip(wide[::2], net.weight.detach(), found, strict=True)
    for g, w, new in rows:
        allowed = 0.02 * max(float(w.norm()), 1e-3)
        torch.testing.assert_close(new, g * min(1.0, allowed / float(g.norm())))


def test_hooks_that_change_the_order_of_what_was_saved():
    def gradients(change):
        torch.manual_seed(0)
        weight = torch.randn(5, 7, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, change):
            used = compiled.standardize(weight, None, how_of(1e-5, "inside"))
        return torch.autograd.grad(used.pow(3).sum(), weight)[0]

    torch.testing.assert_close(gradients(lambda t: t.T.contiguous().T), gradients(lambda t: t))


def test_autograd_sees_that_gradients_changed():
    net = nn.Linear(3, 2)
    net.weight.grad = torch.randn(2, 3)
    version = net.weight.grad._version
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    nl.gradient("centralization", net).attach(optimizer)
    optimizer.step()
    assert net.weight.grad._version > version


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads):
    torch.manual_seed(5)
    v = torch.randn(70, 901, requires_grad=True)
    gain = torch.rand(70, 1, requires_grad=True)
    dy = torch.randn(70, 901)

    def results():
        found = []
        for form in FORMS:
            used = units.standardize(v, gain, how_of(1e-4, form, signs="mean"))
            found += [used, *torch.autograd.grad(used, (v, gain), dy)]
        net = nn.Linear(901, 70)
        found += list(rewritten("adaptive_clip", net).values())
        return found

    torch.manual_seed(6)
    alone = results()
    before = torch.get_num_threads()
    torch.manual_seed(6)
    try:
        torch.set_num_threads(threads)
        together = results()
    finally:
        torch.set_num_threads(before)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)
