"""The Triton kernels as functions of tensors, with gradients of any order.

The same three functions as `normlab.kernels.cpu.call`, for tensors on a GPU. First derivatives come
from the kernels; all others from the closed form in torch operations.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normlab.core.operation import Operation
from normlab.core.partition import Layout
from normlab.kernels.cpu import function
from normlab.kernels.cpu.function import ACTIVATIONS, Gradients, Job, Parameters, job_of, observed
from normlab.kernels.reference import Moments, Spec
from normlab.kernels.triton import plan

READS_EPS = True  # from the device: as a number, a learned ε would cost a wait for it at each call
WIDE = 1 << 31  # elements from which addresses take 64 bits
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST = 1 << 31  # of what the kernels count in 32 bits
_FAMILY = sys.modules[__name__]


@lru_cache(maxsize=1)
def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, one program after the other, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=1)
def installed() -> bool:
    """Whether there is a Triton to import."""
    return find_spec("triton") is not None


@lru_cache(maxsize=1)
def _kernels() -> tuple[ModuleType, ModuleType]:
    """Import the kernels; Triton's own import takes a fourth of a second."""
    from normlab.kernels.triton import areas, lines

    return areas, lines


@lru_cache(maxsize=16)
def _capable(index: int) -> bool:
    """Whether Triton compiles for that device: NVIDIA from compute capability 8.0 on."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(index) >= (8, 0)


def reason() -> str:
    """Say whether there are kernels for GPUs, or what is missing."""
    if not installed():
        return "Triton is not installed; pip install 'normlab[triton]'"
    if interpreted():
        return "Triton interprets kernels on the CPU (TRITON_INTERPRET=1)"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if not any(_capable(i) for i in range(torch.cuda.device_count())):
        return "no NVIDIA device of compute capability 8.0 or later"
    return "Triton kernels"


def available() -> bool:
    """Whether the kernels run on some device of this machine."""
    if not installed():
        return False
    return interpreted() or (
        torch.cuda.is_available() and any(_capable(i) for i in range(torch.cuda.device_count()))
    )


def _plain(x: Tensor, device: torch.device) -> bool:
    left_over = torch._C._functorch.is_functorch_wrapped_tensor(x)
    simple = type(x) in (Tensor, torch.nn.Parameter) and not left_over
    return simple and x.device == device and not x.is_neg()


def supports(
    x: Tensor,
    layout: Layout,
    operation: Operation,
    activation: str | None,
    parameters: Parameters = (),
    buffers: Iterable[Tensor | None] = (),
) -> bool:
    """Whether the kernels compute this case: plain CUDA tensors, second moments, no transform.

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
    here = x.is_cuda and _capable(x.device.index) if not interpreted() else x.is_cpu
    if not here or x.dtype not in _DTYPES or observed():
        return False
    stored = [b for b in buffers if b is not None]
    return (
        function.covered(_covers, layout, operation, activation)
        and _plain(x, x.device)
        # Statistics of positions are never stored ones.
        and (layout.blocks is not None or not stored)
        and all(_plain(b, x.device) for b in stored)
        and all(
            p is None or (_plain(p, x.device) and p.shape == (layout.lengths[1],))
            for p in parameters
        )
    )


def _covers(layout: Layout, operation: Operation, activation: str | None) -> bool:
    """Whether the kernels have this case, whatever its tensors are."""
    n, c, p = layout.lengths
    return (
        operation.p in (None, 2)
        and operation.factor == 1
        and activation in ACTIVATIONS
        # One program holds all channels of a position.
        and (layout.blocks is not None or (plan.positions(layout) and c <= plan.BACKWARD))
        and 0 not in layout.shape
        and max(n * p, n * c) < _LARGEST
        and installed()
    )


def _place(x: Tensor, layout: Layout) -> tuple[Tensor, bool]:
    """x in an order that the kernels walk, copied only if in none, and if channels are last."""
    if layout.channel_dim == -1 or x.ndim == 2:  # without positions, a sample is a row of channels
        if not x.is_contiguous() and x.movedim(-1, 1).is_contiguous():
            return x, False
        return x.contiguous(), True
    if x.is_contiguous():
        return x, False
    if x.movedim(1, -1).is_contiguous():
        return x, True
    return x.contiguous(), False


