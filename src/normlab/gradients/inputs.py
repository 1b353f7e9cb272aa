"""Statistics of what goes into a layer, gathered by hooks and folded in once per step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from normlab.core.operation import Standardize
from normlab.core.partition import partition
from normlab.core.statistics import pool
from normlab.kernels.measure import moments
from normlab.kernels.transforms import transformed

Reduce = Callable[[Tensor], Tensor]
Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # rows, mean, biased variance; samples

_CHANNELS = partition("n c * -> c (n *)")


class InputStatistics:
    """Mean and biased variance of a layer's input channels: running ones, and a pending batch.

    All forward passes between two steps are one batch, the union of theirs. A pass counts when its
    output receives a gradient, and once: recomputation by activation checkpointing, passes without
    gradients and passes that nobody differentiates do not count. A pass whose statistics are not
    finite never does.

    Args:
        layer: A dense or convolutional layer.

    Attributes:
        mean: μ, (channels,), 0 before the first step.
        variance: σ², (channels,), 1 before the first step.
        samples: Rows of the last batch: samples, or samples times positions.
        pending: Rows, mean, variance and samples since the last step.
    """

    def __init__(self, layer: nn.Linear | _ConvNd) -> None:
        self.axes = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
        channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        zeros = torch.zeros(channels, dtype=dtype, device=layer.weight.device)
        none = zeros.new_zeros(())
        # No two are one tensor: compiled code would be valid for the first step alone.
        self.mean, self.variance, self.samples, self.rows = zeros, zeros + 1, none, none.clone()
        self.pending: Batch = (none.clone(), zeros.clone(), zeros.clone(), none.clone())
        self.hook = 0

    def watch(self, layer: nn.Module) -> RemovableHandle:
        """Gather from a layer's forward passes; hooks of earlier calls fall silent."""
        self.hook += 1
        return layer.register_forward_hook(_Gather(self), with_kwargs=True)

    def of(self, x: Tensor) -> Batch:
        """Statistics of one input; all 0 where anything is not finite."""
        x = x.detach()
        dense = self.axes == 0
        batched = x.ndim > (1 if dense else 1 + self.axes)
        x = x if batched else x.unsqueeze(0)
        samples, channel_dim = x.shape[0] if batched else 1, -1 if dense else 1
        layout = _CHANNELS.bind(tuple(x.shape), channel_dim=channel_dim)
        found_mean, found_variance, _ = moments(x, layout, Standardize())
        assert found_mean is not None
        assert found_variance is not None
        mean, variance = (t.reshape(-1).to(self.mean.dtype) for t in (found_mean, found_variance))
        valid = mean.isfinite().all() & variance.isfinite().all()
        found = (mean.new_full((), layout.members), mean, variance, mean.new_full((), samples))
        n, mean, variance, count = (torch.where(valid, t, torch.zeros_like(t)) for t in found)
        return n, mean, variance, count

    def add(self, batch: Batch) -> None:
        """Merge one pass into the pending batch."""
        here = batch[1].device
        *old, samples = (t.to(here) for t in self.pending)
        rows, mean, variance = pool(tuple(old), batch[:3], Standardize())
        self.pending = (rows, mean, variance, samples + batch[3])

    def fold(self, rho: float, reduce: Reduce | None, between: bool) -> None:
        """Blend the pending batch in, if there is one.

        Args:
            rho: Weight of what there was.
            reduce: Sum over processes.
            between: Whether the variance takes in ρ(μ_B − μ)², that between this batch and those
                before: it is then that of all samples, each weighted by its age.
        """
        n, mean, variance, samples = self.pending
        if reduce is not None:
            total = reduce(n).clamp(min=1)
            pooled = reduce(n * mean) / total
            variance = reduce(n * (variance + (mean - pooled) ** 2)) / total
            n, mean, samples = reduce(n), pooled, reduce(samples)
        here = n.device
        share = (n > 0).to(mean.dtype) * (1 - rho)
        if between:
            variance = variance + rho * (mean - self.mean.to(here)) ** 2
        self.mean = torch.lerp(self.mean.to(here), mean, share)
        self.variance = torch.lerp(self.variance.to(here), variance, share)
        self.rows = torch.where(n > 0, n, self.rows.to(here))
        self.samples = torch.where(n > 0, samples, self.samples.to(here))
        self.pending = (n * 0, mean * 0, mean * 0, n * 0)

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of all numbers."""
        names = ("pending_rows", "pending_mean", "pending_variance", "pending_samples")
        stored = {n: getattr(self, n) for n in ("mean", "variance", "rows", "samples")}
        return {
            n: t.clone() for n, t in (stored | dict(zip(names, self.pending, strict=True))).items()
        }

    def load_state_dict(self, state: dict[str, Tensor], name: str) -> None:
        """Take over what `state_dict` gave, in this layer's precision and on its device.

        Raises:
            ValueError: If it is of another layer.
        """
        own = self.state_dict()
        if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in own.items()}:
            shapes = {n: tuple(t.shape) for n, t in state.items()}
            raise ValueError(
                f"the layer {name!r} has {len(self.mean)} input channels; its state has {shapes}"
            )
        new = {n: t.detach().clone().to(own[n]) for n, t in state.items()}
        *stored, rows, mean, variance, samples = (new[n] for n in own)
        self.mean, self.variance, self.rows, self.samples = stored
        self.pending = (rows, mean, variance, samples)


class _Gather:
    """Forward hook. It does not keep the statistics alive, and its copies do nothing."""

    def __init__(self, statistics: InputStatistics | None = None) -> None:
        self.statistics = None if statistics is None else weakref.ref(statistics)
        self.number = 0 if statistics is None else statistics.hook

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        statistics = self.statistics() if self.statistics is not None else None
        x = args[0] if args else kwargs["input"]
        if statistics is None or statistics.hook != self.number:
            return
        if not layer.training or not output.requires_grad:
            return
        if not torch.is_grad_enabled() or not x.numel() or transformed(x, output):
            return
        with torch.no_grad():
            batch = statistics.of(x)
            if torch.compiler.is_compiling():  # a gradient hook here would break the graph
                statistics.add(batch)
            else:
                output.register_hook(_Count(statistics, batch))  # type: ignore[no-untyped-call]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Gather, ()


class _Count:
    """Gradient hook on an output: counts the pass, the first time that it is reached."""

    def __init__(self, statistics: InputStatistics, batch: Batch) -> None:
        self.statistics = weakref.ref(statistics)
        self.batch: Batch | None = batch

    def __call__(self, gradient: Tensor) -> None:
        statistics, batch = self.statistics(), self.batch
        self.batch = None
        if statistics is not None and batch is not None:
            with torch.no_grad():
                statistics.add(batch)
