"""Batch Kalman normalization (1802.03133)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from normlab.claims.claim import Claim, Paper, Scale
from normlab.claims.protocols import Compared, Measured
from normlab.claims.rules import Exact, Greater

PAPER = Paper(
    "kalman",
    "Batch Kalman Normalization: Towards Training Deep Neural Networks with Micro-Batches",
    "Wang, Peng, Luo, Wang & Lin",
    2018,
    "1802.03133",
)
_POINTS = "percentage points"


def _mixture(scale: Scale, seed: int) -> Mapping[str, float]:
    """The update against moments of a mixture of two discrete distributions, by enumeration."""
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 7, generator=draw, dtype=torch.float64).unbind()
    p = float(torch.rand((), generator=draw))
    m = p * a.mean() + (1 - p) * b.mean()
    v = p * a.var(correction=0) + (1 - p) * b.var(correction=0)
    v = v + p * (1 - p) * (a.mean() - b.mean()) ** 2
    values = torch.cat([a, b])
    weights = torch.cat([torch.full_like(a, p / 7), torch.full_like(b, (1 - p) / 7)])
    mean = (weights * values).sum()
    variance = (weights * (values - mean) ** 2).sum()
    return {"distance": float(max((m - mean).abs(), (v - variance).abs()))}


def _gain(composition: str) -> Compared:
    condition = f"b64-n4-{composition}"
    return Compared(
        "fashion-mini-micro",
        lambda arms: {"gain": arms("kalman_batch", condition) - arms("batch", condition)},
    )


_SIZE = "mixtures of two distributions of seven values, enumerated"
CLAIMS = [
    Claim(
        "mixture", PAPER,
        "The update of mean and variance is that of a mixture of prediction and observation.",
        "equations of the method", "none",
        Measured(_mixture, {"smoke": 2, "cpu": 20}, {"smoke": _SIZE, "cpu": _SIZE}),
        Exact("distance", 1e-12, because="float64 sums of 14 terms"),
        note="a reviewer's objection that this is no optimal filter stands beside it",
    ),
    Claim(
        "micro-batch", PAPER,
        "With four samples it ends better than batch normalization.",
        "76.1 % top-1, 3.4 points more", "ResNet-50, ImageNet, batches of 4",
        _gain("iid"), Greater("gain", unit=_POINTS),
        note="one epoch of a small network with large maps, for which four samples suffice",
    ),
    Claim(
        "of-one-class", PAPER,
        "Statistics of earlier layers help where those of the batch mislead.",
        "not reported", "none",
        _gain("class"), Greater("gain", unit=_POINTS),
        note="four samples of one class: our condition, not the paper's",
    ),
]  # fmt: skip
