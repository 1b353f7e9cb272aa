"""Where data lies: the directory asked for, or the one that the environment names."""

from __future__ import annotations

import os
from pathlib import Path

from normlab.data.errors import DataError

VARIABLE = "NORMLAB_DATA_DIR"


def resolve(name: str, directory: str | Path | None, fallback: Path | None = None) -> Path:
    """The directory (or archive) in which to look for a data set.

    Args:
        name: The data set, for the error.
        directory: What the caller asked for; None means the environment variable.
        fallback: A system-wide place that may hold the data set, used last.

    Returns:
        A path that exists.

    Raises:
        DataError: If nothing was named, or what was named does not exist.
    """
    source = "directory="
    if directory is None:
        directory = os.environ.get(VARIABLE) or None
        source = f"the environment variable {VARIABLE}"
    if directory is None:
        if fallback is not None and fallback.exists():
            return fallback
        raise DataError(
            f"a directory that holds {name}",
            f"neither directory= nor the environment variable {VARIABLE}",
            "pass or set one of them; 'fashion-mini' comes with normlab and needs none",
        )
    path = Path(directory).expanduser()
    if not path.exists():
        raise DataError(
            f"a directory that holds {name} in {source}",
            f"{path}, which does not exist",
            "check the path",
        )
    return path


def listing(directory: Path, most: int = 8) -> str:
    """What a directory holds, for an error message.

    Args:
        directory: The directory.
        most: How many names to show.

    Returns:
        A phrase such as "a.txt, b/ and 3 more".

    Example:
        >>> listing(Path(__file__))
        'a file, not a directory'
    """
    if not directory.exists():
        return "no such directory"
    if not directory.is_dir():
        return "a file, not a directory"
    names = sorted(p.name + "/" * p.is_dir() for p in directory.iterdir())
    if not names:
        return "an empty directory"
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
