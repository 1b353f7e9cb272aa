"""Spatially-adaptive normalization: scale and shift of each position, from a segmentation."""

import copy
import warnings

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn import functional as F

import normlab as nl
from activations.cases import sample

TIGHT = {"rtol": 1e-10, "atol": 1e-10}  # float64, the same sums in another order
PLACES = {1: (7,), 2: (4, 6), 3: (2, 4, 3)}


def build(positions=2, seed=0, **options):
    torch.manual_seed(seed)
    options = {"labels": 3, "hidden": 5, **options}
    return nl.SpatiallyAdaptiveNorm(6, positions=positions, **options).double()


def one_hot(shape, seed=3):
    g = torch.Generator().manual_seed(seed)
    return F.one_hot(torch.randint(3, shape, generator=g), 3).movedim(-1, 1).double()


def nearest(m, size):
    """The value at ⌊i·old/new⌋ along each axis."""
    for axis, new in enumerate(size, start=2):
        old = m.shape[axis]
        m = m.index_select(axis, torch.tensor([i * old // new for i in range(new)]))
    return m


def convolve(m, weight, bias):
    """Σ over neighbours: zeros outside, shifted copies times the kernel's columns."""
    rank = m.ndim - 2
    padded = F.pad(m, (1, 1) * rank)
    y = bias.view(1, -1, *[1] * rank)
    for offset in torch.cartesian_prod(*[torch.arange(3)] * rank).reshape(-1, rank).tolist():
        window = padded
        for axis, o in enumerate(offset):
            window = window.narrow(2 + axis, o, m.shape[2 + axis])
        y = y + torch.einsum("nl...,kl->nk...", window, weight[(..., *offset)])
    return y


def oracle(layer, xhat, segmentation):
    p = dict(layer.named_parameters())
    m = nearest(segmentation, xhat.shape[2:])
    h = convolve(m, p["shared.weight"], p["shared.bias"]).clamp(min=0)
    gamma, beta = (convolve(h, p[f"{n}.weight"], p[f"{n}.bias"]) for n in ("gamma", "beta"))
    return xhat * (1 + gamma) + beta


@pytest.mark.parametrize("over", ["batch", "instance"])
@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("positions", [1, 2, 3])
def test_values_in_training_and_evaluation(positions, resized, over):
    layer, places = build(positions, over=over), PLACES[positions]
    bare = nl.norm(over, 6, affine=False).double()
    m = one_hot((4, *(2 * n + 1 if resized else n for n in places)))
    for step in range(4):
        x, training = sample((4, 6, *places), seed=step), step < 3
        y = layer.train(training)(x, segmentation=m)
        torch.testing.assert_close(y, oracle(layer, bare.train(training)(x), m), **TIGHT)


def test_maps_of_zero_leave_batch_normalization_without_affine():
    layer, plain = build(), nl.BatchNorm(6, affine=False).double()
    with torch.no_grad():
        for p in (*layer.gamma.parameters(), *layer.beta.parameters()):
            p.zero_()
    x, m = sample((4, 6, 4, 6)), one_hot((4, 4, 6))
    assert torch.equal(layer(x, segmentation=m), plain(x))
    assert torch.equal(layer.eval()(x, segmentation=m), plain.eval()(x))


def test_constant_maps_are_an_affine_batch_normalization():
    """γ(m) and β(m) from the last biases alone: the scale is 1 + γ."""
    layer, plain = build(), nl.BatchNorm(6).double()
    with torch.no_grad():
        for convolution in (layer.gamma, layer.beta):
            convolution.weight.zero_()
        plain.weight.copy_(1 + layer.gamma.bias)
        plain.bias.copy_(layer.beta.bias)
    x = sample((4, 6, 4, 6))
    torch.testing.assert_close(layer(x, segmentation=one_hot((4, 4, 6))), plain(x), **TIGHT)


def test_a_segmentation_acts_where_it_is():
    """Two convolutions of width 3 reach two positions."""
    layer, x, m = build(1).eval(), sample((4, 6, 12)), one_hot((4, 12))
    other = m.clone()
    other[:, :, 6] = m[:, :, 6].roll(1, 1)
    changed = (layer(x, segmentation=m) != layer(x, segmentation=other)).any(1).any(0)
    assert changed.nonzero().ravel().tolist() == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 5), (8, 6, 5, 3), (8, 6, 4, 3, 2)])
def test_without_a_segmentation_any_rank_and_gradient_zero(shape):
    layer, plain, x = build(), nl.BatchNorm(6, affine=False).double(), sample(shape)
    y = layer(x.requires_grad_())
    assert torch.equal(y, plain(x))
    y.pow(2).sum().backward()
    assert all((p.grad == 0).all() for p in layer.parameters())


