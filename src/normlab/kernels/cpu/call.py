"""Kernels of deviations, over blocks of samples and channels, or over channels at positions.

Areas are blocks of samples and channels with all their positions, or, for second moments, runs of
channels at single positions.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from normlab.core.operation import Operation
from normlab.core.partition import Layout
from normlab.kernels.cpu import function, lines
from normlab.kernels.cpu.function import (
    ACTIVATIONS,
    DTYPES,
    WIDE,
    Correction,
    Gradients,
    Job,
    Parameters,
    flat,
    job_of,
)
from normlab.kernels.cpu.library import (
    OF_CORRECTIONS,
    OF_GRADIENTS,
    OF_ONE_CALL,
    Call,
    load,
    ready,
)
from normlab.kernels.reference import Moments, Spec

ADDS = True
"""A residual is added in the same pass."""
_FAMILY = sys.modules[__name__]
_NO_CORRECTIONS = OF_CORRECTIONS(*[0] * 6)
_NO_GRADIENTS = OF_GRADIENTS(*[0] * 7)
# What only areas that are blocks have, and second moments; see `Spec`.
_GATED: dict[str | None, int] = {"gated": 8}
_NUMBERS = {**ACTIVATIONS, **_GATED}


def _second(operation: Operation) -> bool:
    """Whether the moments are second ones, or there are none; powers.cpp has the others."""
    return operation.p in (None, 2) and operation.factor == 1


def _runs(layout: Layout, operation: Operation) -> bool:
    """Whether areas are runs of channels at single positions, which second moments may have."""
    return _second(operation) and lines.channels_of_area(layout) is not None


def covers(layout: Layout, operation: Operation, activation: str | None) -> bool:
    """Whether the kernels have this case, whatever its tensors are.

    Args:
        layout: Π bound to a shape.
        operation: Φ.
        activation: The fused activation.

    Returns:
        Whether areas are blocks, or runs of channels and the moments second ones.
    """
    if activation in _GATED:
        return _second(operation) and layout.blocks is not None and 0 not in layout.shape
    return (
        activation in ACTIVATIONS
        and operation.p != math.inf
        and (layout.blocks is not None or _runs(layout, operation))
        and 0 not in layout.shape
    )


def supports(
    x: Tensor,
    layout: Layout,
    operation: Operation,
    activation: str | None,
    parameters: Parameters = (),
    buffers: Iterable[Tensor | None] = (),
) -> bool:
    """Whether the kernels compute this case: plain dense CPU tensors, areas as above, no transform.

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
    return (
        function.covered(covers, layout, operation, activation)
        and load()[0] is not None
        and function.readable(x, layout.lengths[1], parameters, buffers)
    )


