"""Mean-only batch normalization (Salimans & Kingma 2016, arXiv 1602.07868)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from normlab.core.card import Card, invariances
from normlab.core.layer import Normalize
from normlab.core.operation import Center
from normlab.core.recovery import Activation, Affine
from normlab.core.statistics import Running


class MeanOnlyBatchNorm(Normalize):
    """y = x − μ_c + β, the mean of each channel over samples and positions.

    Evaluation uses the running mean. Meant to stand beside weight normalization, which takes care
    of the scale. Source: Salimans & Kingma 2016, arXiv 1602.07868.

    Args:
        num_channels: C.
        momentum: Weight of the newest batch; None for the average of all batches.
        affine: Whether there is β.
        activation: Fused ``"relu"``, ``"silu"`` or ``"tlu"``, or None.
        channel_dim: 1, or −1 for (…, C).

    Shape:
        (N, C, *) → (N, C, *), N·positions ≥ 2 in training.

    Example:
        >>> MeanOnlyBatchNorm(8)
        MeanOnlyBatchNorm(8, n c * -> c (n *), momentum=0.1, scale=False, shift=True)
    """

    def __init__(
        self,
        num_channels: int,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        activation: Activation | None = None,
        channel_dim: int = 1,
    ) -> None:
        super().__init__(
            num_channels,
            "n c * -> c (n *)",
            operation=Center(),
            statistics=Running(momentum),
            recovery=Affine(False, affine, activation),
            channel_dim=channel_dim,
        )


def reference(x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """The formula, with channels last."""
    last = x.movedim(1, -1)
    mean = last.reshape(-1, x.shape[1]).sum(0) / (x.numel() / x.shape[1])
    return (last - mean + parameters["bias"]).movedim(-1, 1)


CARD = Card(
    name="mean_only_batch",
    title="Mean-only batch normalization",
    authors="Salimans & Kingma",
    year=2016,
    arxiv="1602.07868",
    site="activation",
    formula="y = x − μ_c + β",
    pattern="n c * -> c (n *)",
    operation="center",
    statistics="batch in training, running averages in evaluation",
    recovery="shift per channel",
    layer=MeanOnlyBatchNorm,
    reference=reference,
    declared=invariances("channel", "shift"),
    batch_of_one="error",
    limits=("does not control the scale",),
    use_when="Beside weight normalization.",
    avoid_when="On its own in deep networks.",
)
