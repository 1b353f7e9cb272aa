"""``normlab report DIR``: write the report of a record folder again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Report:
    """Analyse the records of a comparison again, and write its report."""

    directory: Annotated[str, tyro.conf.Positional]
    """Folder that 'normlab compare --out' wrote."""
    json: bool = False
    """Print the comparison as JSON instead of a table."""

    def run(self) -> int:
        """Write the report.

        Returns:
            The exit status.

        Raises:
            StoreError: If the folder holds no comparison.
        """
        from normlab.bench.compare import report
        from normlab.commands.compare import show_result

        show_result(report(self.directory), self.directory, self.json)
        return 0
