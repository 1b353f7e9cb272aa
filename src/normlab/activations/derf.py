"""Dynamic erf (Chen, Lu, Zhu, Sun & Liu 2025, arXiv 2512.10938)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from normlab.activations.dyt import Squashing
from normlab.core.card import Card


class DynamicErf(Squashing):
    """y = γ·erf(α·x + s) + β: dynamic tanh with another curve, and a learned shift inside it.

    α and s are one learned number each, γ and β are per channel. Source: Chen, Lu, Zhu, Sun & Liu
    2025, arXiv 2512.10938; γ, β and the initial values are those of its code.

    Args:
        num_channels: C.
        alpha: Initial α.
        shift: Initial s.
        affine: Whether there are γ and β.
        channel_dim: 1, or −1 for (…, C).

    Shape:
        (N, C, *) → (N, C, *).

    Raises:
        ValueError: If x has another number of channels.

    Example:
        >>> DynamicErf(8)
        DynamicErf(8, alpha=0.5, shift=0.0)
    """

    def __init__(
        self,
        num_channels: int,
        alpha: float = 0.5,
        shift: float = 0.0,
        affine: bool = True,
        *,
        channel_dim: int = 1,
    ) -> None:
        super().__init__(
            num_channels, alpha, affine, function="erf", shift=shift, channel_dim=channel_dim
        )


def reference(x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """The formula, with erf u = 2Φ(√2·u) − 1 from the normal distribution function Φ."""
    u = parameters["alpha"] * x.movedim(1, -1) + parameters["shift"]
    y: Tensor = 2 * torch.special.ndtr(2**0.5 * u) - 1
    return (y * parameters["weight"] + parameters["bias"]).movedim(-1, 1)


CARD = Card(
    name="derf",
    title="Dynamic erf",
    authors="Chen, Lu, Zhu, Sun & Liu",
    year=2025,
    arxiv="2512.10938",
    site="activation",
    formula="y = γ·erf(α·x + s) + β",
    pattern="none: every element stands alone",
    operation="squash",
    statistics="none",
    recovery="affine per channel",
    layer=DynamicErf,
    reference=reference,
    limits=("does not control the scale of what is small", "α depends on width and learning rate"),
    use_when="Transformers, in place of layer normalization or dynamic tanh.",
    avoid_when="Convolutional networks made for batch normalization.",
    source="code",
)
