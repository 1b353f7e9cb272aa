"""Filter response normalization (1911.09737), and an independent reproduction of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from normlab.claims.claim import Claim, Paper, Scale
from normlab.claims.protocols import Arms, Compared, Measured
from normlab.claims.rules import Each, Equal, Exact, Greater
from normlab.discovery import norm

PAPER = Paper(
    "filter_response",
    "Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of Deep "
    "Neural Networks",
    "Singh & Krishnan",
    2019,
    "1911.09737",
)
_SIZE = "random batches of 8×3×5×5 in float64"


def _company(scale: Scale, seed: int) -> Mapping[str, float]:
    """How far a sample's output moves when the other samples change."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 3, 5, 5, generator=draw, dtype=torch.float64)
    layer = norm("filter_response", 3).double()
    alone = layer(x[:1])
    return {"distance": float((layer(x)[:1] - alone).abs().max().detach())}


def _orthogonal(scale: Scale, seed: int) -> Mapping[str, float]:
    """The cosine of input and gradient, per map, at ε = 0 and without a threshold."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 3, 5, 5, generator=draw, dtype=torch.float64).requires_grad_()
    layer = norm("filter_response", 3, eps=0.0, activation=None).double()
    dy = torch.randn(8, 3, 5, 5, generator=draw, dtype=torch.float64)
    (g,) = torch.autograd.grad(layer(x), x, dy)
    x = x.detach()
    dots = (g * x).sum((2, 3)) / (g.norm(dim=(2, 3)) * x.norm(dim=(2, 3)))
    return {"cosine": float(dots.abs().max())}


def _across(arms: Arms) -> Mapping[str, float]:
    """Accuracy at each size less that at 32."""
    base = arms("filter_response", "b64-n32-iid")
    return {f"at {n}": arms("filter_response", f"b64-n{n}-iid") - base for n in (8, 4, 2)}


def _against_batch(arms: Arms) -> Mapping[str, float]:
    condition = "b64-n32-iid"
    return {"gain": arms("filter_response", condition) - arms("batch", condition)}


def _at_one(arms: Arms) -> Mapping[str, float]:
    condition = "b64-n1-iid"
    return {"gain": arms("filter_response", condition) - arms("batch", condition)}


_POINTS = "percentage points"
CLAIMS = [
    Claim(
        "no-company", PAPER,
        "A sample's output does not depend on the other samples of its batch.",
        "by construction", "none",
        Measured(_company, {"smoke": 2, "cpu": 20}, {"smoke": _SIZE, "cpu": _SIZE}),
        Exact("distance", 1e-12, because="float64 sums in another order"),
    ),
    Claim(
        "orthogonal-gradient", PAPER,
        "Without ε the gradient at a map is orthogonal to the map.",
        "derived", "none",
        Measured(_orthogonal, {"smoke": 2, "cpu": 20}, {"smoke": _SIZE, "cpu": _SIZE}),
        Exact("cosine", 1e-12, because="float64 sums of 25 terms"),
    ),
    Claim(
        "batch-size", PAPER,
        "Accuracy does not depend on how many samples share statistics.",
        "77.21, 77.10, 77.16, 77.18, 77.33 and 77.36 % at 32 to 1 images a device",
        "ResNetV2-50, ImageNet",
        Compared("fashion-mini-filter-response", _across),
        Each(tuple(Equal(f"at {n}", 2.0, unit=_POINTS) for n in (8, 4, 2))),
        note="the function is the same at every size, so that what differs is rounding and its "
        "growth over one unfinished epoch",
    ),
    Claim(
        "beats-batch", PAPER,
        "At large batches it is better than batch normalization.",
        "77.21 % against 76.21 %", "ResNetV2-50, ImageNet, 300,000 steps, batch 256",
        Compared("fashion-mini-filter-response", _against_batch),
        Greater("gain", unit=_POINTS),
        note="one epoch ranks how fast networks start",
    ),
    Claim(
        "one-sample", PAPER,
        "With one sample a normalization batch it trains on where batch normalization breaks down.",
        "77.36 % against 1.58 %", "ResNetV2-50, ImageNet",
        Compared("fashion-mini-filter-response-one", _at_one),
        Greater("gain", unit=_POINTS),
    ),
    Claim(
        "parity", PAPER,
        "On a common baseline it is level with batch normalization, neither better nor worse.",
        "an independent reproduction: error 24.0 against 23.6 %, 23.2 against 23.0 %",
        "ResNet-50 (V1), ImageNet, 100 epochs",
        Compared("fashion-mini-filter-response", _against_batch),
        Equal("gain", 1.0, unit=_POINTS),
        note="the code of ppwwyyxx/FRN-on-common-ImageNet-baseline",
    ),
]  # fmt: skip
