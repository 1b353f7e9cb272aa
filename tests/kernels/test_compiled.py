"""The compiled CPU kernels against the plain formulas in float64."""

import copy
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import normlab as nl
from kernels.kernel_cases import (
    arrange,
    away_from_kinks,
    build,
    close,
    layout,
    run,
    same_with_threads,
    values,
)
from normlab.core.operation import Scale, Standardize
from normlab.core.recovery import Affine
from normlab.kernels import dispatch
from normlab.kernels.cpu import function, library

pytestmark = pytest.mark.skipif(
    dispatch.compiled_kernels() is None, reason=f"no compiled kernels: {dispatch.reason()}"
)

# Name, options, and the activations that may be fused.
METHODS = [
    ("batch", {}), ("batch", {"affine": False}), ("instance", {}), ("layer", {}),
    ("group", {"groups": 2}), ("ghost_batch", {"batch_size": 3}),
    ("batch_group", {"groups": 2, "batch_size": 3}), ("rms", {}), ("rms", {"eps": 0.1}),
    ("filter_response", {"learned_eps": True}), ("filter_response", {"activation": None}),
    ("variance", {}), ("mean_only_batch", {}), ("batch_renorm", {"rmax": 1.5, "dmax": 0.5}),
]  # fmt: skip


@st.composite
def problems(draw):
    name, options = draw(st.sampled_from(METHODS))
    activation = draw(st.sampled_from([None, "relu", "silu", "tlu"]))
    grouped = "groups" in options
    channels = draw(st.sampled_from([2, 4, 6, 34, 130] if grouped else [1, 2, 3, 7, 17, 33, 129]))
    n = draw(st.integers(1, 7))
    positions = draw(st.lists(st.sampled_from([1, 2, 3, 5, 7, 8, 19]), max_size=3))
    last = draw(st.booleans())
    order = draw(st.sampled_from(["rows", "columns", "sliced", "reversed"]))
    train = draw(st.booleans())
    seed = draw(st.integers(0, 99))
    shape = (n, *positions, channels) if last else (n, channels, *positions)
    return name, options, activation, channels, shape, -1 if last else 1, order, train, seed


def one_member(layer, shape):
    """Whether areas have one member: that is refused, warned of, or the output constant."""
    if layer.batch_size:
        return shape[0] < 2 * layer.batch_size
    members, op = layout(layer, shape).members, layer.operation
    # Without a mean, the gradient of a single member is ε/(M + ε), with nothing to cancel.
    single = members == 1 and not op.uses_mean and layer.weight is not None
    return members < 3 and not single


def compare(problem, dtype, tolerance):
    name, options, activation, channels, shape, channel_dim, order, train, seed = problem
    layer = build(name, options, channels, activation, channel_dim, seed).train(train)
    x, dy = values(shape, seed, channel_dim)
    if one_member(layer, shape) or (dtype == torch.float64 and layout(layer, shape).members < 3):
        return  # in float64 the plain formula itself loses digits there
    x, dy = x.to(dtype), dy.to(dtype)
    exact = copy.deepcopy(layer).double()
    layer = layer.double() if dtype == torch.float64 else layer
    if dtype == torch.float32:  # where u is within rounding of a kink
        dy = away_from_kinks(exact, x, dy)
    ours = run(layer, arrange(x, order), arrange(dy, order), "auto")
    close(ours, run(exact, x.double(), dy.double(), "reference"), tolerance)


@settings(max_examples=150)
@given(problems())
def test_float64(problem):
    # Sums of at most 50000 terms in another order; ε = 1e-6 amplifies where areas are nearly
    # constant (three members).
    compare(problem, torch.float64, [1e-10])


@settings(max_examples=150)
@given(problems())
def test_float32(problem):
    # y and the statistics: a few roundings of 6e-8. Gradients: areas of few members, whose
    # deviation may by chance be a tenth of the values, lose a digit in 1/D.
    compare(problem, torch.float32, [4e-6, 2e-5])


@settings(max_examples=100)
@given(problems())
def test_bfloat16(problem):
    if problem[2] in ("relu", "tlu") or problem[0] == "filter_response":
        problem = (*problem[:2], None, *problem[3:])
    if problem[0] == "filter_response":  # whose TLU has the kink
        problem = (problem[0], {"activation": None}, *problem[2:])
    # One rounding on the way out, 2^-9 of an element, 2^-8 at most by the size of the mantissa;
    # sums over elements (γ, β, buffers) are in float32 inside.
    compare(problem, torch.bfloat16, [2**-8, 2**-8, 2e-5])


