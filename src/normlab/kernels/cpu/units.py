"""Compiled kernels of rows: weights, one row a unit, and the gradients of a whole model at once."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normlab.kernels.cpu.function import DTYPES, derivatives, direct, observed, plain
from normlab.kernels.cpu.library import ready

FORMS = {"inside": 0, "floor": 1, "outside": 2, "stored": 3}
SIGNS = {None: 0, "none": 1, "mean": 2}
Formula = Callable[[Tensor, Tensor | None], Tensor]


class How(NamedTuple):
    """What is done to the rows of a weight.

    Attributes:
        formula: The same in torch operations, of the weight and its gain.
        eps: ε.
        form: ``"inside"`` z/√(M + ε), ``"floor"`` z/√max(n·M, ε), ``"outside"`` z/(√M + ε)/√n, or
            ``"stored"`` for the weight itself in the place of these.
        constant: Factor of the gain.
        signs: None, or signs in the place of values, times their mean size (``"mean"``) or 1
            (``"none"``).
        zero: sign(0).
    """

    formula: Formula
    eps: float
    form: str
    constant: float = 1.0
    signs: str | None = None
    zero: float = 1.0


class Rewriting(NamedTuple):
    """What is done to the rows of a gradient.

    Attributes:
        center: Subtract each row's mean, and nothing else.
        clip: Otherwise, λ of adaptive clipping.
        eps: The least norm of weights there.
    """

    center: bool
    clip: float = 0.0
    eps: float = 0.0


class Rows(ctypes.Structure):
    """Arguments of `normlab_units`; kept in step with units.cpp."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("units", "fan_in", "form", "signs")],
        *[(name, ctypes.c_double) for name in ("zero", "eps", "constant")],
        *[(name, ctypes.c_void_p) for name in (
            "v", "dy", "gain", "mean", "moment", "out", "dgain",
        )],
    ]  # fmt: skip


class Rewrite(ctypes.Structure):
    """Arguments of `normlab_rewrite`; kept in step with units.cpp."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("count", "center")],
        *[(name, ctypes.c_double) for name in ("clip", "eps")],
        *[(name, ctypes.c_void_p) for name in (
            "units", "fan_in", "gradient", "weight", "work",
        )],
    ]  # fmt: skip


def in_rows(x: Tensor) -> bool:
    """Whether what belongs to one index of the first axis lies in one piece, piece after piece."""
    return x.is_contiguous() or (x.ndim > 2 and x.movedim(1, -1).is_contiguous())


def supports(weight: Tensor, gain: Tensor | None) -> bool:
    """Whether the kernels compute this case: plain CPU tensors, no transform."""
    return (
        plain(weight)
        and weight.layout == torch.strided
        and weight.dtype in DTYPES
        and weight.ndim > 1
        and weight.numel() > 0
        and (gain is None or (plain(gain) and gain.numel() == weight.shape[0]))
        and not observed()
    )


def standardize(weight: Tensor, gain: Tensor | None, how: How) -> Tensor:
    """The weight in use, with gradients of any order.

    Args:
        weight: As `supports` allows it; units on the first axis.
        gain: One number a unit, of any shape, or None.
        how: What is done.

    Returns:
        A tensor like the weight.
    """
    # Copied out here, where autograd sees it: what is saved must have the weight as its history.
    weight = weight if in_rows(weight) else weight.contiguous()
    used: Tensor = _Standardize.apply(weight, gain, how)  # type: ignore[no-untyped-call]
    return used


def _rows(weight: Tensor, gain: Tensor | None, stats: Tensor, how: How, out: Tensor | None) -> Rows:
    units = weight.shape[0]
    return Rows(
        units, weight.numel() // units, FORMS[how.form], SIGNS[how.signs], how.zero, how.eps,
        how.constant, weight.data_ptr(), None, None if gain is None else gain.data_ptr(),
        stats[0].data_ptr(), stats[1].data_ptr(), None if out is None else out.data_ptr(), None,
    )  # fmt: skip


def _run(rows: Rows, dtype: torch.dtype, back: bool) -> None:
    library = ready()
    library.normlab_units(ctypes.byref(rows), DTYPES[dtype], back)


def _double(gain: Tensor | None) -> Tensor | None:
    return None if gain is None else gain.detach().to(torch.float64).contiguous()


class _Standardize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, gain: Tensor | None, how: How) -> Tensor:
        stats = weight.new_empty(2, weight.shape[0], dtype=torch.float64)
        used, wide = torch.empty_like(weight), _double(gain)
        _run(_rows(weight, wide, stats, how, used), weight.dtype, False)
        ctx.how = how
        ctx.save_for_backward(weight, gain, stats)
        return used

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy, how = grads[0], ctx.how
        weight, gain, stats = ctx.saved_tensors
        if torch.is_grad_enabled() or not direct(dy):
            return *derivatives(how.formula, (weight, gain), ctx.needs_input_grad, dy), None
        # Hooks on saved tensors may have changed their order.
        weight, stats = weight if in_rows(weight) else weight.contiguous(), stats.contiguous()
        dv = torch.empty_like(weight) if ctx.needs_input_grad[0] else None
        if dy.stride() != weight.stride() or dy.is_neg() or dy._is_zerotensor():
            dy = torch.empty_like(weight).copy_(dy)
        wide = _double(gain)
        dgain = torch.empty_like(stats[0]) if gain is not None else None
        rows = _rows(weight, wide, stats, how, dv)
        rows.dy, rows.dgain = dy.data_ptr(), None if dgain is None else dgain.data_ptr()
        _run(rows, weight.dtype, True)
        if dgain is None or gain is None or not ctx.needs_input_grad[1]:
            return dv, None, None
        return dv, dgain.to(gain.dtype).view(gain.shape), None


def takes(gradient: Tensor, weight: Tensor) -> bool:
    """Whether a gradient can be rewritten in place by `rewrite`: dense rows, not of float64."""
    return (
        gradient.layout == torch.strided
        and gradient.dtype in (torch.float32, torch.bfloat16)
        and gradient.dtype == weight.dtype
        and gradient.shape == weight.shape
        and plain(gradient)
        and plain(weight)
        and gradient.numel() > 0
        and in_rows(gradient)
        and in_rows(weight)
        and not observed()
    )


def rewrite(items: Sequence[tuple[Tensor, Tensor, int]], how: Rewriting) -> None:
    """Rewrite gradients in place, unit by unit; those that are not finite stay as they are.

    Args:
        items: Gradients, their parameters, and how many units each has, as `takes` allows them.
        how: What is done.
    """
    library = ready()
    for dtype in {gradient.dtype for gradient, _, _ in items}:
        some = [item for item in items if item[0].dtype == dtype]
        count = len(some)
        units = (ctypes.c_int64 * count)(*(n for *_, n in some))
        fan_in = (ctypes.c_int64 * count)(*(g.numel() // n for g, _, n in some))
        gradients = (ctypes.c_void_p * count)(*(g.data_ptr() for g, _, _ in some))
        weights = (ctypes.c_void_p * count)(*(w.data_ptr() for _, w, _ in some))
        work = torch.empty(max(units), dtype=torch.float64)
        call = Rewrite(
            count, how.center, how.clip, how.eps,
            *(ctypes.cast(a, ctypes.c_void_p) for a in (units, fan_in, gradients, weights)),
            work.data_ptr(),
        )  # fmt: skip
        library.normlab_rewrite(ctypes.byref(call), DTYPES[dtype])
        torch.autograd.graph.increment_version([g for g, _, _ in some])
