"""The figures of a report, as Altair charts with captions and the numbers they show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from normlab.report.charts import accuracy, cost, learning, tuning
from normlab.report.charts.base import Figure
from normlab.report.look import Look
from normlab.report.read import read
from normlab.report.view import View

__all__ = ["Figure", "build", "figures"]


def build(view: View, look: Look) -> Iterator[Figure]:
    """Draw every figure that has data, in page order.

    Args:
        view: The comparison.
        look: For the page or for Python users.

    Yields:
        The figures.
    """
    for draw in (
        accuracy.overview,
        learning.curves,
        accuracy.norm_batch,
        cost.costs,
        tuning.rates,
    ):
        yield from draw(view, look)


def figures(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Build the charts of a comparison for Python users, each with title and legend.

    Args:
        comparison: The comparison's dictionary.

    Returns:
        Charts by key.
    """
    drawn = build(read(comparison), Look(page=False))
    return {
        figure.key: figure.chart.properties(title=[figure.title, figure.subtitle])
        for figure in drawn
    }
