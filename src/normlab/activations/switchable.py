"""Switchable normalization (Luo, Ren, Peng, Zhang & Li 2018, arXiv 1806.10779)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from normlab.activations._lines import Line, LineNorm, Maps, Parameters, affine, area
from normlab.core.card import Card, invariances
from normlab.core.recovery import Affine
from normlab.core.statistics import Current, Running
from normlab.kernels.cpu.maps import Known

Over = Literal["instance", "layer", "batch"]
# The widest area of the mixture decides what is stored, and which inputs have no result.
_WIDEST: dict[str, str] = {
    "batch": "n c * -> c (n *)",
    "layer": "n c * -> n (c *)",
    "instance": "n c * -> (n c) (*)",
}

_NUMBERS: dict[str, int] = {"instance": 1, "layer": 2, "batch": 3}  # as kernels number them


class MixedMoments(LineNorm):
    """Abstract: y = γ·(x − Σ_k w_k·μ_k)/√(Σ_k w'_k·σ²_k + ε) + β; a subclass defines `_shares`.

    It makes w of `mean_weight` and w' of `var_weight`.
    """

    def __init__(
        self,
        num_channels: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        over: Sequence[Over],
        channel_dim: int,
    ) -> None:
        chosen = _checked(over)
        pattern = next(pattern for part, pattern in _WIDEST.items() if part in chosen)
        statistics = Running(momentum) if "batch" in chosen else Current()
        recovery = Affine(affine, affine)
        super().__init__(num_channels, eps, statistics, recovery, channel_dim, pattern=pattern)
        self.over = chosen
        self._add(len(chosen), mean_weight=1.0, var_weight=1.0)

    def _shares(self, logits: Tensor, given: Any) -> Tensor:
        """Weights that sum to 1, of a vector of logits and what `forward` was given.

        Each method of the kind has its own.
        """
        raise NotImplementedError

    def _used(self) -> Parameters:
        return self.mean_weight, self.var_weight, self.weight, self.bias

    def _line(self, maps: Maps, parameters: Parameters, stored: Maps | None, given: Any) -> Line:
        mean_weight, var_weight, weight, bias = parameters
        parts = [area(name, maps, stored) for name in self.over]
        # x − Σw·μ = z + Σw·(μ_instance − μ): differences, which do not lose a large mean's digits.
        shift = _mixture(
            self._shares(mean_weight, given), [maps.mean - part.mean for part in parts]
        )
        shares = self._shares(var_weight, given)
        scale = (_mixture(shares, [part.variance for part in parts]) + self.eps).rsqrt()
        return affine(scale, shift * scale, weight, bias)

    def extra_repr(self) -> str:
        """Print the pattern in force and the options that matter."""
        return f"{super().extra_repr()}, over={'+'.join(self.over)}"


class SwitchableNorm(MixedMoments):
    """y = γ·(x − Σ_k w_k·μ_k)/√(Σ_k w'_k·σ²_k + ε) + β, k over instance, layer and batch.

    w = softmax(`mean_weight`) and w' = softmax(`var_weight`) are learned, one vector each for the
    whole layer, initially ⅓ each. μ_k and σ²_k are the mean and the biased variance of each map, of
    each sample, and of each channel over the batch; the latter two follow from those of the maps:
    σ²_layer = mean_c(σ²_instance + (μ_instance − μ_layer)²), and likewise over samples. Evaluation
    takes running averages for the batch's part alone, with the unbiased variance that
    `BatchNorm` stores. Source: Luo, Ren, Peng, Zhang & Li 2018,
    arXiv 1806.10779, and the authors' code, which takes the unbiased variance of each map.

    Args:
        num_channels: C.
        eps: ε.
        momentum: Weight of the newest batch; None for the average of all batches.
        affine: Whether there are γ and β.
        over: What is mixed. Without ``"batch"`` samples stand alone and nothing is stored.
        channel_dim: 1, or −1 for (…, C).

    Shape:
        (N, C, *) → (N, C, *), N·positions ≥ 2 in training where the batch takes part. Without
        positions an instance's variance is 0, and only the other parts have one.

    Raises:
        ValueError: If `over` is empty, names a part twice, or another.

    Example:
        >>> SwitchableNorm(8)
        SwitchableNorm(8, n c * -> c (n *), eps=1e-05, momentum=0.1, over=instance+layer+batch)
        >>> SwitchableNorm(8, over=("instance", "layer"))(torch.randn(1, 8, 5)).shape
        torch.Size([1, 8, 5])
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        over: Sequence[Over] = ("instance", "layer", "batch"),
        channel_dim: int = 1,
    ) -> None:
        super().__init__(num_channels, eps, momentum, affine, over, channel_dim)

    def _shares(self, logits: Tensor, given: Any) -> Tensor:
        return logits.softmax(0)

    def _known_to_kernels(self, stored: Maps | None) -> Known | None:
        # A subclass may have other rules, which kernels do not know.
        for name in ("_shares", "_line", "_batch"):
            if getattr(type(self), name) is not getattr(SwitchableNorm, name):
                return None
        order = tuple(_NUMBERS[part] for part in self.over)
        kept = None if stored is None else (stored.mean, stored.variance)
        return Known(float(self.eps), order, stored=kept, measures=self._updates)


def _checked(over: Sequence[Over]) -> tuple[Over, ...]:
    names = cast(tuple[Over, ...], (over,) if isinstance(over, str) else tuple(over))
    if not names or len(set(names)) < len(names) or not set(names) <= set(_WIDEST):
        raise ValueError(
            f"over names one or more of 'instance', 'layer' and 'batch', once each; received {over}"
        )
    return names


def _mixture(weights: Tensor, values: Sequence[Tensor]) -> Tensor:
    mixed = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        mixed = mixed + weight * value
    return mixed


def reference(x: Tensor, parameters: Mapping[str, Tensor], *, eps: float = 1e-5) -> Tensor:
    """The formula, with each of the three statistics taken from x itself."""
    maps = x.reshape(*x.shape[:2], -1)
    w, v = (torch.exp(parameters[name]) for name in ("mean_weight", "var_weight"))
    w, v = w / w.sum(), v / v.sum()
    mean, variance = torch.zeros_like(maps), torch.zeros_like(maps)
    for k, dims in enumerate([(2,), (1, 2), (0, 2)]):
        mu = maps.mean(dims, keepdim=True)
        mean = mean + w[k] * mu
        variance = variance + v[k] * ((maps - mu) ** 2).mean(dims, keepdim=True)
    xhat = (maps - mean) / (variance + eps) ** 0.5
    y = xhat * parameters["weight"][:, None] + parameters["bias"][:, None]
    return y.reshape(x.shape)


CARD = Card(
    name="switchable",
    title="Switchable normalization",
    authors="Luo, Ren, Peng, Zhang & Li",
    year=2018,
    arxiv="1806.10779",
    site="activation",
    formula="y = γ·(x − Σ_k w_k·μ_k)/√(Σ_k w'_k·σ²_k + ε) + β, w and w' softmax weights",
    pattern="mixture of n c * -> (n c) (*), n c * -> n (c *) and n c * -> c (n *)",
    operation="standardize by mixed means and variances",
    statistics="of maps and samples always; of the batch in training, running in evaluation",
    recovery="affine per channel",
    layer=SwitchableNorm,
    reference=reference,
    declared=invariances("tensor"),
    batch_of_one="error",
    limits=(
        "mixed statistics are no area's own: outputs have neither mean 0 nor deviation 1",
        "invariant to scale and shift of the whole tensor alone",
        "what the softmax gives to the batch still depends on its size",
    ),
    use_when="It is open which normalizer suits a layer, and the data may decide.",
    avoid_when="Batches are tiny (give over=('instance', 'layer')), or every pass over x counts.",
    source="code",
)
