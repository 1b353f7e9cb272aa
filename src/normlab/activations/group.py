"""Group normalization (Wu & He 2018, arXiv 1803.08494)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from normlab.activations._areas import default_groups
from normlab.core.card import Card, invariances
from normlab.core.layer import Normalize
from normlab.core.operation import Standardize
from normlab.core.recovery import Activation, Affine


class GroupNorm(Normalize):
    """y = γ·(x − μ_ng)/√(σ²_ng + ε) + β, statistics of each group of channels of each sample.

    Source: Wu & He 2018, arXiv 1803.08494.

    Args:
        groups: Number of groups; it divides C. (By name, ``nl.norm("group", C)`` takes the most
            groups up to the paper's 32 that leave at least four channels in each.)
        num_channels: C.
        eps: ε.
        affine: Whether there are γ and β.
        activation: Fused ``"relu"``, ``"silu"`` or ``"tlu"``, or None.
        channel_dim: 1, or −1 for (…, C).

    Shape:
        (N, C, *) → (N, C, *).

    Example:
        >>> GroupNorm(2, 8)
        GroupNorm(8, n (g c) * -> (n g) (c *), groups=2, eps=1e-05)
    """

    def __init__(
        self,
        groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        activation: Activation | None = None,
        channel_dim: int = 1,
    ) -> None:
        super().__init__(
            num_channels,
            "n (g c) * -> (n g) (c *)",
            operation=Standardize(eps=eps),
            recovery=Affine(affine, affine, activation),
            channel_dim=channel_dim,
            groups=groups,
        )


def build(
    num_channels: int,
    groups: int | None = None,
    eps: float = 1e-5,
    affine: bool = True,
    *,
    activation: Activation | None = None,
    channel_dim: int = 1,
) -> GroupNorm:
    """Build from the channels first, with a number of groups that fits."""
    groups = default_groups(num_channels) if groups is None else groups
    return GroupNorm(
        groups, num_channels, eps, affine, activation=activation, channel_dim=channel_dim
    )


def reference(
    x: Tensor, parameters: Mapping[str, Tensor], *, groups: int, eps: float = 1e-5
) -> Tensor:
    """The formula, group by group."""
    flat = x.reshape(x.shape[0], groups, -1)
    centered = flat - flat.sum(2, keepdim=True) / flat.shape[2]
    variance = (centered**2).sum(2, keepdim=True) / flat.shape[2]
    xhat = (centered / (variance + eps) ** 0.5).reshape(x.shape).movedim(1, -1)
    return (xhat * parameters["weight"] + parameters["bias"]).movedim(-1, 1)


CARD = Card(
    name="group",
    title="Group normalization",
    authors="Wu & He",
    year=2018,
    arxiv="1803.08494",
    site="activation",
    formula="y = γ·(x − μ_ng)/√(σ²_ng + ε) + β",
    pattern="n (g c) * -> (n g) (c *)",
    operation="standardize",
    statistics="of the input, always",
    recovery="affine per channel",
    layer=GroupNorm,
    build=build,
    reference=reference,
    twin=lambda channels, rank: nn.GroupNorm(3, channels),
    case={"groups": 3},
    declared=invariances("sample and group"),
    moments=True,
    limits=("groups of one channel on maps of one position come out constant",),
    use_when="Small batches: detection, segmentation, video; fine-tuning with frozen statistics.",
    avoid_when="Large mixed batches, where batch normalization is often a little better.",
)
