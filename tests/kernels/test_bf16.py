"""Layers in bfloat16 against float64: every result is that of one rounding."""

import copy

import pytest
import torch
from torch import nn

import normlab as nl
from kernels.kernel_cases import same_with_threads

# bfloat16 has 8 significant bits, so rounding to the nearest changes a number by at most 2⁻⁸ of it.
ROUNDING = 2.0**-8
# Inside, numbers are float32. Where the terms of a sum cancel, what is left may be wrong by the
# terms' last digits, about 2⁻²³ of the largest, some of them added up: 2⁻¹⁶ of the largest element
# of the tensor is allowed for that, a 256th of that element's rounding.
CANCELLED = 2.0**-16

METHODS = [
    ("batch", {}), ("batch", {"activation": "relu"}), ("batch", {"activation": "silu"}),
    ("batch_renorm", {"rmax": 1.5, "dmax": 0.5}), ("ghost_batch", {"batch_size": 3}),
    ("instance", {}), ("instance", {"activation": "tlu"}), ("layer", {}), ("group", {"groups": 2}),
    ("group", {"groups": 2, "activation": "silu"}), ("position", {}),
    ("rms", {}), ("rms", {"over": "position"}), ("variance", {}), ("mean_only_batch", {}),
    ("filter_response", {"learned_eps": True}), ("filter_response", {"activation": None}),
    ("l1_batch", {}), ("lp_batch", {"p": 3.0}), ("switchable", {}),
    ("evonorm_s0", {"groups": 2}), ("evonorm_b0", {}),
]  # fmt: skip
SHAPES = [(6, 10, 7, 5), (12, 64, 6, 6), (6, 2, 40, 33), (6, 34, 3)]


def units(found, exact):
    """The largest error, in what one rounding of the element and float32's cancellation allow."""
    unit = ROUNDING * exact.abs() + CANCELLED * exact.abs().max()
    return float(((found.double() - exact).abs() / unit).max())


def results(layer, x, dy, backend="auto"):
    """y and all gradients, by name."""
    layer, x = copy.deepcopy(layer).train(), x.detach().requires_grad_()
    named = dict(layer.named_parameters())
    with nl.kernels.backend(backend):
        y = layer(x)
        grads = torch.autograd.grad(y, [x, *named.values()], dy)
    return {"y": y.detach(), "x": grads[0], **dict(zip(named, grads[1:], strict=True))}


def problem(name, options, shape, channel_dim=1):
    """A layer in bfloat16, its input and a gradient of its output."""
    generator = torch.Generator().manual_seed(5)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    layer = nl.norm(name, shape[1], channel_dim=channel_dim, **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * noise(*p.shape))
    x, dy = (
        noise(*shape) * (1 + noise(shape[0], *[1] * (len(shape) - 1)).abs()) + 0.5,
        noise(*shape),
    )
    return layer.bfloat16(), x.bfloat16(), dy.bfloat16()


def arranged(t, order):
    """In another order of memory; for "last" also with channels as the last axis."""
    if order == "first":
        return t
    t = t.movedim(1, -1).contiguous()
    return t if order == "last" else t.movedim(-1, 1)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("order", ["first", "columns", "last"])
@pytest.mark.parametrize(("name", "options"), METHODS)
def test_results_are_rounded_once(name, options, order, backend):
    for shape in SHAPES:
        layer, x, dy = problem(name, options, shape, -1 if order == "last" else 1)
        x, dy = arranged(x, order), arranged(dy, order)
        exact = results(copy.deepcopy(layer).double(), x.double(), dy.double(), "reference")
        found = results(layer, x, dy, backend)
        for key, value in exact.items():
            assert found[key].dtype == torch.bfloat16
            assert units(found[key], value) <= 1, (key, shape)


def test_sums_that_cancel_are_rounded_once():
    """The gradient of the input is a difference of large numbers where dy hardly varies."""
    for name in ("batch", "instance", "layer", "group"):
        layer, x, dy = problem(name, {}, (8, 16, 9, 9))
        dy = (dy * 2.0**-4 + 1).bfloat16()
        exact = results(copy.deepcopy(layer).double(), x.double(), dy.double(), "reference")
        found = results(layer, x, dy)
        assert all(units(found[key], value) <= 1 for key, value in exact.items()), name


@pytest.mark.parametrize("order", ["first", "columns"])
@pytest.mark.parametrize("deviations", [3.0, 5.0, 60.0])
def test_means_far_from_zero(deviations, order):
    """Sums about zero serve where the mean is near; where it is not, digits would cancel."""
    for name in ("batch", "instance", "layer", "group", "position", "switchable", "variance"):
        layer, x, dy = problem(name, {}, (6, 64, 9, 8))
        x = x.float() - x.float().mean() + deviations * x.float().std()
        x = torch.cat([x[:3], -x[3:]]).bfloat16()  # one mean is near again where samples share it
        x, dy = arranged(x, order), arranged(dy, order)
        exact = results(copy.deepcopy(layer).double(), x.double(), dy.double(), "reference")
        found = results(layer, x, dy)
        assert all(units(found[key], value) <= 1 for key, value in exact.items()), name


