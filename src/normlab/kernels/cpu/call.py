"""The compiled kernels as functions of tensors, with gradients of any order.

First derivatives come from the kernels. Where a backward pass is differentiated itself, in forward
mode, and under `torch.func`, the closed form in torch operations takes over.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normlab.core.operation import Operation
from normlab.core.partition import Layout
from normlab.kernels import closed_form, reference
from normlab.kernels.cpu.library import Call, load
from normlab.kernels.reference import Moments, Spec

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
_ACTIVATIONS = {None: 0, "relu": 1, "silu": 2, "tlu": 3}


_Parameters = tuple[Tensor | None, ...]


class Job(NamedTuple):
    """What a call needs beside its tensors.

    Attributes:
        layout: Π bound to the shape of x.
        spec: Axes, operation and activation of the split view.
        eps: ε where it is a number, else 0 and a tensor goes with the call.
        from_batch: Whether statistics are those of x itself.
    """

    layout: Layout
    spec: Spec
    eps: float
    from_batch: bool


def _plain(x: Tensor) -> bool:
    """Whether x is memory of this process and nothing else: no subclass, no lazy negation."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.is_cpu and not x.is_neg()


def _observed() -> bool:
    """Whether operations of torch are transformed or recorded: kernels would go unseen."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
    )


def supports(
    x: Tensor,
    layout: Layout,
    operation: Operation,
    activation: str | None,
    parameters: _Parameters = (),
    buffers: Iterable[Tensor | None] = (),
) -> bool:
    """Whether the kernels compute this case: plain dense CPU tensors, second moments, no transform.

    Args:
        x: The input.
        layout: Π bound to its shape.
        operation: Φ.
        activation: The fused activation.
        parameters: γ, β and τ.
        buffers: Stored statistics.

    Returns:
        Whether `normalize` may be called.
    """
    channels = (layout.lengths[1],)
    return (
        _plain(x)
        and x.dtype in _DTYPES
        and operation.p in (None, 2)
        and operation.factor == 1
        and activation in _ACTIVATIONS
        and layout.blocks is not None
        and x.numel() > 0
        and load()[0] is not None
        # The kernels read C numbers, whatever the length: the other backends report the fault.
        and all(p is None or (_plain(p) and p.shape == channels) for p in parameters)
        and all(b is None or _plain(b) for b in buffers)
        and not _observed()
    )


Walk = tuple[int, int, int]
"""Elements from one sample, channel and position to the next."""


@lru_cache(maxsize=1024)
def _walks(
    shape: tuple[int, ...], strides: tuple[int, ...], last: bool
) -> tuple[Walk | None, Walk | None]:
    """How memory is walked in rows of positions and in rows of channels; None where it is not.

    Args:
        shape: Of the tensor.
        strides: Of the tensor: any, zero of expanded and equal ones of overlapping views too.
        last: Whether channels are the last axis.

    Returns:
        The walks by rows and by columns.
    """
    axes = list(zip(shape, strides, strict=True))
    n, (channels, c) = axes[0][1], axes.pop(-1 if last else 1)
    positions = [axis for axis in axes[1:] if axis[0] != 1]
    if any(out != size * step for (_, out), (size, step) in pairwise(positions)):
        return None, None
    if not positions:  # samples are rows of channels, at one stride
        return None, (n, 1, n) if c == 1 or channels == 1 else None
    p = positions[-1][1]
    return (n, c, 1) if p == 1 else None, (n, 1, p) if c == 1 or channels == 1 else None


def _place(x: Tensor, layout: Layout) -> tuple[Tensor, bool]:
    """x in an order that the kernels walk, copied only if in none, and if by columns."""
    last = layout.channel_dim == -1
    rows, columns = _walks(layout.shape, x.stride(), last)
    if rows is None and columns is None:
        return x.contiguous(), last or layout.lengths[2] == 1
    # Where both do (one channel), the rows are longer.
    return x, rows is None


def _like(x: Tensor, layout: Layout, columns: bool) -> Tensor:
    """Dense room for a result, in the order of x."""
    y = torch.empty_like(x)
    # Expanded axes have no order.
    if _walks(layout.shape, y.stride(), layout.channel_dim == -1)[columns] is not None:
        return y
    if columns and layout.channel_dim == 1:
        return x.new_empty(x.movedim(1, -1).shape).movedim(-1, 1)
    if not columns and layout.channel_dim == -1:
        return x.new_empty(x.movedim(-1, 1).shape).movedim(1, -1)
    return x.new_empty(x.shape)


def _call(
    job: Job, x: Tensor, columns: bool, mean: Tensor, moment: Tensor, parameters: _Parameters,
    out: Tensor | None, dy: Tensor | None = None,
) -> Call:  # fmt: skip
    """The record; `out` is y, or the gradient of x."""
    layout, op = job.layout, job.spec.operation

    def walk(t: Tensor | None) -> Walk:
        found = t if t is None else _walks(layout.shape, t.stride(), layout.channel_dim == -1)
        return found[columns] or (0, 0, 0) if found else (0, 0, 0)

    call = Call(
        *layout.lengths, *(layout.blocks or (1, 1)), *walk(x), *walk(dy), *walk(out),
        columns, _ACTIVATIONS[job.spec.activation], op.shift, op.about == "mean", op.p is not None,
        0, job.from_batch, job.eps,
    )  # fmt: skip
    call.x, call.mean, call.moment = x.data_ptr(), mean.data_ptr(), moment.data_ptr()
    call.gamma, call.beta, call.tau = (None if t is None else t.data_ptr() for t in parameters)
    call.dy = None if dy is None else dy.data_ptr()
    return call


def _run(name: str, call: Call, dtype: torch.dtype) -> None:
    library = load()[0]
    assert library is not None
    if getattr(library, name)(ctypes.byref(call), _DTYPES[dtype]):
        raise MemoryError("the kernel could not allocate its working memory")


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of statistics, and of parameters inside the kernels."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _widened(tensors: tuple[Tensor | None, ...], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.detach().to(dtype).contiguous() for t in tensors)


class _Normalize(torch.autograd.Function):
    """(x, γ, β, τ, ε, mean, moment, job) → (y, mean, moment); statistics given or measured."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        threshold: Tensor | None,
        eps: Tensor | None,
        mean: Tensor | None,
        moment: Tensor | None,
        job: Job,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, columns = _place(x, job.layout)
        y = _like(x, job.layout, columns)
        measure = mean is None and moment is None
        mean, moment = _statistics(job, x, mean, moment)
        parameters = _widened((weight, bias, threshold), _wide(x))
        call = _call(job, x, columns, mean, moment, parameters, y)
        call.measure, call.y = measure, y.data_ptr()
        _run("normlab_forward", call, x.dtype)
        ctx.job = job
        ctx.save_for_backward(x, weight, bias, threshold, eps, mean, moment)
        ctx.mark_non_differentiable(mean, moment)
        ctx.set_materialize_grads(False)
        return y, mean, moment

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        if dy is None:
            return (None,) * 8
        x, weight, bias, threshold, eps, mean, moment = ctx.saved_tensors
        job, needs = ctx.job, ctx.needs_input_grad
        # Gradients batched by `is_grads_batched` are tensors without memory.
        direct = type(dy) is Tensor and torch._C._has_storage(dy) and not _observed()
        if torch.is_grad_enabled() or not direct:
            return _differentiable(job, needs, dy, x, weight, bias, threshold, eps, mean, moment)
        x, columns = _place(x, job.layout)  # hooks on saved tensors may have changed its order
        walks = _walks(job.layout.shape, dy.stride(), job.layout.channel_dim == -1)
        if walks[columns] is None or dy.is_neg() or dy._is_zerotensor():
            dy = _like(x, job.layout, columns).copy_(dy)
        parameters = _widened((weight, bias, threshold), _wide(x))
        dx = _like(x, job.layout, columns) if needs[0] else None
        call = _call(job, x, columns, mean, moment, parameters, dx, dy)
        sums = x.new_empty(3, job.layout.lengths[1], dtype=torch.float64)
        areas = x.new_empty(mean.numel(), dtype=torch.float64) if eps is not None else None
        call.dx = None if dx is None else dx.data_ptr()
        call.dgamma, call.dbeta, call.dtau = (row.data_ptr() for row in sums)
        call.deps = None if areas is None else areas.data_ptr()
        _run("normlab_backward", call, x.dtype)
        given = zip((weight, bias, threshold), sums, needs[1:4], strict=True)
        slopes = [row.to(t.dtype) if t is not None and need else None for t, row, need in given]
        deps = None if areas is None or eps is None else areas.sum().to(eps.dtype).view(eps.shape)
        return dx, *slopes, deps, None, None, None


