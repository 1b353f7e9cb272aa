"""Initial weights that do not depend on the normalizer.

Arms of a comparison must differ in the normalizer alone. Weights are therefore drawn in one pass
over the finished network, from a generator of their own: it does not matter how many numbers the
normalizers draw, nor which convolutions have a bias.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize

from .plan import check_choice

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


def _original(layer: nn.Module) -> torch.Tensor | None:
    """What a parametrized weight is computed from, where that is a single tensor."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    lists = layer.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    original = getattr(lists["weight"], "original", None)
    return original if isinstance(original, torch.Tensor) else None


@torch.no_grad()
def initialize(model: nn.Module, generator: torch.Generator, *, scheme: str = "he") -> None:
    """Draw all weights, in one pass.

    ``"he"``: Kaiming normal (fan out, 1502.01852) for convolutions, torch's for linear layers.
    ``"glorot"``: uniform with variance 2/(fan in + fan out) for both, and biases of 0.

    Numbers are drawn on the CPU in float32, so that device and dtype do not change them. They are
    multiplied by a layer's attribute ``init_gain``, if it has one. Of a parametrized weight, the
    tensor that it is computed from is drawn; where there are several, the weight is assigned.

    Args:
        model: changed in place; normalizers are left as they are.
        generator: a CPU generator.
        scheme: ``"he"`` or ``"glorot"``.

    Raises:
        NetworkError: another scheme.
    """
    check_choice("initialize", "scheme", scheme, ("he", "glorot"))
    for _, layer in weight_layers(model):
        # Where possible a parametrized weight is not read: that may advance a power iteration.
        original, bias = _original(layer), layer.bias
        weight = layer.weight if original is None else original
        assert isinstance(weight, torch.Tensor)
        drawn = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
        shift = torch.zeros(weight.shape[0], dtype=torch.float32, device="cpu")
        if scheme == "glorot":
            nn.init.xavier_uniform_(drawn, generator=generator)
        elif isinstance(layer, nn.Linear):
            bound = 1 / math.sqrt(layer.in_features)
            drawn.uniform_(-bound, bound, generator=generator)
            # Drawn even where there is no bias: the next layer's weights must not depend on it.
            shift.uniform_(-bound, bound, generator=generator)
        else:
            nn.init.kaiming_normal_(drawn, mode="fan_out", nonlinearity="relu", generator=generator)
        drawn *= getattr(layer, "init_gain", 1.0)
        if getattr(layer, "latent", "") == "positive":  # as the released code of 2104.08215 starts
            drawn.uniform_(0, 1e-3, generator=generator)
        if original is None and parametrize.is_parametrized(layer, "weight"):
            layer.weight = drawn.to(weight)  # through the parametrization's right inverse
        else:
            weight.copy_(drawn)
        if isinstance(bias, torch.Tensor):
            bias.copy_(shift)


def _plain(name: str) -> str:
    """Name of a parameter as it was before it was parametrized."""
    return re.sub(r"\bparametrizations\.(\w+)\.original$", r"\1", name)


@torch.no_grad()
def align(model: nn.Module, reference: nn.Module, *, weights_only: bool = False) -> list[str]:
    """Copy into a model every parameter of a reference with the same name and shape.

    Args:
        model: changed in place.
        reference: unchanged; another network, usually the same one with another normalizer.
        weights_only: copy only the parameters of convolutions and linear layers outside
            normalizers. Use it where the initial values of a normalizer are part of its method,
            since by default ``weight`` and ``bias`` of one normalizer overwrite another's.

    The tensor that a parametrized weight is computed from counts as that weight.

    Returns:
        The names copied, in the model's order. Buffers (stored statistics) are never copied.

    Example:
        >>> a, b = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 3, bias=False))
        >>> align(a, b)
        ['0.weight']
        >>> bool((a[0].weight == b[0].weight).all())
        True
    """
    source = {_plain(name): p for name, p in reference.named_parameters()}
    owners = {name for name, _ in weight_layers(model)}
    copied = []
    for name, parameter in model.named_parameters():
        twin = source.get(_plain(name))
        if twin is None or twin.shape != parameter.shape:
            continue
        if weights_only and _plain(name).rpartition(".")[0] not in owners:
            continue
        parameter.copy_(twin)
        copied.append(name)
    return copied
