"""A balanced split of the training set into training and validation samples."""

from __future__ import annotations

import torch
from torch import Tensor

from normlab.data.errors import DataError
from normlab.data.seeds import Seed, generator


def split(labels: Tensor, validation: float | int, seed: Seed) -> tuple[Tensor, Tensor]:
    """Split samples so that every class keeps its share in both parts.

    With n samples, n_c of them of class c, and v for validation, class c gives v·n_c/n of them,
    rounded down or up so that the sum is v (largest remainders first).

    Args:
        labels: int64, (N,).
        validation: v as a count (int), or as a part of N (float between 0 and 1).
        seed: Which samples are drawn.

    Returns:
        The indices of the training and of the validation samples, each increasing, together
        every sample once.

    Raises:
        DataError: If one part would be empty.

    Example:
        >>> labels = torch.tensor([0, 1] * 10)
        >>> train, valid = split(labels, 0.2, seed=0)
        >>> len(train), labels[valid].bincount()
        (16, tensor([2, 2]))
    """
    total = len(check_labels(labels))
    count = _count(total, validation)
    classes, sizes = torch.unique(labels, return_counts=True)
    # Integer arithmetic: the remainders of v·n_c / n decide, and floats could tie differently.
    shares = count * sizes // total
    remainders = count * sizes % total
    largest = torch.argsort(remainders, descending=True, stable=True)
    shares[largest[: count - int(shares.sum())]] += 1
    source = generator(seed, "split")
    chosen = torch.zeros(total, dtype=torch.bool)
    for label, share in zip(classes, shares.tolist(), strict=True):
        members = torch.nonzero(labels == label).flatten()
        chosen[members[torch.randperm(len(members), generator=source)[:share]]] = True
    return torch.nonzero(~chosen).flatten(), torch.nonzero(chosen).flatten()


def check_labels(labels: Tensor) -> Tensor:
    """Labels, if they are a list of integers.

    Args:
        labels: What to check.

    Returns:
        The same labels.

    Raises:
        DataError: If they are of another type or rank.
    """
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise DataError(
            "int64 labels of shape (N,)",
            f"{labels.dtype} of shape {tuple(labels.shape)}",
            "pass the labels, not images or one-hot vectors",
        )
    return labels


def _count(total: int, validation: float | int) -> int:
    fraction = isinstance(validation, float)
    count = round(validation * total) if fraction and 0 < validation < 1 else validation
    if isinstance(count, bool) or not isinstance(count, int) or not 0 < count < total:
        raise DataError(
            f"between 1 and {total - 1} of {total} samples for validation",
            f"validation={validation!r}",
            "pass a count as an int, or a part as a float between 0 and 1",
        )
    return count
