"""Compiled kernels as one function of autograd, whatever the family of kernels.

First derivatives come from the kernels. Where a backward pass is differentiated itself, in forward
mode, and under `torch.func`, the closed form in torch operations takes over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normlab.core.operation import Operation
from normlab.core.partition import Layout
from normlab.kernels import closed_form, reference
from normlab.kernels.reference import Moments, Spec

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
ACTIVATIONS: dict[str | None, int] = {None: 0, "relu": 1, "silu": 2, "tlu": 3}
# The dtype of statistics, and of parameters inside the kernels.
WIDE = dict.fromkeys([torch.float32, torch.bfloat16, torch.float16], torch.float32)
WIDE[torch.float64] = torch.float64
_TYPES = (Tensor, torch.nn.Parameter)
_MOST = 256  # cases of a layout, or orders of memory of a case, that are remembered
_LEFT_OVER = torch._C._functorch.is_functorch_wrapped_tensor

Value = TypeVar("Value")
Parameters = tuple[Tensor | None, ...]
Gradients = tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]


class Job:
    """What the calls of one case have in common; made once for each by `job_of`.

    Attributes:
        layout: Π bound to the shape of x.
        spec: Axes, operation and activation of the split view.
        from_batch: Whether statistics are those of x itself.
        shape: Of statistics, which broadcast against the split view.
        family: The module of kernels, with functions `place`, `forward` and `backward`; these get a
            learned ε as a tensor if its READS_EPS is true, else as a number, and a residual only if
            its ADDS is.
        records: What the family keeps for each order of memory.
    """

    __slots__ = ("family", "from_batch", "layout", "records", "shape", "spec")

    def __init__(self, layout: Layout, spec: Spec, from_batch: bool, family: ModuleType) -> None:
        self.layout, self.spec, self.from_batch, self.family = layout, spec, from_batch, family
        self.shape = tuple(1 if i in spec.dims else n for i, n in enumerate(layout.split_shape))
        self.records: dict[Any, Any] = {}


class Correction(NamedTuple):
    """γ·r for γ and β + γ·d for β, r = clip(σ_B/σ, 1/rmax, rmax) and d = clip((μ_B − μ)/σ, ±dmax).

    σ_B includes ε; r and d are constants to gradients. Of areas that are channels.

    Attributes:
        mean: μ, (C,).
        std: σ.
        r: Room for r.
        d: Room for d.
        rmax: Bound on r.
        dmax: Bound on d.
    """

    mean: Tensor
    std: Tensor
    r: Tensor
    d: Tensor
    rmax: float
    dmax: float


class Memo(dict[Any, Any]):
    """What can be found again: copied and pickled empty."""

    def __reduce__(self) -> tuple[type[Memo], tuple[()]]:
        return Memo, ()


def remember(memo: dict[Any, Any], key: Any, value: Value) -> Value:
    """Keep a value for later calls; all are forgotten where there are too many.

    Args:
        memo: Where it is kept.
        key: What it is the value of.
        value: The value.

    Returns:
        The value.
    """
    if len(memo) >= _MOST:  # as with an ε that changes from step to step
        memo.clear()
    memo[key] = value
    return value


def job_of(layout: Layout, spec: Spec, from_batch: bool, family: ModuleType) -> Job:
    """The job of a case.

    Args:
        layout: Π bound to the shape of x.
        spec: Axes, operation and activation of the split view.
        from_batch: Whether statistics are those of x itself.
        family: The module that computes it.

    Returns:
        The job, mostly the same at every call.
    """
    key = (spec, from_batch, family)
    job: Job | None = layout.memo.get(key)
    return job or remember(layout.memo, key, Job(layout, spec, from_batch, family))


def covered(
    covers: Callable[[Layout, Operation, str | None], bool],
    layout: Layout,
    operation: Operation,
    activation: str | None,
) -> bool:
    """What `covers` says of a case, asked once.

    Args:
        covers: Whether a family has the case, whatever its tensors are.
        layout: Π bound to the shape of x.
        operation: Φ.
        activation: The fused activation.

    Returns:
        Its answer.
    """
    key = (covers, operation, activation)
    found: bool | None = layout.memo.get(key)
    if found is None:
        found = remember(layout.memo, key, covers(layout, operation, activation))
    return found


def plain(x: Tensor) -> bool:
    """Whether x is memory of this process and nothing else.

    It is no subclass, no lazy negation, and not left over from a transform, which `Function.apply`
    would have to look for at every call.
    """
    return type(x) in _TYPES and x.is_cpu and not x.is_neg() and not _LEFT_OVER(x)


def observed() -> bool:
    """Whether operations of torch are transformed or recorded: kernels would go unseen."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
    )


def direct(x: Tensor) -> bool:
    """Whether x is a plain tensor, of whatever device, at which no transform looks.

    Gradients batched by `is_grads_batched` are tensors without memory.
    """
    return type(x) in _TYPES and torch._C._has_storage(x) and not observed()


