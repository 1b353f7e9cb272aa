"""Multilayer perceptron on flattened images."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from math import prod

from torch import nn

from .plan import ImageShape, NormFactory, check_size
from .units import needs_bias, stage


@dataclass(frozen=True, kw_only=True)
class MlpPlan:
    """Perceptron with hidden layers of equal width; normalizers see ``(N, width)``.

    Args:
        depth: number of hidden layers.
        width: units of each.

    Raises:
        NetworkError: an option is no whole number of at least 1.

    Example:
        >>> MlpPlan(depth=2, width=64).describe()
        'MLP, 2 hidden layers, width 64'
    """

    depth: int = 3
    width: int = 256

    def __post_init__(self) -> None:
        check_size("mlp", "depth", self.depth)
        check_size("mlp", "width", self.width)

    def describe(self) -> str:
        """Name, depth and width."""
        plural = "s" if self.depth > 1 else ""
        return f"MLP, {self.depth} hidden layer{plural}, width {self.width}"

    def assemble(self, norm: NormFactory, *, classes: int, image_shape: ImageShape) -> nn.Module:
        """Build the network ``flatten linear1 unit1 … head``; see `Plan`."""
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        inputs = prod(image_shape)
        for i in range(1, self.depth + 1):
            unit = stage(norm, self.width)
            layers[f"linear{i}"] = nn.Linear(inputs, self.width, bias=needs_bias(unit))
            layers[f"unit{i}"] = unit
            inputs = self.width
        layers["head"] = nn.Linear(inputs, classes)
        return nn.Sequential(layers)
