"""Switchable normalization (Luo, Ren, Peng, Zhang & Li 2018, arXiv 1806.10779)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from normlab.core.card import Card, invariances
from normlab.core.layer import Normalize
from normlab.core.operation import Standardize
from normlab.core.partition import Layout
from normlab.core.recovery import Affine
from normlab.core.statistics import Current, Running
from normlab.kernels.cpu import maps
from normlab.kernels.reference import Moments, accumulated, divisor, masked, members, total

Over = Literal["instance", "layer", "batch"]
# The widest area of the mixture decides what is stored, and which inputs have no result.
_WIDEST: dict[str, str] = {
    "batch": "n c * -> c (n *)",
    "layer": "n c * -> n (c *)",
    "instance": "n c * -> (n c) (*)",
}


class SwitchableNorm(Normalize):
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
        chosen = _checked(over)
        super().__init__(
            num_channels,
            next(pattern for part, pattern in _WIDEST.items() if part in chosen),
            operation=Standardize(eps=eps),
            statistics=Running(momentum) if "batch" in chosen else Current(),
            recovery=Affine(affine, affine),
            channel_dim=channel_dim,
        )
        self.over = chosen
        self.mean_weight = nn.Parameter(torch.ones(len(chosen)))
        self.var_weight = nn.Parameter(torch.ones(len(chosen)))

    def reset_parameters(self) -> None:
        """Set parameters and stored statistics to their initial values."""
        super().reset_parameters()
        for name in ("mean_weight", "var_weight"):
            if name in self._parameters:  # they are made after the parent's
                nn.init.ones_(getattr(self, name))

    def _normalize(
        self, x: Tensor, mask: Tensor | None, measured: list[tuple[Layout, Moments]]
    ) -> Tensor:
        """Mix the statistics; those of the batch are added to `measured`."""
        layout = self.partition.bind(x.shape, channel_dim=self.channel_dim)
        if self._measures:
            self._check_members(layout, synchronized=False)
        given = (self.mean_weight, self.var_weight, self.weight, self.bias)
        if self.statistics.reduce is None and maps.supports(x, given, mask):
            return self._by_maps(x, layout, measured)
        mask = None if mask is None else layout.per_position(mask)
        # z is what both σ² and y are made of, so that it alone is kept for the gradient.
        z, instance = _of_maps(x, mask, layout)
        batch = None
        if "batch" in self.over and self._measures:
            batch = _merged(instance, 0)
            measured.append((layout, _detached(batch)))
        if "batch" in self.over and self._uses_stored:
            batch, _ = self._from_stored(layout, self.eps)
        parts = _parts(self.over, instance, layout.names.index("c"), batch)
        affine = (None if p is None else layout.per_channel(p) for p in (self.weight, self.bias))
        scale, offset = _line(parts, instance, self.eps, self.mean_weight, self.var_weight, *affine)
        return masked(torch.addcmul(offset, z, scale), mask).to(x.dtype)

    def _by_maps(self, x: Tensor, layout: Layout, measured: list[tuple[Layout, Moments]]) -> Tensor:
        """The same by compiled kernels: a line for each map."""
        own = maps.MAPS.bind(x.shape, channel_dim=self.channel_dim)
        over, eps, stored = self.over, float(self.eps), None
        if "batch" in over and self._uses_stored:
            given, _ = self._from_stored(layout, eps)
            assert given.mean is not None
            assert given.moment is not None
            stored = Moments(given.mean.view(1, -1), given.moment.view(1, -1), layout.members)

        def middle(mean: Tensor, variance: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
            instance = Moments(mean, variance, own.members)
            return _line(_parts(over, instance, 1, stored), instance, eps, *parameters)

        y, means, variances = maps.fused(
            "line", x, own, middle, self.mean_weight, self.var_weight, self.weight, self.bias
        )
        if "batch" in over and self._measures:
            mean, variance = (layout.from_stored(t[0]) for t in maps.merged(means, variances, 0))
            measured.append((layout, Moments(mean, variance, layout.members)))
        return y

    def extra_repr(self) -> str:
        """Print the pattern in force and the options that matter."""
        return f"{super().extra_repr()}, over={'+'.join(self.over)}"


def _checked(over: Sequence[Over]) -> tuple[Over, ...]:
    names = cast(tuple[Over, ...], (over,) if isinstance(over, str) else tuple(over))
    if not names or len(set(names)) < len(names) or not set(names) <= set(_WIDEST):
        raise ValueError(
            f"over names one or more of 'instance', 'layer' and 'batch', once each; received {over}"
        )
    return names


def _of_maps(x: Tensor, mask: Tensor | None, layout: Layout) -> tuple[Tensor, Moments]:
    """z = x − μ of each map, and the maps' moments; the mean is corrected once."""
    dims = tuple(i for i, name in enumerate(layout.names) if name == "*")
    x = masked(accumulated(x), mask)
    size = members(x, dims, mask, None)
    count = divisor(size)
    rough = total(x, dims) / count
    z = masked(x - rough, mask)
    correction = total(z, dims) / count
    z = masked(z - correction, mask)
    variance = total(z * z, dims) / count
    if isinstance(size, Tensor):  # as everywhere: no valid member, deviation 1
        variance = variance.masked_fill(size == 0, 1)
    return z, Moments(rough + correction, variance, size)


def _merged(maps: Moments, dim: int) -> Moments:
    """Moments over an axis of maps: σ² = mean(σ²_map + (μ_map − μ)²), weighted by their sizes."""
    mean, variance, size = maps
    assert mean is not None
    assert variance is not None
    sizes = mean.new_tensor(size) if isinstance(size, int) else size
    sizes = sizes.expand(mean.shape)
    whole = total(sizes, (dim,))
    weights = sizes / whole.clamp(min=1)
    middle = total(weights * mean, (dim,))
    # The mean once more, from differences.
    middle = middle + total(weights * (mean - middle), (dim,))
    return Moments(middle, total(weights * (variance + (mean - middle) ** 2), (dim,)), whole)


def _parts(
    over: Sequence[Over], instance: Moments, channels: int, batch: Moments | None
) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance of each part; `batch` where it is not to be taken from the maps."""
    parts = []
    for name in over:
        given = instance
        if name == "layer":
            given = _merged(instance, channels)
        elif name == "batch":
            given = _merged(instance, 0) if batch is None else batch
        assert given.mean is not None
        assert given.moment is not None
        parts.append((given.mean, given.moment))
    return parts


def _line(
    parts: Sequence[tuple[Tensor, Tensor]], instance: Moments, eps: Tensor | float,
    mean_weight: Tensor, var_weight: Tensor, weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scale and offset with y = (x − μ_instance)·scale + offset."""
    means, variances = zip(*parts, strict=True)
    # x − Σw·μ = z + Σw·(μ_instance − μ): differences, which do not lose a large mean's digits.
    shift = _mixture(mean_weight, [instance.mean - mean for mean in means])
    scale = (_mixture(var_weight, variances) + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    offset = shift * scale
    return scale, offset if bias is None else offset + bias


def _detached(given: Moments) -> Moments:
    mean, variance, size = given
    assert mean is not None
    assert variance is not None
    return Moments(mean.detach(), variance.detach(), size)


def _mixture(logits: Tensor, values: Sequence[Tensor]) -> Tensor:
    weights = accumulated(logits).softmax(0)
    mixed = weights[0].to(values[0].dtype) * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        mixed = mixed + weight.to(value.dtype) * value
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
    pattern="mixture of (n c) (*), n (c *) and c (n *)",
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
