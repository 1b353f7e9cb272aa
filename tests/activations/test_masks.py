"""Padding: what is masked reaches nothing, and the rest is as if it were not there."""

import copy

import numpy as np
import pytest
import torch

from activations import oracles, torch_oracle
from activations.cases import CASES, ONE_EACH, STORING, arrays, build, sample

TIGHT = {"rtol": 1e-10, "atol": 1e-11}  # float64 rounding, as in the tests of values and gradients
SHAPE = (8, 6, 5, 3)
GARBAGE = [float("nan"), float("inf"), -float("inf"), 1e30]


def ragged_mask(samples=8, positions=(5, 3)):
    """Each sample has another number of valid positions; none is empty."""
    mask = torch.zeros(samples, *positions, dtype=torch.bool)
    flat = mask.view(samples, -1)
    for i in range(samples):
        flat[i, : 2 + (5 * i) % (flat.shape[1] - 1)] = True
    return mask


def padded(x, mask, garbage):
    return torch.where(mask.unsqueeze(1), x, garbage)


def outcome(layer, x, mask):
    """Output, gradients and stored statistics of one training pass."""
    layer = copy.deepcopy(layer)
    x = x.clone().requires_grad_()
    y = layer(x, mask)
    weights = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)
    (y * weights).sum().backward()
    grads = {k: p.grad for k, p in layer.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **grads, **dict(layer.named_buffers())}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_what_is_masked_reaches_nothing(name, options, garbage, training):
    layer = build(name, options).train(training)
    mask = ragged_mask()
    x = sample(SHAPE)
    clean, dirty = outcome(layer, padded(x, mask, 0.0), mask), outcome(
        layer, padded(x, mask, garbage), mask)  # fmt: skip
    for key, value in clean.items():
        assert value.isfinite().all(), key
        assert torch.equal(dirty[key], value), key
    hidden = ~mask.unsqueeze(1).expand(SHAPE)
    assert (clean["y"][hidden] == 0).all()
    assert (clean["dx"][hidden] == 0).all()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_masked_statistics_are_those_of_the_valid_elements(name, options):
    layer = build(name, options)
    mask, stored = ragged_mask(), oracles.initial(name, 6, options)
    for seed in range(3):
        x = padded(sample(SHAPE, seed=seed), mask, 7.0)
        expected, stored = oracles.forward(
            name, x.numpy(), options, arrays(layer), stored, mask=mask.numpy()
        )
        torch.testing.assert_close(layer(x, mask).detach(), torch.as_tensor(expected), **TIGHT)
    for key in getattr(layer, "stored_names", ()):
        torch.testing.assert_close(getattr(layer, key), torch.as_tensor(stored[key]), **TIGHT)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_masked_gradients(name, options):
    if name == "batch_renorm":
        options = {"rmax": 1.2, "dmax": 0.1}
    layer, mask = build(name, options), ragged_mask()
    x = padded(sample(SHAPE), mask, 7.0).requires_grad_()
    parameters = dict(layer.named_parameters())
    old = (torch.zeros(6).double(), torch.ones(6).double(), 1.2, 0.1)
    expected = torch_oracle.forward(name, x, options, parameters, old, mask)
    actual = layer(x, mask)
    weights = torch.cos(torch.arange(actual.numel(), dtype=x.dtype)).view(actual.shape)
    wanted = [x, *parameters.values()]
    got, want = (torch.autograd.grad((y * weights).sum(), wanted) for y in (actual, expected))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


@pytest.mark.parametrize("name", ["layer", "rms", "instance", "group", "position",
                                  "filter_response", "dyt", "none"])  # fmt: skip
def test_a_padded_sample_is_the_sample_alone(name):
    layer = build(name, {"groups": 3} if name == "group" else {})
    lengths = [7, 2, 5, 4]
    x = sample((4, 6, 7))
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    y = layer(padded(x, mask, float("nan")), mask)
    for i, n in enumerate(lengths):
        torch.testing.assert_close(y[i : i + 1, :, :n], layer(x[i : i + 1, :, :n]), **TIGHT)


@pytest.mark.parametrize("name", ["batch", "ic", "variance", "l1_batch", "lp_batch",
                                  "mean_only_batch", "batch_renorm"])  # fmt: skip