def test_one_area_far_from_zero_among_others():
    """Whichever it is: all channels decide together, in the order that vectors have them."""
    for channel in range(35):
        layer, x, dy = problem("instance", {}, (2, 35, 5, 7))
        x[:, channel] = (1 + x[:, channel].float() / 64).bfloat16()
        x, dy = arranged(x, "columns"), arranged(dy, "columns")
        exact = results(copy.deepcopy(layer).double(), x.double(), dy.double(), "reference")
        found = results(layer, x, dy)
        assert all(units(found[key], value) <= 1 for key, value in exact.items()), channel


@pytest.mark.parametrize("scale", [1e-21, 1e-19, 1e30, 2e37])
def test_elements_tiny_and_huge(scale):
    """Squares that are no normal numbers, or larger than any, are none of a variance's."""
    about_a_mean = ["batch", "instance", "layer", "group", "position"]
    for name in about_a_mean if scale > 1 else [*about_a_mean, "rms", "filter_response"]:
        layer, x, _ = problem(name, {"eps": 1e-44} if scale < 1 else {}, (6, 64, 9, 8))
        x = x.float() * scale if scale < 1 else torch.full(x.shape, scale)
        for order in ("first", "columns"):
            z = arranged(x.bfloat16(), order)
            with torch.no_grad():
                with nl.kernels.backend("reference"):
                    exact = copy.deepcopy(layer).double()(z.double())
                found = layer(z).double()
            # Squares of 1e-21 are subnormal in float32, and have 10 bits.
            assert (found - exact).abs().max() <= 2 * ROUNDING * exact.abs().max(), (name, order)


def test_a_gradient_within_the_storage_of_the_input():
    """It begins where the input begins, with other strides."""
    storage = problem("batch", {}, (64, 64))[1]
    x, dy = storage.view(32, 128)[:, :64], storage[:32]
    layer = problem("batch", {}, (64, 64))[0]
    for g, keys in ((dy, ("y", "x", "weight", "bias")), (x[:1].expand_as(x), ("bias",))):
        exact = results(copy.deepcopy(layer).double(), x.double(), g.double(), "reference")
        found = results(layer, x, g)
        assert all(units(found[key], exact[key]) <= 1 for key in keys)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing_beside_a_mean_far_from_zero(threads):
    """How channels are shared out among threads, no sum depends on."""

    def found():
        tensors = []
        for name, options in (("batch", {}), ("ghost_batch", {"batch_size": 3}), ("group", {})):
            layer, x, dy = problem(name, options, (8, 48, 64, 64))
            layer = layer.float()  # whose gradients are rounded to float32
            x[:, 0] += 20
            x[:, 5] -= 9
            tensors += results(layer, x, dy).values()
        return tensors

    same_with_threads(found, threads)


def test_torch_operations_in_bfloat16_are_not():
    """What is rounded at every step is far over the bound, which is thus no loose one."""
    for name, options, native in (
        ("batch", {}, None), ("filter_response", {}, None), ("layer", {}, nn.GroupNorm(1, 10)),
    ):  # fmt: skip
        layer, x, dy = problem(name, options, SHAPES[0])
        exact = results(copy.deepcopy(layer).double(), x.double(), dy.double(), "reference")
        x = x.requires_grad_()
        if native is None:
            parameters = {n: p.detach() for n, p in layer.named_parameters()}
            y = nl.catalogue("activation")[name].reference(x, parameters)
        else:
            native = native.bfloat16()
            native.load_state_dict(layer.state_dict())
            y = native(x)
        (gradient,) = torch.autograd.grad(y, x, dy)
        assert units(gradient, exact["x"]) > 5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "options"),
    [("batch", {}), ("filter_response", {}), ("position", {}), ("l1_batch", {}),
     ("evonorm_s0", {})],
)  # fmt: skip
def test_parameters_of_either_dtype_beside_each_other(name, options, dtype):
    """Each gradient has the dtype of its parameter, and is rounded to that once."""
    _, x, dy = problem(name, options, (6, 34, 5))
    names = [n for n, _ in nl.norm(name, 34, **options).named_parameters()]
    for narrow in names:
        layer = nl.norm(name, 34, **options)
        with torch.no_grad():
            for i, p in enumerate(layer.parameters()):
                p.add_(0.3 * torch.randn(34, generator=torch.Generator().manual_seed(i)))
                p.data = p.bfloat16().to(torch.float32)
        exact = results(copy.deepcopy(layer).double(), x.double(), dy.double(), "reference")
        getattr(layer, narrow).data = getattr(layer, narrow).bfloat16()
        found = results(layer, x.to(dtype), dy.to(dtype))
        for key in names:
            wanted = torch.bfloat16 if key == narrow else torch.float32
            assert found[key].dtype == wanted
            # Of float32, sums of 30 terms that may cancel.
            allowed = ROUNDING if wanted == torch.bfloat16 else 2.0**-18
            bound = allowed * exact[key].abs() + CANCELLED * exact[key].abs().max()
            assert ((found[key].double() - exact[key]).abs() <= bound).all(), (key, narrow)
