"""Geometry of the small drawings inside tables: whiskers, pattern glyphs, series swatches."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from normlab.report.look import DASHES, LIGHT, OUTLINES, dash, shape
from normlab.report.view import Arm

# A glyph shows four samples (down), four channels (across) and two by two positions in each.
SAMPLES, CHANNELS, POSITIONS = 4, 4, 4
_SPLIT = {"b": ("n", 2), "g": ("c", 2)}


@dataclass(frozen=True)
class Scale:
    """The horizontal axis that all whiskers of one table share; values are fractions."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def place(self, value: float) -> str:
        """Position of a value as a CSS percentage of the axis."""
        return f"{100 * (value - self.low) / (self.high - self.low):.2f}%"


def scale(arms: Sequence[Arm]) -> Scale | None:
    """Fit an axis with round ends to the accuracies of some arms; none without accuracies."""
    found = [arm.accuracy for arm in arms if arm.accuracy]
    if not found:
        return None
    ends = [end for one in found for end in (one.low, one.high, one.mean, *one.values)]
    low, high = min(ends), max(ends)
    width = max(high - low, 0.002)
    step = 10.0 ** math.floor(math.log10(width / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if width / (step * factor) <= 4)
    first = math.floor(low / step - 0.05)
    last = math.ceil(high / step + 0.05)
    ticks = tuple(step * tick for tick in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], ticks)


@dataclass(frozen=True)
class Swatch:
    """A series as a legend shows it: colour variable, dash and outline."""

    series: int
    colour: str
    dash: str
    outline: str


def swatch(series: int) -> Swatch:
    """Collect the look of a series."""
    pattern = " ".join(f"{part:g}" for part in dash(series))
    plain = dash(series) == list(DASHES[0])
    variable = f"var(--s{series % len(LIGHT)})"
    return Swatch(series, variable, "none" if plain else pattern, OUTLINES[shape(series)])


def glyph(pattern: str | None) -> list[tuple[int, int, bool]] | None:
    """Draw a partition: which elements share statistics with the first one.

    Args:
        pattern: A partition such as ``"n c * -> c (n *)"``.

    Returns:
        For each element its column, its row and whether it lies in the first area; none where
        the pattern is missing or of an unknown form.
    """
    parts = re.fullmatch(r"[\w() *]+->([\w() *]+)", pattern or "")
    areas = re.match(r"\s*(\([^()]*\)|\S+)", parts[1]) if parts else None
    if areas is None or parts is None:
        return None
    axes = re.findall(r"\w+|\*", areas[1])
    if not set(axes) <= {"n", "c", "b", "g", "*"}:
        return None
    inner = {_SPLIT[axis][0] for axis in _SPLIT if re.search(rf"\({axis} \w+\)", pattern or "")}

    def area(sample: int, channel: int, position: int) -> tuple[int, ...]:
        place = {"n": sample, "c": channel, "*": position}
        split = {axis: place[whole] // size for axis, (whole, size) in _SPLIT.items()}
        # Once an axis is split, its own letter counts within the part: (g c), (b n).
        place |= {axis: place[axis] % 2 for axis in inner}
        return tuple((place | split)[axis] for axis in axes)

    first = area(0, 0, 0)
    return [
        (2 * channel + position % 2, 2 * sample + position // 2, area(*place) == first)
        for place in product(range(SAMPLES), range(CHANNELS), range(POSITIONS))
        for sample, channel, position in [place]
    ]
