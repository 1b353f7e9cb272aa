"""Batch normalization preconditioning (Lange, Helfrich & Ye 2022, arXiv 2108.01110)."""

from __future__ import annotations

from collections.abc import Set
from math import prod
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from normlab.core.card import Card
from normlab.gradients.inputs import InputStatistics, Reduce
from normlab.gradients.layers import Layer, layers_to_take
from normlab.gradients.transform import Transform
from normlab.gradients.units import Skip


class NormalizationPreconditioning(Transform):
    """∇ ← P Pᵀ∇ for the weights and bias of each layer, as if its inputs were normalized.

    With the mean μ_j and the variance σ_j² of the layer's input channels j,

    - μ ← ρμ + (1 − ρ)μ_B and σ² ← ρσ² + (1 − ρ)(σ²_B + ρ(μ_B − μ)²), from 0 and 1, once per step
      (`rho`), with the batch's mean and biased variance over samples and positions, and the old μ:
      the variance of all samples, each weighted by its age. Without the last term
      (``variance="within"``, as it is usually written) it goes to 0 where a batch is one sample;
    - σ̃² = σ² + ε1·max_j σ_j² + ε2 (`eps1`, `eps2`) and q² = max(n_in/N, 1);
    - G_W[i, j] ← (G_W[i, j] − μ_j G_b[i])/(q²σ̃_j²),
      G_b[i] ← G_b[i]/q² − Σ_j G_W[i, j] μ_j with the new G_W.

    This is P = U D/q with U = [[1, −μᵀ], [0, I]], D = diag(1, 1/σ̃), for unit i's [b_i; w_i]. In
    convolutions all taps of a channel share μ_c and σ_c, and n_in = c_in·Πk; with groups, a unit's
    channels are those of its group. There is no normalization layer, in training or evaluation.

    Only forward passes in training mode count, and only those whose output receives a gradient;
    all passes between two steps are one batch (accumulation, a layer used twice), and
    recomputation by activation checkpointing does not count again. (In a compiled model a pass
    counts without waiting for its gradient.) Before the first such batch, and where a gradient is
    not finite, gradients stay as they are. Source: Lange, Helfrich & Ye
    2022, arXiv 2108.01110; constants and q² are unverified, hence options.

    Args:
        model: Its dense and convolutional layers (not transposed ones) are acted on.
        rho: ρ.
        eps1: ε1.
        eps2: ε2.
        scale: q²: ``"inputs"`` for max(n_in/N, 1), or 1.0, or any other positive number.
        count: N: ``"samples"``, or ``"positions"`` for samples times positions.
        variance: ``"total"``, or ``"within"`` for the mean of the batches' own variances.
        bias: What to do about a layer without a bias: ``"error"``, or ``"skip"`` it.
        skip: What to leave out: names of parameters or modules, with ``*`` for anything, or a
            function (name, parameter) → bool. A layer is left out with its weight or its bias.
        reduce: `AllReduce()` shares statistics between processes, which need equal ones.

    Raises:
        ValueError: If a layer has no bias or no shape yet, or parametrized or shared tensors, or if
            an option is out of its range.

    Example:
        >>> import normlab as nl
        >>> model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> nl.gradient("preconditioning", model).attach(optimizer)
        NormalizationPreconditioning(2 layers, rho=0.99, eps1=0.01, eps2=0.0001)
    """

    def __init__(
        self,
        model: nn.Module,
        rho: float = 0.99,
        eps1: float = 1e-2,
        eps2: float = 1e-4,
        *,
        scale: Literal["inputs"] | float = "inputs",
        count: Literal["samples", "positions"] = "samples",
        variance: Literal["total", "within"] = "total",
        bias: Literal["error", "skip"] = "error",
        skip: Skip = (),
        reduce: Reduce | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= rho <= 1 or eps1 < 0 or eps2 < 0:
            raise ValueError(
                f"rho is in [0, 1], eps1 and eps2 at least 0; received {rho}, {eps1}, {eps2}"
            )
        if scale != "inputs" and not (isinstance(scale, (int, float)) and scale > 0):
            raise ValueError(f"scale is 'inputs' or a number above 0; received {scale!r}")
        if count not in ("samples", "positions") or bias not in ("error", "skip"):
            raise ValueError(
                "count is 'samples' or 'positions', bias 'error' or 'skip'; "
                f"received {count!r} and {bias!r}"
            )
        if variance not in ("total", "within"):
            raise ValueError(f"variance is 'total' or 'within'; received {variance!r}")
        self.between = variance == "total"
        self.rho, self.eps1, self.eps2, self.scale = rho, eps1, eps2, scale
        self.count, self.reduce = count, reduce
        self.layers = layers_to_take(model, skip, bias)
        self.inputs = {name: InputStatistics(layer) for name, layer in self.layers.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Weights and biases, by name."""
        named = [(f"{n}." if n else "", layer) for n, layer in self.layers.items()]
        weights = {f"{n}weight": cast(nn.Parameter, layer.weight) for n, layer in named}
        return weights | {f"{n}bias": cast(nn.Parameter, layer.bias) for n, layer in named}

    def watch(self) -> list[RemovableHandle]:
        """Gather statistics from the layers' forward passes."""
        return [self.inputs[name].watch(layer) for name, layer in self.layers.items()]

    def rewrite(self, held: Set[int]) -> None:
        """Fold the pending batch in, then multiply by P Pᵀ."""
        for name, layer in self.layers.items():
            statistics = self.inputs[name]
            statistics.fold(self.rho, self.reduce, self.between)
            weight, bias = layer.weight.grad, layer.bias.grad if layer.bias is not None else None
            if weight is None or bias is None or weight.is_sparse:
                continue
            if id(layer.weight) in held and id(layer.bias) in held:
                self._precondition(layer, weight, bias, statistics)

    def _precondition(
        self, layer: Layer, weight: Tensor, bias: Tensor, inputs: InputStatistics
    ) -> None:
        """The two lines of the formula, on (groups, units, channels, taps)."""
        groups = layer.groups if isinstance(layer, _ConvNd) else 1
        dtype = inputs.mean.dtype
        g_w = weight.to(dtype).reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        g_b = bias.to(dtype).reshape(groups, -1, 1, 1)
        mean = inputs.mean.reshape(groups, 1, -1, 1)
        variance = inputs.variance.reshape(groups, 1, -1, 1)
        variance = variance + self.eps1 * variance.amax(2, keepdim=True) + self.eps2
        q2 = self._q2(prod(weight.shape[1:]), inputs)
        new_w = (g_w - mean * g_b) / (q2 * variance)
        new_b = g_b / q2 - (new_w * mean).sum((2, 3), keepdim=True)
        finite = weight.isfinite().all() & bias.isfinite().all() & (inputs.rows > 0)
        for old, new in ((weight, new_w), (bias, new_b)):
            old.copy_(torch.where(finite, new.reshape(old.shape).to(old.dtype), old))

    def _q2(self, n_in: int, inputs: InputStatistics) -> Tensor | float:
        """q²."""
        if not isinstance(self.scale, str):
            return self.scale
        n = inputs.samples if self.count == "samples" else inputs.rows
        return (n_in / n.clamp(min=1)).clamp(min=1)

    def state_dict(self) -> dict[str, Any]:
        """A copy of the statistics, by layer."""
        return {name: inputs.state_dict() for name, inputs in self.inputs.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over statistics.

        Raises:
            ValueError: If they are of other layers.
        """
        if state.keys() != self.inputs.keys():
            raise ValueError(
                f"the state is of layers {sorted(state)}; {self} has {sorted(self.inputs)}"
            )
        for name, inputs in self.inputs.items():
            inputs.load_state_dict(state[name], name)

    def __repr__(self) -> str:
        options = f"rho={self.rho}, eps1={self.eps1}, eps2={self.eps2}"
        return f"{type(self).__name__}({len(self.layers)} layers, {options})"


def reference(
    gradient: Tensor,
    weight: Tensor,
    *,
    mean: Tensor,
    variance: Tensor,
    samples: int,
    eps1: float = 1e-2,
    eps2: float = 1e-4,
) -> Tensor:
    """P Pᵀ∇ with P as a dense matrix; a row is [G_b, G_W] of one unit of a dense layer."""
    n = len(mean)
    deviation = (variance + eps1 * variance.max() + eps2) ** 0.5
    u = torch.eye(n + 1, dtype=gradient.dtype)
    u[0, 1:] = -mean
    d = torch.diag(torch.cat([deviation.new_ones(1), 1 / deviation]))
    p = u @ d / max(n / samples, 1) ** 0.5
    out: Tensor = gradient @ (p @ p.T)
    return out


CARD = Card(
    name="preconditioning",
    title="Batch normalization preconditioning (BNP)",
    authors="Lange, Helfrich & Ye",
    year=2021,
    arxiv="2108.01110",
    site="gradient",
    formula="∇ ← P Pᵀ∇, P = U D/q, U = [[1, −μᵀ], [0, I]], D = diag(1, 1/σ̃)",
    pattern="one area per input channel of a layer",
    operation="the gradient step of standardized inputs",
    statistics="running averages of the inputs' batch statistics",
    recovery="none",
    layer=NormalizationPreconditioning,
    reference=reference,
    limits=(
        "every layer needs a bias; parametrized, shared and transposed layers are not taken",
        "inexact at zero-padded borders of convolutions",
        "Adam cancels most of the diagonal scaling",
        "ρ, ε1, ε2 and q² come from no text or code at hand; nor whether N counts a convolution's "
        "positions",
    ),
    use_when="The network should train as with batch normalization, but at any batch size and "
    "with no layer in the forward pass.",
    avoid_when="Layers are followed by normalization (they then lack biases), or with Adam.",
    source="unverified",
    advice="Attach it before the first forward pass; plain SGD, with or without momentum.",
)
