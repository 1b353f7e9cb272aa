"""The compiled kernels among everything else that torch does with a function."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import normlab as nl
from activations.cases import sample
from normlab.core.recovery import Affine
from normlab.core.statistics import Renormalized
from normlab.kernels import dispatch

pytestmark = pytest.mark.skipif(
    dispatch.compiled_kernels() is None, reason=f"no compiled kernels: {dispatch.reason()}"
)
TIGHT = {"rtol": 1e-9, "atol": 1e-10}  # float64 sums in two orders, derived twice


def both(function):
    """function() with the kernels and with the plain formulas."""
    with nl.kernels.backend("reference"):
        plain = function()
    return function(), plain


def agree(function, **tolerance):
    fast, plain = both(function)
    torch.testing.assert_close(fast, plain, **(tolerance or TIGHT))


def layers():
    torch.manual_seed(0)
    made = [
        nl.BatchNorm(6, activation="silu"), nl.BatchNorm(6).eval(), nl.GroupNorm(2, 6),
        nl.FilterResponseNorm(6, learned_eps=True), nl.norm("rms", 6),
        nl.norm("instance", 6, track_running_stats=True).eval(), nl.norm("variance", 6),
        nl.norm("mean_only_batch", 6), nl.norm("ghost_batch", 6, batch_size=3),
    ]  # fmt: skip
    for layer in made:
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return [layer.double() for layer in made]


LAYERS = range(len(layers()))


@pytest.mark.parametrize("which", LAYERS)
@pytest.mark.parametrize("slicing", ["whole", "last", "samples", "expanded"])
def test_second_derivatives(which, slicing):
    """Of inputs that the kernels must copy, too: their history stays."""

    def second():
        layer, base = layers()[which], sample((8, 6, 10)).requires_grad_()
        x = {"whole": base, "last": base[..., ::2], "samples": base[1::2],
             "expanded": base[..., :1].expand(8, 6, 10) * 1 if which == 1 else base[:, :, 1:],
             }[slicing]  # fmt: skip
        y = layer(x)
        wanted = [base, *layer.parameters()]
        first = torch.autograd.grad((y**3).sum(), wanted, create_graph=True)
        last = torch.autograd.grad(sum((g**2).sum() for g in first), wanted, allow_unused=True)
        return [y, *first, *[g for g in last if g is not None]]

    agree(second)


@pytest.mark.parametrize("which", LAYERS)
def test_gradcheck(which):
    layer = layers()[which]
    layer.update = False
    x = sample((4, 6, 3)).requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


def test_parameters_that_depend_on_the_input():
    """What flows to x through γ is γ's, and not counted once more, in second derivatives."""
    layer, x = nl.norm("layer", 6).double(), sample((4, 6, 5)).requires_grad_()

    def hyper(x):
        return functional_call(layer, {"weight": x.mean((0, 2)).sin()}, (x,))

    assert torch.autograd.gradcheck(hyper, x)
    assert torch.autograd.gradgradcheck(hyper, x)


@pytest.mark.parametrize("which", LAYERS)
def test_transforms_of_a_backward_pass(which):
    """A pass forward outside any transform, and one backward inside."""

    def batched():
        layer, x = layers()[which], sample((4, 6, 5)).requires_grad_()
        v = torch.stack([sample((4, 6, 5), seed=s) for s in range(3)])
        wanted = [x, *layer.parameters()]
        return torch.autograd.grad(layer(x), wanted, v, is_grads_batched=True)

    def dual():
        layer, x = layers()[which], sample((4, 6, 5)).requires_grad_()
        y = layer(x)
        with forward_ad.dual_level():
            v = forward_ad.make_dual(sample((4, 6, 5), seed=3), sample((4, 6, 5), seed=4))
            (g,) = torch.autograd.grad(y, x, v)
            return tuple(forward_ad.unpack_dual(g))

    agree(batched)
    if layers()[which].activation != "silu":  # of which torch's gradient has no forward mode
        agree(dual)


def test_forward_mode_and_func():
    def forward():
        layer, x = layers()[2], sample((4, 6, 5))
        return torch.func.jvp(layer, (x,), (sample((4, 6, 5), seed=5),))

    def mapped():
        layer, x = layers()[2], sample((3, 4, 6, 5))
        return torch.func.vmap(torch.func.grad(lambda x: layer(x).pow(3).sum()))(x)

    agree(forward)
    agree(mapped)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    def gradients():
        layer, x = layers()[0], sample((4, 6, 5)).requires_grad_()
        y = checkpoint(layer, x[:, :, 1:], use_reentrant=reentrant)
        y.pow(3).sum().backward()
        return [y, x.grad, *[p.grad for p in layer.parameters()], *layer.buffers()]

    agree(gradients)


