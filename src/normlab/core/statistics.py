"""Which numbers Φ uses, and what a forward pass does to the stored ones: two separate policies.

- ``use``: ``"batch"`` (statistics of the input) or ``"stored"``;
- ``update``: True (each forward pass), False, or ``"accumulate"`` (pool over forward passes until
  told to commit, so that micro-batches count as one batch).

``"auto"``, the default of both, follows ``model.train()`` and ``eval()``; any other value survives
them. Stored statistics are float32 at least.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from normlab.core.operation import Operation
from normlab.kernels.reference import Moments
from normlab.kernels.reference import Reduce as Reduce
from normlab.kernels.transforms import transformed, vmap_level

Use = Literal["auto", "batch", "stored"]
Update = Literal["auto", "accumulate"] | bool
Stored = dict[str, Tensor]


@dataclass(frozen=True)
class Current:
    """Statistics of the input, in training and evaluation alike; nothing is stored.

    Attributes:
        reduce: Sums a tensor over processes that share statistics, e.g. ``AllReduce()``.
    """

    reduce: Reduce | None = None

    def names(self, operation: Operation) -> tuple[str, ...]:
        """Names of the stored statistics: none."""
        return ()


@dataclass(frozen=True)
class Running:
    """Exponential moving averages of the batch statistics, used in evaluation.

    Torch's convention: new = (1 − momentum)·old + momentum·batch, with the unbiased variance
    M·m/(m − 1). For other deviations than the standard one the average is that of M^(1/p).

    Attributes:
        momentum: Weight of the newest batch; None for the plain average of all batches.
        reduce: Sums a tensor over processes that share statistics, e.g. ``AllReduce()``.
        bessel: False averages the biased variance.
    """

    momentum: float | None = 0.1
    reduce: Reduce | None = None
    bessel: bool = True

    def __post_init__(self) -> None:
        if self.momentum is not None and not 0 <= self.momentum <= 1:
            raise ValueError(
                f"momentum is the weight of the newest batch, in [0, 1], or None; "
                f"received {self.momentum}"
            )

    def names(self, operation: Operation) -> tuple[str, ...]:
        """Names of the stored statistics, in the order mean, deviation."""
        mean = ("running_mean",) if operation.shift else ()
        if operation.p is None:
            return mean
        variance = operation.p == 2 and operation.about == "mean"
        return (*mean, "running_var" if variance else "running_deviation")


def momentum_for(steps: int, momentum: float) -> dict[str, Any]:
    """Options for a run of that many steps: a momentum of at least `momentum`, at most 0.1.

    What the stored statistics started from is forgotten by the end: (1 − 10/steps)^steps ≈ e⁻¹⁰.

    Example:
        >>> [momentum_for(steps, 0.01)["momentum"] for steps in (20, 500, 10**6)]
        [0.1, 0.02, 0.01]
    """
    return {"momentum": min(0.1, max(momentum, 10 / steps))}


@dataclass(frozen=True)
class Ramp:
    """A value that rises linearly between two steps and is constant outside them.

    Example:
        >>> Ramp(1.0, 3.0, begin=5000, end=40000)(torch.tensor(22500))
        tensor(2.)
    """

    first: float
    last: float
    begin: int
    end: int

    def __call__(self, step: Tensor) -> Tensor:
        """Return the value at a step (a scalar tensor)."""
        share = ((step - self.begin) / max(self.end - self.begin, 1)).clamp(0, 1)
        return self.first + (self.last - self.first) * share

    def at(self, step: int) -> float:
        """Return the value at a step that is a number."""
        share = (step - self.begin) / max(self.end - self.begin, 1)
        return self.first + (self.last - self.first) * min(max(share, 0.0), 1.0)


Schedule = float | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Renormalized:
    """Batch statistics corrected towards the stored ones (1702.03275).

    Training uses x̂ = (x − μ_B)/σ_B · r + d with r = clip(σ_B/σ, 1/rmax, rmax) and
    d = clip((μ_B − μ)/σ, ±dmax) held constant by the gradient; then μ and σ (the standard
    deviation, not the variance) move by momentum. σ_B includes ε; evaluation adds no further ε.

    Attributes:
        rmax: Bound on r, a number or a function of the step (a `Ramp`).
        dmax: Bound on d, likewise.
        momentum: Weight of the newest batch.
        reduce: Sums a tensor over processes that share statistics.
    """

    rmax: Schedule
    dmax: Schedule
    momentum: float = 0.01
    reduce: Reduce | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum is in [0, 1]; received {self.momentum}")
        for name, bound, least in (("rmax", self.rmax, 1), ("dmax", self.dmax, 0)):
            if not callable(bound) and not bound >= least:
                raise ValueError(f"{name} is at least {least}; received {bound}")

    def names(self, operation: Operation) -> tuple[str, ...]:
        """Names of the stored statistics."""
        return ("running_mean", "running_std")

    def limits(self, step: int) -> tuple[float, float] | None:
        """Return rmax and dmax at a step, or None where they are not numbers, or not all there is.

        Args:
            step: Batches so far.
        """
        if type(self).correction is not Renormalized.correction:  # a subclass has another rule
            return None
        bounds = (self.rmax, self.dmax)  # a subclass of a ramp has another rule too
        rmax, dmax = (b.at(step) if type(b) is Ramp else b for b in bounds)
        return None if callable(rmax) or callable(dmax) else (float(rmax), float(dmax))

    @torch.no_grad()
    def correction(
        self,
        mean: Tensor,
        deviation: Tensor,
        old_mean: Tensor,
        old_std: Tensor,
        step: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return r and d.

        Args:
            mean: μ_B.
            deviation: σ_B.
            old_mean: μ.
            old_std: σ.
            step: Batches so far, a scalar.
        """

        def bound(given: Schedule) -> Any:
            if not callable(given):
                return given
            found = given(step.to(mean.dtype))
            return torch.as_tensor(found, dtype=mean.dtype, device=mean.device)

        rmax, dmax = bound(self.rmax), bound(self.dmax)
        r = (deviation / old_std).clamp(1 / rmax, rmax)
        d = ((mean - old_mean) / old_std).clamp(-dmax, dmax)
        return r.detach(), d.detach()  # from tangents too, which `no_grad` lets pass


