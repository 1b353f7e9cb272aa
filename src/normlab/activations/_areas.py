"""Choices of area that several methods offer."""

from __future__ import annotations

from typing import Literal

Over = Literal["sample", "position"]
_PATTERNS = {"sample": "n c * -> n (c *)", "position": "n c * -> (n *) (c)"}


def sample_or_position(over: Over | None, channel_dim: int) -> str:
    """Return the pattern that normalizes over whole samples, or over channels at each position.

    Args:
        over: ``"sample"``, ``"position"``, or None for the custom of the layout: the sample where
            channels come first, the position where they come last.
        channel_dim: 1 or −1.

    Returns:
        The pattern.

    Raises:
        ValueError: If `over` is another word.
    """
    custom = "position" if channel_dim == -1 else "sample"
    choice = custom if over is None else over
    if choice not in _PATTERNS:
        raise ValueError(f"over is 'sample' or 'position'; received {over!r}")
    return _PATTERNS[choice]


def default_groups(channels: int) -> int:
    """Return the most groups, up to 32, that leave at least four channels in each.

    Group normalization's 32 groups would leave one channel a group in narrow networks, which is
    instance normalization.

    Example:
        >>> [default_groups(c) for c in (2, 16, 64, 256)]
        [1, 4, 16, 32]
    """
    fitting = (g for g in range(min(32, channels // 4), 0, -1) if channels % g == 0)
    return next(fitting, 1)
