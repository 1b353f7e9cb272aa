"""A layer that keeps statistics between forward passes, under the two policies of `statistics`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from normlab.core import statistics as st
from normlab.core.operation import LearnedEps, Operation
from normlab.core.partition import Layout, Partition
from normlab.kernels import dispatch
from normlab.kernels.cpu.function import observed
from normlab.kernels.cpu.stored import blend
from normlab.kernels.hold import copied
from normlab.kernels.reference import Moments, counted, deviation


class StoringLayer(nn.Module):
    """Abstract: stored statistics, what is read from them, and what a forward pass does to them.

    A subclass sets `partition`, `operation`, `statistics` and `eps_learned`, and calls
    `_register_stored`.
    """

    partition: Partition
    operation: Operation
    statistics: st.Statistics
    eps_learned: nn.Parameter | None
    num_batches_tracked: Tensor
    skipped_updates: Tensor
    shown: ClassVar[tuple[str, ...]] = ()  # further attributes that `repr` names
    _starts: Mapping[str, float] = {}

    def __init__(self) -> None:
        super().__init__()
        self.stored_names: tuple[str, ...] = ()
        self._use: st.Use = "auto"
        self._update: st.Update = "auto"
        self._pooled: tuple[Tensor, ...] | None = None

    def _register_stored(self, size: int) -> None:
        """Create the buffers, each of shape (size,)."""
        self.stored_names = self.statistics.names(self.operation)
        if not self.stored_names:
            return
        for name in self.stored_names:
            dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
            self.register_buffer(name, torch.empty(size, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        skipped = torch.tensor(0, dtype=torch.long)
        self.register_buffer("skipped_updates", skipped, persistent=False)

    def _add(self, *shape: int, present: bool = True, **starts: float) -> None:
        """Create parameters beside those of Ψ, of a shape, by name and initial value, or None."""
        self._starts = {**self._starts, **starts}
        for name, start in starts.items():
            value = nn.Parameter(torch.full(shape, start)) if present else None
            self.register_parameter(name, value)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set parameters and stored statistics to their initial values, modules inside too."""
        self.reset_running_stats()
        for name, start in {"weight": 1.0, "bias": 0.0, **self._starts}.items():
            parameter = self._parameters.get(name)
            if parameter is not None:
                parameter.fill_(start)
        for child in self.children():
            reset = getattr(child, "reset_parameters", None)
            if reset is not None:
                reset()

    def _more_shown(self) -> list[str]:
        """What `repr` ends with."""
        policies = {"use": self._use, "update": self._update}
        parts = [f"{k}={v}" for k, v in policies.items() if v != "auto"]
        return parts + [f"{name}={getattr(self, name)}" for name in self.shown]

    def reset_running_stats(self) -> None:
        """Set the stored statistics to mean 0, deviation 1."""
        self._pooled = None
        for name in self.stored_names:
            getattr(self, name).fill_(0.0 if name == "running_mean" else 1.0)
        if self.stored_names:
            self.num_batches_tracked.zero_()
            self.skipped_updates.zero_()

    def _own(self, name: str) -> Any:
        """A parameter or buffer, or what stands in its place: sooner than nn.Module finds it."""
        found: Any = self._parameters.get(name)
        if found is None:
            found = self._buffers.get(name)
        return getattr(self, name) if found is None else found

    @property
    def kept_names(self) -> tuple[str, ...]:
        """Names of the buffers that stay in float32 at least."""
        return self.stored_names

    @property
    def eps(self) -> Tensor | float:
        """ε in force; a tensor where it is learned."""
        eps = self.operation.eps
        if isinstance(eps, LearnedEps):
            return eps.floor + cast(Tensor, self._own("eps_learned")).abs()
        return eps

    @property
    def use(self) -> st.Use:
        """The `use` policy."""
        return self._use

    @use.setter
    def use(self, value: st.Use) -> None:
        st.check_policies(use=value)
        if value == "stored" and not self.stored_names:
            raise ValueError(f"use='stored' needs stored statistics, and {self} keeps none")
        self._use = value

    @property
    def update(self) -> st.Update:
        """The `update` policy."""
        return self._update

    @update.setter
    def update(self, value: st.Update) -> None:
        st.check_policies(update=value)
        self._update = value

    @property
    def _running(self) -> tuple[str, ...]:
        """The stored statistics that evaluation uses; others serve training alone."""
        return tuple(name for name in self.stored_names if name.startswith("running_"))

    @property
    def _uses_stored(self) -> bool:
        """Whether this forward pass takes stored statistics."""
        wanted = not self.training if self._use == "auto" else self._use == "stored"
        return wanted and bool(self.stored_names)

    def _from_stored(self, layout: Layout, eps: Tensor | float) -> tuple[Moments, Tensor | float]:
        """The stored statistics as moments, and the ε to add to them."""
        # Copies: an update before the backward pass must not change what this pass has used. The
        # tracer of TorchScript compares what it gets with gradients and without.
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        kept = copied if torch.is_grad_enabled() or tracing else Tensor.detach
        stored = {n: layout.from_stored(kept(self._own(n))) for n in self._running}
        mean = stored.get("running_mean")
        if "running_std" in stored:  # ε is inside it already
            return Moments(mean, stored["running_std"] ** 2, layout.members), 0.0
        moment = stored.get("running_var")
        if "running_deviation" in stored:
            power = self.operation.power
            moment = stored["running_deviation"] ** power
        return Moments(mean, moment, layout.members), eps

    @property
    def _updates(self) -> bool:
        """Whether this forward pass changes stored statistics, or pools for it.

        A forward pass inside a backward pass recomputes what activation checkpointing dropped; its
        statistics have been counted.
        """
        policy = self.training if self._update == "auto" else self._update
        return bool(policy) and bool(self.stored_names) and not in_backward()

    @property
    def _least(self) -> float:
        """Members that an area needs for its statistics to enter the stored ones.

        The deviation of a single member from its mean is 0 whatever the data are like.
        """
        return 2 if self.operation.p is not None and self.operation.about == "mean" else 1

    @property
    def _measures(self) -> bool:
        """Whether this forward pass needs the batch's own statistics."""
        return self._updates or not self._uses_stored

    def _maybe_update(self, measured: list[tuple[Layout, Moments]]) -> None:
        """Apply the update policy to the moments of the pieces of a batch, as one batch."""
        if not measured or not self._updates:
            return
        buffers = [self._own(name) for name in self.stored_names]
        if self._blended(measured, buffers):
            return
        tensors = [t for _, m in measured for t in (m.mean, m.moment) if t is not None]
        if st.writable(tensors, buffers):
            self._apply_update(measured)

    @torch.no_grad()
    def _apply_update(self, measured: list[tuple[Layout, Moments]]) -> None:
        """Pool, or write averages over areas."""
        if self._update == "accumulate":
            self._pool(measured)
            return
        values, areas = self._averages(measured, self._to_store)
        self._write(values, areas > 0)

    def _blended(self, measured: list[tuple[Layout, Moments]], buffers: list[Tensor]) -> bool:
        """Update at once, where nothing is special; otherwise leave all as it is.

        Plain momentum, areas of one size with members enough, finite statistics on a processor
        that answers at once whether they are.
        """
        (layout, given), *more = measured
        momentum = getattr(self.statistics, "momentum", None)
        if (
            more
            or type(self)._write is not StoringLayer._write  # a subclass has its own way
            or type(self)._newest is not StoringLayer._newest
            or momentum is None
            or not isinstance(given.size, int)
            or given.size < self._least
            or self._update == "accumulate"
            or torch.compiler.is_compiling()
            or not all([type(b) is Tensor and b.is_cpu for b in buffers])  # noqa: C419 (faster)
            or not (self._one_area or layout.stored_last)
            or observed()
        ):
            return False
        values: tuple[Tensor | None, ...] = (given.mean, given.moment)
        factors = (1.0, 1.0)
        own = type(self)._to_store is not StoringLayer._to_store
        if own or self.stored_names != ("running_mean", "running_var"):
            with torch.no_grad():
                values = tuple(self._to_store(given).values())
        elif getattr(self.statistics, "bessel", True):
            factors = (1.0, given.size / max(given.size - 1, 1))
        found = cast(tuple[Tensor, ...], values)
        count = self._own("num_batches_tracked")
        if dispatch.compiled_for_cpu() and blend(buffers, found, factors, momentum, count):
            return True
        if not self._one_area:
            return False
        with torch.no_grad():
            new = [v.reshape(-1) * f for v, f in zip(found, factors, strict=False)]
            same = [(v.dtype, v.shape) for v in new] == [(b.dtype, b.shape) for b in buffers]
            # A sum is finite only if all its terms are.
            if not same or not all(math.isfinite(value.sum().item()) for value in new):
                return False
            torch._foreach_lerp_(buffers, new, momentum)
            count.add_(1)
        return True

    def _averages(
        self,
        measured: list[tuple[Layout, Moments]],
        per_area: Callable[[Moments], dict[str, Tensor]],
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Average over the areas of each stored channel that have members; also count those."""
        sums: dict[str, Tensor] = {}
        areas: Tensor | None = None
        for layout, moments in measured:
            values = per_area(moments)
            like = next(iter(values.values()))
            present = counted(moments.size, like) >= self._least
            present = present.expand(like.shape)
            for name, value in values.items():
                kept = layout.sum_stored(value.masked_fill(~present, 0))
                sums[name] = sums[name] + kept if name in sums else kept
            count = layout.sum_stored(present.to(like.dtype))
            areas = count if areas is None else areas + count
        assert areas is not None
        return {name: value / areas.clamp(min=1) for name, value in sums.items()}, areas

    def _to_store(self, given: Moments) -> dict[str, Tensor]:
        """What each buffer averages, still per area."""
        values = {}
        for name in self._running:
            if name == "running_mean":
                values[name] = cast(Tensor, given.mean)
            elif name == "running_std":
                values[name] = deviation(cast(Tensor, given.moment), self.operation, self.eps)
            else:
                values[name] = st.deviation_to_store(
                    given, self.operation, getattr(self.statistics, "bessel", True)
                )
        return values

    def _write(self, values: dict[str, Tensor], present: Tensor) -> None:
        """Blend a batch's statistics into the buffers.

        Args:
            values: What is averaged, by name of the buffer.
            present: Which channels had any valid member. Of these, a channel whose statistics are
                not all finite is left alone, and counted.
        """
        finite = torch.stack([v.isfinite() for v in values.values()]).all(0)
        valid = finite & present
        self.skipped_updates.add_((present & ~finite).sum())
        self.num_batches_tracked.add_(present.any())
        for name, value in values.items():
            buffer = getattr(self, name)
            weight = self._newest(self.num_batches_tracked.to(buffer.dtype))
            st.blend(buffer, value, weight, valid)

    def _newest(self, step: Tensor) -> Tensor | float:
        """Weight of the newest batch in the stored statistics at a training pass, counted from 1.

        The passes of ``update="accumulate"`` until `commit` are one.
        """
        momentum: float | None = getattr(self.statistics, "momentum", None)
        return 1 / step if momentum is None else momentum

    def _pool(self, measured: list[tuple[Layout, Moments]]) -> None:
        """Merge a batch's moments into those that wait for `commit`.

        Where all samples share an area, micro-batches merge into the moments of their union. Where
        areas belong to samples or sub-batches, stored statistics are averages over areas, and so
        are those of several passes.
        """

        def moments(given: Moments) -> dict[str, Tensor]:
            like = cast(Tensor, given.moment if given.moment is not None else given.mean)
            size = counted(given.size, like)
            zero = torch.zeros_like(like)
            mean = zero if given.mean is None else given.mean
            moment = zero if given.moment is None else given.moment
            return {"size": size.expand(like.shape), "mean": mean, "moment": moment}

        if self._one_area:
            means, _ = self._averages(measured, moments)
            new = (means["size"], means["mean"], means["moment"])
            old = self._pooled
            self._pooled = new if old is None else st.pool(old, new, self.operation)
            return
        averages, areas = self._averages(measured, self._to_store)
        sums = (areas, *(value * areas for value in averages.values()))
        before = self._pooled or tuple(torch.zeros_like(part) for part in sums)
        self._pooled = tuple(a + b for a, b in zip(before, sums, strict=True))

    @property
    def _one_area(self) -> bool:
        """Whether all samples of a batch share the areas of their channels."""
        return self.partition.shared

    @torch.no_grad()
    def commit(self) -> bool:
        """Fold what ``update="accumulate"`` pooled into the stored statistics, as one batch.

        Returns:
            Whether there was anything.
        """
        if self._pooled is None:
            return False
        count, *rest = self._pooled
        if self._one_area:
            self._write(self._to_store(Moments(rest[0], rest[1], count)), count >= self._least)
        else:
            averages = [part / count.clamp(min=1) for part in rest]
            self._write(dict(zip(self.stored_names, averages, strict=True)), count > 0)
        self._pooled = None
        return True

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load; checkpoints of torch from before version 1 lack the count of batches."""
        key = f"{prefix}num_batches_tracked"
        if self.stored_names and key not in state_dict and f"{prefix}running_mean" in state_dict:
            state_dict[key] = self.num_batches_tracked.new_zeros(())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name in self.kept_names:  # assign=True puts the checkpoint's own dtype in
            setattr(self, name, _at_least_float32(getattr(self, name)))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Move or cast as any module, but keep stored statistics in float32 at least."""
        before = {name: getattr(self, name) for name in self.kept_names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name)
            if torch.finfo(new.dtype).bits < 32:
                setattr(self, name, old.to(new.device, torch.float32))
        return self


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a module normalizes with statistics that it stores, in evaluation at least.

    Args:
        module: Any module, of this package or not.

    Returns:
        True where it has a buffer named ``running_…``, as torch's own layers have.

    Example:
        >>> [keeps_statistics(m) for m in (nn.BatchNorm1d(2), nn.LayerNorm(2))]
        [True, False]
    """
    buffers = module.named_buffers(recurse=False)
    return any(name.startswith("running_") for name, _ in buffers)


def in_backward() -> bool:
    """Whether autograd's engine is at work; a compiler plans recomputation by itself."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _at_least_float32(x: Tensor) -> Tensor:
    return x if torch.finfo(x.dtype).bits >= 32 else x.float()
