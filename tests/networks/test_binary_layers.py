"""Binary layers against the formulas of METHODS, in float64; stand-in gradients exactly."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import normlab as nl
from normlab.networks.binary import (
    BinaryConv2d,
    RPReLU,
    RSign,
    ScaledStdConv2d,
    binarize_weights,
    binarized,
    sign,
    sign_quadratic,
    standardized,
)
from normlab.networks.plan import NetworkError

# Border cases and exact binary fractions, so that every formula below has no rounding at all.
GRID = torch.tensor([-3, -1, -0.75, -0.25, -0.0, 0.0, 0.25, 0.5, 0.875, 1, 2.5], dtype=torch.double)


def slope(x):
    """2 + 2x on [−1, 0), 2 − 2x on [0, 1), else 0."""
    if -1 <= x < 0:
        return 2 + 2 * x
    return 2 - 2 * x if 0 <= x < 1 else 0.0


def hand_standardized(weight):
    """Ŵ filter by filter, with plain sums."""
    rows = []
    for filter_ in weight.flatten(1):
        n = len(filter_)
        mean = sum(filter_) / n
        deviation = (sum((w - mean) ** 2 for w in filter_) / n) ** 0.5
        rows.append((filter_ - mean) / (deviation + 1e-5) / math.sqrt(n))
    return torch.stack(rows).view_as(weight)


def hand_binarized(weight):
    """mean|W|·sign(W) filter by filter, sign(0) = 1."""
    flat = weight.flatten(1)
    signs = [[1.0 if w >= 0 else -1.0 for w in filter_] for filter_ in flat.tolist()]
    sizes = torch.stack([abs(filter_).sum() / len(filter_) for filter_ in flat])
    return (sizes[:, None] * torch.tensor(signs, dtype=weight.dtype)).view_as(weight)


def weights(*shape):
    """Latent weights, some beyond ±1, where the stand-in's derivative is 0."""
    return (torch.randn(*shape, dtype=torch.double) * 0.9).requires_grad_()


@pytest.mark.parametrize("zero", [1, 0])
def test_sign_decides_zero_explicitly(zero):
    expected = [-1.0] * 4 + [float(zero)] * 2 + [1.0] * 5
    assert sign(GRID, zero).tolist() == expected
    assert sign_quadratic(GRID, zero).tolist() == expected


@pytest.mark.parametrize("zero", [1, 0])
def test_gradient_of_the_sign_is_that_of_the_quadratic(zero):
    x = GRID.clone().requires_grad_()
    upstream = torch.arange(1.0, len(x) + 1, dtype=torch.double)
    (found,) = torch.autograd.grad(sign_quadratic(x, zero), x, upstream)
    slopes = [slope(v) for v in x.tolist()]
    assert found.tolist() == [u * s for u, s in zip(upstream.tolist(), slopes, strict=True)]


def test_second_derivative_of_the_sign_is_the_quadratics():
    x = GRID.clone().requires_grad_()
    (first,) = torch.autograd.grad(sign_quadratic(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    inside = (x.abs() < 1).tolist()
    found = [s for s, i in zip(second.tolist(), inside, strict=True) if i]
    assert found == [2.0, 2.0, 0.0, 0.0, -2.0, -2.0, -2.0]
    outside = second[x.abs() > 1]
    assert outside.tolist() == [0.0] * len(outside)


def test_sign_is_exact_in_every_dtype_and_shows_nan():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = sign_quadratic(torch.randn(10_000, dtype=dtype))
        assert y.dtype == dtype
        assert set(y.tolist()) == {-1.0, 1.0}
    y = sign_quadratic(torch.tensor([math.nan, math.inf, -math.inf]))
    assert y[0].isnan()
    assert y[1:].tolist() == [1.0, -1.0]


def test_rsign_shifts_each_channel():
    layer = RSign(3).double()
    assert layer.bias.tolist() == [0.0] * 3
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([0.5, 0.0, -0.5]))
    x = torch.tensor([-0.25, 0.0, 0.25], dtype=torch.double).view(3, 1, 1, 1).expand(3, 3, 2, 1)
    y = layer(x.clone().requires_grad_())
    assert y[:, :, 0, 0].tolist() == [[1, -1, -1], [1, 1, -1], [1, 1, -1]]
    y.sum().backward()
    expected = [2 * sum(slope(v + b) for v in (-0.25, 0.0, 0.25)) for b in (0.5, 0.0, -0.5)]
    assert layer.bias.grad.tolist() == expected  # two positions each
    assert RSign(3, shift=False).bias is None


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 7), (5, 3, 2, 4), (0, 3, 2, 2)])
def test_layers_take_any_rank_and_empty_batches(shape):
    x = torch.randn(shape, dtype=torch.double)
    for layer in (RSign(3).double(), RPReLU(3).double()):
        y = layer(x)
        assert y.shape == x.shape
        y.sum().backward()
        assert all(p.grad is not None for p in layer.parameters())


