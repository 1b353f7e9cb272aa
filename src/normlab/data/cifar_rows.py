"""The two encodings of a CIFAR file: rows of bytes, and a pickled dictionary."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from normlab.data.errors import DataError
from normlab.data.unpickle import read_pickle

PIXELS = 3 * 32 * 32
Rows = tuple[NDArray[np.uint8], NDArray[np.int64]]


def from_binary(content: bytes, name: str, classes: int) -> Rows:
    """Read rows of label bytes and pixel bytes (R, G, B planes, each 32×32, row-major).

    Args:
        content: The file.
        name: Where it comes from, for errors.
        classes: 10 (rows of one label) or 100 (a coarse label before the fine one).

    Returns:
        Images (N, 3, 32, 32) and labels (N,).

    Raises:
        DataError: If the length is no multiple of a row, or a label is out of range.

    Example:
        >>> images, labels = from_binary(bytes([7]) + bytes(3072), "one row", 10)
        >>> images.shape, labels
        ((1, 3, 32, 32), array([7]))
    """
    width = PIXELS + (1 if classes == 10 else 2)
    if not content or len(content) % width:
        raise DataError(
            f"whole rows of {width} bytes in {name}",
            f"{len(content)} bytes",
            "the file is truncated, or of another CIFAR: fetch it again",
        )
    rows = np.frombuffer(content, dtype=np.uint8).reshape(-1, width)
    labels = rows[:, width - PIXELS - 1].astype(np.int64)
    return rows[:, -PIXELS:].reshape(-1, 3, 32, 32), _in_range(labels, name, classes)


def from_pickle(content: bytes, name: str, classes: int) -> Rows:
    """Read a pickled dictionary with "data" (N, 3072) and "labels" or "fine_labels".

    Args:
        content: The file.
        name: Where it comes from, for errors.
        classes: 10 or 100.

    Returns:
        Images (N, 3, 32, 32) and labels (N,).

    Raises:
        DataError: If the pickle is unsafe or damaged, lacks a key, or its content does not fit.
    """
    batch = read_pickle(content, name)
    key = "labels" if classes == 10 else "fine_labels"
    fields: dict[Any, Any] = batch if isinstance(batch, dict) else {}
    # Keys are text or bytes, depending on which Python wrote the file.
    fields = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in fields.items()}
    if "data" not in fields or key not in fields:
        raise DataError(
            f"a dictionary with 'data' and {key!r} in {name}",
            f"the keys {sorted(map(str, fields))}" if fields else f"a {type(batch).__name__}",
            "check that the file belongs to this CIFAR",
        )
    pixels, labels = fields["data"], fields[key]
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2:
        raise DataError(
            f"a uint8 array of shape (N, {PIXELS}) as 'data' of {name}",
            _describe(pixels),
            "fetch the file again",
        )
    if pixels.shape[1] != PIXELS or not len(pixels):
        raise DataError(
            f"rows of {PIXELS} pixels as 'data' of {name}", _describe(pixels), "fetch it again"
        )
    numbers = _numbers(labels, name)
    if len(numbers) != len(pixels):
        raise DataError(f"{len(pixels)} labels in {name}", f"{len(numbers)}", "the file is damaged")
    return np.asarray(pixels).reshape(-1, 3, 32, 32), _in_range(numbers, name, classes)


def _numbers(labels: object, name: str) -> NDArray[np.int64]:
    whole = isinstance(labels, np.ndarray) and labels.dtype.kind in "iu"
    whole |= isinstance(labels, list) and all(isinstance(x, int | np.integer) for x in labels)
    if not whole:
        raise DataError(
            f"a list of integers as labels of {name}", _describe(labels), "fetch it again"
        )
    try:
        return np.asarray(labels).astype(np.int64).reshape(-1)
    except (OverflowError, TypeError) as error:
        raise DataError(f"small labels in {name}", str(error), "the file is damaged") from error


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    return f"a {type(value).__name__}"


def _in_range(labels: NDArray[np.int64], name: str, classes: int) -> NDArray[np.int64]:
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise DataError(
            f"labels from 0 to {classes - 1} in {name}",
            f"{labels[wrong[0]]} in row {wrong[0]}",
            "the file is damaged or of another data set: fetch it again",
        )
    return labels
