"""Claims of papers with one or two that are tested: GN, LN, WN, SN, IterNorm, NF, AGC, DyT."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normlab.claims import nets
from normlab.claims.claim import Claim, Paper, Scale
from normlab.claims.protocols import Arms, Compared, Measured
from normlab.claims.rules import Each, Equal, Exact, Greater, NotLess
from normlab.discovery import norm
from normlab.gradients.apply import gradient
from normlab.weights.apply import weight

GROUP = Paper("group", "Group Normalization", "Wu & He", 2018, "1803.08494")
LAYER = Paper("layer", "Layer Normalization", "Ba, Kiros & Hinton", 2016, "1607.06450")
WEIGHT = Paper(
    "weight_norm",
    "Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural "
    "Networks",
    "Salimans & Kingma", 2016, "1602.07868",
)  # fmt: skip
ITERATIVE = Paper(
    "iterative",
    "Iterative Normalization: Beyond Standardization towards Efficient Whitening",
    "Huang, Zhou, Zhu, Liu & Shao", 2019, "1904.03441",
)  # fmt: skip
CLIP = Paper(
    "adaptive_clip",
    "High-Performance Large-Scale Image Recognition Without Normalization",
    "Brock, De, Smith & Simonyan", 2021, "2102.06171",
)  # fmt: skip
SWITCHABLE = Paper(
    "switchable", "Differentiable Learning-to-Normalize via Switchable Normalization",
    "Luo, Ren, Peng, Zhang & Li", 2018, "1806.10779",
)  # fmt: skip
EVOLVED = Paper(
    "evonorm", "Evolving Normalization-Activation Layers",
    "Liu, Brock, Simonyan & Le", 2020, "2004.02967",
)  # fmt: skip
NORM_FREE = Paper(
    "norm_free", "Characterizing Signal Propagation to Close the Performance Gap in Unnormalized "
    "ResNets", "Brock, De & Smith", 2021, "2101.08692",
)  # fmt: skip
DYT = Paper("dyt", "Transformers without Normalization", "Zhu et al.", 2025, "2503.10622")
_LAW: dict[Scale, int] = {"smoke": 2, "cpu": 20}
_RANDOM: dict[Scale, str] = dict.fromkeys(("smoke", "cpu"), "random tensors, float64")
_POINTS = "percentage points"


def _across(arms: Arms) -> Mapping[str, float]:
    base = arms("group", "b64-n32-iid")
    return {f"at {n}": arms("group", f"b64-n{n}-iid") - base for n in (8, 4, 2)}


def _rescaled(scale: Scale, seed: int) -> Mapping[str, float]:
    """Layer normalization behind weights W and behind a·W + 1·bᵀ."""
    torch.manual_seed(seed)
    x, w = torch.randn(9, 6).double(), torch.randn(5, 6).double()
    layer = norm("layer", 5, channel_dim=-1, eps=1e-14).double()
    moved = 2.5 * w + torch.randn(6).double()  # the same vector added to each unit's weights
    return {"distance": float((layer(x @ moved.T) - layer(x @ w.T)).abs().max().detach())}


def _sample_scale(scale: Scale, seed: int) -> Mapping[str, float]:
    """Layer normalization of a sample and of a multiple of it."""
    torch.manual_seed(seed)
    x = torch.randn(9, 6).double()
    layer = norm("layer", 6, channel_dim=-1, eps=1e-14).double()
    factors = torch.rand(9, 1).double() + 0.5
    return {"distance": float((layer(x * factors) - layer(x)).abs().max().detach())}


def _direction(scale: Scale, seed: int) -> Mapping[str, float]:
    """Largest cosine of v and ∂L/∂v, and distance from ‖v − η∂L/∂v‖² = ‖v‖² + η²‖∂L/∂v‖²."""
    torch.manual_seed(seed)
    layer = weight("weight_norm", nn.Linear(6, 4).double())
    x = torch.randn(9, 6).double()
    layer(x).square().sum().backward()
    (v,) = (p for n, p in layer.named_parameters() if "original" in n and p.shape == (4, 6))
    assert v.grad is not None
    cosine = F.cosine_similarity(v.detach(), v.grad, dim=1).abs().max()
    lr = 0.1
    before, step = v.detach().square().sum(1), lr**2 * v.grad.square().sum(1)
    torch.optim.SGD(layer.parameters(), lr).step()
    growth = (v.detach().square().sum(1) / (before + step) - 1).abs().max()
    return {"cosine": float(cosine), "growth": float(growth)}


def _whiteness(scale: Scale, seed: int) -> Mapping[str, float]:
    """log₂ of how much ‖Σ(y) − 1‖ shrinks from two to five iterations."""
    torch.manual_seed(seed)
    x = torch.randn(2000, 8).double() @ (torch.eye(8) + 0.3 * torch.randn(8, 8)).double()
    errors: list[Tensor] = []
    for iterations in (2, 5):
        layer = norm("iterative", 8, groups=1, iterations=iterations, affine=False).double()
        y = layer(x).detach()
        covariance = y.T @ y / len(y)
        errors.append((covariance - torch.eye(8)).norm())
    return {"log₂ ratio": float((errors[0] / errors[1]).log2())}


_GUESSING = math.log(10)
_CLIP_STEPS: dict[Scale, int] = {"smoke": 3, "cpu": 60}
_CLIP_SIZES: dict[Scale, str] = {
    scale: f"cnn:depth=8,width=8 without normalizers, {steps} steps at a rate of 1, batch 64"
    for scale, steps in _CLIP_STEPS.items()
}


def _clipped(scale: Scale, seed: int) -> Mapping[str, float]:
    """Loss at a high rate without clipping less that with it; at most that of guessing."""
    losses = []
    for clip in (False, True):
        net = nets.network("cnn:depth=8,width=8", "none", seed)
        losses.append(_final_loss(net, clip, _CLIP_STEPS[scale], seed))
    return {"gain": losses[0] - losses[1]}


def _final_loss(net: nn.Module, clip: bool, steps: int, seed: int) -> float:
    optimizer = torch.optim.SGD(net.parameters(), 1.0, 0.9)
    if clip:
        gradient("adaptive_clip", net, clip=0.02).attach(optimizer)
    for x, y in nets.batches(steps, 64, seed):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        x, y = nets.batches(1, 256, seed + 1)[0]
        loss = float(F.cross_entropy(net(x), y))
    # Whatever a diverged network says, it knows no more than one that guesses.
    return min(loss, _GUESSING) if loss == loss else _GUESSING


def _small_batches(normalizer: str) -> Compared:
    """Against batch normalization at 64 and at 4 samples that share statistics."""

    def effect(arms: Arms) -> Mapping[str, float]:
        return {
            f"at {n}": arms(normalizer, f"b64-n{n}-iid") - arms("batch", f"b64-n{n}-iid")
            for n in (64, 4)
        }

    return Compared("fashion-mini-league", effect)


_LEVEL_AND_ABOVE = Each((NotLess("at 64", 1.5, unit=_POINTS), Greater("at 4", unit=_POINTS)))


_NORM_FREE_DEPTH: dict[Scale, int] = {"smoke": 20, "cpu": 56}


def _propagated(scale: Scale, seed: int) -> Mapping[str, float]:
    """How far growth is under 1.2 with h + α·f(h/β), and over 1.5 with h + f(h), in log₂."""
    growth = {
        branch: nets.growth(
            f"resnet:depth={_NORM_FREE_DEPTH[scale]},width=8,version=2,branch={branch}",
            "none+scaled_standardization:relu_gain=true", seed,
        )
        for branch in ("scaled", "plain")
    }  # fmt: skip
    return {
        "scaled": math.log2(1.2 / growth["scaled"]),
        "plain": math.log2(growth["plain"] / 1.5),
    }


def _transformer(arms: Arms) -> Mapping[str, float]:
    condition = "b64-n64-iid"
    return {"gain": arms("dyt", condition) - arms("layer", condition)}


_LEAGUE = "a pre-activation ResNet-8 of width 8, one epoch, n = 3"
CLAIMS = [
    Claim(
        "batch-size", GROUP,
        "Accuracy does not depend on how many samples share statistics.",
        "its own numbers were not read; 1911.09737 measured 75.67, 75.77, 76.14, 76.02, 76.20 and "
        "75.93 % at 32 to 1 images a device",
        "ResNetV2-50, ImageNet, in 1911.09737",
        Compared("fashion-mini-filter-response", _across),
        Each(tuple(Equal(f"at {n}", 2.0, unit=_POINTS) for n in (8, 4, 2))),
        note="the function is the same at every size, so that what differs is rounding and its "
        "growth over one unfinished epoch",
    ),
    Claim(
        "weights", LAYER,
        "The output does not change when the whole weight matrix before it is scaled, or the same "
        "vector is added to all its rows.",
        "an invariance; the paper was not read", "derived",
        Measured(_rescaled, _LAW, _RANDOM),
        Exact("distance", 1e-9, because="ε of 1e-14, and rounding"),
    ),
    Claim(
        "samples", LAYER,
        "The output does not change when a sample is scaled.",
        "an invariance; the paper was not read", "derived",
        Measured(_sample_scale, _LAW, _RANDOM),
        Exact("distance", 1e-9, because="ε of 1e-14, and rounding"),
    ),
    Claim(
        "length-and-direction", WEIGHT,
        "With w = g·v/‖v‖ the gradient of v is orthogonal to v, so that gradient descent only "
        "makes v longer.",
        "a property of the parameterization; the paper was not read", "derived",
        Measured(_direction, _LAW, _RANDOM),
        Each((Exact("cosine", 1e-12, because="float64 sums of six terms"),
              Exact("growth", 1e-12, because="float64 sums of six terms"))),
        version=2, note="version 1 looked at the cosine alone",
    ),
    Claim(
        "iterations", ITERATIVE,
        "Newton's iterations whiten: five leave less correlation than two.",
        "whitening improves with T, which is 5; the paper was not read", "not read",
        Measured(_whiteness, {"smoke": 2, "cpu": 40}, _RANDOM, first=100),
        Greater("log₂ ratio", margin=1.0, unit="log₂ of the ratio of errors"),
        version=2, note="forty new seeds, a number set after ten others had left it undecided",
    ),
    Claim(
        "high-rates", CLIP,
        "Adaptive clipping lets networks without normalizers train at rates where they otherwise "
        "break down.",
        "stable at large batches and rates; the paper was not read", "ImageNet; sizes not read",
        Measured(_clipped, {"smoke": 1, "cpu": 20}, _CLIP_SIZES, first=100),
        Greater("gain", unit="nats of loss, of at most log 10"),
        version=3,
        note="twenty new seeds, a number set after five others had left it undecided; a loss "
        "counts at most as that of guessing, where versions 1 and 2 took up to 5",
    ),
    Claim(
        "small-batches", SWITCHABLE,
        "Mixing the statistics of instance, layer and batch normalization keeps accuracy at any "
        "batch size.",
        "close to batch normalization or above it at large batches, above it at small ones; "
        "numbers not read", "ResNet-50, ImageNet, down to two images a device",
        _small_batches("switchable"), _LEVEL_AND_ABOVE, note=_LEAGUE,
    ),
    Claim(
        "small-batches", EVOLVED,
        "EvoNorm-S0, which needs no batch statistics, is level with batch normalization and above "
        "it in small batches.",
        "numbers not read", "ResNet-50 and others, ImageNet",
        _small_batches("evonorm_s0"), _LEVEL_AND_ABOVE, note=_LEAGUE,
    ),
    Claim(
        "propagation", NORM_FREE,
        "Without normalizers, variance grows by α² a block where branches are h + α·f(h/β) with "
        "scaled standardization of weights, and exponentially where they are h + f(h).",
        "the design's prediction", "ResNets at their initial weights",
        Measured(_propagated, {"smoke": 1, "cpu": 5}, {
            scale: f"pre-activation ResNet-{depth} of width 8 at its initial weights, 32 images"
            for scale, depth in _NORM_FREE_DEPTH.items()
        }),
        Each((Greater("scaled", unit="log₂ of growth a block"),
              Greater("plain", unit="log₂ of growth a block"))),
    ),
    Claim(
        "level-with-layer", DYT,
        "Tanh in place of layer normalization loses nothing in transformers.",
        "82.5 against 82.3 %", "ViT-B, ImageNet",
        Compared("fashion-mini-vit", _transformer), NotLess("gain", 1.0, unit=_POINTS),
        note="two epochs of a small ViT, which trains as well without any normalizer; SGD with a "
        "tuned rate, not AdamW",
    ),
]  # fmt: skip
