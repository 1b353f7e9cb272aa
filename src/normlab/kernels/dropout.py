"""Dropout that keeps one bit an element for its gradient, where torch's keeps one byte."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from normlab.kernels.transforms import transformed

_STEPS = 2**16  # 16 random bits an element
_GATHER = 0x0102040810204080  # times eight bytes of 0 or 1: their bits, in the highest byte


def _gates(x: Tensor, rate: float) -> Tensor:
    """Draw which elements are kept.

    Where 16 bits state the rate well enough, they cost a third of drawing a float for each element.
    One operation draws them inside and outside of transforms, so that equal seeds drop equal
    elements, and vmap's rules on randomness hold.
    """
    steps = round(rate * _STEPS)
    if abs(steps / _STEPS - rate) > 1e-3 * min(rate, 1 - rate):
        return torch.rand_like(x, dtype=torch.float32) >= rate
    size = (-(-x.numel() // 4),)
    words = torch.randint(-(2**63), 2**63 - 1, size, dtype=torch.int64, device=x.device)
    draws = words.view(torch.int16)[: x.numel()]
    keep = (draws >= steps - _STEPS // 2).view(x.shape)
    # In the layout of x: the output takes that of its first operand, which is this.
    return keep if x.is_contiguous() else torch.empty_like(x, dtype=torch.bool).copy_(keep)


def _pack(keep: Tensor) -> Tensor:
    """Pack a boolean mask into bytes of eight elements, the first in the lowest bit."""
    flat = F.pad(keep.reshape(-1), (0, -keep.numel() % 8))
    if sys.byteorder == "little" and not transformed(keep):
        return (flat.view(torch.int64) * _GATHER >> 56).to(torch.uint8)
    bits = torch.arange(8, dtype=torch.uint8, device=keep.device)
    return (flat.view(-1, 8).to(torch.uint8) << bits).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, like: Tensor) -> Tensor:
    """Undo `_pack` for a tensor's shape."""
    bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (bits & 1).bool().reshape(-1)[: like.numel()].view(like.shape)


class _Masked(torch.autograd.Function):
    """y = keep·x·scale; linear in x, so that its derivatives are itself. Only bits are saved."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, keep: Tensor, packed: Tensor, scale: float) -> Tensor:
        return torch.where(keep, x * scale, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, packed, ctx.scale = inputs
        ctx.save_for_backward(packed)
        ctx.save_for_forward(packed)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        return _again(grads[0], ctx.saved_tensors[0], ctx.scale), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _again(tangents[0], ctx.saved_tensors[0], ctx.scale)


def _masked(x: Tensor, keep: Tensor, packed: Tensor, scale: float) -> Tensor:
    return cast(Tensor, _Masked.apply(x, keep, packed, scale))  # type: ignore[no-untyped-call]


def _again(x: Tensor, packed: Tensor, scale: float) -> Tensor:
    """Apply a saved mask."""
    return _masked(x, _unpack(packed, x), packed, scale)


def dropout(x: Tensor, rate: float, channel_dim: int | None = None) -> Tensor:
    """Set each element to 0 with probability `rate`, scale the others by 1/(1 − rate).

    Args:
        x: Any shape; samples along axis 0 where whole channels are dropped.
        rate: In [0, 1).
        channel_dim: The axis of channels, to keep or drop each channel of each sample as a whole;
            None to decide for each element.

    Returns:
        A tensor like x.

    Example:
        >>> y = dropout(torch.ones(1000), 0.25)
        >>> sorted(set(y.tolist())) == [0.0, torch.tensor(4 / 3).item()]
        True
    """
    if rate == 0:
        return x
    if channel_dim is not None:
        shape = [1] * x.ndim
        shape[0], shape[channel_dim] = x.shape[0], x.shape[channel_dim]
        kept = torch.rand(shape, device=x.device) >= rate
        return torch.where(kept, x * (1 / (1 - rate)), 0)
    if torch.compiler.is_compiling():
        return F.dropout(x, rate)
    keep = _gates(x, rate)
    return _masked(x, keep, _pack(keep), 1 / (1 - rate))
