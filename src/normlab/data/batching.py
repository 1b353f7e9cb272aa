"""Which samples make up each batch of an epoch."""

from __future__ import annotations

import torch
from torch import Tensor

from normlab.data.errors import DataError
from normlab.data.seeds import Seed, generator
from normlab.data.splitting import check_labels


def batches(labels: Tensor, batch_size: int, *, seed: Seed, epoch: int, grain: int = 1) -> Tensor:
    """The batches of one epoch, as indices; no sample comes twice, a ragged rest is left out.

    With grain g > 1 a batch is made of k = batch_size / g groups, each of g samples of one class,
    g neighbours in the row.  The classes within a batch differ as far as possible: class c, with
    G_c of all G groups, appears ⌊G_c / S⌋ or one time more in each of the S = ⌊G / k⌋ batches,
    and evenly over the epoch.

    Args:
        labels: int64, (N,).
        batch_size: Samples in a batch.
        seed: With the epoch, decides the order.
        epoch: The number of the epoch.
        grain: g; 1 shuffles freely.

    Returns:
        int64, (S, batch_size).

    Raises:
        DataError: If g does not divide the batch size, or there is no full batch.

    Example:
        >>> labels = torch.arange(10).repeat(16)
        >>> rows = batches(labels, 64, seed=0, epoch=0, grain=8)
        >>> rows.shape, labels[rows[0]].unique().numel()
        (torch.Size([2, 64]), 8)
    """
    check_labels(labels)
    if batch_size < 1 or grain < 1 or batch_size % grain:
        raise DataError(
            "a positive grain that divides a positive batch size",
            f"grain={grain}, batch_size={batch_size}",
            "choose a divisor of the batch size as the grain",
        )
    source = generator(seed, "batches", epoch=epoch)
    if grain == 1:
        order, groups = torch.randperm(len(labels), generator=source)[:, None], None
    else:
        order, groups = _groups(labels, grain, source)
    steps = len(order) // (batch_size // grain)
    if steps == 0:
        raise DataError(
            f"at least one batch of {batch_size} samples"
            + (f" in groups of {grain} of one class" if grain > 1 else ""),
            f"{len(labels)} samples" + (f" with {len(order)} such groups" if grain > 1 else ""),
            "choose a smaller batch_size or grain",
        )
    if groups is None:
        return order[: steps * batch_size].view(steps, batch_size)
    return order[_deal(groups, steps, batch_size // grain, source)].view(steps, batch_size)


def _groups(labels: Tensor, grain: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cut each shuffled class into groups of ``grain``.

    Returns:
        The groups (G, grain), sorted by class, and the number of groups of each class.
    """
    rows, sizes = [], []
    for label in torch.unique(labels):
        members = torch.nonzero(labels == label).flatten()
        members = members[torch.randperm(len(members), generator=source)]
        rows.append(members[: len(members) // grain * grain].view(-1, grain))
        sizes.append(len(rows[-1]))
    empty = labels.new_empty(0, grain)
    return torch.cat([empty, *rows]), torch.tensor(sizes, dtype=torch.int64)


def _deal(sizes: Tensor, steps: int, width: int, source: torch.Generator) -> Tensor:
    """Deal groups, numbered by class, into ``steps`` batches of ``width``: (steps, width).

    Each batch gets the common floor of every class.  What is over, less than ``steps`` of any
    class, is dealt at most once per class and batch: first to classes that would otherwise keep
    too many, then to those furthest behind their even pace, chance deciding ties.
    """
    starts = sizes.cumsum(0) - sizes
    sizes = _trim(sizes, steps * width, source)
    base = sizes // steps
    over = sizes - base * steps
    extra = width - int(base.sum())
    given = torch.zeros_like(sizes)
    taken = torch.zeros_like(sizes)
    dealt = torch.empty(steps, width, dtype=torch.int64)
    for step in range(steps):
        left = over - given
        # The pace of a class is over / steps; in units of 1 / steps all stays integer.
        lag = (step + 1) * over - steps * given
        # One number orders all: must be dealt now, then lag; what has nothing left comes last.
        # Dealing what must be dealt keeps the rest possible, which the pace alone does not prove.
        urgent = (left == steps - step).long()
        rank = lag + urgent * (4 * steps * steps) - (left == 0).long() * (8 * steps * steps)
        shuffle = torch.randperm(len(sizes), generator=source)
        chosen = shuffle[torch.argsort(rank[shuffle], descending=True, stable=True)[:extra]]
        amount = base.clone()
        amount[chosen] += 1
        given[chosen] += 1
        # Row numbers: the next `amount` groups of every class.
        first = torch.repeat_interleave(starts + taken, amount)
        within = torch.arange(width) - torch.repeat_interleave(amount.cumsum(0) - amount, amount)
        dealt[step] = (first + within)[torch.randperm(width, generator=source)]
        taken += amount
    return dealt


def _trim(sizes: Tensor, total: int, source: torch.Generator) -> Tensor:
    """Leave out groups, one by one from a largest class, until ``total`` remain."""
    sizes = sizes.clone()
    for _ in range(int(sizes.sum()) - total):
        largest = torch.nonzero(sizes == sizes.max()).flatten()
        sizes[largest[int(torch.randint(len(largest), (1,), generator=source))]] -= 1
    return sizes