class _Run(NamedTuple):
    """One case: x with its plan, the tensors and flags that all kernels take."""

    job: Job
    x: Tensor
    columns: bool
    parameters: Parameters
    mean: Tensor | None
    moment: Tensor | None
    eps: Tensor | float

    @property
    def flags(self) -> dict[str, Any]:
        """The operation, as compile-time constants."""
        op = self.job.spec.operation
        return {"SHIFT": op.shift, "SCALE": op.p is not None}

    @property
    def addresses(self) -> dict[str, Any]:
        """The type of addresses."""
        import triton.language as tl

        return {"INDEX": tl.int64 if self.x.numel() >= WIDE else tl.int32}

    @property
    def about(self) -> bool:
        return self.job.spec.operation.about == "mean"

    @property
    def act(self) -> int:
        return ACTIVATIONS[self.job.spec.activation]

    @property
    def tensors(self) -> tuple[Any, ...]:
        """What follows x and y: γ, β, τ, μ, M, and ε."""
        return (*self.parameters, self.mean, self.moment, *self.epsilon)

    @property
    def epsilon(self) -> tuple[Tensor | None, float]:
        """ε as a tensor or a number."""
        return (self.eps, 0.0) if isinstance(self.eps, Tensor) else (None, float(self.eps))

    @property
    def single(self) -> bool:
        """Whether an area is one number, scaled by its own size."""
        op = self.job.spec.operation
        one = self.job.layout.members == 1 and self.job.from_batch
        return one and op.p is not None and not op.shift and op.about == "zero"

    def on_device(self) -> Any:
        """Make the device of x the current one, where it is not."""
        if not self.x.is_cuda or self.x.device.index == torch.cuda.current_device():
            return nullcontext()
        return torch.cuda.device(self.x.device)


def _forward(run: _Run, y: Tensor | None, measure: bool) -> None:
    """Measure statistics into `run`, if so told, and write y, if any."""
    layout = run.job.layout
    areas, _ = _kernels()
    found = plan.areas(layout, run.columns, plan.FORWARD) if measure else None
    with run.on_device():
        if found is None:
            if measure:
                _measure_lines(run)
            if y is not None:
                _apply_lines(run, y)
            return
        ba, b1, b2 = found.tile(plan.FORWARD)
        areas.forward_areas[(found.outer * found.tiles(ba),)](
            run.x, y, *run.tensors, *found.arguments(ba),
            UNIT=found.unit, ALIGN=found.align, BA=ba, B1=b1, B2=b2, CA=found.ca, CM=found.cm,
            **run.addresses,
            ACT=run.act, ABOUT=run.about, **run.flags, num_warps=plan.warps(ba * b1 * b2),
        )  # fmt: skip


def _measure_lines(run: _Run) -> None:
    _, lines = _kernels()
    shape = plan.lines(run.job.layout, run.columns)
    bc, bp = shape.tile()
    units, pieces = shape.pieces()
    rows = shape.n // shape.bn * pieces
    count, mean, square = run.x.new_empty(3, rows, shape.c, dtype=torch.float32)
    op = run.job.spec.operation
    lines.line_moments[(rows * shape.channel_tiles(),)](
        run.x, count, mean, square, *shape.arguments(), units, pieces,
        **run.addresses, UNIT=shape.unit, ALIGN=shape.align, BC=bc, BP=bp, CENTRED=op.uses_mean,
        num_warps=plan.warps(bc * bp),
    )  # fmt: skip
    bc, bk = shape.combine()
    lines.combine_moments[(shape.areas,)](
        count, mean, square, run.mean, run.moment, shape.c, shape.bc, pieces,
        BC=bc, BK=bk, ABOUT=run.about, **run.flags, num_warps=plan.warps(bc * bk),
    )  # fmt: skip


def _apply_lines(run: _Run, y: Tensor) -> None:
    _, lines = _kernels()
    shape = plan.lines(run.job.layout, run.columns)
    bc, bp = shape.tile()
    lines.apply_lines[(shape.n * shape.chunks() * shape.channel_tiles(),)](
        run.x, y, *run.tensors, *shape.arguments(),
        **run.addresses, UNIT=shape.unit, ALIGN=shape.align, BC=bc, BP=bp, ACT=run.act, **run.flags,
        num_warps=plan.warps(bc * bp),
    )  # fmt: skip


def _backward(run: _Run, dy: Tensor, dx: Tensor | None, deps: Tensor | None) -> Tensor:
    """Write ∂L/∂x and, for each area, ∂L/∂ε; return sums for γ, β and τ, of shape (3, C)."""
    layout = run.job.layout
    found = plan.areas(layout, run.columns, plan.BACKWARD) if run.job.from_batch else None
    with run.on_device():
        part = _lines_backward(run, dy, dx, deps) if found is None else None
        if found is not None:
            part = _areas_backward(run, found, dy, dx, deps)
    assert part is not None
    sums: Tensor = part.view(3, -1, layout.lengths[1]).sum(1)
    return sums


def _areas_backward(
    run: _Run, found: plan.Areas, dy: Tensor, dx: Tensor | None, deps: Tensor | None
) -> Tensor:
    areas, _ = _kernels()
    ba, b1, b2 = found.tile(plan.BACKWARD)
    work = found.outer * found.tiles(ba)
    programs = min(work, plan.PROGRAMS) if found.shared else work
    numbers = found.outer * found.inner * (found.m1 if found.cm else 1)
    plane = programs * found.m1 if found.shared else numbers
    part = run.x.new_empty(3, plane, dtype=torch.float32)
    areas.backward_areas[(programs,)](
        run.x, dy, dx, *run.tensors, part, deps, *found.arguments(ba), work, plane,
        UNIT=found.unit, ALIGN=found.align, BA=ba, B1=b1, B2=b2, CA=found.ca, CM=found.cm,
        **run.addresses,
        ACT=run.act, ABOUT=run.about, **run.flags, SINGLE=run.single, PROGRAMS=found.shared,
        num_warps=plan.warps(2 * ba * b1 * b2),
    )  # fmt: skip
    return part


