"""EvoNorm-S0, a normalization with its activation (Liu et al. 2020, arXiv 2004.02967)."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normlab.activations._areas import default_groups
from normlab.core.card import Card
from normlab.core.checks import check_channels, check_input
from normlab.core.operation import Operation, Scale
from normlab.core.partition import Layout, partition
from normlab.kernels import dispatch
from normlab.kernels.cpu.maps import MAPS
from normlab.kernels.recompute import recomputed
from normlab.kernels.reference import (
    Moments,
    Spec,
    accumulated,
    counted,
    deviation,
    masked,
    moments,
)

EvoNorm = Literal["evonorm"]
_NOTHING = Operation(shift=False, about="zero", p=None, eps=0.0)


def spread(given: Moments, operation: Operation, eps: float, bessel: bool) -> Tensor:
    """√(variance + ε) of each area, the variance corrected by m/(m − 1) where `bessel`.

    An area of one member has variance 0, corrected or not.
    """
    assert given.moment is not None
    variance = given.moment
    if bessel:
        size = counted(given.size, variance)
        variance = variance * (size / (size - 1).clamp(min=1))
    return deviation(variance, operation, eps)


class EvoNormS0(nn.Module):
    """y = γ·x·sigmoid(v·x)/√(σ²_ng + ε) + β, σ² the variance of a group of a sample.

    It contains its nonlinearity, so that no activation follows it: no mean is subtracted, and the
    numerator is a SiLU with a learned v per channel. Training and evaluation are the same
    function. Source: Liu, Brock, Simonyan & Le 2020, arXiv 2004.02967.

    Args:
        num_channels: C.
        groups: Number of groups; by default the most, up to the paper's 32, that leave at least
            four channels in each.
        eps: ε.
        affine: Whether there are γ and β.
        bessel: Correct the variance by m/(m − 1), as the code of 2106.05956 does; the authors' code
            does not.
        activation: ``"evonorm"``, or None for the form without the nonlinearity, which in the
            authors' code is γ·x + β, without any normalization.
        channel_dim: 1, or −1 for (…, C).

    Shape:
        (N, C, *) → (N, C, *).

    Raises:
        PartitionError: If `groups` does not divide C.
        ValueError: If `activation` is another word.

    Example:
        >>> EvoNormS0(8)
        EvoNormS0(8, n (g c) * -> (n g) (c *), groups=2, eps=1e-05)
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    v: nn.Parameter | None

    def __init__(
        self,
        num_channels: int,
        groups: int | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        bessel: bool = False,
        activation: EvoNorm | None = "evonorm",
        channel_dim: int = 1,
    ) -> None:
        super().__init__()
        check_channels(num_channels, channel_dim)
        check_activation(activation)
        self.num_channels, self.channel_dim, self.bessel = num_channels, channel_dim, bessel
        self.activation: EvoNorm | None = activation
        self.groups = default_groups(num_channels) if groups is None else groups
        self.operation, self.eps = Scale(eps=eps, about="mean"), eps
        self.partition = partition("n (g c) * -> (n g) (c *)")
        self.partition.bind((1, num_channels), sizes={"g": self.groups})
        self.weight, self.bias, self.v = parameters(num_channels, affine, activation)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set parameters to their initial values."""
        reset(self)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize and activate x; see the class."""
        check_input(self, x, mask, self.num_channels, self.channel_dim)
        if x.numel() == 0:  # nothing to average; parameters stay in the graph, with gradient 0
            return x + 0 * sum((p.sum() for p in self.parameters()), x.new_zeros(()))
        plain = linear(self, x, mask)
        if plain is not None:
            return plain
        sizes = {"g": self.groups}
        layout = self.partition.bind(x.shape, channel_dim=self.channel_dim, sizes=sizes)
        where = None if mask is None else layout.per_position(mask)
        weight, bias, v = (
            None if p is None else layout.per_channel(p) for p in (self.weight, self.bias, self.v)
        )
        dims, operation, eps, bessel = layout.member_dims, self.operation, self.eps, self.bessel
        if self.v is not None and mask is None:
            affine = (self.weight, self.bias, self.v)
            kernels = dispatch.kernels_for(x, layout, operation, "gated", affine)
            if kernels is not None:
                return self._compiled(kernels, x, layout, self.v)

        def formula(
            x: Tensor, v: Tensor | None, weight: Tensor | None, bias: Tensor | None,
            mask: Tensor | None,
        ) -> Tensor:  # fmt: skip
            y = masked(accumulated(x), mask)
            if v is not None:
                given = moments(x, dims, operation, mask)
                y = y * torch.sigmoid(v * y) / spread(given, operation, eps, bessel)
            return finished(y, weight, bias, mask).to(x.dtype)

        return layout.join(recomputed(formula, layout.split(x), v, weight, bias, where))

    def _compiled(self, kernels: ModuleType, x: Tensor, layout: Layout, v: Tensor) -> Tensor:
        """The same by compiled kernels."""
        weight: Tensor | None = self.weight
        eps: Tensor | float = self.eps
        if self.bessel:  # √(c·σ² + ε) = √c · √(σ² + ε/c); c a tensor, as shapes may be symbols
            wide = torch.promote_types(x.dtype, torch.float32)
            correction = layout.members / max(layout.members - 1, 1)
            c = torch.full((), correction, dtype=wide, device=x.device)
            one = torch.ones_like(v) if weight is None else weight
            weight, eps = one.to(wide) / c.sqrt(), self.eps / c
        spec = Spec(layout.member_dims, self.operation, "gated")
        y: Tensor = kernels.normalize(
            x, layout, spec, weight, self.bias, v, eps, None, from_batch=True
        )[0]
        return y

    def extra_repr(self) -> str:
        """Print the pattern in force and the options."""
        shown = f"{self.num_channels}, {self.partition}, groups={self.groups}, eps={self.eps}"
        return shown + options_shown(self)


