"""Cost against accuracy: time per step and memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from normlab.report import words
from normlab.report.charts.base import Figure, Row, frame, plot, series, x_axis, y_axis
from normlab.report.look import Look
from normlab.report.view import Arm, Condition, Interval, View


def _time(arm: Arm) -> Interval | None:
    """Milliseconds per optimizer step."""
    if arm.seconds is None:
        return None
    return Interval(1e3 * arm.seconds.mean, 1e3 * arm.seconds.low, 1e3 * arm.seconds.high)


def _mebibytes(value: float | None) -> Interval | None:
    if value is None:
        return None
    size = value / 2**20
    return Interval(size, size, size)


def memory_kind(view: View) -> str:
    """Choose the memory to draw: what is saved for backward, or else the peak of the process.

    The peak is mostly the data set and the libraries; what a normalizer adds is what it saves.
    """
    measured = any(arm.saved_memory is not None for arm in view.arms)
    return "memory saved for backward" if measured else "peak memory"


def costs(view: View, look: Look) -> Iterator[Figure]:
    """Draw time and memory of each condition.

    Args:
        view: The comparison.
        look: For the page or for Python users.

    Yields:
        The figures that have data.
    """
    for kind in ("time per step", memory_kind(view)):
        for condition in view.conditions:
            figure = _figure(view, look, condition, kind)
            if figure is not None:
                yield figure


def _cost(arm: Arm, kind: str) -> Interval | None:
    if kind == "time per step":
        return _time(arm)
    return _mebibytes(arm.peak_memory if kind == "peak memory" else arm.saved_memory)


def _size(cost: Interval, kind: str) -> str:
    is_time = kind == "time per step"
    return words.seconds(cost.mean / 1e3) if is_time else words.memory(cost.mean * 2**20)


def _figure(view: View, look: Look, condition: Condition, kind: str) -> Figure | None:
    rows: list[Row] = []
    table = [["Normalizer", kind.capitalize(), view.metric.capitalize()]]
    for arm in view.of(condition.id):
        cost = _cost(arm, kind)
        if cost is None or arm.accuracy is None:
            continue
        value, size = arm.accuracy, _size(cost, kind)
        said = f"{arm.normalizer}: {size}, {words.percent(value.mean)}"
        row = {"normalizer": arm.normalizer, "cost": cost.mean, "left": cost.low, "said": said}
        row |= {"right": cost.high, "accuracy": value.mean, "low": value.low, "high": value.high}
        rows.append(row)
        table.append([arm.normalizer, size, words.percent(value.mean)])
    if not rows:
        return None
    is_time = kind == "time per step"
    return Figure(
        key=f"{'time' if is_time else 'memory'}/{condition.id}",
        section="cost",
        title=f"{view.metric.capitalize()} against {kind}",
        subtitle=condition.label,
        caption="Up and to the left is better. Whiskers: intervals of both, where measured.",
        chart=frame(_layers(view, look, rows, f"{kind} ({'ms' if is_time else 'MiB'})"), look),
        table=table,
    )


def _layers(view: View, look: Look, rows: list[Row], title: str) -> list[Any]:
    """Whiskers in both directions under the marks."""
    chart = plot(rows).encode(
        color=series(view, look, "color"), description="said:N", tooltip="said:N"
    )
    along = x_axis("cost", title, format=".3~r", scale={"padding": 8})
    up = y_axis("accuracy", view.metric, format=".0%")
    return [
        chart.mark_rule(strokeWidth=1.5, opacity=0.7).encode(x=along, y="low:Q", y2="high:Q"),
        chart.mark_rule(strokeWidth=1.5, opacity=0.7).encode(x="left:Q", x2="right:Q", y=up),
        chart.mark_point(filled=True, size=90, opacity=1).encode(
            x=along, y=up, shape=series(view, look, "shape")
        ),
    ]
