"""Root mean square layer normalization (Zhang & Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from normlab.activations._areas import Over, sample_or_position
from normlab.core.card import Card, invariances
from normlab.core.layer import Normalize
from normlab.core.operation import Scale
from normlab.core.recovery import Activation, Affine


class RMSNorm(Normalize):
    """y = γ·x/√(mean(x²) + ε), the mean over each sample, or over each position of it.

    Source: Zhang & Sennrich 2019, arXiv 1910.07467.

    Args:
        num_channels: C.
        eps: ε; the default is torch's, the rounding unit of float32.
        affine: Whether there is γ.
        over: ``"sample"`` or ``"position"``; the default is the sample for channel_dim=1 and the
            position (as `torch.nn.RMSNorm(C)` has it) for channel_dim=−1.
        activation: Fused ``"relu"``, ``"silu"`` or ``"tlu"``, or None.
        channel_dim: 1, or −1 for (…, C).

    Shape:
        (N, C, *) → (N, C, *).

    Example:
        >>> import torch
        >>> RMSNorm(4, channel_dim=-1)(torch.tensor([[2.0, -2.0, 2.0, 2.0]]))
        tensor([[ 1., -1.,  1.,  1.]], grad_fn=<_NormalizeBackward>)
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 2**-23,
        affine: bool = True,
        *,
        over: Over | None = None,
        activation: Activation | None = None,
        channel_dim: int = 1,
    ) -> None:
        super().__init__(
            num_channels,
            sample_or_position(over, channel_dim),
            operation=Scale(eps=eps),
            recovery=Affine(affine, False, activation),
            channel_dim=channel_dim,
        )


def reference(x: Tensor, parameters: Mapping[str, Tensor], *, eps: float = 2**-23) -> Tensor:
    """The formula, sample by sample."""
    rows = [sample / ((sample * sample).mean() + eps) ** 0.5 for sample in x]
    weight = parameters["weight"].reshape(-1, *[1] * (x.ndim - 2))
    return torch.stack(rows) * weight


CARD = Card(
    name="rms",
    title="Root mean square layer normalization",
    authors="Zhang & Sennrich",
    year=2019,
    arxiv="1910.07467",
    site="activation",
    formula="y = γ·x/√(mean(x²) + ε)",
    pattern="n c * -> n (c *)",
    operation="scale by the root mean square",
    statistics="of the input, always",
    recovery="scale per channel",
    layer=RMSNorm,
    reference=reference,
    declared=invariances("sample", "scale"),
    limits=("keeps the mean, so that a common offset of all channels stays",),
    use_when="Transformers, where it matches layer normalization at less cost.",
    avoid_when="Inputs have a large common mean.",
)
