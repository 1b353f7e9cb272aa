"""Corners of stored statistics: pooled areas, areas of one member, patterns with variables."""

import contextlib

import pytest
import torch

import normlab as nl
from activations.cases import build, sample

TIGHT = {"rtol": 1e-12, "atol": 1e-13}  # the same float64 sums, grouped otherwise
SMALL_AREAS = [
    ("instance", {"track_running_stats": True}),
    ("ghost_batch", {"batch_size": 2}),
    ("batch_group", {"groups": 3, "batch_size": 2}),
]


@pytest.mark.parametrize("cuts", [(2, 6), (4, 4), (2, 2, 2, 2)])
@pytest.mark.parametrize(("name", "options"), SMALL_AREAS)
def test_accumulation_averages_areas_that_share_nothing(name, options, cuts):
    """Areas within a micro-batch are areas of the whole batch: their average is the batch's."""
    x = sample((8, 6, 5))
    whole, parts = build(name, options), build(name, options)
    whole(x)
    parts.update = "accumulate"
    for part in x.split(cuts):
        parts(part)
    parts.commit()
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[key], value, **TIGHT)


def test_one_valid_member_has_no_deviation_to_store():
    """Unmasked, such a batch is refused; masked, it must not pull the variance to zero."""
    layer, mask = build("batch", {}), torch.zeros(3, 4, dtype=torch.bool)
    mask[1, 2] = True
    with contextlib.suppress(ValueError):
        layer(sample((3, 6, 4)), mask)
    assert layer.running_var.eq(1).all()


def test_a_pattern_with_variables_evaluates_as_it_trained():
    """Or it is refused, where the operation does not whiten."""
    pattern = "n (g c) * -> g c (n *)"
    parts = {"operation": nl.Standardize(), "statistics": nl.Running(momentum=1.0, bessel=False)}
    try:
        layer = nl.Normalize(6, pattern, groups=3, **parts).double()
    except nl.PartitionError:
        return
    x = sample((8, 6, 5))
    torch.testing.assert_close(layer(x), layer.eval()(x), **TIGHT)


def test_a_cast_between_pooling_and_commit():
    layer = nl.BatchNorm(6)
    layer.update = "accumulate"
    layer(sample((4, 6, 5)).float())
    layer.double()(sample((4, 6, 5), seed=2))
    assert layer.commit()
    assert layer.running_var.dtype == torch.float64
    assert layer.running_var.isfinite().all()
