"""What a report shows: the comparison's dictionary as checked, immutable values.

Units: accuracies and differences are fractions (0 to 1), times seconds, memory bytes. ``None``
stands for a number that is missing or was not finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Interval:
    """A mean (or median) with the ends of its interval, and what it was computed from."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...] = ()
    p: float | None = None


@dataclass(frozen=True)
class Curve:
    """One run's course; ``points[quantity]`` holds (epoch, value) pairs in order."""

    seed: str
    points: dict[str, tuple[tuple[float, float], ...]]
    steps: int | None


@dataclass(frozen=True)
class Trial:
    """One learning rate that was tried; ``accuracy`` is on the validation split.

    A diverged run may carry an accuracy too, that of guessing: it is no point of a curve.
    """

    lr: float
    accuracy: float | None
    outcome: str

    @property
    def measured(self) -> float | None:
        """Accuracy of a trial that ran to its end; none for one that was lost."""
        return None if self.outcome in ("diverged", "failed") else self.accuracy


@dataclass(frozen=True)
class Arm:
    """One normalizer under one condition."""

    normalizer: str
    condition: str
    lr: float | None
    lr_at_edge: bool
    n: int
    diverged: int
    failed: int
    reasons: tuple[str, ...]
    accuracy: Interval | None
    difference: Interval | None
    curves: tuple[Curve, ...]
    seconds: Interval | None
    peak_memory: float | None
    saved_memory: float | None
    tuning: tuple[Trial, ...]


@dataclass(frozen=True)
class Condition:
    """One setting of the normalization batch."""

    id: str
    label: str
    batch_size: int | None
    norm_batch: int | None
    composition: str


@dataclass(frozen=True)
class Normalizer:
    """One normalizer; ``series`` numbers its colour, dash and shape on all figures."""

    label: str
    title: str
    options: tuple[tuple[str, str], ...]
    pattern: str | None
    parameters: int | None
    series: int


@dataclass(frozen=True)
class LostRun:
    """One run that diverged or failed."""

    normalizer: str
    condition: str
    lr: float | None
    seed: str
    phase: str
    outcome: str
    reason: str
    step: int | None
    record: str


@dataclass(frozen=True)
class View:
    """The whole comparison."""

    title: str
    created: str
    complete: bool
    runs_done: int | None
    runs_planned: int | None
    data: dict[str, str]
    network: dict[str, str]
    baseline: str
    metric: str
    conditions: tuple[Condition, ...]
    normalizers: tuple[Normalizer, ...]
    arms: tuple[Arm, ...]
    lost: tuple[LostRun, ...]
    summary: tuple[str, ...]
    recipe: tuple[tuple[str, str], ...]
    environment: tuple[tuple[str, str], ...]
    command: str

    @cached_property
    def series(self) -> dict[str, int]:
        """Series number of each normalizer's label."""
        return {one.label: one.series for one in self.normalizers}

    @cached_property
    def labels(self) -> list[str]:
        """Normalizer labels in display order."""
        return [one.label for one in self.normalizers]

    def of(self, condition: str) -> list[Arm]:
        """Arms of one condition in display order of their normalizers."""
        chosen = [arm for arm in self.arms if arm.condition == condition]
        return sorted(chosen, key=lambda arm: self.series[arm.normalizer])

    def ranked(self, condition: str) -> list[Arm]:
        """Arms of one condition, best mean accuracy first, those without one last."""

        def place(arm: Arm) -> tuple[bool, float]:
            return arm.accuracy is None, -(arm.accuracy.mean if arm.accuracy else 0.0)

        return sorted(self.of(condition), key=place)

    @property
    def seeds(self) -> int:
        """Seeds of the final runs: those with a curve, or lost, or else the most counted."""
        found = {curve.seed for arm in self.arms for curve in arm.curves}
        found |= {run.seed for run in self.lost if run.phase == "final"}
        return len(found) or max((arm.n for arm in self.arms), default=0)
