"""Dynamic tanh (Zhu, Chen, He, LeCun & Liu 2025, arXiv 2503.10622)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from normlab.core.card import Card
from normlab.core.checks import check_channels, check_input
from normlab.kernels.squash import Function, squash


class Squashing(nn.Module):
    """Abstract: y = γ·f(α·x + s) + β with a scalar α and, in some methods, a scalar s.

    Args:
        num_channels: C.
        alpha: Initial α.
        affine: Whether there are γ and β.
        function: f, ``"tanh"`` or ``"erf"``.
        shift: Initial s; None for a method without.
        channel_dim: 1, or −1 for (…, C).
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    shift: nn.Parameter | None

    def __init__(
        self,
        num_channels: int,
        alpha: float,
        affine: bool,
        *,
        function: Function,
        shift: float | None,
        channel_dim: int,
    ) -> None:
        super().__init__()
        check_channels(num_channels, channel_dim)
        self.num_channels, self.channel_dim, self.function = num_channels, channel_dim, function
        self.initial_alpha, self.initial_shift = alpha, shift
        self.alpha = nn.Parameter(torch.empty(()))
        self.shift = None if shift is None else nn.Parameter(torch.empty(()))
        self.weight = nn.Parameter(torch.empty(num_channels)) if affine else None
        self.bias = nn.Parameter(torch.empty(num_channels)) if affine else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set parameters to their initial values."""
        starts = {"alpha": self.initial_alpha, "shift": self.initial_shift, "weight": 1, "bias": 0}
        for name, parameter in self.named_parameters(recurse=False):
            parameter.fill_(float(starts[name] or 0))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Squash x; a mask only sets the positions where it is false to 0."""
        check_input(self, x, mask, self.num_channels, self.channel_dim)
        shape = [1] * x.ndim
        shape[self.channel_dim] = -1
        weight, bias = (None if p is None else p.view(shape) for p in (self.weight, self.bias))
        padding = None if mask is None else ~mask.unsqueeze(self.channel_dim)
        # Before as well: NaN in the padding must not reach the gradients of α and γ.
        x = x if padding is None else x.masked_fill(padding, 0)
        y = squash(x, self.alpha, weight, bias, shift=self.shift, function=self.function)
        return y if padding is None else y.masked_fill(padding, 0)

    def extra_repr(self) -> str:
        """Print the options."""
        shift = "" if self.initial_shift is None else f", shift={self.initial_shift}"
        return f"{self.num_channels}, alpha={self.initial_alpha}{shift}"


class DynamicTanh(Squashing):
    """y = γ·tanh(α·x) + β: no statistics, so that every element stands alone.

    α is one learned number, γ and β are per channel. Source: Zhu, Chen, He, LeCun & Liu 2025,
    arXiv 2503.10622.

    Args:
        num_channels: C.
        alpha: Initial α.
        affine: Whether there are γ and β.
        channel_dim: 1, or −1 for (…, C).

    Shape:
        (N, C, *) → (N, C, *).

    Raises:
        ValueError: If x has another number of channels.

    Example:
        >>> DynamicTanh(8)
        DynamicTanh(8, alpha=0.5)
    """

    def __init__(
        self, num_channels: int, alpha: float = 0.5, affine: bool = True, *, channel_dim: int = 1
    ) -> None:
        super().__init__(
            num_channels, alpha, affine, function="tanh", shift=None, channel_dim=channel_dim
        )


def reference(x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """The formula, with tanh from exponentials."""
    e = torch.exp(-2 * parameters["alpha"] * x.movedim(1, -1))
    y = (1 - e) / (1 + e) * parameters["weight"] + parameters["bias"]
    return y.movedim(-1, 1)


CARD = Card(
    name="dyt",
    title="Dynamic tanh",
    authors="Zhu, Chen, He, LeCun & Liu",
    year=2025,
    arxiv="2503.10622",
    site="activation",
    formula="y = γ·tanh(α·x) + β",
    pattern="none: every element stands alone",
    operation="squash",
    statistics="none",
    recovery="affine per channel",
    layer=DynamicTanh,
    reference=reference,
    limits=("does not control the scale of what is small", "α depends on width and learning rate"),
    use_when="Transformers, in place of layer normalization, where reductions are costly.",
    avoid_when="Convolutional networks made for batch normalization.",
    source="code",
)
