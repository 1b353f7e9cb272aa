"""Batch Renormalization (1702.03275)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from normlab.claims.claim import Claim, Paper, Scale
from normlab.claims.protocols import Compared, Measured
from normlab.claims.rules import Exact, Greater
from normlab.discovery import norm

PAPER = Paper(
    "renorm",
    "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
    "Ioffe",
    2017,
    "1702.03275",
)
_SIZE = "random batches of 8×3×5×5 in float64"


def _batch(seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 5, 5, generator=draw, dtype=torch.float64) * 2 + 1


def _identity(scale: Scale, seed: int) -> Mapping[str, float]:
    """The distance of r = 1, d = 0 from batch normalization."""
    x = _batch(seed)
    renorm = norm("batch_renorm", 3, rmax=1.0, dmax=0.0).double()
    return {"distance": float((renorm(x) - norm("batch", 3).double()(x)).abs().max().detach())}


def _train_is_eval(scale: Scale, seed: int) -> Mapping[str, float]:
    """The distance of training from evaluation with the statistics from before the update."""
    renorm = norm("batch_renorm", 3, rmax=1e9, dmax=1e9).double()
    renorm(_batch(seed + 1000))  # some statistics
    renorm.eval()
    before = renorm(_batch(seed))
    return {"distance": float((renorm.train()(_batch(seed)) - before).abs().max().detach())}


def _micro(composition: str) -> Compared:
    condition = f"b64-n4-{composition}"
    return Compared(
        "fashion-mini-micro",
        lambda arms: {"gain": arms("batch_renorm", condition) - arms("batch", condition)},
    )


CLAIMS = [
    Claim(
        "identity", PAPER,
        "With r = 1 and d = 0 it is batch normalization.",
        "by definition", "none",
        Measured(_identity, {"smoke": 2, "cpu": 20}, {"smoke": _SIZE, "cpu": _SIZE}),
        Exact("distance", 1e-12, because="float64 sums in another order"),
    ),
    Claim(
        "train-is-eval", PAPER,
        "Without limits on r and d, activations in training are those of evaluation with the "
        "moving averages.",
        "the idea of the method", "none",
        Measured(_train_is_eval, {"smoke": 2, "cpu": 20}, {"smoke": _SIZE, "cpu": _SIZE}),
        Exact("distance", 1e-12, because="float64 sums in another order"),
        note="the averages are those from before the batch's own update; version 1 allowed 1e-6",
        version=2,
    ),
    Claim(
        "micro-batch", PAPER,
        "With four samples sharing statistics it ends better than batch normalization.",
        "76.5 % against 74.2 %", "Inception-v3, ImageNet, microbatches of 4",
        _micro("iid"), Greater("gain", unit="percentage points"),
        note="one epoch of a small network with large maps, for which four samples suffice; the "
        "schedule of its bounds shrunk to the run",
    ),
    Claim(
        "non-iid", PAPER,
        "Where samples that share statistics are alike, it keeps training where batch "
        "normalization fails.",
        "78.5 % against 67.0 %", "Inception-v3, ImageNet, 16 labels × 2 samples",
        Compared("fashion-mini-sharing", lambda arms: {
            "gain": arms("batch_renorm", "b64-n8-class") - arms("batch", "b64-n8-class"),
        }),
        Greater("gain", unit="percentage points"),
        note="eight samples of one class share statistics, a harder case than the paper's pairs",
    ),
    Claim(
        "non-iid-micro", PAPER,
        "The same with four samples of one class.",
        "not reported", "none",
        _micro("class"), Greater("gain", unit="percentage points"),
        note="our condition; seeds differ widely",
    ),
]  # fmt: skip
