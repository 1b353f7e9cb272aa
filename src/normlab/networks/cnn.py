"""Plain convolutional network: a residual network's shape without its shortcuts."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import nn

from .plan import ImageShape, NormFactory, check_size
from .units import classifier, conv, stage


@dataclass(frozen=True, kw_only=True)
class CnnPlan:
    """3×3 convolutions in three groups of width w, 2w, 4w, as the plain nets of 1512.03385.

    The first convolution of the second and the third group has stride 2.

    Args:
        depth: number of convolutions; earlier groups take the remainder of a division by three.
        width: channels w of the first group.

    Raises:
        NetworkError: an option is no whole number of at least 1.

    Example:
        >>> CnnPlan(depth=10).layers()[3:6]
        [(16, 1), (32, 2), (32, 1)]
    """

    depth: int = 6
    width: int = 16

    def __post_init__(self) -> None:
        check_size("cnn", "depth", self.depth)
        check_size("cnn", "width", self.width)

    def describe(self) -> str:
        """Name, depth and width."""
        return f"plain CNN, {self.depth} convolution{'s' * (self.depth > 1)}, width {self.width}"

    def layers(self) -> list[tuple[int, int]]:
        """Output channels and stride of each convolution."""
        groups = [3 * i // self.depth for i in range(self.depth)]
        before = [0, *groups]
        return [
            (self.width << now, 2 if now > last else 1)
            for last, now in zip(before, groups, strict=False)
        ]

    def assemble(self, norm: NormFactory, *, classes: int, image_shape: ImageShape) -> nn.Module:
        """Build the network: ``conv1 unit1 conv2 unit2 … pool flatten head``.

        Args:
            norm: the normalizer's factory.
            classes: K.
            image_shape: C, H, W.

        Returns:
            The network, with torch's initial weights.

        Shape:
            ``(N, C, H, W) -> (N, K)``
        """
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        inputs = image_shape[0]
        for i, (outputs, stride) in enumerate(self.layers(), 1):
            unit = stage(norm, outputs)
            layers[f"conv{i}"] = conv(inputs, outputs, followed_by=unit, stride=stride)
            layers[f"unit{i}"] = unit
            inputs = outputs
        return nn.Sequential(layers | classifier(inputs, classes))
