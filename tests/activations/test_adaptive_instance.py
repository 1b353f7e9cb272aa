"""Adaptive instance normalization: each map gets mean and deviation of a style's map."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import normlab as nl
from activations.cases import sample

TIGHT = {"rtol": 1e-10, "atol": 1e-10}  # float64, the same sums in another order
SHAPES = [(4, 6, 5), (4, 6, 5, 3), (4, 6, 2, 3, 2)]
STYLES = [(4, 6, 7), (4, 6, 4, 4), (1, 6, 9)]


def adain(x, s, eps=1e-5):
    """The formula, map by map, in numpy."""
    y = np.empty_like(x)
    for n, c in np.ndindex(x.shape[:2]):
        content, style = x[n, c], s[n % len(s), c]
        xhat = (content - content.mean()) / np.sqrt(content.var() + eps)
        y[n, c] = np.sqrt(style.var() + eps) * xhat + style.mean()
    return y


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape, style, training):
    x, s = sample(shape), 3 * sample(style, seed=5) + 1
    y = nl.AdaptiveInstanceNorm(6, eps=0.1).train(training)(x, style=s)
    torch.testing.assert_close(y, torch.as_tensor(adain(x.numpy(), s.numpy(), 0.1)), **TIGHT)


def test_the_output_has_the_styles_moments():
    layer = nl.AdaptiveInstanceNorm(6, eps=0.0)
    s = 100 + 7 * sample((4, 6, 4, 4), seed=5)
    y = layer(sample((4, 6, 5, 3)), style=s)
    torch.testing.assert_close(y.mean((2, 3)), s.mean((2, 3)), **TIGHT)
    deviations = [t.std((2, 3), correction=0) for t in (y, s)]
    torch.testing.assert_close(*deviations, **TIGHT)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
def test_a_tensor_in_its_own_style_is_itself_whatever_eps(eps):
    x = 10 * sample((4, 6, 5, 3)) + 3
    torch.testing.assert_close(nl.AdaptiveInstanceNorm(6, eps=eps)(x, style=x), x, **TIGHT)


def test_of_the_content_only_the_shape_of_each_map_is_left():
    """Scale and shift of a map do not show, with a style as without."""
    layer, x, s = nl.AdaptiveInstanceNorm(6, eps=0.0), sample((4, 6, 5)), sample((4, 6, 7), seed=5)
    a, b = 1 + sample((4, 6, 1), seed=8).abs(), sample((4, 6, 1), seed=9)
    torch.testing.assert_close(layer(a * x + b, style=s), layer(x, style=s), **TIGHT)


def test_without_a_style_it_is_instance_normalization():
    x = sample((4, 6, 5, 3))
    plain = nl.InstanceNorm(6, affine=False)
    assert torch.equal(nl.AdaptiveInstanceNorm(6)(x), plain(x))


@pytest.mark.parametrize("shape", [(4, 6), (1, 6), (6,)])
def test_a_pair_is_scale_and_shift(shape):
    x, g = sample((4, 6, 5)), torch.Generator().manual_seed(3)
    scale, shift = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    y = nl.AdaptiveInstanceNorm(6)(x, style=(scale, shift))
    xhat = nl.InstanceNorm(6, affine=False)(x)
    torch.testing.assert_close(y, scale[..., None] * xhat + shift[..., None], **TIGHT)


def test_the_pair_of_a_styles_moments_is_the_style():
    x, s = sample((4, 6, 5)), sample((4, 6, 7), seed=5)
    layer = nl.AdaptiveInstanceNorm(6)
    pair = ((s.var(2, correction=0) + 1e-5).sqrt(), s.mean(2))
    torch.testing.assert_close(layer(x, style=pair), layer(x, style=s), **TIGHT)


def test_gradients_through_content_and_style():
    layer = nl.AdaptiveInstanceNorm(3)
    x, s = sample((2, 3, 4)).requires_grad_(), sample((2, 3, 5), seed=5).requires_grad_()
    assert gradcheck(lambda x, s: layer(x, style=s), (x, s))
    assert gradgradcheck(lambda x, s: layer(x, style=s), (x, s))
    pair = [sample((2, 3), seed=k).requires_grad_() for k in (6, 7)]
    assert gradcheck(lambda x, a, b: layer(x, style=(a, b)), (x, *pair))


def test_a_mask_and_channels_last():
    first, last = nl.AdaptiveInstanceNorm(6), nl.AdaptiveInstanceNorm(6, channel_dim=-1)
    x, s = sample((4, 6, 5)), sample((4, 6, 3, 2), seed=5)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[2, 3:] = False
    dirty = x.masked_fill(~mask[:, None], torch.nan)
    y = first(dirty, mask, style=s)
    assert (y[2, :, 3:] == 0).all()
    torch.testing.assert_close(y[2:3, :, :3], first(x[2:3, :, :3], style=s[2:3]), **TIGHT)
    other = last(dirty.movedim(1, -1), mask, style=s.movedim(1, -1))
    torch.testing.assert_close(other.movedim(-1, 1), y, **TIGHT)


def test_low_precision_is_computed_in_float32():
    layer = nl.AdaptiveInstanceNorm(6)
    x, s = sample((4, 6, 5)).bfloat16(), sample((4, 6, 7), seed=5).bfloat16()
    y = layer(x, style=s)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x.float(), style=s.float()).bfloat16())


def test_a_large_mean_of_the_style_keeps_its_deviation():
    s = 1e4 + sample((4, 6, 50), seed=5)
    y = nl.AdaptiveInstanceNorm(6)(sample((4, 6, 50)).float(), style=s.float())
    # Steps of float32 at 1e4 are 1e-3.
    torch.testing.assert_close(y.double().std(2), s.std(2), rtol=2e-3, atol=0)


def test_compiled_with_a_style():
    torch._dynamo.reset()
    layer = nl.AdaptiveInstanceNorm(6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler itself
        compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
        leaves = [
            (sample((4, 6, 5)).requires_grad_(), sample((4, 6, 7), seed=5).requires_grad_())
            for _ in range(2)
        ]
        results = [f(x, style=s) for f, (x, s) in zip((layer, compiled), leaves, strict=True)]
        for y in results:
            y.pow(3).sum().backward()
    torch.testing.assert_close(*results, **TIGHT)
    for a, b in zip(*leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-8)  # sums of cubes


def test_empty_batches_with_a_style():
    layer = nl.AdaptiveInstanceNorm(6)
    assert layer(torch.zeros(0, 6, 5), style=torch.zeros(0, 6, 3)).shape == (0, 6, 5)
    assert layer(torch.zeros(0, 6, 5), style=torch.zeros(1, 6, 3)).shape == (0, 6, 5)


@pytest.mark.parametrize(
    ("style", "error", "text"),
    [
        (torch.zeros(4, 5, 3), ValueError, r"6 channels.*received \(4, 5, 3\)"),
        (torch.zeros(3, 6, 3), ValueError, r"as many samples.*received \(3, 6, 3\)"),
        (torch.zeros(4, 6), ValueError, r"positions.*received \(4, 6\).*as a pair"),
        (torch.zeros(4, 6, 0), ValueError, "positions"),
        (torch.zeros(4, 6, 3).long(), TypeError, "received torch.int64"),
        ([1.0], TypeError, "received list"),
        ((torch.zeros(4, 6),), TypeError, "holds two tensors"),
        ((torch.zeros(4, 6), 1.0), TypeError, "holds two tensors"),
        ((torch.zeros(4, 12), torch.zeros(4, 12)), ValueError, r"received \(4, 12\).*chunk"),
        ((torch.zeros(4, 6), torch.zeros(4, 6).long()), TypeError, "received torch.int64"),
    ],
)
def test_wrong_styles(style, error, text):
    with pytest.raises(error, match=text):
        nl.AdaptiveInstanceNorm(6)(torch.randn(4, 6, 5), style=style)
