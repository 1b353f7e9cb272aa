"""Reading pickles of arrays without running what they contain.

A pickle is a program: it may name any function of any module and call it.  CIFAR's "python
version" needs six names, all about numpy arrays.  These are mapped to functions and classes of this
file, so neither numpy's private modules (renamed in 2.0) nor anything else is looked up, and any
other name is refused before it is imported.
"""

from __future__ import annotations

import io
import pickle
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normlab.data.errors import DataError


def read_pickle(content: bytes, name: str) -> object:
    """Read a pickle made of numbers, strings, lists, dicts and numpy arrays.

    Strings of Python 2 are read as latin-1, as numpy advises.

    Args:
        content: The pickle.
        name: Where it comes from, for errors.

    Returns:
        The object.

    Raises:
        DataError: If the pickle is damaged or names anything that arrays do not need.

    Example:
        >>> read_pickle(pickle.dumps({"labels": [1, 2]}), "a dict")
        {'labels': [1, 2]}
        >>> import os
        >>> read_pickle(pickle.dumps(os.getcwd), "a function")
        Traceback (most recent call last):
        normlab.data.errors.DataError: expected only numpy arrays, lists, dicts and strings in \
a function, but found the name posix.getcwd; do not trust this file: fetch it again from the \
original source
    """
    try:
        return _ArraysOnly(content, name).load()
    except DataError:
        raise
    except (
        pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError,
        OverflowError, MemoryError, RecursionError, ImportError,
    ) as error:  # fmt: skip
        # The pickle machine has no error of its own for damaged input: these are what it raises.
        raise DataError(
            f"a readable pickle in {name}",
            f"{type(error).__name__}: {error}",
            "the file is damaged, truncated or no pickle: fetch it again",
        ) from error


class _ArraysOnly(pickle.Unpickler):
    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")
        self._name = name

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise DataError(
                f"only numpy arrays, lists, dicts and strings in {self._name}",
                f"the name {module}.{name}",
                "do not trust this file: fetch it again from the original source",
            ) from None


class _Kind:
    """A plain numeric dtype, in the making.

    It stands in for numpy's own until the state is checked: numpy trusts the state of a dtype,
    and a forged one could make it read beyond the content.
    """

    __slots__ = ("_code", "_order")

    def __init__(self, code: object, _align: object = False, _copy: object = False) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>=|]?[biuf][1248]", code):
            raise pickle.UnpicklingError(f"an array of {code!r}, not of plain numbers")
        self._code = code[-2:]
        self._order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        if order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"the byte order {order!r}")
        self._order = order

    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self._order + self._code)


class _Array(np.ndarray[Any, np.dtype[Any]]):
    """An array that takes its state from the pickle after checking it."""

    def __setstate__(self, state: Any, /) -> None:
        _, shape, kind, fortran, content = state
        ready = _from_bytes(content, kind, shape)
        checked: Any = (1, ready.shape, ready.dtype, bool(fortran), ready.tobytes())
        super().__setstate__(checked)


def _from_bytes(content: bytes | str, kind: _Kind, shape: tuple[int, ...]) -> NDArray[Any]:
    """Bytes as an array; Python 2 wrote them as text."""
    raw = content.encode("latin1") if isinstance(content, str) else content
    return np.frombuffer(raw, dtype=kind.dtype()).reshape(shape)


def _reconstruct(_class: object, _shape: object, _code: object) -> _Array:
    """An empty array; the state that follows in the pickle gives shape, dtype and content."""
    return np.empty(0, dtype=np.uint8).view(_Array)


def _scalar(kind: _Kind, content: bytes | str) -> Any:
    return _from_bytes(content, kind, ())[()]


def _frombuffer(content: bytes, kind: _Kind, shape: Any, order: Any = "C") -> NDArray[Any]:
    return _from_bytes(content, kind, (-1,)).reshape(shape, order=order)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Bytes, as Python 3 writes them for protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the encoding {encoding!r}")
    return text.encode(encoding)


# numpy.ndarray occurs as an argument only; a name that cannot be called is enough.
_ALLOWED: dict[tuple[str, str], object] = {
    ("numpy", "ndarray"): "numpy.ndarray",
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): _encode,
}
for _core in ("core", "_core"):
    _ALLOWED[f"numpy.{_core}.multiarray", "_reconstruct"] = _reconstruct
    _ALLOWED[f"numpy.{_core}.multiarray", "scalar"] = _scalar
    _ALLOWED[f"numpy.{_core}.numeric", "_frombuffer"] = _frombuffer
