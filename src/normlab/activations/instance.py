"""Instance normalization (Ulyanov, Vedaldi & Lempitsky 2016, arXiv 1607.08022)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from normlab.core.card import Card, invariances
from normlab.core.layer import Normalize
from normlab.core.operation import Standardize
from normlab.core.recovery import Activation, Affine
from normlab.core.statistics import Current, Running


class InstanceNorm(Normalize):
    """y = γ·(x − μ_nc)/√(σ²_nc + ε) + β, statistics of each channel of each sample.

    Source: Ulyanov, Vedaldi & Lempitsky 2016, arXiv 1607.08022.

    Args:
        num_channels: C.
        eps: ε.
        momentum: Weight of the newest batch, where statistics are tracked.
        affine: Whether there are γ and β.
        track_running_stats: True keeps running statistics, averaged over samples, for evaluation.
        activation: Fused ``"relu"``, ``"silu"`` or ``"tlu"``, or None.
        channel_dim: 1, or −1 for (…, C).

    Shape:
        (N, C, *) → (N, C, *). A map of one position comes out as β, with a warning.

    Example:
        >>> InstanceNorm(8)
        InstanceNorm(8, n c * -> (n c) (*), eps=1e-05)
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = False,
        *,
        activation: Activation | None = None,
        channel_dim: int = 1,
    ) -> None:
        super().__init__(
            num_channels,
            "n c * -> (n c) (*)",
            operation=Standardize(eps=eps),
            statistics=Running(momentum) if track_running_stats else Current(),
            recovery=Affine(affine, affine, activation),
            channel_dim=channel_dim,
        )


def reference(x: Tensor, parameters: Mapping[str, Tensor], *, eps: float = 1e-5) -> Tensor:
    """The formula, map by map."""
    maps = x.reshape(x.shape[0], x.shape[1], -1)
    centered = maps - maps.sum(2, keepdim=True) / maps.shape[2]
    variance = (centered**2).sum(2, keepdim=True) / maps.shape[2]
    xhat = centered / (variance + eps) ** 0.5
    y = xhat * parameters["weight"][:, None] + parameters["bias"][:, None]
    return y.reshape(x.shape)


def twin(channels: int, rank: int) -> nn.Module:
    """Torch's layer for that many position axes."""
    kind = (nn.InstanceNorm1d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[rank]
    return kind(channels, affine=True)


CARD = Card(
    name="instance",
    title="Instance normalization",
    authors="Ulyanov, Vedaldi & Lempitsky",
    year=2016,
    arxiv="1607.08022",
    site="activation",
    formula="y = γ·(x − μ_nc)/√(σ²_nc + ε) + β",
    pattern="n c * -> (n c) (*)",
    operation="standardize",
    statistics="of the input, always (optionally tracked for evaluation)",
    recovery="affine per channel",
    layer=InstanceNorm,
    reference=reference,
    twin=twin,
    declared=invariances("sample and channel"),
    moments=True,
    limits=(
        "maps of one position come out constant",
        "removes the contrast of each map, which may carry the class",
    ),
    use_when="Style transfer and generators; batches too small or too alike for batch statistics.",
    avoid_when="Maps are tiny, or the mean and contrast of a map carry information.",
)
