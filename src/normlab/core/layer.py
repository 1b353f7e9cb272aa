"""The layer: y = Ψ ∘ Π⁻¹ ∘ Φ ∘ Π (x), with stored statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from normlab.core import statistics as st
from normlab.core.checks import (
    check_channels,
    check_input,
    check_residual,
    refuse_single,
    warn_of_single,
)
from normlab.core.operation import LearnedEps, Operation
from normlab.core.partition import Layout, PartitionError, partition
from normlab.core.recovery import Affine
from normlab.core.stored import StoringLayer
from normlab.kernels import dispatch
from normlab.kernels.cpu import function
from normlab.kernels.cpu.function import Correction
from normlab.kernels.dropout import dropout
from normlab.kernels.hold import hold
from normlab.kernels.reference import Moments, Spec, deviation, moments


class Normalize(StoringLayer):
    """A normalization layer from its four parts; every named layer is one of these.

    y = dropout(a(γ·x̂ + β)), x̂ = (x − s·μ)/D with statistics μ and D of each area. With a residual
    r, `layer(x, residual=r)`, it is y = a(γ·x̂ + β + r), in one pass where there are kernels.

    Shape:
        (N, C, *positions), or (N, *positions, C) with channel_dim −1, with any number of position
        axes, none included; the output is of the same shape and dtype. A mask is (N, *positions),
        True where valid: statistics leave out the other positions, which come out as 0 and get no
        gradient. A residual is of the shape and dtype of x.

    Args:
        num_channels: C.
        pattern: Π, see `normlab.core.partition`.
        operation: Φ: `Center`, `Scale` or `Standardize`.
        statistics: `Current` (default), `Running` or `Renormalized`.
        recovery: Ψ: `Affine` (default) or `NoRecovery`.
        channel_dim: 1 or −1.
        groups: Length of the axis g of a pattern with ``(g c)``.
        batch_size: Length of the axis n of a pattern with ``(b n)``. A batch that it does not
            divide is split into ⌈N/batch_size⌉ parts of nearly equal size.

    Attributes:
        use: Which statistics are used: ``"auto"`` (the batch's in training, the stored ones in
            evaluation), ``"batch"`` or ``"stored"``. Survives `train` and `eval`.
        update: Whether a forward pass updates the stored statistics: ``"auto"`` (in training),
            True, False or ``"accumulate"`` (pool until `commit`). Survives `train` and `eval`.
        skipped_updates: How many stored values were left alone because the batch's were not
            finite: NaN in an input reaches the output, never the stored statistics.

    Raises:
        PartitionError: If the pattern or its sizes do not fit the channels.
        ValueError: If another argument is out of range; of a residual that does not fit x, or a
            layer that cannot add one, because of its dropout or an activation of its own kind.

    Example:
        >>> import normlab as nl
        >>> pattern = "n (g c) * -> (n g) (c *)"
        >>> layer = nl.Normalize(6, pattern, operation=nl.Standardize(), groups=2)
        >>> layer
        Normalize(6, n (g c) * -> (n g) (c *), groups=2, eps=1e-05)
        >>> y = layer(torch.randn(4, 6, 5))
        >>> y.view(4, 2, 15).mean(-1).abs().max() < 1e-6
        tensor(True)
    """

    placement: str = "after_weight"
    modulated: ClassVar[bool] = False  # γ and β come from elsewhere, and `repr` does not miss them
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    threshold: nn.Parameter | None
    slope: nn.Parameter | None

    def __init__(
        self,
        num_channels: int,
        pattern: str,
        *,
        operation: Operation,
        statistics: st.Statistics | None = None,
        recovery: Affine | None = None,
        channel_dim: int = 1,
        groups: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__()
        check_channels(num_channels, channel_dim)
        self.num_channels, self.channel_dim = num_channels, channel_dim
        self.partition = partition(pattern)
        self.operation = operation
        self.statistics = st.Current() if statistics is None else statistics
        self.recovery = Affine() if recovery is None else recovery
        self.groups, self.batch_size = groups, batch_size
        self._warned = False
        self._jobs = function.Memo()
        self._check_sizes()
        self._register()

    def _check_sizes(self) -> None:
        """Fail at construction, not at the first batch, where sizes cannot fit."""
        samples = self.partition.axes[0]
        if self.partition.variables is not None:
            raise PartitionError(
                f"pattern {str(self.partition)!r} names variables, which whitening decorrelates; "
                "centering, scaling and standardizing take two parts, areas and members"
            )
        if self.groups is not None and len(self.partition.axes[1]) == 1:
            raise PartitionError(
                f"pattern {str(self.partition)!r} has no groups of channels; received "
                f"groups={self.groups}"
            )
        for name, size in (("groups", self.groups), ("batch_size", self.batch_size)):
            if size is not None and not isinstance(size, int):
                raise TypeError(f"{name} is a whole number; received {size!r}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size is at least 1; received {self.batch_size}")
        if len(samples) > 1 and self.batch_size is None:
            raise PartitionError(
                f"pattern {str(self.partition)!r} splits the samples into {samples}: "
                "give batch_size, the length of the inner part"
            )
        count = self.batch_size or 1
        shape, sizes = (count, self.num_channels), self._sizes(count)
        self.partition.bind(shape, channel_dim=self.channel_dim, sizes=sizes)

    def _sizes(self, samples: int, ghosts: bool = True) -> dict[str, int]:
        """Lengths of the split axes for a batch of that many samples, whole if not in ghosts."""
        sizes = {}
        names_n, names_c, _ = self.partition.axes
        if len(names_c) > 1 and self.groups is not None:
            sizes[names_c[0]] = self.groups
        if len(names_n) > 1 and self.batch_size is not None:
            parts = -(-samples // self.batch_size) if ghosts else 1
            sizes[names_n[-1]] = samples // max(parts, 1)
        return sizes

    def _register(self) -> None:
        """Create parameters and buffers."""
        r, c = self.recovery, self.num_channels

        def parameter(present: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape)) if present else None

        self.weight = parameter(r.scale, c)
        self.bias = parameter(r.shift, c)
        self.threshold = parameter(r.activation in ("tlu", "affine_tlu"), c)
        self.slope = parameter(r.activation == "affine_tlu", c)
        self.eps_learned = parameter(isinstance(self.operation.eps, LearnedEps))
        self._register_stored(self.partition.stored_size(c, self._sizes(self.batch_size or 1)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set parameters and stored statistics to their initial values, modules inside too."""
        super().reset_parameters()
        for parameter in (self.threshold, self.slope):
            if parameter is not None:
                parameter.zero_()
        if self.eps_learned is not None:
            self.eps_learned.fill_(cast(LearnedEps, self.operation.eps).init)

    @property
    def activation(self) -> str | None:
        """The activation that is part of this layer, or None."""
        return self.recovery.activation

    def _forward(
        self, x: Tensor, mask: Tensor | None = None, *, residual: Tensor | None = None
    ) -> Tensor:
        """Normalize x, and add the residual, if any, before the activation; see the class."""
        check_input(self, x, mask, self.num_channels, self.channel_dim)
        if residual is not None:
            check_residual(self, x, residual, self.recovery.dropout)
        if x.numel() == 0 and self.statistics.reduce is None:
            # Nothing to average; parameters stay in the graph, with gradient 0.
            y = x + 0 * sum((p.sum() for p in self.parameters()), x.new_zeros(()))
            return y if residual is None else y + residual
        measured: list[tuple[Layout, Moments]] = []
        if self.batch_size is None:
            y = self._sum(x, mask, measured, residual)
        else:
            parts = self._pieces(x, mask, residual)
            ys = [self._sum(part, m, measured, r) for part, m, r in parts]
            y = ys[0] if len(ys) == 1 else torch.cat(ys)
        if measured and self.stored_names:
            self._maybe_update(measured)
        return self._recover(y)

    # As in nn.Module: layers that take other arguments may override it.
    forward: Callable[..., Tensor] = _forward

    def _sum(
        self, x: Tensor, mask: Tensor | None, measured: list[tuple[Layout, Moments]],
        residual: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """One piece, and its residual."""
        if residual is None:
            return self._normalize(x, mask, measured)
        if type(self)._normalize is Normalize._normalize:
            return self._whole(x, mask, measured, residual)
        if self.activation is not None:
            raise ValueError(f"{self} cannot add a residual before its activation")
        y = self._normalize(x, mask, measured) + residual
        return y if mask is None else y.masked_fill(~mask.unsqueeze(self.channel_dim), 0)

    def _pieces(
        self, x: Tensor, mask: Tensor | None, residual: Tensor | None
    ) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
        """The batch, in two where ghost batches of nearly equal size are not all equal."""
        n = x.shape[0]
        assert self.batch_size is not None
        parts = -(-n // self.batch_size)
        if not self._measures or n % max(parts, 1) == 0:
            return [(x, mask, residual)]
        cut = (n % parts) * (n // parts + 1)
        masks, residuals = (
            (None, None) if t is None else (t[:cut], t[cut:]) for t in (mask, residual)
        )
        return [(x[:cut], masks[0], residuals[0]), (x[cut:], masks[1], residuals[1])]

    def _recover(self, y: Tensor) -> Tensor:
        """The parts of Ψ that no kernel fuses."""
        if not self.training or not self.recovery.dropout:
            return y
        channel_dim = self.channel_dim if self.recovery.drop == "channel" else None
        return dropout(y, self.recovery.dropout, channel_dim)

    def _normalize(
        self, x: Tensor, mask: Tensor | None, measured: list[tuple[Layout, Moments]]
    ) -> Tensor:
        """Π, statistics, Φ, Ψ, Π⁻¹ for one piece; moments of the batch are added to `measured`."""
        return self._whole(x, mask, measured)

    def _whole(
        self, x: Tensor, mask: Tensor | None, measured: list[tuple[Layout, Moments]],
        residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """`_normalize`, with a residual."""
        # Once: a parametrization may draw, or count how often it is asked.
        affine = (self._own("weight"), self._own("bias"), self.threshold)
        if mask is None and residual is None and not torch.compiler.is_compiling():
            y = self._again(x, affine, measured)
            if y is not None:
                return y
        measures = self._measures
        sizes = self._sizes(x.shape[0], ghosts=measures)
        layout = self.partition.bind(x.shape, channel_dim=self.channel_dim, sizes=sizes)
        if mask is None and self._compilable:
            # What only waits for an update, which looks for itself, the kernels do not read.
            reads = self._uses_stored or isinstance(self.statistics, st.Renormalized)
            buffers = self._buffers.values() if reads else ()
            kernels = dispatch.kernels_for(
                x, layout, self.operation, self.recovery.activation, affine, buffers, residual
            )
            if kernels is not None:
                return self._compiled(kernels, x, layout, affine, measured, measures, residual)
        view = layout.split(x)
        mask = None if mask is None else layout.per_position(mask)
        weight, bias, threshold, slope = [
            None if p is None else layout.per_channel(p) for p in (*affine, self.slope)
        ]
        eps, reduce = self.eps, self.statistics.reduce
        from_batch = not self._uses_stored
        if self._measures:
            self._check_members(layout, reduce is not None)
            with torch.no_grad():
                given = moments(view.detach(), layout.member_dims, self.operation, mask, reduce)
            measured.append((layout, given))
        if not from_batch:
            given, eps = self._from_stored(layout, eps)
        elif isinstance(self.statistics, st.Renormalized):
            weight, bias = self._renormalize(layout, given, weight, bias)
        spec = Spec(layout.member_dims, self.operation, self.activation)
        y = dispatch.implementation().normalize(
            view, given, weight, bias, threshold, eps, mask, spec,
            from_batch=from_batch, reduce=reduce if from_batch else None, slope=slope,
            residual=None if residual is None else layout.split(residual),
        )  # fmt: skip
        return layout.join(y)

    def _again(
        self, x: Tensor, affine: tuple[Tensor | None, ...],
        measured: list[tuple[Layout, Moments]],
    ) -> Tensor | None:  # fmt: skip
        """A pass by what an earlier one on such a tensor found to compute it, if that holds."""
        if not self._jobs or self._uses_stored:
            return None
        if not function.readable(x, self.num_channels, affine, ()):
            return None
        found: tuple[object, function.Job] | None
        found = self._jobs.get((x.shape, x.stride(), x.dtype))
        if found is None or found[0] != self._options():
            return None
        weight, bias, threshold = affine
        y, used = function.apply(found[1], x, weight, bias, threshold, self.eps)
        measured.append((found[1].layout, used))
        return y

    def _options(self) -> tuple[object, ...]:
        """What decides, beside the tensors, what computes a pass with statistics of its own."""
        sizes = self.channel_dim, self.groups, self.batch_size
        parts = self.partition, self.operation, self.statistics, self.recovery
        return *parts, *sizes, dispatch.backend.name()

    @property
    def _compilable(self) -> bool:
        """Whether compiled kernels have all parts of this layer; r and d are theirs if in γ, β."""
        s = self.statistics
        folded = not isinstance(s, st.Renormalized) or self._one_area
        return self.slope is None and s.reduce is None and folded

    def _compiled(
        self, kernels: ModuleType, x: Tensor, layout: Layout, affine: tuple[Tensor | None, ...],
        measured: list[tuple[Layout, Moments]], measures: bool, residual: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The same through compiled kernels, which measure and normalize in one call."""
        spec = Spec(layout.member_dims, self.operation, self.recovery.activation)
        weight, bias, threshold = affine
        eps, stored = self.eps, self._uses_stored
        renormalized = not stored and isinstance(self.statistics, st.Renormalized)
        if measures:
            self._check_members(layout, False)
        given: Moments | None = None
        correction = self._correction(kernels, x, layout) if renormalized else None
        if correction is not None:
            job = function.job_of(layout, spec, True, kernels)
            z, used = function.apply(
                job, x, weight, bias, threshold, eps, None, residual, correction
            )
            measured.append((layout, used))
            return z
        if measures and (stored or renormalized):
            given = kernels.moments(x, layout, spec)
            measured.append((layout, given))
        if stored:
            given, eps = self._from_stored(layout, eps)
        elif renormalized:
            assert given is not None
            views = (None if p is None else layout.per_channel(p) for p in (weight, bias))
            weight, bias = (
                p.expand(layout.channel_shape).reshape(-1)
                for p in self._renormalize(layout, given, *views)
            )
        more = {} if residual is None else {"residual": residual}
        y: Tensor
        y, used = kernels.normalize(
            x, layout, spec, weight, bias, threshold, eps, given, from_batch=not stored, **more
        )
        if measures and not (stored or renormalized):
            measured.append((layout, used))
            if kernels in dispatch.FAMILIES and residual is None:
                job = function.job_of(layout, spec, True, kernels)
                key = (x.shape, x.stride(), x.dtype)
                function.remember(self._jobs, key, (self._options(), job))
        return y

    def _renormalize(
        self, layout: Layout, given: Moments, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Fold r and d into γ and β: γ·(x̂·r + d) + β = (γ·r)·x̂ + (β + γ·d)."""
        assert isinstance(self.statistics, st.Renormalized)
        assert given.mean is not None
        assert given.moment is not None
        old = [layout.from_stored(self._own(n)) for n in self.stored_names]
        sigma = deviation(given.moment, self.operation, self.eps)
        step = self._own("num_batches_tracked")
        r, d = self.statistics.correction(given.mean, sigma, old[0], old[1], step)
        # The update below writes to the buffers that they are read from.
        return function.folded(weight, bias, hold(r), hold(d))

    def _correction(self, kernels: ModuleType, x: Tensor, layout: Layout) -> Correction | None:
        """r and d for kernels that fold them into γ and β themselves, or None."""
        assert isinstance(self.statistics, st.Renormalized)
        if kernels not in dispatch.FAMILIES:
            return None
        old = [self._own(name) for name in self.stored_names]
        limits = self.statistics.limits(int(self._own("num_batches_tracked")))
        if limits is None or not kernels.corrects(x, layout, self.operation, old):
            return None
        mean, std = old
        return Correction(mean, std, torch.empty_like(mean), torch.empty_like(std), *limits)

    def _check_members(self, layout: Layout, synchronized: bool) -> None:
        """Refuse, or warn of, areas of one member, which come out as zero whatever they held."""
        if layout.members != 1 or not self.operation.erases_single or synchronized:
            return
        if self.partition.mixes_samples():
            refuse_single(self, layout.shape, "layer, group, rms, filter_response")
        if not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            warn_of_single(self, layout.shape, "Use larger groups.")

    def extra_repr(self) -> str:
        """Print the pattern in force and the options that matter."""
        parts = [str(self.num_channels), str(self.partition)]
        shown = {"groups": self.groups, "batch_size": self.batch_size}
        parts += [f"{k}={v}" for k, v in shown.items() if v is not None]
        op, r = self.operation, self.recovery
        if op.p is not None:
            parts.append(f"eps={'learned' if isinstance(op.eps, LearnedEps) else op.eps}")
            if op.p != 2:
                parts.append("p=max" if math.isinf(op.p) else f"p={op.p:g}")
        if self.stored_names:
            parts.append(f"momentum={getattr(self.statistics, 'momentum', None)}")
        standard = (r.scale and r.shift) or self.modulated
        parts += [] if standard else [f"scale={r.scale}, shift={r.shift}"]
        parts += [f"activation={r.activation}"] if r.activation else []
        parts += [f"dropout={r.dropout}"] if r.dropout else []
        parts += [f"mask={r.drop}"] if r.drop != "element" else []
        parts += ["channel_dim=-1"] if self.channel_dim == -1 else []
        return ", ".join(parts + self._more_shown())