def check_activation(activation: str | None) -> None:
    """Raise ValueError for anything but the method's own nonlinearity, or none."""
    if activation not in ("evonorm", None):
        raise ValueError(
            "activation is 'evonorm', which is part of the method, or None for the linear form; "
            f"received {activation!r}"
        )


def parameters(
    channels: int, affine: bool, activation: EvoNorm | None
) -> tuple[nn.Parameter | None, nn.Parameter | None, nn.Parameter | None]:
    """γ, β and v, to be filled by `reset`."""
    weight = nn.Parameter(torch.empty(channels)) if affine else None
    bias = nn.Parameter(torch.empty(channels)) if affine else None
    return weight, bias, None if activation is None else nn.Parameter(torch.empty(channels))


@torch.no_grad()
def reset(layer: nn.Module) -> None:
    """Set β to 0, γ and v to 1."""
    for name, parameter in layer.named_parameters(recurse=False):
        parameter.fill_(0.0 if name == "bias" else 1.0)


def linear(layer: Any, x: Tensor, mask: Tensor | None) -> Tensor | None:
    """γ·x + β by compiled kernels; None where it is not asked for, or they do not do it."""
    if layer.v is not None or mask is not None:
        return None
    layout = MAPS.bind(x.shape, channel_dim=layer.channel_dim)
    affine = (layer.weight, layer.bias)
    kernels = dispatch.kernels_for(x, layout, _NOTHING, None, affine)
    if kernels is None:
        return None
    spec = Spec(layout.member_dims, _NOTHING, None)
    y: Tensor = kernels.normalize(x, layout, spec, *affine, None, 0.0, None, from_batch=True)[0]
    return y


def finished(y: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """γ·y + β, 0 where masked."""
    y = y if weight is None else y * weight
    return masked(y if bias is None else y + bias, mask)


def options_shown(layer: Any) -> str:
    """The options that both EvoNorms print where they are not the default."""
    parts = ["bessel=True"] if layer.bessel else []
    parts += [] if layer.activation else ["activation=None"]
    parts += ["scale=False, shift=False"] if layer.weight is None else []
    parts += ["channel_dim=-1"] if layer.channel_dim == -1 else []
    return "".join(f", {part}" for part in parts)


def reference(
    x: Tensor, parameters: Mapping[str, Tensor], *, groups: int, eps: float = 1e-5
) -> Tensor:
    """The formula, group by group, with var = E[x²] − E[x]²."""
    flat = x.reshape(x.shape[0], groups, -1)
    variance = (flat**2).mean(2, keepdim=True) - flat.mean(2, keepdim=True) ** 2
    last = (flat / (variance + eps) ** 0.5).reshape(x.shape).movedim(1, -1)
    gate = 1 / (1 + torch.exp(-parameters["v"] * x.movedim(1, -1)))
    return (last * gate * parameters["weight"] + parameters["bias"]).movedim(-1, 1)


CARD = Card(
    name="evonorm_s0",
    title="EvoNorm-S0",
    authors="Liu, Brock, Simonyan & Le",
    year=2020,
    arxiv="2004.02967",
    site="activation",
    formula="y = γ·x·sigmoid(v·x)/√(σ²_ng + ε) + β",
    pattern="n (g c) * -> (n g) (c *)",
    operation="scale the gated input by the standard deviation of the input",
    statistics="of the input, always",
    recovery="affine per channel",
    layer=EvoNormS0,
    reference=reference,
    case={"groups": 3},
    limits=(
        "replaces the activation as well; without it (activation=None) nothing is normalized",
        "the linear form as γ·x + β is that of a copy of the authors' code",
        "groups of one channel on maps of one position are divided by √ε",
    ),
    use_when="Convolutional networks with small batches, normalization and activation in one.",
    avoid_when="The activation must stay what it is.",
    source="code",
)
