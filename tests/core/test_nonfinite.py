"""NaN and infinity in an input reach the output, never the stored statistics."""

import pytest
import torch

from activations.cases import STORING, build, sample

BAD = [float("nan"), float("inf"), -float("inf")]
PER_CHANNEL = [c for c in STORING if c.values[0] != "batch_group"]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("name", "options"), PER_CHANNEL)
def test_one_channel_is_left_alone_and_the_others_move(name, options, bad):
    layer, clean = build(name, options), build(name, options)
    x = sample((8, 6, 5))
    layer(x), clean(x)
    y = sample((8, 6, 5), seed=2)
    clean(y)
    kept = {key: getattr(layer, key).clone() for key in layer.stored_names}
    y[3, 2, 1] = bad
    out = layer(y)
    assert not out[:, 2].isfinite().all()
    assert out[:, [0, 1, 3, 4, 5]].isfinite().all()
    others = [0, 1, 3, 4, 5]
    for key, old in kept.items():
        new = getattr(layer, key)
        assert torch.equal(new[2], old[2])
        assert torch.equal(new[others], getattr(clean, key)[others])
    assert int(layer.skipped_updates) == 1
    assert int(clean.skipped_updates) == 0


def test_a_group_is_skipped_as_one():
    layer = build("batch_group", {"groups": 3, "batch_size": 4})
    x = sample((8, 6, 5))
    x[0, 4] = float("nan")  # channels 4 and 5 are the third group
    layer(x)
    assert layer.running_mean[2] == 0
    assert layer.running_var[2] == 1
    assert (layer.running_mean[:2] != 0).all()
    assert int(layer.skipped_updates) == 1


def test_mean_and_variance_are_skipped_together():
    """The square overflows where the mean does not: half an update would be inconsistent."""
    layer = build("batch", {}).float()
    x = sample((8, 6, 5)).float()
    x[0, 2, 0] = 1e30
    layer(x)
    assert layer.running_mean[2] == 0
    assert layer.running_var[2] == 1
    assert int(layer.skipped_updates) == 1


def test_skips_are_counted_up_and_reset_and_not_saved():
    layer = build("batch", {})
    x = torch.full((8, 6, 5), float("nan"), dtype=torch.float64)
    layer(x)
    layer(x)
    assert int(layer.skipped_updates) == 12
    assert int(layer.num_batches_tracked) == 2
    assert "skipped_updates" not in layer.state_dict()
    layer.reset_running_stats()
    assert int(layer.skipped_updates) == 0


def test_a_pooled_nan_is_skipped_at_the_commit():
    layer = build("batch", {})
    layer.update = "accumulate"
    layer(sample((8, 6, 5)))
    x = sample((8, 6, 5))
    x[0, 1] = float("nan")
    layer(x)
    layer.commit()
    assert layer.running_mean.isfinite().all()
    assert layer.running_mean[1] == 0
    assert (layer.running_mean[[0, 2, 3, 4, 5]] != 0).all()
    assert int(layer.skipped_updates) == 1


def test_recovery_after_nan():
    layer, clean = build("batch", {}), build("batch", {})
    layer(torch.full((8, 6, 5), float("nan"), dtype=torch.float64))
    for seed in range(3):
        layer(sample((8, 6, 5), seed=seed))
        clean(sample((8, 6, 5), seed=seed))
    assert torch.equal(layer.running_var, clean.running_var)