def test_hooks_that_change_the_order_of_what_was_saved():
    def gradient(change):
        torch.manual_seed(0)
        layer, x = nl.BatchNorm(6), sample((4, 6, 5, 3), dtype=torch.float32)
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(change, lambda t: t):
            y = layer(x)
        return torch.autograd.grad(y.pow(3).sum(), x)[0]

    def rows(t):
        return t.detach().clone(memory_format=torch.contiguous_format)

    # Sums in another order.
    torch.testing.assert_close(gradient(rows), gradient(lambda t: t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [("batch", {}), ("group", {"groups": 2}), ("layer", {"over": "position"}),
     ("evonorm_s0", {}), ("switchable", {})],
)  # fmt: skip
def test_hooks_that_change_the_order_of_statistics(name, options):
    """What kernels saved may come back with gaps between its elements, or by columns."""

    def gradients(change):
        layer, x = nl.norm(name, 8, **options), sample((4, 8, 5, 3), dtype=torch.float32)
        x.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, change):
            y = layer(x)
        return torch.autograd.grad(y.pow(3).sum(), [x, *layer.parameters()])

    def apart(t):
        return torch.stack([t, torch.zeros_like(t)], -1)[..., 0]

    def turned(t):
        return t.permute(*reversed(range(t.ndim))).contiguous().permute(*reversed(range(t.ndim)))

    for change in (apart, turned):
        # The same numbers; of another order of x, sums in another.
        torch.testing.assert_close(gradients(change), gradients(lambda t: t), rtol=1e-5, atol=1e-5)


def test_in_place_changes_before_the_backward_pass():
    layer = nl.BatchNorm(6)
    for view in (lambda x: x, lambda x: x[1:], lambda x: x.view(4, 6, 5)):
        x = sample((4, 6, 5), dtype=torch.float32).requires_grad_() * 1
        y = layer(view(x))
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    x = sample((4, 6, 5), dtype=torch.float32).requires_grad_() * 1
    y = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_of_any_kind_of_memory():
    """Expanded, strided and lazily negated gradients, and negated inputs."""
    torch.manual_seed(0)
    for dy in (
        torch.ones(()).expand(4, 6, 5), torch.randn(1, 6, 1).expand(4, 6, 5),
        torch.randn(5, 6, 4).permute(2, 1, 0), torch.randn(4, 6, 10)[..., ::2],
        torch._neg_view(torch.randn(4, 6, 5)), torch._efficientzerotensor(4, 6, 5),
    ):  # fmt: skip
        for x in (torch.randn(4, 6, 5), torch._neg_view(torch.randn(4, 6, 5))):
            layer, x = nl.norm("layer", 6), x.requires_grad_()
            (g,) = torch.autograd.grad(layer(x), x, dy)
            z = x.detach().double().resolve_neg().requires_grad_()
            with nl.kernels.backend("reference"):
                exact = torch.autograd.grad(layer.double()(z), z, dy.double())[0]
            torch.testing.assert_close(g.double(), exact, rtol=1e-5, atol=2e-6)  # float32


def test_frozen_parts():
    """Only the gradients that are asked for, in every combination."""
    for frozen in (("weight",), ("bias",), ("weight", "bias"), ()):
        for needs_x in (True, False):
            if not needs_x and len(frozen) == 2:
                continue

            def gradients(frozen=frozen, needs_x=needs_x):
                layer, x = nl.BatchNorm(6).double(), sample((4, 6, 5)).requires_grad_(needs_x)
                for name in frozen:
                    getattr(layer, name).requires_grad_(False)
                (layer(x) ** 3).sum().backward()
                return [x.grad, *[p.grad for p in layer.parameters()]]

            fast, plain = both(gradients)
            for a, b in zip(fast, plain, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b, **TIGHT)


def test_other_devices_and_shapes_of_parameters_are_errors():
    x = torch.randn(4, 6, 5)
    with pytest.raises((RuntimeError, NotImplementedError)):
        nl.norm("layer", 6).to("meta")(x)
    with pytest.raises((RuntimeError, NotImplementedError)):
        nl.BatchNorm(6, affine=False).to("meta").eval()(x)
    layer = nl.norm("layer", 6)
    layer.weight = nn.Parameter(torch.ones(3))  # memory past its end is not read
    with pytest.raises(RuntimeError):
        layer(x)
    layer = nl.BatchNorm(6).eval()
    layer.running_var = torch.ones(3)
    with pytest.raises(RuntimeError):
        layer(x)


def test_parameters_in_any_memory():
    def outcome():
        layer, wide = nl.norm("layer", 6).double(), torch.arange(24.0).double()
        layer.weight = nn.Parameter(wide[::4])
        layer.bias = nn.Parameter(torch.ones((), dtype=torch.float64).expand(6))
        return layer(sample((4, 6, 5)))

    agree(outcome)


def test_parametrized_parameters():
    """What stands in the place of a parameter is used, and trained."""

    class Exponential(nn.Module):
        def forward(self, v):
            return v.exp()

    def outcome():
        layer, x = nl.BatchNorm(6).double(), sample((4, 6, 5)).requires_grad_()
        nn.utils.parametrize.register_parametrization(layer, "weight", Exponential())
        y = layer(x)
        return [y, *torch.autograd.grad((y**3).sum(), [x, *layer.parameters()])]

    agree(outcome)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["batch", "layer", "l1_batch"])
