"""Folders of images, one subfolder for each class: train/CLASS/*.png and test/CLASS/*.png."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normlab.data.errors import DataError
from normlab.data.images import ImageData
from normlab.data.places import listing

SUFFIXES = (".png", ".jpg", ".jpeg")
LAYOUT = "train/CLASS/*.png (or .jpg, .jpeg) and test/CLASS/*.png"
# Modes of 8-bit images; others (16 bits, floats) would be clipped silently by a conversion.
GREY, COLOUR = ("1", "L"), ("RGB", "RGBA", "LA", "P", "PA", "CMYK", "YCbCr")


def load_folder(root: Path, size: int | None = None) -> ImageData:
    """Load images from ``root/train/CLASS`` and ``root/test/CLASS``.

    Images become grey (one channel) if all files are grey, else red, green and blue; transparency
    is dropped and the orientation tag of cameras is not applied.  Classes are the subfolders of
    train in alphabetical order.

    Args:
        root: The folder that holds train and test.
        size: The shorter side is resized to this (bilinear, antialiased) and the middle square
            is kept; None takes images as they are, and all must then have one shape.

    Returns:
        The data.

    Raises:
        DataError: If folders are missing or empty, a file is damaged, or shapes differ.
    """
    pillow = _pillow()
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise DataError("size as a positive number of pixels", repr(size), "pass an int, or None")
    if not root.is_dir() or not all((root / part).is_dir() for part in ("train", "test")):
        raise DataError(
            f"{LAYOUT} in {root}", listing(root), "sort the images into these two folders"
        )
    classes = tuple(sorted(p.name for p in _visible(root / "train") if p.is_dir()))
    files = {part: _files(root / part, classes) for part in ("train", "test")}
    grey, shape = _survey(pillow, [path for part in files.values() for path, _ in part], size)
    train, test = (_tensors(pillow, part, grey, shape, size) for part in files.values())
    title = root.resolve().name
    note = f"image folder {title}" + (f", resized to {size}" if size else "")
    return ImageData("folder", title, *train, *test, classes, note)


def _tensors(
    pillow: Any,
    part: list[tuple[Path, int]],
    grey: bool,
    shape: tuple[int, int],
    size: int | None,
) -> tuple[Tensor, Tensor]:
    images = np.empty((len(part), 1 if grey else 3, *shape), dtype=np.uint8)
    for row, (path, _) in zip(images, part, strict=True):
        row[:] = _read(pillow, path, grey, size)
    return torch.from_numpy(images), torch.tensor([label for _, label in part])


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            "pillow, which reads image files",
            f"no such package ({error})",
            "pip install 'normlab[lab]'",
        ) from error
    return Image


def _visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith("."))


def _files(part: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    """Each image of one part with its label, sorted by class and name."""
    folders = [p for p in _visible(part) if p.is_dir()]
    unknown = [p.name for p in folders if p.name not in classes]
    if unknown or not folders:
        raise DataError(
            f"one folder per class in {part}" + (f", of {', '.join(classes)}" if classes else ""),
            ", ".join(unknown) or listing(part),
            f"use the layout {LAYOUT}, with the same classes in both",
        )
    found = []
    for folder in folders:
        paths = [p for p in _visible(folder) if p.suffix.lower() in SUFFIXES]
        if not paths:
            raise DataError(
                f"images ({', '.join(SUFFIXES)}) in {folder}",
                listing(folder),
                "add images, or remove the folder of this class",
            )
        found += [(path, classes.index(folder.name)) for path in paths]
    return found


def _survey(pillow: Any, paths: list[Path], size: int | None) -> tuple[bool, tuple[int, int]]:
    """Read the headers alone: whether all are grey, and the common height and width."""
    grey, first = True, (0, 0)
    for path in paths:
        try:
            with pillow.open(path) as image:
                mode, (width, height) = image.mode, image.size
        except _damage(pillow) as error:
            raise _broken(path, error) from error
        if mode not in GREY + COLOUR:
            raise DataError(
                f"8 bits per channel in {path}", f"mode {mode}", "convert it to 8-bit PNG"
            )
        grey &= mode in GREY
        if first == (0, 0):
            first = (height, width)
        if size is None and first != (height, width):
            raise DataError(
                f"one shape for all images, {first[0]}×{first[1]} as in {paths[0]}",
                f"{height}×{width} in {path}",
                "pass size= to resize and crop them",
            )
    return grey, (size, size) if size else first


def _read(pillow: Any, path: Path, grey: bool, size: int | None) -> NDArray[np.uint8]:
    """One image as (C, H, W)."""
    try:
        with pillow.open(path) as opened:
            image = opened.convert("L" if grey else "RGB")
    except _damage(pillow) as error:
        raise _broken(path, error) from error
    if size is not None:
        width, height = image.size
        short = min(width, height)
        left, top = (width - short) / 2, (height - short) / 2
        # Cropping within the resize reads only the middle square.
        image = image.resize(
            (size, size), pillow.Resampling.BILINEAR, (left, top, left + short, top + short)
        )
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


def _damage(pillow: Any) -> tuple[type[Exception], ...]:
    """What pillow raises for files that it cannot decode."""
    return (
        OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error,
        pillow.DecompressionBombError,
    )  # fmt: skip


def _broken(path: Path, error: Exception) -> DataError:
    return DataError(
        f"a readable image {path}",
        f"{type(error).__name__}: {error}",
        "the file is damaged: replace or remove it",
    )