def readable(
    x: Tensor, channels: int, parameters: Parameters, buffers: Iterable[Tensor | None]
) -> bool:
    """Whether kernels may read these tensors: plain dense CPU memory, no transform at work.

    Args:
        x: The input.
        channels: C.
        parameters: γ, β and τ.
        buffers: Stored statistics.

    Returns:
        Whether they may.
    """
    if not plain(x) or x.dtype not in DTYPES or observed():
        return False
    for p in parameters:
        # The kernels read C numbers, whatever the length: the other backends report the fault.
        if p is not None and not (plain(p) and p.shape == (channels,)):
            return False
    for b in buffers:  # noqa: SIM110 (a generator takes several times as long)
        if b is not None and not plain(b):
            return False
    return True


def flat(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Parameters or statistics as kernels read them: one after another, in that dtype."""
    if t is None or (t.dtype is dtype and t.is_contiguous()):
        return t
    return t.detach().to(dtype).contiguous()


def statistics(
    job: Job, x: Tensor, mean: Tensor | None, moment: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Those that the operation has, one number an area after another; room to measure them."""
    op, dtype = job.spec.operation, WIDE[x.dtype]

    def dense(given: Tensor | None) -> Tensor:
        if given is None:
            return x.new_empty(job.shape, dtype=dtype)
        if given.shape == job.shape and given.dtype is dtype and given.is_contiguous():
            return given.detach() if given.requires_grad else given
        return given.detach().to(dtype).expand(job.shape).contiguous()

    return dense(mean) if op.uses_mean else None, dense(moment) if op.p is not None else None


def derivatives(
    formula: Callable[..., Tensor],
    given: Sequence[Tensor | None],
    needs: Sequence[bool],
    dy: Tensor,
) -> list[Tensor | None]:
    """Gradients by torch operations, which autograd and transforms can differentiate.

    Args:
        formula: Of the tensors, in torch operations.
        given: The tensors.
        needs: For which of them to return a gradient; what comes after theirs is not read.
        dy: The gradient of what the formula gives.

    Returns:
        One for each tensor, or None.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that the derivative stops here: one may have been computed from another.
        inputs = [None if t is None else t.view_as(t) for t in given]
        y = formula(*inputs)
        asked = [t is not None and need for t, need in zip(inputs, needs, strict=False)]
        wanted = [t for t, ask in zip(inputs, asked, strict=True) if t is not None and ask]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=again, allow_unused=True))
    return [next(found) if ask else None for ask in asked]


def _forward(
    job: Job, x: Tensor, weight: Tensor | None, bias: Tensor | None, threshold: Tensor | None,
    eps: Tensor | float, given: list[Tensor | None], residual: Tensor | None,
    correction: Correction | None,
) -> Tensor:  # fmt: skip
    """y; statistics are those given, or put there."""
    more: tuple[Any, ...] = () if residual is None else (residual,)  # which not every family takes
    if correction is not None:
        more = (residual, correction)
    y: Tensor
    y, given[0], given[1] = job.family.forward(job, x, weight, bias, threshold, eps, *given, *more)
    return y


class _Normalize(torch.autograd.Function):
    """(x, γ, β, τ, ε, r, (job, number, statistics, correction)) → y.

    Statistics are given or put there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        threshold: Tensor | None,
        eps: Tensor | None,
        residual: Tensor | None,
        call: tuple[Job, Tensor | float, list[Tensor | None], Correction | None],
    ) -> Tensor:
        job, number, given, correction = call
        y = _forward(job, x, weight, bias, threshold, number, given, residual, correction)
        ctx.call = (job, number)
        # Without an activation the gradient does not depend on r.
        residual = residual if job.spec.activation else None
        corrected = () if correction is None else (correction.r, correction.d)
        ctx.save_for_backward(x, weight, bias, threshold, eps, residual, *given, *corrected)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        if dy is None:
            return (None,) * 7
        x, weight, bias, threshold, eps, residual, mean, moment, *corrected = ctx.saved_tensors
        (job, number), needs = ctx.call, ctx.needs_input_grad
        if torch.is_grad_enabled() or not direct(dy):
            inputs = (x, weight, bias, threshold, eps, residual)
            found = differentiable(job, needs, dy, inputs, number, mean, moment, corrected)
            return *found, None
        # Hooks on saved tensors may have changed the order of statistics, or their dtype.
        mean, moment = flat(mean, WIDE[x.dtype]), flat(moment, WIDE[x.dtype])
        more: tuple[Any, ...] = () if residual is None else (residual,)
        if corrected:
            more = (residual, [flat(t, WIDE[x.dtype]) for t in corrected])
        dx, dweight, dbias, dthreshold, deps, dr = job.family.backward(
            job, needs, dy, x, weight, bias, threshold, number, mean, moment, *more
        )
        deps = None if deps is None or eps is None else deps.to(eps.dtype).view(eps.shape)
        dr = dy if needs[5] and residual is None else dr
        return dx, dweight, dbias, dthreshold, deps, dr, None


_apply = super(torch.autograd.Function, _Normalize).apply


