"""``normlab list``: the catalogue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class List:
    """List every method of the catalogue."""

    site: Literal["activation", "weight", "gradient"] | None = None
    """Only methods that act there."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Print the catalogue.

        Returns:
            The exit status.
        """
        from normlab.discovery import catalogue

        cards = catalogue(self.site).values()
        if self.json:
            from normlab.cli import print_json
            from normlab.commands.show import as_dict

            print_json([as_dict(card) for card in cards])
            return 0
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("name", "title", "year", "site", "partition"):
            table.add_column(heading, overflow="fold")
        for card in cards:
            year = str(card.year or "")
            table.add_row(card.name, card.title, year, card.site, card.pattern)
        Console().print(table)
        return 0
