"""What all architectures have in common: a plan is a value that can describe and build itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import nn

NormFactory = Callable[..., nn.Module]
"""``norm(channels, **options) -> nn.Module``, a layer for any rank with channels in dim 1."""

ImageShape = tuple[int, int, int]
"""Channels, height, width of one image."""


class NetworkError(ValueError):
    """A network cannot be built as asked: unknown name or option, impossible size, bad layer."""


class Plan(Protocol):
    """An architecture with its options; a frozen dataclass whose fields are the options.

    The type of a field's default (int, float, bool or str) decides how a spec's text is read. A
    plan whose weights do not start as `initialize` has them also defines
    ``initialize(network, generator)``.
    """

    def assemble(self, norm: NormFactory, *, classes: int, image_shape: ImageShape) -> nn.Module:
        """Put the layers together, with the weights torch gives them.

        Args:
            norm: the normalizer's factory.
            classes: K.
            image_shape: C, H, W.

        Returns:
            The network.

        Shape:
            of the network: ``(N, C, H, W) -> (N, K)``
        """

    def describe(self) -> str:
        """Say in a few words what is built."""


def check_size(owner: str, option: str, value: object, minimum: int = 1) -> None:
    """Refuse a size that is no whole number or too small.

    Args:
        owner: the architecture, for the message.
        option: its option, for the message.
        value: as received.
        minimum: the smallest allowed.

    Raises:
        NetworkError: ``value`` is not an int of at least ``minimum``.
    """
    # bool is an int to Python, but depth=True is a mistake.
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise NetworkError(
            f"{owner}: {option} must be a whole number, at least {minimum}; received {value!r}"
        )


def check_choice(owner: str, option: str, value: object, choices: Sequence[object]) -> None:
    """Refuse a value that is not among the choices.

    Args:
        owner: the architecture, for the message.
        option: its option, for the message.
        value: as received.
        choices: what is allowed.

    Raises:
        NetworkError: ``value`` is not one of ``choices``.
    """
    if value not in choices:
        allowed = ", ".join(str(choice) for choice in choices)
        raise NetworkError(f"{owner}: {option} must be one of {allowed}; received {value!r}")
