"""The idx format of MNIST and its relatives, raw, gzip- or xz-compressed.

Layout: two zero bytes, a type byte (8: unsigned bytes), the number of dimensions, each dimension
as four bytes (big-endian), then the values in row-major order.
"""

from __future__ import annotations

import gzip
import lzma
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from normlab.data.errors import DataError

SUFFIXES = ("", ".gz", ".xz")


def read_idx(path: str | Path, dimensions: int) -> NDArray[np.uint8]:
    """Read an idx file of unsigned bytes.

    Args:
        path: The file; ``.gz`` and ``.xz`` are decompressed.
        dimensions: How many dimensions the file must declare: 3 for images, 1 for labels.

    Returns:
        An array of the declared shape.

    Raises:
        DataError: If the file is missing, damaged, of another type or rank, or shorter or longer
            than it declares.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "labels.gz")
        ...     write_idx(path, np.array([3, 1], dtype=np.uint8))
        ...     read_idx(path, 1)
        array([3, 1], dtype=uint8)
    """
    path = Path(path)
    try:
        with _open(path) as file:
            return _parse(file, path, dimensions)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(
            f"a readable idx file {path}",
            f"{type(error).__name__}: {error}",
            "check the path; if the file is there it is damaged or truncated: fetch it again",
        ) from error


def write_idx(path: str | Path, values: NDArray[np.uint8]) -> None:
    """Write unsigned bytes as idx; a path that ends in ``.gz`` or ``.xz`` is compressed.

    The same values give the same bytes: no time stamp, no file name.

    Args:
        path: Where to write.
        values: The array, of any rank.
    """
    path = Path(path)
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    content = header + np.ascontiguousarray(values, dtype=np.uint8).tobytes()
    if path.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    elif path.suffix == ".xz":
        # Pixels have no word alignment, so position bits would only dilute the statistics.
        lzma2 = {"id": lzma.FILTER_LZMA2, "preset": 6, "pb": 0}
        content = lzma.compress(content, lzma.FORMAT_XZ, filters=[lzma2])
    path.write_bytes(content)


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    return path.open("rb")


def _parse(file: BinaryIO, path: Path, dimensions: int) -> NDArray[np.uint8]:
    magic = file.read(4)
    wanted = bytes([0, 0, 8, dimensions])
    if magic != wanted:
        raise DataError(
            f"the magic number {wanted.hex()} (unsigned bytes, {dimensions} dimensions) in {path}",
            magic.hex() or "an empty file",
            "check that images and labels are not swapped and that the file is idx",
        )
    sizes = file.read(4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise DataError(
            f"{dimensions} sizes in the header of {path}",
            f"only {len(sizes)} bytes of them",
            "the file is truncated: fetch it again",
        )
    shape = struct.unpack(f">{dimensions}I", sizes)
    count = math.prod(shape)
    # One byte more than declared shows a file that is too long, whatever it unpacks to.
    content = file.read(count + 1)
    if len(content) != count:
        raise DataError(
            f"{count} values ({'×'.join(map(str, shape))}) in {path}",
            f"{len(content)}" if len(content) < count else "more",
            "the file is truncated or damaged: fetch it again",
        )
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)
