"""Switchable normalization: mixtures of the statistics of instance, layer and batch."""

import numpy as np
import pytest
import torch

import normlab as nl
from activations.cases import build, sample

PARTS = ("instance", "layer", "batch")
SHAPES = [(8, 6), (8, 6, 5), (8, 6, 5, 3), (4, 6, 2, 3, 2)]
TIGHT = {"rtol": 1e-10, "atol": 1e-10}  # float64, the same sums in another order
AXES = {"instance": lambda x: tuple(range(2, x.ndim)), "layer": lambda x: tuple(range(1, x.ndim)),
        "batch": lambda x: (0, *range(2, x.ndim))}  # fmt: skip


def softmax(v):
    e = np.exp(v - v.max())
    return e / e.sum()


def oracle(x, p, over=PARTS, eps=1e-5, stored=None, momentum=0.1, training=True):
    """(y, new stored statistics), from the formula, each statistic taken from x by itself."""
    w, v = softmax(p["mean_weight"]), softmax(p["var_weight"])
    mean, var = 0.0, 0.0
    for k, part in enumerate(over):
        axes = AXES[part](x)
        mu = x.mean(axes, keepdims=True) if axes else x
        s2 = ((x - mu) ** 2).mean(axes, keepdims=True) if axes else 0 * x
        if part == "batch" and not training:
            shape = (1, -1, *[1] * (x.ndim - 2))
            mu, s2 = (stored[n].reshape(shape) for n in ("running_mean", "running_var"))
        elif part == "batch":
            m = x.size // x.shape[1]
            new = {"running_mean": mu.ravel(), "running_var": s2.ravel() * m / (m - 1)}
            stored = {n: (1 - momentum) * stored[n] + momentum * new[n] for n in new}
        mean, var = mean + w[k] * mu, var + v[k] * s2
    shape = (1, -1, *[1] * (x.ndim - 2))
    xhat = (x - mean) / np.sqrt(var + eps)
    return xhat * p["weight"].reshape(shape) + p["bias"].reshape(shape), stored


def numbers(layer):
    return {n: p.detach().numpy() for n, p in layer.named_parameters()}


@pytest.mark.parametrize("over", [PARTS, ("instance", "layer"), ("batch", "layer"), ("layer",)])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_in_training_and_evaluation(shape, over):
    layer = build("switchable", {"over": over, "momentum": 0.3})
    stored = {"running_mean": np.zeros(6), "running_var": np.ones(6)}
    for step in range(3):
        x = sample(shape, seed=step)
        expected, stored = oracle(x.numpy(), numbers(layer), over, stored=stored, momentum=0.3)
        torch.testing.assert_close(layer(x).detach(), torch.as_tensor(expected), **TIGHT)
    if "batch" in over:
        for name, value in stored.items():
            # Stored statistics became float64 with the layer, so that only sums differ.
            np.testing.assert_allclose(getattr(layer, name).numpy(), value, rtol=1e-10, atol=1e-10)
    x = sample(shape, seed=9)
    expected, _ = oracle(x.numpy(), numbers(layer), over, stored=stored, training=False)
    torch.testing.assert_close(layer.eval()(x).detach(), torch.as_tensor(expected), **TIGHT)


@pytest.mark.parametrize("part", PARTS)
def test_one_hot_weights_are_the_one_normalization(part):
    """softmax(1000, 0, 0) is (1, 0, 0) exactly."""
    mixed, alone = build("switchable", {}), build(part, {})
    with torch.no_grad():
        for weight in (mixed.mean_weight, mixed.var_weight):
            weight.zero_()[PARTS.index(part)] = 1000.0
        for name in ("weight", "bias"):
            getattr(alone, name).copy_(getattr(mixed, name))
    x, z = (sample((8, 6, 5, 3)).requires_grad_() for _ in range(2))
    for _ in range(2):
        y, expected = mixed(x), alone(z)
        torch.testing.assert_close(y, expected, **TIGHT)
    (y**3).sum().backward()
    (expected**3).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-8, atol=1e-8)  # sums of cubes
    torch.testing.assert_close(mixed.eval()(x), alone.eval()(z), **TIGHT)


