"""Coercions of untrusted JSON values: the wanted type, or a harmless absence."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Control characters and lone surrogates may stand in JSON but neither in XML nor in UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def text(value: Any) -> str:
    """Turn any value into text that HTML, XML and UTF-8 can carry."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return _UNPRINTABLE.sub("\ufffd", str(value))


def number(value: Any) -> float | None:
    """Return a finite number as float, everything else as ``None``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def whole(value: Any) -> int | None:
    """Return a finite number as int, everything else as ``None``."""
    found = number(value)
    return None if found is None else int(found)


def table(value: Any) -> Mapping[str, Any]:
    """Return a mapping, empty where the value is none."""
    return value if isinstance(value, Mapping) else {}


def items(value: Any) -> Sequence[Any]:
    """Return a list or tuple, empty where the value is neither."""
    return value if isinstance(value, list | tuple) else ()


def pairs(value: Any) -> tuple[tuple[str, str], ...]:
    """Return a mapping's entries as text."""
    return tuple((text(key), text(one)) for key, one in table(value).items())
