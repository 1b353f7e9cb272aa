"""Independent components: the IC layer (1905.05928)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from normlab.claims.claim import Claim, Paper, Scale
from normlab.claims.protocols import Compared, Measured
from normlab.claims.rules import Exact, Greater
from normlab.diagnostics import dependence

PAPER = Paper(
    "ic",
    "Rethinking the Usage of Batch Normalization and Dropout in the Training of Deep Neural "
    "Networks",
    "Chen et al.",
    2019,
    "1905.05928",
)
_KEEP = 0.95


def _joint(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random joint distribution of two units with three values each, none of them 0."""
    draw = torch.Generator().manual_seed(seed)
    joint = torch.rand(3, 3, generator=draw, dtype=torch.float64)
    joint = joint + joint.T  # equal marginals
    values = torch.randn(3, generator=draw, dtype=torch.float64)
    marginal = joint.sum(1) / joint.sum()
    return joint / joint.sum(), values - (marginal * values).sum()  # mean 0, as normalized


def _information(scale: Scale, seed: int) -> Mapping[str, float]:
    joint, values = _joint(seed)
    after = dependence.gated(joint, values, values, _KEEP)
    before = dependence.discrete_information(joint)
    return {"ratio": dependence.discrete_information(after) / before / _KEEP**2}


def _correlation(scale: Scale, seed: int) -> Mapping[str, float]:
    joint, values = _joint(seed)

    def corr(p: torch.Tensor, v: torch.Tensor) -> float:
        return float((v[:, None] * v * p).sum() / (p.sum(1) * v**2).sum())  # means are 0

    after = dependence.gated(joint, values, values, _KEEP)
    atoms = torch.cat([torch.zeros(1, dtype=torch.float64), values])
    return {"ratio": corr(after, atoms) / corr(joint, values) / _KEEP}


_ENUMERATION = "random joint distributions of two units with three values, enumerated"
_TRAINED = Compared(
    "fashion-mini-ic",
    lambda arms: {"gain": arms("ic", "b64-n64-iid") - arms("batch", "b64-n64-iid")},
)

CLAIMS = [
    Claim(
        "information", PAPER,
        "Independent gates that keep a unit with probability p shrink the mutual information of "
        "two units by p².",
        "a theorem", "none",
        Measured(_information, {"smoke": 3, "cpu": 50}, {"smoke": _ENUMERATION,
                                                         "cpu": _ENUMERATION}),
        Exact("ratio", 1e-9, expected=1.0, because="float64 sums of nine terms"),
        note="exact where no unit is 0 before the gate; with such an atom it is a bound",
    ),
    Claim(
        "correlation", PAPER,
        "Independent gates that keep a unit with probability p shrink the correlation of two units "
        "by p.",
        "a theorem", "none",
        Measured(_correlation, {"smoke": 3, "cpu": 50}, {"smoke": _ENUMERATION,
                                                         "cpu": _ENUMERATION}),
        Exact("ratio", 1e-9, expected=1.0, because="float64 sums of nine terms"),
        note="exact for units of mean 0, as batch normalization without β gives them",
    ),
    Claim(
        "limit", PAPER,
        "With IC layers before the weights a residual network ends better than with batch "
        "normalization behind them.",
        "consistently higher accuracy; no numbers reached",
        "CIFAR-10, CIFAR-100 and ILSVRC2012; networks and schedule not read",
        _TRAINED, Greater("gain", unit="percentage points"),
        note="two epochs say little of a limit",
    ),
]  # fmt: skip
