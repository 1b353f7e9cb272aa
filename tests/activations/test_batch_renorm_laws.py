"""Batch renormalization (1702.03275) step by step: schedules, what is averaged, and its identities.

Other files hold its values against the oracles, its default schedule and its case r = 1, d = 0.
"""

import math

import pytest
import torch

import normlab as nl
from activations.cases import build, sample

TIGHT = {"rtol": 1e-10, "atol": 1e-11}  # float64 rounding of two orders of the same sums
SHAPE = (8, 6, 5)
FREE = {"rmax": 1e9, "dmax": 1e9}


def fresh(**options):
    layer = nl.BatchRenorm(6, **options).double()
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2, 6))
        layer.bias.copy_(torch.linspace(-1, 1, 6))
    return layer


def moments(x, eps=1e-5):
    return x.mean((0, 2)), (x.var((0, 2), correction=0) + eps).sqrt()


@pytest.mark.parametrize(("step", "rmax", "dmax"), [
    (0, 1.0, 0.0), (5_000, 1.0, 0.0), (15_000, 11 / 7, 2.5), (25_000, 15 / 7, 5.0),
    (40_000, 3.0, 5.0), (130_000, 3.0, 5.0),
])  # fmt: skip
def test_the_bounds_in_force_at_the_papers_steps(step, rmax, dmax):
    """An input far from the stored statistics meets the bounds, so that the output shows them."""
    layer = nl.BatchRenorm(6, affine=False).double()
    layer.num_batches_tracked.fill_(step)
    x = 100 + 10 * sample(SHAPE)
    mean, sigma = moments(x)
    expected = (x - mean[:, None]) / sigma[:, None] * rmax + dmax
    # The share of a ramp is computed in float32, and bounds that are not yet met are exceeded.
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
    assert int(layer.num_batches_tracked) == step + 1
    low = nl.BatchRenorm(6, affine=False).double()
    low.num_batches_tracked.fill_(step)
    low.running_std.fill_(1e6)
    low.running_mean.fill_(1e8)  # σ_B/σ and (μ_B − μ)/σ below their bounds
    expected = (x - mean[:, None]) / sigma[:, None] / rmax - dmax
    torch.testing.assert_close(low(x), expected, rtol=1e-6, atol=1e-6)


def test_the_steps_are_training_passes_that_update():
    layer = nl.BatchRenorm(6).double()
    x = sample(SHAPE)
    layer(x), layer.eval()(x), layer.train()(x)
    with nl.statistics(layer, update=False):
        layer(x)
    assert int(layer.num_batches_tracked) == 2


def test_the_deviation_is_averaged_not_the_variance():
    """σ += α(σ_B − σ) and μ += α(μ_B − μ), over steps, with ε inside σ_B and no Bessel."""
    layer, alpha = fresh(momentum=0.2, **FREE), 0.2
    mean, std, var = torch.zeros(6).double(), torch.ones(6).double(), torch.ones(6).double()
    for seed in range(5):
        x = (1 + seed) * sample(SHAPE, seed=seed)
        layer(x)
        mu, sigma = moments(x)
        mean, std = mean + alpha * (mu - mean), std + alpha * (sigma - std)
        var = var + alpha * (sigma**2 - var)
        torch.testing.assert_close(layer.running_mean, mean, **TIGHT)
        torch.testing.assert_close(layer.running_std, std, **TIGHT)
    assert (layer.running_std - var.sqrt()).abs().min() > 0.05  # the other average is another
    x = sample(SHAPE, seed=9)
    shape = (6, 1)
    expected = layer.weight.view(shape) * (x - mean.view(shape)) / std.view(shape)
    expected = expected + layer.bias.view(shape)  # and no further ε
    torch.testing.assert_close(layer.eval()(x), expected, **TIGHT)


def test_statistics_are_updated_after_their_use():
    layer, x = fresh(momentum=1.0, **FREE), 3 + 2 * sample(SHAPE)
    # Before the first update μ = 0 and σ = 1: the layer is γ·x + β.
    expected = layer.weight[:, None] * x + layer.bias[:, None]
    torch.testing.assert_close(layer(x), expected, **TIGHT)
    mean, sigma = moments(x)
    torch.testing.assert_close(layer.running_mean, mean, **TIGHT)
    torch.testing.assert_close(layer.running_std, sigma, **TIGHT)


def test_unclipped_training_is_evaluation_before_the_update():
    layer = fresh(momentum=0.3, **FREE)
    for seed in range(5):
        x = (1 + seed) * sample(SHAPE, seed=seed) + seed
        expected = layer.eval()(x)
        torch.testing.assert_close(layer.train()(x), expected, **TIGHT)
        assert (layer.eval()(x) - expected).abs().max() > 1e-2  # after the update it differs


def test_clipped_training_is_not_evaluation():
    layer = fresh(momentum=0.3, rmax=1.1, dmax=0.1)
    x = 3 + 2 * sample(SHAPE)
    expected = layer.eval()(x)
    assert (layer.train()(x) - expected).abs().max() > 0.1


