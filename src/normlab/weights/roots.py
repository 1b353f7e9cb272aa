"""Square roots of symmetric matrices whose derivatives of any order have no 1/(λᵢ − λⱼ).

R = S^½ satisfies R·R = S, so dR solves the Lyapunov equation R·dR + dR·R = dS, which in the
eigenbasis of R divides by rᵢ + rⱼ > 0: nothing happens where eigenvalues meet. Differentiating
through `torch.linalg.eigh` instead gives infinities there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Lyapunov(torch.autograd.Function):
    """Y with R·Y + Y·R = G; r, q are the eigenvalues and eigenvectors of R."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, given: Tensor, r: Tensor, q: Tensor) -> Tensor:
        inner = q.mT @ given @ q
        y = q @ (inner / (r.unsqueeze(-1) + r.unsqueeze(-2))) @ q.mT
        ctx.save_for_backward(root, r, q, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        root, r, q, y = ctx.saved_tensors
        # The solution map is self-adjoint; R enters as −(dR·Y + Y·dR).
        h = _lyapunov(root, grads[0], r, q)
        return -(h @ y.mT + y.mT @ h), h, None, None


class _Root(torch.autograd.Function):
    """S^½ from the eigenvalues r² and eigenvectors q of S."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, r: Tensor, q: Tensor) -> Tensor:
        root = (q * r.unsqueeze(-2)) @ q.mT
        ctx.save_for_backward(root, r, q)
        return root

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        root, r, q = ctx.saved_tensors
        return _lyapunov(root, grads[0], r, q), None, None


def _lyapunov(root: Tensor, given: Tensor, r: Tensor, q: Tensor) -> Tensor:
    y: Tensor = _Lyapunov.apply(root, given, r, q)  # type: ignore[no-untyped-call]
    return y


def root(s: Tensor) -> Tensor:
    """Return the symmetric square root of positive definite matrices.

    Args:
        s: (…, n, n), symmetric, positive definite.

    Returns:
        R with R·R = S; differentiable any number of times, also where eigenvalues are equal.

    Example:
        >>> root(torch.diag(torch.tensor([4.0, 9.0])))
        tensor([[2., 0.],
                [0., 3.]])
    """
    with torch.no_grad():
        values, q = torch.linalg.eigh(s.detach())
        # Rounding may leave the smallest of a singular matrix a little under zero.
        r = values.clamp(min=torch.finfo(s.dtype).tiny).sqrt()
    result: Tensor = _Root.apply(s, r, q)  # type: ignore[no-untyped-call]
    return result
