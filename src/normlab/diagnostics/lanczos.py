"""Eigenvalues, trace and spectral density of a symmetric matrix known by its products alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""v ↦ A·v for a vector of shape (size,), float64."""


@dataclass(frozen=True)
class Eigenvalues:
    """The largest eigenvalues in size, signs kept.

    Attributes:
        values: Shape (k,), largest size first.
        residuals: ‖A·q − θ·q‖ of each: the distance to the nearest true eigenvalue is at most that.
        products: How many products were used.
        converged: Whether all residuals are under the tolerance.
    """

    values: Tensor
    residuals: Tensor
    products: int
    converged: bool


@dataclass(frozen=True)
class Estimate:
    """A mean over random draws.

    Attributes:
        value: The mean.
        error: Its standard error; nan for one draw.
        draws: How many.
    """

    value: float
    error: float
    draws: int


@dataclass(frozen=True)
class Density:
    """The spectrum as point masses.

    Attributes:
        values: Eigenvalues of the quadrature, ascending.
        weights: The share of the spectrum at each; they sum to 1.
    """

    values: Tensor
    weights: Tensor

    def moment(self, order: int) -> float:
        """∫λᵏ dμ: exact in expectation for orders below twice the number of steps."""
        return float((self.weights * self.values**order).sum())

    def curve(self, points: int = 200, width: float = 0.01) -> tuple[Tensor, Tensor]:
        """The density smoothed by a Gaussian, for figures.

        Args:
            points: Length of the curve.
            width: Deviation of the Gaussian, as a share of the spectrum's range.

        Returns:
            Eigenvalues and densities, each of shape (points,).
        """
        low, high = float(self.values.min()), float(self.values.max())
        sigma = max(high - low, 1e-12) * width
        at = torch.linspace(low - 4 * sigma, high + 4 * sigma, points, dtype=torch.float64)
        z = (at[:, None] - self.values) / sigma
        bells = torch.exp(-0.5 * z * z) / (sigma * math.sqrt(2 * math.pi))
        return at, bells @ self.weights


def tridiagonal(
    product: Product, start: Tensor, steps: int, *, done: Callable[[Tensor, Tensor], bool]
) -> tuple[Tensor, Tensor]:
    """Lanczos' recurrence with full reorthogonalization, which keeps steps·size numbers.

    Args:
        product: A·v.
        start: First vector.
        steps: Most products.
        done: Asked after each step with the diagonals (α, β); β's last entry is that of the
            residual. True ends it.

    Returns:
        α of shape (k,) and β of shape (k,).

    Raises:
        ValueError: If a product is not finite.
    """
    basis = start.new_empty(max(1, min(steps, len(start))), len(start))
    basis[0] = start / start.norm()
    alpha: list[Tensor] = []
    beta: list[Tensor] = []
    while True:
        Q = basis[: len(alpha) + 1]
        w = product(Q[-1])
        if not bool(w.isfinite().all()):
            raise ValueError("a product of the matrix is not finite, so it has no spectrum")
        alpha.append(Q[-1] @ w)
        for _ in range(2):  # once is not enough where A is badly conditioned
            w = w - Q.T @ (Q @ w)
        size = w.norm()
        beta.append(size)
        if len(Q) == len(start):  # the whole space: what is left is rounding
            beta[-1] = torch.zeros_like(size)
        a, b = torch.stack(alpha), torch.stack(beta)
        exhausted = bool(beta[-1] <= 1e-12 * (a.abs().max() + b.max()))
        if len(Q) == len(basis) or exhausted or done(a, b):
            return a, b
        basis[len(Q)] = w / size


def ritz(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues of the tridiagonal matrix, first components of its vectors, and residuals."""
    off = torch.diag(beta[:-1], 1)
    values, vectors = torch.linalg.eigh(torch.diag(alpha) + off + off.T)
    return values, vectors[0], beta[-1] * vectors[-1].abs()


def eigenvalues(
    product: Product,
    size: int,
    k: int = 1,
    *,
    steps: int = 30,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> Eigenvalues:
    """Find the k eigenvalues of largest size.

    Args:
        product: A·v.
        size: Order of A.
        k: How many.
        steps: Most products.
        tolerance: Largest residual of each, relative to the largest eigenvalue.
        seed: Of the first vector.

    Returns:
        The eigenvalues; a multiple one is found once.

    Example:
        >>> d = torch.tensor([5.0, -4.0, 1.0, 0.0], dtype=torch.float64)
        >>> eigenvalues(lambda v: d * v, 4, 2).values
        tensor([ 5.0000, -4.0000], dtype=torch.float64)
    """
    start = _normal(size, torch.Generator().manual_seed(seed))

    def largest(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        values, _, residuals = ritz(alpha, beta)
        order = values.abs().argsort(descending=True)[:k]
        return values[order], residuals[order]

    def small(values: Tensor, residuals: Tensor) -> bool:
        return len(values) >= min(k, size) and bool(
            (residuals <= tolerance * values.abs().max()).all()
        )

    alpha, beta = tridiagonal(product, start, steps, done=lambda a, b: small(*largest(a, b)))
    values, residuals = largest(alpha, beta)
    return Eigenvalues(values, residuals, len(alpha), small(values, residuals))


def trace(product: Product, size: int, draws: int = 20, seed: int = 0) -> Estimate:
    """Hutchinson's estimate E[vᵀ·A·v] of the trace, v of random signs.

    Args:
        product: A·v.
        size: Order of A.
        draws: Number of products.
        seed: Of the signs.

    Returns:
        The estimate. Its variance is 2·Σ_{i≠j} A_ij², so a diagonal matrix needs one draw.

    Example:
        >>> d = torch.tensor([5.0, -4.0, 1.0], dtype=torch.float64)
        >>> trace(lambda v: d * v, 3, draws=2).value
        2.0
    """
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(draws):
        v = _signs(size, draw)
        found.append(v @ product(v))
    values = torch.stack(found)
    error = float(values.std() / math.sqrt(draws)) if draws > 1 else math.nan
    return Estimate(float(values.mean()), error, draws)


def density(
    product: Product, size: int, *, steps: int = 40, draws: int = 3, seed: int = 0
) -> Density:
    """Stochastic Lanczos quadrature: the spectral density of A (1901.10159).

    Args:
        product: A·v.
        size: Order of A.
        steps: Products for each draw.
        draws: Random first vectors.
        seed: Of the vectors.

    Returns:
        Point masses whose moments are those of the spectrum in expectation.
    """
    draw = torch.Generator().manual_seed(seed)
    values, weights = [], []
    for _ in range(draws):
        alpha, beta = tridiagonal(product, _signs(size, draw), steps, done=lambda a, b: False)
        theta, first, _ = ritz(alpha, beta)
        values.append(theta)
        weights.append(first.square() / draws)
    order = torch.cat(values).argsort()
    return Density(torch.cat(values)[order], torch.cat(weights)[order])


def _normal(size: int, draw: torch.Generator) -> Tensor:
    return torch.randn(size, generator=draw, dtype=torch.float64, device="cpu")


def _signs(size: int, draw: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (size,), generator=draw, device="cpu").double() * 2 - 1
