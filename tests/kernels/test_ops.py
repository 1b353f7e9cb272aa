"""The kernels as operations of torch: what `torch.compile` and `torch.export` make of them."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import normlab as nl
from activations.cases import sample
from kernels.kernel_cases import build
from kernels.traced import TIGHT, inputs, leaf, quiet, traced, train  # noqa: F401 (a fixture)
from normlab.core.partition import partition
from normlab.kernels import dispatch
from normlab.kernels.cpu import ops
from normlab.kernels.cpu.registered import case_of
from normlab.kernels.reference import Spec

pytestmark = pytest.mark.skipif(
    dispatch.compiled_kernels() is None, reason=f"no compiled kernels: {dispatch.reason()}"
)
CASES = [
    ("batch", {"activation": "relu"}), ("group", {"groups": 2, "activation": "silu"}),
    ("filter_response", {"learned_eps": True}), ("rms", {}), ("mean_only_batch", {}),
    ("ghost_batch", {"batch_size": 2, "affine": False}), ("l1_batch", {}), ("lp_batch", {"p": 3.0}),
]  # fmt: skip
SHAPE = (4, 6, 5, 3)


def arguments(name, options, dtype=torch.float64, channel_dim=1, shape=SHAPE):
    """γ, β, τ and ε of a layer, and what stands for its case."""
    layer = build(name, options, 6, channel_dim=channel_dim)
    sizes = layer._sizes(shape[0])
    layout = layer.partition.bind(shape, channel_dim=channel_dim, sizes=sizes)
    learned = layer.eps.detach().to(dtype) if isinstance(layer.eps, torch.Tensor) else None
    given = [layer.weight, layer.bias, layer.threshold]
    given = [None if p is None else p.detach().to(dtype) for p in given] + [learned]
    spec = Spec(layout.member_dims, layer.operation, layer.activation)
    return given, case_of(layout, spec, layer.eps if learned is None else learned)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_opcheck(name, options, added):
    """Schemas, shapes, dtypes and strides as announced, and the registration of the gradient."""
    parameters, case = arguments(name, options, torch.float32)
    for x in inputs(SHAPE):
        given = [*parameters, x.sin().contiguous() if added else None]
        normlab = torch.ops.normlab
        torch.library.opcheck(normlab.moments.default, (x, *case))
        traced = (leaf(x), *map(leaf, given), None, None, *case, True)
        torch.library.opcheck(normlab.normalize.default, traced)
        y, mean, moment = normlab.normalize(x, *given, None, None, *case, True)
        assert y.stride() == torch.empty_like(x).stride()
        used = [s if s.numel() else None for s in (mean, moment)]
        needs = [True, *(t is not None for t in given)]
        torch.library.opcheck(
            normlab.normalize_backward.default, (y.cos(), x, *given, *used, *case, True, needs)
        )
        torch.library.opcheck(
            normlab.normalize.default, (leaf(x), *map(leaf, given), *used, *case, False)
        )


@pytest.mark.parametrize("from_batch", [True, False])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_without_kernels_they_compute_the_same(name, options, from_batch, monkeypatch):
    """A saved program may be loaded where none were built."""

    def outcome():
        given, case = arguments(name, options)
        x, r = leaf(sample(SHAPE)), leaf(sample(SHAPE, seed=1))
        given = [*(leaf(t) for t in given), r]
        used = (None, None)
        if not from_batch:
            used = [m if m.numel() else None for m in torch.ops.normlab.moments(x, *case)]
        y, mean, moment = torch.ops.normlab.normalize(x, *given, *used, *case, from_batch)
        wanted = [t for t in (x, *given) if t is not None]
        return [y, mean, moment, *torch.autograd.grad((y**3).sum(), wanted)]

    fast = outcome()
    monkeypatch.setattr(ops, "_family", lambda *args: None)
    torch.testing.assert_close(fast, outcome(), **TIGHT)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_second_derivatives(name, options):
    given, case = arguments(name, options, shape=(4, 6, 3))
    x, r = leaf(sample((4, 6, 3))), leaf(sample((4, 6, 3), seed=1))
    given = [*(leaf(t) for t in given), r]

    def y(*tensors):
        return torch.ops.normlab.normalize(*tensors, None, None, *case, True)[0]

    assert torch.autograd.gradcheck(y, (x, *given))
    assert torch.autograd.gradgradcheck(y, (x, *given))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_moments_have_derivatives(name, options):
    """As an exported program differentiates them."""
    _, case = arguments(name, options, shape=(4, 6, 3))
    x = leaf(sample((4, 6, 3)))

    def moments(x):
        return [m for m in torch.ops.normlab.moments(x, *case) if m.numel()]

    assert torch.autograd.gradcheck(moments, x)
    assert torch.autograd.gradgradcheck(moments, x)


def test_parameters_of_another_length_are_errors():
    """Memory past their end is not read."""
    (_, bias, *rest), case = arguments("batch", {})
    with pytest.raises(RuntimeError, match=r"shape \(6,\)"):
        torch.ops.normlab.normalize(
            sample(SHAPE), bias.new_ones(3), bias, *rest, None, None, None, *case, True
        )


TRAINED = [
    *CASES, ("batch_renorm", {"rmax": 2.0, "dmax": 1.0, "momentum": 0.3}), ("variance", {}),
    ("layer", {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "dynamic"),
    [(*case, False) for case in TRAINED] + [(*TRAINED[i], True) for i in (0, 1, 8)],
)
def test_compiled_training_is_eager_training(name, options, dynamic):
    """The same kernels in both: equal, for several shapes and orders of memory."""
    eager = build(name, options, 6)
    layer = copy.deepcopy(eager)
    compiled, seen = traced(layer, dynamic=dynamic)
    shapes = [(4, 6, 5, 3), (8, 6, 4, 7)] if dynamic else [SHAPE]
    for seed, shape in enumerate(shapes):
        for form in (torch.contiguous_format, torch.channels_last):
            x = sample(shape, seed=seed, dtype=torch.float32).to(memory_format=form)
            fast, plain = train(compiled, layer, x), train(eager, eager, x)
            assert fast[0].stride() == plain[0].stride()
            # ε + |ε_l| is a float32 operation outside the kernels. So are r and d where compiled:
            # a few roundings, of x̂ up to 4 and gradients of γ up to 20.
            tolerance = 1e-5 if name == "batch_renorm" else 1e-6
            torch.testing.assert_close(fast, plain, rtol=tolerance, atol=tolerance)
    assert "normlab.normalize" in seen


@pytest.mark.parametrize(("name", "options"), [*TRAINED, ("evonorm_b0", {})])
def test_one_graph_for_all_sizes_of_a_batch(name, options):
    """Also of a layer that a tracer is the first to see, whose pattern nothing has read before."""
    if name == "ghost_batch":
        pytest.skip("a batch is cut into as many parts as it has sub-batches")
    partition.cache_clear()
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(build(name, options, 6), backend=backend, fullgraph=True, dynamic=True)
    for samples in (4, 7, 16):
        compiled(sample((samples, 6, 5, 3), dtype=torch.float32))
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["batch", "power", "moving_average_batch"])
def test_policies_that_read_and_update_what_is_stored(name):
    """What the forward pass read is what the backward pass has, whatever was written since."""
    for backend in ("auto", "torch"):
        torch._dynamo.reset()
        eager = build(name, {}, 6).double()
        eager.use, eager.update = "stored", True
        layer = copy.deepcopy(eager)
        compiled, _ = traced(layer)
        with nl.kernels.backend(backend):
            for seed in range(2):
                x = 3 * sample(SHAPE, seed=seed) + 1
                fast, plain = train(compiled, layer, x), train(eager, eager, x)
                torch.testing.assert_close(fast, plain, **TIGHT)


def test_autocast_and_checkpointing():
    """In half precision beside linear layers, once and again."""
    eager = nn.Sequential(nn.Linear(6, 6), build("batch", {}, 6), nn.ReLU())
    net = copy.deepcopy(eager)

    def run(net):
        def step(x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return checkpoint(net, x, use_reentrant=False)

        return step

    compiled, seen = traced(run(net))
    x = sample((8, 6), dtype=torch.float32)
    fast, plain = train(compiled, net, x), train(run(eager), eager, x)
    assert fast[0].dtype == torch.bfloat16
    # One rounding to bfloat16, where the tracer keeps more digits between two operations.
    torch.testing.assert_close(fast, plain, rtol=2e-2, atol=2e-2)
    assert seen


@pytest.mark.parametrize("name", ["group", "evonorm_s0", "switchable"])
def test_transforms_inside_the_compiler_see_operations(name):
    layer = build(name, {"groups": 2} if name == "group" else {}, 6).double()
    layer.update, x = False, sample((3, *SHAPE))

    def gradient(x):
        return torch.func.vmap(torch.func.grad(lambda x: layer(x).pow(3).sum()))(x)

    def tangent(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x.sin()))).tangent

    for function, z in ((gradient, x), (tangent, x[0].clone())):
        compiled, seen = traced(function)
        torch.testing.assert_close(compiled(z), function(z), **TIGHT)
        assert not any(operation.startswith("normlab.") for operation in seen)


def test_programs_hold_them_only_where_asked_for():
    """By default other programs can run what was exported."""
    layer, x = build("batch", {}, 6).eval(), sample(SHAPE, dtype=torch.float32)
    batch = ({0: torch.export.Dim("samples", min=2, max=64)},)

    def exported():
        return torch.export.export(layer, (x,), dynamic_shapes=batch)

    plain = exported()
    with nl.kernels.backend("cpu"):
        ours = exported()
    file = io.BytesIO()
    torch.export.save(ours, file)
    file.seek(0)
    z = sample((7, 6, 5, 3), seed=3, dtype=torch.float32)
    for program, holds in ((plain, False), (ours, True), (torch.export.load(file), True)):
        names = {str(node.target) for node in program.graph.nodes}
        assert any(name.startswith("normlab") for name in names) == holds
        # Float32, by other sums.
        torch.testing.assert_close(program.module()(z), layer(z), rtol=1e-5, atol=1e-5)
