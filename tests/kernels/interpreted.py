"""The Triton kernels under Triton's interpreter, which `test_triton.py` switches on for this file.

The interpreter takes about two milliseconds a program, so shapes are small, and `plan.TILE` is made
smaller still where a case is to have several tiles. It truncates what it stores in bfloat16, where
a GPU rounds: exact comparisons are in float32.
"""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import normlab as nl
from kernels.kernel_cases import arrange, build, close, layout, values
from normlab.core.operation import Scale
from normlab.kernels import dispatch
from normlab.kernels.cpu.function import _Normalize
from normlab.kernels.triton import call, plan

# numpy, which the interpreter computes with, warns of operations on inf and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

METHODS = [
    ("batch", {}), ("batch", {"affine": False}), ("instance", {}), ("layer", {}),
    ("layer", {"over": "position"}), ("rms", {"over": "position"}), ("position", {}),
    ("group", {"groups": 2}), ("ghost_batch", {"batch_size": 2}),
    ("batch_group", {"groups": 2, "batch_size": 2}), ("rms", {}), ("rms", {"eps": 0.1}),
    ("filter_response", {"learned_eps": True}), ("variance", {}), ("mean_only_batch", {}),
    ("batch_renorm", {"rmax": 1.5, "dmax": 0.5}),
]  # fmt: skip
# Sums of up to some hundred terms in float32, held against the largest value; learned ε is a sum
# over all areas of terms that cancel.
SINGLE = (1e-5, 3e-5, 1e-4)


@pytest.fixture(params=["areas", "lines"])
def cut(request, monkeypatch):
    """Whole areas in a program, or lines in pieces, with tiles so small that there are several."""
    if request.param == "lines":
        whole = plan.areas
        monkeypatch.setattr(
            plan, "areas", lambda found, *rest: None if found.blocks else whole(found, *rest)
        )
        monkeypatch.setattr(plan, "TILE", 64)
    return request.param


def families(y):
    """The families of kernels in the graph of y."""
    nodes, found = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if getattr(node, "_forward_cls", None) is _Normalize:
            found.add(node.call[0].family)
        nodes += [n for n, _ in node.next_functions if n is not None]
    return found


def run(layer, x, dy, backend):
    layer, x = copy.deepcopy(layer), x.detach().clone().requires_grad_()
    with nl.kernels.backend(backend):
        y = layer(x)
        if backend == "triton":
            assert families(y) == {call}, "the kernels were not used"
        wanted = [x, *layer.parameters()]
        grads = torch.autograd.grad(y, wanted, dy.to(y.dtype), allow_unused=True)
    buffers = [b for b in layer.buffers() if b.is_floating_point()]
    return [y.detach(), *[g for g in grads if g is not None], *buffers]


def compare(layer, x, dy, tolerance=SINGLE):
    exact = copy.deepcopy(layer).double()
    close(run(layer, x, dy, "triton"), run(exact, x.double(), dy.double(), "reference"), tolerance)


def clear_of_kinks(layer, x, dy):
    """dy, but 0 where u is within rounding of the kink of an activation: there it may be either."""
    if layer.activation not in ("relu", "tlu"):
        return dy
    plain = copy.deepcopy(layer).double()
    plain.recovery = nl.core.recovery.Affine(plain.recovery.scale, plain.recovery.shift)
    with nl.kernels.backend("reference"), torch.no_grad():
        u = plain(x.double())
    kink = 0.0
    if layer.threshold is not None:
        shape = [1] * x.ndim
        shape[layer.channel_dim] = -1
        kink = layer.threshold.double().view(shape)
    return torch.where((u - kink).abs() < 1e-4, 0.0, dy.double()).to(dy.dtype)


ORDERS = ["rows", "columns", "sliced"]


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_each_method(name, options, cut):
    if cut == "lines" and "position" in (name, options.get("over")):
        pytest.skip("positions are whole areas always")
    for (channel_dim, order), activation in zip(
        [(1, "rows"), (1, "columns")], ["silu", "tlu"], strict=True
    ):
        layer = build(name, options, 4, activation, channel_dim)
        x, dy = values((4, 4, 2, 5), 0, channel_dim)
        x = arrange(x.float(), order)
        compare(layer, x, clear_of_kinks(layer, x, dy.float()))


@pytest.mark.parametrize("name", ["batch", "filter_response", "batch_renorm"])
def test_stored_statistics(name, cut):
    layer = build(name, {}, 4).eval()
    x, dy = values((4, 4, 10), 0, 1)
    compare(layer, x.float(), clear_of_kinks(layer, x, dy.float()))


