"""Filter response normalization with the thresholded linear unit (Singh & Krishnan, 1911.09737)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from torch import Tensor

from normlab.activations._areas import default_groups
from normlab.core.card import Card, invariances
from normlab.core.layer import Normalize
from normlab.core.operation import LearnedEps, Operation, Scale, Standardize
from normlab.core.recovery import Activation, Affine

Over = Literal["map", "sample", "group"]
_PATTERNS: dict[str, str] = {
    "map": "n c * -> (n c) (*)",
    "sample": "n c * -> n (c *)",
    "group": "n (g c) * -> (n g) (c *)",
}


class FilterResponseNorm(Normalize):
    """z = max(γ·x/√(ν² + ε) + β, τ), ν² = mean(x²) over the positions of a channel of a sample.

    Training and evaluation are the same function. ∂z/∂τ is 1 where the threshold holds. `over`
    and `centered` give the variants of the paper's ablation: FRN, LFRN and GFRN, which do not
    subtract a mean, and instance, layer and group normalization, which do, each with any of the
    activations. Source: Singh & Krishnan 2019, arXiv 1911.09737.

    Args:
        num_channels: C.
        eps: ε, or with `learned_eps` its fixed part.
        affine: Whether there are γ and β.
        over: What ν² is averaged over: the ``"map"`` of a channel of a sample (FRN), the whole
            ``"sample"`` (LFRN) or a ``"group"`` of its channels (GFRN).
        groups: Number of groups for ``over="group"``; by default as for `GroupNorm` by name.
        centered: Subtract the mean, and divide by the standard deviation about it.
        learned_eps: ε = eps + |ε_l| with a learned scalar ε_l, initially 1e-4. Needed where maps
            have one position (fully connected layers), since the layer is the sign of x there as
            ε goes to 0.
        activation: ``"tlu"`` (the paper's), another fused activation such as ``"affine_tlu"``,
            max(y, κ·y + τ) with κ per channel, or None.
        channel_dim: 1, or −1 for (…, C).

    Shape:
        (N, C, *) → (N, C, *). On (N, C), with `learned_eps`: x/√(x² + ε) in each element.

    Raises:
        ValueError: If `over` is another word.
        PartitionError: If `groups` does not divide C, or is given where there are none.

    Example:
        >>> FilterResponseNorm(8)
        FilterResponseNorm(8, n c * -> (n c) (*), eps=1e-06, activation=tlu)
        >>> FilterResponseNorm(8, over="group", groups=2)
        FilterResponseNorm(8, n (g c) * -> (n g) (c *), groups=2, eps=1e-06, activation=tlu)
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        affine: bool = True,
        *,
        over: Over = "map",
        groups: int | None = None,
        centered: bool = False,
        learned_eps: bool = False,
        activation: Activation | None = "tlu",
        channel_dim: int = 1,
    ) -> None:
        if over not in get_args(Over):
            raise ValueError(f"over is 'map', 'sample' or 'group'; received {over!r}")
        if over == "group" and groups is None:
            groups = default_groups(num_channels)
        in_force = LearnedEps(floor=eps) if learned_eps else eps
        operation: Operation = Standardize(eps=in_force) if centered else Scale(eps=in_force)
        super().__init__(
            num_channels,
            _PATTERNS[over],
            operation=operation,
            recovery=Affine(affine, affine, activation),
            channel_dim=channel_dim,
            groups=groups,
        )
        self.centered = centered

    def extra_repr(self) -> str:
        """Print the pattern and the options."""
        return super().extra_repr() + (", centered=True" if self.centered else "")


def reference(
    x: Tensor, parameters: Mapping[str, Tensor], *, eps: float = 1e-6, learned_eps: bool = False
) -> Tensor:
    """The formula, with the TLU as relu(y − τ) + τ."""
    added = parameters["eps_learned"].abs() if learned_eps else 0.0
    maps = x.reshape(x.shape[0], x.shape[1], -1)
    xhat = maps / ((maps**2).sum(2, keepdim=True) / maps.shape[2] + eps + added) ** 0.5
    weight, bias, tau = (parameters[n][:, None] for n in ("weight", "bias", "threshold"))
    return ((xhat * weight + bias - tau).relu() + tau).reshape(x.shape)


CARD = Card(
    name="filter_response",
    title="Filter response normalization with TLU",
    authors="Singh & Krishnan",
    year=2019,
    arxiv="1911.09737",
    site="activation",
    formula="z = max(γ·x/√(ν²_nc + ε) + β, τ), ν² = mean(x²)",
    pattern="n c * -> (n c) (*)",
    operation="scale by the root mean square",
    statistics="of the input, always",
    recovery="affine per channel, then the thresholded linear unit",
    layer=FilterResponseNorm,
    reference=reference,
    case={"learned_eps": True},
    declared=invariances("sample and channel", "scale"),
    limits=(
        "maps of one position need learned_eps=True",
        "replaces the activation as well",
        "where κ of the affine TLU starts is unverified: 0, as ReLU",
    ),
    use_when="Convolutional networks with batches of any size, down to one sample.",
    avoid_when="The activation must stay what it is; the last layer of a residual branch.",
    advice="Cosine learning-rate decay with a warm-up from 0; some networks fail without it.",
    warmup=0.1,
)
