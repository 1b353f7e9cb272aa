"""Beyond BatchNorm: what signals at the start tell of normalizers (2106.05956)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from normlab.claims import nets
from normlab.claims.claim import Claim, Paper, Scale
from normlab.claims.experiments import LEAGUE
from normlab.claims.protocols import Across, Compared, Measured
from normlab.claims.rules import Correlated, Each, Greater
from normlab.diagnostics.propagation import Layer

PAPER = Paper(
    "beyond_batch",
    "Beyond BatchNorm: Towards a Unified Understanding of Normalization in Deep Learning",
    "Lubana, Dick & Tanaka", 2021, "2106.05956",
)  # fmt: skip
_SEEDS: dict[Scale, int] = {"smoke": 1, "cpu": 5}
_DEPTH: dict[Scale, int] = {"smoke": 20, "cpu": 56}
_PLAIN: dict[Scale, str] = {"smoke": "cnn:depth=6,width=32", "cpu": "cnn:depth=20,width=32"}
_RESIDUAL_SIZES: dict[Scale, str] = {
    scale: f"pre-activation ResNet-{depth} of width 8 at its initial weights, 32 images"
    for scale, depth in _DEPTH.items()
}
_PLAIN_SIZES: dict[Scale, str] = {
    scale: f"{spec} at its initial weights, 32 images" for scale, spec in _PLAIN.items()
}


def _growth(normalizer: str, scale: Scale, seed: int) -> float:
    return nets.growth(f"resnet:depth={_DEPTH[scale]},width=8,version=2", normalizer, seed)


def _variance(scale: Scale, seed: int) -> Mapping[str, float]:
    """How far growth at the end of a stage is from exponential, and how near, in log₂.

    A variance that doubles each block has ratio 2; one that grows by the same amount each block
    has ratio (n + 1)/n, n blocks in.
    """
    activation = max(_growth(n, scale, seed) for n in ("batch", "layer", "group"))
    weight = _growth("none+scaled_standardization:relu_gain=true", scale, seed)
    return {"linear": math.log2(1.5 / activation), "exponential": math.log2(weight / 1.5)}


_GROUPS = (1, 2, 4, 8, 16, 32)


def _by_groups(scale: Scale, seed: int) -> list[tuple[int, tuple[Layer, ...]]]:
    spec = _PLAIN[scale]
    return [(g, nets.signals(spec, f"group:groups={g}", seed)) for g in _GROUPS]


def _slope(values: Sequence[float]) -> float:
    """Against log(number of groups)."""
    return statistics.linear_regression([math.log(g) for g in _GROUPS], values).slope


def _convolutions(layers: Sequence[Layer]) -> list[Layer]:
    return [layer for layer in layers if layer.kind == "Conv2d"]


def _rank(scale: Scale, seed: int) -> Mapping[str, float]:
    """Slope of log(stable rank) behind the last nonlinearity against log(number of groups)."""
    ranks = []
    for _, layers in _by_groups(scale, seed):
        last = [layer for layer in layers if layer.kind == "ReLU"][-1]
        ranks.append(math.log(last.stable_rank))
    return {"slope": _slope(ranks)}


def _explosion(scale: Scale, seed: int) -> Mapping[str, float]:
    """Slope of log(first gradient/last gradient) against log(number of groups)."""
    ratios = []
    for _, layers in _by_groups(scale, seed):
        found = _convolutions(layers)
        ratios.append(math.log(found[0].gradient / found[-1].gradient))
    return {"slope": _slope(ratios)}


_CONDITION = "b64-n64-iid"
_LEAGUE_NET = "resnet:depth=8,width=8,version=2"
_LEAGUE_SEEDS: dict[Scale, int] = {"smoke": 1, "cpu": 3}


def _cosine(scale: Scale, place: int) -> Mapping[str, float]:
    """Mean cosine of two samples' features before the classifier, at the runs' initial weights."""
    found = []
    for seed in range(_LEAGUE_SEEDS[scale]):
        layers = nets.signals(_LEAGUE_NET, LEAGUE[place], seed)
        found.append(next(layer.cosine for layer in reversed(layers) if layer.kind == "Flatten"))
    return {"cosine": statistics.fmean(found)}


_FORETOLD = Across(
    Compared("fashion-mini-league", lambda arms: {n: arms(n, _CONDITION) for n in LEAGUE}),
    Measured(
        _cosine, dict.fromkeys(_LEAGUE_SEEDS, len(LEAGUE)), {
            scale: f"cosines before the classifier, of 32 images, mean of {seeds} seeds"
            for scale, seeds in _LEAGUE_SEEDS.items()
        },
        gives=frozenset({"cosine"}),
    ),
    LEAGUE, "accuracy",
)  # fmt: skip
_ORIGINAL = "ResNet-56 and plain networks of 10 to 40 layers, CIFAR-100"
CLAIMS = [
    Claim(
        "variance-growth", PAPER,
        "In residual networks the variance of activations grows linearly with depth under "
        "activation normalizers, and exponentially under weight standardization without scaled "
        "branches.",
        "linear and exponential; no numbers reached", _ORIGINAL,
        Measured(_variance, _SEEDS, _RESIDUAL_SIZES),
        Each((Greater("linear", unit="log₂ of the ratio to 1.5"),
              Greater("exponential", unit="log₂ of the ratio to 1.5"))),
        note="growth from the last block but one of a stage to the last; 1.5 lies between "
        "(n + 1)/n and 2; weights with the gain for ReLU, as the original has them",
        version=2,
    ),
    Claim(
        "rank", PAPER,
        "The smaller the groups, the higher the rank of the last activations.",
        "at least √(width/group size)", _ORIGINAL,
        Measured(_rank, _SEEDS, _PLAIN_SIZES), Greater("slope", unit="slope in log–log"),
        note="the direction alone; that of the bound, were it reached, would be a slope of ½",
    ),
    Claim(
        "gradient-explosion", PAPER,
        "The smaller the groups, the more gradients grow towards the first layers.",
        "explosion for instance normalization", _ORIGINAL,
        Measured(_explosion, _SEEDS, _PLAIN_SIZES), Greater("slope", unit="slope in log–log"),
        note="the direction alone",
    ),
    Claim(
        "foretold", PAPER,
        "A low cosine between samples at the start goes with fast training.",
        "correlated; no numbers reached", _ORIGINAL,
        _FORETOLD, Correlated("cosine", "accuracy", sign=-1, unit="−ρ"),
        version=2,
        note="accuracy after one epoch for speed; thirty normalizers are the repetitions, of which "
        "eight start as batch normalization does; a rule made after three seeds of seven "
        "normalizers had given one and the same correlation, which is no interval",
    ),
]  # fmt: skip
