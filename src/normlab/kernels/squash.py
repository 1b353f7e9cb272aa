"""Squashing without statistics: y = γ·f(α·x + s) + β, saving x alone for the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from normlab.kernels.closed_form import sum_to
from normlab.kernels.reference import accumulated

Function = Literal["tanh", "erf"]


class _Curve(NamedTuple):
    """f and its derivative, the latter from u and f(u)."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]


_CURVES: dict[str, _Curve] = {
    "tanh": _Curve(torch.tanh, lambda u, t: 1 - t * t),
    "erf": _Curve(torch.erf, lambda u, _: 2 / math.sqrt(math.pi) * torch.exp(-u * u)),
}


def _inner(x: Tensor, alpha: Tensor, shift: Tensor | None) -> Tensor:
    u = accumulated(x) * alpha
    return u if shift is None else u + shift


def _squashed(
    x: Tensor,
    alpha: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    function: Function,
) -> Tensor:
    y = _CURVES[function].value(_inner(x, alpha, shift))
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


class _Squash(torch.autograd.Function):
    """The backward pass computes f again from x, differentiably; nothing else is kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        alpha: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shift: Tensor | None,
        function: Function,
    ) -> Tensor:
        return _squashed(x, alpha, weight, bias, shift, function)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, function = inputs
        ctx.curve = _CURVES[function]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, alpha, weight, bias, shift = ctx.saved_tensors
        xa, g = accumulated(x), accumulated(grads[0])
        u = _inner(x, alpha, shift)
        t = ctx.curve.value(u)
        h = (g if weight is None else g * weight) * ctx.curve.slope(u, t)
        dweight = None if weight is None else sum_to(g * t, weight)
        dbias = None if bias is None else sum_to(g, bias)
        dalpha = (h * xa).sum().to(alpha.dtype)
        dshift = None if shift is None else h.sum().to(shift.dtype)
        return (h * alpha).to(x.dtype), dalpha, dweight, dbias, dshift, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        x, alpha, weight, _, shift = ctx.saved_tensors
        tx, talpha, tweight, tbias, tshift, _ = tangents
        xa, u = accumulated(x), _inner(x, alpha, shift)
        t: Tensor = ctx.curve.value(u)
        inner = torch.zeros_like(t) if tx is None else accumulated(tx) * alpha
        inner = inner if talpha is None else inner + xa * talpha
        inner = inner if tshift is None else inner + tshift
        out: Tensor = ctx.curve.slope(u, t) * inner
        out = out if weight is None else out * weight
        out = out if tweight is None else out + t * tweight
        return (out if tbias is None else out + tbias).to(x.dtype)


def squash(
    x: Tensor,
    alpha: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    shift: Tensor | None = None,
    function: Function = "tanh",
) -> Tensor:
    """y = γ·f(α·x + s) + β.

    Args:
        x: Any shape.
        alpha: α, a scalar.
        weight: γ, broadcastable against x, or None.
        bias: β, likewise.
        shift: s, a scalar, or None.
        function: f, ``"tanh"`` or ``"erf"``.

    Returns:
        y, in the dtype of x.
    """
    if torch.compiler.is_compiling():  # which differentiates plain operations itself
        return _squashed(x, alpha, weight, bias, shift, function)
    y = _Squash.apply(x, alpha, weight, bias, shift, function)  # type: ignore[no-untyped-call]
    return cast(Tensor, y)
