"""L1 batch normalization (Hoffer, Banner, Golan & Soudry 2018, arXiv 1803.01814)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from normlab.core.card import Card, invariances
from normlab.core.layer import Normalize
from normlab.core.operation import Standardize, consistency
from normlab.core.recovery import Activation, Affine
from normlab.core.statistics import Running


class L1BatchNorm(Normalize):
    """y = γ·(x − μ_c)/(√(π/2)·(mean|x − μ_c| + ε)) + β.

    √(π/2) makes the mean absolute deviation of Gaussian data its standard deviation. Evaluation
    uses running averages of μ and of mean|x − μ|. Source: Hoffer, Banner, Golan & Soudry 2018,
    arXiv 1803.01814.

    Args:
        num_channels: C.
        eps: ε.
        momentum: Weight of the newest batch; None for the average of all batches.
        affine: Whether there are γ and β.
        activation: Fused ``"relu"``, ``"silu"`` or ``"tlu"``, or None.
        channel_dim: 1, or −1 for (…, C).

    Shape:
        (N, C, *) → (N, C, *), N·positions ≥ 2 in training.

    Example:
        >>> L1BatchNorm(8)
        L1BatchNorm(8, n c * -> c (n *), eps=1e-05, p=1, momentum=0.1)
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
            operation=Standardize(eps=eps, p=1.0, factor=consistency(1.0)),
            statistics=Running(momentum),
            recovery=Affine(affine, affine, activation),
            channel_dim=channel_dim,
        )


def reference(x: Tensor, parameters: Mapping[str, Tensor], *, eps: float = 1e-5) -> Tensor:
    """The formula, with channels last."""
    last = x.movedim(1, -1)
    flat = last.reshape(-1, x.shape[1])
    mean = flat.sum(0) / flat.shape[0]
    scale = math.sqrt(math.pi / 2) * ((flat - mean).abs().sum(0) / flat.shape[0] + eps)
    y = (last - mean) / scale
    return (y * parameters["weight"] + parameters["bias"]).movedim(-1, 1)


CARD = Card(
    name="l1_batch",
    title="L1 batch normalization",
    authors="Hoffer, Banner, Golan & Soudry",
    year=2018,
    arxiv="1803.01814",
    site="activation",
    formula="y = γ·(x − μ_c)/(√(π/2)·(mean|x − μ_c| + ε)) + β",
    pattern="n c * -> c (n *)",
    operation="standardize by the mean absolute deviation",
    statistics="batch in training, running averages in evaluation",
    recovery="affine per channel",
    layer=L1BatchNorm,
    reference=reference,
    declared=invariances("channel"),
    batch_of_one="error",
    limits=("training and evaluation compute different functions",),
    use_when="Low precision, where squares overflow and lose digits.",
    avoid_when="As for batch normalization.",
)