def test_the_two_vectors_of_weights_are_separate():
    """The mean of one, the variance of another."""
    layer, x = nl.SwitchableNorm(6, eps=0.0).double(), sample((8, 6, 5))
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([1000.0, 0, 0]))
        layer.var_weight.copy_(torch.tensor([0, 0, 1000.0]))
    mean, deviation = x.mean(2, keepdim=True), x.std((0, 2), correction=0, keepdim=True)
    torch.testing.assert_close(layer(x), (x - mean) / deviation, **TIGHT)


def test_weights_start_equal_and_a_reset_brings_them_back():
    layer = nl.SwitchableNorm(6)
    with torch.no_grad():
        layer.mean_weight.fill_(3.0)
        layer.weight.fill_(3.0)
    layer.reset_parameters()
    assert all(layer.state_dict()[n].eq(1).all() for n in ("mean_weight", "var_weight", "weight"))


def test_without_the_batch_samples_stand_alone_and_nothing_is_stored():
    layer = build("switchable", {"over": ("instance", "layer")})
    x = sample((8, 6, 5))
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]), **TIGHT)
    assert not list(layer.buffers())
    assert layer(x[:1, :, 0]).isfinite().all()  # N C, one sample
    assert torch.equal(layer(x), layer.eval()(x))


def test_gradients_are_those_of_the_formula():
    card, layer = nl.catalogue()["switchable"], build("switchable", {})
    x, z = (sample((4, 6, 3, 2)).requires_grad_() for _ in range(2))
    w = sample((4, 6, 3, 2), seed=7)
    (layer(x) * w).sum().backward()
    leaves = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
    (card.reference(z, leaves) * w).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, **TIGHT)
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, leaves[name].grad, **TIGHT)


@pytest.mark.parametrize("training", [True, False])
def test_a_mask_takes_positions_out(training):
    """Samples of different lengths: those of one length, on their own, are the oracle's."""
    layer = build("switchable", {"momentum": 1.0})
    x, mask = sample((4, 6, 7)), torch.ones(4, 7, dtype=torch.bool)
    mask[1, 4:] = mask[3, 2:] = False
    layer(x, mask)
    values = x.movedim(1, -1)[mask]  # (M, C)
    torch.testing.assert_close(layer.running_mean, values.mean(0), **TIGHT)
    torch.testing.assert_close(layer.running_var, values.var(0), **TIGHT)
    y = layer.train(training)(x.masked_fill(~mask[:, None], torch.nan), mask)
    w, v = layer.mean_weight.softmax(0), layer.var_weight.softmax(0)
    batch = (values.mean(0), values.var(0, correction=0 if training else 1))
    for n in range(4):
        z = x[n][:, mask[n]]
        mean = w[0] * z.mean(1) + w[1] * z.mean() + w[2] * batch[0]
        variance = v[0] * z.var(1, correction=0) + v[1] * z.var(correction=0) + v[2] * batch[1]
        xhat = (z - mean[:, None]) / (variance[:, None] + 1e-5).sqrt()
        expected = xhat * layer.weight[:, None] + layer.bias[:, None]
        torch.testing.assert_close(y[n][:, mask[n]], expected, **TIGHT)
        assert (y[n][:, ~mask[n]] == 0).all()


def test_channels_last_is_channels_first():
    first, last = build("switchable", {}), build("switchable", {}, channel_dim=-1)
    x = sample((4, 6, 3, 2))
    torch.testing.assert_close(last(x.movedim(1, -1)).movedim(-1, 1), first(x), **TIGHT)


def test_low_precision_is_computed_in_float32():
    layer, x = build("switchable", {}).float(), sample((8, 6, 5)).bfloat16()
    y, exact = layer(x), layer(x.float())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact.bfloat16())


def test_policies():
    layer, x = build("switchable", {}), sample((8, 6, 5))
    whole = build("switchable", {})
    with nl.statistics(layer, update="accumulate"):
        layer(x[:3])
        layer(x[3:])
        nl.statistics.commit(layer)
    whole(x)
    torch.testing.assert_close(layer.running_mean, whole.running_mean, **TIGHT)
    torch.testing.assert_close(layer.running_var, whole.running_var, **TIGHT)
    with nl.statistics(layer, use="stored", update=False):
        assert torch.equal(layer.train()(x), layer.eval()(x))


@pytest.mark.parametrize("over", [(), ("batch", "batch"), ("group",), "sample"])
def test_wrong_mixtures(over):
    with pytest.raises(ValueError, match="over names one or more"):
        nl.SwitchableNorm(6, over=over)