Statistics = Current | Running | Renormalized


class AllReduce:
    """Sum over the processes of a group, differentiably: pass it as ``reduce``.

    Args:
        group: A `torch.distributed` process group; None for the default one.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group

    def __call__(self, x: Tensor) -> Tensor:
        """Return the sum of x over the group, the same on every process."""
        return cast(Tensor, _AllReduce.apply(x, self.group))  # type: ignore[no-untyped-call]


class _AllReduce(torch.autograd.Function):
    """y_r = Σ_q x_q on each process r, so that ∂L/∂x_q = Σ_r ∂L/∂y_r: a sum again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        import torch.distributed as dist

        ctx.group = group
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return AllReduce(ctx.group)(grads[0]), None


def unbiased(moments: Moments) -> Tensor:
    """The variance with Bessel's correction m/(m − 1); areas of one member keep theirs."""
    assert moments.moment is not None
    size = moments.size
    if not isinstance(size, Tensor):  # a number, or one that a tracer keeps open
        return moments.moment * (size / max(size - 1, 1))
    size = size.clamp(min=1)
    return moments.moment * (size / (size - 1).clamp(min=1))


def deviation_to_store(moments: Moments, operation: Operation, bessel: bool) -> Tensor:
    """What `Running` averages beside the mean."""
    assert moments.moment is not None
    assert operation.p is not None
    if operation.p == 2 and operation.about == "mean":
        return unbiased(moments) if bessel else moments.moment
    return moments.moment if operation.p == math.inf else moments.moment ** (1 / operation.p)