def test_relative_to_a_cancelling_mean():
    """A mean of 10⁴ deviations: what float32 holds of x is kept."""
    x = torch.randn(16, 3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = (x + 1e4).float()
    dy = torch.randn(x.shape)
    for order in ("rows", "columns"):
        for name in ("batch", "instance", "layer"):
            layer = build(name, {}, 3)
            ours = run(layer, arrange(x, order), dy, "auto")
            exact = run(copy.deepcopy(layer).double(), x.double(), dy.double(), "reference")
            # μ is kept in float32 for the backward pass: 6e-8·10⁴ of a deviation.
            close(ours, exact, [4e-6, 1.2e-3])


@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("name", ["batch", "instance", "layer", "mean_only_batch"])
@pytest.mark.parametrize("first", [-1e5, 1e19])
def test_an_area_that_begins_far_from_its_mean(first, name, order):
    """Moments are taken about the first element, where all digits of the others would be lost.

    Or where sums of squares about it overflow, though the variance does not.
    """
    x = torch.randn(2, 2, 150, 170, generator=torch.Generator().manual_seed(5))
    x[0, 0, 0, 0] = x[1, :, 0, 0] = first
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(6))
    layer = build(name, {}, 2)
    ours = run(layer, arrange(x, order), arrange(dy, order), "auto")
    exact = run(copy.deepcopy(layer).double(), x.double(), dy.double(), "reference")
    close(ours, exact, [4e-6, 2e-5])  # as in test_float32


@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("shape", [(1, 1, 2**21), (2, 3, 700, 700)])
def test_long_sums(shape, order):
    """Sums over millions of members do not drift: partial sums go to double."""
    g = torch.Generator().manual_seed(2)
    x = torch.rand(shape, generator=g) + 0.5
    dy = torch.rand(shape, generator=g) + x  # correlated, so that the sum for γ does not cancel
    for name in ("batch", "rms"):
        layer = build(name, {}, shape[1])
        ours = run(layer, arrange(x, order), arrange(dy, order), "auto")
        exact = run(copy.deepcopy(layer).double(), x.double(), dy.double(), "reference")
        close(ours, exact, [1e-6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "silu", "tlu"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite(bad, activation, train, channel_dim, dtype):
    """NaN and infinities reach the elements that they reach in the plain formulas."""
    for name, options in METHODS:
        layer = build(name, options, 6, activation, channel_dim).train(train)
        layer = layer.double() if dtype == torch.float64 else layer
        shape = (6, 6, 35) if channel_dim == 1 else (6, 35, 6)
        x, dy = values(shape, 3, channel_dim)
        x[2, 3, 3] = bad
        x, dy = x.to(dtype), dy.to(dtype)
        ours, plain = (run(layer, x, dy, backend) for backend in ("auto", "reference"))
        for i, (a, b) in enumerate(zip(ours, plain, strict=True)):
            assert torch.equal(a.isnan(), b.isnan()), (name, i)
            assert torch.equal(a.isinf(), b.isinf()), (name, i)
            assert torch.equal(a[a.isinf()], b[b.isinf()]), (name, i)


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("activation", [None, "relu", "silu", "tlu"])
@pytest.mark.parametrize("pattern", ["c (n *)", "(n c) (*)", "n (c *)", "(n *) (c)"])
def test_a_constant_area_without_eps(pattern, activation, channel_dim):
    """1/D is infinite there, and where no mean is subtracted, so is x/D."""
    layer = nl.Normalize(
        3, f"n c * -> {pattern}", operation=Scale(about="mean", eps=0.0),
        recovery=Affine(True, True, activation), channel_dim=channel_dim,
    )  # fmt: skip
    for value in (1.5, 0.1, -3.0, 0.0):
        x = torch.full((2, 3, 5) if channel_dim == 1 else (2, 5, 3), value)
        with nl.kernels.backend("torch"):
            expected = layer(x)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_silu_everywhere(dtype):
    """Over the whole range, from where exp overflows to where it vanishes."""
    u = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([-1e30, -3e38, 1e30, 3e38])])
    u = torch.cat([u, torch.tensor([0.0, -0.0, 1e-30, float("inf"), float("-inf")])]).to(dtype)
    layer = nl.BatchNorm(1, activation="silu", eps=0.0, affine=False).to(dtype).eval()
    x = u.view(-1, 1).clone().requires_grad_()
    y = layer(x)
    (g,) = torch.autograd.grad(y.sum(), x)
    z = u.double().requires_grad_()
    t = torch.nn.functional.silu(z)
    (h,) = torch.autograd.grad(t.sum(), z)
    error = (y.view(-1).double() - t).abs().detach()
    if dtype == torch.float32:
        # exp to 3 ulp, and |u|/2 more from rounding the exponent; where it underflows, to the
        # smallest normal numbers.
        bound = t.abs() * (3 + u.abs().clamp(max=100)) * 2**-23 + 1e-35
    else:
        bound = t.abs() * 1e-14
    assert torch.equal(y.view(-1).isnan(), t.isnan())
    finite = t.isfinite()
    assert (error <= bound)[finite].all()
    assert torch.equal(y.view(-1)[~finite & ~t.isnan()], t.to(dtype)[~finite & ~t.isnan()])
    tolerance = {"rtol": 2e-6, "atol": 1e-7} if dtype == torch.float32 else {}
    torch.testing.assert_close(g.view(-1), h.to(dtype), equal_nan=True, **tolerance)


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize(("channels", "positions"), [(4, 9000), (8, 8192), (8, 8193)])
def test_slopes_of_large_areas(channels, positions, channel_dim):
    """Slopes of SiLU are kept between two passes, unless an area has more than 65536 elements."""
    layer = nl.GroupNorm(1, channels, activation="silu", channel_dim=channel_dim)
    shape = (1, channels, positions) if channel_dim == 1 else (1, positions, channels)
    x, dy = (t.float() for t in values(shape, 3, channel_dim))
    ours = run(layer, x, dy, "auto")
    exact = run(copy.deepcopy(layer).double(), x.double(), dy.double(), "reference")
    close(ours, exact, [1e-5])  # sums of 65536 terms in float32, as in the tests above


