"""VGG for small images: the convolutions of 1409.1556 with average pooling and a linear head."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import nn

from .plan import ImageShape, NormFactory, check_choice, check_size
from .units import classifier, conv, needs_bias, stage

# Convolutions in each of the five groups: columns A, B, D, E of Table 1 of 1409.1556.
GROUPS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


@dataclass(frozen=True, kw_only=True)
class VggPlan:
    """Five groups of 3×3 convolutions of width w, 2w, 4w, 8w, 8w, a 2×2 max pooling after each.

    Args:
        depth: 11, 13, 16 or 19. It counts the paper's three linear layers.
        width: channels w of the first group.
        head: ``"linear"`` for one linear layer, ``"vgg"`` for three, of width 8w, with normalizers
            after the first two. VGG-11 with the latter is the VGG-A on CIFAR-10 with which the
            study of 1805.11604 is reproduced.

    Raises:
        NetworkError: there is no VGG of this depth or head, or the width is no whole number of at
            least 1.

    Example:
        >>> VggPlan(depth=13, width=16).describe()
        'VGG-13, width 16'
    """

    depth: int = 11
    width: int = 64
    head: str = "linear"

    def __post_init__(self) -> None:
        check_choice("vgg", "depth", self.depth, tuple(GROUPS))
        check_size("vgg", "width", self.width)
        check_choice("vgg", "head", self.head, ("linear", "vgg"))

    def describe(self) -> str:
        """Name, width and, where it is not the default, the head."""
        head = ", three linear layers" if self.head == "vgg" else ""
        return f"VGG-{self.depth}, width {self.width}{head}"

    def assemble(self, norm: NormFactory, *, classes: int, image_shape: ImageShape) -> nn.Module:
        """Build the network ``conv1 unit1 conv2 unit2 … pool flatten head``; see `Plan`.

        A pooling for which the maps are too small is left out, so 28×28 has four, 32×32 five. The
        three linear layers are ``linear1 stage1 linear2 stage2 head``.
        """
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        inputs, side = image_shape[0], min(image_shape[1:])
        i = 0
        for group, convolutions in enumerate(GROUPS[self.depth]):
            outputs = self.width * min(2**group, 8)
            for position in range(1, convolutions + 1):
                i += 1
                pooled = position == convolutions and side >= 2
                unit = stage(norm, outputs, nn.MaxPool2d(2) if pooled else None)
                layers[f"conv{i}"] = conv(inputs, outputs, followed_by=unit)
                layers[f"unit{i}"] = unit
                inputs = outputs
            side = side // 2 if side >= 2 else side
        layers |= classifier(inputs, classes)
        if self.head == "vgg":
            last = layers.pop("head")
            for i in (1, 2):
                unit = stage(norm, inputs)
                layers[f"linear{i}"] = nn.Linear(inputs, inputs, bias=needs_bias(unit))
                layers[f"stage{i}"] = unit
            layers["head"] = last
        return nn.Sequential(layers)
