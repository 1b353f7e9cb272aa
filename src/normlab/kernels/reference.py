"""The formulas in plain torch operations: the oracle that every other backend is held against.

Any dtype and device, differentiable any number of times, in reverse and forward mode, under
`torch.func` transforms and `torch.compile`. Tensors here are split views (`Layout.split`), and
statistics keep the reduced axes, so that everything broadcasts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from normlab.core.operation import Operation

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over the processes that share statistics; must be differentiable."""


class Moments(NamedTuple):
    """Statistics of each area, in float32 at least, reduced axes kept with length 1.

    Attributes:
        mean: μ, or None where the operation needs none.
        moment: M = mean|x − b·μ|ᵖ (the largest value for p = ∞), or None for p = None.
        size: Number of members of each area, 0 where all are masked; a tensor where masks or
            processes make it vary.
    """

    mean: Tensor | None
    moment: Tensor | None
    size: Tensor | int


class Spec(NamedTuple):
    """What a kernel call needs to know beside its tensors.

    Attributes:
        dims: Axes that hold the members of an area.
        operation: Φ.
        activation: The fused activation, or None; or ``"gated"``, which puts x·sigmoid(τ·x) in the
            place of x where there is no shift, and leaves u as it is.
    """

    dims: tuple[int, ...]
    operation: Operation
    activation: str | None


