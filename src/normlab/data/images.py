"""A labelled set of images in memory, as every loader returns it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from normlab.data.errors import DataError


@dataclass(frozen=True, eq=False)
class ImageData:
    """Training and test images of one data set.

    Attributes:
        name: The name that ``load`` knows.
        title: The name for people, for tables and figures.
        train_images: uint8, (N, C, H, W).
        train_labels: int64, (N,), in 0 … num_classes − 1.
        test_images: uint8, (M, C, H, W), of the same C, H and W.
        test_labels: int64, (M,).
        classes: The name of each class, in the order of the labels.
        note: Licence and origin, for records.

    Raises:
        DataError: If dtypes, shapes or labels contradict the above.

    Example:
        >>> data = ImageData(
        ...     "two", "Two", torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1),
        ...     torch.tensor([0, 1]), torch.zeros(1, 1, 1, 1, dtype=torch.uint8),
        ...     torch.tensor([0]), ("dark", "light"),
        ... )
        >>> data.num_classes, data.image_shape
        (2, (1, 1, 1))
        >>> data.prepare(data.train_images).flatten()
        tensor([-1.,  1.])
    """

    name: str
    title: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    note: str = ""

    def __post_init__(self) -> None:
        for part, images, labels in (
            ("training", self.train_images, self.train_labels),
            ("test", self.test_images, self.test_labels),
        ):
            _check(f"{part} part of {self.name}", images, labels, len(self.classes))
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise DataError(
                "training and test images of one shape",
                f"{tuple(self.train_images.shape[1:])} and {tuple(self.test_images.shape[1:])} "
                f"in {self.name}",
                "load both with the same size=",
            )

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.image_shape))
        return (
            f"ImageData({self.name!r}, {len(self.train_labels)} training and "
            f"{len(self.test_labels)} test images of {shape}, {self.num_classes} classes)"
        )

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over the training pixels, scaled to 0 … 1.

        μ = Σ x / n and σ = √(Σ (x − μ)² / n) with x = pixel / 255.

        Returns:
            μ and σ, float32, each of shape (C,).
        """
        mean, std = self._statistics
        return mean.clone(), std.clone()

    def prepare(self, images: Tensor) -> Tensor:
        """Standardize images with the training statistics: (pixel / 255 − μ) / σ.

        A channel that is constant in training is only centered.

        Args:
            images: uint8, (…, C, H, W), on any device.

        Returns:
            float32 of the same shape, on the same device.

        Raises:
            DataError: If the images are not uint8 or have another number of channels.
        """
        channels = self.image_shape[0]
        if images.dtype != torch.uint8 or images.dim() < 3 or images.shape[-3] != channels:
            raise DataError(
                f"uint8 images of shape (…, {channels}, H, W)",
                f"{images.dtype} of shape {tuple(images.shape)}",
                "pass raw images; prepared ones must not be prepared again",
            )
        mean, std = (s.to(images.device).view(-1, 1, 1) for s in self._statistics)
        scale = torch.where(std > 0, std, torch.ones_like(std))
        return images.to(torch.float32).div_(255).sub_(mean).div_(scale)

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of the sha256 of images, labels and class names."""
        return self._fingerprint

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        # Counting the 256 values is exact, and takes no float copy of the whole training set.
        levels = torch.arange(256, dtype=torch.float64) / 255
        counts = torch.stack(
            [
                torch.bincount(self.train_images[:, c].flatten(), minlength=256)
                for c in range(self.image_shape[0])
            ]
        ).to(torch.float64)
        weights = counts / counts.sum(1, keepdim=True)
        mean = weights @ levels
        variance = (weights * (levels - mean[:, None]) ** 2).sum(1)
        return mean.float(), variance.sqrt().float()

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.classes).encode())
        for part in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(repr(tuple(part.shape)).encode())
            digest.update(part.cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]


def _check(part: str, images: Tensor, labels: Tensor, classes: int) -> None:
    """Refuse what contradicts the declared dtypes, shapes and range of labels."""
    if images.dtype != torch.uint8 or images.dim() != 4 or 0 in images.shape:
        raise DataError(
            f"in the {part}, uint8 images of shape (N, C, H, W), none of them 0",
            f"{images.dtype} of shape {tuple(images.shape)}",
            "convert the images, and check that the source is not empty",
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise DataError(
            f"in the {part}, one int64 label for each of {len(images)} images",
            f"{labels.dtype} of shape {tuple(labels.shape)}",
            "check that image and label files belong together",
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"in the {part}, labels from 0 to {classes - 1}",
            f"labels from {low} to {high}",
            "check that the files belong to this data set and are not damaged",
        )
