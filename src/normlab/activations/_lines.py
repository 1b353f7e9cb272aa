"""Layers that are one line for each map, y = (x − μ_nc)·a_nc + b_nc.

A map is a sample's channel with all its positions. Statistics of wider areas follow from those of
the maps, so that what tells such methods apart is a function of a few N × C numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from normlab.activations._conditions import per_map
from normlab.core.checks import check_input
from normlab.core.layer import Normalize
from normlab.core.operation import Standardize
from normlab.core.partition import Layout
from normlab.core.recovery import Affine
from normlab.core.statistics import Statistics
from normlab.kernels.cpu import maps as kernels
from normlab.kernels.hold import copied
from normlab.kernels.reference import Moments, accumulated, divisor, masked, members, total

Parameters = tuple[Any, ...]  # tensors, and None where there is no γ or β
Line = tuple[Tensor, Tensor]


class Maps(NamedTuple):
    """Moments of maps, (N, C), or of sets of them.

    Attributes:
        mean: μ.
        variance: σ², biased.
        size: Number of members: one for all, or of shape (N, 1), or that of the moments.
    """

    mean: Tensor
    variance: Tensor
    size: Tensor | int


class LineNorm(Normalize):
    """Abstract: a subclass says in `_line` what a and b are, and in `_batch` what is stored.

    What is stored has shape (sets, C).
    """

    sets: int = 1

    def __init__(
        self,
        num_channels: int,
        eps: float,
        statistics: Statistics | None = None,
        recovery: Affine | None = None,
        channel_dim: int = 1,
        *,
        pattern: str = "n c * -> c (n *)",
        groups: int | None = None,
    ) -> None:
        super().__init__(
            num_channels,
            pattern,
            operation=Standardize(eps=eps),
            statistics=statistics,
            recovery=recovery,
            channel_dim=channel_dim,
            groups=groups,
        )

    def _register_stored(self, size: int) -> None:
        """Create the buffers, one after another for each set."""
        super()._register_stored(size * self.sets)

    def _used(self) -> Parameters:
        """Parameters that a and b are differentiated for."""
        return self.weight, self.bias

    def _line(self, maps: Maps, parameters: Parameters, stored: Maps | None, given: Any) -> Line:
        """a and b, (N, C) or broadcast to it.

        It runs again in the backward pass, and so may depend on nothing that a forward pass
        changes: stored statistics and whatever else varies come as arguments.

        Args:
            maps: Of x.
            parameters: Those of `_used`, in the dtype of the moments.
            stored: Stored statistics if these are to be used, else None.
            given: What the forward pass goes by beside x.

        Each method has its own.
        """
        raise NotImplementedError

    def _batch(self, maps: Maps, parameters: Parameters, given: Any) -> Maps:
        """Statistics of the batch that are stored."""
        del parameters, given
        return merged(maps, 0)

    def _known_to_kernels(self, stored: Maps | None) -> kernels.Known | None:
        """What makes kernels compute `_line` and `_batch` too, if they know these."""
        return None

    def _given(self, x: Tensor) -> Any:
        """What a forward pass goes by beside x, where it is given nothing else."""
        return None

    def _normalize(
        self, x: Tensor, mask: Tensor | None, measured: list[tuple[Layout, Moments]]
    ) -> Tensor:
        """As the base's; statistics of the batch are added to `measured`."""
        return self._of_lines(x, mask, self._given(x), self._used(), measured)

    def _lines(
        self, x: Tensor, mask: Tensor | None, given: Any, used: Parameters | None = None
    ) -> Tensor:
        """Normalize x, given something more than x, or with other tensors than those of `_used`."""
        check_input(self, x, mask, self.num_channels, self.channel_dim)
        if x.numel() == 0:
            return self._forward(x, mask)
        measured: list[tuple[Layout, Moments]] = []
        y = self._of_lines(x, mask, given, self._used() if used is None else used, measured)
        if measured:
            self._maybe_update(measured)
        return self._recover(y)

    def _of_lines(
        self, x: Tensor, mask: Tensor | None, given: Any, parameters: Parameters,
        measured: list[tuple[Layout, Moments]],
    ) -> Tensor:  # fmt: skip
        """The line of each map; statistics of the batch are added to `measured`."""
        sizes = self._sizes(x.shape[0])
        layout = self.partition.bind(x.shape, channel_dim=self.channel_dim, sizes=sizes)
        own = kernels.MAPS.bind(x.shape, channel_dim=self.channel_dim)
        if self._measures:
            self._check_members(layout, synchronized=False)
        stored = self._stored() if self._uses_stored else None
        channels = None
        if kernels.supports(x, parameters, mask):

            def middle(mean: Tensor, variance: Tensor, *parameters: Tensor | None) -> Line:
                return self._line(Maps(mean, variance, own.members), parameters, stored, given)

            known = self._known_to_kernels(stored)
            y, mean, variance, channels = kernels.fused(
                "line", x, own, middle, *parameters, known=known
            )
            found = Maps(mean, variance, own.members)
        else:
            where = None if mask is None else own.per_position(mask)
            z, found = of_maps(x, where, own)
            line = self._line(found, _widened(parameters, z.dtype), stored, given)
            shape = own.lengths[:2]
            a, b = (per_map(t.expand(shape), x, self.channel_dim) for t in line)
            y = masked(torch.addcmul(b, z, a), where).to(x.dtype)
        if channels is not None:
            measured.append(self._flat(Maps(*channels, layout.members)))
        elif self._updates:
            with torch.no_grad():
                batch = self._batch(found, _widened(parameters, found.mean.dtype), given)
            measured.append(self._flat(batch))
        return y

    def _flat(self, batch: Maps) -> tuple[Layout, Moments]:
        """What is stored of a batch, as if each set had channels of its own."""
        mean, variance, size = batch
        size = size.expand(mean.shape).reshape(1, -1) if isinstance(size, Tensor) else size
        flat = Moments(mean.reshape(1, -1), variance.reshape(1, -1), size)
        return self.partition.bind((1, mean.numel())), flat

    def _stored(self) -> Maps:
        """The stored mean and variance, (sets, C), as they are before this forward pass."""
        mean, variance = (
            copied(getattr(self, name)).view(self.sets, -1)
            for name in ("running_mean", "running_var")
        )
        return Maps(mean, variance, 0)