def test_a_padded_batch_is_its_valid_positions_alone(name):
    options = {"dropout": 0.0} if name == "ic" else {}
    padded_layer, plain = build(name, options), build(name, options)
    x, mask = sample(SHAPE), ragged_mask()
    y = padded_layer(padded(x, mask, float("nan")), mask)
    rows = x.movedim(1, -1)[mask]  # (valid positions of all samples, C)
    torch.testing.assert_close(y.movedim(1, -1)[mask], plain(rows), **TIGHT)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(padded_layer.state_dict()[key], value, **TIGHT)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_sample_of_padding_alone_is_defined(name, options):
    layer, mask = build(name, options), ragged_mask()
    mask[3] = False
    found = outcome(layer, padded(sample(SHAPE), mask, float("nan")), mask)
    assert all(v.isfinite().all() for v in found.values())
    assert (found["y"][3] == 0).all()
    stored = oracles.initial(name, 6, options)
    x = padded(sample(SHAPE), mask, 0.0).numpy()
    expected, stored = oracles.forward(name, x, options, arrays(layer), stored, mask=mask.numpy())
    torch.testing.assert_close(found["y"], torch.as_tensor(expected), **TIGHT)
    for key in getattr(layer, "stored_names", ()):  # nor does it enter the averages as zeros
        torch.testing.assert_close(found[key], torch.as_tensor(stored[key]), **TIGHT)


@pytest.mark.parametrize(("name", "options"), STORING)
def test_a_ghost_batch_or_batch_of_padding_alone_is_left_out_of_the_averages(name, options):
    layer, mask = build(name, options), ragged_mask()
    mask[:4] = False
    layer(sample(SHAPE), mask)
    half = build(name, options)
    half(sample(SHAPE)[4:], mask[4:])
    for key in layer.stored_names:
        torch.testing.assert_close(getattr(layer, key), getattr(half, key), **TIGHT)
    before = {k: v.clone() for k, v in half.state_dict().items()}
    y = half(sample(SHAPE), torch.zeros_like(mask))
    assert (y == 0).all()
    for key in half.stored_names:
        assert torch.equal(half.state_dict()[key], before[key])


@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_a_mask_of_true_changes_nothing(name, options):
    layer = build(name, options)
    x = sample(SHAPE)
    whole = torch.ones(8, 5, 3, dtype=torch.bool)
    plain, masked = outcome(layer, x, None), outcome(layer, x, whole)
    for key, value in plain.items():
        torch.testing.assert_close(masked[key], value, **TIGHT)


@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_masks_follow_the_channel_axis(name, options):
    over = {"over": "sample"} if name in ("layer", "rms") else {}
    first, last = build(name, options | over), build(name, options | over, channel_dim=-1)
    x, mask = sample(SHAPE), ragged_mask()
    y = last(x.movedim(1, -1), mask)
    torch.testing.assert_close(y.movedim(-1, 1), first(x, mask), **TIGHT)


@pytest.mark.parametrize("bad", [(8, 6), (8, 3, 5), (8, 1, 5, 3), (5, 3), (8, 1, 3), (7, 5, 3)])
@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_a_mask_of_another_shape_is_refused(name, options, bad):
    with pytest.raises(ValueError, match=r"mask.*\(8, 5, 3\).*" + str(bad).replace(
        "(", r"\(").replace(")", r"\)")):  # fmt: skip
        build(name, options)(sample(SHAPE), torch.ones(bad, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64])
@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_a_mask_of_another_dtype_is_refused(name, options, dtype):
    with pytest.raises(TypeError, match="mask is boolean, True where valid"):
        build(name, options)(sample(SHAPE), torch.ones(8, 5, 3, dtype=dtype))


@pytest.mark.parametrize("name", ["batch", "group", "rms"])
def test_masks_of_low_precision_inputs_count_exactly(name):
    """2050 valid positions: bfloat16 and float16 would count them as 2048."""
    layer = build(name, {"groups": 2} if name == "group" else {}).float()
    x = torch.randn(1, 6, 4100).bfloat16()
    mask = (torch.arange(4100) < 2050)[None]
    y = layer(x, mask)[:, :, :2050]
    # The same computation in float32, rounded once to bfloat16.
    torch.testing.assert_close(y, layer(x[:, :, :2050]), rtol=2**-8, atol=1e-3)


def test_the_numpy_oracle_ignores_padding():
    x = sample((4, 6, 5)).numpy()
    mask = np.ones((4, 5), bool)
    mask[:, 3:] = False
    parameters = {"weight": np.ones(6), "bias": np.zeros(6)}
    whole, _ = oracles.forward("layer", x[:, :, :3], {}, parameters)
    part, _ = oracles.forward("layer", x, {}, parameters, mask=mask)
    np.testing.assert_allclose(part[:, :, :3], whole, rtol=1e-13)  # the same sums
