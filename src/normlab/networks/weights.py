"""Initial weights that do not depend on the normalizer.

Arms of a comparison must differ in the normalizer alone. Weights are therefore drawn in one pass
over the finished network, from a generator of their own: it does not matter how many numbers the
normalizers draw, nor which convolutions have a bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

_WEIGHT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def weight_layers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Walk over the convolutions and linear layers outside normalizers.

    Args:
        model: a network of this package; its normalizers stand under the name ``norm``.
        prefix: put before each name.

    Yields:
        Dotted name and layer, in the order in which they were registered.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
        >>> [name for name, _ in weight_layers(net)]
        ['0', '3']
    """
    for name, child in model.named_children():
        if name == "norm":
            continue  # a conv inside a normalizer is the normalizer's own business
        if isinstance(child, _WEIGHT_LAYERS):
            yield prefix + name, child
        else:
            yield from weight_layers(child, f"{prefix}{name}.")


@torch.no_grad()
def initialize(model: nn.Module, generator: torch.Generator) -> None:
    """Draw all weights: Kaiming normal (fan out, 1502.01852) for convolutions, torch's for linear.

    Numbers are drawn on the CPU in float32, so that device and dtype do not change them.

    Args:
        model: changed in place; normalizers are left as they are.
        generator: a CPU generator.
    """
    for _, layer in weight_layers(model):
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, torch.Tensor)
        drawn = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
        shift = torch.zeros(weight.shape[0], dtype=torch.float32, device="cpu")
        if isinstance(layer, nn.Linear):
            bound = 1 / math.sqrt(layer.in_features)
            drawn.uniform_(-bound, bound, generator=generator)
            # Drawn even where there is no bias: the next layer's weights must not depend on it.
            shift.uniform_(-bound, bound, generator=generator)
        else:
            nn.init.kaiming_normal_(drawn, mode="fan_out", nonlinearity="relu", generator=generator)
        weight.copy_(drawn * getattr(layer, "init_gain", 1.0))
        if isinstance(bias, torch.Tensor):
            bias.copy_(shift)


@torch.no_grad()
def align(model: nn.Module, reference: nn.Module, *, weights_only: bool = False) -> list[str]:
    """Copy into a model every parameter of a reference with the same name and shape.

    Args:
        model: changed in place.
        reference: unchanged; another network, usually the same one with another normalizer.
        weights_only: copy only the parameters of convolutions and linear layers outside
            normalizers. Use it where the initial values of a normalizer are part of its method,
            since by default ``weight`` and ``bias`` of one normalizer overwrite another's.

    Returns:
        The names copied, in the model's order. Buffers (stored statistics) are never copied.

    Example:
        >>> a, b = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 3, bias=False))
        >>> align(a, b)
        ['0.weight']
        >>> bool((a[0].weight == b[0].weight).all())
        True
    """
    source = dict(reference.named_parameters())
    owners = {name for name, _ in weight_layers(model)}
    copied = []
    for name, parameter in model.named_parameters():
        twin = source.get(name)
        if twin is None or twin.shape != parameter.shape:
            continue
        if weights_only and name.rpartition(".")[0] not in owners:
            continue
        parameter.copy_(twin)
        copied.append(name)
    return copied
