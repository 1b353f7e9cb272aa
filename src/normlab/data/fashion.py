"""Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017, arXiv:1708.07747), whole and in the shipped part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from normlab.data.errors import DataError
from normlab.data.idx import SUFFIXES, read_idx
from normlab.data.images import ImageData
from normlab.data.places import listing

EMBEDDED = Path(__file__).with_name("fashion_mini")
# Where Debian's package dataset-fashion-mnist puts its files.
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SUBFOLDERS = (".", "fashion-mnist", "FashionMNIST/raw", "FashionMNIST")
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
NOTE = "MIT licence, copyright 2017 Zalando SE"
STEMS = {
    ("train", "images"): "train-images-idx3-ubyte",
    ("train", "labels"): "train-labels-idx1-ubyte",
    ("test", "images"): "t10k-images-idx3-ubyte",
    ("test", "labels"): "t10k-labels-idx1-ubyte",
}


def load_fashion_mini(directory: Path = EMBEDDED) -> ImageData:
    """Load the balanced part of Fashion-MNIST that comes with normlab.

    Args:
        directory: Where ``make_fashion_mini`` wrote the files.

    Returns:
        The data: 12,000 training and 2,000 test images of 1×28×28.

    Raises:
        DataError: If files are missing or damaged.
    """
    note = f"{NOTE}; the first 1,200 training and 200 test images of each class"
    return _load("fashion-mini", "Fashion-MNIST (12,000 / 2,000)", directory, note)


def load_fashion_mnist(directory: Path) -> ImageData:
    """Load the whole of Fashion-MNIST from its four idx files.

    Args:
        directory: The folder of the files, or the folder above it.

    Returns:
        The data: 60,000 training and 10,000 test images of 1×28×28.

    Raises:
        DataError: If files are missing or damaged, or are those of the MNIST digits.
    """
    data = _load("fashion-mnist", "Fashion-MNIST", directory, NOTE)
    counts = torch.bincount(data.train_labels, minlength=10)
    # The MNIST digits have the same file names and shapes, and would pass unnoticed.
    if len(data.train_labels) == 60_000 and not bool((counts == 6_000).all()):
        raise DataError(
            f"6000 training images of each class in {directory}",
            f"{counts.tolist()}, as in the MNIST digits",
            "point to the files of Fashion-MNIST",
        )
    return data


def read_part(directory: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read the images and labels of one part.

    Args:
        directory: The folder of the files, or the folder above it.
        part: "train" or "test".

    Returns:
        Images (N, H, W) and labels (N,).

    Raises:
        DataError: If files are missing, damaged or of different lengths.
    """
    images_file, labels_file = (
        _find(directory, STEMS[part, what]) for what in ("images", "labels")
    )
    images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if len(images) != len(labels):
        raise DataError(
            f"as many labels in {labels_file} as images in {images_file}",
            f"{len(labels)} labels and {len(images)} images",
            "take both files from one source",
        )
    return images, labels


def _load(name: str, title: str, directory: Path, note: str) -> ImageData:
    train, test = _tensors(directory, "train"), _tensors(directory, "test")
    return ImageData(name, title, *train, *test, CLASSES, note)


def _tensors(directory: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = read_part(directory, part)
    # The arrays lie in read-only memory, which torch cannot express: hence the copies.
    return torch.from_numpy(images.copy())[:, None], torch.from_numpy(labels.astype(np.int64))


def _find(directory: Path, stem: str) -> Path:
    for folder in SUBFOLDERS:
        for suffix in SUFFIXES:
            path = directory / folder / (stem + suffix)
            if path.is_file():
                return path
    raise DataError(
        f"{stem}, with or without {' or '.join(SUFFIXES[1:])}, in {directory} "
        f"or its subfolders {', '.join(SUBFOLDERS[1:])}",
        listing(directory),
        "pass the folder of the idx files (Debian: apt-get install dataset-fashion-mnist, "
        f"then {DEBIAN})",
    )
