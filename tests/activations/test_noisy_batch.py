"""Noisy batch normalization (1805.11604): what the noise is, where it stands, when it is fresh."""

import copy
import math

import pytest
import torch

import normlab as nl
from activations.cases import build, sample
from normlab.activations.noisy_batch import Noise

TIGHT = {"rtol": 1e-10, "atol": 1e-11}  # float64 rounding
Z = 5.0  # standard errors: a normal estimate fails by chance once in 1.7 million draws


def drawn(shape=(200, 40, 10, 10), seed=0, **options):
    """m and s of one step on a network without normalization: its values at x = 0 and 1."""
    layer = nl.NoisyBatchNorm(shape[1], normalize=False, **options).double()
    torch.manual_seed(seed)
    m = layer(torch.zeros(shape, dtype=torch.float64))
    torch.manual_seed(seed)
    return m, layer(torch.ones(shape, dtype=torch.float64)) - m


def within(value, expected, error):
    assert abs(value - expected) < Z * error, (value, expected, error)


def test_without_noise_it_is_batch_normalization():
    layer, plain = build("noisy_batch", {"noise": None}), build("batch", {})
    for seed in range(2):
        x = sample((8, 6, 5), seed=seed)
        torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)  # the same kernels
    zero = build("noisy_batch", {"noise": (0.0, 0.0, 0.0)})
    torch.testing.assert_close(zero(x), build("batch", {})(x), **TIGHT)


def test_evaluation_is_that_of_batch_normalization():
    layer, plain, before = build("noisy_batch", {}), build("batch", {}), torch.get_rng_state()
    for seed in range(3):
        x = sample((8, 6, 5), seed=seed)
        layer(x), plain(x)
    assert not torch.equal(torch.get_rng_state(), before)
    before = torch.get_rng_state()
    assert torch.equal(layer.eval()(x), plain.eval()(x))  # statistics do not see the noise
    assert torch.equal(torch.get_rng_state(), before)


def test_the_noise_comes_after_the_affine_form():
    layer, plain, x = build("noisy_batch", {}), build("batch", {}), sample((8, 6, 5))
    m, s = drawn((8, 6, 5), seed=3)
    torch.manual_seed(3)
    torch.testing.assert_close(layer(x), s * plain(x) + m, **TIGHT)


def test_gradients_go_through_the_scale():
    layer, x = build("noisy_batch", {}), sample((4, 6, 3)).requires_grad_()
    layer.update = False

    def repeated(x):
        torch.manual_seed(0)
        return layer(x)

    assert torch.autograd.gradcheck(repeated, (x,))


def test_every_step_is_fresh_and_a_seed_repeats_it():
    layer, x = nl.NoisyBatchNorm(6), torch.randn(8, 6, 5)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    other = nl.NoisyBatchNorm(6)
    torch.manual_seed(1)
    assert torch.equal(other(x), first)


def test_ranges_of_the_shifts():
    """|μ| ≤ ½ and |m − μ| ≤ 0.1 exactly, as uniform numbers have."""
    m, _ = drawn()
    assert m.abs().max() <= 0.6 + 1e-7  # drawn in float32
    widths = m.amax((0, 2, 3)) - m.amin((0, 2, 3))
    assert widths.max() <= 0.2 + 1e-7
    assert widths.min() > 0.199  # 20,000 uniform numbers in each channel


def test_moments_of_the_noise_within_units():
    """Within a unit: m has variance 0.1²/3, s has 0.1² and kurtosis 3; they are independent."""
    m, s = drawn()
    m, s = (t - t.mean((0, 2, 3), keepdim=True) for t in (m, s))
    count = m.numel()
    variance = 0.1**2 / 3
    # Var(u²) = (9/5 − 1)·variance² for a uniform number, (3 − 1)·variance² for a normal one.
    within(m.pow(2).mean().item(), variance, variance * math.sqrt(0.8 / count))
    within(s.pow(2).mean().item(), 0.01, 0.01 * math.sqrt(2 / count))
    within((m * s).mean().item(), 0.0, math.sqrt(variance * 0.01 / count))
    within(s.pow(4).mean().item() / 1e-4, 3.0, math.sqrt(96 / count))
    for t, v in ((m, variance), (s, 0.01)):  # neighbours along samples and positions
        for dim in (0, 2, 3):
            within((t * t.roll(1, dim)).mean().item(), 0.0, v / math.sqrt(count))


