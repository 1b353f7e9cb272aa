"""Whitening: y = γ·W·(x − μ) + β, with W a function of the covariance Σ of an area's variables.

The pattern has three parts: areas, variables and members. In ``n (g c) * -> g c (n *)`` the c
channels of each group g are decorrelated over all samples and positions; in
``n (g c) * -> n g (c *)`` the groups of a sample are the variables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from normlab.core import statistics as st
from normlab.core.checks import check_channels, check_input, refuse_single, warn_of_single
from normlab.core.operation import Standardize
from normlab.core.partition import Layout, PartitionError, partition
from normlab.core.recovery import Affine
from normlab.core.stored import StoringLayer
from normlab.kernels import dispatch, matrices, whiten
from normlab.kernels.cpu.function import direct
from normlab.kernels.hold import copied
from normlab.kernels.reference import accumulated, counted, masked
from normlab.kernels.transforms import transformed
from normlab.kernels.whiten import Covariance

Stored = Literal["matrix", "covariance"]
Whitening = Callable[[Tensor], Tensor]
"""From Σ + εI, shape (A, v, v), to W with W(Σ + εI)Wᵀ = I."""


def width_groups(channels: int, width: int = 16) -> int:
    """Return the fewest groups that divide the channels and hold at most `width` each.

    Example:
        >>> [width_groups(c) for c in (6, 16, 24, 64, 17)]
        [1, 1, 2, 4, 17]
    """
    fitting = (g for g in range(1, channels + 1) if channels % g == 0 and channels // g <= width)
    return next(fitting, 1)


class Whiten(StoringLayer):
    """A whitening layer from its parts; every named one is one of these.

    Args:
        num_channels: C.
        pattern: Π, with three parts on its right.
        whitening: From Σ + εI to W.
        groups: Length of the axis g.
        eps: ε, added to the diagonal of Σ.
        statistics: `Running` or `Current`.
        stored: What `Running` averages beside μ: ``"matrix"``, W itself, or ``"covariance"``, Σ,
            of which evaluation computes W.
        recovery: Ψ: γ and β per channel.
        channel_dim: 1 or −1.
        shown: More to print.

    Shape:
        (N, C, *) → (N, C, *). A mask is (N, *positions), True where valid.

    Raises:
        PartitionError: If `groups` does not divide C, or the pattern names no variables.
        ValueError: If another argument is out of range.

    Example:
        >>> from normlab.kernels.whiten import inverse_root
        >>> pattern = "n (g c) * -> g c (n *)"
        >>> layer = Whiten(8, pattern, inverse_root, groups=2, eps=1e-3, statistics=st.Running())
        >>> layer
        Whiten(8, n (g c) * -> g c (n *), groups=2, eps=0.001, momentum=0.1, stored=matrix)
    """

    placement: str = "after_weight"
    more_stored: ClassVar[tuple[str, ...]] = ()  # one number a channel each
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_channels: int,
        pattern: str,
        whitening: Whitening,
        *,
        groups: int,
        eps: float,
        statistics: st.Running | st.Current,
        stored: Stored = "matrix",
        recovery: Affine | None = None,
        channel_dim: int = 1,
        shown: str = "",
    ) -> None:
        super().__init__()
        check_channels(num_channels, channel_dim)
        if stored not in get_args(Stored):
            raise ValueError(f"stored is 'matrix' or 'covariance'; received {stored!r}")
        if not isinstance(groups, int):
            raise TypeError(f"groups is a whole number; received {groups!r}")
        self.num_channels, self.channel_dim, self.groups = num_channels, channel_dim, groups
        self.partition = partition(pattern)
        if self.partition.variables is None:
            raise PartitionError(f"pattern {pattern!r} names no variables to decorrelate")
        self._bind((1, num_channels))  # fails where the groups do not fit
        self.operation, self.eps_learned = Standardize(eps=eps), None
        self.statistics, self.stored, self.whitening = statistics, stored, whitening
        self.recovery = Affine() if recovery is None else recovery
        self._shown, self._warned = shown, False
        self.weight = nn.Parameter(torch.empty(num_channels)) if self.recovery.scale else None
        self.bias = nn.Parameter(torch.empty(num_channels)) if self.recovery.shift else None
        self._register_buffers()
        self.reset_parameters()

    def _bind(self, shape: tuple[int, ...]) -> Layout:
        """The layout of tensors of that shape; (1, C) is that of the channels alone."""
        channel_dim = self.channel_dim if len(shape) > 2 else 1
        sizes = {self.partition.axes[1][0]: self.groups}
        return self.partition.bind(shape, channel_dim=channel_dim, sizes=sizes)

    def _register_buffers(self) -> None:
        if isinstance(self.statistics, st.Current):
            return
        areas, width, _ = self._bind((1, self.num_channels)).grouped
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.stored_names = ("running_mean", f"running_{self.stored}", *self.more_stored)
        shapes = [(areas * width,), (areas, width, width), *[(areas * width,)] * 2]
        for name, shape in zip(self.stored_names, shapes, strict=False):
            self.register_buffer(name, torch.empty(shape, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        skipped = torch.tensor(0, dtype=torch.long)
        self.register_buffer("skipped_updates", skipped, persistent=False)

    def reset_running_stats(self) -> None:
        """Set the stored mean to 0, the stored matrix to the identity, deviations to 1."""
        super().reset_running_stats()
        if self.stored_names:
            square = getattr(self, self.stored_names[1])
            square.copy_(torch.eye(square.shape[-1]).to(square).expand_as(square))

    @property
    def activation(self) -> None:
        """No activation is part of this layer."""
        return None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Whiten x; see the class."""
        return self._run(x, mask)

    def _run(self, x: Tensor, mask: Tensor | None, **given: Any) -> Tensor:
        """`_compute` in float32 at least, on inputs that it can take; `given` are more of them."""
        check_input(self, x, mask, self.num_channels, self.channel_dim)
        if x.numel() == 0 and self.statistics.reduce is None:
            return x + 0 * sum((p.sum() for p in self.parameters()), x.new_zeros(()))
        with whiten.full_precision(x):
            mask = None if mask is None else mask.unsqueeze(self.channel_dim)
            y = masked(self._compute(accumulated(x), mask, **given), mask).to(x.dtype)
        return _laid_out_as(x, y)

    def _compute(self, x: Tensor, mask: Tensor | None, **given: Any) -> Tensor:
        """y of x in float32 at least; the mask broadcasts against x."""
        layout = self._bind(tuple(x.shape))
        return self._recover(*self._statistics(x, mask, layout), layout, **given)

    def _statistics(
        self, x: Tensor, mask: Tensor | None, layout: Layout
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """x − μ in areas, variables and members, or in pieces; its rest; W; where W is finite."""
        z, valid = self._grouped(x, mask, layout)
        found, w = None, None
        parts: tuple[Tensor, Tensor | None, Tensor, Tensor | None]
        if self._measures:
            self._check_members(layout)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self._uses_stored):
                found = self._measure(z, valid, layout)
        if self._uses_stored:
            mean, stored = self._from_buffers(z)
            parts = masked(z - mean, valid), None, stored, None
        else:
            assert found is not None
            w, finite = self._matrix(found.matrix)
            parts = found.centered, found.rest, w, finite
            w = torch.where(finite, w.detach(), torch.nan) if self._updates else None
        if found is not None:
            self._follow(found, w)
        return parts

    def _grouped(
        self, x: Tensor, mask: Tensor | None, layout: Layout
    ) -> tuple[Tensor, Tensor | None]:
        """x in areas, variables and members, 0 where masked, or in pieces; where it is valid."""
        valid = None if mask is None else layout.regroup(mask.expand(x.shape))
        inside = self._in_place(x, layout) if mask is None else None
        return masked(layout.regroup(x), valid) if inside is None else inside, valid

    def _measure(self, z: Tensor, valid: Tensor | None, layout: Layout) -> Covariance:
        """The statistics of a batch."""
        if z.ndim == 4:
            return matrices.covariance(z)
        return whiten.covariance(z, valid, self.statistics.reduce)

    def _in_place(self, x: Tensor, layout: Layout) -> Tensor | None:
        """x as (pieces, areas, variables, members), where products need no copy of it."""
        if torch.compiler.is_compiling() or dispatch.backend.name() == "reference":
            return None
        if self.statistics.reduce is not None or not direct(x):
            return None
        found = matrices.pieces(x, layout)
        return matrices.pieces(x.contiguous(), layout) if found is None else found

    def _matrix(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """W of Σ, and where it is one: which Σ are finite."""
        a, finite = whiten.ridged(sigma, self.eps)
        return self.whitening(a), finite

    def _from_buffers(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The stored μ and W."""
        # Copies: an update before the backward pass must not change what this pass has used.
        mean, square = (copied(getattr(self, name)) for name in self.stored_names[:2])
        if self.stored == "covariance":
            square, _ = self._matrix(square)
        return mean.to(z.dtype).view(*square.shape[:2], 1), square.to(z.dtype)

    def _recover(
        self,
        centered: Tensor,
        rest: Tensor | None,
        w: Tensor,
        finite: Tensor | None,
        layout: Layout,
    ) -> Tensor:
        """γ·W·(x − μ) + β, in the layout of x; NaN where W is not finite."""
        gamma, beta = (
            None if p is None else p.to(centered.dtype) for p in (self.weight, self.bias)
        )
        rows = all(self.partition.role(name) != "channel" for name in self.partition.members)
        if rows:  # γ multiplies rows of W, so that nothing else of the size of x is kept
            shape = (self.groups, -1, 1)
            w = self._turned(w)
            w = w if gamma is None else w * gamma.view(shape)
            w = w if finite is None else torch.where(finite, w, torch.nan)
            return product(w, centered, rest, None if beta is None else beta.view(shape), layout)
        w = w if finite is None else torch.where(finite, w, torch.nan)
        y = layout.split(product(w, centered, rest, None, layout).contiguous())
        y = y if gamma is None else y * layout.per_channel(gamma)
        return layout.join(y if beta is None else y + layout.per_channel(beta))

    def _turned(self, w: Tensor) -> Tensor:
        """What a method multiplies W by from the left, before γ: nothing."""
        return w

    @torch.no_grad()
    def _follow(self, found: Covariance, w: Tensor | None) -> None:
        """Apply the update policy to the statistics of a batch."""
        buffers = [getattr(self, n) for n in self.stored_names]
        if not self._updates or not st.writable([found.mean, found.matrix], buffers):
            return
        if self._update == "accumulate":
            self._pool_covariance(found)
            return
        self._store(found, w)

    def _pool_covariance(self, found: Covariance) -> None:
        """Merge with what waits for `commit`: the statistics of the union of micro-batches."""
        if self._pooled is not None:
            found = whiten.pooled(self._union(), found)
        size = counted(found.size, found.mean)
        within = () if found.within is None else (found.within,)
        self._pooled = (size, found.mean, found.matrix, *within)

    def _union(self) -> Covariance:
        """What waits for `commit`."""
        assert self._pooled is not None
        size, mean, matrix, *within = self._pooled
        return Covariance(mean, matrix, size, mean, within=within[0] if within else None)

    @torch.no_grad()
    def commit(self) -> bool:
        """Fold what ``update="accumulate"`` pooled into the stored statistics, as one batch.

        Returns:
            Whether there was anything.
        """
        if self._pooled is None:
            return False
        self._store(self._union(), None)
        self._pooled = None
        return True

    def _store(self, found: Covariance, w: Tensor | None) -> None:
        """Blend a batch's statistics into the buffers, by whole groups.

        A group whose statistics are not all finite is left alone, and its channels are counted.
        """
        values = self._averaged(found, w)
        all_of = torch.cat(list(values.values()), -1)
        finite = all_of.isfinite().all(-1).all(-1).view(-1, 1, 1)
        # The covariance of a single member is 0 whatever the data are like.
        present = (counted(found.size, all_of) >= 2).expand_as(finite)
        self.skipped_updates.add_((present & ~finite).sum() * all_of.shape[1])
        self.num_batches_tracked.add_(present.any())
        momentum = getattr(self.statistics, "momentum", None)
        for name, value in values.items():
            buffer = getattr(self, name).view_as(value)
            count = self.num_batches_tracked.to(buffer.dtype)
            weight = 1 / count if momentum is None else momentum
            st.blend(buffer, value, weight, finite & present)

    def _averaged(self, found: Covariance, w: Tensor | None) -> dict[str, Tensor]:
        """What each buffer averages, of shape (areas, variables, any)."""
        square = found.matrix
        if self.stored == "matrix":
            if w is None:
                new, finite = self._matrix(found.matrix)
                w = torch.where(finite, new, torch.nan)
            square = w
        parts = (found.mean, square, *(() if found.within is None else (found.within,)))
        return dict(zip(self.stored_names, parts, strict=False))  # a subclass adds its own

    def _check_members(self, layout: Layout) -> None:
        """Refuse, or warn of, areas of one member, which come out as zero whatever they held."""
        if layout.members != 1 or self.statistics.reduce is not None:
            return
        if self.partition.mixes_samples():
            refuse_single(self, layout.shape, "layer, group, group_whitening")
        if not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            warn_of_single(self, layout.shape, "Use fewer groups.")

    def extra_repr(self) -> str:
        """Print the pattern in force and the options that matter."""
        parts = [str(self.num_channels), str(self.partition), f"groups={self.groups}"]
        parts += [f"eps={self.operation.eps}"] + ([self._shown] if self._shown else [])
        if self.stored_names:
            momentum = getattr(self.statistics, "momentum", None)
            parts += [f"momentum={momentum}", f"stored={self.stored}"]
        r = self.recovery
        parts += [] if r.scale and r.shift else [f"scale={r.scale}, shift={r.shift}"]
        parts += ["channel_dim=-1"] if self.channel_dim == -1 else []
        return ", ".join(parts + self._more_shown())


def product(
    w: Tensor, centered: Tensor, rest: Tensor | None, beta: Tensor | None, layout: Layout
) -> Tensor:
    """W·(z − rest) + β, in the layout of x."""
    if centered.ndim == 3:
        y = w @ centered if beta is None else torch.baddbmm(beta, w, centered)
        return layout.undo(y)
    shift = w.new_zeros(*w.shape[:2], 1) if rest is None else -(w @ rest)
    return matrices.joined(
        matrices.product(w, centered, shift if beta is None else beta + shift), layout
    )


def _laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """y in the memory format of x."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.ndim in formats and not transformed(x) and not x.is_contiguous():
        wanted = formats[x.ndim]
        if x.is_contiguous(memory_format=wanted):
            return y.contiguous(memory_format=wanted)
    return y.contiguous()


class BatchWhitening(Whiten):
    """Abstract: the channels of each group whitened over all samples and positions.

    A subclass names its `whitening_of`; its arguments are documented there.
    """

    whitening_of: ClassVar[Whitening]

    def __init__(
        self,
        num_channels: int,
        groups: int | None = None,
        eps: float = 1e-3,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        stored: Stored = "matrix",
        channel_dim: int = 1,
        reduce: st.Reduce | None = None,
    ) -> None:
        super().__init__(
            num_channels,
            "n (g c) * -> g c (n *)",
            type(self).whitening_of,
            groups=width_groups(num_channels) if groups is None else groups,
            eps=eps,
            statistics=st.Running(momentum, reduce, bessel=False),
            stored=stored,
            recovery=Affine(affine, affine),
            channel_dim=channel_dim,
        )
