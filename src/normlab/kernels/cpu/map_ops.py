"""Curves of maps as operations of torch, between which the compiler traces the middle.

``normlab::maps_apply`` is y = f(x; coefficients), with gradients of all it takes. Through moments
and middle the gradient of x needs what has reached the coefficients, so that one function has the
backward pass of all of it: ``normlab::maps_sums``, the derivative of the middle, traced, and
``normlab::maps_gradient``. See `maps`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from normlab.kernels import reference
from normlab.kernels.cpu import call, function, maps
from normlab.kernels.cpu.function import WIDE, Parameters
from normlab.kernels.cpu.maps import Job
from normlab.kernels.cpu.registered import (
    LIBRARY,
    case_of,
    define,
    leaves,
    like,
    present,
    traceable,
)

_X = "Tensor x, Tensor? mean, Tensor coefficients, str curve, int channel_dim"
_Pass = tuple[Tensor, Tensor | None, Tensor, maps.Curve, int]
"""x, μ where f is about it, coefficients of shape (K, N, C), f, and the axis of channels."""


def _job(given: _Pass) -> Job:
    """The case of a pass, its numbers checked: kernels read one for each map of x."""
    x, mean, coefficients, curve, channel_dim = given
    layout = maps.MAPS.bind(x.shape, channel_dim=channel_dim)
    shape, dtype = layout.lengths[:2], WIDE[x.dtype]
    wanted = (len(maps._CURVES[curve][1]), *shape)
    for t, of in ((mean, shape), (coefficients, wanted)):
        if t is not None and (t.shape != of or t.dtype != dtype):
            raise RuntimeError(
                f"curve {curve!r} of x of shape {tuple(x.shape)} and {x.dtype} takes numbers of "
                f"shape {of} and {dtype}; received {tuple(t.shape)} and {t.dtype}"
            )
    if curve == "line" and mean is None:
        raise RuntimeError("a line is about the mean of each map; received none")
    return Job(curve, layout, lambda *_: ())


def _pass(
    which: int, job: Job, given: _Pass, out: bool, dy: Tensor | None = None, **rest: Tensor
) -> Tensor:
    """One pass of the kernels over x; y, dx, or nothing."""
    x, mean, coefficients, *_ = given
    placed, columns = maps._placed(x, job.layout)
    if dy is not None:
        dy = maps._along(dy, placed, job.layout, columns)
    room = call._like(placed, job.layout, columns) if out else None
    coefficients = coefficients.contiguous()
    mean = torch.zeros_like(coefficients[0]) if mean is None else mean.contiguous()
    rest = {name: t.contiguous() for name, t in rest.items()}
    maps._run(which, job, placed, columns, mean, coefficients.unbind(), room, dy, **rest)
    return x.new_empty(0) if room is None else like(room, x)


def _formula(job: Job) -> Callable[..., Tensor]:
    """f of x, μ and coefficients in torch operations."""

    def y(x: Tensor, mean: Tensor | None, coefficients: Tensor) -> Tensor:
        return maps.curve(job.curve, job.layout, x, mean, coefficients.unbind())

    return y


def _directly(job: Job, given: _Pass, dy: Tensor) -> tuple[Tensor, Tensor]:
    """What flows from dy to x and coefficients by torch operations, unrounded."""
    needs, dy = (True, False, True), reference.accumulated(dy)
    inputs = leaves((reference.accumulated(given[0]), *given[1:3]), needs)
    with torch.no_grad():
        dx, _, sums = function.derivatives(_formula(job), inputs, needs, dy)
    assert dx is not None
    assert sums is not None
    return dx, sums


def _apply(*given: Any) -> Tensor:
    job, x = _job(given), given[0]
    if present():
        return _pass(maps._APPLY, job, given, True)
    return like(_formula(job)(*given[:3]).to(x.dtype), x)


def _sums(dy: Tensor, *given: Any) -> Tensor:
    job = _job(given)
    if not present():
        return _directly(job, given, dy)[1]
    sums = torch.empty_like(given[2], memory_format=torch.contiguous_format)
    _pass(maps._SUMS, job, given, False, dy, sums=sums)
    return sums


def _gradient(dy: Tensor, k: Tensor | None, h: Tensor | None, *given: Any) -> Tensor:
    job, (x, mean, coefficients) = _job(given), given[:3]
    k, h = (torch.zeros_like(coefficients[0]) if t is None else t for t in (k, h))
    if present():
        return _pass(maps._GRADIENT, job, given, True, dy, k=k, h=h)
    mean = torch.zeros_like(k) if mean is None else mean
    through = maps.curve("line", job.layout, x, mean, (k, h))
    return like((_directly(job, given, dy)[0] + through).to(x.dtype), x)


def _fake_sums(dy: Tensor, *given: Any) -> Tensor:
    return torch.empty_like(given[2], memory_format=torch.contiguous_format)


for _schema, _real, _fake in (
    (f"maps_apply({_X}) -> Tensor", _apply, lambda x, *_: torch.empty_like(x)),
    (f"maps_sums(Tensor dy, {_X}) -> Tensor", _sums, _fake_sums),
    (f"maps_gradient(Tensor dy, Tensor? k, Tensor? h, {_X}) -> Tensor", _gradient,
     lambda dy, k, h, x, *_: torch.empty_like(x)),
):  # fmt: skip
    define(_schema, _real, _fake)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.curve, ctx.channel_dim = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 5
    x, mean, coefficients = ctx.saved_tensors
    given, needs = (x, mean, coefficients, ctx.curve, ctx.channel_dim), ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():  # the gradient is itself differentiated
        formula = _formula(_job(given))
        found = function.derivatives(lambda *t: formula(*t).to(x.dtype), given[:3], needs, dy)
        return *found, None, None
    dx = dmean = sums = None
    if needs[0]:
        dx = torch.ops.normlab.maps_gradient(dy, None, None, *given)
    if needs[1] or needs[2]:
        sums = torch.ops.normlab.maps_sums(dy, *given)
    if needs[1] and sums is not None and ctx.curve == "line":  # the other curves are not about μ
        dmean = -coefficients[0] * sums[1]
    return dx, dmean, sums if needs[2] else None, None, None


torch.library.register_autograd(
    "normlab::maps_apply", _differentiate, setup_context=_save, lib=LIBRARY
)


def _coefficients(job: Job, mean: Tensor, variance: Tensor, parameters: Parameters) -> Tensor:
    """Those of all maps, (K, N, C)."""
    wide = [None if p is None else p.to(mean.dtype) for p in parameters]
    found = job.middle(mean, variance, *wide)
    return torch.stack([t.expand(job.layout.lengths[:2]) for t in found])


def _given(job: Job, x: Tensor, mean: Tensor, coefficients: Tensor) -> _Pass:
    """The arguments of every pass."""
    return x, mean, coefficients, job.curve, job.layout.channel_dim


def _composed(x: Tensor, job: Job, parameters: Parameters) -> tuple[Tensor, Tensor, Tensor]:
    """y and moments by operations that are each differentiated by themselves."""
    spec = reference.Spec(job.layout.member_dims, maps._MOMENTS, None)
    found = torch.ops.normlab.moments(x, *case_of(job.layout, spec, 0.0))
    mean, variance = (t.view(x.shape[0], -1) for t in found)
    coefficients = _coefficients(job, mean, variance, parameters)
    y = torch.ops.normlab.maps_apply(*_given(job, x, mean, coefficients))
    return y, mean, variance


class _Traced(torch.autograd.Function):
    """`maps._Fused` for a tracer: (x, job, *parameters) → (y, mean, variance)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, job: Job, *parameters: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, variance = _composed(x, job, parameters)
        ctx.job = job
        ctx.save_for_backward(x, mean, variance, *parameters)
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy, job, needs = grads[0], ctx.job, ctx.needs_input_grad
        x, mean, variance, *parameters = ctx.saved_tensors
        values, pull = _pullback(job, mean, variance, parameters)
        given = _given(job, x, mean, values)
        dx = None
        sums = torch.ops.normlab.maps_sums(dy, *given)
        dmean, dvariance, slopes = pull(sums)
        if needs[0]:
            if job.curve == "line":  # which is about the map's own mean
                dmean = dmean - values[0] * sums[1]
            size = job.layout.members
            k, h = _full(job, (dvariance * (2 / size), dmean / size))
            dx = torch.ops.normlab.maps_gradient(dy, k, h, *given)
        return dx, None, *(g if need else None for g, need in zip(slopes, needs[2:], strict=True))


