"""No normalization: the baseline that shows what a normalizer is worth."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from normlab.core.card import Card
from normlab.core.checks import check_channels, check_input


class NoNorm(nn.Module):
    """y = x. Networks give the weight layer before it a bias.

    Args:
        num_channels: C; any input with that many channels passes unchanged.
        channel_dim: 1, or −1 for (…, C).

    Shape:
        (N, C, *) → (N, C, *).

    Raises:
        ValueError: If x has another number of channels.

    Example:
        >>> NoNorm(8)
        NoNorm(8)
    """

    def __init__(self, num_channels: int, *, channel_dim: int = 1) -> None:
        super().__init__()
        check_channels(num_channels, channel_dim)
        self.num_channels, self.channel_dim = num_channels, channel_dim

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return x; a mask only sets the positions where it is false to 0."""
        check_input(self, x, mask, self.num_channels, self.channel_dim)
        return x if mask is None else x.masked_fill(~mask.unsqueeze(self.channel_dim), 0)

    def extra_repr(self) -> str:
        """Print the options."""
        return str(self.num_channels)


def reference(x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """The formula."""
    return x


CARD = Card(
    name="none",
    title="No normalization",
    authors="",
    year=0,
    arxiv="",
    site="activation",
    formula="y = x",
    pattern="none",
    operation="none",
    statistics="none",
    recovery="none",
    layer=NoNorm,
    reference=reference,
    limits=("deep plain networks may not train",),
    use_when="As the baseline of a comparison.",
    avoid_when="Otherwise.",
)
