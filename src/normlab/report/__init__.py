"""Report: one comparison as a self-contained HTML page, as charts, or as a terminal table.

The input is the plain, JSON-serialisable dictionary that a comparison produces. Nothing in it is
trusted: text is escaped wherever it lands, and numbers that are no finite numbers count as
missing. Importing this package loads none of the drawing libraries; they come with
``pip install normlab[lab]`` and are imported when a function needs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import altair
    from rich.console import RenderableType

__all__ = ["figures", "render", "terminal_table", "write"]


def render(comparison: Mapping[str, Any]) -> str:
    """Draw the comparison as one HTML page that needs no network.

    Args:
        comparison: The comparison's dictionary; missing parts are shown as missing.

    Returns:
        The page's text, with style, script and figures inside it.
    """
    from normlab.report import page

    return page.render(comparison)


def write(comparison: Mapping[str, Any], path: str | PathLike[str]) -> Path:
    """Write the page of ``render`` to a file, whole or not at all.

    Args:
        comparison: The comparison's dictionary.
        path: The file to create or replace; its folder must exist.

    Returns:
        The path that was written.

    Raises:
        OSError: The file could not be written; what stood there before is untouched.
    """
    from normlab.report import page

    return page.write(comparison, path)


def figures(comparison: Mapping[str, Any]) -> dict[str, altair.LayerChart]:
    """Build the page's figures as Altair charts, to restyle or combine.

    Args:
        comparison: The comparison's dictionary.

    Returns:
        Charts by key, in page order, such as ``"overview"``, ``"norm_batch"`` or
        ``"valid_accuracy/<condition id>"``; a figure without data is left out.
    """
    from normlab.report import charts

    return charts.figures(comparison)


def terminal_table(comparison: Mapping[str, Any]) -> RenderableType:
    """Rank the normalizers of each condition in compact tables for a terminal.

    Args:
        comparison: The comparison's dictionary.

    Returns:
        An object that ``rich.print`` or a ``rich.console.Console`` shows.
    """
    from normlab.report import terminal

    return terminal.terminal_table(comparison)
