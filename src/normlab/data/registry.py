"""The data sets by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from normlab.data.cifar import load_cifar
from normlab.data.errors import DataError
from normlab.data.fashion import DEBIAN, load_fashion_mini, load_fashion_mnist
from normlab.data.folder import load_folder
from normlab.data.images import ImageData
from normlab.data.places import resolve

_NAMES = ("fashion-mini", "fashion-mnist", "cifar10", "cifar100", "folder")


def names() -> tuple[str, ...]:
    """The names that ``load`` knows.

    Returns:
        The names; the first needs no files.

    Example:
        >>> names()
        ('fashion-mini', 'fashion-mnist', 'cifar10', 'cifar100', 'folder')
    """
    return _NAMES


def load(
    name: str = "fashion-mini", directory: str | Path | None = None, *, size: int | None = None
) -> ImageData:
    """Load a data set into memory.

    Args:
        name: One of ``names()``.
        directory: The folder (for CIFAR also the archive) with the files.  None takes
            ``fashion-mini`` from the package and any other from the folder named by the
            environment variable NORMLAB_DATA_DIR (``fashion-mnist`` also from where Debian's
            package puts it).
        size: For "folder" only: resize and crop all images to this height and width.

    Returns:
        The data.

    Raises:
        DataError: If the name is unknown, or the files are missing or unusable.

    Example:
        >>> load("fashion-mini").image_shape
        (1, 28, 28)
    """
    if name not in _NAMES:
        raise _unknown(name)
    if size is not None and name != "folder":
        raise DataError(
            "size= with the name 'folder' only",
            f"size={size!r} with {name!r}, whose images have one published shape",
            "leave size= out",
        )
    if name == "fashion-mini":
        return (
            load_fashion_mini()
            if directory is None
            else load_fashion_mini(resolve(name, directory))
        )
    where = resolve(name, directory, DEBIAN if name == "fashion-mnist" else None)
    if name == "fashion-mnist":
        return load_fashion_mnist(where)
    if name == "folder":
        return load_folder(where, size)
    return load_cifar(where, int(name.removeprefix("cifar")))


def _unknown(name: str) -> DataError:
    near = difflib.get_close_matches(str(name).lower(), _NAMES)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "choose one of these"
    return DataError(f"a data set out of {', '.join(_NAMES)}", repr(name), hint)
