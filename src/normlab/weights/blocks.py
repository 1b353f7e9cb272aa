"""Blocks of units that are made orthogonal among themselves, as batches of matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def per_block(
    matrix: Tensor, groups: int, parts: int, function: Callable[[Tensor], Tensor]
) -> Tensor:
    """Apply a function to blocks of rows.

    Units of different convolution groups read different inputs, so each group is divided by
    itself, into parts whose sizes differ by one at most.

    Args:
        matrix: (units, fan_in).
        groups: Convolution groups G.
        parts: Blocks in each group.
        function: (B, m, fan_in) → the same shape; called once for each size m that occurs.

    Returns:
        (units, fan_in).

    Example:
        >>> sizes = []
        >>> _ = per_block(torch.zeros(7, 4), 1, 2, lambda z: sizes.append(z.shape[:2]) or z)
        >>> [tuple(s) for s in sizes]
        [(1, 4), (1, 3)]
    """
    units, fan_in = matrix.shape
    each = units // groups
    small, larger = divmod(each, parts)
    grouped = matrix.reshape(groups, each, fan_in)
    results = []
    for start, size, count in (
        (0, small + 1, larger),
        (larger * (small + 1), small, parts - larger),
    ):
        if count and size:
            taken = grouped[:, start : start + size * count].reshape(groups * count, size, fan_in)
            results.append(function(taken).reshape(groups, count * size, fan_in))
    joined = results[0] if len(results) == 1 else torch.cat(results, 1)
    return joined.reshape(units, fan_in)


def parts_that_fit(units: int, most: int) -> int:
    """Return the least number of blocks of which none has more than `most` units."""
    return -(-units // most)
