"""Random generators named by what they are for.

One seed serves a whole experiment.  Each use of chance (the split, the order of an epoch, the
sharing of statistics in one step) must still get its own stream, or two of them would move
together: with plain ``seed + epoch`` the order of epoch 1 under seed 0 is the order of epoch 0
under seed 1.  Hence a hash of everything that names the use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from normlab.data.errors import DataError

Seed = int | Sequence[int]


def generator(
    seed: Seed, purpose: str, *, epoch: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A fresh generator, a function of its arguments alone; the global one is not touched.

    The state is seeded with the first 63 bits of sha256(seed, purpose, epoch).

    Args:
        seed: An integer, or several ((seed, step), say), of either sign.
        purpose: A word for the use; different words give unrelated streams.
        epoch: A counter within the purpose.
        device: Where the generator draws.

    Returns:
        The generator.

    Raises:
        DataError: If the seed or epoch is not made of integers.

    Example:
        >>> a, b = generator(0, "order", epoch=1), generator(1, "order", epoch=0)
        >>> a.initial_seed() == b.initial_seed()
        False
    """
    parts = tuple(seed) if isinstance(seed, Sequence) else (seed,)
    for part in (*parts, epoch):
        if not isinstance(part, int) or isinstance(part, bool):
            raise DataError(
                "integers as seed and epoch",
                f"seed={seed!r}, epoch={epoch!r}",
                "pass an int, or a tuple of ints as the seed",
            )
    digest = hashlib.sha256(repr((parts, purpose, epoch)).encode()).digest()
    # manual_seed takes 64 signed bits.
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
