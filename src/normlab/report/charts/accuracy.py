"""Final accuracy: all normalizers at a glance, and against the normalization batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from normlab.report import words
from normlab.report.charts.base import Figure, Row, frame, plot, series, x_axis, y_axis
from normlab.report.extra import need
from normlab.report.look import SHAPES, Look
from normlab.report.view import Arm, Condition, View

COMPOSITIONS = {"iid": "i.i.d. samples", "class": "samples of one class"}


def composed(condition: Condition) -> str:
    """Name the composition of a condition's normalization batch."""
    return COMPOSITIONS.get(condition.composition, condition.composition or "unknown composition")


def _row(arm: Arm, condition: Condition) -> Row | None:
    """One arm's mean and interval; none where no run finished."""
    if arm.accuracy is None:
        return None
    value = arm.accuracy
    said = f"{words.percent(value.mean)}, interval {words.percent_span(value)}, n = {arm.n}"
    return {
        "normalizer": arm.normalizer,
        "condition": condition.label,
        "composition": composed(condition),
        "accuracy": value.mean,
        "low": value.low,
        "high": value.high,
        "norm_batch": condition.norm_batch,
        "said": f"{arm.normalizer}, {condition.label}: {said}",
    }


def _rows(view: View) -> list[Row]:
    pairs = [(arm, one) for one in view.conditions for arm in view.of(one.id)]
    rows = [_row(arm, condition) for arm, condition in pairs]
    return [row for row in rows if row is not None]


def _table(view: View) -> list[list[str]]:
    """Accuracy of each normalizer (rows) under each condition (columns)."""
    found = {(arm.normalizer, arm.condition): arm.accuracy for arm in view.arms}

    def cell(label: str, condition: str) -> str:
        value = found.get((label, condition))
        return f"{words.percent(value.mean)} ({words.percent_span(value)})" if value else "–"

    head = ["Normalizer", *(one.label for one in view.conditions)]
    return [head, *([n, *(cell(n, one.id) for one in view.conditions)] for n in view.labels)]


def overview(view: View, look: Look) -> Iterator[Figure]:
    """Dots and whiskers of all arms, a row per normalizer.

    Args:
        view: The comparison.
        look: For the page or for Python users.

    Yields:
        The figure, if any run finished.
    """
    rows = _rows(view)
    if not rows:
        return
    several = len(view.conditions) > 1
    chart = frame(_overview_layers(view, look, rows), look, height=34 * len(view.labels) + 10)
    # On the page the names may be set larger than the drawing library measured them.
    room = 6 + min(20, max(map(len, view.labels)))
    chart = chart.properties(padding={"left": room, "right": 5, "top": 5, "bottom": 5})
    yield Figure(
        key="overview",
        section="glance",
        title=f"{view.metric.capitalize()} of every normalizer",
        subtitle="",
        caption="Mark: mean over seeds. Whisker: 95 % interval."
        + (" Shape: condition." if several else ""),
        chart=chart,
        table=_table(view),
    )


def _overview_layers(view: View, look: Look, rows: list[Row]) -> list[Any]:
    """Whiskers under marks; conditions lie beside each other within a normalizer's row."""
    alt = need("altair")
    names = [one.label for one in view.conditions]
    best = {row["normalizer"]: row["accuracy"] for row in reversed(rows)}
    order = sorted(best, key=lambda label: -best[label])
    place = alt.Axis(domain=False, grid=True, labelLimit=130, tickBand="extent")
    chart = plot(rows).encode(
        y=alt.Y("normalizer:N", sort=order, title=None, axis=place),
        color=series(view, look, "color"),
        description="said:N",
        tooltip="said:N",
    )
    if len(names) > 1:
        chart = chart.encode(yOffset=alt.YOffset("condition:N", sort=names))
    legend = alt.Legend(
        title=None,
        orient="bottom",
        direction="vertical",
        labelLimit=330,
        symbolFillColor=look.tone("muted"),
        symbolStrokeColor=look.tone("muted"),
    )
    scale = alt.Scale(domain=names, range=[SHAPES[k % len(SHAPES)] for k in range(len(names))])
    mark = alt.Shape("condition:N", scale=scale, legend=legend if len(names) > 1 else None)
    along = x_axis("low", view.metric, format=".0%")
    return [
        chart.mark_rule(strokeWidth=2.5).encode(x=along, x2="high:Q"),
        chart.mark_point(filled=True, size=75, opacity=1).encode(x="accuracy:Q", shape=mark),
    ]


def norm_batch(view: View, look: Look) -> Iterator[Figure]:
    """Accuracy against the samples that share statistics, and how they were drawn.

    Args:
        view: The comparison.
        look: For the page or for Python users.

    Yields:
        The figure, if more than one condition with a known normalization batch has results.
    """
    rows = [row for row in _rows(view) if (row["norm_batch"] or 0) > 0]
    if len({row["condition"] for row in rows}) < 2:
        return
    for row in rows:
        # Side by side instead of on top of each other, a quarter octave in all.
        aside = (view.series[row["normalizer"]] + 0.5) / len(view.labels) - 0.5
        row["place"] = row["norm_batch"] * 2 ** (0.5 * aside)
    yield Figure(
        key="norm_batch",
        section="norm_batch",
        title=f"{view.metric.capitalize()} against the normalization batch",
        subtitle="",
        caption="Filled: i.i.d. samples. Hollow: samples of one class, or any other composition. "
        "Lines join conditions of the same composition. The marks of one normalization batch "
        "stand beside each other only to be seen; their batch is the same.",
        chart=frame(_batch_layers(view, look, rows), look, height=250),
        table=_table(view),
    )


def _batch_layers(view: View, look: Look, rows: list[Row]) -> list[Any]:
    """Lines, whiskers, filled marks for i.i.d. samples and hollow ones for the rest."""
    alt = need("altair")
    sizes = sorted({row["norm_batch"] for row in rows})
    ends = [2 ** (math.log2(sizes[0]) - 0.5), 2 ** (math.log2(sizes[-1]) + 0.5)]
    log = {"type": "log", "base": 2, "domain": ends, "nice": False}
    chart = plot(rows).encode(
        x=x_axis("place", "samples that share statistics", scale=log, values=sizes, format="d"),
        color=series(view, look, "color"),
        description="said:N",
        tooltip="said:N",
    )
    value = y_axis("accuracy", view.metric, format=".0%")
    iid = alt.datum.composition == COMPOSITIONS["iid"]
    mark = {"shape": series(view, look, "shape"), "y": value}
    hollow = {"fill": look.tone("paper"), "filled": False, "strokeWidth": 1.8}
    return [
        chart.mark_line(strokeWidth=1.5, opacity=0.6).encode(
            y=value, strokeDash=series(view, look, "strokeDash"), detail="composition:N"
        ),
        chart.mark_rule(strokeWidth=1.8).encode(y="low:Q", y2="high:Q"),
        chart.transform_filter(iid).mark_point(filled=True, size=70, opacity=1).encode(**mark),
        chart.transform_filter(~iid).mark_point(size=70, opacity=1, **hollow).encode(**mark),
    ]
