"""Dropout that keeps one bit an element for its gradient, where torch's keeps one byte."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F


def _pack(keep: Tensor) -> Tensor:
    """Pack a boolean mask into bytes of eight elements."""
    flat = F.pad(keep.reshape(-1).to(torch.uint8), (0, -keep.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=keep.device)).sum(
        1, dtype=torch.uint8
    )


def _unpack(packed: Tensor, like: Tensor) -> Tensor:
    """Undo `_pack` for a tensor's shape."""
    bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (bits & 1).bool().reshape(-1)[: like.numel()].view(like.shape)


class _Masked(torch.autograd.Function):
    """y = keep·x·scale; linear in x, so that its derivatives are itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, packed: Tensor, scale: float) -> Tensor:
        return torch.where(_unpack(packed, x), x * scale, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, packed, ctx.scale = inputs
        ctx.save_for_backward(packed)
        ctx.save_for_forward(packed)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return _masked(grads[0], ctx.saved_tensors[0], ctx.scale), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _masked(tangents[0], ctx.saved_tensors[0], ctx.scale)


def _masked(x: Tensor, packed: Tensor, scale: float) -> Tensor:
    return cast(Tensor, _Masked.apply(x, packed, scale))  # type: ignore[no-untyped-call]


def dropout(x: Tensor, rate: float) -> Tensor:
    """Set each element to 0 with probability `rate`, scale the others by 1/(1 − rate).

    Args:
        x: Any shape.
        rate: In [0, 1).

    Returns:
        A tensor like x.

    Example:
        >>> y = dropout(torch.ones(1000), 0.25)
        >>> sorted(set(y.tolist())) == [0.0, torch.tensor(4 / 3).item()]
        True
    """
    if rate == 0:
        return x
    if torch.compiler.is_compiling():
        return F.dropout(x, rate)
    keep = torch.rand_like(x, dtype=torch.float32) >= rate
    return _masked(x, _pack(keep), 1 / (1 - rate))
