"""The ranking as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from normlab.report import words
from normlab.report.extra import need
from normlab.report.read import read
from normlab.report.view import Arm, Condition, View

if TYPE_CHECKING:
    from rich.console import RenderableType

COLUMNS = ("normalizer", "accuracy", "95 % interval", "difference", "p", "lr", "lost runs", "step")


def terminal_table(comparison: Mapping[str, Any]) -> RenderableType:
    """Rank the normalizers of each condition.

    Args:
        comparison: The comparison's dictionary.

    Returns:
        A group of ``rich`` tables, one per condition.
    """
    group = need("rich.console").Group
    text = need("rich.text").Text
    view = read(comparison)
    tables = [_table(view, one) for one in view.conditions if view.of(one.id)]
    notes = [] if tables else ["No runs yet: nothing to rank."]
    notes += [note for note in (words.interval_note(view),) if note]
    if tables:
        notes.append(f"difference: to {view.baseline}, percentage points, paired by seed")
    # Text objects, because rich would read square brackets in plain strings as markup
    shown: RenderableType = group(*tables, *(text(note, style="dim") for note in notes))
    return shown


def _cells(view: View, arm: Arm) -> list[str]:
    """One arm's row, in the order of ``COLUMNS``."""
    accuracy, difference = arm.accuracy, arm.difference
    mean = words.percent(accuracy.mean) if accuracy else words.MISSING
    span = words.percent_span(accuracy) if accuracy else words.MISSING
    change = "baseline" if arm.normalizer == view.baseline else words.MISSING
    if difference and change != "baseline":
        change = f"{words.points(difference.mean)} [{words.points_span(difference)}]"
    lr = words.rate(arm.lr) + (" (edge)" if arm.lr_at_edge else "")
    p = words.p_value(difference.p) if difference else words.MISSING
    time = words.seconds(arm.seconds.mean) if arm.seconds else words.MISSING
    return [arm.normalizer, mean, span, change, p, lr, words.lost_count(arm), time]


def _table(view: View, condition: Condition) -> Any:
    """One condition's ranking, best first; lost runs stand out."""
    text, box = need("rich.text").Text, need("rich.box")
    title = text(condition.label, style="bold")
    table = need("rich.table").Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for place, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if place == 0 else "right")
    for arm in view.ranked(condition.id):
        style = "bold" if arm.normalizer == view.baseline else ""
        cells = [text(cell, style=style) for cell in _cells(view, arm)]
        if arm.diverged or arm.failed:
            cells[COLUMNS.index("lost runs")].stylize("red")
        table.add_row(*cells)
    return table
