"""From records to a comparison: means, intervals, paired tests, curves and costs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

from normlab.bench import choice
from normlab.bench.environment import environment
from normlab.bench.plan import Plan, chosen_rate, describe_recipe
from normlab.bench.recipe import Condition
from normlab.bench.records import Record, Store, number
from normlab.bench.words import summary

RESAMPLES = 9999
_ROUNDING = 1e-9  # spread below which values are equal but for rounding


def interval(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean and bootstrap 95 % interval.

    Args:
        values: One for each seed; with fewer than two the interval is the value itself.

    Returns:
        ``mean``, ``low``, ``high``, ``values``; None without values.

    Example:
        >>> interval([0.5, 0.5])["low"]
        0.5
    """
    if not values:
        return None
    mean = statistics.fmean(values)
    low = high = mean
    if max(values) - min(values) > _ROUNDING:
        import numpy as np
        from scipy.stats import bootstrap

        found = bootstrap(
            (np.asarray(values),),
            np.mean,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        low, high = float(found.low), float(found.high)
    return {"mean": mean, "low": low, "high": high, "values": list(values)}


def paired(ours: dict[int, float], theirs: dict[int, float]) -> dict[str, Any] | None:
    """Difference by seed to the baseline: mean, bootstrap interval, two-sided paired t test.

    Args:
        ours: Value by seed.
        theirs: The baseline's.

    Returns:
        ``mean``, ``low``, ``high``, ``n``, ``p`` (None under two seeds or without spread).
    """
    seeds = sorted(set(ours) & set(theirs))
    differences = [ours[s] - theirs[s] for s in seeds]
    found = interval(differences)
    if found is None:
        return None
    p = None
    if max(differences) - min(differences) > _ROUNDING:
        from scipy.stats import ttest_rel

        p = float(ttest_rel([ours[s] for s in seeds], [theirs[s] for s in seeds]).pvalue)
        p = p if math.isfinite(p) else None
    del found["values"]
    return {**found, "n": len(seeds), "p": p}


def _curve(record: Record) -> dict[str, Any]:
    keys = ("step", "epoch", "train_loss", "valid_accuracy", "valid_loss")
    return {
        "seed": record.spec.get("seed"),
        **{key: [point.get(key) for point in record.points] for key in keys},
    }


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _numbers(records: Sequence[Record], where: str, key: str) -> list[float]:
    """Finite numbers of that key from the points (their median), the start or the end."""
    found = []
    for record in records:
        if where == "points":
            good = [v for point in record.points if (v := number(point.get(key))) is not None]
            found += [statistics.median(good)] if good else []
        else:
            value = number(getattr(record, where).get(key))
            found += [value] if value else []
    return found


class _Arm:
    """The records of one normalizer in one condition."""

    def __init__(self, plan: Plan, store: Store, normalizer: str, condition: Condition) -> None:
        self.plan, self.normalizer, self.condition = plan, normalizer, condition
        self.tuning = [store.of(s) for s in plan.tuning(normalizer, condition)]
        waiting = any(r is None or not r.outcome for r in self.tuning)
        self.lr = None if waiting else chosen_rate(plan, self.tuning)
        specs = [] if self.lr is None else plan.finals(normalizer, condition, self.lr)
        found = [store.of(s) for s in specs]
        self.finals = [r for r in found if r is not None and r.outcome]
        self.ended = [r for r in [*self.tuning, *self.finals] if r is not None and r.outcome]

    def accuracies(self) -> dict[int, float]:
        """Test accuracy by seed; diverged runs count with theirs, that of guessing."""
        values = {int(r.spec["seed"]): r.final("test_accuracy") for r in self.finals}
        return {seed: v for seed, v in values.items() if v is not None}

    def as_dict(self, baseline: dict[int, float]) -> dict[str, Any]:
        """The arm as plain values."""
        rates, own = self.plan.recipe.lrs, self.accuracies()
        is_baseline = self.normalizer == self.plan.baseline
        trained = any(r is not None and r.outcome == "finished" for r in self.tuning)
        edge = trained and self.lr in (min(rates), max(rates))
        kept = _numbers(self.finals, "start", "saved_for_backward_bytes")
        memory = _numbers(self.finals, "end", "peak_memory_bytes")
        return {
            "normalizer": self.normalizer,
            "condition": self.condition.id,
            "lr": self.lr,
            "lr_at_edge": edge,
            "n": len(own),
            "diverged": sum(r.outcome == "diverged" for r in self.finals),
            "failed": sum(r.outcome == "failed" for r in self.finals or self.ended),
            "reasons": sorted({str(r.end["reason"]) for r in self.ended if r.end.get("reason")}),
            "accuracy": interval(list(own.values())),
            "difference": None if is_baseline else paired(own, baseline),
            "curves": [_curve(r) for r in self.finals],
            "seconds_per_step": _spread(_numbers(self.finals, "points", "seconds_per_step")),
            "peak_memory_bytes": statistics.median(memory) if memory else None,
            "saved_for_backward_bytes": statistics.median(kept) if kept else None,
            "tuning": [
                {
                    "lr": lr,
                    "valid_accuracy": r.final("valid_accuracy") if r else None,
                    "outcome": r.outcome if r else None,
                }
                for lr, r in zip(rates, self.tuning, strict=False)
                if r is not None and r.outcome
            ],
        }

    def troubles(self) -> list[dict[str, Any]]:
        """Runs that diverged or failed."""
        return [
            {
                "normalizer": self.normalizer,
                "condition": self.condition.id,
                "lr": record.spec.get("lr"),
                "seed": record.spec.get("seed"),
                "phase": record.spec.get("phase"),
                "outcome": record.outcome,
                "reason": str(record.end.get("reason", "")),
                "step": record.end.get("step"),
                "record": f"runs/{record.id}.jsonl",
            }
            for record in self.ended
            if record.outcome != "finished"
        ]


def finals(plan: Plan, store: Store) -> dict[tuple[str, str], dict[int, Record]]:
    """Records of the final runs that ended with a test accuracy; each file is read once.

    Args:
        plan: The comparison.
        store: Its records.

    Returns:
        By normalizer and id of the condition: the record by seed.
    """
    return {
        (normalizer, condition.id): {
            int(r.spec["seed"]): r
            for r in _Arm(plan, store, normalizer, condition).finals
            if r.final("test_accuracy") is not None
        }
        for normalizer, condition in plan.arms()
    }


def _normalizer(spec: str) -> dict[str, Any]:
    """What the report says of a normalizer."""
    terms = choice.parse(spec).terms
    cards = [term.card for term in terms]
    patterns = [card.pattern for card in cards if "->" in card.pattern]
    several = len(terms) > 1
    options = {
        f"{term.name}.{key}" if several else key: str(value)
        for term in terms
        for key, value in term.options.items()
    }
    return {
        "label": spec,
        "name": "+".join(term.name for term in terms),
        "title": " + ".join(card.title for card in cards),
        "options": options,
        "pattern": "; ".join(patterns) or None,
    }


def _common_environment(records: Sequence[Record]) -> dict[str, str]:
    """The environment of the records; values that differ between them are all named."""
    found = [r.environment for r in records] or [dict(environment())]
    keys = sorted({key for e in found for key in e})
    return {key: ", ".join(sorted({str(e.get(key, "?")) for e in found})) for key in keys}


def analyse(plan: Plan, store: Store) -> dict[str, Any]:
    """Return the comparison that a plan's records give so far.

    Args:
        plan: What is compared.
        store: Its records.

    Returns:
        JSON values, as `normlab.report` takes them.
    """
    arms = [_Arm(plan, store, n, c) for n, c in plan.arms()]
    baselines = {a.condition.id: a.accuracies() for a in arms if a.normalizer == plan.baseline}
    ended = [r for arm in arms for r in arm.ended]
    unreadable = store.unreadable()
    facts = plan.facts
    parameters = {
        a.normalizer: int(a.finals[0].start["parameters"])
        for a in arms
        if a.finals and isinstance(a.finals[0].start.get("parameters"), int)
    }
    # An arm whose tuning runs all failed has no rate, and so no final runs to wait for.
    hopeless = [a for a in arms if a.tuning and len(a.ended) == len(a.tuning) and a.lr is None]
    planned = plan.runs_planned - len(hopeless) * len(plan.seeds)
    comparison: dict[str, Any] = {
        "schema": 1,
        "title": plan.title or f"Normalizers compared on {facts.get('title', plan.data)}",
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "complete": len(ended) == planned,
        "runs_done": len(ended),
        "runs_planned": planned,
        "data": {"name": plan.data, "fingerprint": plan.fingerprint, **facts.get("data", {})},
        "network": {"spec": plan.network, "parameters": parameters, **facts.get("network", {})},
        "baseline": plan.baseline,
        "metric": "test accuracy",
        "conditions": [
            {
                "id": c.id,
                "label": c.label(plan.grain),
                "batch_size": c.batch_size,
                "norm_batch": c.norm_batch,
                "composition": c.composition,
            }
            for c in plan.conditions
        ],
        "normalizers": [_normalizer(spec) for spec in plan.normalizers],
        "arms": [arm.as_dict(baselines.get(arm.condition.id, {})) for arm in arms],
        "diverged_runs": [trouble for arm in arms for trouble in arm.troubles()],
        "recipe": describe_recipe(plan) | _adapted(arms),
        "environment": _common_environment(ended),
        "command": plan.command,
    }
    comparison["summary"] = summary(comparison)
    if unreadable:
        comparison["summary"].append(
            f"{len(unreadable)} record file{'s' * (len(unreadable) > 1)} could not be read and "
            f"{'are' if len(unreadable) > 1 else 'is'} left out: {', '.join(unreadable)}."
        )
    return comparison


def _adapted(arms: Sequence[_Arm]) -> dict[str, str]:
    """Options that were shrunk to short runs, for the recipe."""
    found: dict[str, set[str]] = {}
    for arm in arms:
        for record in arm.finals:
            options = record.start.get("adapted_options")
            if isinstance(options, dict) and options:
                text = ", ".join(f"{k}={v}" for k, v in sorted(options.items()))
                found.setdefault(arm.normalizer, set()).add(text)
    return {
        f"{name}, schedules shrunk to the run": "; ".join(sorted(t)) for name, t in found.items()
    }