def test_rprelu_shifts_bends_and_shifts():
    layer, x = RPReLU(2).double(), torch.randn(4, 2, 3, dtype=torch.double)
    assert layer.slope.tolist() == [0.25] * 2
    assert torch.equal(layer(x), torch.where(x > 0, x, 0.25 * x))
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(2))
    before, slope_, after = (p.view(2, 1) for p in (layer.before, layer.slope, layer.after))
    shifted = x + before
    expected = shifted.clamp(min=0) + slope_ * shifted.clamp(max=0) + after
    # The same products and sums in another order: a few units in the last place.
    torch.testing.assert_close(layer(x), expected, rtol=1e-14, atol=1e-15)
    y = x.clone().requires_grad_()
    inputs = (y, layer.before, layer.slope, layer.after)
    assert torch.autograd.gradcheck(
        lambda y, *p: torch.func.functional_call(
            layer, dict(zip(("before", "slope", "after"), p, strict=True)), (y,)
        ),
        inputs,
    )


def test_binary_weight_and_its_gradient_by_hand():
    weight = weights(3, 2, 3, 3)
    assert (weight.abs() > 1).any()
    assert (weight.abs() < 1).any()
    found = binarized(weight)
    # Sums over 18 elements in another order.
    torch.testing.assert_close(found, hand_binarized(weight.detach()), rtol=1e-14, atol=0)
    upstream = torch.randn_like(found)
    (gradient,) = torch.autograd.grad(found, weight, upstream)
    assert torch.equal(gradient, upstream * (weight.abs() <= 1))
    assert set(binarized(weight, "none").unique().tolist()) == {-1.0, 1.0}


def test_standardized_weight_by_hand():
    weight = weights(3, 2, 3, 3)
    # Sums over 18 elements in another order.
    torch.testing.assert_close(
        standardized(weight), hand_standardized(weight), rtol=1e-12, atol=1e-14
    )
    assert torch.autograd.gradcheck(standardized, (weight,))
    constant = torch.full((2, 3, 1, 1), 0.3, requires_grad=True)
    (gradient,) = torch.autograd.grad(standardized(constant).sum(), constant)
    assert standardized(constant).abs().max() == 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("binarize", [True, False])
def test_standardized_binary_convolution_against_the_oracle(binarize):
    layer = BinaryConv2d(2, 3, 3, padding=1, standardize=True, binarize=binarize).double()
    assert layer.gain.shape == (3, 1, 1, 1)
    assert layer.gain.flatten().tolist() == [1.0] * 3
    with torch.no_grad():
        layer.gain.copy_(torch.randn(3, 1, 1, 1))
    x = torch.randn(2, 2, 5, 4, dtype=torch.double)
    y = layer(x)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, (layer.weight, layer.gain), upstream)

    weight = layer.weight.detach().clone().requires_grad_()
    gain = layer.gain.detach().clone().requires_grad_()
    hat = hand_standardized(weight)
    used = hand_binarized(hat.detach()) if binarize else hat
    # Rounding of sums over 18 elements and 40 products each.
    close = {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(y, nn.functional.conv2d(x, gain * used, padding=1), **close)
    # By the chain rule: d/dW_b from the convolution, then gain, then the stand-in clamp, then Ŵ.
    used = used.detach().requires_grad_()
    outer = nn.functional.conv2d(x, gain * used, padding=1)
    d_used, d_gain = torch.autograd.grad(outer, (used, gain), upstream)
    inside = (hat.detach().abs() <= 1) if binarize else 1
    (d_weight,) = torch.autograd.grad(hat, weight, d_used * inside)
    torch.testing.assert_close(found[0], d_weight, **close)
    torch.testing.assert_close(found[1], d_gain, **close)


def test_standardized_weight_is_orthogonal_to_its_gradient():
    # W → Ŵ takes out scale and shift: ⟨W − μ, ∂L/∂W⟩ = 0 and Σ ∂L/∂W = 0, but for eps.
    layer = BinaryConv2d(4, 3, 3, standardize=True).double()
    layer(torch.randn(2, 4, 6, 6, dtype=torch.double)).square().sum().backward()
    weight, gradient = layer.weight.detach(), layer.weight.grad
    assert gradient.abs().max() > 1e-3
    # 1e-5 beside a deviation of 0.1 breaks the invariance to scale by 1e-4; shifts have no eps.
    assert (weight * gradient).sum((1, 2, 3)).abs().max() < 1e-3 * gradient.abs().max()
    assert gradient.sum((1, 2, 3)).abs().max() < 1e-12 * gradient.abs().sum()


def test_each_filter_has_one_bit_a_weight_and_one_scale():
    for standardize in (False, True):
        used = BinaryConv2d(4, 5, 3, standardize=standardize).effective().detach()
        for filter_ in used:
            assert len(filter_.unique()) == 2
            assert len(filter_.abs().unique()) == 1


def test_stage_switch_changes_no_parameter():
    layer = BinaryConv2d(4, 5, 3)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), layer)
    before = copy.deepcopy(model.state_dict())
    assert binarize_weights(model, False) == 4 * 5 * 9
    assert torch.equal(layer.effective(), layer.weight)
    assert binarize_weights(model, True) == 4 * 5 * 9
    assert len(layer.effective()[0].unique()) == 2
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_latent_weights_are_drawn_as_asked():
    torch.manual_seed(0)
    positive = BinaryConv2d(8, 8, 3, latent="positive").weight
    assert 0 <= positive.min() < positive.max() <= 1e-3
    assert (binarized(positive) > 0).all()  # the quirk: every sign is equal
    torch.manual_seed(0)
    kaiming = BinaryConv2d(8, 8, 3).weight
    torch.manual_seed(0)
    assert torch.equal(kaiming, nn.Conv2d(8, 8, 3, bias=False).weight)


