"""Random crops and flips of a whole batch at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from normlab.data.errors import DataError


def augment(
    images: Tensor, *, crop: int = 0, flip: bool = False, generator: torch.Generator
) -> Tensor:
    """Shift each image at random and mirror half of them.

    Each image is padded with zeros on all sides (the mean colour, if images are standardized),
    and a window of its own size is cut out at a random place.

    Args:
        images: Floating point, (N, C, H, W); not changed.
        crop: Padding in pixels, hence the largest shift in each direction; 0 does not shift.
        flip: Whether to mirror left and right with probability ½.
        generator: The source of chance; it may live on another device than the images.

    Returns:
        A new tensor of the same shape, dtype and device.

    Raises:
        DataError: If the images are not floating point of rank 4, or crop is negative.

    Example:
        >>> images = torch.ones(2, 3, 4, 4)
        >>> augment(images, crop=1, flip=True, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 4, 4])
    """
    if images.dim() != 4 or not images.is_floating_point():
        raise DataError(
            "floating-point images of shape (N, C, H, W)",
            f"{images.dtype} of shape {tuple(images.shape)}",
            "prepare images before they are augmented: data.prepare(images)",
        )
    if isinstance(crop, bool) or not isinstance(crop, int) or crop < 0:
        raise DataError("crop as a number of pixels, 0 or more", repr(crop), "pass crop=4, say")
    result = _shift(images, crop, generator) if crop else images.clone()
    if flip:
        coins = torch.rand(len(images), generator=generator, device=generator.device) < 0.5
        mirrored = coins.to(images.device).view(-1, 1, 1, 1)
        result = torch.where(mirrored, result.flip(-1), result)
    return result


def _shift(images: Tensor, crop: int, generator: torch.Generator) -> Tensor:
    height, width = images.shape[-2:]
    offsets = torch.randint(
        2 * crop + 1, (2, len(images)), generator=generator, device=generator.device
    ).to(images.device)
    padded = functional.pad(images, (crop, crop, crop, crop))
    # A view of every window (N, C, 2·crop+1, 2·crop+1, H, W): nothing is copied until indexed.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    samples = torch.arange(len(images), device=images.device)
    return windows[samples, :, offsets[0], offsets[1]]
