"""What kernels need to stand in traced graphs as operations of torch, whatever they compute.

Operations are functional, and say in words what to compute (pattern, operation, curve), so that a
saved graph means the same anywhere. Where there are no kernels, they compute by torch operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normlab.core.operation import Operation
from normlab.core.partition import Layout, partition
from normlab.kernels.cpu import function, library
from normlab.kernels.reference import Spec

# What follows the tensors where areas are those of a partition: Π with lengths of split axes, Φ,
# and an activation.
CASE = (
    "str pattern, str[] names, SymInt[] sizes, int channel_dim, bool shift, str about, float? p, "
    "float factor, float eps, str? activation"
)
LIBRARY = torch.library.Library("normlab", "FRAGMENT")  # type: ignore[no-untyped-call]
Case = tuple[Any, ...]


def define(schema: str, real: Callable[..., Any], fake: Callable[..., Any]) -> str:
    """Register an operation.

    Args:
        schema: Its name, arguments and results.
        real: What it computes on CPUs.
        fake: Shapes, dtypes and strides of that.

    Returns:
        Its qualified name.
    """
    name = schema[: schema.index("(")]
    # In any order of memory, so that the compiler may choose one and need not copy.
    LIBRARY.define(schema, tags=(torch.Tag.flexible_layout,))  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, real, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"normlab::{name}", cast(Any, fake), lib=LIBRARY)
    return f"normlab::{name}"


def case_of(layout: Layout, spec: Spec, eps: Tensor | float) -> Case:
    """The arguments that stand for Π, Φ and the activation."""
    p, op = layout.partition, spec.operation
    split = [name for axis in p.axes[:2] if len(axis) > 1 for name in axis]
    lengths = dict(zip(layout.names, layout.split_shape, strict=False))
    sizes = [lengths[name] for name in split]
    number = 0.0 if isinstance(eps, Tensor) else float(eps)
    order = None if op.p is None else float(op.p)
    return (
        p.pattern, split, sizes, layout.channel_dim, op.shift, op.about, order, float(op.factor),
        number, spec.activation,
    )  # fmt: skip


def read(x: Tensor, case: Case) -> tuple[Layout, Spec]:
    """Π bound to x, and the rest of the case."""
    pattern, names, sizes, channel_dim, *_, activation = case
    known = dict(zip(names, sizes, strict=True))
    layout = partition(pattern).bind(x.shape, channel_dim=channel_dim, sizes=known)
    return layout, Spec(layout.member_dims, operation_of(case), activation)


def operation_of(case: Case) -> Operation:
    """Φ of the case."""
    shift, about, p, factor, eps = case[4:9]
    return Operation(shift=shift, about=about, p=p, eps=eps, factor=factor)


def like(found: Tensor, x: Tensor) -> Tensor:
    """A result in the order of memory that was announced: that of `torch.empty_like(x)`."""
    y = torch.empty_like(x)
    return found if found.stride() == y.stride() and found.dtype == x.dtype else y.copy_(found)


def none(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What stands for an output that there is not."""
    return x.new_empty((0,), dtype=dtype)


def leaves(given: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """Tensors without history, to differentiate for: where it is compiled, arguments have none."""
    return [
        None if t is None else t.detach().requires_grad_(bool(need))
        for t, need in zip(given, needs, strict=True)
    ]


# Tracers take the answers of these two, and do not look how they are found.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def present() -> bool:
    """Whether kernels were built."""
    return library.load()[0] is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def transformed() -> bool:
    """Whether a transform of `torch.func` is at work, which needs to see inside."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def traceable(x: Tensor, others: Iterable[Tensor | None] = ()) -> bool:
    """Whether operations may stand for what is done to x; asked while it is traced.

    Args:
        x: The input.
        others: Parameters and stored statistics.

    Returns:
        Whether all are on CPUs, x of a dtype that kernels have, and no transform at work.
    """
    return (
        not transformed()
        and forward_ad._current_level < 0
        and x.dtype in function.DTYPES
        and all(t.device.type == "cpu" for t in (x, *others) if t is not None)
        and present()
    )
