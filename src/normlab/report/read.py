"""Read an untrusted comparison dictionary into a ``View``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from normlab.report.coerce import items, number, pairs, table, text, whole
from normlab.report.view import (
    Arm,
    Condition,
    Curve,
    Interval,
    LostRun,
    Normalizer,
    Trial,
    View,
)

QUANTITIES = ("valid_accuracy", "train_loss", "valid_loss")


def interval(value: Any, middle: str = "mean") -> Interval | None:
    """Read an interval; a missing end collapses onto the middle, a missing middle is none."""
    entry = table(value)
    mean = number(entry.get(middle))
    if mean is None:
        return None
    low, high = number(entry.get("low")), number(entry.get("high"))
    values = (number(one) for one in items(entry.get("values")))
    return Interval(
        mean=mean,
        low=mean if low is None else low,
        high=mean if high is None else high,
        values=tuple(one for one in values if one is not None),
        p=number(entry.get("p")),
    )


def curve(value: Any) -> Curve:
    """Read one run's course; without epochs the steps, else the places, count instead."""
    entry = table(value)
    steps = [whole(one) for one in items(entry.get("step"))]
    places = [number(one) for one in items(entry.get("epoch"))] or [number(s) for s in steps]
    points = {}
    for name in QUANTITIES:
        measured = [number(one) for one in items(entry.get(name))]
        along = places or [float(place + 1) for place in range(len(measured))]
        joined = zip(along, measured, strict=False)
        points[name] = tuple((x, y) for x, y in joined if x is not None and y is not None)
    known = [step for step in steps if step is not None]
    return Curve(text(entry.get("seed")), points, max(known, default=None))


def trial(value: Any) -> Trial | None:
    """Read one tried learning rate; without a positive rate it cannot be drawn."""
    entry = table(value)
    lr = number(entry.get("lr"))
    if lr is None or lr <= 0:
        return None
    return Trial(lr, number(entry.get("valid_accuracy")), text(entry.get("outcome")))


def arm(value: Any) -> Arm:
    """Read one normalizer under one condition."""
    entry = table(value)
    trials = (trial(one) for one in items(entry.get("tuning")))
    return Arm(
        normalizer=text(entry.get("normalizer")),
        condition=text(entry.get("condition")),
        lr=number(entry.get("lr")),
        lr_at_edge=bool(entry.get("lr_at_edge")),
        n=whole(entry.get("n")) or 0,
        diverged=whole(entry.get("diverged")) or 0,
        failed=whole(entry.get("failed")) or 0,
        reasons=tuple(text(one) for one in items(entry.get("reasons"))),
        accuracy=interval(entry.get("accuracy")),
        difference=interval(entry.get("difference")),
        curves=tuple(curve(one) for one in items(entry.get("curves"))),
        seconds=interval(entry.get("seconds_per_step"), "median"),
        peak_memory=number(entry.get("peak_memory_bytes")),
        saved_memory=number(entry.get("saved_for_backward_bytes")),
        tuning=tuple(sorted((t for t in trials if t is not None), key=lambda t: t.lr)),
    )


def lost_run(value: Any) -> LostRun:
    """Read one run that diverged or failed."""
    entry = table(value)
    words = {
        key: text(entry.get(key))
        for key in ("normalizer", "condition", "seed", "phase", "outcome", "reason", "record")
    }
    return LostRun(lr=number(entry.get("lr")), step=whole(entry.get("step")), **words)


def _conditions(comparison: Mapping[str, Any], arms: Iterable[Arm]) -> tuple[Condition, ...]:
    """Declared conditions, and after them those that only an arm names."""
    found = {}
    for value in items(comparison.get("conditions")):
        entry = table(value)
        name = text(entry.get("id"))
        found[name] = Condition(
            id=name,
            label=text(entry.get("label")) or name or "unnamed condition",
            batch_size=whole(entry.get("batch_size")),
            norm_batch=whole(entry.get("norm_batch")),
            composition=text(entry.get("composition")),
        )
    for one in arms:
        label = one.condition or "unnamed condition"
        found.setdefault(one.condition, Condition(one.condition, label, None, None, ""))
    return tuple(found.values())


def _normalizers(comparison: Mapping[str, Any], arms: Iterable[Arm]) -> tuple[Normalizer, ...]:
    """Declared normalizers, and after them those that only an arm names."""
    counts = dict(pairs(table(comparison.get("network")).get("parameters")))
    declared = {}
    for value in items(comparison.get("normalizers")):
        entry = table(value)
        declared[text(entry.get("label"))] = entry
    for one in arms:
        declared.setdefault(one.normalizer, {})
    return tuple(
        Normalizer(
            label=label,
            title=text(entry.get("title")) or text(entry.get("name")),
            options=pairs(entry.get("options")),
            pattern=text(entry.get("pattern")) or None,
            parameters=int(counts[label]) if counts.get(label, "").isdecimal() else None,
            series=place,
        )
        for place, (label, entry) in enumerate(declared.items())
    )


def read(comparison: Mapping[str, Any]) -> View:
    """Read a comparison; missing parts become empty and text becomes printable.

    Args:
        comparison: The comparison's dictionary.

    Returns:
        Its checked, immutable view.
    """
    arms = tuple(arm(one) for one in items(comparison.get("arms")))
    network = table(comparison.get("network"))
    return View(
        title=text(comparison.get("title")) or "Comparison of normalizers",
        created=text(comparison.get("created")),
        complete=bool(comparison.get("complete")),
        runs_done=whole(comparison.get("runs_done")),
        runs_planned=whole(comparison.get("runs_planned")),
        data=dict(pairs(comparison.get("data"))),
        network={key: text(network.get(key)) for key in ("spec", "description")},
        baseline=text(comparison.get("baseline")),
        metric=text(comparison.get("metric")) or "test accuracy",
        conditions=_conditions(comparison, arms),
        normalizers=_normalizers(comparison, arms),
        arms=arms,
        lost=tuple(lost_run(one) for one in items(comparison.get("diverged_runs"))),
        summary=tuple(text(one) for one in items(comparison.get("summary"))),
        recipe=pairs(comparison.get("recipe")),
        environment=pairs(comparison.get("environment")),
        command=text(comparison.get("command")),
    )
