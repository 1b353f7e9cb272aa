"""Where records of claims lie."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "NORMLAB_RECORDS_DIR"


def folder(scale: str = "cpu") -> Path:
    """The folder of records.

    Args:
        scale: What is run at the scale ``"smoke"`` shows that it runs and is no evidence: it goes
            to ``runs/smoke`` of the working directory, unless the variable is set.

    Returns:
        That of the environment variable NORMLAB_RECORDS_DIR; else ``records`` of the checkout that
        this package lies in, or of the working directory.
    """
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given).expanduser()
    if scale == "smoke":
        return Path.cwd() / "runs" / "smoke"
    checkout = Path(__file__).resolve().parents[3]
    return (checkout if (checkout / "records").is_dir() else Path.cwd()) / "records"
