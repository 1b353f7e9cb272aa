"""How a case is cut into programs: whole areas where one holds them, else pieces of lines.

Nothing here needs Triton or a GPU. Sizes are chosen for one H100 (132 multiprocessors, 64 K
registers each) by arithmetic; nothing is tuned at run time, so that results depend on shapes alone.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

from normlab.core.partition import Layout

PROGRAMS = 528  # four for each multiprocessor
FORWARD, BACKWARD = 32768, 16384  # elements that a program of 1024 threads holds in registers
TILE = 4096  # elements of a tile where there is a choice
FEW = 4096  # members of an area below which one launch is all that counts


class Areas(NamedTuple):
    """Areas along two axes, members along two more; see `areas`.

    Attributes:
        outer: Number of areas along the outer axis.
        inner: Along the inner one.
        groups: After how many inner areas the channels begin again.
        m1: Members along their first axis.
        m2: Along their second.
        so: Stride of the outer axis, in elements; the others likewise.
        sa: Of the inner axis.
        s1: Of the members' first axis.
        s2: Of their second.
        unit: Which of sa, s1 and s2 is 1 (0, 1, 2).
        ca: Channels from one inner area to the next.
        cm: Channels from one member to the next along the first axis: 0 or 1.
    """

    outer: int
    inner: int
    groups: int
    m1: int
    m2: int
    so: int
    sa: int
    s1: int
    s2: int
    unit: int
    ca: int
    cm: int

    @property
    def align(self) -> int:
        """The power of two that all that is passed in its units is a multiple of."""
        strides = (self.sa, self.s1, self.s2)
        lengths = (self.inner, self.m1, self.m2)
        steps = [s for i, s in enumerate(strides) if i != self.unit]
        return gcd(16, self.so, lengths[self.unit], *steps)

    @property
    def shared(self) -> bool:
        """Whether all areas have the same channels, so that a program can sum over its areas."""
        return self.cm == 1 and (self.ca == 0 or self.groups == 1)

    def tile(self, limit: int) -> tuple[int, int, int]:
        """Areas, and members along both axes, of one tile of at most `limit`: powers of two.

        Where areas lie side by side, a tile has 16 of them if it can: fewer would waste most of
        each transaction of the memory.
        """
        b1, b2 = power_of_two(self.m1), power_of_two(self.m2)
        enough = power_of_two(self.outer * self.inner // PROGRAMS + 1)
        ba = min(TILE // (b1 * b2), enough)
        ba = min(max(ba, 16 if self.unit == 0 else 1), limit // (b1 * b2), power_of_two(self.inner))
        return max(ba, 1), b1, b2

    def arguments(self, ba: int) -> tuple[int, ...]:
        """Lengths and strides as the kernels take them for tiles of `ba` areas."""
        n, axes = self.align, [self.inner, self.m1, self.m2]
        axes[self.unit] //= n
        strides = [s // n for s in (self.so, self.sa, self.s1, self.s2)]
        return axes[0], self.tiles(ba), self.groups, axes[1], axes[2], *strides

    def tiles(self, ba: int) -> int:
        """Tiles along the inner axis."""
        return -(-self.inner // ba)


class Lines(NamedTuple):
    """N × C × P elements and areas of bn samples and bc channels; see `lines`.

    Attributes:
        n: Samples.
        c: Channels.
        p: Positions.
        sn: Stride of samples, in elements.
        sc: Of channels.
        sp: Of positions; one of the two is 1.
        bn: Samples of an area.
        bc: Channels of an area.
    """

    n: int
    c: int
    p: int
    sn: int
    sc: int
    sp: int
    bn: int
    bc: int

    @property
    def unit(self) -> int:
        """Which axis is contiguous: 0 channels, 1 positions."""
        return int(self.sp == 1)

    @property
    def align(self) -> int:
        """As `Areas.align`."""
        if self.unit == 1:
            return gcd(16, self.sn, self.sc, self.p)
        return gcd(16, self.sn, self.sp, self.c)

    @property
    def areas(self) -> int:
        """Number of areas."""
        return (self.n // self.bn) * (self.c // self.bc)

    def tile(self) -> tuple[int, int]:
        """Channels and positions of a tile: powers of two, longest along the contiguous axis."""
        if self.unit == 1:
            bp = min(power_of_two(self.p), TILE // 2)
            return min(power_of_two(self.c), TILE // 2 // bp), bp
        bc = min(power_of_two(self.c), 64)
        return bc, max(1, min(power_of_two(self.p), TILE // 2 // bc))

    def chunks(self) -> int:
        """Tiles along the positions."""
        return -(-self.p // self.tile()[1])

    def channel_tiles(self) -> int:
        """Tiles along the channels."""
        return -(-self.c // self.tile()[0])

    def pieces(self) -> tuple[int, int]:
        """Tiles of a piece, and pieces of a block of bn samples: enough to fill the device once."""
        tiles = self.bn * self.chunks()
        programs = (self.n // self.bn) * self.channel_tiles()
        units = -(-tiles // min(tiles, -(-2 * PROGRAMS // programs)))
        return units, -(-tiles // units)

    def combine(self) -> tuple[int, int]:
        """Channels and pieces of a tile where pieces are combined."""
        bc = min(power_of_two(self.bc), 256)
        return bc, min(power_of_two(self.pieces()[1]), 2048 // bc)

    def arguments(self) -> tuple[int, ...]:
        """Lengths and strides as the kernels take them, in units of `align`."""
        a = self.align
        c, p = (self.c, self.p // a) if self.unit == 1 else (self.c // a, self.p)
        return c, p, *self.strides(), self.bn, self.bc, self.chunks()

    def strides(self) -> tuple[int, int, int]:
        """Strides in units of `align`."""
        return self.sn // self.align, self.sc // self.align, self.sp // self.align


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def warps(elements: int) -> int:
    """Warps for a tile: 16 elements a thread, until a program is full."""
    return min(32, power_of_two(max(1, elements // 512)))


def positions(layout: Layout) -> bool:
    """Whether areas are single positions with all their channels."""
    p = layout.partition
    return p.variables is None and len(p.axes[1]) == 1 and p.members == p.axes[1]


def lines(layout: Layout, columns: bool) -> Lines:
    """The tensor as lines; blocks of samples in channels last are one sample of more positions.

    Args:
        layout: Π bound to the shape of the tensor; areas are blocks.
        columns: Whether its memory is in the order (samples, positions, channels).
    """
    n, c, p = layout.lengths
    assert layout.blocks is not None
    bn, bc = layout.blocks
    if columns:
        return Lines(n // bn, c, bn * p, bn * p * c, 1, c, 1, bc)
    return Lines(n, c, p, c * p, p, 1, bn, bc)


def areas(layout: Layout, columns: bool, limit: int) -> Areas | None:
    """The tensor as areas that one program holds, or None where they are too large, or too few.

    Args:
        layout: Π bound to the shape of the tensor.
        columns: Whether its memory is in the order (samples, positions, channels).
        limit: Elements that a program holds at most.

    Returns:
        The areas; always where they are positions, for lines have no way to take those.
    """
    n, c, p = layout.lengths
    if layout.blocks is None:
        if columns:
            return Areas(1, n * p, 1, c, 1, 0, c, 1, 0, 1, 0, 1)
        return Areas(n, p, 1, c, 1, c * p, 1, p, 0, 0, 0, 1)
    bn, bc = layout.blocks
    found = None
    if columns:
        n, p = n // bn, bn * p
        if bc == c:
            found = Areas(1, n, 1, c, p, 0, p * c, 1, c, 1, c, 1)
        elif bc == 1:
            found = Areas(n, c, c, 1, p, p * c, 1, 0, c, 0, 1, 0)
    elif bn == 1:
        found = Areas(1, n * (c // bc), c // bc, bc, p, 0, bc * p, p, 1, 2, bc, 1)
    elif bc == 1:
        found = Areas(n // bn, c, c, bn, p, bn * c * p, p, c * p, 1, 2, 1, 0)
    if found is None:
        return None
    # Areas side by side need 16 in a tile, and registers for twice as many addresses.
    least = min(32, power_of_two(c)) if found.unit == 0 else 1
    if least * power_of_two(found.m1) * power_of_two(found.m2) > limit:
        return None
    few = found.outer * found.inner < PROGRAMS // 8 and layout.members > FEW
    return None if few else found
