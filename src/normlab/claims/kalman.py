"""Batch Kalman normalization (1802.03133)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from normlab.claims.claim import Claim, Paper, Scale
from normlab.claims.protocols import Compared, Measured
from normlab.claims.rules import Exact, Greater
from normlab.core.link import link
from normlab.discovery import norm

PAPER = Paper(
    "kalman",
    "Batch Kalman Normalization: Towards Training Deep Neural Networks with Micro-Batches",
    "Wang, Peng, Luo, Wang & Lin",
    2018,
    "1802.03133",
)
_POINTS = "percentage points"


def _mixture(scale: Scale, seed: int) -> Mapping[str, float]:
    """The layer's statistics against moments of a mixture of two samples, by enumeration.

    With nothing between two layers the second predicts its input's moments by those of the
    first's, so that both parts of the mixture are at hand: with probability p a value that the
    first layer received, else one that it gave.
    """
    torch.manual_seed(seed)
    p = 0.1 + 0.8 * float(torch.rand(()))
    pair = [norm("kalman_batch", 3, prediction=p, momentum=1.0).double() for _ in range(2)]
    for parameter in pair[0].parameters():
        torch.nn.init.uniform_(parameter, 0.5, 2.0)
    x = torch.randn(7, 3, dtype=torch.float64) + 1
    network = torch.nn.Sequential(*pair)
    link(network, x)
    network(x)
    y = pair[0](x).detach()  # in training: what the second layer received
    values = torch.cat([x, y])
    weights = torch.cat([torch.full_like(x, p / 7), torch.full_like(y, (1 - p) / 7)])
    mean = (weights * values).sum(0)
    variance = (weights * (values - mean) ** 2).sum(0)
    found = [pair[1].get_buffer(name) for name in ("running_mean", "running_var")]
    return {"distance": max(float((found[0] - mean).abs().max()),
                            float((found[1] - variance).abs().max()))}  # fmt: skip


def _gain(composition: str) -> Compared:
    condition = f"b64-n4-{composition}"
    return Compared(
        "fashion-mini-micro",
        lambda arms: {"gain": arms("kalman_batch", condition) - arms("batch", condition)},
    )


_SIZE = "two layers in a row, three units, seven samples; the mixture enumerated"
CLAIMS = [
    Claim(
        "mixture", PAPER,
        "The update of mean and variance is that of a mixture of prediction and observation.",
        "equations of the method", "none",
        Measured(_mixture, {"smoke": 2, "cpu": 20}, {"smoke": _SIZE, "cpu": _SIZE}),
        Exact("distance", 1e-12, because="float64 sums of 14 terms"),
        version=2,
        note="what the layer stores, where version 1 held the formula against itself; a reviewer's "
        "objection that this is no optimal filter stands beside it",
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
