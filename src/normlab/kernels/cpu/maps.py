"""Layers as one curve for each map, between differentiable functions of moments.

A map is a sample's channel with all its positions. Where all statistics of a layer follow from the
means and variances of maps, it is

    moments → a function of a few N × C numbers → y = f(x; its results),

of which the ends, which pass over x, are compiled, and the middle is a few torch operations, or
compiled too where it is one of two that kernels know. The backward pass sums the gradients of f's
coefficients over each map, pulls these back through the middle to the moments and the parameters,
and writes

    ∂L/∂x = ∂L/∂y · f'(x) + (x − μ) · 2·∂L/∂σ²/m + ∂L/∂μ/m.

Nothing but x and the moments is saved.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from normlab.core.operation import Standardize
from normlab.core.partition import Layout, partition
from normlab.kernels import dispatch, reference
from normlab.kernels.cpu import call, function, library

Curve = Literal["line", "larger"]
_APPLY, _SUMS, _GRADIENT = range(3)  # as the C++ enumerates its passes
_CURVES: dict[Curve, tuple[int, tuple[str, ...]]] = {
    "line": (0, ("a", "b")),
    "larger": (1, ("a", "b", "v", "d", "s")),
}
MAPS = partition("n c * -> (n c) (*)")
_MOMENTS = Standardize(eps=0.0)

Middle = Callable[..., Sequence[Tensor]]
"""(μ, σ², *parameters) → coefficients, (N, C) or broadcast to it; μ and σ² are (N, C)."""


class Known(NamedTuple):
    """What kernels need of a middle that they know, beside its parameters.

    That of a line is a mixture of areas; its parameters are the logits of means and of variances, γ
    and β. That of the larger one is `EvoNormB0`; its parameters are v, γ and β.

    Attributes:
        eps: ε.
        order: Of a mixture, its parts in the order of their logits: 1 maps, 2 samples, 3 channels.
        correction: Factor of the variance of a map where it stands for itself.
        stored: Mean (None for `EvoNormB0`) and variance that stand for the batch's, or None.
        measures: Whether moments of channels over the batch are wanted.
    """

    eps: float
    order: tuple[int, ...] = ()
    correction: float = 1.0
    stored: tuple[Tensor | None, Tensor] | None = None
    measures: bool = False


class Job(NamedTuple):
    """What both directions need beside their tensors.

    Attributes:
        curve: ``"line"``: (x − μ)·a + b; ``"larger"``: x/max(d, v·x + s)·a + b.
        layout: `MAPS` bound to the shape of x.
        middle: What gives the coefficients in the order a, b, v, d, s.
        known: What kernels need to compute the middle themselves, if they do.
        channels: Room for the mean and variance of channels over the batch, (1, C), if wanted.
    """

    curve: Curve
    layout: Layout
    middle: Middle
    known: Known | None = None
    channels: tuple[Tensor, Tensor] | None = None


class _Call(ctypes.Structure):
    """Arguments of a pass; kept in step with `struct Maps` of maps.cpp."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in (
            "n", "c", "p", "xn", "xc", "xp", "gn", "gc", "gp", "yn", "yc", "yp", "columns", "curve",
        )],
        *[(name, ctypes.c_void_p) for name in (
            "x", "dy", "mean", "k", "h", "a", "b", "v", "d", "s", "out", "sums",
        )],
    ]  # fmt: skip


class _Middle(ctypes.Structure):
    """A middle that kernels know; kept in step with `struct Middle` of middles.h."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("order", "narrow")],
        *[(name, ctypes.c_double) for name in ("eps", "correction")],
        *[(name, ctypes.c_void_p) for name in (
            "mean", "variance", "stored_mean", "stored_variance", "gamma", "beta", "v",
            "mean_logits", "variance_logits", "batch_mean", "batch_variance",
            "dgamma", "dbeta", "dv", "dmean_logits", "dvariance_logits",
        )],
    ]  # fmt: skip


_PARAMETERS: dict[Curve, tuple[str, ...]] = {
    "line": ("mean_logits", "variance_logits", "gamma", "beta"),
    "larger": ("v", "gamma", "beta"),
}


def supports(x: Tensor, parameters: Sequence[Tensor | None], mask: Tensor | None = None) -> bool:
    """Whether `fused` may be called: plain dense CPU tensors, no transform, compiled kernels.

    In a traced graph these stand as operations of torch; see `map_ops`.

    Args:
        x: The input.
        parameters: Those of the layer.
        mask: Valid positions, which the kernels do not know.

    Returns:
        Whether it may.
    """
    if mask is not None or x.numel() == 0:
        return False
    if dispatch.compiled_for_cpu():
        return function.readable(x, 0, (), parameters)
    traced = dispatch.traced()
    return traced is not None and traced.map_ops.supports(x, parameters)


def merged(mean: Tensor, variance: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Moments over maps of equal size along an axis: σ² = mean(σ²_map + (μ_map − μ)²).

    Args:
        mean: μ of each map.
        variance: σ² of each map.
        dim: The axis, kept with length 1.

    Returns:
        Mean and variance.
    """
    middle = mean.mean(dim, keepdim=True)
    return middle, (variance + (mean - middle).square()).mean(dim, keepdim=True)