def _widened(parameters: Parameters, dtype: torch.dtype) -> Parameters:
    return tuple(None if p is None else p.to(dtype) for p in parameters)


def of_maps(x: Tensor, mask: Tensor | None, layout: Layout) -> tuple[Tensor, Maps]:
    """z = x − μ of each map, and the maps' moments; the mean is corrected once.

    z is what both σ² and y are made of, so that it alone is kept for the gradient.
    """
    dims = tuple(i for i, name in enumerate(layout.names) if name == "*")
    x = masked(accumulated(x), mask)
    size = members(x, dims, mask, None)
    count = divisor(size)
    rough = total(x, dims) / count
    z = masked(x - rough, mask)
    correction = total(z, dims) / count
    z = masked(z - correction, mask)
    variance = total(z * z, dims) / count
    # Lengths are tensors to the tracer of TorchScript, masked or not.
    if mask is not None and isinstance(size, Tensor):  # as everywhere: no valid member, deviation 1
        variance = variance.masked_fill(size == 0, 1)
        size = size.reshape(layout.lengths[0], 1)
    shape = layout.lengths[:2]
    return z, Maps((rough + correction).reshape(shape), variance.reshape(shape), size)


def merged(maps: Maps, dim: int) -> Maps:
    """Moments over an axis of maps: σ² = mean(σ²_map + (μ_map − μ)²), weighted by their sizes."""
    mean, variance, size = maps
    whole: Tensor | int
    if isinstance(size, int):
        whole, shares = size * mean.shape[dim], mean.new_tensor(1 / mean.shape[dim])
    else:
        sizes = size.expand(mean.shape)
        whole = sizes.sum(dim, keepdim=True)
        shares = sizes / whole.clamp(min=1)
    middle = (shares * mean).sum(dim, keepdim=True)
    # The mean once more, from differences.
    middle = middle + (shares * (mean - middle)).sum(dim, keepdim=True)
    spread = (shares * (variance + (mean - middle) ** 2)).sum(dim, keepdim=True)
    return Maps(middle, spread, whole)


def grouped(maps: Maps, groups: int) -> Maps:
    """Moments of groups of neighbouring channels of each sample, (N, groups)."""
    mean, variance, size = maps
    shape = (mean.shape[0], groups, mean.shape[1] // groups)
    # A mask is the same for all channels, so that those of a sample weigh alike.
    mean, variance, _ = merged(Maps(mean.reshape(shape), variance.reshape(shape), 1), 2)
    return Maps(mean.squeeze(2), variance.squeeze(2), size)


def area(over: str, maps: Maps, stored: Maps | None, groups: int = 1) -> Maps:
    """Moments of what a map shares its statistics with, broadcastable to (N, C).

    Args:
        over: ``"instance"``, ``"layer"``, ``"group"`` or ``"batch"``.
        maps: Moments of the maps.
        stored: Those that take the batch's place, or None.
        groups: Number of groups of channels.

    Returns:
        Their moments.
    """
    if over == "instance":
        return maps
    if over == "layer":
        return merged(maps, 1)
    if over == "batch":
        return merged(maps, 0) if stored is None else stored
    each = maps.mean.shape[1] // groups
    mean, variance, size = grouped(maps, groups)
    return Maps(mean.repeat_interleave(each, 1), variance.repeat_interleave(each, 1), size)


def standardized(
    maps: Maps, shared: Maps, eps: Tensor | float,
    scale: Tensor | None = None, shift: Tensor | None = None,
) -> Line:  # fmt: skip
    """a and b of scale·(x − μ)/√(σ² + ε) + shift, with the moments of an area.

    Args:
        maps: Moments of the maps.
        shared: Those of the area, broadcastable to them.
        eps: ε.
        scale: Broadcastable to (N, C), or None for 1.
        shift: Likewise, or None for 0.
    """
    a = (shared.variance + eps).rsqrt()
    # A difference of means, which does not lose a large mean's digits.
    b = a.new_zeros(()) if shared is maps else (maps.mean - shared.mean) * a
    return affine(a, b, scale, shift)


def affine(a: Tensor, b: Tensor, weight: Tensor | None, bias: Tensor | None) -> Line:
    """a and b of γ·y + β."""
    a, b = (a, b) if weight is None else (a * weight, b * weight)
    return a, b if bias is None else b + bias
