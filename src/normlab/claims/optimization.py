"""How batch normalization helps optimization (1805.11604)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from functools import lru_cache, partial

import torch
from torch.nn import functional as F

from normlab.claims import nets
from normlab.claims.claim import Claim, Paper, Scale
from normlab.claims.protocols import Arms, Compared, Measured
from normlab.claims.rules import Each, Equal, Exact, Greater, NotLess
from normlab.diagnostics import landscape
from normlab.diagnostics.subject import Subject
from normlab.discovery import norm
from normlab.networks import build
from normlab.networks.deep_linear import DeepLinearPlan

PAPER = Paper(
    "optimization", "How Does Batch Normalization Help Optimization?",
    "Santurkar, Tsipras, Ilyas & Madry", 2018, "1805.11604",
)  # fmt: skip
_LR = 0.05
_STEPS: dict[Scale, int] = {"smoke": 4, "cpu": 120}
_SEEDS: dict[Scale, int] = {"smoke": 1, "cpu": 20}
_AGAIN = (
    "twenty new seeds and three convolutions, where versions 1 and 2 had eight, with which the "
    "network without normalization did no better than guessing: its loss was flat, which is not "
    "the smoothness that is meant; this one was chosen for learning without normalization"
)
_NET = "cnn:depth=3,width=8"
_SIZES: dict[Scale, str] = {
    scale: f"{_NET} on fashion-mini, batch 64, {steps} steps of SGD at {_LR} with momentum 0.9, "
    "without and with batch normalization; measured at eight points of the run"
    for scale, steps in _STEPS.items()
}


@lru_cache(maxsize=64)  # four claims look at the same runs
def _seen(normalizer: str, scale: Scale, seed: int) -> tuple[Mapping[str, float], ...]:
    """Landscape and covariate shift along a run."""
    net = nets.network(_NET, normalizer, seed)
    steps = _STEPS[scale]
    points = {round(steps * i / 8) for i in range(8)}
    batch = nets.batches(1, 64, seed + 500)
    found = []

    def look(step: int) -> None:
        if step not in points:
            return
        with Subject(net, F.cross_entropy, batch) as subject:
            along = landscape.along_gradient(subject, _LR, points=4)
            shift = landscape.covariate_shift(subject, _LR)
        cosines = [s.cosine for s in shift[1:] if not math.isnan(s.cosine)]
        low, high = along.variation
        found.append({
            "smoothness": along.smoothness, "band": high - low,
            "change": along.predictiveness[1],
            "cosine": statistics.fmean(cosines) if cosines else math.nan,
        })  # fmt: skip

    nets.train(net, steps, lr=_LR, size=64, seed=seed, at=look)
    return tuple(found)


def _against(key: str, scale: Scale, seed: int) -> float:
    """Mean log₁₀ ratio of a quantity without to with batch normalization, over the run."""
    pairs = zip(_seen("none", scale, seed), _seen("batch", scale, seed), strict=True)
    return statistics.fmean(math.log10(max(a[key], 1e-12) / max(b[key], 1e-12)) for a, b in pairs)


def _smooth(scale: Scale, seed: int) -> Mapping[str, float]:
    return {"decades": _against("smoothness", scale, seed)}


def _band(scale: Scale, seed: int) -> Mapping[str, float]:
    return {"decades": _against("band", scale, seed)}


def _predictive(scale: Scale, seed: int) -> Mapping[str, float]:
    return {"decades": _against("change", scale, seed)}


def _shift(scale: Scale, seed: int) -> Mapping[str, float]:
    """cos(G, G′) without less that with batch normalization, means over layers and run."""
    means = [
        statistics.fmean(one["cosine"] for one in _seen(normalizer, scale, seed))
        for normalizer in ("none", "batch")
    ]
    return {"difference": means[0] - means[1]}


def _identity(scale: Scale, seed: int) -> Mapping[str, float]:
    """‖∇_y L‖² = (γ²/σ²)·(‖g‖² − ⟨1, g⟩²/m − ⟨g, ŷ⟩²/m), with 1/m."""
    draw = torch.Generator().manual_seed(seed)
    m = 32
    y = torch.randn(m, 1, generator=draw, dtype=torch.float64).requires_grad_()
    g = torch.randn(m, 1, generator=draw, dtype=torch.float64)
    layer = norm("batch", 1, eps=1e-14).double()
    gamma = 1.7
    torch.nn.init.constant_(layer.get_parameter("weight"), gamma)
    (found,) = torch.autograd.grad(layer(y), y, g)
    centred = (y - y.mean()).detach()
    variance = centred.square().mean()
    unit = centred / variance.sqrt()
    rest = g.square().sum() - g.sum() ** 2 / m - (g * unit).sum() ** 2 / m
    law = gamma**2 / variance * rest
    return {"ratio": float(found.square().sum() / law)}


_LINEAR_STEPS: dict[Scale, int] = {"smoke": 20, "cpu": 2000}
_LINEAR_RATES = (1e-4, 1e-3, 1e-2, 1e-1)
_LINEAR_SIZES: dict[Scale, str] = {
    scale: "25 matrices of 10×10 (Glorot), ‖W₂₅…W₁x − Ax‖² with Gaussian A and 1000 Gaussian x, "
    f"{steps} steps of full-batch gradient descent, each arm at the best of the rates "
    f"{', '.join(f'{r:g}' for r in _LINEAR_RATES)}"
    for scale, steps in _LINEAR_STEPS.items()
}


def _linear_loss(normalizer: str, scale: Scale, seed: int) -> float:
    """Least loss after the last step, over the rates, as a share of that of answering 0."""
    generator = torch.Generator().manual_seed(seed)
    x, a = (torch.randn(rows, 10, generator=generator) for rows in (1000, 10))
    target = x @ a.T
    ends = []
    for lr in _LINEAR_RATES:
        net = build("deep_linear", partial(norm, normalizer), classes=10, image_shape=(10, 1, 1))
        DeepLinearPlan().initialize(net, torch.Generator().manual_seed(seed))
        optimizer = torch.optim.SGD(net.parameters(), lr)
        for _ in range(_LINEAR_STEPS[scale]):
            optimizer.zero_grad()
            F.mse_loss(net(x), target).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            ends.append(float(F.mse_loss(net(x), target) / target.square().mean()))
    return min(e if math.isfinite(e) else math.inf for e in ends)


def _linear(scale: Scale, seed: int) -> Mapping[str, float]:
    plain, batch = (min(_linear_loss(n, scale, seed), 1e3) for n in ("none", "batch"))
    return {"decades": math.log10(max(plain, 1e-12) / max(batch, 1e-12))}


def _level(normalizers: tuple[str, ...]) -> Compared:
    condition = "b64-n64-iid"
    return Compared(
        "fashion-mini-deviations",
        lambda arms: {n: arms(n, condition) - arms("batch", condition) for n in normalizers},
    )


def _noisy(arms: Arms) -> Mapping[str, float]:
    last = [arms.along(n, "b64-n64-iid", "train_accuracy")[-1] for n in ("noisy_batch", "batch")]
    return {"noisy_batch": last[0] - last[1]}


_LP = ("l1_batch", "lp_batch:p=2", "lp_batch:p=max")
_DECADES = "decades, without against with batch normalization"
_POINTS = "percentage points"
_ORIGINAL = "VGG, CIFAR-10, 15,000 steps at 0.1"
_ONE = "random gradients of a layer of 32 samples, float64"
CLAIMS = [
    Claim(
        "smoothness", PAPER,
        "Along the gradient the loss is smoother with batch normalization: its effective β is "
        "lower during training.",
        "lower throughout", _ORIGINAL,
        Measured(_smooth, _SEEDS, _SIZES, first=200), Greater("decades", unit=_DECADES),
        version=3, note=_AGAIN,
    ),
    Claim(
        "loss-variation", PAPER,
        "Along the gradient the loss varies less with batch normalization.",
        "a narrower band", _ORIGINAL,
        Measured(_band, _SEEDS, _SIZES, first=200), Greater("decades", unit=_DECADES),
        version=3, note=_AGAIN,
    ),
    Claim(
        "predictiveness", PAPER,
        "The gradient changes less along itself with batch normalization.",
        "a gap of near two orders of magnitude early in training", _ORIGINAL,
        Measured(_predictive, _SEEDS, _SIZES, first=200), Greater("decades", unit=_DECADES),
        version=3, note=_AGAIN,
    ),
    Claim(
        "covariate-shift", PAPER,
        "Batch normalization does not reduce internal covariate shift: cos(G, G′) is no closer "
        "to 1 with it.",
        "similar or worse", _ORIGINAL,
        Measured(_shift, _SEEDS, _SIZES, first=200),
        NotLess("difference", 0.1, unit="cos(G, G′)"), version=3, note=_AGAIN,
    ),
    Claim(
        "gradient-identity", PAPER,
        "Batch normalization shortens the gradient by its mean and by its part along the output: "
        "‖∇_y L‖² = (γ²/σ²)(‖g‖² − ⟨1, g⟩²/m − ⟨g, ŷ⟩²/m).",
        "the printed form has 1/√m in the last term, which does not hold", "a theorem",
        Measured(_identity, {"smoke": 2, "cpu": 20}, {"smoke": _ONE, "cpu": _ONE}),
        Exact("ratio", 1e-9, expected=1.0, because="ε of 1e-14, and sums of 32 terms"),
    ),
    Claim(
        "linear-network", PAPER,
        "Batch normalization speeds up a deep linear network.",
        "a lower loss throughout", "25 layers, 10,000 steps at 1e-6",
        Measured(_linear, {"smoke": 1, "cpu": 5}, _LINEAR_SIZES), Greater("decades", unit=_DECADES),
        note="the mean of the squares, not their sum, and a rate tuned for each arm; that "
        "its layers see almost no covariate shift without it, the example's point, is not measured",
    ),
    Claim(
        "noise", PAPER,
        "With noise of shifting mean and variance behind it, batch normalization trains about as "
        "well.",
        "trains about as well as batch normalization", _ORIGINAL,
        Compared("fashion-mini-deviations", _noisy), Equal("noisy_batch", 3.0, unit=_POINTS),
        note="accuracy in training, one epoch of a small network; in evaluation, without the noise "
        "that the stored statistics have seen, little of it is left; eight seeds, of which three "
        "had been seen when the number was set",
        version=2,
    ),
    Claim(
        "other-norms", PAPER,
        "Dividing by ℓ₁, ℓ₂ or ℓ∞ norms does about as well as batch normalization.",
        "all about as good", _ORIGINAL,
        _level(_LP), Each(tuple(Equal(n, 3.0, unit=_POINTS) for n in _LP)),
        note="one epoch of a small network; eight seeds, of which three had been seen when the "
        "number was set",
    ),
]  # fmt: skip
