"""Proxy normalization: a Gaussian stands for what a batch would measure after the activation."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

import normlab as nl
from activations.cases import build, sample

TIGHT = {"rtol": 1e-10, "atol": 1e-10}  # float64, the same sums in another order
PHI = {"relu": lambda u: np.maximum(u, 0), "silu": lambda u: u * special.expit(u)}
GRID = stats.norm.ppf((np.arange(200) + 0.5) / 200)


def oracle(x, p, groups=1, eps=1e-5, proxy_eps=0.03, activation="relu", grid=GRID):
    """The formula in numpy, channel by channel."""
    flat = x.reshape(len(x), groups, -1)
    flat = (flat - flat.mean(2, keepdims=True)) / np.sqrt(flat.var(2, keepdims=True) + eps)
    xhat, z = flat.reshape(x.shape), np.empty_like(x)
    for c in range(x.shape[1]):
        gamma, beta, spread, centre = (
            p[n][c] for n in ("weight", "bias", "proxy_weight", "proxy_bias")
        )
        y = gamma * xhat[:, c] + beta
        if activation is None:
            mean, variance = gamma * centre + beta, (gamma * (1 + spread)) ** 2
        else:
            proxy = PHI[activation](gamma * ((1 + spread) * grid + centre) + beta)
            y, mean, variance = PHI[activation](y), proxy.mean(), proxy.var()
        z[:, c] = (y - mean) / np.sqrt(variance + proxy_eps)
    return z


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"groups": 3}, {"activation": "silu"}, {"activation": None, "groups": 2},
     {"eps": 0.1, "proxy_eps": 0.5}],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (4, 6, 5, 3)])
def test_values(shape, options, training):
    layer, x = build("proxy", options).train(training), sample(shape)
    parameters = {n: p.detach().numpy() for n, p in layer.named_parameters()}
    expected = torch.as_tensor(oracle(x.numpy(), parameters, **options))
    torch.testing.assert_close(layer(x).detach(), expected, **TIGHT)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_channels_that_are_the_proxy_come_out_standardized(activation):
    """x̂ holds the quantiles themselves: ε of the norm fills up what they lack to variance 1."""
    layer = build("proxy", {"activation": activation, "eps": 1 - GRID.var(), "proxy_eps": 0.0})
    with torch.no_grad():
        layer.proxy_bias.zero_()
        layer.proxy_weight.zero_()
    x = torch.as_tensor(GRID).expand(4, 6, 200)
    z = layer(x).movedim(1, 0).reshape(6, -1)
    torch.testing.assert_close(z.mean(1), torch.zeros(6).double(), **TIGHT)
    torch.testing.assert_close(z.std(1, correction=0), torch.ones(6).double(), **TIGHT)


def test_a_learned_proxy_standardizes_channels_of_other_moments():
    """Channels of mean m and deviation d under layer normalization: β̃ = m and γ̃ = d − 1."""
    layer = build("proxy", {"activation": "silu", "eps": 0.0, "proxy_eps": 0.0})
    means = torch.linspace(-1, 1, 6).double()
    deviations = torch.linspace(0.5, 1.5, 6).double()
    x = means[:, None] + deviations[:, None] * torch.as_tensor(GRID)
    centre, scale = x.mean(), x.std(correction=0)
    with torch.no_grad():
        layer.proxy_bias.copy_((means - centre) / scale)
        layer.proxy_weight.copy_(deviations / scale - 1)
    z = layer(x.expand(4, 6, 200)).movedim(1, 0).reshape(6, -1)
    torch.testing.assert_close(z.mean(1), torch.zeros(6).double(), **TIGHT)
    torch.testing.assert_close(z.std(1, correction=0), torch.ones(6).double(), **TIGHT)


def test_gaussian_data():
    x = torch.randn(16, 6, 4000, generator=torch.Generator().manual_seed(0))
    layer = nl.ProxyNorm(6, proxy_eps=0.0)
    z = layer(x).movedim(1, 0).reshape(6, -1)
    # 64,000 draws: 4/√64000 ≈ 0.016; 200 quantiles lack 1% of the variance in the tail.
    assert z.mean(1).abs().max() < 0.02
    assert (z.std(1) - 1).abs().max() < 0.02


def test_without_an_activation_moments_are_exact():
    layer = build("proxy", {"activation": None, "proxy_eps": 0.0, "eps": 0.0})
    with torch.no_grad():
        layer.proxy_bias.zero_()
        layer.proxy_weight.zero_()
    x = sample((4, 6, 5))
    plain = nl.LayerNorm(6, affine=False, eps=0.0)(x)
    # γ leaves its sign: (γ·x̂ + β − β)/|γ|.
    torch.testing.assert_close(layer(x), plain * layer.weight.sign()[:, None], **TIGHT)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_quantiles_converge_to_the_integral(activation):
    layer = build("proxy", {"activation": activation, "samples": 20_000})
    mean, variance = (t.detach().numpy() for t in layer._proxy())
    for c in range(6):
        gamma, beta, spread, centre = (
            p[c].item() for p in (layer.weight, layer.bias, layer.proxy_weight, layer.proxy_bias)
        )

        def moment(k, values=(gamma, beta, spread, centre)):
            a, b, s, m = values
            kink = [-(b / a + m) / (1 + s)]
            return integrate.quad(
                lambda g: PHI[activation](a * ((1 + s) * g + m) + b) ** k * stats.norm.pdf(g),
                -8, 8, points=kink if abs(kink[0]) < 8 else None,
            )[0]  # fmt: skip

        # The tails beyond the outer quantiles, of weight 1/20000.
        assert mean[c] == pytest.approx(moment(1), abs=2e-3)
        assert variance[c] == pytest.approx(moment(2) - moment(1) ** 2, abs=2e-3)


def test_parameters_begin_at_the_standard_normal():
    layer = nl.ProxyNorm(6)
    mean, variance = layer._proxy()
    # E relu(g) = 1/√(2π), Var = ½ − 1/(2π); quantiles err by their tails.
    torch.testing.assert_close(
        mean, torch.full((6,), 1 / math.sqrt(2 * math.pi)), rtol=5e-3, atol=0
    )
    torch.testing.assert_close(variance, torch.full((6,), 0.5 - 0.5 / math.pi), rtol=2e-2, atol=0)
    with torch.no_grad():
        layer.proxy_bias.add_(1.0)
        layer.proxy_weight.add_(1.0)
    layer.reset_parameters()
    assert torch.equal(layer._proxy()[0], mean)


def test_samples_stand_alone():
    layer, x = build("proxy", {"groups": 3}), sample((4, 6, 5))
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]), **TIGHT)
    assert torch.equal(layer(x), layer.eval()(x))


def test_gradients_are_those_of_the_formula():
    card, layer = nl.catalogue()["proxy"], build("proxy", {"groups": 3})
    x, z = (sample((4, 6, 3, 2)).requires_grad_() for _ in range(2))
    w = sample((4, 6, 3, 2), seed=7)
    (layer(x) * w).sum().backward()
    leaves = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
    (card.reference(z, leaves, groups=3) * w).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, **TIGHT)
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, leaves[name].grad, **TIGHT)
        assert p.grad.abs().max() > 0


def test_a_mask_and_channels_last():
    first, last = build("proxy", {}), build("proxy", {}, channel_dim=-1)
    x, mask = sample((4, 6, 5)), torch.ones(4, 5, dtype=torch.bool)
    mask[2, 3:] = False
    dirty = x.masked_fill(~mask[:, None], torch.nan)
    z = first(dirty, mask)
    assert (z[2, :, 3:] == 0).all()
    torch.testing.assert_close(z[2:3, :, :3], first(x[2:3, :, :3]), **TIGHT)
    torch.testing.assert_close(last(dirty.movedim(1, -1), mask).movedim(-1, 1), z, **TIGHT)


def test_low_precision_is_computed_in_float32():
    layer, x = build("proxy", {}).float(), sample((4, 6, 5)).bfloat16()
    z = layer(x)
    assert z.dtype == torch.bfloat16
    assert torch.equal(z, layer(x.float()).bfloat16())


def test_quantiles_keep_their_digits_and_stay_out_of_the_state_dict():
    layer = nl.ProxyNorm(6).bfloat16().float()
    assert torch.equal(layer.quantiles, nl.ProxyNorm(6).quantiles)
    np.testing.assert_allclose(layer.quantiles.numpy(), GRID, rtol=1e-12, atol=1e-12)  # rounding
    assert "quantiles" not in layer.state_dict()
    with torch.device("meta"):
        made = nl.ProxyNorm(6)
    assert torch.equal(made.to_empty(device="cpu").quantiles, layer.quantiles)


@pytest.mark.parametrize("options", [{"activation": "tlu"}, {"proxy_eps": -1.0}, {"samples": 1},
                                     {"groups": 4}])  # fmt: skip
def test_wrong_options(options):
    with pytest.raises(ValueError, match=r"received|does not fit"):
        nl.ProxyNorm(6, **options)
