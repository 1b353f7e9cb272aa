"""Gradients: against autograd through another formula, against differences, to second order."""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call

import normlab as nl
from activations import torch_oracle
from activations.cases import CASES, ONE_EACH, build, sample

# Rounding of 1e-14 in each of some hundred terms, times 1/D of at most about 10.
TIGHT = {"rtol": 1e-10, "atol": 1e-11}
SHAPE = (8, 6, 5)
FUSING = [c for c in ONE_EACH if c.values[0] not in ("none", "dyt", "ic")]


def constants(name, options):
    """Stored statistics that make r and d of batch renormalization partly clipped."""
    if name != "batch_renorm":
        return None
    mu = torch.linspace(-0.3, 0.6, 6, dtype=torch.float64)
    return mu, torch.linspace(0.6, 1.6, 6, dtype=torch.float64), 1.2, 0.1


def prepared(name, options, **more):
    """A layer, its stored statistics as `constants` has them."""
    if name == "batch_renorm":
        options = {**options, "rmax": 1.2, "dmax": 0.1}
    layer = build(name, options, **more)
    old = constants(name, options)
    if old is not None:
        layer.running_mean.copy_(old[0])
        layer.running_std.copy_(old[1])
    return layer, old


def gradients(y, x, parameters):
    cotangent = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape)
    wanted = [x, *parameters.values()]
    grads = torch.autograd.grad((y * cotangent).sum(), wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, grads, strict=True)]


def compare(name, options, layer, old, x):
    parameters = dict(layer.named_parameters())
    expected = torch_oracle.forward(name, x, options, parameters, old)
    actual = layer(x)
    torch.testing.assert_close(actual, expected, **TIGHT)
    pairs = gradients(actual, x, parameters), gradients(expected, x, parameters)
    for got, want in zip(*pairs, strict=True):
        torch.testing.assert_close(got, want, **TIGHT)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_gradients_match_autograd_through_the_formula(name, options):
    layer, old = prepared(name, options)
    compare(name, options, layer, old, sample((8, 6, 5, 3)).requires_grad_())


@pytest.mark.parametrize("activation", [None, "relu", "silu", "tlu"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("name", "options"), FUSING)
def test_gradients_with_every_activation_and_without_affine(name, options, affine, activation):
    options = {**options, "activation": activation}
    layer, old = prepared(name, options, affine=affine)
    compare(name, options, layer, old, sample(SHAPE).requires_grad_())


def layouts(shape):
    """The same values under strides that kernels might mistake."""
    x = sample(shape)
    wide = torch.zeros(shape[0], 2 * shape[1], *shape[2:], dtype=x.dtype)
    wide[:, ::2] = x
    expanded = x[:1].expand(shape)
    return {
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "sliced": wide[:, ::2],
        "expanded": expanded,
        "reversed batch": x.flip(0)[:, :, :, :],
    }


@pytest.mark.parametrize("layout", list(layouts((8, 6, 5, 3))))
@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_strides_change_nothing(name, options, layout):
    layer, old = prepared(name, options)
    x = layouts((8, 6, 5, 3))[layout].detach().requires_grad_()
    compare(name, options, layer, old, x)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_evaluation_gradients(name, options):
    layer = build(name, options)
    layer(sample((8, 6, 5)))
    layer.eval()
    x = sample((3, 6, 4), seed=5).requires_grad_()
    names, values = zip(*layer.named_parameters(), strict=True) if list(layer.parameters()) else (
        (), ())  # fmt: skip
    assert gradcheck(
        lambda x, *p: functional_call(layer, dict(zip(names, p, strict=True)), (x,)), (x, *values)
    )


# r and d are constants to the gradient, so differences agree where clipping makes them constant.
CLIPPED = {"rmax": 1.0, "dmax": 0.0}


DIFFERENCES = [(c, False) for c in CASES if "1000000.0" not in c.id and "(" not in c.id]
DIFFERENCES = [(*c.values, m) for c, m in [*DIFFERENCES, *((c, True) for c in ONE_EACH)]]


@pytest.mark.parametrize(("name", "options", "masked"), DIFFERENCES)
def test_differences_agree_to_second_order(name, options, masked):
    options = {**options, **CLIPPED} if name == "batch_renorm" else options
    layer = build(name, options)
    if getattr(layer, "stored_names", ()):
        layer.update = False
    x = sample((4, 6, 2), seed=3).requires_grad_()
    mask = torch.ones(4, 2, dtype=torch.bool)
    mask[1, 1] = mask[2, 0] = False
    named = dict(layer.named_parameters())

    def function(x, *values):
        given = dict(zip(named, values, strict=True))
        return functional_call(layer, given, (x, mask if masked else None))

    inputs = (x, *named.values())
    assert gradcheck(
        function, inputs, check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=True,
    )  # fmt: skip
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("activation", ["relu", "silu", "tlu"])
@pytest.mark.parametrize("name", ["batch", "rms", "lp_batch"])
def test_fused_activations_to_second_order(name, activation):
    options = {"p": 3.0} if name == "lp_batch" else {}
    layer = build(name, {**options, "activation": activation})
    if layer.stored_names:
        layer.update = False
    x = sample((4, 6, 3), seed=3).requires_grad_()
    assert gradcheck(layer, (x,), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(layer, (x,))


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_forward_mode_over_reverse_without_functorch(name, options, graph):
    """A Hessian-vector product by dual numbers equals the one by two reverse passes."""
    layer, _ = prepared(name, options)
    if getattr(layer, "stored_names", ()):
        layer.update = False
    x, v = sample(SHAPE).requires_grad_(), sample(SHAPE, seed=7)
    weights = sample(SHAPE, seed=8)

    def slope(x, graph):
        return torch.autograd.grad((layer(x) ** 3 * weights).sum(), x, create_graph=graph)[0]

    expected = torch.autograd.grad((slope(x, True) * v).sum(), x)[0]
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(slope(forward_ad.make_dual(x, v), graph)).tangent
    torch.testing.assert_close(tangent, expected, **TIGHT)


@pytest.mark.parametrize("wanted", ["input", "parameters", "weight"])
@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_gradients_of_some_inputs_only(name, options, wanted):
    layer, _ = prepared(name, options)
    x = sample(SHAPE).requires_grad_(wanted == "input")
    for key, p in layer.named_parameters():
        p.requires_grad_(wanted == "parameters" or key == wanted)
    y = layer(x)
    if not y.requires_grad:
        pytest.skip("nothing to differentiate")
    y.pow(2).sum().backward()
    full, _ = prepared(name, options)
    z = sample(SHAPE).requires_grad_()
    full(z).pow(2).sum().backward()
    got = dict(layer.named_parameters()) | {"x": x}
    want = dict(full.named_parameters()) | {"x": z}
    for key, tensor in got.items():
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, want[key].grad, **TIGHT)
        else:
            assert tensor.grad is None


def test_the_second_derivative_of_a_constant_area_is_finite():
    """At deviation 0 the root's derivative must not give NaN: ε holds it."""
    layer = nl.BatchNorm(2).double()
    x = torch.ones(4, 2, 3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), x)
    assert slope.isfinite().all()
    assert second.isfinite().all()


@pytest.mark.parametrize("about", ["zero", "mean"])
@pytest.mark.parametrize("seed", range(12))
def test_the_gradient_of_the_maximum_finds_its_element(about, seed):
    """The element that holds the maximum is found whatever rounding did to it."""
    x = sample((8, 4, 5), seed=seed).requires_grad_()
    options = {"p": "max", "about": about}
    compare("lp_batch", options, nl.LpBatchNorm(4, **options).double(), None, x)
