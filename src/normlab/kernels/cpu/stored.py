"""Stored statistics moved towards those of a batch by one call."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from normlab.kernels.cpu import library

_DTYPES = {torch.float32: 0, torch.float64: 1}
_BLEND = struct.Struct("2qdPdPPdPP").pack  # `struct Blend` of stored.cpp


def blend(
    buffers: Sequence[Tensor],
    measured: Sequence[Tensor],
    factors: Sequence[float],
    weight: float,
    count: Tensor,
) -> bool:
    """buffer ← lerp(buffer, factor·measured, weight), and count ← count + 1; or nothing of it.

    Args:
        buffers: One or two plain CPU tensors of shape (K,).
        measured: As many, with K elements each, or several times K, one area after another, of
            which the mean is stored.
        factors: As many, or more.
        weight: That of what was measured.
        count: Of batches.

    Returns:
        False, and all is as it was, where something is not finite, or kernels do not fit.
    """
    compiled, dtype, size = library.load()[0], buffers[0].dtype, buffers[0].numel()
    if compiled is None or len(buffers) > 2 or dtype not in _DTYPES or count.dtype != torch.int64:
        return False
    of: list[int | float] = []
    areas = measured[0].numel() // max(size, 1)
    for b, m, f in zip(buffers, measured, factors, strict=False):
        fits = m.dtype is dtype is b.dtype and m.numel() == areas * size and b.numel() == size
        if (
            not fits
            or areas < 1
            or not m.is_contiguous()
            or not b.is_contiguous()
            or b.is_inference()
        ):
            return False
        of += (m.data_ptr(), f, b.data_ptr())
    if len(of) == 3:
        of += (0, 1.0, 0)
    if compiled.normlab_blend(_BLEND(size, areas, weight, *of, count.data_ptr()), _DTYPES[dtype]):
        return False
    # Written past torch: a graph that holds an old value is told.
    increment_version(buffers)
    return True