def differentiable(
    job: Job,
    needs: Sequence[bool],
    dy: Tensor,
    given: Parameters,
    number: Tensor | float,
    mean: Tensor | None,
    moment: Tensor | None,
    corrected: Sequence[Tensor] = (),
) -> Gradients:
    """The gradient by torch operations, which autograd and transforms can differentiate.

    Args:
        job: The case.
        needs: For which of `given` to return one.
        dy: The gradient of y.
        given: x, γ, β, τ, ε and r, the latter None too where its gradient is dy.
        number: ε where it is not among them.
        mean: The statistics that were used.
        moment: Likewise.
        corrected: r and d of a `Correction`, if there was one.

    Returns:
        Gradients of `given`.
    """

    def formula(*inputs: Tensor | None) -> Tensor:
        return _by_operations(job, inputs, number, mean, moment, corrected)

    dx, dweight, dbias, dthreshold, deps, dr = derivatives(formula, given, needs, dy)
    return dx, dweight, dbias, dthreshold, deps, dy if needs[5] and given[5] is None else dr


def folded(
    weight: Tensor | None, bias: Tensor | None, r: Tensor, d: Tensor
) -> tuple[Tensor, Tensor]:
    """γ·r and β + γ·d: γ·(x̂·r + d) + β = (γ·r)·x̂ + (β + γ·d).

    Args:
        weight: γ, or None.
        bias: β, or None.
        r: The factor, of the shape of γ and β.
        d: The shift.

    Returns:
        What stands for γ and β.
    """
    if weight is not None:  # once: γ is used twice, and its gradient rounded after the sum
        weight = weight.to(r.dtype)
    shift = d if weight is None else weight * d
    return (r if weight is None else weight * r), (shift if bias is None else bias + shift)


def _by_operations(
    job: Job, inputs: Parameters, number: Tensor | float, mean: Tensor | None,
    moment: Tensor | None, corrected: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """The same function in torch operations."""
    x, weight, bias, threshold, eps, residual = inputs
    assert x is not None
    if corrected:
        weight, bias = folded(weight, bias, *corrected)
    layout, spec = job.layout, job.spec
    # Stored statistics stand here once for each area, where `closed_form` takes them once in all;
    # nor has that a gate.
    backend = closed_form if job.from_batch and spec.activation != "gated" else reference
    affine = [None if p is None else layout.per_channel(p) for p in (weight, bias, threshold)]
    y = backend.normalize(
        layout.split(x), Moments(mean, moment, layout.members), *affine,
        number if eps is None else eps, None, spec, from_batch=job.from_batch,
        residual=None if residual is None else layout.split(residual),
    )  # fmt: skip
    return layout.join(y)


def normalize(
    family: ModuleType,
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
    """y = a((x − s·μ)/D · γ + β + r) of the whole tensor, and the statistics.

    Args:
        family: The module of kernels, which `supports` the case.
        x: The input.
        layout: Π bound to its shape.
        spec: Axes of the members, operation and activation.
        weight: γ of shape (C,), or None.
        bias: β, likewise.
        threshold: τ, for the TLU.
        eps: ε, a tensor where it is learned.
        given: Statistics to use; None to measure those of x.
        from_batch: Whether `given`, if any, was measured on x, so that gradients flow through it.
        residual: r, of the shape and dtype of x, if the family adds one.

    Returns:
        y, in the dtype and memory order of x, and the statistics used.
    """
    job = job_of(layout, spec, from_batch, family)
    return apply(job, x, weight, bias, threshold, eps, given, residual)


def apply(
    job: Job,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor | None,
    eps: Tensor | float,
    given: Moments | None = None,
    residual: Tensor | None = None,
    correction: Correction | None = None,
) -> tuple[Tensor, Moments]:
    """`normalize` in a case that is known already.

    Args:
        job: The case.
        x: The input.
        weight: γ of shape (C,), or None.
        bias: β, likewise.
        threshold: τ, for the TLU.
        eps: ε, a tensor where it is learned.
        given: Statistics to use; None to measure those of x.
        residual: r, of the shape and dtype of x, if the family adds one.
        correction: Of γ and β, if the family has one.

    Returns:
        y, in the dtype and memory order of x, and the statistics used.
    """
    learned, number = None, eps
    if isinstance(eps, Tensor):
        learned = eps
        number = eps.detach() if getattr(job.family, "READS_EPS", False) else eps.item()
    # Copied out here, where autograd sees it: what is saved must have x as its history.
    x = job.family.place(job, x)
    used: list[Tensor | None] = [None, None] if given is None else [given.mean, given.moment]
    if not torch.is_grad_enabled():
        y = _forward(job, x, weight, bias, threshold, number, used, residual, correction)
    else:
        # The apply of Python looks for tensors left over from transforms, as slowly as a kernel
        # runs; of these, only a learned ε may be one.
        call = _Normalize.apply if learned is not None and _LEFT_OVER(learned) else _apply
        more = (job, number, used, correction)
        y = call(x, weight, bias, threshold, learned, residual, more)  # type: ignore[no-untyped-call]
    return y, Moments(used[0], used[1], job.layout.members)