def _full(job: Job, numbers: Sequence[Tensor]) -> list[Tensor]:
    return [t.expand(job.layout.lengths[:2]) for t in numbers]


def _pullback(
    job: Job, mean: Tensor, variance: Tensor, parameters: Sequence[Tensor | None]
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, list[Tensor | None]]]]:
    """Coefficients, and from their gradient that of μ, σ² and each parameter, or None."""
    given = [p for p in parameters if p is not None]

    def whole(those: Sequence[Any]) -> list[Any]:
        rest = iter(those)
        return [None if p is None else next(rest) for p in parameters]

    def coefficients(mean: Tensor, variance: Tensor, *given: Tensor) -> Tensor:
        return _coefficients(job, mean, variance, tuple(whole(given)))

    values, back, *_ = torch.func.vjp(coefficients, mean, variance, *given)

    def pull(sums: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        dmean, dvariance, *slopes = back(sums)
        return dmean, dvariance, whole(slopes)

    return values, pull


def supports(x: Tensor, parameters: Sequence[Tensor | None]) -> bool:
    """Whether `fused` may be called; asked while it is traced.

    Args:
        x: The input, not empty.
        parameters: Those of the layer.

    Returns:
        Whether it may.
    """
    return traceable(x, parameters)


def fused(x: Tensor, job: Job, parameters: Parameters) -> tuple[Tensor, Tensor, Tensor]:
    """`maps.fused` of operations, in a traced graph.

    Args:
        x: The input.
        job: The case.
        parameters: Those of the layer.

    Returns:
        y, in the dtype and memory order of x; μ and σ² of shape (N, C), without gradient.
    """
    if torch.compiler.is_exporting():  # a program has no functions of Python
        y, mean, variance = _composed(x, job, parameters)
        return y, mean.detach(), variance.detach()
    found: tuple[Tensor, Tensor, Tensor]
    found = _Traced.apply(x, job, *parameters)  # type: ignore[no-untyped-call]
    return found