def _placed(x: Tensor, layout: Layout) -> tuple[Tensor, bool]:
    """x in an order that the kernels walk, copied only if in none, and if by columns."""
    last = layout.channel_dim == -1
    rows, columns = call._walks(layout.shape, x.stride(), last)
    if rows is None and columns is None:
        return x.contiguous(), last or layout.lengths[2] == 1
    return x, rows is None


def _walk(t: Tensor | None, layout: Layout, columns: bool) -> call.Walk:
    """The walk of a tensor, which has one."""
    found = t if t is None else call._walks(layout.shape, t.stride(), layout.channel_dim == -1)
    return found[columns] or (0, 0, 0) if found else (0, 0, 0)


def _along(dy: Tensor, x: Tensor, layout: Layout, columns: bool) -> Tensor:
    """dy in an order that is walked as x is, copied if it is not."""
    walks = call._walks(layout.shape, dy.stride(), layout.channel_dim == -1)
    if walks[columns] is None or dy.is_neg() or dy._is_zerotensor():
        return call._like(x, layout, columns).copy_(dy)
    return dy


def _call(job: Job, x: Tensor, columns: bool, out: Tensor | None, dy: Tensor | None) -> _Call:
    """What is over all maps."""
    walks = (_walk(t, job.layout, columns) for t in (x, dy, out))
    number = _CURVES[job.curve][0]
    record = _Call(*job.layout.lengths, *chain.from_iterable(walks), columns, number)
    _address(record, x=x, dy=dy, out=out)
    return record


def _address(record: ctypes.Structure, **tensors: Tensor | None) -> None:
    """Write where tensors lie."""
    for name, tensor in tensors.items():
        setattr(record, name, None if tensor is None else tensor.data_ptr())


def _run(
    which: int, job: Job, x: Tensor, columns: bool, mean: Tensor, coefficients: Sequence[Tensor],
    out: Tensor | None = None, dy: Tensor | None = None, **rest: Tensor,
) -> None:  # fmt: skip
    """One pass over x."""
    record = _call(job, x, columns, out, dy)
    names = _CURVES[job.curve][1]
    _address(record, mean=mean, **dict(zip(names, coefficients, strict=True)), **rest)
    compiled = library.ready()
    if compiled.normlab_maps(ctypes.byref(record), which, function.DTYPES[x.dtype]):
        raise MemoryError("the kernel could not allocate its working memory")


def _full(numbers: Sequence[Tensor], layout: Layout, dtype: torch.dtype) -> list[Tensor]:
    """Numbers as the kernels read them: one each a map."""
    shape = layout.lengths[:2]
    return [t.detach().to(dtype).expand(shape).contiguous() for t in numbers]


def _read(x: Tensor, moment: Tensor) -> Tensor:
    """A moment of maps as the kernels read it, which a hook may have handed back otherwise."""
    found = function.flat(moment, function.WIDE[x.dtype])
    assert found is not None
    return found


