"""The compiled kernels as operations of torch, which `torch.compile` and `torch.export` keep whole.

``normlab::normalize``, ``normlab::normalize_backward`` and ``normlab::moments`` are functional:
statistics are outputs, and stored ones are updated by the layer. They say in words what to compute
(pattern, operation), so that a saved graph means the same anywhere. Where there are no kernels,
they compute the closed form. `map_ops` has those of curves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from normlab.core.operation import Operation
from normlab.core.partition import Layout
from normlab.kernels import closed_form, reference
from normlab.kernels.cpu import function, map_ops
from normlab.kernels.cpu.function import WIDE, Job, Parameters
from normlab.kernels.cpu.registered import (
    CASE,
    LIBRARY,
    case_of,
    define,
    leaves,
    like,
    none,
    operation_of,
    present,
    read,
    traceable,
)
from normlab.kernels.reference import Moments, Spec

__all__ = ["ADDS", "map_ops", "moments", "normalize", "present", "supports"]

_GIVEN = "Tensor? weight, Tensor? bias, Tensor? threshold, Tensor? learned_eps, Tensor? residual"
_SCHEMAS = (
    f"moments(Tensor x, {CASE}) -> (Tensor, Tensor)",
    f"normalize(Tensor x, {_GIVEN}, Tensor? mean, Tensor? moment, {CASE}, bool from_batch) "
    "-> (Tensor, Tensor, Tensor)",
    f"normalize_backward(Tensor dy, Tensor x, {_GIVEN}, Tensor? mean, Tensor? moment, {CASE}, "
    "bool from_batch, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
ADDS = True


def _shape(layout: Layout) -> list[int]:
    return [1 if i in layout.member_dims else n for i, n in enumerate(layout.split_shape)]


def _family(layout: Layout, spec: Spec, x: Tensor) -> ModuleType | None:
    from normlab.kernels import dispatch

    if x.dtype not in function.DTYPES or not present():
        return None
    return dispatch.covering(layout, spec.operation, spec.activation)


def _check(x: Tensor, layout: Layout, parameters: Parameters, residual: Tensor | None) -> None:
    """Kernels read C numbers of each parameter, whatever its length, and as many of r as of x."""
    channels = x.shape[layout.channel_dim]
    for p in parameters:
        if p is not None and (p.ndim != 1 or p.shape[0] != channels):
            raise RuntimeError(f"parameters are of shape ({channels},); received {tuple(p.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise RuntimeError(
            f"a residual is of shape {tuple(x.shape)} and {x.dtype}, as the input; "
            f"received {tuple(residual.shape)} and {residual.dtype}"
        )


def _moments(x: Tensor, *case: Any) -> tuple[Tensor, Tensor]:
    layout, spec = read(x, case)
    family = _family(layout, spec, x)
    if family is None:
        found = reference.moments(layout.split(x), spec.dims, spec.operation)
    else:
        found = family.moments(x, layout, spec)
    mean, moment, _ = found
    dtype = WIDE.get(x.dtype, x.dtype)
    return (
        none(x, dtype) if mean is None else mean,
        none(x, dtype) if moment is None else moment,
    )


def _fake_moments(x: Tensor, *case: Any) -> tuple[Tensor, Tensor]:
    layout, (_, op, _) = read(x, case)
    shape, dtype = _shape(layout), WIDE.get(x.dtype, x.dtype)
    return (
        x.new_empty(shape if op.uses_mean else (0,), dtype=dtype),
        x.new_empty(shape if op.p is not None else (0,), dtype=dtype),
    )


def _normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, threshold: Tensor | None,
    learned: Tensor | None, residual: Tensor | None, mean: Tensor | None, moment: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    *case, from_batch = rest
    layout, spec = read(x, tuple(case))
    _check(x, layout, (weight, bias, threshold), residual)
    number = case[8] if learned is None else learned.item()
    measured = mean is None and moment is None
    family = _family(layout, spec, x)
    if family is not None:
        job = function.job_of(layout, spec, from_batch, family)
        y, mean, moment = family.forward(
            job, family.place(job, x), weight, bias, threshold, number, mean, moment, residual
        )
    else:
        view = layout.split(x)
        if measured:
            mean, moment, _ = reference.moments(view, spec.dims, spec.operation)
        w, b, t = (None if p is None else layout.per_channel(p) for p in (weight, bias, threshold))
        r = None if residual is None else layout.split(residual)
        y = reference.apply(view, mean, moment, w, b, t, number, None, spec, residual=r)
        y = layout.join(y)
    dtype = WIDE.get(x.dtype, x.dtype)
    return (
        like(y, x),
        mean if measured and mean is not None else none(x, dtype),
        moment if measured and moment is not None else none(x, dtype),
    )


def _fake_normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, threshold: Tensor | None,
    learned: Tensor | None, residual: Tensor | None, mean: Tensor | None, moment: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    case = rest[:-1]
    _check(x, read(x, case)[0], (weight, bias, threshold), residual)
    if mean is None and moment is None:
        return torch.empty_like(x), *_fake_moments(x, *case)
    dtype = WIDE.get(x.dtype, x.dtype)
    return torch.empty_like(x), none(x, dtype), none(x, dtype)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, threshold: Tensor | None,
    learned: Tensor | None, residual: Tensor | None, mean: Tensor | None, moment: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *case, from_batch, needs = rest
    layout, spec = read(x, tuple(case))
    number = case[8] if learned is None else learned.item()
    family = _family(layout, spec, x)
    found: Sequence[Tensor | None]
    if family is not None:
        job = function.job_of(layout, spec, from_batch, family)
        mean, moment = function.statistics(job, x, mean, moment)
        found = family.backward(
            job, needs, dy, x, weight, bias, threshold, number, mean, moment, residual
        )
    else:
        job = Job(layout, spec, from_batch, closed_form)
        inputs = leaves((x, weight, bias, threshold, learned, residual), needs)
        with torch.no_grad():
            found = function.differentiable(job, needs, dy, tuple(inputs), number, mean, moment)
    given = (x, weight, bias, threshold, learned, residual)
    dx, *slopes, dr = (
        none(x, x.dtype) if g is None or t is None or not need else g.to(t.dtype).view(t.shape)
        for g, t, need in zip(found, given, needs, strict=True)
    )
    dx, dr = (like(g, x) if g.numel() else g for g in (dx, dr))
    return dx, *slopes, dr


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, threshold: Tensor | None,
    learned: Tensor | None, residual: Tensor | None, mean: Tensor | None, moment: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    needs = rest[-1]
    slopes = (
        t.new_empty(t.shape) if t is not None and need else none(x, x.dtype)
        for t, need in zip((weight, bias, threshold, learned), needs[1:5], strict=True)
    )
    dr = torch.empty_like(x) if needs[5] and residual is not None else none(x, x.dtype)
    return torch.empty_like(x) if needs[0] else none(x, x.dtype), *slopes, dr


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, threshold, learned, residual, mean, moment, *case, from_batch = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    if mean is None and moment is None:
        op = operation_of(tuple(case))
        mean = output[1] if op.uses_mean else None
        moment = output[2] if op.p is not None else None
    ctx.case, ctx.from_batch = tuple(case), from_batch
    if case[-1] is None:  # without an activation the gradient does not depend on r
        residual = None
    ctx.save_for_backward(x, weight, bias, threshold, learned, residual, mean, moment)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    dy = grads[0]
    rest = (None,) * (3 + len(ctx.case))
    if dy is None:
        return (None,) * 6 + rest
    *given, mean, moment = ctx.saved_tensors
    x, residual = given[0], given[5]
    needs = list(ctx.needs_input_grad[:6])
    if torch.is_grad_enabled():  # the gradient is itself differentiated
        layout, spec = read(x, ctx.case)
        job = Job(layout, spec, ctx.from_batch, closed_form)
        found = function.differentiable(job, needs, dy, given, ctx.case[8], mean, moment)
        return *found, *rest
    *out, dr = torch.ops.normlab.normalize_backward(
        dy, *given, mean, moment, *ctx.case, ctx.from_batch, needs
    )
    out.append(dy if residual is None else dr)
    return *(g if need else None for g, need in zip(out, needs, strict=True)), *rest


def _save_moments(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *ctx.case = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x)


def _differentiate_moments(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    layout, spec = read(x, tuple(ctx.case))

    def along(x: Tensor) -> Tensor:
        found = reference.moments(layout.split(x), spec.dims, spec.operation)
        pairs = zip(found[:2], grads, strict=True)
        parts = [(m * g).sum() for m, g in pairs if m is not None and g is not None]
        return torch.stack(parts).sum()

    rest = (None,) * len(ctx.case)
    if all(g is None for g in grads):
        return None, *rest
    one = torch.ones((), dtype=WIDE.get(x.dtype, x.dtype), device=x.device)
    return *function.derivatives(along, (x,), ctx.needs_input_grad, one), *rest


define(_SCHEMAS[0], _moments, _fake_moments)
define(_SCHEMAS[1], _normalize, _fake_normalize)
define(_SCHEMAS[2], _backward, _fake_backward)
torch.library.register_autograd(
    "normlab::normalize", _differentiate, setup_context=_save, lib=LIBRARY
)
torch.library.register_autograd(
    "normlab::moments", _differentiate_moments, setup_context=_save_moments, lib=LIBRARY
)


def supports(
    x: Tensor,
    layout: Layout,
    operation: Operation,
    activation: str | None,
    parameters: Parameters = (),
    buffers: Iterable[Tensor | None] = (),
) -> bool:
    """Whether a traced call of this case is better one operation; asked while it is traced.

    Args:
        x: The input.
        layout: Π bound to its shape.
        operation: Φ.
        activation: The fused activation.
        parameters: γ, β and τ.
        buffers: Stored statistics.

    Returns:
        Whether there are kernels for it.
    """
    from normlab.kernels import dispatch

    return (
        traceable(x, (*parameters, *buffers))
        and dispatch.covering(layout, operation, activation) is not None
    )


def moments(x: Tensor, layout: Layout, spec: Spec) -> Moments:
    """Statistics of each area, as `reference.moments` gives them.

    Args:
        x: The input.
        layout: Π bound to its shape.
        spec: Axes of the members, and the operation.

    Returns:
        The moments, without gradient.
    """
    mean, moment = torch.ops.normlab.moments(x.detach(), *case_of(layout, spec, 0.0))
    op = spec.operation
    return Moments(
        mean if op.uses_mean else None, moment if op.p is not None else None, layout.members
    )


def normalize(
    x: Tensor,
    layout: Layout,
    spec: Spec,
    weight: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor | None,
    eps: Tensor | float,
    given: Moments | None,
    *,
    from_batch: bool,
    residual: Tensor | None = None,
) -> tuple[Tensor, Moments]:
    """`function.normalize` as one operation.

    Args:
        x: The input.
        layout: Π bound to its shape.
        spec: Axes of the members, operation and activation.
        weight: γ of shape (C,), or None.
        bias: β, likewise.
        threshold: τ, for the TLU.
        eps: ε, a tensor where it is learned.
        given: Statistics to use; None to measure those of x.
        from_batch: Whether `given`, if any, was measured on x, so that gradients flow through it.
        residual: r, of the shape and dtype of x.

    Returns:
        y, in the dtype and memory order of x, and the statistics used.
    """
    op = spec.operation
    learned, case = eps if isinstance(eps, Tensor) else None, case_of(layout, spec, eps)
    used = (None, None) if given is None else (given.mean, given.moment)
    y, mean, moment = torch.ops.normlab.normalize(
        x, weight, bias, threshold, learned, residual, *used, *case, from_batch
    )
    if given is not None:
        return y, given
    measured = (mean if op.uses_mean else None, moment if op.p is not None else None)
    return y, Moments(*measured, layout.members)