def test_sign_of_a_zero_weight():
    layer = BinaryConv2d(1, 1, 1, zero=0)
    with torch.no_grad():
        layer.weight.zero_()
    assert layer.effective().item() == 0
    weight = torch.tensor([[0.0, 2.0]])
    assert binarized(weight).tolist() == [[1.0, 1.0]]
    assert binarized(weight, zero=0).tolist() == [[0.0, 1.0]]


def test_scaled_std_conv_multiplies_by_its_gain():
    layer, x = ScaledStdConv2d(2, 3, 3, padding=1).double(), torch.randn(1, 2, 4, 4).double()
    plain = nn.functional.conv2d(x, hand_standardized(layer.weight), padding=1)
    with torch.no_grad():
        layer.gain.mul_(3)
    # Sums in another order.
    torch.testing.assert_close(layer(x), 3 * plain, rtol=1e-11, atol=1e-12)


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        RSign(2), BinaryConv2d(2, 4, 3, padding=1, standardize=True), RPReLU(4), RSign(4),
        BinaryConv2d(4, 2, 1),
    )  # fmt: skip


def test_compiled_layers_are_one_graph_with_the_same_gradients():
    model, x = small().double(), torch.randn(2, 2, 5, 5, dtype=torch.double, requires_grad=True)
    traced = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = (x, *model.parameters())
    found = torch.autograd.grad(traced(x).square().sum(), inputs)
    # The same operations as those that are traced: sums of equal sizes cancel but for their last
    # bits, of which the next layer takes the sign.
    with nl.kernels.backend("torch"):
        expected = torch.autograd.grad(model(x).square().sum(), inputs)
    # The tracer may fuse a multiplication with an addition.
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_transforms_of_torch_func():
    x = GRID.clone()
    slopes = [slope(v) for v in x.tolist()]
    assert torch.func.vmap(torch.func.grad(sign_quadratic))(x).tolist() == slopes
    y, tangent = torch.func.jvp(sign_quadratic, (x,), (torch.ones_like(x),))
    assert torch.equal(y, sign(x))
    assert tangent.tolist() == slopes
    model, state = small(), dict(small().named_parameters())
    per_sample = torch.func.vmap(
        torch.func.grad(lambda s, x: torch.func.functional_call(model, s, (x[None],)).sum()),
        (None, 0),
    )(state, torch.randn(3, 2, 5, 5))
    assert all(per_sample[name].shape == (3, *p.shape) for name, p in state.items())


def test_copies_and_low_precision():
    model, x = small(), torch.randn(2, 2, 5, 5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
    low = small().bfloat16()
    assert low(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: RSign(0), "num_channels"),
        (lambda: RSign(2, zero=-1), "zero"),
        (lambda: RPReLU(True), "num_channels"),
        (lambda: BinaryConv2d(1, 1, 1, scale="max"), "scale"),
        (lambda: BinaryConv2d(1, 1, 1, latent="normal"), "latent"),
    ],
)
def test_bad_options_are_named(make, names):
    with pytest.raises(NetworkError, match=f"{names} must be"):
        make()


def test_options_are_shown():
    shown = repr(BinaryConv2d(1, 2, 3, standardize=True, binarize=False, scale="none"))
    assert "scale='none', standardize=True, binarize=False" in shown
    assert repr(RSign(2, zero=0, shift=False)) == "RSign(2, zero=0, shift=False)"
