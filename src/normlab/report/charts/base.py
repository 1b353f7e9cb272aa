"""What the charts share: scales of the series, axes, and the frame around the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from normlab.report.extra import need
from normlab.report.look import Look, dash, shape
from normlab.report.view import View

# Native size in pixels, chosen so that text is still legible when a phone shrinks the figure.
WIDTH, HEIGHT = 380, 270

Row = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A chart with its words and its numbers; ``table`` has the header as its first row."""

    key: str
    section: str
    title: str
    subtitle: str
    caption: str
    chart: Any
    table: list[list[str]]


def plot(rows: list[Row]) -> Any:
    """Start a chart from plain rows."""
    alt = need("altair")
    return alt.Chart(alt.Data(values=rows))


def axis(field: str, title: str, **options: Any) -> tuple[str, dict[str, Any]]:
    """Collect the arguments of a quantitative axis that need not include zero."""
    alt = need("altair")
    scale = {"zero": False, "nice": True, **options.pop("scale", {})}
    axis_options = {"labelOverlap": True, "labelFlush": False, "tickCount": 6, **options}
    return f"{field}:Q", {
        "title": title,
        "scale": alt.Scale(**scale),
        "axis": alt.Axis(**axis_options),
    }


def x_axis(field: str, title: str, **options: Any) -> Any:
    """Horizontal axis with a title that names the unit."""
    shorthand, arguments = axis(field, title, **options)
    return need("altair").X(shorthand, **arguments)


def y_axis(field: str, title: str, **options: Any) -> Any:
    """Vertical axis; its title lies above the plot, where it can be read without turning."""
    upright = {
        "titleAngle": 0,
        "titleAlign": "left",
        "titleAnchor": "start",
        "titleY": -12,
        "minExtent": 36,
    }
    shorthand, arguments = axis(field, title, titleX=0, **upright, **options)
    return need("altair").Y(shorthand, **arguments)


def _range(view: View, look: Look, channel: str) -> list[Any]:
    pick = {"color": look.colour, "strokeDash": dash, "shape": shape}[channel]
    return [pick(one.series) for one in view.normalizers]


def series(view: View, look: Look, channel: str) -> Any:
    """Encode the field ``normalizer`` by ``color``, ``strokeDash`` or ``shape``.

    Args:
        view: The comparison, which fixes each normalizer's place.
        look: The page has one legend for all its figures, so its charts have none.
        channel: The channel's name in Vega-Lite.

    Returns:
        The encoding.
    """
    alt = need("altair")
    make = {"color": alt.Color, "strokeDash": alt.StrokeDash, "shape": alt.Shape}[channel]
    legend = None if look.page else alt.Legend(title="normalizer", symbolSize=60, symbolOpacity=1)
    return make(
        "normalizer:N",
        scale=alt.Scale(domain=view.labels, range=_range(view, look, channel)),
        legend=legend,
    )


def frame(layers: Sequence[Any], look: Look, height: int = HEIGHT) -> Any:
    """Put layers over each other, sized, and with quiet axes."""
    text = {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"}
    colours = {"labelColor": look.tone("muted"), "titleColor": look.tone("ink")}
    lines = {"gridColor": look.tone("grid"), "domainColor": look.tone("muted")}
    chart = need("altair").layer(*layers).properties(width=WIDTH - 62, height=height)
    chart = chart.configure(background="#00000000" if look.page else look.tone("paper"))
    return (
        chart.configure_view(stroke=None)
        .configure_axis(**text, **colours, **lines, ticks=False, labelPadding=6, titlePadding=8)
        .configure_axisY(domain=False)
        .configure_legend(labelFontSize=12, titleFontSize=12, **colours)
        .configure_title(anchor="start", fontSize=14, color=look.tone("ink"))
    )


def padded(values: Sequence[float], share: float = 0.06) -> list[float]:
    """Widen a range of values so that marks do not touch the frame."""
    low, high = min(values), max(values)
    room = (high - low) * share or 0.01
    return [low - room, high + room]
