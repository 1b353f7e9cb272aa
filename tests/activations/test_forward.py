"""Every method against plain numpy, in training and evaluation, for every rank and layout."""

import numpy as np
import pytest
import torch

from activations import oracles
from activations.cases import CASES, SHAPES, arrays, build, one_member, sample

# Float64 rounding of sums of at most 200 terms is about 1e-14, times 1/D (at most about 10).
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def close(actual, expected):
    expected = expected.detach() if isinstance(expected, torch.Tensor) else np.asarray(expected)
    torch.testing.assert_close(actual.detach(), torch.as_tensor(expected), **TIGHT)


def run(layer, name, options, shape, steps):
    """Check some training steps and an evaluation; return the stored statistics expected."""
    parameters = arrays(layer)
    stored = oracles.initial(name, shape[1], options)
    for step in range(steps):
        x = sample(shape, seed=step)
        expected, stored = oracles.forward(name, x.numpy(), options, parameters, stored)
        close(layer(x), expected)
    layer.eval()
    x = sample(shape, seed=99)
    expected, _ = oracles.forward(name, x.numpy(), options, parameters, stored, training=False)
    close(layer(x), expected)
    return stored


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"rank{len(s)}")
@pytest.mark.parametrize(("name", "options"), CASES)
def test_training_steps_and_evaluation_match_the_oracle(name, options, shape):
    if one_member(name, options, shape):
        pytest.skip("one member an area: test_bad_input")
    layer = build(name, options)
    stored = run(layer, name, options, shape, steps=5)
    for key, value in stored.items():
        if key == "steps" and oracles.stores(name, options):
            assert int(layer.num_batches_tracked) == value
        elif key in layer.state_dict():
            close(getattr(layer, key), value)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"rank{len(s)}")
@pytest.mark.parametrize(("name", "options"), CASES)
def test_channels_last_axis_is_the_moved_axis(name, options, shape, training):
    if one_member(name, options, shape):
        pytest.skip("one member an area: test_bad_input")
    over = {"over": options.get("over", "sample")} if name in ("layer", "rms") else {}
    first, last = build(name, options | over), build(name, options | over, channel_dim=-1)
    for seed in range(3):
        x = sample(shape, seed=seed)
        moved = x.movedim(1, -1)
        for source in (moved, moved.contiguous()):  # strides must not matter
            first.train(training or seed == 0)
            last.train(training or seed == 0)
            close(last(source), first(x).movedim(1, -1))
    for key, value in first.state_dict().items():
        close(last.state_dict()[key], value)


@pytest.mark.parametrize(("name", "expected"), [("layer", "n c * -> (n *) (c)"),
                                                ("rms", "n c * -> (n *) (c)")])  # fmt: skip
def test_channels_last_normalizes_over_positions_by_default(name, expected):
    layer = build(name, {}, channel_dim=-1)
    assert expected in repr(layer)
    x = sample((4, 6, 5, 3))
    y, _ = oracles.forward(name, x.numpy(), {"over": "position"}, arrays(layer))
    close(layer(x.movedim(1, -1)).movedim(-1, 1), y)


@pytest.mark.parametrize("activation", ["relu", "silu", "tlu", None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", ["batch", "group", "rms", "lp_batch", "ghost_batch", "variance"])
def test_fused_activation_and_missing_affine(name, affine, activation):
    options = {"group": {"groups": 2}, "ghost_batch": {"batch_size": 3}}.get(name, {})
    options = options | {"activation": activation}
    layer = build(name, options, affine=affine)
    run(layer, name, options, (8, 6, 5), steps=2)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_evaluation_changes_no_state(name, options):
    layer = build(name, options).eval()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer(sample((8, 6, 5)))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_evaluation_does_not_depend_on_batch_mates(name, options):
    layer = build(name, options)
    layer(sample((8, 6, 5)))
    layer.eval()
    x = sample((8, 6, 5), seed=2)
    close(layer(x[2:3]), layer(x)[2:3])
