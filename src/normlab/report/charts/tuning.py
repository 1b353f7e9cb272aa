"""Learning-rate tuning: how flat, and how near to the edge, each normalizer's optimum is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from normlab.report import words
from normlab.report.charts.base import Figure, Row, frame, padded, plot, series, x_axis, y_axis
from normlab.report.extra import need
from normlab.report.look import Look
from normlab.report.view import Arm, Condition, Trial, View


def _said(arm: Arm, trial: Trial) -> str:
    result = words.percent(trial.measured) if trial.measured is not None else trial.outcome
    chosen = ", chosen" if trial.lr == arm.lr else ""
    return f"{arm.normalizer}, learning rate {words.rate(trial.lr)}: {result}{chosen}"


def rates(view: View, look: Look) -> Iterator[Figure]:
    """Draw validation accuracy against the learning rate for each condition.

    Args:
        view: The comparison.
        look: For the page or for Python users.

    Yields:
        The figures that have data.
    """
    for condition in view.conditions:
        figure = _figure(view, look, condition)
        if figure is not None:
            yield figure


def _rows(view: View, arms: list[Arm]) -> tuple[list[Row], list[Row], list[float]]:
    """Finished trials, lost trials at the foot, and the vertical range of both."""
    trials = [(arm, trial) for arm in arms for trial in arm.tuning]
    values = [trial.measured for _, trial in trials if trial.measured is not None]
    domain = padded(values or [0.0, 1.0], 0.1)
    finished: list[Row] = []
    lost: list[Row] = []
    for arm, trial in trials:
        row = {"normalizer": arm.normalizer, "lr": trial.lr, "rate": trial.lr}
        row["said"] = _said(arm, trial)
        if trial.measured is not None:
            finished.append({**row, "accuracy": trial.measured, "chosen": trial.lr == arm.lr})
        else:
            lost.append({**row, "accuracy": domain[0]})
    for rate in {row["rate"] for row in lost}:
        beside = [row for row in lost if row["rate"] == rate]
        for place, row in enumerate(beside):
            row["lr"] = rate * 1.12 ** (place - (len(beside) - 1) / 2)
    return finished, lost, domain


def _table(arms: list[Arm]) -> list[list[str]]:
    """A normalizer a column, a learning rate a row; the chosen rate is starred."""
    found = {(arm.normalizer, trial.lr): (arm, trial) for arm in arms for trial in arm.tuning}

    def cell(label: str, lr: float) -> str:
        if (label, lr) not in found:
            return words.MISSING
        arm, trial = found[label, lr]
        result = words.percent(trial.measured) if trial.measured is not None else trial.outcome
        return f"{result} *" if lr == arm.lr else result

    labels = [arm.normalizer for arm in arms if arm.tuning]
    grid = sorted({lr for _, lr in found})
    head = ["Learning rate (* chosen)", *labels]
    return [head, *([words.rate(lr), *(cell(label, lr) for label in labels)] for lr in grid)]


def _figure(view: View, look: Look, condition: Condition) -> Figure | None:
    arms = view.of(condition.id)
    finished, lost, domain = _rows(view, arms)
    if not finished and not lost:
        return None
    foot = " × at the foot: this rate diverged or failed." if lost else ""
    return Figure(
        key=f"tuning/{condition.id}",
        section="tuning",
        title="Validation accuracy against learning rate",
        subtitle=condition.label,
        caption=f"Ringed: the rate chosen for the final runs.{foot}",
        chart=frame(_layers(view, look, (finished, lost), domain), look),
        table=_table(arms),
    )


def _layers(
    view: View, look: Look, parts: tuple[list[Row], list[Row]], domain: list[float]
) -> list[Any]:
    """Lines over the grid, rings under the chosen rates, crosses for lost trials."""
    finished, lost = parts
    grid = sorted({row["rate"] for row in finished + lost})
    ends = [grid[0] / 1.4, grid[-1] * 1.4]
    log = {"type": "log", "domain": ends, "nice": False}
    shared = {
        "x": x_axis("lr", "learning rate (log scale)", scale=log, format="~g", values=grid),
        "y": y_axis(
            "accuracy", "validation accuracy", format=".0%", scale={"domain": domain, "nice": False}
        ),
        "color": series(view, look, "color"),
        "description": need("altair").Description("said:N"),
        "tooltip": "said:N",
    }
    chart = plot(finished).encode(**shared)
    ring = chart.transform_filter("datum.chosen").mark_point(
        shape="circle", size=230, filled=False, strokeWidth=1.8, opacity=1
    )
    cross = "M-.7,-.7L.7,.7M.7,-.7L-.7,.7"
    return [
        chart.mark_line(strokeWidth=1.8).encode(strokeDash=series(view, look, "strokeDash")),
        ring,
        chart.mark_point(filled=True, size=55, opacity=1).encode(shape=series(view, look, "shape")),
        plot(lost)
        .mark_point(shape=cross, size=70, filled=False, strokeWidth=2, opacity=1)
        .encode(**shared),
    ]
