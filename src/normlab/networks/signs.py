"""One-bit values: signs with the gradients of stand-ins, and standardized weights.

The sign has derivative 0 wherever it has one, so backward passes use a stand-in (straight-through
estimators):

    activations   the derivative of F(x) = x·(2 − |x|) on [−1, 1], constant outside, Bi-Real Net
    weights       the derivative of clamp(w, −1, 1)

Both are written as ``sign(x) + (F(x) − F(x).detach())``. The bracket is exactly 0, or NaN where x
is NaN: values are exact, broken activations stay visible, and every transform of torch (compile,
vmap, forward mode, second derivatives: F′′) sees plain operations.

Sources: Bi-Real Net (1808.00278), ReActNet (2003.03488), BNN − BN = ? (2104.08215).
"""

from __future__ import annotations

import torch
from torch import Tensor

from normlab.kernels import units as rows
from normlab.kernels.cpu.units import How
from normlab.weights.scaled_standardization import scaled_deviation

_EPS = 1e-5


def sign(x: Tensor, zero: int = 1) -> Tensor:
    """The sign, as a constant: −1, +1, and what is asked for at 0.

    Args:
        x: Any shape, a floating-point type.
        zero: sign(0); 1 keeps the output binary, 0 is what ``torch.sign`` and released code give.

    Returns:
        Signs of x's shape and dtype, without a gradient; −1 for NaN.

    Example:
        >>> sign(torch.tensor([-2.0, 0.0, 3.0])), sign(torch.tensor([0.0, -0.0]), zero=0)
        (tensor([-1.,  1.,  1.]), tensor([0., 0.]))
    """
    signs = torch.where(x >= 0, x.new_ones(()), x.new_full((), -1))
    return signs if zero == 1 else torch.where(x == 0, 0.0, signs)


def sign_quadratic(x: Tensor, zero: int = 1) -> Tensor:
    """sign(x), with the derivative 2 + 2x on [−1, 0), 2 − 2x on [0, 1) and 0 elsewhere.

    The second derivative is that of the stand-in: −2·sign(x) within (−1, 1), 0 at 0.

    Args:
        x: Any shape.
        zero: sign(0), 1 or 0.

    Returns:
        Signs of x's shape and dtype; NaN where x is NaN.

    Example:
        >>> x = torch.tensor([-2.0, -0.25, 0.0, 0.5], requires_grad=True)
        >>> sign_quadratic(x).tolist(), torch.autograd.grad(sign_quadratic(x).sum(), x)[0].tolist()
        ([-1.0, -1.0, 1.0, 1.0], [0.0, 1.5, 2.0, 1.0])
    """
    inside = x.clamp(-1, 1)
    smooth = inside * (2 - inside.abs())
    return sign(x, zero) + (smooth - smooth.detach())


def binarized(weight: Tensor, scale: str = "mean", zero: int = 1) -> Tensor:
    """W_b = mean|W|·sign(W), the mean over each filter; derivative 1 where |W| ≤ 1, 0 elsewhere.

    The scale is a constant for the gradient, which is that of clamp(W, −1, 1).

    Args:
        weight: W, filters in dim 0.
        scale: ``"mean"``, or ``"none"`` for signs alone.
        zero: sign(0), 1 or 0.

    Returns:
        W_b, of W's shape.

    Example:
        >>> binarized(torch.tensor([[0.5, -1.5], [0.0, 0.25]]))
        tensor([[ 1.0000, -1.0000],
                [ 0.1250,  0.1250]])
    """
    return effective(weight, None, scale, zero, standardize=False)


def standardized(weight: Tensor, eps: float = _EPS) -> Tensor:
    """Ŵ = (W − μ) / (σ + eps) / √fan_in with mean μ and biased deviation σ of each filter.

    Args:
        weight: W, filters in dim 0; fan_in is the number of elements of one.
        eps: Added to σ.

    Returns:
        Ŵ, of W's shape: filters of mean 0 and squared norm (σ / (σ + eps))².

    Example:
        >>> standardized(torch.tensor([[1.0, 3.0, 1.0, 3.0]]))
        tensor([[-0.5000,  0.5000, -0.5000,  0.5000]])
    """
    return effective(weight, None, None, eps=eps)


def effective(
    weight: Tensor,
    gain: Tensor | None,
    scale: str | None,
    zero: int = 1,
    *,
    standardize: bool = True,
    eps: float = _EPS,
) -> Tensor:
    """The weight that a layer uses: gain·Ŵ, or gain·mean|Ŵ|·sign(Ŵ), in one pass.

    Args:
        weight: W, filters in dim 0.
        gain: One number a filter, (filters, 1, …), or None.
        scale: Of the signs, see `binarized`; None for Ŵ itself.
        zero: sign(0), 1 or 0.
        standardize: Whether Ŵ is `standardized`, or W itself.
        eps: Added to σ.

    Returns:
        A tensor of W's shape.

    Example:
        >>> effective(torch.tensor([[1.0, 2.0, 3.0, 6.0]]), None, "mean")
        tensor([[-0.4009, -0.4009,  0.4009,  0.4009]])
    """

    def formula(weight: Tensor, gain: Tensor | None) -> Tensor:
        used = _standardized(weight, eps) if standardize else weight
        used = used if scale is None else _binarized(used, scale, zero)
        return used if gain is None else gain * used

    form = "outside" if standardize else "stored"
    return rows.standardize(weight, gain, How(formula, eps, form, 1.0, scale, zero))


def _binarized(weight: Tensor, scale: str, zero: int) -> Tensor:
    """The formula of `binarized` in torch operations."""
    signs, inside = sign(weight, zero), weight.clamp(-1, 1)
    if scale == "mean":
        sizes = _wide(weight.detach()).abs()
        signs = signs * sizes.mean(tuple(range(1, weight.ndim)), keepdim=True).to(weight.dtype)
    return signs + (inside - inside.detach())


def _standardized(weight: Tensor, eps: float) -> Tensor:
    """The formula of `standardized` in torch operations."""
    filters = _wide(weight).flatten(1)
    mean, deviation = scaled_deviation(filters, eps, "outside")
    return ((filters - mean) / deviation).view_as(weight).to(weight.dtype)


def _wide(weight: Tensor) -> Tensor:
    """At least float32, for sums over a filter."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