def blend(old: Tensor, new: Tensor, weight: float | Tensor, valid: Tensor) -> None:
    """Move a stored statistic towards a batch's, in place, where the batch's are all finite."""
    new = new.to(old.dtype)
    weight = weight.to(old.dtype) if isinstance(weight, Tensor) else weight
    old.copy_(torch.where(valid, torch.lerp(old, torch.where(valid, new, old), weight), old))


def pool(a: tuple[Tensor, ...], b: tuple[Tensor, ...], operation: Operation) -> tuple[Tensor, ...]:
    """Merge two (count, mean, M) of disjoint samples.

    With n = n_a + n_b: μ = (n_a·μ_a + n_b·μ_b)/n and M = (n_a·M_a + n_b·M_b)/n, to which squares
    about the mean add what lies between the two means, n_a·n_b/n²·(μ_b − μ_a)². Other orders about
    the mean have no exact merge; theirs leaves that part out.
    """
    (na, ma, va), (nb, mb, vb) = a, b
    n = na + nb
    share = nb / n.clamp(min=1)
    mean = ma + (mb - ma) * share
    moment = va + (vb - va) * share
    if operation.p == 2 and operation.about == "mean":
        moment = moment + (1 - share) * share * (mb - ma) ** 2
    return n, mean, moment


def writable(batch: Sequence[Tensor], buffers: Sequence[Tensor]) -> bool:
    """Whether statistics of a batch may be written to these buffers.

    Inside a `torch.func` transform, buffers that are not part of it stay as they are: a probe of
    the model (per-sample gradients, curvature) must not change the model. Nor can values that are
    batched by vmap be written to buffers that are not.
    """
    if torch.compiler.is_compiling() or not transformed(*batch):
        return True
    ours = all(transformed(buffer) for buffer in buffers)
    return ours and max(map(vmap_level, batch)) <= min(map(vmap_level, buffers))


def check_policies(use: object = None, update: object = None) -> None:
    """Raise ValueError for a policy that there is not; None is one that is left as it is."""
    if use is not None and use not in ("auto", "batch", "stored"):
        raise ValueError(f"use is 'auto', 'batch' or 'stored'; received {use!r}")
    known = update is None or isinstance(update, bool) or update in ("auto", "accumulate")
    if not known:
        raise ValueError(f"update is 'auto', True, False or 'accumulate'; received {update!r}")


class statistics:
    """Set the statistics policies of every layer of a model; undone on leaving a ``with`` block.

    Args:
        model: Any module; its normlab layers that store statistics are set.
        use: ``"batch"``, ``"stored"`` or ``"auto"`` (follow train and eval); None leaves it.
        update: True, False, ``"accumulate"`` or ``"auto"``; None leaves it.

    Raises:
        ValueError: If a policy is unknown.

    Example:
        >>> import normlab as nl
        >>> layer = nl.BatchNorm(3)
        >>> with nl.statistics(layer, use="stored", update=False):
        ...     layer.train().use
        'stored'
        >>> layer.use
        'auto'
    """

    def __init__(
        self, model: nn.Module, use: Use | None = None, update: Update | None = None
    ) -> None:
        check_policies(use, update)
        self._before = [(layer, layer.use, layer.update) for layer in _storing(model)]
        if not self._before:
            warnings.warn(
                "no normlab layer with stored statistics in this model: nothing was set. "
                "Convert torch's own layers first.",
                stacklevel=2,
            )
        for layer, _, _ in self._before:
            if use is not None:
                layer.use = use
            if update is not None:
                layer.update = update

    def __enter__(self) -> statistics:
        return self

    def __exit__(self, *error: object) -> None:
        for layer, use, update in self._before:
            layer.use, layer.update = use, update

    @staticmethod
    def commit(model: nn.Module) -> int:
        """Fold what ``update="accumulate"`` pooled into the stored statistics.

        Args:
            model: Any module.

        Returns:
            The number of layers that had something pooled.
        """
        return sum(layer.commit() for layer in _storing(model))


def _storing(model: nn.Module) -> Iterator[Any]:
    """The layers of a model that keep stored statistics."""
    return (m for m in model.modules() if getattr(m, "stored_names", ()))
