"""Numbers and dates as readers of a report want them; missing ones become a dash."""

from __future__ import annotations

import math
from datetime import datetime

from normlab.report.view import Arm, Interval, View

MISSING = "–"


def percent(value: float | None, digits: int = 1) -> str:
    """Write a fraction as a percentage: 0.873 becomes ``87.3 %``."""
    return MISSING if value is None else f"{100 * value:.{digits}f} %"


def points(value: float, digits: int = 1) -> str:
    """Write a difference of fractions in percentage points, with its sign."""
    number = round(100 * value, digits) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{number:+.{digits}f}".replace("-", "−")


def percent_span(interval: Interval) -> str:
    """Write an interval of fractions: ``85.1 to 88.0 %``."""
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f} %"


def points_span(interval: Interval) -> str:
    """Write an interval of differences: ``−1.2 to +0.3``."""
    return f"{points(interval.low)} to {points(interval.high)}"


def rate(value: float | None) -> str:
    """Write a learning rate without superfluous digits."""
    return MISSING if value is None else f"{value:.3g}"


def p_value(value: float | None) -> str:
    """Write a p value: two digits, small ones as a bound."""
    if value is None:
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def count(value: float | None) -> str:
    """Write a count with thin spaces between thousands."""
    return MISSING if value is None else f"{value:,.0f}".replace(",", "\u202f")


def seconds(value: float | None) -> str:
    """Write a duration with three digits and a fitting unit."""
    if value is None:
        return MISSING
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(value) >= size:
            return f"{_digits(value / size)} {unit}"
    return f"{_digits(value / 1e-6)} µs"


def memory(value: float | None) -> str:
    """Write bytes with three digits and a binary unit."""
    if value is None:
        return MISSING
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if abs(value) >= 2**power:
            return f"{_digits(value / 2**power)} {unit}"
    return f"{value:.0f} B"


def _digits(value: float) -> str:
    """Three significant digits without an exponent."""
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def lost_count(arm: Arm) -> str:
    """Say how many of an arm's final runs diverged or failed."""
    parts = []
    if arm.diverged:
        parts.append(f"{arm.diverged} diverged")
    if arm.failed:
        parts.append(f"{arm.failed} failed")
    return ", ".join(parts) or "none"


def when(created: str) -> str:
    """Write an ISO time for people; what is none stays as it was given."""
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return created
    zone = f" {moment.tzname()}" if moment.tzinfo else ""
    return f"{moment.day} {moment:%B %Y, %H:%M}{zone}"


def steps(view: View) -> str:
    """Say how many optimizer steps a run had: the most that any curve reached."""
    reached = [curve.steps for arm in view.arms for curve in arm.curves]
    found = [step for step in reached if step is not None]
    if found:
        return count(max(found))
    return dict(view.recipe).get("steps", MISSING)


def seconds_span(interval: Interval) -> str:
    """Write an interval of durations, both ends in the unit of its middle: ``11 to 13 ms``."""
    middle, _, unit = seconds(interval.mean).partition(" ")
    size = interval.mean / float(middle) if float(middle) else 1e-6
    return f"{_digits(interval.low / size)} to {_digits(interval.high / size)} {unit}"


def interval_note(view: View) -> str:
    """Explain what a bootstrap interval is worth with so few runs; empty from five on."""
    runs = [arm.n for arm in view.arms if arm.accuracy]
    fewest, most = min(runs, default=0), max(runs, default=0)
    if not 0 < fewest < 5:
        return ""
    if most == 1:
        return "With one run there is no spread to see: each interval is a single point."
    count_of = f"n = {fewest}" if fewest == most else f"n = {fewest} to {most}"
    kind = "just" if most < 4 else "hardly more than"
    return (
        f"With {count_of} seeds the bootstrap interval is {kind} the range of the values: read "
        "it as “this is what happened”, not as a guarantee for the next seed."
    )