def corrects(x: Tensor, layout: Layout, operation: Operation, towards: Sequence[Tensor]) -> bool:
    """Whether a case that `supports` allows takes a `Correction`.

    Args:
        x: The input.
        layout: Π bound to its shape.
        operation: Φ.
        towards: The mean and deviation that statistics are corrected towards, plain tensors.

    Returns:
        Whether areas are channels, with a mean and a second moment, of the dtype of statistics.
    """
    n, c, _ = layout.lengths
    return (
        layout.blocks == (n, 1)
        and _second(operation)
        and operation.shift
        and operation.p is not None
        and all(t.dtype is WIDE[x.dtype] and t.shape == (c,) and t.is_contiguous() for t in towards)
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


class _Record(NamedTuple):
    """What calls have in common on tensors of one shape, dtype and order of memory.

    Attributes:
        columns: Whether x is walked by rows of channels; None where it is not walked.
        dense: Whether `torch.empty_like` gives a result the order of x.
        forward: The function of the library.
        backward: Likewise.
        head: The `Call` that they have in common, as bytes; x, y and dy all at the walk of x.
        dtype: Of statistics and parameters.
        mean: A number in the shape of the means, of which `torch.empty_like` makes room sooner than
            of a shape and a dtype; None where the operation has none.
        moment: Likewise.
        element: The dtype of x as the library numbers it.
    """

    columns: bool | None
    dense: bool
    forward: Callable[[bytes, int], int]
    backward: Callable[[bytes, int], int]
    head: bytes
    dtype: torch.dtype
    mean: Tensor | None
    moment: Tensor | None
    element: int


def _record(job: Job, x: Tensor) -> _Record:
    key = (x.dtype, x.stride())
    record: _Record | None = job.records.get(key)
    return record or function.remember(job.records, key, _recorded(job, x))


def _recorded(job: Job, x: Tensor) -> _Record:
    layout, op = job.layout, job.spec.operation
    rows, columns = _walks(layout.shape, x.stride(), layout.channel_dim == -1)
    # Where both do (one channel), the rows are longer.
    walk = rows or columns or (0, 0, 0)
    n, c, p = layout.lengths
    area, statistics, entry = layout.blocks or (1, 1), (0, 0, 0), "normlab"
    run = None if job.spec.activation in _GATED else lines.channels_of_area(layout)
    if not _second(op):
        entry = "normlab_powers"
    elif run is not None:
        area, statistics, entry = (1, run), lines.statistics_walk(layout, run), "normlab_lines"
        if p == 1:  # samples are positions of one
            n, p, statistics = 1, n, (0, 1, statistics[0])
    call = Call(
        n, c, p, *area, *walk, *walk, *walk, *statistics, rows is None,
        _NUMBERS[job.spec.activation], op.shift, op.about == "mean", op.p is not None,
        job.from_batch, op.power, op.factor,
    )  # fmt: skip
    dtype, library = WIDE[x.dtype], ready()
    room = x.new_empty((), dtype=dtype).expand(job.shape)
    return _Record(
        columns=None if rows is columns is None else rows is None,
        dense=torch.empty_like(x).stride() == x.stride(),
        forward=getattr(library, f"{entry}_forward"),
        backward=getattr(library, f"{entry}_backward"),
        head=bytes(call),
        dtype=dtype,
        mean=room if op.uses_mean else None,
        moment=room if op.p is not None else None,
        element=DTYPES[x.dtype],
    )


def place(job: Job, x: Tensor) -> Tensor:
    """x in an order that the kernels walk, copied only if in none.

    Args:
        job: The case.
        x: The input.

    Returns:
        x, or a copy.
    """
    return x.contiguous() if _record(job, x).columns is None else x


def _room(record: _Record) -> tuple[Tensor | None, Tensor | None]:
    """Room to measure the statistics that the operation has."""
    mean, moment = record.mean, record.moment
    return (
        None if mean is None else torch.empty_like(mean),
        None if moment is None else torch.empty_like(moment),
    )


def _walk(job: Job, record: _Record, t: Tensor) -> Walk | None:
    """That of a tensor beside x, in the order that x is walked in."""
    layout = job.layout
    return _walks(layout.shape, t.stride(), layout.channel_dim == -1)[bool(record.columns)]


def _head(record: _Record, dy: Walk | None, y: Walk | None) -> bytes:
    """The head of a call with walks of dy, and of y and dx, that may differ from that of x."""
    call = Call.from_buffer_copy(record.head)
    call.gn, call.gc, call.gp = dy or (0, 0, 0)
    call.yn, call.yc, call.yp = y or (0, 0, 0)
    return bytes(call)


def _along(job: Job, record: _Record, y: Tensor, residual: Tensor) -> Tensor:
    """r in the order of memory that y or dx has; copied if in another."""
    same = residual.stride() == y.stride() or _walk(job, record, residual) == _walk(job, record, y)
    return residual if same and not residual.is_neg() else torch.empty_like(y).copy_(residual)


def _run(function: Callable[[bytes, int], int], record: _Record, *parts: bytes) -> None:
    """One call of the library, whose arguments are the parts one after the other."""
    torch.get_num_threads()  # see `library.ready`
    if function(b"".join(parts), record.element):
        raise MemoryError("the kernel could not allocate its working memory")


def _numbers(dtype: torch.dtype, parameters: Parameters) -> tuple[Parameters, int]:
    """γ, β and τ as kernels read them, the same tuple where they are, and flags of bfloat16."""
    for p in parameters:
        if p is not None and (p.dtype is not dtype or not p.is_contiguous()):
            break
    else:
        return parameters, 0
    found: list[Tensor | None] = []
    flags, flag = 0, 2
    for p in parameters:
        narrow = p is not None and p.dtype is torch.bfloat16 and dtype is torch.float32
        found.append(flat(p, torch.bfloat16 if narrow else dtype))
        flags |= flag * narrow
        flag *= 2
    return tuple(found), flags


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def forward(
    job: Job, x: Tensor, weight: Tensor | None, bias: Tensor | None, threshold: Tensor | None,
    eps: float, mean: Tensor | None, moment: Tensor | None, residual: Tensor | None = None,
    correction: Correction | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The forward pass of the kernels.

    Args:
        job: The case.
        x: The input, as `place` returned it.
        weight: γ.
        bias: β.
        threshold: τ.
        eps: ε.
        mean: Statistics to use; where there are none at all, those of x are measured.
        moment: Likewise.
        residual: r, in any order of memory.
        correction: Of γ and β, in a case that `corrects` allows; its r and d are written.

    Returns:
        y, and the statistics used, in the shape of the job.
    """
    record = _record(job, x)
    head, measure = record.head, mean is None and moment is None
    if measure:
        mean, moment = _room(record)
    else:
        mean, moment = function.statistics(job, x, mean, moment)
    parameters, flags = _numbers(record.dtype, (weight, bias, threshold))
    if record.dense:
        y = torch.empty_like(x)
    else:
        y = _like(x, job.layout, bool(record.columns))
        head = _head(record, None, _walk(job, record, y))
    if residual is not None:
        residual = _along(job, record, y, residual)
    given = _addresses(x, *parameters, mean, moment, residual, y)
    one, more = OF_ONE_CALL(eps, flags | measure, *given), _NO_CORRECTIONS
    if correction is not None:
        more = OF_CORRECTIONS(*_addresses(*correction[:4]), *correction[4:])
    _run(record.forward, record, head, one, _NO_GRADIENTS, more)
    return y, mean, moment


def backward(
    job: Job, needs: Sequence[bool], dy: Tensor, x: Tensor, weight: Tensor | None,
    bias: Tensor | None, threshold: Tensor | None, eps: float, mean: Tensor | None,
    moment: Tensor | None, residual: Tensor | None = None, corrected: Sequence[Tensor] = (),
) -> Gradients:  # fmt: skip
    """The backward pass of the kernels.

    Args:
        job: The case.
        needs: Which of the gradients to return.
        dy: The gradient of y, in any order of memory.
        x: The input.
        weight: γ.
        bias: β.
        threshold: τ.
        eps: ε.
        mean: As `forward` returned it.
        moment: Likewise.
        residual: r; None too where no activation follows: its gradient then is dy.
        corrected: r and d of the correction of `forward`, if there was one.

    Returns:
        Gradients of x, γ, β, τ, ε and r.
    """
    x = place(job, x)  # hooks on saved tensors may have changed its order
    record = _record(job, x)
    head, columns = record.head, bool(record.columns)
    plain = dy.stride() == x.stride() and not dy.is_neg() and not dy._is_zerotensor()
    if not plain and (dy.is_neg() or dy._is_zerotensor() or _walk(job, record, dy) is None):
        dy = _like(x, job.layout, columns).copy_(dy)
    dx = dr = None
    if needs[0] or residual is not None:
        dx = torch.empty_like(x) if record.dense else _like(x, job.layout, columns)
        if residual is not None:
            residual, dr = _along(job, record, dx, residual), torch.empty_like(dx)
    if not plain or not record.dense:
        head = _head(record, _walk(job, record, dy), None if dx is None else _walk(job, record, dx))
    own = (weight, bias, threshold)
    parameters, flags = _numbers(record.dtype, own)
    # Dense, and of the dtype that the kernels write.
    slopes = [
        torch.empty_like(p) if p is not None and need else None
        for p, need in zip(parameters, needs[1:4], strict=True)
    ]
    areas = x.new_empty(job.shape, dtype=torch.float64) if needs[4] else None
    given = _addresses(x, *parameters, mean, moment, residual, None)
    found = _addresses(dy, dx, dr, *slopes, areas)
    more = _NO_CORRECTIONS
    if corrected:
        more = OF_CORRECTIONS(0, 0, *_addresses(*corrected), 0, 0)
    _run(record.backward, record, head, OF_ONE_CALL(eps, flags, *given), OF_GRADIENTS(*found), more)
    if parameters is not own:
        slopes = [
            total if p is None or total is None else total.to(p.dtype)
            for p, total in zip(own, slopes, strict=True)
        ]
    dweight, dbias, dthreshold = slopes
    return dx, dweight, dbias, dthreshold, None if areas is None else areas.sum(), dr


def moments(x: Tensor, layout: Layout, spec: Spec) -> Moments:
    """Statistics of each area, as `reference.moments` gives them.

    Args:
        x: The input.
        layout: Π bound to its shape.
        spec: Axes of the members, and the operation.

    Returns:
        The moments, without gradient.
    """
    job = job_of(layout, spec, True, _FAMILY)
    x = place(job, x.detach())
    record = _record(job, x)
    mean, moment = _room(record)
    given = _addresses(x, None, None, None, mean, moment, None, None)
    one = OF_ONE_CALL(0.0, True, *given)
    _run(record.forward, record, record.head, one, _NO_GRADIENTS, _NO_CORRECTIONS)
    return Moments(mean, moment, layout.members)


normalize = partial(function.normalize, _FAMILY)
"""`function.normalize` by these kernels."""
