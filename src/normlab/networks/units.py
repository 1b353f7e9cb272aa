"""Where a normalizer stands: the one place that knows about activation, placement and bias.

A network asks for *stages* and never looks at the normalizer itself. A stage takes the output of
a weight layer and makes it ready for the next one:

    after_weight  (batch norm, group norm, …)    conv → [norm → ReLU → pool] → conv
    fused         (FRN + TLU, 1911.09737)        conv → [norm        → pool] → conv
    before_weight (IC layer, 1905.05928)         conv → [ReLU → pool → norm] → conv

Two attributes of a built layer decide, both optional: ``activation`` (not None where the layer
contains its activation) and ``placement`` (one of `PLACEMENTS`). Whether it has a ``bias`` of its
own decides the bias of the weight layer before it.

``"ic-conv-relu"`` and ``"conv-relu-ic"`` are before_weight as well. The compositions of IC layers
are rotations of one cycle ReLU → IC → conv, so in a chain of layers they are the same network:
neither the image nor the pooled features get an IC layer of their own. They differ where a
residual sum cuts the cycle; see `residual`.

The normalizer always stands under the name ``norm`` and weight layers never stand below that
name: so weight layers are called the same whatever the normalizer, and initialization can tell
them from a convolution or linear layer inside a normalizer.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from .plan import NetworkError, NormFactory

PLACEMENTS = ("after_weight", "before_weight", "ic-conv-relu", "conv-relu-ic")


def make(norm: NormFactory, channels: int, **options: object) -> nn.Module:
    """Build one normalizer and check that it is a module.

    Args:
        norm: the factory.
        channels: size of dim 1 of the layer's input.
        **options: passed to the factory.

    Returns:
        The layer.

    Raises:
        NetworkError: the factory returns something else than a module.
    """
    layer = norm(channels, **options)
    if not isinstance(layer, nn.Module):
        raise NetworkError(
            f"norm({channels}) must return an nn.Module, received {type(layer).__name__}; "
            "pass a factory such as nn.BatchNorm2d, not its name or a built layer"
        )
    return layer


def placement(layer: nn.Module) -> str:
    """Tell where a normalizer belongs.

    Args:
        layer: a built normalizer.

    Returns:
        Its ``placement``, ``"after_weight"`` where it has none.

    Raises:
        NetworkError: the attribute is none of `PLACEMENTS`.
    """
    where = getattr(layer, "placement", "after_weight")
    if where not in PLACEMENTS:
        raise NetworkError(
            f"{type(layer).__name__}.placement must be one of {PLACEMENTS}, received {where!r}"
        )
    return str(where)


def goes_before_weight(layer: nn.Module) -> bool:
    """Tell whether a normalizer belongs immediately before a weight layer.

    Args:
        layer: a built normalizer.

    Returns:
        False for ``"after_weight"``, True for the other placements.

    Raises:
        NetworkError: the placement is none of `PLACEMENTS`.
    """
    return placement(layer) != "after_weight"


def act(layer: nn.Module) -> dict[str, nn.Module]:
    """The activation that a normalizer needs beside it.

    Args:
        layer: a built normalizer.

    Returns:
        A ReLU under the name ``act``; nothing where the layer contains its activation.
    """
    if getattr(layer, "activation", None) is not None:
        return {}
    # Never in place: without a normalizer this would rectify the shortcut's tensor as well, and a
    # normalizer may have saved its output for the backward pass.
    return {"act": nn.ReLU()}


def stage(norm: NormFactory, channels: int, pool: nn.Module | None = None) -> nn.Sequential:
    """Normalizer, activation and optional pooling between two weight layers, in their order.

    Args:
        norm: the factory.
        channels: C of the input.
        pool: stands after the activation and, for a before_weight layer, before the normalizer.

    Returns:
        A sequence with children ``norm``, ``act`` (absent where the normalizer has its own
        activation) and ``pool`` (absent without one).

    Shape:
        ``(N, C, *) -> (N, C, *)``, positions as ``pool`` leaves them.

    Example:
        >>> [name for name, _ in stage(nn.BatchNorm2d, 8, nn.MaxPool2d(2)).named_children()]
        ['norm', 'act', 'pool']
    """
    layer = make(norm, channels)
    rest: OrderedDict[str, nn.Module] = OrderedDict(act(layer))
    if pool is not None:
        rest["pool"] = pool
    here = OrderedDict(norm=layer)
    return nn.Sequential(rest | here if goes_before_weight(layer) else here | rest)


def bare(norm: NormFactory, channels: int) -> nn.Sequential:
    """A normalizer without activation, for the end of a branch that is then added to another.

    A layer with a fused activation is built again with ``activation=None``.

    Args:
        norm: the factory.
        channels: C of the input.

    Returns:
        A sequence with the single child ``norm``.

    Raises:
        NetworkError: the layer keeps its activation, or the factory refuses the option.

    Shape:
        ``(N, C, *) -> (N, C, *)``
    """
    layer = make(norm, channels)
    if getattr(layer, "activation", None) is not None:
        try:
            layer = make(norm, channels, activation=None)
        except TypeError as error:
            raise NetworkError(
                f"{type(layer).__name__} contains an activation ({layer.activation!r}) where none "
                f"may stand, and its factory does not accept activation=None: {error}"
            ) from error
        if getattr(layer, "activation", None) is not None:
            raise NetworkError(
                f"norm({channels}, activation=None) must have no activation, "
                f"received a {type(layer).__name__} with {layer.activation!r}"
            )
    return nn.Sequential(OrderedDict(norm=layer))


def needs_bias(followed_by: nn.Module) -> bool:
    """Tell whether a weight layer needs a bias, given the stage after it.

    It needs none where the stage begins with a normalizer that shifts by a ``bias`` of its own,
    which would do the same work twice.

    Args:
        followed_by: a `stage` or `bare`.

    Returns:
        False where the stage begins with a normalizer that has a bias.

    Example:
        >>> needs_bias(stage(nn.BatchNorm2d, 8)), needs_bias(stage(nn.Identity, 8))
        (False, True)
    """
    first = next(followed_by.children(), followed_by)
    return goes_before_weight(first) or getattr(first, "bias", None) is None


def conv(
    inputs: int, outputs: int, *, followed_by: nn.Module, stride: int = 1, kernel: int = 3
) -> nn.Conv2d:
    """A convolution with padding that keeps the size at stride 1, and a bias where needed.

    Args:
        inputs: channels C of the input.
        outputs: channels D of the output.
        followed_by: the stage that reads the output.
        stride: of the convolution.
        kernel: odd side length.

    Returns:
        The layer.

    Shape:
        ``(N, C, H, W) -> (N, D, ⌈H/stride⌉, ⌈W/stride⌉)``
    """
    return nn.Conv2d(
        inputs, outputs, kernel, stride, padding=kernel // 2, bias=needs_bias(followed_by)
    )


def classifier(channels: int, classes: int) -> dict[str, nn.Module]:
    """Global average pooling and the linear head: the end of every convolutional network.

    Args:
        channels: C of the maps.
        classes: K.

    Returns:
        The layers ``pool``, ``flatten`` and ``head`` by name.

    Shape:
        ``(N, C, H, W) -> (N, K)``
    """
    return {
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "head": nn.Linear(channels, classes),
    }
