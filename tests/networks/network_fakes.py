"""Small normalizers of every kind a network can meet, and a recorder of the order of calls."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class Batch(_BatchNorm):
    """Batch norm of any rank."""

    def _check_input_dim(self, input):
        pass


class Fused(Batch):
    """Normalizer with its own activation, max(y, τ)."""

    def __init__(self, channels, activation="tlu"):
        super().__init__(channels)
        self.activation = activation
        if activation is not None:
            self.threshold = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        y = super().forward(x)
        if self.activation is None:
            return y
        return torch.maximum(y, self.threshold.view(-1, *[1] * (x.ndim - 2)))


class Ic(Batch):
    """Batch norm and dropout, to stand before a weight layer."""

    placement = "before_weight"

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.05, self.training)


class IcConvRelu(Ic):
    placement = "ic-conv-relu"


class ConvReluIc(Ic):
    placement = "conv-relu-ic"


class Greedy(Batch):
    """Draws random numbers and holds weight layers of its own."""

    def __init__(self, channels):
        super().__init__(channels)
        self.gate = nn.Linear(channels, channels)
        self.mix = nn.Conv2d(channels, channels, 1)


FAKES: dict[str, Callable[..., nn.Module]] = {
    "batch": Batch,
    "none": nn.Identity,
    "shiftless": lambda channels: nn.GroupNorm(1, channels, affine=False),
    "fused": Fused,
    "before": Ic,
    "ic-conv-relu": IcConvRelu,
    "conv-relu-ic": ConvReluIc,
    "greedy": Greedy,
}

LETTERS = {
    nn.Conv2d: "conv",
    nn.Linear: "linear",
    nn.ReLU: "relu",
    nn.MaxPool2d: "max",
    nn.AdaptiveAvgPool2d: "mean",
    Batch: "norm",
    Fused: "fused",
    Ic: "ic",
    IcConvRelu: "ic",
    ConvReluIc: "ic",
}


def order(network: nn.Module, *shape: int) -> str:
    """Run a network and write down which layers were called, in order."""
    called: list[str] = []

    def record(layer, *_):
        name = LETTERS[type(layer)]
        bare = name == "fused" and layer.activation is None
        called.append("bare" if bare else name)

    for layer in network.modules():
        if type(layer) in LETTERS:
            layer.register_forward_pre_hook(record)
    network(torch.randn(2, *shape))
    return " ".join(called)
