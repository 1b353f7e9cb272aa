"""The deep linear network of Santurkar et al. 2018 (arXiv 1805.11604), and its regression task."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from .plan import ImageShape, NormFactory, check_size
from .units import bare
from .weights import initialize


@dataclass(frozen=True, kw_only=True)
class DeepLinearPlan:
    """y = W_L…W_1·x on flattened images: no nonlinearity and no biases.

    A normalizer stands after every matrix but the last, always without activation. For 10 inputs
    and 10 outputs the defaults are the study's network. The weights start as Glorot's, without
    which the product of 25 matrices is nearly zero.

    Args:
        depth: number of matrices L.
        width: rows of every matrix but the last.

    Raises:
        NetworkError: an option is no whole number of at least 1.

    Example:
        >>> DeepLinearPlan().describe()
        'deep linear network, 25 layers, width 10'
    """

    depth: int = 25
    width: int = 10

    def __post_init__(self) -> None:
        check_size("deep_linear", "depth", self.depth)
        check_size("deep_linear", "width", self.width)

    def describe(self) -> str:
        """Name, depth and width."""
        plural = "s" if self.depth > 1 else ""
        return f"deep linear network, {self.depth} layer{plural}, width {self.width}"

    def initialize(self, model: nn.Module, generator: torch.Generator) -> None:
        """Draw the weights: Glorot uniform; see `weights.initialize`."""
        initialize(model, generator, scheme="glorot")

    def assemble(self, norm: NormFactory, *, classes: int, image_shape: ImageShape) -> nn.Module:
        """Build the network ``flatten linear1 unit1 … head``; see `Plan`."""
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        inputs = prod(image_shape)
        for i in range(1, self.depth):
            layers[f"linear{i}"] = nn.Linear(inputs, self.width, bias=False)
            layers[f"unit{i}"] = bare(norm, self.width)
            inputs = self.width
        layers["head"] = nn.Linear(inputs, classes, bias=False)
        return nn.Sequential(layers)


def deep_linear_task(
    seed: int, samples: int = 1000, size: int = 10
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the task of the deep linear network: minimize ‖W_L…W_1·x − A·x‖² (1805.11604).

    Args:
        seed: of a generator of the task's own; torch's random state is left alone.
        samples: number N of inputs.
        size: length D of inputs and outputs.

    Returns:
        Inputs x and matrix A with independent standard normal elements, and targets y = A·x, in
        the order x, y, A.

    Shape:
        x and y ``(N, D)``, A ``(D, D)``

    Example:
        >>> x, y, a = deep_linear_task(0, samples=5)
        >>> x.shape, torch.equal(y, x @ a.T)
        (torch.Size([5, 10]), True)
    """
    check_size("deep_linear_task", "samples", samples)
    check_size("deep_linear_task", "size", size)
    generator = torch.Generator("cpu").manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, device="cpu", dtype=torch.float32)
    inputs = torch.randn(samples, size, generator=generator, device="cpu", dtype=torch.float32)
    return inputs, inputs @ matrix.T, matrix
