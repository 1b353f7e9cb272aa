"""Which areas are runs of channels at single positions, and how their statistics lie."""

from __future__ import annotations

from math import prod

from normlab.core.partition import Layout


def channels_of_area(layout: Layout) -> int | None:
    """Channels of an area, where it is a run of these at one position of one sample.

    Args:
        layout: Π bound to a shape.

    Returns:
        Their number; None where areas are otherwise.
    """
    p = layout.partition
    if layout.blocks is not None:
        samples, channels = layout.blocks
        return channels if samples == 1 < channels and layout.lengths[2] == 1 else None
    inside = [name in p.members for name in p.axes[1]]
    apart = "*" not in p.members and not any(name in p.members for name in p.axes[0])
    if p.variables is not None or not apart or inside != sorted(inside):
        return None
    sizes = dict(zip(layout.names, layout.split_shape, strict=True))
    return prod([sizes[name] for name in p.axes[1] if name in p.members])


def statistics_walk(layout: Layout, channels: int) -> tuple[int, int, int]:
    """Numbers from the statistic of one sample, group and position to the next.

    Args:
        layout: Π bound to a shape.
        channels: Of an area.

    Returns:
        The strides of a tensor that has the areas of the split view.
    """
    _, c, positions = layout.lengths
    groups = c // channels
    whole = groups * positions
    return (whole, 1, groups) if layout.channel_dim == -1 else (whole, positions, 1)