def test_moments_of_the_noise_between_units():
    """Of the units: E μ = 0, Var μ = 1/12, E σ = 1⅛, Var σ = ¼²/12, and σ in [1, 1¼]."""
    means, scales = [], []
    for seed in range(60):
        m, s = drawn((400, 50), seed=seed)
        means.append(m.mean(0)), scales.append(s.mean(0))
    mu, sigma = torch.cat(means), torch.cat(scales)
    count = mu.numel()  # 3,000 units, each known to 0.1/√400 for σ, to 0.058/√400 for μ
    error_mu, error_sigma = 0.1**2 / 3 / 400, 0.1**2 / 400
    for value, mean, variance in ((mu, 0.0, 1 / 12 + error_mu),
                                  (sigma, 1.125, 0.25**2 / 12 + error_sigma)):  # fmt: skip
        within(value.mean().item(), mean, math.sqrt(variance / count))
        # A uniform number's Var of squares, 0.8·variance², bounds that of it plus a normal one.
        spread = (value - mean).pow(2).mean().item()
        within(spread, variance, variance * math.sqrt(1.0 / count))
    assert sigma.min() > 1 - 0.1 * 5.5 / 20  # 5.5 standard errors, of 3,000 units
    assert sigma.max() < 1.25 + 0.1 * 5.5 / 20


def test_each_position_of_a_sample_has_its_own_noise():
    m, s = drawn((4, 3, 5, 7))
    for t in (m, s):
        assert t.unique().numel() == t.numel() or t.unique().numel() > 0.99 * t.numel()


def test_other_ranges():
    m, s = drawn((2000, 4), noise=(0.0, 0.0, 0.3))
    assert m.abs().max() <= 0.3
    within(s.mean().item(), 1.0, 0.3 / math.sqrt(s.numel()))
    within(s.var().item(), 0.09, 0.09 * math.sqrt(2 / s.numel()))
    assert nl.NoisyBatchNorm(4, noise=(1, 2, 3)).noise == Noise(1, 2, 3)


@pytest.mark.parametrize("noise", [(-0.1, 0, 0), (0, math.nan, 0), (0, 0, math.inf)])
def test_ranges_that_are_none(noise):
    with pytest.raises(ValueError, match="finite width of at least 0; received"):
        nl.NoisyBatchNorm(4, noise=noise)


def test_the_control_has_nothing_but_the_noise():
    layer = nl.NoisyBatchNorm(6, normalize=False)
    assert not list(layer.parameters())
    assert not layer.stored_names
    x = torch.randn(8, 6, 5)
    assert torch.equal(layer.eval()(x), x)
    assert not torch.equal(layer.train()(x), x)
    layer(torch.randn(1, 6))  # nothing is averaged


def test_padding_stays_zero():
    mask = torch.ones(8, 5, dtype=torch.bool)
    mask[:, 3:] = False
    for normalize in (True, False):
        y = nl.NoisyBatchNorm(6, normalize=normalize)(torch.randn(8, 6, 5), mask)
        assert (y[:, :, 3:] == 0).all()
        assert (y[:, :, :3] != 0).all()


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_units_are_channels_whatever_the_layout(channel_dim):
    shape = (400, 6, 9) if channel_dim == 1 else (400, 9, 6)
    layer = nl.NoisyBatchNorm(6, normalize=False, channel_dim=channel_dim)
    m = layer(torch.zeros(shape)).movedim(channel_dim, 1)
    assert (m.amax((0, 2)) - m.amin((0, 2))).max() <= 0.2 + 1e-6


@pytest.mark.parametrize("noise", [None, Noise()])
def test_training_it_compiles_whole(noise):
    layer, x = nl.NoisyBatchNorm(6, noise=noise), torch.randn(8, 6, 5, requires_grad=True)
    other, z = copy.deepcopy(layer), x.detach().clone().requires_grad_()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).pow(3).sum().backward()
    assert x.grad.isfinite().all()
    if noise is None:
        other(z).pow(3).sum().backward()
        torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-5)  # float32 sums