@pytest.mark.parametrize("steps", [0, 3])
def test_without_room_it_is_batch_normalization_at_every_step(steps):
    layer, other = fresh(rmax=1.0, dmax=0.0), nl.BatchNorm(6).double()
    other.load_state_dict(layer.state_dict(), strict=False)
    for seed in range(steps + 1):
        x, z = sample(SHAPE, seed=seed), sample(SHAPE, seed=seed)
        y, t = layer(x.requires_grad_()), other(z.requires_grad_())
        torch.testing.assert_close(y, t, **TIGHT)
        y.pow(3).sum().backward()
        t.pow(3).sum().backward()
        torch.testing.assert_close(x.grad, z.grad, **TIGHT)


REGIMES = {"batch": {"rmax": 1.0, "dmax": 0.0}, "clipped": {"rmax": 1.1, "dmax": 0.1}, "free": FREE}


def products(layer, x, about=0.0):
    """Σ∂ℓ/∂x and Σ(x − about)·∂ℓ/∂x of each channel, beside the sizes of their terms."""
    x = x.clone().requires_grad_()
    layer(x).pow(3).sum().backward()
    terms = x.grad, (x.detach() - about) * x.grad
    return [(t.sum((0, 2)), t.abs().sum((0, 2))) for t in terms]


@pytest.mark.parametrize("regime", REGIMES)
def test_gradients_are_orthogonal_to_shifts_and_at_no_eps_to_scales(regime):
    """r and d are constants, so that x̂ alone depends on x, whatever the bounds do."""
    layer = fresh(eps=0.0, **REGIMES[regime])
    layer(sample(SHAPE, seed=4))
    for total, size in products(layer, 0.7 + sample(SHAPE)):
        assert (total.abs() / size).max() < 1e-12  # rounding, relative to the terms of the sum


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_eps_spoils_scales_by_a_known_share_and_shifts_not(regime, eps):
    """Σx·∂ℓ/∂x = ε/σ_B² · r/σ_B · Σ(γ·∂ℓ/∂y)(x − μ_B): it is 0 for ε = 0 alone."""
    layer = fresh(eps=eps, **REGIMES[regime])
    layer(sample(SHAPE, seed=4))
    x = 0.7 + sample(SHAPE)
    mean, sigma = moments(x, eps)
    r = (sigma / layer.running_std).clamp(1 / layer.statistics.rmax, layer.statistics.rmax)
    with nl.statistics(layer, update=False):
        y = layer(x).detach().requires_grad_()
    h = layer.weight[:, None] * torch.autograd.grad(y.pow(3).sum(), y)[0]
    share = eps / sigma**2 * r / sigma * (h * (x - mean[:, None])).sum((0, 2))
    (shifts, size), (scales, _) = products(layer, x)
    assert (shifts.abs() / size).max() < 1e-12
    torch.testing.assert_close(scales, share.detach(), rtol=1e-8, atol=1e-10)  # a difference


def test_in_evaluation_neither_holds():
    """Stored statistics do not depend on x: the layer is then a plain affine map."""
    layer = fresh(eps=0.0, **FREE)
    layer(sample(SHAPE, seed=4))
    for total, size in products(layer.eval(), 0.7 + sample(SHAPE)):
        assert (total.abs() / size).max() > 0.1


def test_gradients_hold_r_and_d_constant():
    """The gradient of the formula with r and d detached, and not of the unclipped function."""
    layer = fresh(**FREE)
    layer(3 + sample(SHAPE, seed=4))
    mu, std = layer.running_mean.clone(), layer.running_std.clone()
    x, z = (sample(SHAPE).requires_grad_() for _ in range(2))
    layer(x).pow(3).sum().backward()
    mean, sigma = moments(z)
    r, d = (sigma / std).detach()[:, None], ((mean - mu) / std).detach()[:, None]
    xhat = (z - mean[:, None]) / sigma[:, None] * r + d
    (layer.weight.detach()[:, None] * xhat + layer.bias.detach()[:, None]).pow(3).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, **TIGHT)
    w = sample(SHAPE).requires_grad_()
    layer.eval()(w).pow(3).sum().backward()
    assert (w.grad - x.grad).abs().max() > 0.1


def test_forward_derivatives_hold_r_and_d_constant_too():
    """A learned ε is inside σ_B and so in r, where no tangent of it goes."""
    layer = nl.Normalize(
        6, "n c * -> (c) (n *)", operation=nl.Standardize(nl.LearnedEps(0.5)),
        statistics=fresh(**FREE).statistics,
    ).double()  # fmt: skip
    layer.update = False
    eps, x, dy = layer.eps_learned, 3 + 2 * sample(SHAPE), sample(SHAPE, seed=1)

    def y(eps):
        return torch.func.functional_call(layer, {"eps_learned": eps}, (x,))

    _, tangent = torch.func.jvp(y, (eps.detach(),), (torch.ones_like(eps),))
    (slope,) = torch.autograd.grad(layer(x), [eps], dy)
    torch.testing.assert_close((tangent * dy).sum(), slope.sum(), **TIGHT)


def test_defaults_are_the_papers():
    layer = nl.BatchRenorm(6)
    assert layer.statistics.momentum == 0.01
    assert layer.running_mean.eq(0).all()
    assert layer.running_std.eq(1).all()
    assert math.isclose(layer.eps, 1e-5)
    assert build("batch_renorm", {}).stored_names == ("running_mean", "running_std")
