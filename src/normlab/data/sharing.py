"""Which samples of a batch share their statistics.

The optimizer's batch and the normalization batch are two things: a step may use 64 samples and
normalize them in chunks of 8.  To ask what it does to a network that chunks are not drawn
independently (one class in each, say) only the sharing may change: the samples of the step, and
with them the gradient that a network without normalization would see, stay the same.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from normlab.data.errors import DataError
from normlab.data.seeds import Seed, generator
from normlab.data.splitting import check_labels

Composition = Literal["class", "iid"]


def share(labels: Tensor, norm_batch: int, composition: Composition, *, seed: Seed) -> Tensor:
    """Divide one batch into chunks that share statistics.

    Args:
        labels: The labels of the batch, int64, (B,).
        norm_batch: Samples in a chunk.
        composition: "class", each chunk of one class; or "iid", a random division.
        seed: Decides the order; pass (seed, epoch, step) to vary it from step to step.

    Returns:
        Positions 0 … B − 1 within the batch, each once: int64, (B / norm_batch, norm_batch).

    Raises:
        DataError: If norm_batch does not divide B, or, for "class", the number of samples of
            some class.

    Example:
        >>> labels = torch.tensor([3, 5, 3, 5])
        >>> labels[share(labels, 2, "class", seed=0)].sort(dim=0).values
        tensor([[3, 3],
                [5, 5]])
    """
    size = len(check_labels(labels))
    if norm_batch < 1 or size == 0 or size % norm_batch:
        raise DataError(
            f"a norm_batch that divides the batch of {size}",
            f"norm_batch={norm_batch}",
            "choose a divisor of the batch size",
        )
    source = generator(seed, "share")
    order = torch.randperm(size, generator=source)
    if composition == "iid":
        return order.view(-1, norm_batch)
    if composition != "class":
        raise DataError("composition 'class' or 'iid'", repr(composition), "choose one of them")
    classes, counts = torch.unique(labels, return_counts=True)
    odd = torch.nonzero(counts % norm_batch).flatten()
    if len(odd):
        raise DataError(
            f"a multiple of norm_batch={norm_batch} samples of every class in the batch",
            f"{counts[odd[0]]} of class {classes[odd[0]]}",
            "make the batches with a grain that is a multiple of norm_batch",
        )
    # Sorting a random order by class keeps it random within each class.
    chunks = order[torch.argsort(labels[order], stable=True)].view(-1, norm_batch)
    return chunks[torch.randperm(len(chunks), generator=source)]
