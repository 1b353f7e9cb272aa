"""Compiled kernels of deviations of any order, over blocks of samples and channels."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import normlab as nl
from kernels.kernel_cases import (
    arrange,
    away_from_kinks,
    close,
    derivatives_of_any_order,
    layout,
    run,
    same_with_threads,
    values,
)
from normlab.core.operation import LearnedEps, Scale, Standardize, consistency
from normlab.core.recovery import Affine
from normlab.core.statistics import Running
from normlab.kernels import dispatch

pytestmark = pytest.mark.skipif(
    dispatch.compiled_kernels() is None, reason=f"no compiled kernels: {dispatch.reason()}"
)

OPERATIONS = {
    "l1": Standardize(1e-5, 1.0, factor=consistency(1.0)), "l1 learned": Scale(1.0, LearnedEps()),
    "l1 scale": Scale(1.0, about="mean"), "l1 zero": Standardize(1e-5, 1.0, "zero"),
    "l2 factor": Standardize(factor=1.5), "l3": Standardize(1e-5, 3.0),
    "l3 zero": Standardize(1e-5, 3.0, "zero"), "l2.5": Standardize(1e-5, 2.5),
}  # fmt: skip
PATTERNS = {
    "batch": ("n c * -> c (n *)", {}), "instance": ("n c * -> (n c) (*)", {}),
    "layer": ("n c * -> n (c *)", {}), "group": ("n (g c) * -> (n g) (c *)", {"groups": 2}),
}  # fmt: skip
ORDERS = ("rows", "columns", "sliced", "reversed")


def layer_of(
    channels, operation, pattern="batch", activation=None, *, channel_dim=1, seed=0, affine=True
):
    text, sizes = PATTERNS[pattern]
    stored = pattern == "batch"
    layer = nl.Normalize(
        channels, text, operation=OPERATIONS[operation], channel_dim=channel_dim, **sizes,
        recovery=Affine(affine, affine, activation), statistics=Running() if stored else None,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in [*layer.parameters(), *(getattr(layer, name) for name in layer.stored_names)]:
            p.add_(0.4 * torch.rand(p.shape, generator=generator))
    return layer


@st.composite
def problems(draw):
    pattern = draw(st.sampled_from(["batch", "batch", *PATTERNS]))
    channels = draw(st.sampled_from([2, 6, 34] if pattern == "group" else [1, 3, 7, 17, 33, 129]))
    positions = draw(st.lists(st.sampled_from([1, 2, 3, 5, 7, 8, 19]), max_size=3))
    n, last = draw(st.integers(1, 7)), draw(st.booleans())
    return {
        "shape": (n, *positions, channels) if last else (n, channels, *positions),
        "channel_dim": -1 if last else 1, "pattern": pattern,
        "operation": draw(st.sampled_from(list(OPERATIONS))),
        "activation": draw(st.sampled_from([None, "relu", "silu", "tlu"])),
        "order": draw(st.sampled_from(ORDERS)), "seed": draw(st.integers(0, 99)),
        "affine": draw(st.booleans()), "train": draw(st.booleans()),
    }  # fmt: skip


def compare(problem, dtype, tolerance):
    shape, channel_dim, affine = problem["shape"], problem["channel_dim"], problem["affine"]
    layer = layer_of(
        shape[channel_dim], problem["operation"], problem["pattern"], problem["activation"],
        channel_dim=channel_dim, seed=problem["seed"], affine=affine,
    ).train(problem["train"])  # fmt: skip
    if layout(layer, shape).members < 4:
        return  # 1/D of two nearly equal members amplifies every rounding, and z of three may be 0
    x, dy = (t.to(dtype) for t in values(shape, problem["seed"], channel_dim))
    exact = copy.deepcopy(layer).double()
    layer = layer.double() if dtype == torch.float64 else layer
    if dtype != torch.float64:
        dy = away_from_kinks(exact, x, dy)  # where u is within rounding of a kink
        op = layer.operation
        if op.p == 1:
            # Where z is within rounding of 0, its sign may be any of three.
            view = layout(layer, shape).split(x.double())
            mean = view.mean(layout(layer, shape).member_dims, keepdim=True)
            if ((view - mean * (op.about == "mean")).abs() < 1e-6).any():
                return
    ours = run(layer, arrange(x, problem["order"]), arrange(dy, problem["order"]), "auto")
    close(ours, run(exact, x.double(), dy.double(), "reference"), tolerance)


@settings(max_examples=120)
@given(problems())
def test_float64(problem):
    compare(problem, torch.float64, [1e-10])  # sums in another order, and 1/D of few members


@settings(max_examples=120)
@given(problems())
def test_float32(problem):
    # A few roundings of 6e-8, through 1/D of areas of few members; gradients lose a digit more.
    compare(problem, torch.float32, [1e-5, 1e-4, 2e-5])


@settings(max_examples=80)
@given(problems())
def test_bfloat16(problem):
    # One rounding on the way out: 2^-9 of an element, 2^-8 at most by the size of the mantissa;
    # sums over elements (γ, β, τ, ε) and buffers are in float32 inside.
    compare(problem, torch.bfloat16, [2**-8, 2**-8, 1e-4])


@pytest.mark.parametrize("order", ["rows", "columns"])
def test_relative_to_a_cancelling_mean(order):
    """A mean of 10⁴ deviations: what float32 holds of x is kept."""
    x = torch.randn(16, 3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x, dy = (x + 1e4).float(), torch.randn(16, 3, 40, generator=torch.Generator().manual_seed(2))
    layer = layer_of(3, "l1")
    ours = run(layer, arrange(x, order), arrange(dy, order), "auto")
    exact = run(copy.deepcopy(layer).double(), x.double(), dy.double(), "reference")
    # μ is kept in float32 for the backward pass: 5e-4 of a deviation, by which z may change sign.
    close(ours, exact, [4e-6, 2e-3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite(bad, order, dtype):
    """NaN and infinities reach the elements that they reach in the plain formulas."""
    for operation in ("l1", "l1 scale", "l2 factor", "l3"):
        for train in (True, False):
            layer = layer_of(6, operation, activation="silu").train(train)
            layer = layer.double() if dtype == torch.float64 else layer
            x, dy = values((3, 6, 67), 3, 1)
            x[2, 3, 33] = bad
            x, dy = (arrange(t.to(dtype), order) for t in (x, dy))
            ours, plain = (run(layer, x, dy, backend) for backend in ("auto", "torch"))
            for i, (a, b) in enumerate(zip(ours, plain, strict=True)):
                assert torch.equal(a.isfinite(), b.isfinite()), (operation, train, i)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads):
    """Bit for bit: pieces and the order of their sums depend on the shape alone."""

    def results():
        found = []
        for pattern in PATTERNS:
            for shape in [(6, 34, 9, 11), (70, 40), (3, 20, 3000)]:
                if pattern == "instance" and len(shape) == 2:
                    continue  # areas of one member
                for order in ("rows", "columns"):
                    layer = layer_of(shape[1], "l1", pattern, "silu")
                    x, dy = (arrange(t.float(), order) for t in values(shape, 1, 1))
                    found += run(layer, x, dy, "auto")
        return found

    same_with_threads(results, threads)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_derivatives_of_any_order(operation, channel_dim):
    layer = layer_of(3, operation, activation="silu", channel_dim=channel_dim).double()
    shape = (2, 3, 4) if channel_dim == 1 else (2, 4, 3)
    # Seed 1 has no member near its mean or zero, where |z| has no derivative.
    x = values(shape, 1, channel_dim)[0].requires_grad_()
    derivatives_of_any_order(layer, x)


def test_a_member_at_the_mean():
    """sign 0 is 0: members exactly at the mean push nothing."""
    x = torch.tensor([[-2.0], [0.0], [0.0], [2.0]], dtype=torch.float64)
    layer, dy = layer_of(1, "l1").double(), torch.tensor([[0.5], [1.0], [-3.0], [2.0]]).double()
    close(run(layer, x, dy, "auto"), run(layer, x, dy, "torch"), [1e-12])  # few roundings


def test_which_are_served():
    l1 = nl.norm("l1_batch", 4)
    assert dispatch.covering(layout(l1, (2, 4, 3)), l1.operation, None) is not None
    largest = Scale(math.inf)
    assert dispatch.covering(layout(l1, (2, 4, 3)), largest, None) is None
    at_positions = nl.Normalize(4, "n c * -> (n *) (c)", operation=Scale(1.0))
    assert dispatch.covering(layout(at_positions, (2, 4, 3)), at_positions.operation, None) is None