def _statistics(
    job: Job, x: Tensor, mean: Tensor | None, moment: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Statistics as flat vectors, one number an area; empty room where they are to be measured."""
    n, c, _ = job.layout.lengths
    bn, bc = job.layout.blocks or (1, 1)
    areas, dtype = (n // bn) * (c // bc), _wide(x)

    def flat(given: Tensor | None, value: float) -> Tensor:
        if given is None:
            return x.new_full((areas,), value, dtype=dtype)
        shape = [s if i not in job.spec.dims else 1 for i, s in enumerate(job.layout.split_shape)]
        return given.detach().to(dtype).expand(shape).reshape(areas)

    return flat(mean, 0.0), flat(moment, 1.0)


def _differentiable(
    job: Job,
    needs: tuple[bool, ...],
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor | None,
    eps: Tensor | None,
    mean: Tensor,
    moment: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradient by torch operations, which autograd and transforms can differentiate."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that the derivative stops here: γ may itself have been computed from x.
        given = (x, weight, bias, threshold, eps)
        inputs = tuple(None if t is None else t.view_as(t) for t in given)
        y = _by_operations(job, inputs, mean, moment)
        wanted = [t for t, need in zip(inputs, needs, strict=False) if need and t is not None]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=again, allow_unused=True))
    slopes = [next(found) if need and t is not None else None
              for t, need in zip(inputs, needs, strict=False)]  # fmt: skip
    return (*slopes, None, None, None)


def _by_operations(
    job: Job,
    inputs: _Parameters,
    mean: Tensor,
    moment: Tensor,
) -> Tensor:
    """The same function in torch operations."""
    x, weight, bias, threshold, eps = inputs
    assert x is not None
    layout, spec = job.layout, job.spec
    # Stored statistics stand here once for each area, where `closed_form` takes them once in all.
    backend = closed_form if job.from_batch else reference
    affine = [None if p is None else layout.per_channel(p) for p in (weight, bias, threshold)]
    y = backend.normalize(
        layout.split(x), _shaped(mean, moment, layout, spec), *affine,
        job.eps if eps is None else eps, None, spec, from_batch=job.from_batch,
    )  # fmt: skip
    return layout.join(y)


def moments(x: Tensor, layout: Layout, spec: Spec) -> Moments:
    """Statistics of each area, as `reference.moments` gives them.

    Args:
        x: The input.
        layout: Π bound to its shape.
        spec: Axes of the members, and the operation.

    Returns:
        The moments, without gradient.
    """
    job = Job(layout, spec, 0.0, True)
    placed, columns = _place(x.detach(), layout)
    mean, moment = _statistics(job, placed, None, None)
    call = _call(job, placed, columns, mean, moment, (None, None, None), None)
    call.measure = 1
    _run("normlab_forward", call, x.dtype)
    return _shaped(mean, moment, layout, spec)


def _shaped(mean: Tensor, moment: Tensor, layout: Layout, spec: Spec) -> Moments:
    """Flat statistics with the reduced axes kept, as the other backends have them."""
    shape = [s if i not in spec.dims else 1 for i, s in enumerate(layout.split_shape)]
    op = spec.operation
    return Moments(
        mean.view(shape) if op.uses_mean else None,
        moment.view(shape) if op.p is not None else None,
        layout.members,
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
) -> tuple[Tensor, Moments]:
    """y = a((x − s·μ)/D · γ + β) of the whole tensor, and the statistics.

    Args:
        x: The input, as `supports` allows it.
        layout: Π bound to its shape.
        spec: Axes of the members, operation and activation.
        weight: γ of shape (C,), or None.
        bias: β, likewise.
        threshold: τ, for the TLU.
        eps: ε, a tensor where it is learned.
        given: Statistics to use; None to measure those of x.
        from_batch: Whether `given`, if any, was measured on x, so that gradients flow through it.

    Returns:
        y, in the dtype and memory order of x, and the statistics used.
    """
    learned = eps if isinstance(eps, Tensor) else None
    fixed = eps.item() if isinstance(eps, Tensor) else eps
    job = Job(layout, spec, fixed, from_batch)
    # Copied out here, where autograd sees it: what is saved must have x as its history.
    x, _ = _place(x, layout)
    mean, moment = (None, None) if given is None else (given.mean, given.moment)
    y, mean, moment = _Normalize.apply(x, weight, bias, threshold, learned, mean, moment, job)  # type: ignore[no-untyped-call]
    return y, _shaped(mean, moment, layout, spec)
