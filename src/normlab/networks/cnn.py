"""Plain convolutional network: a residual network's shape without its shortcuts."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from .plan import ImageShape, NormFactory, check_choice, check_size
from .units import classifier, conv, stage


@dataclass(frozen=True, kw_only=True)
class CnnPlan:
    """3×3 convolutions in groups of width w, 2w, 4w, 8w, 8w, …, a stride of 2 between groups.

    The defaults are the plain nets of 1512.03385. Those of 2106.05956 with widths from 64 to 512
    are ``depth=10,width=64,stages=5,halve=last`` (10 or 40 convolutions; their net of 20 keeps
    256 channels for one more group), and ``width=64,stages=1`` for the uniform ones.

    Args:
        depth: number of convolutions; earlier groups take the remainder of a division by `stages`.
        width: channels w of the first group.
        stages: number of groups, at most one per convolution.
        growth: 2, or 1 for equal width in all groups.
        halve: which convolution has the stride: the ``"first"`` of each group but the first, or
            the ``"last"`` of each group but the last.

    Raises:
        NetworkError: an option outside its range.

    Example:
        >>> CnnPlan(depth=10).layers()[3:6]
        [(16, 1), (32, 2), (32, 1)]
    """

    depth: int = 6
    width: int = 16
    stages: int = 3
    growth: int = 2
    halve: str = "first"

    def __post_init__(self) -> None:
        check_size("cnn", "depth", self.depth)
        check_size("cnn", "width", self.width)
        check_size("cnn", "stages", self.stages)
        check_choice("cnn", "growth", self.growth, (1, 2))
        check_choice("cnn", "halve", self.halve, ("first", "last"))

    def describe(self) -> str:
        """Name, depth, width and whatever is not the default."""
        text = f"plain CNN, {self.depth} convolution{'s' * (self.depth > 1)}, width {self.width}"
        last = self.layers()[-1][0]
        if (self.stages, self.growth, self.halve) != (3, 2, "first"):
            text += f" to {last}" if last > self.width else " throughout"
            text += f", {self.stages} stage{'s' * (self.stages > 1)}"
        return text + (", the last of each strided" if self.halve == "last" else "")

    def layers(self) -> list[tuple[int, int]]:
        """Output channels and stride of each convolution."""
        groups = [min(self.stages, self.depth) * i // self.depth for i in range(self.depth)]
        changes = [now > last for last, now in pairwise(groups)]
        strided = [False, *changes] if self.halve == "first" else [*changes, False]
        return [
            (self.width * min(self.growth**group, 8), 2 if halved else 1)
            for group, halved in zip(groups, strided, strict=True)
        ]

    def assemble(self, norm: NormFactory, *, classes: int, image_shape: ImageShape) -> nn.Module:
        """Build the network ``conv1 unit1 conv2 unit2 … pool flatten head``; see `Plan`."""
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        inputs = image_shape[0]
        for i, (outputs, stride) in enumerate(self.layers(), 1):
            unit = stage(norm, outputs)
            layers[f"conv{i}"] = conv(inputs, outputs, followed_by=unit, stride=stride)
            layers[f"unit{i}"] = unit
            inputs = outputs
        return nn.Sequential(layers | classifier(inputs, classes))
