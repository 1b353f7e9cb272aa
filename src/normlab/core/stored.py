"""A layer that keeps statistics between forward passes, under the two policies of `statistics`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from normlab.core import statistics as st
from normlab.core.operation import LearnedEps, Operation
from normlab.core.partition import Layout
from normlab.kernels.reference import Moments, deviation


class StoringLayer(nn.Module):
    """Abstract: stored statistics, what is read from them, and what a forward pass does to them.

    A subclass sets `operation`, `statistics` and `eps_learned`, and calls `_register_stored`.
    """

    operation: Operation
    statistics: st.Statistics
    eps_learned: nn.Parameter | None
    num_batches_tracked: Tensor
    skipped_updates: Tensor

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
            self.register_buffer(name, torch.empty(size))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        skipped = torch.tensor(0, dtype=torch.long)
        self.register_buffer("skipped_updates", skipped, persistent=False)

    def reset_running_stats(self) -> None:
        """Set the stored statistics to mean 0, deviation 1."""
        self._pooled = None
        for name in self.stored_names:
            getattr(self, name).fill_(0.0 if name == "running_mean" else 1.0)
        if self.stored_names:
            self.num_batches_tracked.zero_()
            self.skipped_updates.zero_()

    @property
    def eps(self) -> Tensor | float:
        """ε in force; a tensor where it is learned."""
        eps = self.operation.eps
        if isinstance(eps, LearnedEps):
            return eps.floor + cast(Tensor, self.eps_learned).abs()
        return eps

    @property
    def use(self) -> st.Use:
        """The `use` policy."""
        return self._use

    @use.setter
    def use(self, value: st.Use) -> None:
        if value not in ("auto", "batch", "stored"):
            raise ValueError(f"use is 'auto', 'batch' or 'stored'; received {value!r}")
        if value == "stored" and not self.stored_names:
            raise ValueError(f"use='stored' needs stored statistics, and {self} keeps none")
        self._use = value

    @property
    def update(self) -> st.Update:
        """The `update` policy."""
        return self._update

    @update.setter
    def update(self, value: st.Update) -> None:
        if value not in ("auto", True, False, "accumulate"):
            raise ValueError(f"update is 'auto', True, False or 'accumulate'; received {value!r}")
        self._update = value

    @property
    def _uses_stored(self) -> bool:
        """Whether this forward pass takes stored statistics."""
        wanted = not self.training if self._use == "auto" else self._use == "stored"
        return wanted and bool(self.stored_names)

    def _from_stored(self, layout: Layout, eps: Tensor | float) -> tuple[Moments, Tensor | float]:
        """The stored statistics as moments, and the ε to add to them."""
        stored = {n: layout.from_stored(getattr(self, n)) for n in self.stored_names}
        mean = stored.get("running_mean")
        if "running_std" in stored:  # ε is inside it already
            return Moments(mean, stored["running_std"] ** 2, layout.members), 0.0
        moment = stored.get("running_var")
        if "running_deviation" in stored:
            power = self.operation.power
            moment = stored["running_deviation"] ** power
        return Moments(mean, moment, layout.members), eps

    @torch.no_grad()
    def _maybe_update(self, layout: Layout, given: Moments) -> None:
        """Apply the update policy to the batch's moments."""
        policy = self.training if self._update == "auto" else self._update
        if not self.stored_names or policy is False:
            return
        batch = [t for t in (given.mean, given.moment) if t is not None]
        buffers = [getattr(self, n) for n in self.stored_names]
        if not st.writable(batch, buffers):
            return
        if policy == "accumulate":
            self._pool(layout, given)
            return
        self._write({n: layout.to_stored(v) for n, v in self._to_store(given).items()})

    def _to_store(self, given: Moments) -> dict[str, Tensor]:
        """What each buffer averages, still per area."""
        values = {}
        for name in self.stored_names:
            if name == "running_mean":
                values[name] = cast(Tensor, given.mean)
            elif name == "running_std":
                values[name] = deviation(cast(Tensor, given.moment), self.operation, self.eps)
            else:
                values[name] = st.deviation_to_store(
                    given, self.operation, getattr(self.statistics, "bessel", True)
                )
        return values

    def _write(self, values: dict[str, Tensor]) -> None:
        """Blend a batch's statistics into the buffers, where all of a channel's are finite."""
        self.num_batches_tracked.add_(1)
        momentum = getattr(self.statistics, "momentum", None)
        weight = 1.0 / self.num_batches_tracked.float() if momentum is None else momentum
        valid = torch.stack([v.isfinite() for v in values.values()]).all(0)
        self.skipped_updates.add_((~valid).sum())
        for name, value in values.items():
            st.blend(getattr(self, name), value, weight, valid)

    def _pool(self, layout: Layout, given: Moments) -> None:
        """Merge a batch's moments into those that wait for `commit`."""
        like = given.moment if given.moment is not None else given.mean
        assert like is not None
        count = torch.as_tensor(given.size, device=like.device, dtype=like.dtype)
        zero = torch.zeros_like(like)
        parts = (count.expand(like.shape), given.mean if given.mean is not None else zero,
                 given.moment if given.moment is not None else zero)  # fmt: skip
        new = tuple(layout.to_stored(part) for part in parts)
        self._pooled = new if self._pooled is None else st.pool(self._pooled, new, self.operation)

    @torch.no_grad()
    def commit(self) -> bool:
        """Fold what ``update="accumulate"`` pooled into the stored statistics, as one batch.

        Returns:
            Whether there was anything.
        """
        if self._pooled is None:
            return False
        count, mean, moment = self._pooled
        self._write(self._to_store(Moments(mean, moment, count)))
        self._pooled = None
        return True

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Move or cast as any module, but keep stored statistics in float32 at least."""
        before = {name: getattr(self, name) for name in self.stored_names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name)
            if torch.finfo(new.dtype).bits < 32:
                setattr(self, name, old.to(new.device, torch.float32))
        return self
