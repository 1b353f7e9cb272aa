"""A function of which the backward pass keeps nothing but the arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from normlab.kernels import dispatch, reference
from normlab.kernels.reference import accumulated

Pull = Callable[[Tensor], tuple[Tensor, ...]]


class _Recomputed(torch.autograd.Function):
    """y = f(tensors), keeping the tensors alone: derivatives compute f again from them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.function, *tensors = inputs
        ctx.dtype = output.dtype
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def _pulled(ctx: Any) -> tuple[list[int], list[Tensor], Tensor, Pull]:
        """Where the tensors that have derivatives stand, those, y, and the product with Jᵀ."""
        saved = list(ctx.saved_tensors)  # once: activation checkpointing allows one reading
        at = [i for i, t in enumerate(saved) if t is not None and t.is_floating_point()]
        inputs = [saved[i] for i in at]
        # Where f uses an argument several times, the parts of its gradient are added in float32
        # before they are rounded: they may cancel.
        wide = [accumulated(x) for x in inputs]

        def function(*values: Tensor) -> Tensor:
            given = list(saved)
            for i, value in zip(at, values, strict=True):
                given[i] = value
            return cast(Tensor, ctx.function(*given))

        output, pull, *_ = torch.func.vjp(function, *wide)

        def rounded(gradient: Tensor) -> tuple[Tensor, ...]:
            parts = cast(Pull, pull)(gradient.to(output.dtype))
            return tuple(part.to(x.dtype) for part, x in zip(parts, inputs, strict=True))

        return at, inputs, output, rounded

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        at, _, _, pull = _Recomputed._pulled(ctx)
        out: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for i, gradient in zip(at, pull(grads[0]), strict=True):
            out[1 + i] = gradient
        return tuple(out)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        # J·t is the gradient of ⟨Jᵀ·g, t⟩ at g, whatever g: forward mode does not nest everywhere.
        at, inputs, output, pull = _Recomputed._pulled(ctx)
        t = [tangents[1 + i] for i in at]
        t = [torch.zeros_like(x) if d is None else d for x, d in zip(inputs, t, strict=True)]
        push = cast(Any, torch.func.vjp(pull, torch.zeros_like(output)))[1]
        return cast(Tensor, push(tuple(t))[0]).to(ctx.dtype)


def recomputed(function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """function(*tensors), of which the backward pass keeps nothing but its arguments.

    Args:
        function: Differentiable, without random numbers or side effects.
        *tensors: Its arguments; those of other dtypes than floating-point ones get no gradient.

    Returns:
        Its value.
    """
    if dispatch.implementation() is reference:  # the compiler decides itself what to keep
        return function(*tensors)
    return cast(Tensor, _Recomputed.apply(function, *tensors))  # type: ignore[no-untyped-call]