def accumulated(x: Tensor) -> Tensor:
    """Return x in the dtype that statistics are computed in: float32 at least."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def total(x: Tensor, dims: tuple[int, ...], reduce: Reduce | None = None) -> Tensor:
    """Sum over axes, kept with length 1, and over processes.

    An empty `dims` means no axis (torch's own sum would take all of them).
    """
    # Trailing axes first: one pass over contiguous rows is several times faster than torch's
    # reduction over split axes such as (0, 2, 3).
    last = tuple(d for d in dims if d > 1)
    first = tuple(d for d in dims if d <= 1)
    for part in (last, first):
        x = x.sum(part, keepdim=True) if part else x
    return reduce(x) if reduce else x


def members(
    x: Tensor, dims: tuple[int, ...], mask: Tensor | None, reduce: Reduce | None
) -> Tensor | int:
    """Count the members of each area."""
    if mask is None and reduce is None:
        return math.prod([x.shape[d] for d in dims])
    if mask is None:
        count = torch.full((), math.prod([x.shape[d] for d in dims]), device=x.device)
        count = count.to(accumulated(x).dtype)
    else:
        repeats = math.prod([x.shape[d] // mask.shape[d] for d in dims])
        count = total(mask.to(accumulated(x).dtype), dims) * repeats
    return reduce(count) if reduce else count


def counted(size: Tensor | int, like: Tensor) -> Tensor:
    """A number of members as a tensor, of the dtype and device of another."""
    if isinstance(size, Tensor):
        return size.to(like)
    # Not `torch.as_tensor`, with which a tracer would settle on one length.
    return torch.full((), size, dtype=like.dtype, device=like.device)


def divisor(size: Tensor | int) -> Tensor | int:
    """The number to divide sums by: areas without members have sums of 0, and means of 0."""
    # Not "if it is an int": in exported programs a length may be symbolic.
    return size.clamp(min=1) if isinstance(size, Tensor) else size


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Put zeros where the mask is false, whatever stood there (NaN included)."""
    return x if mask is None else x.masked_fill(~mask, 0)


def deviations(x: Tensor, mean: Tensor | None, about: str, mask: Tensor | None) -> Tensor:
    """z = x − b·μ at valid positions, 0 elsewhere."""
    if about == "zero" or mean is None:
        return masked(x, mask)
    return masked(x - mean, mask)


def moments(
    x: Tensor,
    dims: tuple[int, ...],
    operation: Operation,
    mask: Tensor | None = None,
    reduce: Reduce | None = None,
) -> Moments:
    """Compute the statistics that the operation needs.

    The mean is corrected once by the mean of what is left (x − μ₀), and deviations are taken from
    that difference, never as E[x²] − E[x]²: a mean of 10⁴ beside a deviation of 1 stays exact.
    """
    x = masked(accumulated(x), mask)
    size = members(x, dims, mask, reduce)
    count = divisor(size)
    mean, z = None, x
    if operation.uses_mean:
        rough = total(x, dims, reduce) / count
        left = deviations(x, rough, "mean", mask)
        correction = total(left, dims, reduce) / count
        mean = rough + correction
        if operation.about == "mean":
            z = left if operation.p == 2 else masked(left - correction, mask)
    if operation.p is None:
        return Moments(mean, None, size)
    moment = _moment(z, operation.p, dims, count, reduce)
    if operation.p == 2 and z is not x:
        # The correction is a rounding error of the mean: subtracting its square here spares a pass
        # over x and cancels nothing.
        moment = (moment - correction**2).clamp(min=0)
    if isinstance(size, Tensor):
        # An area without a valid member gets deviation 1: with ε = 0 it would get 0/0.
        moment = moment.masked_fill(size == 0, 1)
    return Moments(mean, moment, size)


def _moment(
    z: Tensor, p: float, dims: tuple[int, ...], count: Tensor | int, reduce: Reduce | None
) -> Tensor:
    """mean|z|ᵖ, or max|z|."""
    if p == math.inf:
        if reduce is not None:
            raise ValueError("p='max' has no synchronized form; use a finite p")
        return z.abs().amax(dims, keepdim=True) if dims else z.abs()
    if p == 2 and not torch.is_grad_enabled():
        # One pass without a square of x's size; its second derivative at 0 is not defined,
        # which is why differentiation takes the other way.
        last = tuple(d for d in dims if d > 1)
        power = torch.linalg.vector_norm(z, 2, last, keepdim=True) ** 2 if last else z * z
        return total(power, tuple(d for d in dims if d <= 1), reduce) / count
    power = z * z if p == 2 else z.abs() if p == 1 else z.abs() ** p
    return total(power, dims, reduce) / count


def deviation(moment: Tensor, operation: Operation, eps: Tensor | float) -> Tensor:
    """D = k·(M + ε)^(1/p)."""
    inside = moment + eps
    power = operation.power
    root = inside.sqrt() if power == 2 else inside if power == 1 else inside ** (1 / power)
    return root if operation.factor == 1 else root * operation.factor


def activate(
    u: Tensor, activation: str | None, threshold: Tensor | None, slope: Tensor | None = None
) -> Tensor:
    """Apply the fused activation."""
    if activation == "relu":
        return u.relu()
    if activation == "silu":
        return torch.nn.functional.silu(u)
    if activation == "tlu":
        assert threshold is not None
        if not torch.is_grad_enabled():
            return torch.maximum(u, threshold)
        return (u - threshold).relu() + threshold  # ties go to τ, as those of ReLU go to 0
    if activation == "affine_tlu":
        assert threshold is not None
        assert slope is not None
        line = torch.addcmul(threshold.to(u.dtype), slope.to(u.dtype), u)
        return (u - line).relu() + line
    return u


def apply(
    x: Tensor,
    mean: Tensor | None,
    moment: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor | None,
    eps: Tensor | float,
    mask: Tensor | None,
    spec: Spec,
    slope: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y = a((x − s·μ)/D · γ + β + r) with given statistics; masked positions come out as 0."""
    operation = spec.operation
    y = masked(accumulated(x), mask)
    if operation.shift:
        assert mean is not None
        y = y - mean
    if spec.activation == "gated":
        assert threshold is not None
        y = y * torch.sigmoid(threshold * y)
    inverse = None if moment is None else deviation(moment, operation, eps).reciprocal()
    y, scale = partly_scaled(y, inverse, weight)
    if scale is not None:
        y = y * scale if bias is None else torch.addcmul(bias.to(y.dtype), y, scale.to(y.dtype))
    elif bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual.to(y.dtype)
    y = masked(activate(y, spec.activation, threshold, slope), mask)
    return y.to(x.dtype)


def partly_scaled(
    x: Tensor, inverse: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return (x', factor) with x'·factor = x·γ/D, at the cost of one product of x's size.

    γ and 1/D are multiplied first, unless they vary along different axes and their product would
    itself be of x's size.
    """
    if inverse is None or weight is None:
        return x, weight if inverse is None else inverse
    together = math.prod([max(a, b) for a, b in zip(inverse.shape, weight.shape, strict=True)])
    if together * 4 <= x.numel():
        return x, inverse * weight
    return x * inverse, weight


def normalize(
    x: Tensor,
    given: Moments,
    weight: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor | None,
    eps: Tensor | float,
    mask: Tensor | None,
    spec: Spec,
    *,
    from_batch: bool,
    reduce: Reduce | None = None,
    slope: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y = a((x − s·μ)/D · γ + β + r), gradients by autograd.

    Args:
        x: Split view.
        given: Statistics to use.
        weight: γ, broadcastable against x, or None.
        bias: β, likewise.
        threshold: τ, for the TLU and the affine TLU.
        eps: ε, a tensor where it is learned.
        mask: True at valid positions, broadcastable against x.
        spec: Axes, operation and activation.
        from_batch: Whether `given` was computed from x, so that gradients flow through it.
        reduce: Sum over processes.
        slope: κ, for the affine TLU.
        residual: r, of the shape of x.

    Returns:
        y, in the dtype of x.
    """
    if from_batch:
        given = moments(x, spec.dims, spec.operation, mask, reduce)
    mean, moment, _ = given
    return apply(x, mean, moment, weight, bias, threshold, eps, mask, spec, slope, residual)
