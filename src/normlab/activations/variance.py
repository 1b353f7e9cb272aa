"""Variance normalization (as in Lubana, Dick & Tanaka 2021, arXiv 2106.05956)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from normlab.core.card import Card, invariances
from normlab.core.layer import Normalize
from normlab.core.operation import Scale
from normlab.core.recovery import Activation, Affine
from normlab.core.statistics import Running


class VarianceNorm(Normalize):
    """y = γ·x/√(σ²_c + ε) + β: batch normalization that leaves the mean where it is.

    σ² is the biased variance about the mean, in the running average too. Source: Lubana, Dick &
    Tanaka 2021, arXiv 2106.05956, and its code.

    Args:
        num_channels: C.
        eps: ε.
        momentum: Weight of the newest batch; None for the average of all batches.
        affine: Whether there are γ and β.
        activation: Fused ``"relu"``, ``"silu"`` or ``"tlu"``, or None.
        channel_dim: 1, or −1 for (…, C).

    Shape:
        (N, C, *) → (N, C, *).

    Example:
        >>> VarianceNorm(8)
        VarianceNorm(8, n c * -> c (n *), eps=1e-05, momentum=0.1)
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        activation: Activation | None = None,
        channel_dim: int = 1,
    ) -> None:
        super().__init__(
            num_channels,
            "n c * -> c (n *)",
            operation=Scale(eps=eps, about="mean"),
            statistics=Running(momentum, bessel=False),
            recovery=Affine(affine, affine, activation),
            channel_dim=channel_dim,
        )


def reference(x: Tensor, parameters: Mapping[str, Tensor], *, eps: float = 1e-5) -> Tensor:
    """The formula, with var = E[x²] − E[x]², which float64 affords."""
    last = x.movedim(1, -1)
    flat = last.reshape(-1, x.shape[1])
    variance = (flat**2).mean(0) - flat.mean(0) ** 2
    y = last / (variance + eps) ** 0.5
    return (y * parameters["weight"] + parameters["bias"]).movedim(-1, 1)


CARD = Card(
    name="variance",
    title="Variance normalization",
    authors="Lubana, Dick & Tanaka",
    year=2021,
    arxiv="2106.05956",
    site="activation",
    formula="y = γ·x/√(σ²_c + ε) + β",
    pattern="n c * -> c (n *)",
    operation="scale by the standard deviation",
    statistics="batch in training, running averages in evaluation",
    recovery="affine per channel",
    layer=VarianceNorm,
    reference=reference,
    declared=invariances("channel", "scale"),
    limits=("keeps the mean", "one sample without positions is divided by √ε"),
    use_when="Ablations: what does centering add to batch normalization?",
    avoid_when="Training for its own sake.",
    source="code",
)
