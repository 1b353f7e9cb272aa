"""Normalization over groups of channels and sub-batches (Summers & Dinneen 2019, 1906.03548)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from normlab.activations._areas import default_groups
from normlab.core.card import Card
from normlab.core.layer import Normalize
from normlab.core.operation import Standardize
from normlab.core.recovery import Activation, Affine
from normlab.core.statistics import Running


class BatchGroupNorm(Normalize):
    """y = γ·(x − μ_bg)/√(σ²_bg + ε) + β, statistics of a group of channels over a sub-batch.

    Between group normalization (sub-batches of one) and batch normalization (groups of one
    channel). Evaluation uses running statistics of each group. Source: Summers & Dinneen 2019,
    arXiv 1906.03548 ("Four things everyone should know to improve batch normalization").

    Args:
        num_channels: C.
        groups: Number of groups; it divides C. The default leaves at least four channels a group.
        batch_size: Samples of a sub-batch. A batch of N that it does not divide is split into
            ⌈N/batch_size⌉ sub-batches of nearly equal size.
        eps: ε.
        momentum: Weight of the newest batch; None for the average of all batches.
        affine: Whether there are γ and β.
        activation: Fused ``"relu"``, ``"silu"`` or ``"tlu"``, or None.
        channel_dim: 1, or −1 for (…, C).

    Shape:
        (N, C, *) → (N, C, *).

    Example:
        >>> BatchGroupNorm(8, groups=2, batch_size=4).partition.pattern
        '(b n) (g c) * -> (b g) (c n *)'
    """

    def __init__(
        self,
        num_channels: int,
        groups: int | None = None,
        batch_size: int = 32,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        activation: Activation | None = None,
        channel_dim: int = 1,
    ) -> None:
        super().__init__(
            num_channels,
            "(b n) (g c) * -> (b g) (c n *)",
            operation=Standardize(eps=eps),
            statistics=Running(momentum),
            recovery=Affine(affine, affine, activation),
            channel_dim=channel_dim,
            groups=default_groups(num_channels) if groups is None else groups,
            batch_size=batch_size,
        )


def reference(
    x: Tensor, parameters: Mapping[str, Tensor], *, groups: int, batch_size: int, eps: float = 1e-5
) -> Tensor:
    """The formula, sub-batch by sub-batch and group by group."""
    pieces = []
    for part in x.tensor_split(-(-x.shape[0] // batch_size)):
        normalized = []
        for group in part.tensor_split(groups, dim=1):
            centered = group - group.sum() / group.numel()
            normalized.append(centered / ((centered**2).sum() / group.numel() + eps) ** 0.5)
        pieces.append(torch.cat(normalized, 1))
    last = torch.cat(pieces).movedim(1, -1)
    return (last * parameters["weight"] + parameters["bias"]).movedim(-1, 1)


CARD = Card(
    name="batch_group",
    title="Batch-group normalization",
    authors="Summers & Dinneen",
    year=2019,
    arxiv="1906.03548",
    site="activation",
    formula="y = γ·(x − μ_bg)/√(σ²_bg + ε) + β",
    pattern="(b n) (g c) * -> (b g) (c n *)",
    operation="standardize",
    statistics="of each sub-batch in training, running averages in evaluation",
    recovery="affine per channel",
    layer=BatchGroupNorm,
    reference=reference,
    case={"groups": 3, "batch_size": 2},
    moments=True,
    limits=("training and evaluation compute different functions",),
    use_when="Small batches whose samples are mixed, between group and batch normalization.",
    avoid_when="Samples of a batch are alike.",
    source="code",
)
