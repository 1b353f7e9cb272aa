"""Colours, dashes and shapes: one look per normalizer, the same on all figures.

A series differs by colour, by dash and by shape, so that a figure survives grey print and
colour-blind eyes. Both palettes start from Okabe and Ito's hues, with the lightness moved until
each colour has a contrast of at least 3:1 with its background.

On the page the colours must follow the reader's light or dark scheme, which a drawn SVG cannot
know. There the charts are drawn in marker colours, which ``svg.py`` replaces by CSS variables.
"""

from __future__ import annotations

from dataclasses import dataclass

LIGHT = ("#0067b1", "#c63a00", "#007f5a", "#bf4f97", "#b08a00", "#1f97cf", "#2c3640", "#8a1f63")
DARK = ("#5b9dff", "#ff7c43", "#25c493", "#ee93c6", "#f7d24a", "#84e0ff", "#f2f4f7", "#b86aa0")
DASHES = ((1, 0), (6, 2), (2, 2), (8, 2, 2, 2), (10, 3), (4, 2, 1, 2, 1, 2), (1, 1.5))
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")

# Outlines of radius 5 around the origin, as the figures draw them.
OUTLINES = {
    "circle": "M4.6,0A4.6,4.6,0,1,1,-4.6,0A4.6,4.6,0,1,1,4.6,0Z",
    "square": "M-4.1,-4.1H4.1V4.1H-4.1Z",
    "triangle-up": "M0,-4.9L5.2,4.1H-5.2Z",
    "diamond": "M0,-5.8L4.9,0L0,5.8L-4.9,0Z",
    "cross": "M-5,-1.8H-1.8V-5H1.8V-1.8H5V1.8H1.8V5H-1.8V1.8H-5Z",
    "triangle-down": "M0,4.9L5.2,-4.1H-5.2Z",
    "triangle-right": "M4.9,0L-4.1,-5.2V5.2Z",
}

MARKERS = {"ink": "#5f0001", "muted": "#5f0002", "grid": "#5f0003", "paper": "#5f0004"}
PLAIN = {"ink": "#17202a", "muted": "#566273", "grid": "#dde3ea", "paper": "#ffffff"}
SERIES_MARKER = "#5e"


@dataclass(frozen=True)
class Look:
    """How charts are drawn: for the page (marker colours, bare) or for Python users."""

    page: bool

    def colour(self, series: int) -> str:
        """Colour of a series."""
        return f"{SERIES_MARKER}{series:04x}" if self.page else LIGHT[series % len(LIGHT)]

    def tone(self, name: str) -> str:
        """Colour of what is no series: ``ink``, ``muted``, ``grid`` or ``paper``."""
        return (MARKERS if self.page else PLAIN)[name]


def dash(series: int) -> list[float]:
    """Dash pattern of a series, in pixels drawn and left out."""
    return list(DASHES[series % len(DASHES)])


def shape(series: int) -> str:
    """Vega's name for the shape of a series' marks."""
    return SHAPES[series % len(SHAPES)]
