"""Weight rescaling (2102.03497)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normlab.claims.claim import Claim, Paper, Scale
from normlab.claims.protocols import Compared, Measured
from normlab.claims.rules import Equal, Exact, Greater
from normlab.discovery import norm
from normlab.weights.span import orthogonal_component

PAPER = Paper(
    "rescaling",
    "Weight Rescaling: Effective and Robust Regularization for Deep Neural Networks with Batch "
    "Normalization",
    "Liu, Cui, Wan, Mao & Chan",
    2021,
    "2102.03497",
)
_LR = 0.1
_STEPS: dict[Scale, int] = {"smoke": 3, "cpu": 100}
_SIZES: dict[Scale, str] = {
    scale: f"perceptron 40–16–4 with batch normalization, 24 random inputs, {steps} steps of SGD, "
    "float64"
    for scale, steps in _STEPS.items()
}
_REPEATS: dict[Scale, int] = {"smoke": 2, "cpu": 5}


def _descent(scale: Scale, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Weights before each step, their gradients, and the inputs: fewer than dimensions."""
    torch.manual_seed(seed)
    x, y = torch.randn(24, 40, dtype=torch.float64), torch.randint(0, 4, (24,))
    net = nn.Sequential(
        nn.Linear(40, 16, bias=False), norm("batch", 16, eps=1e-12), nn.ReLU(), nn.Linear(16, 4)
    ).double()
    w: Tensor = net[0].weight  # type: ignore[assignment]
    optimizer = torch.optim.SGD(net.parameters(), lr=_LR)
    seen = []
    for _ in range(_STEPS[scale] + 1):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
        assert w.grad is not None
        seen.append((w.detach().clone(), w.grad.clone(), x))
        optimizer.step()
    return seen


def _growth(scale: Scale, seed: int) -> Mapping[str, float]:
    """The distance from ‖w′‖² = ‖w‖² + η²‖g‖², relative."""
    seen = _descent(scale, seed)
    worst = 0.0
    for (w, g, _), (after, _, _) in pairwise(seen):
        law = w.square().sum() + _LR**2 * g.square().sum()
        worst = max(worst, abs(float(after.square().sum() / law) - 1))
    return {"distance": worst}


def _unreached(scale: Scale, seed: int) -> Mapping[str, float]:
    """How far the part outside the span of the inputs moves, relative."""
    seen = _descent(scale, seed)
    layer = nn.Linear(40, 16, bias=False).double()
    parts = []
    for w, _, x in (seen[0], seen[-1]):
        layer.weight.data = w
        parts.append(orthogonal_component(layer, x))
    return {"distance": float((parts[1] - parts[0]).norm() / parts[0].norm())}


_TRAINED = Compared(
    "fashion-mini-rescaling",
    lambda arms: {
        "gain": arms("batch+rescaling", "b64-n64-iid") - arms("batch", "b64-n64-iid"),
    },
)
_POINTS = "percentage points"
CLAIMS = [
    Claim(
        "norm-growth", PAPER,
        "Under gradient descent the norm of weights before batch normalization grows with every "
        "step, by η²‖g‖² in squares.",
        "the first implicit bias", "derived",
        Measured(_growth, _REPEATS, _SIZES),
        Exact("distance", 1e-9, because="ε of 1e-12 beside variances near 1, and rounding"),
        note="exact without momentum",
    ),
    Claim(
        "outside-the-span", PAPER,
        "Gradient descent never changes the part of a weight that is orthogonal to its inputs.",
        "the second implicit bias", "derived",
        Measured(_unreached, _REPEATS, _SIZES),
        Exact("distance", 1e-9, because="rounding over the steps"),
        note="exact for inputs that do not change: the first layer",
    ),
    Claim(
        "accuracy", PAPER,
        "Rescaling ends better than weight decay.",
        "better in classification, detection, segmentation and counting; numbers not reached",
        "VGG16 on CIFAR-10; other sizes not reached",
        _TRAINED, Greater("gain", unit=_POINTS),
        note="three epochs of ResNet-8; decay at its usual 5·10⁻⁴, not tuned",
    ),
    Claim(
        "no-worse-than-decay", PAPER,
        "Rescaling reaches an accuracy like that of weight decay, without its λ.",
        "similar final accuracy in the first version; no numbers reached", "VGG16, CIFAR-10",
        _TRAINED, Equal("gain", 2.0, unit=_POINTS),
        note="three epochs of ResNet-8",
    ),
]  # fmt: skip
