"""Π: which elements of a tensor share statistics, as a named-axis pattern.

A pattern such as ``n (g c) * -> (n g) (c *)`` names the axes of a tensor on its left (samples,
channels, all positions) and regroups them on its right into *areas*, which share nothing, and
*members*, over which statistics are taken. Whitening has a third part between them, *variables*:
``n (g c) * -> g c (n *)`` whitens the c channels of each group g over all samples and positions.

A pattern is parsed once; binding it to a shape gives a `Layout`, which regroups tensors and undoes
the regrouping exactly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

_TOKEN = re.compile(r"\(([^()]*)\)|(\S+)")
_NAME = re.compile(r"[a-z][a-z0-9_]*|\*")
_ROLES = ("sample", "channel", "position")


class PartitionError(ValueError):
    """A pattern that cannot be parsed, or that does not fit a tensor's shape."""


@dataclass(frozen=True)
class Partition:
    """A parsed pattern; make one with `partition`.

    Attributes:
        pattern: The text it was parsed from, with white space made regular.
        axes: The names that each of the three axes (samples, channels, positions) splits into,
            outer first.
        areas: Names whose combinations do not share statistics.
        variables: Names of the variables that whitening decorrelates; None for other operations.
        members: Names over which statistics are taken.
        shared: Whether all samples of a batch share the areas of their channels.
    """

    pattern: str
    axes: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    areas: tuple[str, ...]
    variables: tuple[str, ...] | None
    members: tuple[str, ...]
    # Not a cached property: what a tracer is the first to read, it has to trace the lock of.
    shared: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shared = all(self.role(name) == "channel" for name in self.areas)
        object.__setattr__(self, "shared", shared)

    def __str__(self) -> str:
        return self.pattern

    def __hash__(self) -> int:
        return hash(self.pattern)  # says it all, and a text remembers its hash

    def role(self, name: str) -> str:
        """Return ``"sample"``, ``"channel"`` or ``"position"``: the axis that `name` is part of."""
        return next(r for r, names in zip(_ROLES, self.axes, strict=True) if name in names)

    def mixes_samples(self) -> bool:
        """Whether an area holds members of more than one sample."""
        return any(self.role(name) == "sample" for name in self.members)

    def stored_size(self, channels: int, sizes: Mapping[str, int] | None = None) -> int:
        """Return how many statistics a layer of that many channels stores (K)."""
        parts = self._split(self.axes[1], channels, sizes or {}, "channel")
        return prod([size for name, size in parts if name in self.areas])

    def bind(
        self, shape: Sequence[int], *, channel_dim: int = 1, sizes: Mapping[str, int] | None = None
    ) -> Layout:
        """Fit the pattern to a tensor shape.

        Args:
            shape: (N, C, *positions), or (N, *positions, C) where channel_dim is -1.
            channel_dim: 1 or -1.
            sizes: Lengths of split axes, e.g. ``{"g": 8}``; one name of each split may be left out.

        Returns:
            The layout of tensors of this shape.

        Raises:
            PartitionError: If the shape has under two axes or a split does not divide its axis.

        Example:
            >>> import torch
        >>> layout = partition("n (g c) * -> (n g) (c *)").bind((2, 6, 5), sizes={"g": 3})
            >>> x = torch.arange(60.0).reshape(2, 6, 5)
            >>> layout.regroup(x).shape, torch.equal(layout.undo(layout.regroup(x)), x)
            (torch.Size([6, 10]), True)
        """
        if not torch.compiler.is_compiling():
            known = tuple(sizes.items()) if sizes else ()
            try:
                return _bound(self, tuple(shape), channel_dim, known)
            except TypeError:
                pass  # lengths that a tracer keeps open have no hash
        return self._bind(shape, channel_dim, sizes or {})

    def _bind(self, shape: Sequence[int], channel_dim: int, known: Mapping[str, int]) -> Layout:
        """The layout of a shape; see `bind`."""
        if len(shape) < 2:
            raise PartitionError(
                f"pattern {self.pattern!r} needs at least a sample and a channel axis; "
                f"received shape {tuple(shape)}. Add a batch axis with x.unsqueeze(0)."
            )
        if channel_dim not in (1, -1):
            raise PartitionError(f"channel_dim is 1 or -1; received {channel_dim}")
        n_names, c_names, _ = self.axes
        last = channel_dim == -1
        channels, positions = (shape[-1], shape[1:-1]) if last else (shape[1], shape[2:])
        parts_n = [(n, s) for n, s in self._split(n_names, shape[0], known, "sample")]
        parts_c = [(n, s) for n, s in self._split(c_names, channels, known, "channel")]
        parts_p = [("*", s) for s in positions]
        ordered = parts_n + (parts_p + parts_c if last else parts_c + parts_p)
        dims = tuple(i for i, (name, _) in enumerate(ordered) if name in self.members)
        stored = {name for name in self.areas if name in c_names}
        return Layout(
            partition=self,
            shape=tuple(shape),
            names=tuple(name for name, _ in ordered),
            split_shape=tuple(size for _, size in ordered),
            channel_dim=channel_dim,
            member_dims=dims,
            members=prod([ordered[i][1] for i in dims]),
            lengths=(shape[0], channels, prod(positions)),
            blocks=self._blocks(dict(ordered)),
            stored_shape=tuple(size if name in stored else 1 for name, size in ordered),
        )

    def _blocks(self, sizes: Mapping[str, int]) -> tuple[int, int] | None:
        """See `Layout.blocks`; `sizes` of all axes but the positions."""
        if "*" not in self.members or self.variables is not None:
            return None
        found = []
        for axis in self.axes[:2]:
            inside = [name in self.members for name in axis]
            if inside != sorted(inside):
                return None
            found.append(prod([sizes[name] for name in axis if name in self.members]))
        return found[0], found[1]

    def _split(
        self, names: tuple[str, ...], length: int, known: Mapping[str, int], role: str
    ) -> list[tuple[str, int]]:
        """Give each part of one axis its length."""
        unknown = [name for name in names if name not in known]
        if len(names) == 1:
            return [(names[0], length)]
        given = prod([known[name] for name in names if name in known])
        fits = given > 0 and length % given == 0 and (unknown or given == length)
        if len(unknown) > 1 or not fits:
            sizes = ", ".join(f"{k}={known[k]}" for k in names if k in known) or "none given"
            hint = "" if len(unknown) > 1 or given < 1 else _nearest(length, given)
            raise PartitionError(
                f"pattern {self.pattern!r} splits the {role} axis of length {length} into "
                f"({' '.join(names)}) with {sizes}, which does not fit.{hint}"
            )
        return [(n, known.get(n, length // given)) for n in names]


@lru_cache(maxsize=1024)
def _bound(
    p: Partition, shape: tuple[int, ...], channel_dim: int, sizes: tuple[tuple[str, int], ...]
) -> Layout:
    """The layout of a shape, made once: a layer sees the same few shapes again and again."""
    return p._bind(shape, channel_dim, dict(sizes))


def _nearest(length: int, given: int) -> str:
    """Name the divisors around a size that does not divide."""
    divisors = [d for d in range(1, length + 1) if length % d == 0]
    around = [d for d in divisors if d < given][-1:] + [d for d in divisors if d > given][:1]
    near = " or ".join(map(str, around))
    return f" Nearest sizes that divide {length}: {near}." if near else ""


@dataclass(frozen=True)
class Layout:
    """A partition bound to a shape. Splitting an axis is a view, so reductions need no copy.

    Attributes:
        partition: The pattern.
        shape: Shape of the tensors it takes.
        names: Name of each axis of the split view.
        split_shape: Shape of the split view.
        channel_dim: 1 or -1.
        member_dims: Axes of the split view that statistics are taken over.
        members: Number of elements that share one statistic.
        lengths: Samples, channels, and positions.
        blocks: Samples and channels of an area, where it is a block of these with all positions.
            None where areas are not such blocks: statistics of single positions, or members that
            lie apart, as the outer part of a split axis does.
        stored_shape: Shape in which a stored statistic broadcasts against the split view.
    """

    partition: Partition
    shape: tuple[int, ...]
    names: tuple[str, ...]
    split_shape: tuple[int, ...]
    channel_dim: int
    member_dims: tuple[int, ...]
    members: int
    lengths: tuple[int, int, int]
    blocks: tuple[int, int] | None
    stored_shape: tuple[int, ...]

    @cached_property
    def memo(self) -> dict[Any, Any]:
        """What kernels remember of this layout, by keys of their own."""
        return {}

    def split(self, x: Tensor) -> Tensor:
        """View x with its split axes apart; nothing is copied."""
        return x if self.split_shape == self.shape else x.view(self._split_view(x))

    def _split_view(self, x: Tensor) -> tuple[int, ...]:
        if tuple(x.shape) != self.shape:
            raise PartitionError(
                f"pattern {self.partition.pattern!r} was bound to shape {self.shape}; "
                f"received {tuple(x.shape)}"
            )
        return self.split_shape

    def join(self, x: Tensor) -> Tensor:
        """Undo `split`."""
        return x if self.split_shape == self.shape else x.reshape(self.shape)

    def _order(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The permutation to (areas, variables, members), and the regrouped shape."""
        p = self.partition
        groups = [g for g in (p.areas, p.variables, p.members) if g is not None]
        dims = [[i for n in g for i, name in enumerate(self.names) if name == n] for g in groups]
        order = tuple(i for part in dims for i in part)
        return order, tuple(prod([self.split_shape[i] for i in part]) for part in dims)

    @property
    def grouped(self) -> tuple[int, ...]:
        """The shape that `regroup` gives."""
        return self._order()[1]

    def regroup(self, x: Tensor) -> Tensor:
        """Regroup x to (areas, members), or (areas, variables, members) for whitening."""
        order, grouped = self._order()
        return self.split(x).permute(order).reshape(grouped)

    def undo(self, z: Tensor) -> Tensor:
        """Undo `regroup`, bit for bit."""
        order, _ = self._order()
        back = sorted(range(len(order)), key=order.__getitem__)
        split = z.reshape([self.split_shape[i] for i in order]).permute(back)
        return self.join(split)

    def per_channel(self, parameter: Tensor) -> Tensor:
        """View a parameter of shape (C,) so that it broadcasts against the split view."""
        return parameter.view(self.channel_shape)

    @property
    def channel_shape(self) -> list[int]:
        """Shape of a number for each channel that broadcasts against the split view."""
        return [
            size if self.partition.role(name) == "channel" else 1
            for name, size in zip(self.names, self.split_shape, strict=True)
        ]

    def stored_dims(self) -> tuple[int, ...]:
        """Axes of the split view whose areas keep stored statistics of their own (channels)."""
        p = self.partition
        keep = {name for name in p.areas if p.role(name) == "channel"}
        return tuple(i for i, name in enumerate(self.names) if name in keep)

    @property
    def stored_last(self) -> bool:
        """Whether, in a dense statistic, areas that `sum_stored` sums lie K numbers apart."""
        keep, areas = self.stored_dims(), self.partition.areas
        axes = [i for i, n in enumerate(self.names) if n in areas and self.split_shape[i] != 1]
        return all(i in keep for i in axes[sum(i not in keep for i in axes) :])

    def sum_stored(self, statistic: Tensor) -> Tensor:
        """Sum a per-area statistic over areas that are not channels; flatten to (K,)."""
        keep = self.stored_dims()
        rest = tuple(i for i in range(statistic.ndim) if i not in keep and statistic.shape[i] != 1)
        return (statistic.sum(rest, keepdim=True) if rest else statistic).reshape(-1)

    def from_stored(self, stored: Tensor) -> Tensor:
        """View a stored statistic of shape (K,) so that it broadcasts against the split view."""
        return stored.view(self.stored_shape)

    def per_position(self, mask: Tensor) -> Tensor:
        """View a mask of shape (N, *positions) so that it broadcasts against the split view."""
        shape = [
            1 if self.partition.role(name) == "channel" else size
            for name, size in zip(self.names, self.split_shape, strict=True)
        ]
        return mask.view(shape)


def _tokens(side: str, pattern: str) -> list[tuple[str, ...]]:
    """Split one side of a pattern into groups of names."""
    groups = [tuple((m[1] if m[1] is not None else m[2]).split()) for m in _TOKEN.finditer(side)]
    bad = [name for group in groups for name in group if not _NAME.fullmatch(name)]
    if bad:
        raise PartitionError(
            f"pattern {pattern!r}: {bad[0]!r} is not an axis name. Names are lower-case words "
            "or *, grouped by one level of parentheses, e.g. 'n (g c) * -> (n g) (c *)'."
        )
    return groups


@lru_cache(maxsize=256)
def partition(pattern: str) -> Partition:
    """Parse a pattern.

    Args:
        pattern: ``samples channels * -> areas members`` or, for whitening,
            ``… -> areas variables members``. The first left-hand axis is the samples, the second
            the channels, ``*`` stands for all positions. Samples and channels may be split:
            ``(g c)`` has g as the outer part.

    Returns:
        The parsed pattern.

    Raises:
        PartitionError: If the text is not such a pattern, with the reason.

    Example:
        >>> p = partition("n (g c) * -> (n g) (c *)")
        >>> p.areas, p.members, p.mixes_samples()
        (('n', 'g'), ('c', '*'), False)
        >>> partition("n c * -> c (n x)")
        Traceback (most recent call last):
        ...
        normlab.core.partition.PartitionError: pattern 'n c * -> c (n x)': right and left name \
different axes: x only right, * only left.
    """
    text = " ".join(pattern.split())
    left_text, arrow, right_text = text.partition("->")
    if not arrow or "->" in right_text:
        raise PartitionError(f"pattern {text!r} needs one arrow '->' between axes and areas")
    left, right = _tokens(left_text, text), _tokens(right_text, text)
    if len(left) != 3 or left[2] != ("*",) or "*" in left[0] + left[1] or not all(left):
        raise PartitionError(
            f"pattern {text!r}: the left side names samples, channels and all positions, "
            "e.g. 'n c *' or 'n (g c) *'"
        )
    if len(right) not in (2, 3):
        raise PartitionError(
            f"pattern {text!r}: the right side has two parts, areas and members (three for "
            f"whitening: areas, variables, members); received {len(right)}. Group names with "
            "parentheses."
        )
    names_left = [name for group in left for name in group]
    names_right = [name for group in right for name in group]
    _check_names(text, names_left, names_right)
    if not right[-1]:
        raise PartitionError(f"pattern {text!r}: members are empty, so there is nothing to average")
    variables = right[1] if len(right) == 3 else None
    return Partition(text, (left[0], left[1], left[2]), right[0], variables, right[-1])


def _check_names(text: str, left: list[str], right: list[str]) -> None:
    """Check that both sides name the same axes, once each."""
    for side, names in (("left", left), ("right", right)):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise PartitionError(f"pattern {text!r}: {twice[0]!r} stands twice on the {side}")
    only_right, only_left = sorted(set(right) - set(left)), sorted(set(left) - set(right))
    if only_right or only_left:
        parts = [
            f"{', '.join(n)} only {s}" for s, n in (("right", only_right), ("left", only_left)) if n
        ]
        raise PartitionError(
            f"pattern {text!r}: right and left name different axes: {', '.join(parts)}."
        )
