"""TaskNorm (Bronskill, Gordon, Requeima, Nowozin & Turner 2020, arXiv 2003.03284)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

import torch
from torch import Tensor

from normlab.activations._lines import Line, LineNorm, Maps, Parameters, affine, merged
from normlab.core.card import Card, invariances
from normlab.core.operation import Operation
from normlab.core.recovery import Affine
from normlab.core.statistics import Running
from normlab.kernels.hold import copied
from normlab.kernels.reference import Moments, counted

Over = Literal["instance", "layer"]


@dataclass(frozen=True)
class _OfContext(Running):
    """The moments of the last context set, and how many samples it had."""

    def names(self, operation: Operation) -> tuple[str, ...]:
        return "running_mean", "running_var", "context_size"


class TaskNorm(LineNorm):
    """y = γ·(x − μ)/√(σ² + ε) + β, moments of a context set mixed with the sample's own.

    With μ_B and σ²_B the moments of the context set over samples and positions, μ_+ and σ²_+ those
    of the instance (TaskNorm-I) or the layer (TaskNorm-L), and D samples in the context set,

        α = sigmoid(size_scale·D + size_offset),  μ = α·μ_B + (1 − α)·μ_+,
        σ² = α·(σ²_B + (μ_B − μ)²) + (1 − α)·(σ²_+ + (μ_+ − μ)²).

    In training the batch is the context set, whose moments and size are stored; evaluation
    normalizes targets with those of the last one, so that a target's result does not depend on
    other targets. ``layer(x, context=D)`` takes the first D samples as the context set, and the
    others as its targets: gradients then flow from targets to context, as meta-training has it.
    Source: Bronskill, Gordon, Requeima, Nowozin & Turner 2020, arXiv 2003.03284; the authors' code
    has unbiased variances.

    Args:
        num_channels: C.
        over: μ_+ and σ²_+ are of the ``"instance"`` or the ``"layer"``.
        eps: ε.
        momentum: Weight of the newest context set in what is stored; 1 keeps the last one alone.
        affine: Whether there are γ and β.
        channel_dim: 1, or −1 for (…, C).

    Shape:
        (N, C, *) → (N, C, *); the context set has D·positions ≥ 2 in training.

    Raises:
        ValueError: If `over` is another word, or D is not in [1, N].

    Example:
        >>> layer = TaskNorm(8)
        >>> layer(torch.randn(12, 8, 5), context=4).shape, int(layer.context_size[0])
        (torch.Size([12, 8, 5]), 4)
    """

    shown: ClassVar = ("over",)

    def __init__(
        self,
        num_channels: int,
        over: Over = "instance",
        eps: float = 1e-5,
        momentum: float = 1.0,
        affine: bool = True,
        *,
        channel_dim: int = 1,
    ) -> None:
        if over not in get_args(Over):
            raise ValueError(f"over is 'instance' or 'layer'; received {over!r}")
        context = _OfContext(momentum, bessel=False)
        super().__init__(num_channels, eps, context, Affine(affine, affine), channel_dim)
        self.over = over
        self._add(size_scale=0.0, size_offset=0.0)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, context: int | None = None
    ) -> Tensor:
        """Normalize x; see the class."""
        if context is not None and not 1 <= context <= len(x):
            raise ValueError(
                f"context is the number of samples in the context set, in [1, {len(x)}] for an "
                f"input of shape {tuple(x.shape)}; received {context}"
            )
        return self._lines(x, mask, context)

    @property
    def _least(self) -> int:
        return 1  # sample: the sizes here are numbers of samples

    def _used(self) -> Parameters:
        return self.size_scale, self.size_offset, self.weight, self.bias

    def _batch(self, maps: Maps, parameters: Parameters, given: int | None) -> Maps:
        mean, variance, size = maps
        count = mean.shape[0] if given is None else given
        size = size if isinstance(size, int) else size[:count]
        return merged(Maps(mean[:count], variance[:count], size), 0)._replace(size=count)

    def _to_store(self, given: Moments) -> dict[str, Tensor]:
        values = super()._to_store(given._replace(size=2))
        size = counted(given.size, values["running_mean"])
        return {**values, "context_size": size.expand(values["running_mean"].shape)}

    def _stored(self) -> Maps:
        return super()._stored()._replace(size=copied(cast(Tensor, self.context_size)))

    def _line(
        self, maps: Maps, parameters: Parameters, stored: Maps | None, given: int | None
    ) -> Line:
        size_scale, size_offset, weight, bias = parameters
        context = self._batch(maps, parameters, given) if stored is None else stored
        alpha = torch.sigmoid(size_scale * context.size + size_offset)
        own = merged(maps, 1) if self.over == "layer" else maps
        apart = own.mean - context.mean
        # Both squares at once: α·(1 − α)²·d² + (1 − α)·α²·d² = α·(1 − α)·d².
        spread = alpha * (1 - alpha) * apart**2
        variance = alpha * context.variance + (1 - alpha) * own.variance + spread
        a = (variance + self.eps).rsqrt()
        shift = (maps.mean - own.mean) + alpha * apart
        return affine(a, shift * a, weight, bias)


def reference(x: Tensor, parameters: Mapping[str, Tensor], *, eps: float = 1e-5) -> Tensor:
    """TaskNorm-I with the whole batch as context set, square by square."""
    maps = x.reshape(*x.shape[:2], -1)
    alpha = 1 / (1 + torch.exp(-parameters["size_scale"] * len(x) - parameters["size_offset"]))
    means = [maps.mean(dims, keepdim=True) for dims in ((0, 2), (2,))]
    squares = [((maps - m) ** 2).mean(d, keepdim=True) for m, d in zip(means, ((0, 2), (2,)),
                                                                       strict=True)]  # fmt: skip
    mean = alpha * means[0] + (1 - alpha) * means[1]
    variance = alpha * (squares[0] + (means[0] - mean) ** 2)
    variance = variance + (1 - alpha) * (squares[1] + (means[1] - mean) ** 2)
    y = (maps - mean) / (variance + eps) ** 0.5
    return (parameters["weight"][:, None] * y + parameters["bias"][:, None]).reshape(x.shape)


CARD = Card(
    name="task",
    title="TaskNorm",
    authors="Bronskill, Gordon, Requeima, Nowozin & Turner",
    year=2020,
    arxiv="2003.03284",
    site="activation",
    formula="y = γ·(x − μ)/√(σ² + ε) + β, moments of the mixture of context (α) and instance, "
    "α = sigmoid(scale·D + offset)",
    pattern="mixture of n c * -> c (n *) and n c * -> (n c) (*)",
    operation="standardize by mixed means and variances",
    statistics="of maps always; of the context set in training, of the last one in evaluation",
    recovery="affine per channel",
    layer=TaskNorm,
    reference=reference,
    declared=invariances("channel"),
    batch_of_one="error",
    limits=(
        "evaluation is that of the last training batch: momentum < 1 averages over batches, which "
        "is not the paper's",
        "over='layer' is invariant to scale and shift of the whole tensor alone",
        "a network has to pass the size of the context set on: a plain nn.Sequential does not",
    ),
    use_when="Few-shot learning, where a task comes with a context set of its own.",
    avoid_when="There are no tasks: the last batch is a poor estimate of the population.",
    source="code",
    advice="In the forward pass over a task, put its context set first and give context=D. The "
    "gradient of size_scale grows with D: give it a small learning rate.",
)