def test_without_labels_there_are_no_convolutions():
    layer = nl.SpatiallyAdaptiveNorm(6)
    assert not list(layer.parameters())
    with pytest.raises(ValueError, match="Build the layer with labels=L"):
        layer(torch.randn(4, 6, 4, 6), segmentation=torch.zeros(4, 3, 4, 6))


@pytest.mark.parametrize("resized", [False, True])
def test_gradients_through_everything(resized):
    layer = build(1, hidden=2)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    m = sample((2, 3, 6 if resized else 4), seed=5)

    def function(x, m, *values):
        given = dict(zip(names, values, strict=True))
        return functional_call(layer, given, (x,), {"segmentation": m})

    inputs = [t.detach().clone().requires_grad_() for t in (sample((2, 6, 4)), m, *parameters)]
    with nl.statistics(layer, update=False):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs, fast_mode=True)


def test_a_mask_and_channels_last():
    first, last = build(), build(channel_dim=-1)
    x, m, mask = sample((4, 6, 4, 6)), one_hot((4, 4, 6)), torch.ones(4, 4, 6, dtype=torch.bool)
    mask[1, 2:] = False
    dirty = x.masked_fill(~mask[:, None], torch.nan)
    y = first(dirty, mask, segmentation=m)
    assert (y.movedim(1, -1)[~mask] == 0).all()
    assert (y.movedim(1, -1)[mask] != 0).all()
    assert y.isfinite().all()
    other = last(dirty.movedim(1, -1), mask, segmentation=m.movedim(1, -1))
    torch.testing.assert_close(other.movedim(-1, 1), y, **TIGHT)


def test_instances_share_nothing_between_processes():
    layer = nl.SpatiallyAdaptiveNorm(6, over="instance", reduce=lambda total: 2 * total + 1)
    x = sample((4, 6, 5, 3))
    assert torch.equal(layer(x), nl.SpatiallyAdaptiveNorm(6, over="instance")(x))


def test_low_precision():
    layer, x, m = build().float(), sample((4, 6, 4, 6)).bfloat16(), one_hot((4, 4, 6)).bfloat16()
    y = layer(x, segmentation=m)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x.float(), segmentation=m.float()).bfloat16())
    assert layer.bfloat16()(x, segmentation=m).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x, segmentation=m).dtype == torch.bfloat16


def test_compiled_with_a_segmentation():
    torch._dynamo.reset()
    eager, m = build(), one_hot((4, 8, 3))
    traced = copy.deepcopy(eager)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler itself
        compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
        x, z = (sample((4, 6, 4, 6)).requires_grad_() for _ in range(2))
        y, t = eager(x, segmentation=m), compiled(z, segmentation=m)
        torch.testing.assert_close(t, y, **TIGHT)
        y.pow(2).sum().backward()
        t.pow(2).sum().backward()
    for p, q in zip((x, *eager.parameters()), (z, *traced.parameters()), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-8)  # sums of squares


def test_empty_batches_with_a_segmentation():
    layer = build()
    assert layer(torch.zeros(0, 6, 4, 6), segmentation=torch.zeros(0, 3, 4, 6)).shape[0] == 0


def test_a_reset_draws_the_convolutions_anew():
    layer = build()
    before = layer.gamma.weight.clone()
    layer(sample((4, 6, 4, 6)))
    layer.reset_parameters()
    assert (layer.gamma.weight != before).all()
    assert (layer.running_mean == 0).all()


@pytest.mark.parametrize(
    ("shape", "segmentation", "error", "text"),
    [
        ((4, 6, 5), torch.zeros(4, 3, 5), ValueError, r"2 position axes.*positions=1"),
        ((4, 6, 4, 6), torch.zeros(4, 2, 4, 6), ValueError, r"3 channels.*\(4, 2, 4, 6\)"),
        ((4, 6, 4, 6), torch.zeros(3, 3, 4, 6), ValueError, "as many samples"),
        ((4, 6, 4, 6), torch.zeros(4, 3, 4), ValueError, "position axes"),
        ((4, 6, 4, 6), torch.zeros(4, 3, 0, 6), ValueError, "received"),
        ((4, 6, 4, 6), torch.zeros(4, 4, 6).long(), TypeError, "one_hot"),
    ],
)
def test_wrong_segmentations(shape, segmentation, error, text):
    layer = build()
    with pytest.raises(error, match=text):
        layer(torch.randn(shape).double(), segmentation=segmentation)
    assert int(layer.num_batches_tracked) == 0


@pytest.mark.parametrize("options", [{"labels": 0}, {"hidden": 0}, {"positions": 4},
                                     {"over": "layer"}])  # fmt: skip
def test_wrong_options(options):
    with pytest.raises(ValueError, match="received"):
        nl.SpatiallyAdaptiveNorm(6, **options)
