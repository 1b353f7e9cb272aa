"""Conditioning of layers: covariances of their inputs and of the gradients at their outputs.

These are the two Kronecker factors of a layer's block of Fisher's matrix (K-FAC, 1503.05671): for
y = W·a the block is about A ⊗ G with A = E a·aᵀ and G = E δ·δᵀ, δ the gradient at y of a sample's
loss, so that its condition number is that of A times that of G.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normlab.diagnostics.scale import weight_layers
from normlab.diagnostics.subject import Subject
from normlab.diagnostics.watch import by_channel, channel_dim, watched
from normlab.weights.span import patches

_READ = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a covariance, largest first.

    Attributes:
        values: Shape (d,), float64.
        observations: How many vectors it was taken from; with fewer than d there is no full rank.
    """

    values: Tensor
    observations: int

    def condition(self, share: float = 1.0) -> float:
        """λ_max/λ_k, k the eigenvalue at that share of all (κ_share).

        Args:
            share: 1 for the least eigenvalue, 0.8 for the one that 80 % reach.

        Returns:
            The ratio; inf where λ_k is 0 but for rounding, nan where all are, or one is no number.
        """
        k = max(1, math.ceil(share * len(self.values))) - 1
        top, low = float(self.values[0]), float(self.values[k])
        if not top > 0:
            return math.nan
        return top / low if low > top * 1e-13 * len(self.values) else math.inf

    @property
    def kappa(self) -> float:
        """λ_max/λ_min."""
        return self.condition()

    @property
    def kappa_80(self) -> float:
        """λ_max over the eigenvalue that 80 % reach."""
        return self.condition(0.8)


@dataclass(frozen=True)
class Factors:
    """The two factors of one layer.

    Attributes:
        name: Dotted name.
        inputs: Spectrum of A, of the vectors that a unit's weight is multiplied with.
        gradients: Spectrum of G.
    """

    name: str
    inputs: Spectrum
    gradients: Spectrum

    def condition(self, share: float = 1.0) -> float:
        """The condition number of A ⊗ G."""
        return self.inputs.condition(share) * self.gradients.condition(share)


def factors(
    subject: Subject, *, layers: Collection[str] | None = None, centred: bool = False
) -> list[Factors]:
    """Measure the factors of Linear and convolution layers.

    Args:
        subject: An entered `Subject`, whose loss is a mean over samples.
        layers: Names; None for all. Transposed and grouped convolutions are left out.
        centred: Subtract means first: covariances instead of second moments.

    Returns:
        In the model's order, over all batches.

    Example:
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> model = nn.Sequential(nn.Linear(2, 1))
        >>> with Subject(model, nn.functional.mse_loss, [(x, torch.zeros(2, 1))]) as subject:
        ...     round(factors(subject)[0].inputs.condition(), 6)
        4.0
    """
    kept = {name: _Sums() for name in weight_layers(subject, layers, parametrized=True)}
    slopes = {name: _Sums() for name in kept}

    def see(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        if name not in kept or not isinstance(module, _READ) or getattr(module, "groups", 1) > 1:
            return
        kept[name].add(patches(module, x.detach())[0])
        size = len(x)

        def gradient(g: Tensor) -> None:  # of the mean over samples: times their number
            slopes[name].add(by_channel(g.detach() * size, channel_dim(module, y)).T)

        y.register_hook(gradient)  # type: ignore[no-untyped-call]

    for batch in subject.batches:
        at = subject.leaves()
        with watched(subject.model, see):
            loss = subject.evaluate(batch, at).loss
        torch.autograd.grad(loss, list(at.values()), allow_unused=True)
    return [
        Factors(name, kept[name].spectrum(centred), slopes[name].spectrum(centred))
        for name in kept
        if kept[name].count and slopes[name].count
    ]


class _Sums:
    """Second moments of the rows seen, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Any = 0.0
        self.squares: Any = 0.0

    def add(self, rows: Tensor) -> None:
        rows = rows.double()
        self.count += len(rows)
        self.total = self.total + rows.sum(0)
        self.squares = self.squares + rows.T @ rows

    def spectrum(self, centred: bool) -> Spectrum:
        matrix = self.squares / self.count
        if centred:
            mean = self.total / self.count
            matrix = matrix - torch.outer(mean, mean)
        if not bool(matrix.isfinite().all()):  # LAPACK would refuse it
            return Spectrum(torch.full_like(matrix[0], math.nan), self.count)
        values = torch.linalg.eigvalsh(matrix).flip(0).clamp(min=0)
        return Spectrum(values, self.count)
