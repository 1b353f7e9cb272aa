"""Compiled kernels of areas that are runs of channels at single positions."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import normlab as nl
from kernels.kernel_cases import (
    arrange,
    away_from_kinks,
    close,
    forward_mode,
    run,
    same_with_threads,
    values,
)
from normlab.core.operation import Center, LearnedEps, Scale, Standardize
from normlab.core.recovery import Affine
from normlab.core.statistics import Running
from normlab.kernels import dispatch
from normlab.kernels.cpu.lines import channels_of_area

pytestmark = pytest.mark.skipif(
    dispatch.compiled_kernels() is None, reason=f"no compiled kernels: {dispatch.reason()}"
)

WHOLE, GROUPED = "n c * -> (n *) (c)", "n (g c) * -> (n g *) (c)"
OPERATIONS = {
    "standardize": Standardize(1e-5), "rms": Scale(2.0, 1e-6), "learned": Scale(eps=LearnedEps()),
    "center": Center(), "deviation": Scale(about="mean"), "shift": Standardize(about="zero"),
}  # fmt: skip
ORDERS = ("rows", "columns", "sliced", "reversed")


def layer_of(channels, operation, activation=None, *, channel_dim=1, groups=None, seed=0, **more):
    layer = nl.Normalize(
        channels, GROUPED if groups else WHOLE, operation=OPERATIONS[operation], groups=groups,
        channel_dim=channel_dim, **{"recovery": Affine(activation=activation)} | more,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in [*layer.parameters(), *(getattr(layer, name) for name in layer.stored_names)]:
            p.add_(0.4 * torch.rand(p.shape, generator=generator))
    return layer


@st.composite
def problems(draw):
    groups = draw(st.sampled_from([None, None, 1, 2]))
    channels = draw(
        st.sampled_from([4, 6, 8, 34, 64, 130, 258] if groups else [3, 5, 16, 17, 33, 65, 200])
    )
    positions = draw(st.lists(st.sampled_from([1, 2, 3, 5, 7, 8, 19, 70]), max_size=2))
    n, last = draw(st.integers(1, 5)), draw(st.booleans())
    return {
        "shape": (n, *positions, channels) if last else (n, channels, *positions),
        "channel_dim": -1 if last else 1, "groups": groups,
        "operation": draw(st.sampled_from(list(OPERATIONS))),
        "activation": draw(st.sampled_from([None, "relu", "silu", "tlu"])),
        "order": draw(st.sampled_from(ORDERS)), "seed": draw(st.integers(0, 99)),
        "affine": draw(st.booleans()), "stored": draw(st.booleans()),
    }  # fmt: skip


def compare(problem, dtype, tolerance):
    shape, channel_dim = problem["shape"], problem["channel_dim"]
    affine, activation = problem["affine"], problem["activation"]
    stored = problem["stored"] and problem["operation"] == "standardize"
    layer = layer_of(
        shape[channel_dim], problem["operation"], channel_dim=channel_dim, groups=problem["groups"],
        seed=problem["seed"], recovery=Affine(affine, affine, activation),
        statistics=Running() if stored else None,
    ).train(not stored)  # fmt: skip
    x, dy = (t.to(dtype) for t in values(shape, problem["seed"], channel_dim))
    members = layer.num_channels // (problem["groups"] or 1)
    if members < 3:
        return  # 1/D of two nearly equal members amplifies every rounding
    exact = copy.deepcopy(layer).double()
    layer = layer.double() if dtype == torch.float64 else layer
    if dtype != torch.float64:  # where u is within rounding of a kink
        dy = away_from_kinks(exact, x, dy)
    ours = run(layer, arrange(x, problem["order"]), arrange(dy, problem["order"]), "auto")
    close(ours, run(exact, x.double(), dy.double(), "reference"), tolerance)


@settings(max_examples=150)
@given(problems())
def test_float64(problem):
    compare(problem, torch.float64, [1e-10])  # sums in another order, and 1/D of few members


@settings(max_examples=150)
@given(problems())
def test_float32(problem):
    # y: a few roundings of 6e-8, times x/D of areas of few members. Gradients: the same through
    # 1/D, whose smallest D may be a twentieth of the largest.
    compare(problem, torch.float32, [1e-5, 1e-4, 2e-5])


@settings(max_examples=100)
@given(problems())
def test_bfloat16(problem):
    # One rounding on the way out: 2^-9 of an element, 2^-8 at most by the size of the mantissa;
    # sums over elements (γ, β, τ, ε) are in float32 inside.
    compare(problem, torch.bfloat16, [2**-8, 2**-8, 1e-4])


def test_relative_to_a_cancelling_mean():
    """A mean of 10⁴ deviations: what float32 holds of x is kept."""
    x = torch.randn(4, 40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x, dy = (x + 1e4).float(), torch.randn(4, 40, 6, generator=torch.Generator().manual_seed(2))
    for order in ("rows", "columns"):
        layer = layer_of(40, "standardize")
        ours = run(layer, arrange(x, order), dy, "auto")
        exact = run(copy.deepcopy(layer).double(), x.double(), dy.double(), "reference")
        # μ is kept in float32 for the backward pass: 6e-8·10⁴ of a deviation.
        close(ours, exact, [4e-6, 1.2e-3])


@pytest.mark.parametrize("order", ["rows", "columns"])
def test_long_sums(order):
    """Areas of many channels, and sums over many positions, do not drift."""
    g = torch.Generator().manual_seed(2)
    for shape in [(1, 100_003, 2), (2, 5, 200_000)]:
        x = torch.rand(shape, generator=g) + 0.5
        dy = torch.rand(shape, generator=g) + x  # correlated, so that no sum cancels
        layer = layer_of(shape[1], "rms")
        ours = run(layer, arrange(x, order), arrange(dy, order), "auto")
        exact = run(copy.deepcopy(layer).double(), x.double(), dy.double(), "reference")
        close(ours, exact, [2e-6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite(bad, order, dtype):
    """NaN and infinities reach the elements that they reach in the plain formulas."""
    for operation in OPERATIONS:
        for activation in (None, "relu", "silu", "tlu"):
            for stored in (False, True):
                if stored and operation != "standardize":
                    continue
                layer = layer_of(6, operation, activation, statistics=Running() if stored else None)
                layer = layer.train(not stored).double() if dtype == torch.float64 else layer.eval()
                x, dy = values((3, 6, 67), 3, 1)
                x[2, 3, 33] = bad
                x, dy = (arrange(t.to(dtype), order) for t in (x, dy))
                ours, plain = (run(layer, x, dy, backend) for backend in ("auto", "reference"))
                for i, (a, b) in enumerate(zip(ours, plain, strict=True)):
                    assert torch.equal(a.isnan(), b.isnan()), (operation, activation, i)
                    assert torch.equal(a.isinf(), b.isinf()), (operation, activation, i)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads):
    """Bit for bit: pieces and the order of their sums depend on the shape alone."""

    def results():
        found = []
        for operation in ("standardize", "rms"):
            for shape in [(6, 34, 9, 11), (70, 40), (3, 20, 3000), (1, 1500, 50)]:
                for order in ("rows", "columns"):
                    layer = layer_of(shape[1], operation, "silu", groups=2)
                    x, dy = (arrange(t.float(), order) for t in values(shape, 1, 1))
                    found += run(layer, x, dy, "auto")
        return found

    same_with_threads(results, threads)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_derivatives_of_any_order(operation, channel_dim):
    layer = layer_of(6, operation, "silu", channel_dim=channel_dim, groups=2).double()
    shape = (2, 6, 3) if channel_dim == 1 else (2, 3, 6)
    x = values(shape, 1, channel_dim)[0].requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)
    forward_mode(layer_of(6, operation, channel_dim=channel_dim).double(), x)


def test_layer_norm_of_torch():
    """The same numbers as `torch.nn.LayerNorm`, statistics of one position each."""
    x = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(1))
    ours, theirs = nl.norm("layer", 48, channel_dim=-1), torch.nn.LayerNorm(48)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)  # float32 roundings


def test_which_areas_are_runs_of_channels():
    def found(pattern, shape, **sizes):
        layout = nl.core.partition.partition(pattern).bind(shape, sizes=sizes)
        return channels_of_area(layout)

    assert found(WHOLE, (2, 6, 5)) == 6
    assert found(GROUPED, (2, 6, 5), g=2) == 3
    assert found("n c * -> n (c *)", (2, 6)) == 6
    assert found("n c * -> n (c *)", (2, 6, 5)) is None
    assert found("n c * -> c (n *)", (2, 6)) is None
    assert found("n (c g) * -> (n g *) (c)", (2, 6, 5), c=2) is None  # channels that lie apart
    assert found("(b n) c * -> (b *) (n c)", (2, 6, 5), n=2) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 6, 5), (4, 6, 0), (0, 6)])
def test_empty(shape, dtype):
    for operation in OPERATIONS:
        layer, x = layer_of(6, operation), torch.zeros(shape, dtype=dtype, requires_grad=True)
        y = layer(x)
        assert y.shape == x.shape
        y.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())
