"""What residual branches are multiplied by in networks that need no normalizer.

scaled      h + α·f(h/√v), v the expected variance of h     NF-ResNets, 2101.08692
SkipInit    h + α·f(h), α learned and at first 0            2002.10444
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn


def expected_variances(transitions: Iterable[bool], alpha: float) -> Iterator[float]:
    """Expected variance of each block's input in a network of blocks h + α·f(h/√variance).

    A branch of unit variance adds α². A transition reads the scaled input on its shortcut as well,
    which starts again at 1, plus its own α² (NF-ResNets, 2101.08692).

    Args:
        transitions: for each block, whether its shortcut changes the shape.
        alpha: α.

    Yields:
        The variance, block by block; 1 for the first.

    Example:
        >>> [round(v, 2) for v in expected_variances([False, False, True, False], 0.2)]
        [1.0, 1.04, 1.08, 1.04]
    """
    variance = 1.0
    for transition in transitions:
        yield variance
        variance = (1.0 if transition else variance) + alpha**2


class Scale(nn.Module):
    """Multiplication by a constant.

    Args:
        factor: the constant.

    Shape:
        any, kept.

    Example:
        >>> Scale(0.2)
        Scale(0.2)
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        return x * self.factor

    def extra_repr(self) -> str:
        """The factor, rounded."""
        return f"{self.factor:.4g}"


class SkipInit(nn.Module):
    """Multiplication by a learned scalar α, initially 0 (De & Smith 2020, arXiv 2002.10444).

    At the end of every residual branch it makes each block the identity at first.

    Shape:
        any, kept.

    Example:
        >>> SkipInit()(torch.ones(3)).sum().item()
        0.0
    """

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        return x * self.alpha
