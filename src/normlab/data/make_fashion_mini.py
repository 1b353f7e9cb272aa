"""Make the part of Fashion-MNIST that comes with normlab.

Usage: ``python -m normlab.data.make_fashion_mini SOURCE DEST``

SOURCE holds the four idx files of Fashion-MNIST (on Debian: /usr/share/datasets/fashion-mnist,
from the package dataset-fashion-mnist).  DEST receives four idx.xz files and the licence.  The
part is the first 1,200 training and 200 test images of each class, in the order of the source:
no chance is involved.  Predictors as in PNG were tried before xz and made the files larger, since
the fabrics are noise to them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from normlab.data.errors import DataError
from normlab.data.fashion import CLASSES, EMBEDDED, STEMS, read_part
from normlab.data.idx import write_idx

PER_CLASS = {"train": 1200, "test": 200}


def first_of_each(labels: NDArray[np.uint8], count: int, classes: int) -> NDArray[np.int64]:
    """The positions of the first samples of each class, in their own order.

    Args:
        labels: (N,).
        count: How many of each class.
        classes: The number of classes.

    Returns:
        Increasing positions, (count · classes,).

    Raises:
        DataError: If a class has fewer samples.

    Example:
        >>> first_of_each(np.array([0, 0, 1, 0, 1], dtype=np.uint8), 2, 2)
        array([0, 1, 2, 4])
    """
    found = [np.flatnonzero(labels == c)[:count] for c in range(classes)]
    fewest = min(len(f) for f in found)
    if fewest < count:
        raise DataError(
            f"{count} samples of each of {classes} classes",
            f"a class with {fewest}",
            "use the complete data set as the source",
        )
    return np.sort(np.concatenate(found)).astype(np.int64)


def make(source: str | Path, destination: str | Path) -> list[Path]:
    """Write the part; the same source gives the same content.

    Args:
        source: The folder of the complete idx files.
        destination: The folder to write; made if missing.

    Returns:
        The files written.

    Raises:
        DataError: If the source is incomplete or damaged.
    """
    destination = Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    licence = (EMBEDDED / "LICENSE").read_bytes()
    written = [destination / "LICENSE"]
    written[0].write_bytes(licence)
    for part, count in PER_CLASS.items():
        images, labels = read_part(Path(source), part)
        keep = first_of_each(labels, count, len(CLASSES))
        for what, values in (("images", images), ("labels", labels)):
            written.append(destination / f"{STEMS[part, what]}.xz")
            write_idx(written[-1], values[keep])
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line and print the size of each file.

    Args:
        arguments: The arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m normlab.data.make_fashion_mini",
        description="Write the balanced part of Fashion-MNIST that comes with normlab.",
    )
    parser.add_argument("source", type=Path, help="folder of the four idx files")
    parser.add_argument("destination", type=Path, help="folder to write")
    options = parser.parse_args(arguments)
    try:
        written = make(options.source, options.destination)
    except DataError as error:
        parser.exit(1, f"{error}\n")
    for path in written:
        print(f"{path.stat().st_size:>9,} bytes  {path}")


if __name__ == "__main__":
    main()
