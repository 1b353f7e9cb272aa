"""EvoNorm-B0, a normalization with its activation (Liu et al. 2020, arXiv 2004.02967)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from normlab.activations.evonorm_s0 import (
    EvoNorm,
    check_activation,
    finished,
    linear,
    options_shown,
    parameters,
    reset,
    spread,
)
from normlab.core.card import Card, invariances
from normlab.core.checks import check_channels, check_input, refuse_single
from normlab.core.operation import Scale
from normlab.core.partition import Layout, partition
from normlab.core.statistics import Current, Running
from normlab.core.stored import StoringLayer
from normlab.kernels.cpu import maps
from normlab.kernels.recompute import recomputed
from normlab.kernels.reference import Moments, accumulated, deviation, masked, moments


class EvoNormB0(StoringLayer):
    """y = γ·x/max(√(σ²_c + ε), v·x + √(σ²_nc + ε)) + β, v learned per channel.

    σ²_c is the variance of a channel over the batch, in evaluation its running average; σ²_nc is
    the variance over the positions of one sample, always that of the input, and 0 where there is
    one position. All three are biased, in the running average too. It contains its nonlinearity,
    so that no activation follows it. Source: Liu, Brock, Simonyan & Le 2020, arXiv 2004.02967.

    Args:
        num_channels: C.
        eps: ε.
        momentum: Weight of the newest batch; None for the average of all batches.
        affine: Whether there are γ and β.
        bessel: Correct σ²_nc, and only it, by m/(m − 1), as the code of 2106.05956 does; the
            authors' code does not.
        activation: ``"evonorm"``, or None for the form without the nonlinearity, which in the
            authors' code is γ·x + β, without any normalization or statistics.
        channel_dim: 1, or −1 for (…, C).

    Shape:
        (N, C, *) → (N, C, *), N·positions ≥ 2 in training.

    Raises:
        ValueError: If a batch has one element a channel in training, or an option is out of range.

    Example:
        >>> EvoNormB0(8)
        EvoNormB0(8, n c * -> c (n *), eps=1e-05, momentum=0.1)
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    v: nn.Parameter | None

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        bessel: bool = False,
        activation: EvoNorm | None = "evonorm",
        channel_dim: int = 1,
    ) -> None:
        super().__init__()
        check_channels(num_channels, channel_dim)
        check_activation(activation)
        self.num_channels, self.channel_dim, self.bessel = num_channels, channel_dim, bessel
        self.activation: EvoNorm | None = activation
        self.partition = partition("n c * -> c (n *)")
        self.operation = Scale(eps=eps, about="mean")
        running = Running(momentum, bessel=False)
        self.statistics = running if activation else Current()
        self.eps_learned = None
        self.weight, self.bias, self.v = parameters(num_channels, affine, activation)
        self._register_stored(num_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set parameters and stored statistics to their initial values."""
        reset(self)
        self.reset_running_stats()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize and activate x; see the class."""
        check_input(self, x, mask, self.num_channels, self.channel_dim)
        if x.numel() == 0:  # nothing to average; parameters stay in the graph, with gradient 0
            return x + 0 * sum((p.sum() for p in self.parameters()), x.new_zeros(()))
        plain = linear(self, x, mask)
        if plain is not None:
            return plain
        layout = self.partition.bind(x.shape, channel_dim=self.channel_dim)
        if self.v is not None and maps.supports(x, (self.weight, self.bias, self.v), mask):
            return self._compiled(x, layout, self.v)
        where = None if mask is None else layout.per_position(mask)
        stored = self._batch(x, where, layout) if self.v is not None else None
        weight, bias, v = (
            None if p is None else layout.per_channel(p) for p in (self.weight, self.bias, self.v)
        )
        dims, operation, bessel = layout.member_dims, self.operation, self.bessel
        eps, positions = float(self.eps), tuple(d for d in dims if d != 0)

        def formula(
            x: Tensor, v: Tensor | None, weight: Tensor | None, bias: Tensor | None,
            stored: Tensor | None, mask: Tensor | None,
        ) -> Tensor:  # fmt: skip
            y = masked(accumulated(x), mask)
            if v is not None:
                variance = moments(x, dims, operation, mask).moment if stored is None else stored
                assert variance is not None
                batch = deviation(variance, operation, eps)
                own = moments(x, positions, operation, mask)
                y = y / torch.maximum(batch, v * y + spread(own, operation, eps, bessel))
            return finished(y, weight, bias, mask).to(x.dtype)

        return recomputed(formula, x, v, weight, bias, stored, where)

    def _compiled(self, x: Tensor, layout: Layout, v: Tensor) -> Tensor:
        """The same by compiled kernels, which measure maps; σ²_c follows from these."""
        stored = self._stored(layout)
        stored = None if stored is None else stored.reshape(1, -1)
        self._check(layout)
        operation, eps, bessel = self.operation, float(self.eps), self.bessel
        own = maps.MAPS.bind(x.shape, channel_dim=self.channel_dim)
        correction = own.members / max(own.members - 1, 1) if bessel else 1.0

        def middle(
            mean: Tensor, variance: Tensor, v: Tensor, weight: Tensor | None, bias: Tensor | None
        ) -> tuple[Tensor, ...]:
            moment = maps.merged(mean, variance, 0)[1] if stored is None else stored
            a = v.new_ones(()) if weight is None else weight
            b = v.new_zeros(()) if bias is None else bias
            spread_own = spread(Moments(None, variance, own.members), operation, eps, bessel)
            return a, b, v, deviation(moment, operation, eps), spread_own

        known = maps.Known(
            eps,
            correction=correction,
            stored=None if stored is None else (None, stored),
            measures=self._measures,
        )
        y, *moments, channels = maps.fused(
            "larger", x, own, middle, v, self.weight, self.bias, known=known
        )
        if self._measures:
            batch = channels or maps.merged(moments[0], moments[1], 0)
            mean, moment = (layout.from_stored(t.view(-1)) for t in batch)
            self._maybe_update([(layout, Moments(mean, moment, layout.members))])
        return y

    def _stored(self, layout: Layout) -> Tensor | None:
        """The stored variance where it is to be used, as it is before this forward pass."""
        if not self._uses_stored:
            return None
        moment = self._from_stored(layout, self.eps)[0].moment
        assert moment is not None
        return moment

    def _check(self, layout: Layout) -> None:
        """Refuse a batch that has no variance."""
        if self._measures and layout.members == 1:
            refuse_single(self, layout.shape, "evonorm_s0, group", "their variance is 0")

    def _batch(self, x: Tensor, mask: Tensor | None, layout: Layout) -> Tensor | None:
        """Update the stored variance as told; return it where it is to be used."""
        stored = self._stored(layout)
        self._check(layout)
        if self._measures:
            with torch.no_grad():
                given: Moments = moments(x.detach(), layout.member_dims, self.operation, mask)
            self._maybe_update([(layout, given)])
        return stored

    def extra_repr(self) -> str:
        """Print the pattern in force and the options."""
        shown = f"{self.num_channels}, {self.partition}, eps={self.eps}"
        if self.stored_names:
            shown += f", momentum={getattr(self.statistics, 'momentum', None)}"
        policies = {"use": self._use, "update": self._update}
        shown += "".join(f", {k}={v}" for k, v in policies.items() if v != "auto")
        return shown + options_shown(self)


def reference(x: Tensor, parameters: Mapping[str, Tensor], *, eps: float = 1e-5) -> Tensor:
    """The formula, channel by channel, with the maximum as a choice."""
    columns = []
    for c in range(x.shape[1]):
        rows = x[:, c].reshape(x.shape[0], -1)
        batch = ((rows - rows.mean()) ** 2).mean() + eps
        own = ((rows - rows.mean(1, keepdim=True)) ** 2).mean(1, keepdim=True) + eps
        line = parameters["v"][c] * rows + own**0.5
        y = rows / torch.where(line > batch**0.5, line, batch**0.5)
        y = y * parameters["weight"][c] + parameters["bias"][c]
        columns.append(y.reshape(x[:, c].shape))
    return torch.stack(columns, 1)


CARD = Card(
    name="evonorm_b0",
    title="EvoNorm-B0",
    authors="Liu, Brock, Simonyan & Le",
    year=2020,
    arxiv="2004.02967",
    site="activation",
    formula="y = γ·x/max(√(σ²_c + ε), v·x + √(σ²_nc + ε)) + β",
    pattern="n c * -> c (n *)",
    operation="scale by the larger of the batch's deviation and a line in x",
    statistics="batch in training, running averages in evaluation; of the input for σ²_nc",
    recovery="affine per channel",
    layer=EvoNormB0,
    reference=reference,
    declared=invariances("channel", "scale"),
    batch_of_one="error",
    limits=(
        "replaces the activation as well; without it (activation=None) nothing is normalized",
        "the linear form as γ·x + β is that of a copy of the authors' code",
        "training and evaluation compute different functions",
        "on maps of one position σ²_nc is 0, and the second branch v·x + √ε",
    ),
    use_when="Convolutional networks with large batches, normalization and activation in one.",
    avoid_when="Batches are tiny, or the activation must stay what it is.",
    source="code",
)
