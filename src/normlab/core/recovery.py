"""Ψ: what gives a normalized layer its expressive power back. It runs after Π⁻¹, per channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Activation = Literal["relu", "silu", "tlu", "affine_tlu"]
ACTIVATIONS = get_args(Activation)
Drop = Literal["element", "channel"]


@dataclass(frozen=True)
class Affine:
    """Ψ(x̂) = dropout(a(γ·x̂ + β)), each part optional.

    Attributes:
        scale: Whether there is a γ of shape (C,), the parameter ``weight``, initially 1.
        shift: Whether there is a β of shape (C,), the parameter ``bias``, initially 0.
        activation: The fused a: ``"relu"``, ``"silu"`` (u·sigmoid(u)), ``"tlu"``, the
            thresholded linear unit max(u, τ) with τ of shape (C,), the parameter ``threshold``,
            initially 0 (1911.09737), or ``"affine_tlu"``, max(u, κ·u + τ) with κ of shape (C,), the
            parameter ``slope``. Its paper does not say where κ starts: 0, so that it starts as the
            TLU does, as ReLU.
        dropout: Rate at which elements are set to 0 in training, the others scaled by 1/(1 − rate).
        drop: What is dropped at that rate: ``"element"``, or ``"channel"`` for whole channels of a
            sample.
    """

    scale: bool = True
    shift: bool = True
    activation: Activation | None = None
    dropout: float = 0.0
    drop: Drop = "element"

    def __post_init__(self) -> None:
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation is one of {', '.join(ACTIVATIONS)} or None; "
                f"received {self.activation!r}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a rate in [0, 1); received {self.dropout}")
        if self.drop not in get_args(Drop):
            raise ValueError(f"mask is 'element' or 'channel'; received {self.drop!r}")


def NoRecovery() -> Affine:
    """Ψ(x̂) = x̂."""
    return Affine(scale=False, shift=False)


def TLU() -> Affine:
    """Ψ(x̂) = max(γ·x̂ + β, τ), all three learned per channel (1911.09737)."""
    return Affine(activation="tlu")