def _lines_backward(run: _Run, dy: Tensor, dx: Tensor | None, deps: Tensor | None) -> Tensor:
    _, lines = _kernels()
    shape = plan.lines(run.job.layout, run.columns)
    bc, bp = shape.tile()
    units, pieces = shape.pieces()
    rows, flags = shape.n // shape.bn * pieces, run.flags
    settings = {
        "UNIT": shape.unit, "ALIGN": shape.align, "BC": bc, "BP": bp, "ACT": run.act,
        "num_warps": plan.warps(2 * bc * bp), **run.addresses,
    }  # fmt: skip
    part = run.x.new_empty(3, rows * shape.c, dtype=torch.float32)
    lines.line_sums[(rows * shape.channel_tiles(),)](
        run.x, dy, *run.tensors, part, *shape.arguments(), units, pieces, rows * shape.c,
        **flags, **settings,
    )  # fmt: skip
    rates = shifts = None
    if run.job.from_batch or deps is not None:
        rates, shifts = run.x.new_empty(2, shape.areas, dtype=torch.float32)
        wide, deep = shape.combine()
        lines.combine_sums[(shape.areas,)](
            part, run.parameters[0], run.mean, run.moment, *run.epsilon, rates, shifts, deps,
            shape.c, shape.bc, pieces, rows * shape.c, float(run.job.layout.members),
            BC=wide, BK=deep, **flags, SINGLE=run.single, num_warps=plan.warps(wide * deep),
        )  # fmt: skip
    if dx is not None:
        if not run.job.from_batch:
            rates = shifts = None
        lines.gradient_lines[(shape.n * shape.chunks() * shape.channel_tiles(),)](
            run.x, dy, dx, *run.tensors, rates, shifts, *shape.arguments(),
            ABOUT=run.about, SINGLE=run.single, **flags, **settings,
        )  # fmt: skip
    return part


def place(job: Job, x: Tensor) -> Tensor:
    """x in an order that the kernels walk, copied only if in none.

    Args:
        job: The case.
        x: The input.

    Returns:
        x, or a copy.
    """
    return _place(x, job.layout)[0]


def forward(
    job: Job, x: Tensor, weight: Tensor | None, bias: Tensor | None, threshold: Tensor | None,
    eps: Tensor | float, mean: Tensor | None, moment: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The forward pass of the kernels; see `normlab.kernels.cpu.call`."""
    x, columns = _place(x, job.layout)
    y = torch.empty_like(x)
    measure = mean is None and moment is None
    mean, moment = function.statistics(job, x, mean, moment)
    parameters = _contiguous(weight, bias, threshold)
    _forward(_Run(job, x, columns, parameters, mean, moment, eps), y, measure)
    return y, mean, moment


def backward(
    job: Job, needs: Sequence[bool], dy: Tensor, x: Tensor, weight: Tensor | None,
    bias: Tensor | None, threshold: Tensor | None, eps: Tensor | float, mean: Tensor | None,
    moment: Tensor | None,
) -> Gradients:  # fmt: skip
    """The backward pass of the kernels; see `normlab.kernels.cpu.call`."""
    x, columns = _place(x, job.layout)  # hooks on saved tensors may have changed its order
    if dy.stride() != x.stride() or dy.is_neg() or dy._is_zerotensor():
        dy = torch.empty_like(x).copy_(dy)
    dx = torch.empty_like(x) if needs[0] else None
    areas = x.new_empty(job.shape, dtype=torch.float32) if needs[4] else None
    parameters = _contiguous(weight, bias, threshold)
    sums = _backward(_Run(job, x, columns, parameters, mean, moment, eps), dy, dx, areas)
    dweight, dbias, dthreshold = (
        total.to(p.dtype) if p is not None and need else None
        for p, total, need in zip((weight, bias, threshold), sums, needs[1:4], strict=True)
    )
    return dx, dweight, dbias, dthreshold, None if areas is None else areas.sum(), None


def _contiguous(*tensors: Tensor | None) -> Parameters:
    return tuple(None if t is None else t.detach().contiguous() for t in tensors)


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
    x, columns = _place(x.detach(), layout)
    mean, moment = function.statistics(job, x, None, None)
    _forward(_Run(job, x, columns, (None, None, None), mean, moment, 0.0), None, True)
    return Moments(mean, moment, layout.members)


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
    """`function.normalize` by these kernels."""
    return function.normalize(
        _FAMILY, x, layout, spec, weight, bias, threshold, eps, given, from_batch=from_batch
    )
