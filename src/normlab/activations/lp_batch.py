"""The ℓp normalizations of "How does batch normalization help optimization?" (1805.11604)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from normlab.core.card import Card, invariances
from normlab.core.layer import Normalize
from normlab.core.operation import About, Standardize, order
from normlab.core.recovery import Activation, Affine
from normlab.core.statistics import Running


class LpBatchNorm(Normalize):
    """y = γ·(x − μ_c)/(mean|x|ᵖ + ε)^(1/p) + β; for p = max, the divisor is max|x| + ε.

    The norm is that from before the mean is subtracted. Evaluation uses running averages of μ and
    of the norm. Source: Santurkar, Tsipras, Ilyas & Mądry 2018, arXiv 1805.11604, appendix.

    Args:
        num_channels: C.
        p: Order of the norm: a number ≥ 1 or ``"max"``.
        eps: ε.
        momentum: Weight of the newest batch; None for the average of all batches.
        affine: Whether there are γ and β.
        about: ``"mean"`` takes the norm of x − μ instead of that of x.
        activation: Fused ``"relu"``, ``"silu"`` or ``"tlu"``, or None.
        channel_dim: 1, or −1 for (…, C).

    Shape:
        (N, C, *) → (N, C, *), N·positions ≥ 2 in training.

    Example:
        >>> LpBatchNorm(8, p="max")
        LpBatchNorm(8, n c * -> c (n *), eps=1e-05, p=max, momentum=0.1)
    """

    def __init__(
        self,
        num_channels: int,
        p: float | str = 1.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        about: About = "zero",
        activation: Activation | None = None,
        channel_dim: int = 1,
    ) -> None:
        super().__init__(
            num_channels,
            "n c * -> c (n *)",
            operation=Standardize(eps=eps, p=order(p), about=about),
            statistics=Running(momentum),
            recovery=Affine(affine, affine, activation),
            channel_dim=channel_dim,
        )


def reference(
    x: Tensor, parameters: Mapping[str, Tensor], *, p: float | str, eps: float = 1e-5
) -> Tensor:
    """The formula, with channels last."""
    last = x.movedim(1, -1)
    flat = last.reshape(-1, x.shape[1])
    if p == "max":
        norm = flat.abs().max(0).values + eps
    else:
        norm = ((flat.abs() ** float(p)).sum(0) / flat.shape[0] + eps) ** (1 / float(p))
    y = (last - flat.sum(0) / flat.shape[0]) / norm
    return (y * parameters["weight"] + parameters["bias"]).movedim(-1, 1)


CARD = Card(
    name="lp_batch",
    title="Lp batch normalization",
    authors="Santurkar, Tsipras, Ilyas & Mądry",
    year=2018,
    arxiv="1805.11604",
    site="activation",
    formula="y = γ·(x − μ_c)/(mean|x|ᵖ + ε)^(1/p) + β",
    pattern="n c * -> c (n *)",
    operation="center, divide by the Lp norm from before centering",
    statistics="batch in training, running averages in evaluation",
    recovery="affine per channel",
    layer=LpBatchNorm,
    reference=reference,
    case={"p": 3.0},
    declared=invariances("channel", "scale"),
    batch_of_one="error",
    limits=("training and evaluation compute different functions",),
    use_when="Ablations: is it the variance that matters?",
    avoid_when="As for batch normalization.",
)
