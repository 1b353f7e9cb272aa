"""The drawing libraries, or an error that says how to get them."""

from __future__ import annotations

import importlib
from typing import Any


def need(module: str) -> Any:
    """Import a library of the ``lab`` extra.

    Args:
        module: The module's name, such as ``"altair"``.

    Returns:
        The imported module.

    Raises:
        ImportError: The library is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"The report needs {module.partition('.')[0]!r}, which is not installed. "
            "Repair: pip install normlab[lab]"
        ) from error
