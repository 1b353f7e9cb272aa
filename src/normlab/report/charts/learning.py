"""Learning curves: validation accuracy and training loss against the epoch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from normlab.report import words
from normlab.report.charts.base import Figure, Row, frame, plot, series, x_axis, y_axis
from normlab.report.extra import need
from normlab.report.look import Look
from normlab.report.view import Arm, Condition, View

QUANTITIES = {"valid_accuracy": "validation accuracy", "train_loss": "training loss"}

# Beyond these a figure gains nothing that the eye can see, and a table becomes a burden.
MOST_POINTS, MOST_ROWS = 120, 12

Points = list[tuple[float, float]]


def thinned(values: list[Any], most: int) -> list[Any]:
    """Keep at most so many values, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return values
    gaps = (len(values) - 1) / (most - 1)
    return [values[round(place * gaps)] for place in range(most)]


def mean_curve(arm: Arm, quantity: str) -> Points:
    """Average the seeds that got as far as the furthest one.

    A run that diverged early must not make the mean jump where it ends, so it has its own thin
    line and no part in the mean.
    """
    runs = [curve.points[quantity] for curve in arm.curves if curve.points[quantity]]
    last = max((run[-1][0] for run in runs), default=0.0)
    values = defaultdict(list)
    for run in runs:
        if run[-1][0] == last:
            for epoch, value in run:
                values[epoch].append(value)
    return [(epoch, sum(found) / len(found)) for epoch, found in sorted(values.items())]


def round_values(values: list[float]) -> list[float]:
    """Places for a logarithmic axis: 1, 2 and 5 of each decade that the values span."""
    first, last = (math.floor(math.log10(end)) for end in (min(values), max(values)))
    factors = (1, 2, 5) if last - first < 4 else (1,)
    return [factor * 10.0**power for power in range(first, last + 1) for factor in factors]


def _value(quantity: str, value: float) -> str:
    return words.percent(value) if quantity == "valid_accuracy" else f"{value:.4g}"


def _rows(arm: Arm, quantity: str) -> tuple[list[Row], list[Row], list[Row]]:
    """The mean's points, the single runs' points, and the mean's last point."""

    def rows(points: Points, run: str) -> list[Row]:
        last = _value(quantity, points[-1][1]) if points else ""
        said = f"{arm.normalizer}, {run}: {last} at the end"
        entry = {"normalizer": arm.normalizer, "run": run, "said": said}
        return [{**entry, "epoch": x, "value": y} for x, y in thinned(points, MOST_POINTS)]

    mean = rows(mean_curve(arm, quantity), "mean over seeds")
    single = [
        row
        for curve in arm.curves
        for row in rows(list(curve.points[quantity]), f"seed {curve.seed}")
    ]
    return mean, single if len(arm.curves) > 1 else [], mean[-1:]


def _table(arms: list[Arm], quantity: str) -> list[list[str]]:
    """Mean over seeds, an epoch a row."""
    means = {arm.normalizer: dict(mean_curve(arm, quantity)) for arm in arms}
    epochs = thinned(sorted({epoch for mean in means.values() for epoch in mean}), MOST_ROWS)

    def cell(mean: dict[float, float], epoch: float) -> str:
        return _value(quantity, mean[epoch]) if epoch in mean else words.MISSING

    body = [[f"{e:g}", *(cell(mean, e) for mean in means.values())] for e in epochs]
    return [["Epoch", *means], *body]


def curves(view: View, look: Look) -> Iterator[Figure]:
    """Draw a figure for each quantity and condition.

    Args:
        view: The comparison.
        look: For the page or for Python users.

    Yields:
        The figures that have data, all conditions of a quantity side by side.
    """
    for quantity in QUANTITIES:
        for condition in view.conditions:
            figure = _figure(view, look, condition, quantity)
            if figure is not None:
                yield figure


def _figure(view: View, look: Look, condition: Condition, quantity: str) -> Figure | None:
    mean: list[Row] = []
    single: list[Row] = []
    last: list[Row] = []
    for arm in view.of(condition.id):
        for gathered, rows in zip((mean, single, last), _rows(arm, quantity), strict=True):
            gathered.extend(rows)
    if not mean:
        return None
    name = QUANTITIES[quantity]
    runs = "Thick: mean over seeds. Thin: single runs." if single else "One run per normalizer."
    return Figure(
        key=f"{quantity}/{condition.id}",
        section="learning",
        title=name.capitalize(),
        subtitle=condition.label,
        caption=runs,
        chart=frame(_layers(view, look, quantity, (mean, single, last)), look),
        table=_table(view.of(condition.id), quantity),
    )


def _layers(
    view: View, look: Look, quantity: str, parts: tuple[list[Row], list[Row], list[Row]]
) -> list[Any]:
    """Thin lines of single runs under the means, whose last points carry the shapes."""
    mean, single, last = parts
    options: dict[str, Any] = {"format": ".0%"} if quantity == "valid_accuracy" else {}
    values = [row["value"] for row in mean + single]
    if quantity == "train_loss" and min(values) > 0 and max(values) > 20 * min(values):
        scale = {"type": "log", "nice": False}
        options = {"scale": scale, "format": "~g", "values": round_values(values)}
    longest = max(row["epoch"] for row in mean + single)
    step = 1 if longest >= 3 else 0.1  # runs of an epoch or two are measured within it
    shared = {
        "x": x_axis("epoch", "epoch", tickMinStep=step, format=".3~r", scale={"nice": False}),
        "y": y_axis("value", QUANTITIES[quantity], **options),
        "color": series(view, look, "color"),
        "description": need("altair").Description("said:N"),
        "tooltip": "said:N",
    }
    dashes = series(view, look, "strokeDash")
    single_runs = plot(single).mark_line(strokeWidth=1, opacity=0.35, clip=True)
    return [
        single_runs.encode(**shared, detail="run:N"),
        plot(mean).mark_line(strokeWidth=2.2).encode(**shared, strokeDash=dashes),
        plot(last)
        .mark_point(filled=True, size=55, opacity=1)
        .encode(**shared, shape=series(view, look, "shape")),
    ]
