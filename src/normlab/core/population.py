"""Mean and variance of everything seen so far, however it was cut into batches."""

from __future__ import annotations

import torch
from torch import Tensor


class Population:
    """Mean and variance per channel of all values seen, in float64 (Chan et al. 1979).

    Example:
        >>> seen = Population()
        >>> for part in torch.arange(12.0).view(6, 2).split(4):
        ...     seen.add(part, 1)
        >>> seen.mean, seen.variance
        (tensor([5., 6.], dtype=torch.float64), tensor([11.6667, 11.6667], dtype=torch.float64))
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros(())

    def add(self, x: Tensor, channel_dim: int) -> None:
        """Take in the values of a tensor; those of each channel belong together."""
        x_CM = x.detach().to(torch.float64).movedim(channel_dim, 0).flatten(1)
        new = x_CM.shape[1]
        if not new:
            return
        mean = x_CM.mean(1)
        squares = (x_CM - mean[:, None]).square().sum(1)
        if self.count:
            apart, total = mean - self.mean, self.count + new
            squares = self.squares + squares + apart.square() * (self.count * new / total)
            mean = self.mean + apart * (new / total)
        self.count, self.mean, self.squares = self.count + new, mean, squares

    @property
    def variance(self) -> Tensor:
        """Σ(x − μ)²/count: the biased variance."""
        return self.squares / max(self.count, 1)
