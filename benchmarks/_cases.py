"""What is held against what: methods and options, torch's layers for the same job, targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import normlab as nl
from normlab.activations._areas import default_groups
from normlab.core.card import Card

Build = Callable[[], nn.Module]
# Beside each method with its default options. The name is the row's.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "batch+relu": ("batch", {"activation": "relu"}),
    "group+silu": ("group", {"activation": "silu"}),
    "rms/position": ("rms", {"over": "position"}),
    "batch+add+relu": ("batch", {"activation": "relu"}),
    "group+add+silu": ("group", {"activation": "silu"}),
}
ADDED = ("batch+add+relu", "group+add+silu")  # with a residual
LAST = ("layer", "rms", "dyt")  # the methods of transformers, measured on (N, L, C)
# Forward and backward together in multiples of the floor.
TARGETS = {
    **dict.fromkeys(("filter_response", "rms", "rms/position", "instance", "variance"), 1.3),
    **dict.fromkeys(("batch", "batch_renorm", "ghost_batch", "group", "layer", "position"), 1.6),
    **dict.fromkeys(("batch+relu", "group+silu"), 1.6),
    **dict.fromkeys(("evonorm_s0", "evonorm_b0"), 2.0),
}
SMALL_MAP, SMALL_TARGET = 14 * 14, 2.0  # short rows cost every method something
# What `--compile` compiles where it is given no names.
COMPILED = (*TARGETS, "l1_batch", "lp_batch", "switchable")


class Permuted(nn.Module):
    """A layer for (…, C), on (N, C, H, W): how torch normalizes over channels at each position."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x.permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)


class Added(nn.Module):
    """A layer with a residual, which is a parameter, so that its gradient is taken too.

    Made at the first call, in the order of memory of the input.
    """

    def __init__(self, inner: nn.Module, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.activation = inner, activation
        self.register_parameter("residual", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.residual is None:
            self.residual = nn.Parameter(torch.cos(x.detach()))
        y: Tensor
        if self.activation is None:
            y = self.inner(x, residual=self.residual)
        else:
            y = self.activation(self.inner(x) + self.residual)
        return y


# What torch's own layer does not implement on a CPU.
NO_NATIVE = {("local_response", "bfloat16")}


@dataclass(frozen=True)
class Case:
    """A method under options: one row of a table for each of its variants.

    Attributes:
        name: Name of the row, that of the method where the options are the default ones.
        card: The method.
        options: Options that are not the default ones.
    """

    name: str
    card: Card
    options: Mapping[str, Any] = field(default_factory=dict)

    def ours(self, channels: int, last: bool) -> Build:
        """Return the builder of normlab's layer."""

        def build() -> nn.Module:
            layer = self.card.make(channels, channel_dim=-1 if last else 1, **self.options)
            return Added(layer) if self.name in ADDED else layer

        return build

    @property
    def floor(self) -> tuple[float, float]:
        """Copies that a forward pass, and forward and backward, cannot do without.

        Read x and write y; read x and dy, write dx. A residual is read in both directions, by the
        backward pass for the activation, and its gradient is written.
        """
        return (1.5, 4.0) if self.name in ADDED else (1.0, 2.5)

    def native(self, sample: Sequence[int], last: bool, dtype: str) -> Build | None:
        """Return the builder of torch's own layers for the same job, or None where it has none.

        Args:
            sample: Lengths of x without the first.
            last: Whether channels are its last axis.
            dtype: Name of its dtype.
        """
        if (self.name, dtype) in NO_NATIVE:
            return None
        c = sample[-1] if last else sample[0]
        own: dict[str, Build] = {
            "none": nn.Identity,
            "layer": (lambda: nn.LayerNorm(c)) if last else (lambda: nn.GroupNorm(1, c)),
            # Over the sample, torch's weight has one element for each of the sample's.
            "rms": lambda: nn.RMSNorm(c if last else list(sample)),
            "rms/position": lambda: Permuted(nn.RMSNorm(c)),
            "group": lambda: nn.GroupNorm(default_groups(c), c),
            "group+silu": lambda: nn.Sequential(nn.GroupNorm(default_groups(c), c), nn.SiLU()),
            "batch+add+relu": lambda: Added(nn.BatchNorm2d(c), nn.ReLU()),
            "group+add+silu": lambda: Added(nn.GroupNorm(default_groups(c), c), nn.SiLU()),
            "position": lambda: Permuted(nn.LayerNorm(c)),
            "batch+relu": lambda: nn.Sequential(nn.BatchNorm2d(c), nn.ReLU()),
            "ic": lambda: nn.Sequential(
                nn.BatchNorm2d(c), nn.Dropout(self.card.options["dropout"])
            ),
        }
        if self.name in own:
            return own[self.name]
        twin = None if last or self.options else self.card.twin
        return None if twin is None else lambda: twin(c, len(sample) - 1)

    def target(self, positions: int, last: bool) -> float | None:
        """Return what forward and backward may cost in multiples of the floor; None: not set."""
        own = TARGETS.get(self.name)
        if own is None or last or positions > SMALL_MAP:
            return own
        return max(own, SMALL_TARGET)


def cases() -> dict[str, Case]:
    """All rows, in the catalogue's order, other options after the default ones."""
    known = nl.catalogue("activation")
    found = {}
    for name, card in known.items():
        found[name] = Case(name, card)
        for other, (method, options) in OPTIONS.items():
            if method == name:
                found[other] = Case(other, card, options)
    return found
