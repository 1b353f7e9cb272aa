"""A weight seen as a matrix with one row for each unit (output channel), and back, exactly.

Π for weights is written in the same language as for activations: Linear and convolutions store
(out, in/groups, *kernel), ``o i * -> o (i *)``; transposed convolutions store
(in, out/groups, *kernel) and have their units on the second axis, once per group,
``(g i) o * -> (g o) (i *)``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from normlab.core.partition import Layout, partition

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
WEIGHT_LAYERS = (nn.Linear, *_CONVOLUTIONS)
"""Classes whose ``weight`` connects inputs to units."""

_TORCH_NORMALIZERS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)


def layout(layer: nn.Module) -> Layout:
    """Return how the weight of a layer is regrouped to (units, fan_in).

    Args:
        layer: Linear, Conv1d to Conv3d or ConvTranspose1d to ConvTranspose3d, of any groups.

    Returns:
        The layout; ``regroup`` gives the matrix and ``undo`` the weight, bit for bit.

    Raises:
        TypeError: For another layer, with the classes that will do.
        ValueError: For a lazy layer that has seen no input yet.

    Example:
        >>> layer = nn.ConvTranspose2d(4, 6, 3, groups=2)
        >>> matrix = layout(layer).regroup(layer.weight)
        >>> matrix.shape, torch.equal(layout(layer).undo(matrix), layer.weight)
        (torch.Size([6, 18]), True)
    """
    if not isinstance(layer, WEIGHT_LAYERS):
        names = ", ".join(kind.__name__ for kind in WEIGHT_LAYERS)
        raise TypeError(
            f"weight methods act on the `weight` of a layer with units and inputs; received "
            f"{type(layer).__name__}, which is none of {names}"
        )
    if isinstance(layer, LazyModuleMixin) and cast(Any, layer).has_uninitialized_params():
        raise ValueError(
            f"{type(layer).__name__} has no weight yet; run a forward pass, which gives it its "
            "shape, before nl.weight"
        )
    shape = tuple(layer.weight.shape)
    if isinstance(layer, _TRANSPOSED):
        return partition("(g i) o * -> (g o) (i *)").bind(shape, sizes={"g": layer.groups})
    return partition("o i * -> o (i *)").bind(shape)


def groups(layer: nn.Module) -> int:
    """Return the number of convolution groups: equal runs of units that read inputs of their own.

    Args:
        layer: A weight layer.

    Returns:
        G, 1 for linear layers.
    """
    return layer.groups if isinstance(layer, _CONVOLUTIONS) else 1


def rows(weight: Tensor, at: Layout) -> Tensor:
    """Return the weight as a matrix (units, fan_in); memory in any order is accepted."""
    return at.regroup(weight.contiguous())


def norms(matrix: Tensor) -> Tensor:
    """Return ‖w‖ of each row, (units, 1), in float32 at least."""
    wide = matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
    length: Tensor = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    return length


def normalizers() -> tuple[type[nn.Module], ...]:
    """Return the classes whose inner weight layers are their own business."""
    from normlab.core.layer import Normalize
    from normlab.discovery import catalogue

    cards = (card.layer for card in catalogue("activation").values())
    return (*_TORCH_NORMALIZERS, Normalize, *cards)


def find(model: nn.Module) -> dict[str, nn.Module]:
    """Find the weight layers of a model outside its normalizers, each once.

    Args:
        model: Any module; a weight layer is found as the empty name.

    Returns:
        Layers by dotted name, in the order in which they were registered. Modules under the name
        ``norm`` and normalizers' classes are not looked into.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    own = normalizers()

    def walk(module: nn.Module, name: str) -> None:
        if id(module) in seen or isinstance(module, own):
            return
        seen.add(id(module))
        if isinstance(module, WEIGHT_LAYERS):
            found[name] = module
            return
        for key, child in module.named_children():
            if key != "norm":
                walk(child, f"{name}.{key}" if name else key)

    walk(model, "")
    return found


def stages(layer: nn.Module) -> Iterable[nn.Module]:
    """Return the parametrizations of a layer's weight, first applied first."""
    if not parametrize.is_parametrized(layer, "weight"):
        return ()
    return cast(Iterable[nn.Module], cast(Any, layer).parametrizations["weight"])
