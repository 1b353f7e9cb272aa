"""Checks of what a layer is given, with errors that say what to do."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_channels(num_channels: int, channel_dim: int) -> None:
    """Raise ValueError for a layer that could not exist.

    Args:
        num_channels: C, at least 1.
        channel_dim: 1 or −1.
    """
    if num_channels < 1:
        raise ValueError(f"a layer has at least 1 channel; received {num_channels}")
    if channel_dim not in (1, -1):
        raise ValueError(f"channel_dim is 1 or -1; received {channel_dim}")


def check_input(
    layer: nn.Module, x: Tensor, mask: Tensor | None, num_channels: int, channel_dim: int
) -> None:
    """Raise for an input or a mask that a layer cannot take.

    Args:
        layer: Named in the message.
        x: Floating-point, with `num_channels` along `channel_dim`.
        mask: Boolean (N, *positions), or None.
        num_channels: C.
        channel_dim: 1 or −1.

    Raises:
        TypeError: For another dtype.
        ValueError: For another shape.
    """
    if not x.is_floating_point():
        raise TypeError(f"{layer} takes floating-point input; received {x.dtype}")
    if x.ndim < 2 or x.shape[channel_dim] != num_channels:
        where = "last axis" if channel_dim == -1 else "axis 1"
        raise ValueError(
            f"{layer} has {num_channels} channels on {where}; received shape "
            f"{tuple(x.shape)}. Layers for (…, C) take channel_dim=-1."
        )
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is boolean, True where valid; received {mask.dtype}")
    positions = x.shape[1:-1] if channel_dim == -1 else x.shape[2:]
    expected = (x.shape[0], *positions)
    if tuple(mask.shape) != expected:
        raise ValueError(
            f"mask has shape (N, *positions) = {expected} for an input of shape "
            f"{tuple(x.shape)}; received {tuple(mask.shape)}"
        )
