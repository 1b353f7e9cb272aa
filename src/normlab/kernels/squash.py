"""Squashing without statistics: y = γ·tanh(α·x) + β, saving x alone for the gradient."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from normlab.kernels.closed_form import sum_to
from normlab.kernels.reference import accumulated


def _squashed(x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = torch.tanh(accumulated(x) * alpha)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


class _Squash(torch.autograd.Function):
    """The backward pass computes tanh again from x, differentiably; nothing else is kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return _squashed(x, alpha, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, alpha, weight, bias = ctx.saved_tensors
        xa, g = accumulated(x), accumulated(grads[0])
        t = torch.tanh(xa * alpha)
        h = (g if weight is None else g * weight) * (1 - t * t)
        dweight = None if weight is None else sum_to(g * t, weight)
        dbias = None if bias is None else sum_to(g, bias)
        dalpha = (h * xa).sum().to(alpha.dtype)
        return (h * alpha).to(x.dtype), dalpha, dweight, dbias

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        x, alpha, weight, _ = ctx.saved_tensors
        tx, talpha, tweight, tbias = tangents
        xa = accumulated(x)
        t = torch.tanh(xa * alpha)
        inner = torch.zeros_like(t) if tx is None else accumulated(tx) * alpha
        inner = inner if talpha is None else inner + xa * talpha
        out = (1 - t * t) * inner
        out = out if weight is None else out * weight
        out = out if tweight is None else out + t * tweight
        return (out if tbias is None else out + tbias).to(x.dtype)


def squash(x: Tensor, alpha: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """y = γ·tanh(α·x) + β.

    Args:
        x: Any shape.
        alpha: α, a scalar.
        weight: γ, broadcastable against x, or None.
        bias: β, likewise.

    Returns:
        y, in the dtype of x.
    """
    if torch.compiler.is_compiling():  # which differentiates plain operations itself
        return _squashed(x, alpha, weight, bias)
    return cast(Tensor, _Squash.apply(x, alpha, weight, bias))  # type: ignore[no-untyped-call]
