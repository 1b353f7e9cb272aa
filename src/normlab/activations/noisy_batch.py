"""Noisy batch normalization (Santurkar, Tsipras, Ilyas & Mądry 2018, arXiv 1805.11604)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normlab.activations import batch
from normlab.core.card import Card
from normlab.core.checks import check_input
from normlab.core.layer import Normalize
from normlab.core.operation import Operation, Standardize
from normlab.core.recovery import Affine, NoRecovery
from normlab.core.statistics import Current, Running


class Noise(NamedTuple):
    """Ranges of the noise.

    Attributes:
        mean: μ of a unit is uniform in ±mean.
        scale: σ of a unit is uniform between 1 and 1 + scale.
        jitter: m of an element is uniform within ±jitter of μ; s is normal about σ with this
            standard deviation.
    """

    mean: float = 0.5
    scale: float = 0.25
    jitter: float = 0.1


PAPER = Noise()


class NoisyBatchNorm(Normalize):
    """y = s·(γ·(x − μ_c)/√(σ²_c + ε) + β) + m: batch normalization, its distribution then spoilt.

    At each training step each unit (channel) draws μ ~ U(−½, ½) and σ ~ U(1, 1¼); each of its
    elements, one for each sample and position, draws m ~ U(μ − 0.1, μ + 0.1) and s ~ N(σ, 0.1),
    with 0.1 read as the standard deviation. Activations so have other means and scales at every
    step, which is what batch normalization is said to prevent. Evaluation is that of batch
    normalization. Source: Santurkar, Tsipras, Ilyas & Mądry 2018, arXiv 1805.11604.

    Args:
        num_channels: C.
        noise: The ranges, a `Noise` or three numbers in its order; None for none.
        normalize: False puts the same noise on x itself: y = s·x + m, without γ and β.
        eps: ε.
        momentum: Weight of the newest batch; None for the average of all batches.
        affine: Whether there are γ and β.
        channel_dim: 1, or −1 for (…, C).

    Shape:
        (N, C, *) → (N, C, *), N·positions ≥ 2 in training where it normalizes.

    Raises:
        ValueError: If a range is negative or not finite.

    Example:
        >>> NoisyBatchNorm(8)
        NoisyBatchNorm(8, n c * -> c (n *), eps=1e-05, momentum=0.1, noise=(0.5, 0.25, 0.1))
    """

    def __init__(
        self,
        num_channels: int,
        noise: tuple[float, float, float] | None = PAPER,
        normalize: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        channel_dim: int = 1,
    ) -> None:
        checked = None if noise is None else Noise(*noise)
        for name, width in ({} if checked is None else checked._asdict()).items():
            if not 0 <= width < float("inf"):
                raise ValueError(f"noise.{name} is a finite width of at least 0; received {width}")
        nothing = Operation(shift=False, about="zero", p=None, eps=0.0)
        super().__init__(
            num_channels,
            "n c * -> c (n *)",
            operation=Standardize(eps=eps) if normalize else nothing,
            statistics=Running(momentum) if normalize else Current(),
            recovery=Affine(affine, affine) if normalize else NoRecovery(),
            channel_dim=channel_dim,
        )
        self.normalize, self.noise = normalize, checked

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize x and, in training, add the noise; see the class."""
        if self.normalize:
            y = super().forward(x, mask)
        else:
            check_input(self, x, mask, self.num_channels, self.channel_dim)
            y = x
        if self.training and self.noise is not None:
            s, m = self._drawn(y)
            y = (s * y + m).to(y.dtype)
        return y if mask is None else y.masked_fill(~mask.unsqueeze(self.channel_dim), 0)

    def _drawn(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Draw s and m for each element, in float32 and so by seed and shape alone."""
        assert self.noise is not None
        like: dict[str, Any] = {"device": y.device, "dtype": torch.float32}
        unit = [1] * y.ndim
        unit[self.channel_dim] = self.num_channels
        mean = self.noise.mean * (2 * torch.rand(unit, **like) - 1)
        scale = 1 + self.noise.scale * torch.rand(unit, **like)
        uniform, normal = torch.rand(y.shape, **like), torch.randn(y.shape, **like)
        jitter = self.noise.jitter
        return scale + jitter * normal, mean + jitter * (2 * uniform - 1)

    def extra_repr(self) -> str:
        """Print the pattern, the options and the noise."""
        normalize = "" if self.normalize else ", normalize=False"
        return f"{super().extra_repr()}{normalize}, noise={self.noise and tuple(self.noise)}"


def reference(
    x: Tensor, parameters: Mapping[str, Tensor], *, noise: None, eps: float = 1e-5
) -> Tensor:
    """The formula without noise, where it is deterministic; the noise has tests of its own."""
    if noise is not None:
        raise ValueError("the reference is deterministic: noise=None")
    return batch.reference(x, parameters, eps=eps)


CARD = Card(
    name="noisy_batch",
    title="Noisy batch normalization",
    authors="Santurkar, Tsipras, Ilyas & Mądry",
    year=2018,
    arxiv="1805.11604",
    site="activation",
    formula="y = s·(γ·(x − μ_c)/√(σ²_c + ε) + β) + m, s and m random in each step and element",
    pattern="n c * -> c (n *)",
    operation="standardize",
    statistics="batch in training, running averages in evaluation",
    recovery="affine per channel, then noise that varies in time",
    layer=NoisyBatchNorm,
    reference=reference,
    case={"noise": None},
    declared=batch.CARD.declared,
    batch_of_one="error",
    limits=(
        "an instrument: it trains about as batch normalization does, never better",
        "evaluation has no noise, and other means and scales than training",
        "that 0.1 is the standard deviation of s, not its variance, is how the paper is read",
    ),
    use_when="To ask whether stable distributions are what makes batch normalization work.",
    avoid_when="Training for its own sake.",
    advice="Put it at every layer; normalize=False is the control, which does not train.",
    exempt={"saved_memory": "each element is multiplied by a random number of its own"},
)
