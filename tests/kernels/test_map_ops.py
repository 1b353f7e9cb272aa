"""Curves of maps as operations of torch: what `torch.compile` and `torch.export` make of them."""

import copy
import io

import pytest
import torch
from torch import nn

import normlab as nl
from activations.cases import sample
from kernels.kernel_cases import build
from kernels.traced import TIGHT, inputs, leaf, quiet, traced, train  # noqa: F401 (a fixture)
from normlab.kernels import dispatch
from normlab.kernels.cpu import map_ops, ops  # noqa: F401 (which registers moments)

pytestmark = pytest.mark.skipif(
    dispatch.compiled_kernels() is None, reason=f"no compiled kernels: {dispatch.reason()}"
)
SHAPE = (4, 6, 5, 3)
CURVES = {"line": 2, "larger": 5}
LAYERS = [
    ("evonorm_s0", {"groups": 2}), ("evonorm_s0", {"groups": 1, "affine": False, "bessel": True}),
    ("evonorm_b0", {}), ("evonorm_b0", {"affine": False}),
    ("switchable", {}), ("switchable", {"over": ("layer", "instance"), "affine": False}),
    ("batch_instance", {}), ("task", {}), ("representative_batch", {}), ("batch_channel", {}),
]  # fmt: skip
normlab = torch.ops.normlab


def numbers(x, curve, channel_dim=1):
    """μ and coefficients of every map, those of a maximum such that it is met from both sides."""
    shape = x.shape[0], x.shape[channel_dim]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, *rest = (sample(shape, seed=i, dtype=wide) for i in range(1, 2 + CURVES[curve]))
    if curve == "larger":
        rest[3], rest[4] = rest[3].abs() + 0.5, rest[4].abs() + 0.5
    return mean, torch.stack(rest)


def passes(x, curve, channel_dim=1):
    """Each operation with its arguments, x among them."""
    mean, coefficients = numbers(x, curve, channel_dim)
    given = (x, mean, coefficients, curve, channel_dim)
    dy, (k, h) = x.cos().contiguous(), coefficients[:2].sin().unbind()
    return {
        "apply": given,
        "sums": (dy, *given),
        "gradient": (dy, k, h, *given),
        "directly": (dy, None, None, *given),
    }


def called(name, arguments):
    return getattr(normlab, f"maps_{name}".replace("directly", "gradient"))(*arguments)


@pytest.mark.parametrize("curve", CURVES)
def test_opcheck(curve):
    """Schemas, shapes, dtypes and strides as announced, and the registration of the gradient."""
    for x in inputs(SHAPE):
        given = passes(x, curve)
        for name in ("sums", "gradient"):
            torch.library.opcheck(getattr(normlab, f"maps_{name}").default, given[name])
        _, mean, coefficients, *rest = given["apply"]
        leaves = (leaf(x), leaf(mean), leaf(coefficients), *rest)
        torch.library.opcheck(normlab.maps_apply.default, leaves)
        assert normlab.maps_apply(*given["apply"]).stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("curve", CURVES)
def test_without_kernels_they_compute_the_same(curve, channel_dim, monkeypatch):
    """A saved program may be loaded where none were built."""
    x = sample(SHAPE).movedim(1, channel_dim)
    arguments = passes(x, curve, channel_dim)
    fast = {name: called(name, given) for name, given in arguments.items()}
    monkeypatch.setattr(map_ops, "present", lambda: False)
    torch.testing.assert_close(fast, {n: called(n, g) for n, g in arguments.items()}, **TIGHT)


@pytest.mark.parametrize("curve", CURVES)
def test_derivatives_of_any_order(curve):
    x = leaf(sample((2, 4, 3)))
    mean, coefficients = (leaf(t) for t in numbers(x, curve))

    def y(*tensors):
        return normlab.maps_apply(*tensors, curve, 1)

    given = (x, mean, coefficients)
    assert torch.autograd.gradcheck(y, given)
    assert torch.autograd.gradgradcheck(y, given)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({1: None}, "about the mean"), ({1: torch.ones(4, 5)}, r"\(4, 6\)"),
        ({2: torch.ones(3, 4, 6)}, r"\(2, 4, 6\)"), ({2: torch.ones(2, 4, 6).double()}, "float32"),
    ],
)  # fmt: skip
def test_numbers_of_other_shapes_are_errors(change, match):
    """Memory past their end is not read."""
    given = list(passes(sample(SHAPE, dtype=torch.float32), "line")["apply"])
    for i, other in change.items():
        given[i] = other
    with pytest.raises(RuntimeError, match=match):
        normlab.maps_apply(*given)


NAMES = ["evonorm_s0", "evonorm_b0", "switchable"]


def operation(name):
    """Of the graph: S0's statistics are of areas, and it no curve of single maps."""
    return "normlab.normalize" if name == "evonorm_s0" else "normlab.maps_apply"


def compare(name, options, x, channel_dim, training, tolerance):
    """Compiled and eager: y, gradients and buffers."""
    eager = build(name, options, 6, channel_dim=channel_dim).to(x.dtype).train(training)
    layer, x = copy.deepcopy(eager), x.movedim(1, channel_dim)
    compiled, seen = traced(layer)
    fast, plain = train(compiled, layer, x), train(eager, eager, x)
    assert fast[0].stride() == plain[0].stride()
    torch.testing.assert_close(fast, plain, **tolerance)
    assert operation(name) in seen


