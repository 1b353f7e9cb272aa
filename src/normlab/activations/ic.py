"""The independent-component layer: batch normalization, then dropout (Chen et al., 1905.05928)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from normlab.activations import batch
from normlab.core.card import Card
from normlab.core.layer import Normalize
from normlab.core.operation import Standardize
from normlab.core.recovery import Affine
from normlab.core.statistics import Running


class IndependentComponent(Normalize):
    """y = dropout(γ·(x − μ_c)/√(σ²_c + ε) + β), to stand immediately before a weight layer.

    Blocks read … → ReLU → IC → Conv, never Conv → IC → ReLU. With gates that are kept with
    probability p, the correlation between two units shrinks by p (at mean zero) and their mutual
    information by p². Source: Chen et al. 2019, arXiv 1905.05928.

    Args:
        num_channels: C.
        dropout: The rate at which elements are dropped, 1 − p.
        eps: ε.
        momentum: Weight of the newest batch; None for the average of all batches.
        affine: Whether there are γ and β.
        channel_dim: 1, or −1 for (…, C).

    Shape:
        (N, C, *) → (N, C, *), N·positions ≥ 2 in training.

    Example:
        >>> IndependentComponent(8)
        IndependentComponent(8, n c * -> c (n *), eps=1e-05, momentum=0.1, dropout=0.05)
    """

    placement: ClassVar[str] = "before_weight"

    def __init__(
        self,
        num_channels: int,
        dropout: float = 0.05,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        channel_dim: int = 1,
    ) -> None:
        super().__init__(
            num_channels,
            "n c * -> c (n *)",
            operation=Standardize(eps=eps),
            statistics=Running(momentum),
            recovery=Affine(affine, affine, dropout=dropout),
            channel_dim=channel_dim,
        )


def reference(
    x: Tensor, parameters: Mapping[str, Tensor], *, dropout: float, eps: float = 1e-5
) -> Tensor:
    """The formula at rate 0, where it is deterministic; masks have tests of their own."""
    if dropout:
        raise ValueError("the reference is deterministic: dropout=0")
    return batch.reference(x, parameters, eps=eps)


CARD = Card(
    name="ic",
    title="Independent-component layer",
    authors="Chen, Chen, Chen, Hsieh, Huang & Zhang",
    year=2019,
    arxiv="1905.05928",
    site="activation",
    formula="y = dropout(γ·(x − μ_c)/√(σ²_c + ε) + β)",
    pattern="n c * -> c (n *)",
    operation="standardize",
    statistics="batch in training, running averages in evaluation",
    recovery="affine per channel, then dropout",
    layer=IndependentComponent,
    reference=reference,
    twin=batch.twin,
    case={"dropout": 0.0},
    declared=batch.CARD.declared,
    moments=True,
    batch_of_one="error",
    limits=(
        "stands before a weight layer; anywhere else it is batch normalization with noise",
        "the next layer's batch statistics see dropped inputs, so that rates above about 0.05 "
        "shift the variance between training and evaluation",
    ),
    use_when="In place of batch normalization, moved to before each weight layer.",
    avoid_when="Where batch normalization fails: tiny or alike batches.",
    source="code",
)
