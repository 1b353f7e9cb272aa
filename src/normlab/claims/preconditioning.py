"""Batch normalization preconditioning (2108.01110)."""

from __future__ import annotations

from normlab.claims.claim import Claim, Paper
from normlab.claims.protocols import Compared
from normlab.claims.rules import Equal, Greater

PAPER = Paper(
    "preconditioning",
    "Batch Normalization Preconditioning for Neural Network Training",
    "Lange, Helfrich & Ye",
    2021,
    "2108.01110",
)
_POINTS = "percentage points"


def _gain(over: str, size: int) -> Compared:
    condition = f"b{size}-n{size}-iid"
    return Compared(
        "fashion-mini-preconditioning-dense",
        lambda arms: {"gain": arms("preconditioning", condition) - arms(over, condition)},
    )


_EIGHT = "; eight seeds, of which three had been seen when the number was set"
_ORIGINAL = "MNIST, CIFAR-10 and -100, ImageNet; networks and batch sizes not read"
CLAIMS = [
    Claim(
        "faster-than-plain", PAPER,
        "Preconditioned descent gets further than plain descent in as many steps.",
        "faster convergence; no numbers reached", _ORIGINAL,
        _gain("none", 60), Greater("gain", unit=_POINTS),
        note="after one epoch of a perceptron, rates tuned for both" + _EIGHT,
    ),
    Claim(
        "level-with-batch", PAPER,
        "At usual batches it is as good as batch normalization.",
        "not read", _ORIGINAL,
        _gain("batch", 60), Equal("gain", 1.0, unit=_POINTS),
        note="after one epoch of a perceptron" + _EIGHT,
    ),
    Claim(
        "batch-of-one", PAPER,
        "It works at batches of one sample, better than plain descent, where batch normalization "
        "is not defined.",
        "works at batch 1, by running statistics; no numbers reached", _ORIGINAL,
        _gain("none", 1), Greater("gain", unit=_POINTS),
        note="after one epoch of a perceptron" + _EIGHT,
    ),
]  # fmt: skip
