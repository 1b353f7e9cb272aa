"""Stored statistics that one call moves, against the same by torch operations."""

import copy
from unittest import mock

import pytest
import torch

import normlab as nl
from normlab.core.operation import Standardize
from normlab.core.partition import partition
from normlab.core.statistics import Running
from normlab.core.stored import StoringLayer
from normlab.kernels import dispatch
from normlab.kernels.cpu.stored import blend

pytestmark = pytest.mark.skipif(
    dispatch.compiled_kernels() is None, reason=f"no compiled kernels: {dispatch.reason()}"
)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["batch", "variance", "mean_only_batch", "batch_renorm"])
def test_as_torch_operations_move_them(name, dtype, momentum):
    layer = nl.norm(name, 37, momentum=momentum).to(dtype)
    plain = copy.deepcopy(layer)
    for seed in range(3):
        x = 3 + 2 * torch.randn(5, 37, 7, generator=torch.Generator().manual_seed(seed))
        layer(x.to(dtype))
        with nl.kernels.backend("torch"):
            plain(x.to(dtype))
    assert layer.num_batches_tracked == 3
    for ours, theirs in zip(layer.buffers(), plain.buffers(), strict=True):
        # Means of 35 numbers near 3, in sums of two orders.
        tight = 1e-12 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(ours, theirs, rtol=tight, atol=tight)


@pytest.mark.parametrize("name", ["batch", "ghost_batch"])
def test_a_layer_in_bfloat16_stores_by_one_call(name):
    layer = nl.norm(name, 37, momentum=0.3).bfloat16()
    plain = copy.deepcopy(layer).double()
    x = (3 + 2 * torch.randn(6, 37, 7)).bfloat16()
    with mock.patch.object(StoringLayer, "_apply_update", side_effect=AssertionError):
        layer(x)
    plain(x.double())
    assert layer.running_var.dtype == torch.float32  # it keeps them so
    for ours, theirs in zip(layer.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=2e-6, atol=0)  # of sums


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("pattern", ["n c * -> (n c) (*)", "(b n) c * -> (b c) (n *)"])
def test_the_mean_over_areas_is_stored(pattern, channel_dim):
    """One call does it, to the rounding of a mean in another order."""
    layer = nl.Normalize(
        6, pattern, operation=Standardize(), statistics=Running(0.3), channel_dim=channel_dim,
        **({"batch_size": 2} if "b" in pattern else {}),
    ).double()  # fmt: skip
    plain = copy.deepcopy(layer)
    x = torch.randn((4, 6, 5) if channel_dim == 1 else (4, 5, 6), dtype=torch.float64)
    with mock.patch.object(StoringLayer, "_apply_update", side_effect=AssertionError):
        layer(x)
    with nl.kernels.backend("torch"):
        plain(x)
    for ours, theirs in zip(layer.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


def test_areas_that_follow_channels_are_summed_by_torch():
    of_positions = partition("n c * -> (c *) (n)")
    assert not of_positions.bind((4, 3, 6)).stored_last
    assert of_positions.bind((4, 6, 3), channel_dim=-1).stored_last
    assert partition("n c * -> (n c) (*)").bind((4, 3, 6)).stored_last


def test_what_is_not_finite_is_left_alone_channel_by_channel():
    layer = nl.norm("batch", 3)
    x = torch.randn(4, 3, 5)
    x[0, 1, 0] = float("inf")
    before = copy.deepcopy(layer)
    layer(x)
    assert layer.skipped_updates == 1
    assert layer.running_mean[1] == before.running_mean[1]
    assert layer.running_mean[0] != before.running_mean[0]


def test_a_graph_that_holds_old_values_is_told():
    layer, x = nl.norm("batch", 3), torch.randn(4, 3, 5)
    w = torch.ones(3, requires_grad=True)
    loss = (w * layer.running_var).sum()
    layer(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_does_not_fit_stays_as_it_is():
    count, buffer = torch.tensor(0), torch.zeros(4)
    double, sliced = torch.ones(4, dtype=torch.float64), torch.ones(4, 2)[:, 0]
    for measured in (torch.ones(3), torch.ones(0), torch.ones(6), double, sliced):
        assert not blend((buffer,), (measured,), (1.0,), 0.1, count)
    assert not blend((buffer,), (torch.full((4,), float("nan")),), (1.0,), 0.1, count)
    assert count == 0
    assert not buffer.any()
    assert blend((buffer,), (torch.ones(4),), (2.0,), 0.25, count)
    assert count == 1
    assert (buffer == 0.5).all()