def test_bfloat16_is_rounded_to_the_nearest():
    layer = nl.BatchNorm(1, eps=0.0).eval()
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]
    with torch.no_grad():
        layer.weight.fill_(1.00371)
    y = layer(every.view(-1, 1)).view(-1)
    expected = (every.float() * layer.weight).bfloat16()
    normal = expected.abs() >= torch.finfo(torch.bfloat16).tiny
    assert torch.equal(y[normal], expected[normal].detach())


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads):
    """Bit for bit: pieces and the order of their sums depend on the shape alone."""
    cases = [
        (name, options, shape, order)
        for name, options in METHODS
        for shape in [(6, 34, 9, 11), (7, 4), (3, 2, 3000), (1, 6, 50), (75, 4, 3)]
        for order in ("rows", "columns")
        if not (len(shape) == 2 and name == "instance")
    ]

    def results():
        found = []
        for name, options, shape, order in cases:
            if shape[0] < 6 and "batch_size" in options:
                continue
            layer = build(name, options, shape[1])
            x, dy = values(shape, 1, 1)
            found += run(layer, arrange(x.float(), order), arrange(dy.float(), order), "auto")
        return found

    same_with_threads(results, threads)


def test_a_thread_that_has_not_used_torch_yet():
    """Torch gives OpenMP its number of threads when it first works in a thread; so do kernels."""
    layer, x = nl.BatchNorm(4), torch.randn(8, 4, 9)
    before, found = torch.get_num_threads(), []

    def work():
        layer(x)
        found.append(library.load()[0].omp_get_max_threads())

    try:
        torch.set_num_threads(3)
        thread = Thread(target=work)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert found == [3]


def test_one_pool_of_threads():
    """The kernels' OpenMP is torch's own, so that `torch.set_num_threads` rules both."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc")
    code = (  # in a process of its own: other libraries of the tests bring pools of theirs
        "import torch, normlab as nl; nl.BatchNorm(2)(torch.randn(4, 2));"
        "print(len({l.split()[-1] for l in open('/proc/self/maps')"
        " if 'omp.so' in l or 'omp-' in l}))"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert ran.stdout.split() == ["1"], ran.stderr


def test_what_is_remembered_of_a_shape_does_not_grow_with_steps():
    x = torch.randn(4, 6, 5)
    layer = nl.Normalize(6, "n c * -> n (c *)", operation=Standardize())
    sizes = []
    for step in range(600):
        layer.operation = Standardize(eps=1e-5 * (step + 1))
        y = layer(x)
        sizes.append(len(layout(layer, x.shape).memo))
    assert 2 < max(sizes) <= function._MOST
    with nl.kernels.backend("reference"):
        torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 6, 5), (4, 6, 0), (0, 6)])
def test_empty(shape, dtype):
    for name, options in METHODS:
        layer, x = build(name, options, 6), torch.zeros(shape, dtype=dtype, requires_grad=True)
        y = layer(x)
        assert y.shape == x.shape
        y.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())