@pytest.mark.parametrize(("channel_dim", "training"), [(1, True), (-1, False)])
@pytest.mark.parametrize(("name", "options"), LAYERS)
def test_compiled_layers_are_eager_layers(name, options, channel_dim, training):
    """The same kernels in both, and beside them the middle's few operations."""
    compare(name, options, sample(SHAPE), channel_dim, training, TIGHT)


# Sums of the middle in another order; in bfloat16, one rounding of elements that differ by those.
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, {"rtol": 1e-5, "atol": 1e-5}),
        (torch.bfloat16, {"rtol": 2**-7, "atol": 1e-5}),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_in_columns_of_less_precision(name, dtype, tolerance):
    x = sample(SHAPE, dtype=dtype).to(memory_format=torch.channels_last)
    compare(name, {}, x, 1, True, tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_one_graph_for_many_shapes(name):
    eager = build(name, {}, 6).double()
    layer = copy.deepcopy(eager)
    compiled, seen = traced(layer, dynamic=True)
    for seed, shape in enumerate([(4, 6, 5, 3), (8, 6, 4, 7), (3, 6, 9, 2)]):
        x = sample(shape, seed=seed)
        torch.testing.assert_close(train(compiled, layer, x), train(eager, eager, x), **TIGHT)
    assert operation(name) in seen


@pytest.mark.parametrize("frozen", [["x"], ["v"], ["weight", "bias"], ["x", "v"]])
@pytest.mark.parametrize(("name", "options"), [("evonorm_s0", {"groups": 2}), ("evonorm_b0", {})])
def test_gradients_that_are_not_asked_for(name, options, frozen):
    outcomes = []
    for compile_it in (False, True):
        layer = build(name, options, 6).double()
        given = {"x": sample(SHAPE), **dict(layer.named_parameters())}
        for key, tensor in given.items():
            tensor.requires_grad_(key not in frozen)
        step = traced(layer)[0] if compile_it else layer
        step(given["x"]).pow(3).sum().backward()
        outcomes.append({key: tensor.grad for key, tensor in given.items()})
    plain, fast = outcomes
    assert [k for k, g in fast.items() if g is None] == [k for k, g in plain.items() if g is None]
    torch.testing.assert_close(fast, plain, **TIGHT)


def test_beside_other_layers_the_stored_variance_is_that_before_the_update():
    """B0 reads what it stores where told so, and writes it in the same pass."""
    eager = nn.Sequential(nn.Conv2d(6, 6, 1), build("evonorm_b0", {}, 6), nn.Conv2d(6, 6, 1))
    eager.double()[1].use, eager[1].update = "stored", True
    net = copy.deepcopy(eager)
    compiled, seen = traced(net)
    for seed in range(2):
        x = 3 * sample(SHAPE, seed=seed) + 1
        torch.testing.assert_close(train(compiled, net, x), train(eager, eager, x), **TIGHT)
    assert "normlab.maps_apply" in seen


@pytest.mark.parametrize("name", NAMES)
def test_programs_hold_them_only_where_asked_for(name):
    """And differentiate them, each by itself."""
    layer = build(name, {}, 6).double().eval()
    batch = ({0: torch.export.Dim("samples", min=2, max=64)},)

    def exported():
        return torch.export.export(layer, (sample(SHAPE),), dynamic_shapes=batch)

    plain = exported()
    with nl.kernels.backend("cpu"):
        ours = exported()
    file = io.BytesIO()
    torch.export.save(ours, file)
    file.seek(0)
    z = sample((7, 6, 5, 3), seed=3)
    wanted = [leaf(z), *layer.parameters()]
    y = layer(wanted[0])
    expected = [y, *torch.autograd.grad(y.pow(3).sum(), wanted)]
    for program, holds in ((plain, False), (ours, True), (torch.export.load(file), True)):
        names = {str(node.target) for node in program.graph.nodes}
        assert any(n.startswith(operation(name)) for n in names) == holds
        module = program.module()
        parameters = dict(module.named_parameters())
        wanted = [leaf(z), *(parameters[key] for key, _ in layer.named_parameters())]
        y = module(wanted[0])
        found = [y, *torch.autograd.grad(y.pow(3).sum(), wanted)]
        torch.testing.assert_close(found, expected, **TIGHT)


@pytest.mark.parametrize("name", ["evonorm_s0", "evonorm_b0"])
def test_programs_for_any_number_of_positions(name):
    """Bessel's correction depends on it, and is no constant of the program."""
    layer = build(name, {"bessel": True}, 6).double().eval()
    x, sizes = sample((4, 6, 5)), {0: torch.export.Dim("n", min=2), 2: torch.export.Dim("p", min=2)}
    with nl.kernels.backend("cpu"):
        program = torch.export.export(layer, (x,), dynamic_shapes=(sizes,), strict=True)
    assert any(str(n.target).startswith(operation(name)) for n in program.graph.nodes)
    for shape in ((4, 6, 5), (3, 6, 9)):
        z = sample(shape, seed=3)
        torch.testing.assert_close(program.module()(z), layer(z), **TIGHT)
