"""Batch normalization (Ioffe & Szegedy 2015, arXiv 1502.03167)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from normlab.core.card import Card, invariances
from normlab.core.layer import Normalize
from normlab.core.operation import Standardize
from normlab.core.recovery import Activation, Affine
from normlab.core.statistics import Current, Reduce, Running


class BatchNorm(Normalize):
    """y = γ·(x − μ_c)/√(σ²_c + ε) + β, statistics of each channel over samples and positions.

    Evaluation uses running statistics, updated as new = (1 − momentum)·old + momentum·batch
    (torch's convention), the variance with Bessel's correction. Source: Ioffe & Szegedy 2015,
    arXiv 1502.03167.

    Args:
        num_channels: C.
        eps: ε.
        momentum: Weight of the newest batch; None for the average of all batches.
        affine: Whether there are γ and β.
        track_running_stats: False keeps nothing, and evaluation uses the batch.
        activation: Fused ``"relu"``, ``"silu"`` or ``"tlu"``, or None.
        channel_dim: 1, or −1 for (…, C).
        reduce: `AllReduce()` shares statistics between processes.

    Shape:
        (N, C, *) → (N, C, *), N·positions ≥ 2 in training.

    Example:
        >>> import torch
        >>> layer = BatchNorm(3)
        >>> layer(torch.randn(8, 3, 4, 4)).mean().abs() < 1e-6
        tensor(True)
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        activation: Activation | None = None,
        channel_dim: int = 1,
        reduce: Reduce | None = None,
    ) -> None:
        super().__init__(
            num_channels,
            "n c * -> c (n *)",
            operation=Standardize(eps=eps),
            statistics=Running(momentum, reduce) if track_running_stats else Current(reduce),
            recovery=Affine(affine, affine, activation),
            channel_dim=channel_dim,
        )


def reference(x: Tensor, parameters: Mapping[str, Tensor], *, eps: float = 1e-5) -> Tensor:
    """The formula, channel by channel."""
    columns = []
    for c in range(x.shape[1]):
        values = x[:, c]
        mean = values.sum() / values.numel()
        variance = ((values - mean) ** 2).sum() / values.numel()
        columns.append((values - mean) / (variance + eps) ** 0.5)
    shape = (1, -1, *[1] * (x.ndim - 2))
    xhat = torch.stack(columns, 1)
    return xhat * parameters["weight"].view(shape) + parameters["bias"].view(shape)


def twin(channels: int, rank: int) -> nn.Module:
    """Torch's layer for that many position axes."""
    return (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank](channels)


CARD = Card(
    name="batch",
    title="Batch normalization",
    authors="Ioffe & Szegedy",
    year=2015,
    arxiv="1502.03167",
    site="activation",
    formula="y = γ·(x − μ_c)/√(σ²_c + ε) + β",
    pattern="n c * -> c (n *)",
    operation="standardize",
    statistics="batch in training, running averages in evaluation",
    recovery="affine per channel",
    layer=BatchNorm,
    reference=reference,
    twin=twin,
    declared=invariances("channel"),
    moments=True,
    batch_of_one="error",
    limits=(
        "training and evaluation compute different functions",
        "few or alike samples in a batch make its statistics noisy or biased",
        "one sample without positions has no training-mode result",
    ),
    use_when="Batches per process are at least about 16 mixed samples; convolutional networks.",
    avoid_when="Batches are tiny, ordered by class or source, or the network is recurrent.",
)
