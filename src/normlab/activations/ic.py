"""The independent-component layer: batch normalization, then dropout (Chen et al., 1905.05928)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from normlab.activations import batch
from normlab.core.card import Card
from normlab.core.layer import Normalize
from normlab.core.operation import Standardize
from normlab.core.recovery import Affine, Drop
from normlab.core.statistics import Running

Composition = Literal["relu-ic-conv", "ic-conv-relu", "conv-relu-ic"]
_PLACEMENTS: dict[str, str] = {
    "relu-ic-conv": "before_weight",
    "ic-conv-relu": "ic-conv-relu",
    "conv-relu-ic": "conv-relu-ic",
}


class IndependentComponent(Normalize):
    """y = dropout(γ·(x − μ_c)/√(σ²_c + ε) + β), to stand immediately before a weight layer.

    Blocks read … → ReLU → IC → Conv, never Conv → IC → ReLU. With independent gates that are kept
    with probability p, the correlation of two units of mean zero shrinks by p, and the mutual
    information of two units that are never exactly zero by p²; an entropy H becomes p·H plus that
    of the gate. Source: Chen et al. 2019, arXiv 1905.05928.

    Args:
        num_channels: C.
        dropout: The rate at which elements are dropped, 1 − p.
        eps: ε.
        momentum: Weight of the newest batch; None for the average of all batches.
        affine: Whether there are γ and β.
        mask: What one gate holds: an ``"element"``, or a whole ``"channel"`` of a sample.
        composition: The order in which a network is to lay the parts of a unit out:
            ``"relu-ic-conv"``, ``"ic-conv-relu"`` or ``"conv-relu-ic"``. It sets `placement`, and
            changes nothing of what the layer computes.
        channel_dim: 1, or −1 for (…, C).

    Shape:
        (N, C, *) → (N, C, *), N·positions ≥ 2 in training.

    Raises:
        ValueError: If `mask` or `composition` is another word, or the rate is not in [0, 1).

    Example:
        >>> IndependentComponent(8)
        IndependentComponent(8, n c * -> c (n *), eps=1e-05, momentum=0.1, dropout=0.05)
        >>> IndependentComponent(8, composition="conv-relu-ic").placement
        'conv-relu-ic'
    """

    def __init__(
        self,
        num_channels: int,
        dropout: float = 0.05,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        mask: Drop = "element",
        composition: Composition = "relu-ic-conv",
        channel_dim: int = 1,
    ) -> None:
        if composition not in _PLACEMENTS:
            raise ValueError(
                f"composition is one of {', '.join(_PLACEMENTS)}; received {composition!r}"
            )
        super().__init__(
            num_channels,
            "n c * -> c (n *)",
            operation=Standardize(eps=eps),
            statistics=Running(momentum),
            recovery=Affine(affine, affine, dropout=dropout, drop=mask),
            channel_dim=channel_dim,
        )
        self.composition = composition
        self.placement = _PLACEMENTS[composition]

    def extra_repr(self) -> str:
        """Print the options, the composition where it is not the first."""
        shown = super().extra_repr()
        if self.composition == "relu-ic-conv":
            return shown
        return f"{shown}, composition={self.composition}"


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
        "the shrinkage of correlation by p holds at β = 0, that of information by p² where no "
        "unit is exactly zero",
    ),
    use_when="In place of batch normalization, moved to before each weight layer.",
    avoid_when="Where batch normalization fails: tiny or alike batches.",
    source="code",
    advice=(
        "Dropped element by element at 0.05; that the paper drops elements, and which of the three "
        "compositions wins in residual units, is unverified."
    ),
)
