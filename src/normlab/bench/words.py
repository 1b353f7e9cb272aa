"""The comparison in words: sentences that follow from the numbers, and from nothing else."""

from __future__ import annotations

from typing import Any

_CLEAR = 0.05  # p under which a difference is called one


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _half(found: dict[str, Any]) -> str:
    """Half the width of an interval, in points."""
    return f"{50 * (found['high'] - found['low']):.1f}"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def summary(comparison: dict[str, Any]) -> list[str]:
    """Return a few sentences on a comparison.

    Args:
        comparison: As `normlab.bench.analysis.analyse` makes it, without its summary.

    Returns:
        Sentences: the best of each condition against the baseline, what moving between
        conditions costs, troubles, and how far the numbers carry.
    """
    done = [arm for arm in comparison["arms"] if arm["accuracy"]]
    if not done:
        return ["No final run has finished yet, so there is nothing to compare."]
    sentences = []
    if not comparison["complete"]:
        have, want = comparison["runs_done"], comparison["runs_planned"]
        sentences.append(f"Incomplete: {have} of {want} runs have ended.")
    for condition in comparison["conditions"]:
        sentences += _ranking(comparison, condition, done)
    sentences += _moves(comparison, done)
    sentences += _troubles(comparison)
    return sentences + _reach(comparison, done)


def _ranking(
    comparison: dict[str, Any], condition: dict[str, Any], done: list[dict[str, Any]]
) -> list[str]:
    """The best of one condition, and how it stands to the baseline and to the runner-up."""
    arms = [arm for arm in done if arm["condition"] == condition["id"]]
    if not arms:
        return []
    arms.sort(key=lambda arm: -arm["accuracy"]["mean"])
    best, baseline = arms[0], comparison["baseline"]
    where = f"When {_lower(condition['label'])}"
    text = f"{where}, {best['normalizer']} is best at {_percent(best['accuracy']['mean'])}"
    rivals = arms[1:]
    if best["normalizer"] == baseline:
        if rivals:
            second = rivals[0]
            gap = best["accuracy"]["mean"] - second["accuracy"]["mean"]
            tie = _tie(second["difference"])
            text += f", {100 * gap:.1f} points before {second['normalizer']}{tie}"
        return [f"{text}."]
    difference = best["difference"]
    if difference and abs(difference["mean"]) < 5e-4:
        text += f", no different from {baseline}"
    elif difference:
        sure = difference["p"] is not None and difference["p"] < _CLEAR
        points = f"{100 * difference['mean']:.1f} ± {_half(difference)} points"
        text += f"; it {'beats' if sure else 'is ahead of'} {baseline} by {points}"
        text += _tie(difference)
    if rivals and rivals[0]["normalizer"] != baseline:
        second = rivals[0]
        overlap = second["accuracy"]["high"] >= best["accuracy"]["low"]
        word = "next (intervals overlap)" if overlap else "next"
        text += f"; {second['normalizer']} is {word}, at {_percent(second['accuracy']['mean'])}"
    return [f"{text}."]


def _tie(difference: dict[str, Any] | None) -> str:
    """A remark where a difference could be chance."""
    if difference is None or difference["n"] < 2:
        return " (one seed: no test)"
    p = difference["p"]
    if p is None:
        return " (no spread between seeds: no test)"
    if p < _CLEAR:
        return ""
    return f" (paired p = {p:.2f}: could be chance)"


def _moves(comparison: dict[str, Any], done: list[dict[str, Any]]) -> list[str]:
    """What changes between the first condition and each other one."""
    first, *others = comparison["conditions"]
    at = {(arm["normalizer"], arm["condition"]): arm["accuracy"]["mean"] for arm in done}
    sentences = []
    for other in others:
        changes = {
            n["label"]: at[n["label"], other["id"]] - at[n["label"], first["id"]]
            for n in comparison["normalizers"]
            if (n["label"], other["id"]) in at and (n["label"], first["id"]) in at
        }
        if not changes:
            continue
        moved = sorted(changes.items(), key=lambda item: item[1])
        steady = [name for name, change in moved if abs(change) < 0.005]
        lost = [f"{name} {100 * change:+.1f}" for name, change in moved if abs(change) >= 0.005]
        text = f"From “{first['label']}” to “{other['label']}”, in points: "
        text += ", ".join(lost) if lost else "nothing moves by half a point"
        if steady and lost:
            text += f"; {', '.join(steady)} {'stays' if len(steady) == 1 else 'stay'} within 0.5"
        sentences.append(f"{text}.")
    return sentences


def _troubles(comparison: dict[str, Any]) -> list[str]:
    """Diverged and failed runs, and rates at the edge of the grid."""
    sentences = []
    for outcome, verb in (("diverged", "diverged"), ("failed", "failed")):
        names: dict[str, int] = {}
        for run in comparison["diverged_runs"]:
            if run["outcome"] == outcome:
                names[run["normalizer"]] = names.get(run["normalizer"], 0) + 1
        if names:
            total = sum(names.values())
            parts = ", ".join(f"{name} {count}" for name, count in names.items())
            sentences.append(f"{total} {'run' if total == 1 else 'runs'} {verb}: {parts}.")
    edge = sorted({arm["normalizer"] for arm in comparison["arms"] if arm["lr_at_edge"]})
    if edge:
        sentences.append(
            f"The best learning rate lies at the edge of the grid for {', '.join(edge)}, which may "
            "do better outside it."
        )
    return sentences


def _reach(comparison: dict[str, Any], done: list[dict[str, Any]]) -> list[str]:
    """How far the numbers carry."""
    fewest, most = min(arm["n"] for arm in done), max(arm["n"] for arm in done)
    if fewest >= 5:
        return []
    seeds = f"{fewest} to {most} seeds" if fewest < most else f"{most} seeds"
    seeds = "one seed" if most == 1 else seeds
    return [f"With {seeds} an arm, intervals say what happened, not what another seed would do."]
