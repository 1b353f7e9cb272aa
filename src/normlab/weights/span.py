"""The part of a weight that its inputs never reach (2102.03497).

The gradient of a unit's weight is a sum of the layer's inputs, so the component of w orthogonal to
their span is left alone by gradient descent, multiplied by 1 − ηλ by weight decay, and by
‖w_t‖/‖w_{t+1}‖ by rescaling. This is exact for a layer whose inputs do not change, the first one
above all.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.weights import units

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def patches(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Return what each unit of a layer takes the inner product of its weight with.

    Args:
        layer: Linear or Conv1d to Conv3d.
        inputs: Inputs of the layer, with a batch axis.

    Returns:
        (groups, M, fan_in), one row for each sample and position.

    Raises:
        TypeError: For another layer.

    Example:
        >>> layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        >>> patches(layer, torch.randn(5, 4, 8, 8)).shape
        torch.Size([2, 80, 18])
    """
    if isinstance(layer, nn.Linear):
        return inputs.reshape(1, -1, layer.in_features)
    if not isinstance(layer, _CONVOLUTIONS):
        raise TypeError(
            f"the span of a layer's inputs is defined here for Linear and Conv1d to Conv3d; "
            f"received {type(layer).__name__}"
        )
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    rank = len(layer.kernel_size)
    sizes = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    for axis, (size, stride, dilation) in enumerate(sizes, 2):
        # The window's own axis comes last; a dilated kernel reads every dilation-th of it.
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # (N, C, *positions, *kernel) → (G, N·positions, C/G·kernel)
    x = x.reshape(len(x), layer.groups, -1, *x.shape[2:])
    places, kernel = tuple(range(3, 3 + rank)), tuple(range(3 + rank, 3 + 2 * rank))
    x = x.permute(1, 0, *places, 2, *kernel)
    return x.flatten(-1 - rank).flatten(1, -2)


def orthogonal_component(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Return P⊥w for each unit, P⊥ projecting onto what is orthogonal to the span of the inputs.

    Args:
        layer: Linear or Conv1d to Conv3d.
        inputs: Inputs of the layer, with a batch axis.

    Returns:
        (units, fan_in), in float64. A direction counts as spanned where its singular value is over
        the rounding error of the inputs' dtype.
    """
    with torch.no_grad():
        x = patches(layer, inputs)
        rounding = torch.finfo(x.dtype).eps * max(x.shape[1:])
        weight = cast(Tensor, layer.weight).detach()
        rows = units.rows(weight, units.layout(layer)).double()
        rows = rows.reshape(len(x), -1, x.shape[-1])
        # R has the singular values and directions of x, and few rows.
        triangle = torch.linalg.qr(x.double(), mode="r").R
        _, values, directions = torch.linalg.svd(triangle, full_matrices=False)
        spanned = values > rounding * values.amax(-1, keepdim=True)
        directions = directions * spanned.unsqueeze(-1)
        component: Tensor = (rows - rows @ directions.mT @ directions).flatten(0, 1)
        return component


def orthogonal_share(layer: nn.Module, inputs: Tensor) -> float:
    """Return ‖P⊥w‖/‖w‖, the share of a layer's weight that its inputs never reach.

    Args:
        layer: Linear or Conv1d to Conv3d.
        inputs: Inputs of the layer, with a batch axis.

    Returns:
        Between 0, where the inputs span everything, and 1.

    Example:
        >>> layer = nn.Linear(3, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 0.0, 4.0]]))
        >>> round(orthogonal_share(layer, torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])), 6)
        0.8
    """
    weight = cast(Tensor, layer.weight).detach().double()
    return float(orthogonal_component(layer, inputs).norm() / weight.norm())