def test_gradients_have_the_dtype_of_their_parameter(name, dtype):
    def outcome():
        layer, x = nl.norm(name, 6), torch.randn(4, 6, 5, generator=torch.manual_seed(0))
        (layer.to(dtype)(x) ** 3).sum().backward()
        return [p.grad for p in layer.parameters()]

    # A rounding to bfloat16, or of outputs and sums to float32.
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
    agree(outcome, rtol=tolerance, atol=tolerance)


def test_tensors_left_over_from_a_transform():
    """Wrappers that outlive their transform have no memory of their own."""
    kept = []

    def loss(x):
        kept.append(x)
        return (x**2).sum()

    torch.func.grad(loss)(sample((4, 6, 5)))
    layer = nl.norm("group", 6, groups=2).double()
    agree(lambda: layer(kept[0]))
    torch.func.grad(loss)(torch.arange(6, dtype=torch.float64))
    agree(lambda: functional_call(layer, {"weight": kept[1]}, (sample((4, 6, 5)),)))


def test_default_device_does_not_matter():
    """Working memory lies where x lies."""
    layer, x = nl.BatchNorm(6, activation="relu"), torch.randn(4, 6, 5, requires_grad=True)
    with torch.device("meta"):
        layer(x).sum().backward()
    assert x.grad.device.type == "cpu"
    assert layer.weight.grad.device.type == "cpu"


class Wrapped(torch.Tensor):
    """A subclass that has all operations go through torch's own function."""


def test_subclasses_keep_their_class():
    x = torch.randn(4, 6, 5).as_subclass(Wrapped)
    assert type(nl.norm("layer", 6)(x)) is Wrapped


def test_tracers_see_operations():
    """Traced graphs compute the layer of a new input; memory filled unseen would be garbage."""
    from torch.fx.experimental.proxy_tensor import make_fx

    layer, x, z = nl.norm("group", 6, groups=2), torch.randn(4, 6, 5), torch.randn(4, 6, 5)
    graph = make_fx(layer)(x)
    torch.testing.assert_close(graph(z), layer(z))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of shapes, and that it is old
        for kind in (layer, nl.BatchNorm(6).eval()):
            traced = torch.jit.trace(kind, (x,))
            torch.testing.assert_close(traced(z), kind(z))
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(z), layer(z), rtol=1e-5, atol=1e-6)  # float32


def test_the_compiler_traces_one_operation():
    """Without a break, and the same: the compiler itself is left out here (backend eager)."""
    torch._dynamo.reset()
    layer, x = nl.BatchNorm(6, activation="relu").double(), sample((4, 6, 5)).requires_grad_()
    traced = copy.deepcopy(layer)
    y, t = layer(x), torch.compile(traced, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(t, y, **TIGHT)
    for a, b in zip(layer.buffers(), traced.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_inference_mode_and_no_grad():
    layer, x = nl.BatchNorm(6), torch.randn(4, 6, 5)
    expected = copy.deepcopy(layer)(x).detach()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(layer)(x), expected)
    plain = copy.deepcopy(layer)
    with torch.inference_mode():
        assert torch.equal(plain(x), expected)
        inside = torch.randn(4, 6, 5)
    with pytest.raises(RuntimeError, match="Inference"):
        nl.BatchNorm(6)(inside).sum().backward()


def test_autocast():
    net = nn.Sequential(nn.Linear(6, 6), nl.norm("layer", 6))
    x = torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x)
        assert y.dtype == torch.bfloat16
        y.float().pow(3).sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())


def test_renormalization_folds_into_channels_alone():
    """r and d of groups are spread over their channels; those of samples are not γ's to hold."""
    for pattern, options in (
        ("n (g c) * -> g (n c *)", {"groups": 2}), ("n c * -> (n c) *", {}),
        ("n c * -> c (n *)", {}),
    ):  # fmt: skip
        for affine in (True, False):

            def outcome(pattern=pattern, options=options, affine=affine):
                layer = nl.Normalize(
                    6, pattern, operation=nl.Standardize(), statistics=Renormalized(3.0, 2.0),
                    recovery=Affine(scale=affine, shift=affine), **options,
                ).double()  # fmt: skip
                layer.running_mean += torch.arange(len(layer.running_mean))
                x = sample((4, 6, 5)).requires_grad_()
                y = layer(x)
                return [y, *torch.autograd.grad((y**3).sum(), x), *layer.buffers()]

            agree(outcome)


def test_constants_of_the_deviation():
    def outcome():
        operation = nl.Standardize(factor=2.0)
        layer = nl.Normalize(6, "n c * -> c (n *)", operation=operation).double()
        return layer(sample((4, 6, 5)))

    agree(outcome)


def test_threads_of_python():
    """Calls leave the interpreter; each has its own memory."""
    from concurrent.futures import ThreadPoolExecutor

    layer = nl.norm("group", 6, groups=2)
    xs = [torch.randn(4, 6, 500, requires_grad=True) for _ in range(16)]

    def work(x):
        y = layer(x)
        return y.detach(), torch.autograd.grad(y.pow(3).sum(), x)[0]

    expected = [work(x) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, xs))
    for (y, g), (t, h) in zip(expected, found, strict=True):
        assert torch.equal(y, t)
        assert torch.equal(g, h)