class _Fused(torch.autograd.Function):
    """(x, job, *parameters) → (y, mean, variance)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, job: Job, *parameters: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = call.moments(x, job.layout, reference.Spec(job.layout.member_dims, _MOMENTS, None))
        assert given.mean is not None
        assert given.moment is not None
        mean, variance = (t.view(len(x), -1) for t in (given.mean, given.moment))
        columns = _placed(x, job.layout)[1]
        y = call._like(x, job.layout, columns)
        if job.known is not None:
            record = _call(job, x, columns, y, None)
            _through(job, job.known, record, x.dtype, mean, variance, parameters, ())
        else:
            coefficients = job.middle(mean, variance, *_leaves(parameters, mean.dtype))
            coefficients = _full(coefficients, job.layout, mean.dtype)
            _run(_APPLY, job, x, columns, mean, coefficients, y)
        ctx.job = job
        ctx.save_for_backward(x, mean, variance, *parameters)
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        x, mean, variance, *parameters = ctx.saved_tensors
        needs, job = ctx.needs_input_grad, ctx.job
        if torch.is_grad_enabled() or not function.direct(dy):
            formula = partial(_by_operations, job)
            asked = (needs[0], *needs[2:])
            dx, *slopes = function.derivatives(formula, (x, *parameters), asked, dy)
            return dx, None, *slopes
        # Hooks on saved tensors may have changed their order, or the dtype of moments.
        x, columns = _placed(x, job.layout)
        mean, variance = _read(x, mean), _read(x, variance)
        dy = _along(dy, x, job.layout, columns)
        dx = call._like(x, job.layout, columns) if needs[0] else None
        if job.known is not None:
            record = _call(job, x, columns, dx, dy)
            moments = mean, variance
            slopes = _through(job, job.known, record, x.dtype, *moments, parameters, needs[2:])
            return dx, None, *slopes
        wanted = (needs[0], needs[0], *needs[2:])
        with torch.enable_grad():
            leaves = _leaves((mean, variance, *parameters), mean.dtype, wanted)
            coefficients = [t.expand(job.layout.lengths[:2]) for t in job.middle(*leaves)]
        values = _full(coefficients, job.layout, mean.dtype)
        sums = mean.new_empty(len(values), *job.layout.lengths[:2])
        _run(_SUMS, job, x, columns, mean, values, None, dy, sums=sums)
        dmean, dvariance, *slopes = _pulled(coefficients, sums, leaves)
        if dx is not None:
            dmean, dvariance = (mean.new_zeros(()) if g is None else g for g in (dmean, dvariance))
            if job.curve == "line":  # which is about the map's own mean
                dmean = dmean - values[0] * sums[1]
            size = job.layout.members
            k, h = _full((dvariance * (2 / size), dmean / size), job.layout, mean.dtype)
            _run(_GRADIENT, job, x, columns, mean, values, dx, dy, k=k, h=h)
        found = [None if g is None or p is None or not need else g.to(p.dtype)
                 for g, p, need in zip(slopes, parameters, needs[2:], strict=True)]  # fmt: skip
        return dx, None, *found


def _through(
    job: Job, known: Known, record: _Call, dtype: torch.dtype, mean: Tensor, variance: Tensor,
    parameters: Sequence[Tensor | None], needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """A direction by kernels that know the middle; backward, gradients of what needs one."""
    wide, names = mean.dtype, _PARAMETERS[job.curve]
    narrow = wide is torch.float32 and all(
        [p is None or p.dtype is torch.bfloat16 for p in parameters]  # noqa: C419 (faster)
    )
    read = [function.flat(p, torch.bfloat16 if narrow else wide) for p in parameters]
    slopes = [
        torch.empty_like(p) if p is not None and need else None
        for p, need in zip(read, needs or [False] * len(read), strict=True)
    ]
    order = sum(part << 2 * k for k, part in enumerate(known.order))
    middle = _Middle(order, narrow, known.eps, known.correction)
    stored = [function.flat(t, wide) for t in known.stored or (None, None)]
    _address(middle, mean=mean, variance=variance, **dict(zip(names, read, strict=True)))
    _address(middle, stored_mean=stored[0], stored_variance=stored[1])
    _address(middle, **{f"d{name}": t for name, t in zip(names, slopes, strict=True)})
    if job.channels is not None:
        _address(middle, batch_mean=job.channels[0], batch_variance=job.channels[1])
    given = ctypes.byref(middle), ctypes.byref(record), bool(needs), function.DTYPES[dtype]
    if library.ready().normlab_middle(*given):
        raise MemoryError("the kernel could not allocate its working memory")
    return [
        total if p is None or total is None or total.dtype is p.dtype else total.to(p.dtype)
        for p, total in zip(parameters, slopes, strict=True)
    ]


def _leaves(
    tensors: Sequence[Tensor | None], dtype: torch.dtype, wanted: Sequence[bool] | None = None
) -> list[Tensor | None]:
    """The tensors in one dtype and without history; those `wanted` ask for a gradient."""
    asks = wanted or [False] * len(tensors)
    return [
        None if t is None else t.detach().to(dtype).requires_grad_(ask)
        for t, ask in zip(tensors, asks, strict=True)
    ]


def _pulled(
    coefficients: Sequence[Tensor], sums: Tensor, leaves: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of the leaves, or None, from those of the coefficients on each map."""
    live = [(c, s) for c, s in zip(coefficients, sums, strict=True) if c.requires_grad]
    asked = [t for t in leaves if t is not None and t.requires_grad]
    if not live or not asked:
        return [None] * len(leaves)
    outputs, gradients = zip(*live, strict=True)
    found = iter(torch.autograd.grad(outputs, asked, gradients, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in leaves]


def _by_operations(job: Job, x: Tensor | None, *parameters: Tensor | None) -> Tensor:
    """The same function in torch operations."""
    assert x is not None
    layout = job.layout
    given = reference.moments(layout.split(x), layout.member_dims, _MOMENTS)
    assert given.mean is not None
    assert given.moment is not None
    mean, variance = (t.reshape(len(x), -1) for t in (given.mean, given.moment))
    widened = [None if p is None else p.to(mean.dtype) for p in parameters]
    return curve(job.curve, layout, x, mean, job.middle(mean, variance, *widened)).to(x.dtype)


def curve(
    which: Curve, layout: Layout, x: Tensor, mean: Tensor | None, coefficients: Sequence[Tensor]
) -> Tensor:
    """f(x) in torch operations.

    Args:
        which: f; see `Job`.
        layout: Bound to the shape of x.
        x: The input.
        mean: μ of each map, which only a ``"line"`` is about.
        coefficients: Those of f, (N, C) or broadcast to it.

    Returns:
        y, in the dtype of statistics.
    """
    n, c, _ = layout.lengths
    ones = [1] * (x.ndim - 2)
    shape = (n, c, *ones) if layout.channel_dim == 1 else (n, *ones, c)
    a, b, *more = (t.expand(n, c).reshape(shape) for t in coefficients)
    z = reference.accumulated(x)
    if which == "line":
        assert mean is not None
        z = z - mean.reshape(shape)
    else:
        v, d, s = more
        z = z / torch.maximum(d, v * z + s)
    return torch.addcmul(b, z, a)


class Fused(NamedTuple):
    """What a pass gives.

    Attributes:
        y: In the dtype and memory order of x.
        mean: μ of each map, (N, C), without gradient.
        variance: σ² likewise.
        channels: Mean and variance of channels over the batch, (1, C), if kernels gave them.
    """

    y: Tensor
    mean: Tensor
    variance: Tensor
    channels: tuple[Tensor, Tensor] | None = None


def fused(
    curve: Curve, x: Tensor, layout: Layout, middle: Middle, *parameters: Tensor | None,
    known: Known | None = None,
) -> Fused:  # fmt: skip
    """y = f(x; middle(μ, σ², *parameters)), and the moments.

    Args:
        curve: f; see `Job`.
        x: As `supports` allows it.
        layout: See `Job`.
        middle: Differentiable, without random numbers or side effects: it runs again in the
            backward pass. Gets the parameters in the dtype of the moments, float32 or float64.
        *parameters: What it needs beside the moments, and is differentiated for.
        known: What kernels need to compute the middle themselves, which they do not in a traced
            graph, nor where something is not of the shape that they read.

    Returns:
        y and the moments.
    """
    job = Job(curve, layout, middle)
    traced = dispatch.traced()
    if traced is not None:
        return Fused(*traced.map_ops.fused(x, job, parameters))
    if known is not None and _fits(known, job, parameters):
        channels, size, dtype = None, layout.lengths[1], function.WIDE[x.dtype]
        if known.measures:
            channels = x.new_empty(1, size, dtype=dtype), x.new_empty(1, size, dtype=dtype)
        job = Job(curve, layout, middle, known, channels)
    # Copied out here, where autograd sees it: what is saved must have x as its history.
    x, _ = _placed(x, layout)
    y, mean, variance = _Fused.apply(x, job, *parameters)  # type: ignore[no-untyped-call]
    return Fused(y, mean, variance, job.channels)


def _fits(known: Known, job: Job, parameters: Sequence[Tensor | None]) -> bool:
    """Whether parameters and stored statistics are of the shapes that kernels read."""
    channels = job.layout.lengths[1]
    sizes = [len(known.order)] * 2 if job.curve == "line" else [channels]
    pairs = zip(parameters, [*sizes, channels, channels], strict=True)
    stored = [t for t in known.stored or () if t is not None]
    return all(p is None or p.shape == (n,) for p, n in pairs) and all(
        function.plain(t) and t.numel() == channels for t in stored
    )