@st.composite
def problems(draw):
    name, options = draw(st.sampled_from(METHODS))
    channels = draw(st.sampled_from([2, 4, 6] if "groups" in options else [1, 3, 5, 8]))
    positions = draw(st.lists(st.sampled_from([1, 2, 4, 7]), max_size=2))
    last = draw(st.booleans())
    n = draw(st.integers(2, 5))
    shape = (n, *positions, channels) if last else (n, channels, *positions)
    activation = draw(st.sampled_from([None, "relu", "silu", "tlu"]))
    return name, options, activation, channels, shape, -1 if last else 1


@settings(max_examples=20, deadline=None, derandomize=True)
@given(problems(), st.sampled_from(ORDERS), st.booleans(), st.integers(0, 9))
def test_any_shape(problem, order, training, seed):
    name, options, activation, channels, shape, channel_dim = problem
    layer = build(name, options, channels, activation, channel_dim, seed).train(training)
    # Areas of two or fewer differ from their mean by rounding alone, or are refused.
    if layout(layer, shape).members < 3 or shape[0] < 2 * (layer.batch_size or 1):
        return
    x, dy = values(shape, seed, channel_dim)
    x = arrange(x.float(), order)
    compare(layer, x, clear_of_kinks(layer, x, dy.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["batch", "filter_response", "position"])
def test_half_precision(name, dtype, cut):
    layer = build(name, {}, 6, channel_dim=1).to(dtype)
    x, dy = values((4, 6, 3, 5), 1, 1)
    # Parameters and buffers are rounded to the dtype once, y and gradients too, by truncation here.
    eps = 2 * torch.finfo(dtype).eps
    x, dy = x.to(dtype), dy.to(dtype)
    compare(layer, x, clear_of_kinks(layer, x, dy), (eps, eps, 2 * eps))


@pytest.mark.parametrize("name", ["batch", "instance", "group", "layer"])
def test_a_mean_far_from_zero(name, cut):
    layer = build(name, {"groups": 2} if name == "group" else {}, 4)
    x, dy = values((2, 4, 24), 2, 1)
    x = (x + 1e4).float()
    # The mean is a float32: half a unit in its last place, 5e-4, is what y may be off by.
    compare(layer, x, dy.float(), (1e-3, 1e-3, 1e-3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_values_stay_in_their_area(value, cut):
    layer = build("instance", {}, 3)
    x, dy = values((2, 3, 40), 3, 1)
    x = x.float()
    x[0, 1, 7] = value
    found = run(layer, x, dy.float(), "triton")
    exact = run(copy.deepcopy(layer).double(), x.double(), dy.double(), "reference")
    for ours, theirs in zip(found, exact, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert found[0][0, 1].isnan().all()


def test_one_number_scaled_by_itself(cut):
    layer = build("filter_response", {"activation": None}, 3)
    x, dy = values((4, 3, 1, 1), 4, 1)
    compare(layer, x.float(), dy.float())


def test_squares_about_the_mean_of_what_is_not_shifted(cut):
    layer = nl.Normalize(4, "n c * -> c (n *)", operation=Scale(about="mean", eps=1e-5))
    x, dy = values((3, 4, 20), 5, 1)
    compare(layer, x.float(), dy.float())


def test_the_second_derivative(cut):
    layer = build("instance", {}, 2).float()
    x, _ = values((2, 2, 8), 6, 1)

    def second(layer, x, backend):
        with nl.kernels.backend(backend):
            x = x.clone().requires_grad_()
            (first,) = torch.autograd.grad((layer(x) ** 3).sum(), x, create_graph=True)
            return torch.autograd.grad(first.pow(2).sum(), x)[0]

    close([second(layer, x.float(), "triton")], [second(layer.double(), x, "reference")], (1e-4,))


def test_repeated_runs_are_equal_bit_for_bit(cut):
    layer = build("batch", {}, 6)
    x, dy = values((4, 6, 3, 5), 7, 1)
    for a, b in zip(*(run(layer, x.float(), dy.float(), "triton") for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_addresses_of_64_bits(cut, monkeypatch):
    monkeypatch.setattr(call, "WIDE", 1)
    for name, channel_dim in itertools.product(("batch", "instance", "position"), (1, -1)):
        layer = build(name, {}, 4, channel_dim=channel_dim)
        x, dy = values((3, 4, 5) if channel_dim == 1 else (3, 5, 4), 8, channel_dim)
        compare(layer, x.float(), dy.float())


def test_the_processor_keeps_its_own_kernels():
    """Only where Triton is asked for by name does it interpret."""
    layer = build("batch", {}, 4)
    y = layer(torch.randn(3, 4, 5))
    assert call not in families(y)
    assert families(y) or dispatch.compiled_kernels() is None


def test_what_is_not_covered_falls_back():
    layer = build("batch", {}, 4).double()
    with nl.kernels.backend("triton"):
        assert call not in families(layer(torch.randn(3, 4, 5).double()))
