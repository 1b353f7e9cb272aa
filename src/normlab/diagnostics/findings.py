"""From numbers to words: what is wrong, how badly, by which threshold, and what helps.

A threshold is a number with its source. Where the literature gives none, the source says so, and
the reason stands beside it: it is then this package's own judgement.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from normlab.diagnostics.factors import Factors
from normlab.diagnostics.lanczos import Eigenvalues
from normlab.diagnostics.landscape import Landscape
from normlab.diagnostics.propagation import Layer, growth
from normlab.diagnostics.scale import ScaleOf
from normlab.diagnostics.stochasticity import Discrepancy, Noise, Shift, Stored

Severity = Literal["severe", "warning", "note"]
ORDER: tuple[Severity, ...] = ("severe", "warning", "note")


@dataclass(frozen=True)
class Threshold:
    """A limit and where it comes from."""

    value: float
    source: str


@dataclass(frozen=True)
class Finding:
    """One thing that a user should know.

    Attributes:
        severity: ``"severe"``, ``"warning"`` or ``"note"``.
        place: Dotted name of the module, or ``"model"``.
        says: What was found, with its number.
        value: The number.
        threshold: What it was held against, with the source.
        remedy: What helps.
    """

    severity: Severity
    place: str
    says: str
    value: float
    threshold: Threshold
    remedy: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.place}: {self.says}; {self.remedy}"


_OURS = "no published limit; chosen here: "

VARIANCE_OFF = Threshold(
    2.0, _OURS + "evaluation then scales the layer's output by over 1.4 against training"
)
MEAN_OFF = Threshold(0.5, _OURS + "half a deviation of the input shifts most activations")
SHIFTED = Threshold(
    1.25, "1801.05134 shows such shifts to cost accuracy; how large is chosen here: a tenth of the "
    "deviation"
)  # fmt: skip
LOSS_GAP = Threshold(0.1, _OURS + "a tenth of the loss, beyond what batches differ by")
NOISE = Threshold(0.5, _OURS + "half of an output's deviation is then its company's doing")
EXPLODES = Threshold(1.2, _OURS + "a hundredfold over 25 layers")
VANISHES = Threshold(1 / 1.2, EXPLODES.source)
DEAD = Threshold(0.5, _OURS + "half of a layer's channels are unused")
COLLAPSED = Threshold(
    0.95, "2106.05956: networks whose samples' cosine nears 1 train slowly; how near is chosen here"
)
SHARP = Threshold(2.0, "2103.00065: gradient descent leaves a quadratic of sharpness over 2/η")
OUT_OF_BALANCE = Threshold(3.0, _OURS + "effective rates are then 9 times off their balance")
CONDITION = Threshold(1e5, _OURS + "float32 has 7 digits; two are left of a solution")
_A_NUMBER = Threshold(math.inf, "a number")
ZERO_BIAS = Threshold(1e-5, _OURS + "100 times float32's rounding")


def of_loss(loss: float) -> Iterator[Finding]:
    """A loss that is no number."""
    if not math.isfinite(loss):
        yield Finding("severe", "model", f"the loss is not finite: {loss}", loss, _A_NUMBER,
                      "look for inputs or weights that are not finite; lower the learning rate, or "
                      "start from an earlier checkpoint")  # fmt: skip


def of_stored(found: Sequence[Stored]) -> Iterator[Finding]:
    """Stored statistics off the population's."""
    fix = "recompute them with nl.recalibrate(model, batches)"
    variances = [(_off(s.variance), s) for s in found]  # nan, where none is stored, is over nothing
    means = [(s.mean, s) for s in found]
    for off, limit, says in (
        (variances, VARIANCE_OFF,
         "stored variance of channel {channel} is {variance:.2g} × the population's"),
        (means, MEAN_OFF, "a stored mean is {mean:.2g} deviations off the population's"),
    ):  # fmt: skip
        beyond = [(v, s) for v, s in off if v > limit.value]
        if not beyond:
            continue
        value, worst = max(beyond, key=lambda pair: pair[0])
        text = says.format(**vars(worst))
        if math.inf in (worst.variance, worst.mean):
            text = "a stored statistic is not a finite number, or a variance below 0"
        if len(beyond) > 1:
            text += f", the worst of {len(beyond)} normalizers"
        severity: Severity = "severe" if value > 4 else "warning"
        yield Finding(severity, worst.name, text, value, limit, fix)


def _off(ratio: float) -> float:
    """How far a ratio is from 1, either way."""
    return max(ratio, 1 / ratio) if ratio != 0 else math.inf


def of_discrepancy(found: Discrepancy) -> Iterator[Finding]:
    """The loss in evaluation against that with statistics of the batch."""
    gap = (found.loss_eval - found.loss_train) / max(abs(found.loss_train), 1e-12)
    if math.isnan(gap) and math.isfinite(found.loss_train):
        gap = math.inf  # evaluation knows no number
    if gap > LOSS_GAP.value:
        says = (
            f"the loss is {found.loss_eval:.3g} with stored statistics and {found.loss_train:.3g} "
            "with those of the batch"
        )
        severity: Severity = "severe" if gap > 1 else "warning"
        yield Finding(severity, "model", says, gap, LOSS_GAP,
                      "nl.recalibrate(model, batches); if that does not help, batches are too "
                      "small or not mixed: group or filter_response")  # fmt: skip


def of_shift(found: Sequence[Shift]) -> Iterator[Finding]:
    """Dropout in front of normalizers, whose stored variance is then that of training alone."""
    shifts = [(1 / s.ratio, s.name) for s in found if s.ratio > 0]
    beyond = [pair for pair in shifts if pair[0] > SHIFTED.value]
    if beyond:
        value, name = max(beyond)
        says = f"dropout makes the variance that training stores {value:.3g} × evaluation's"
        if len(beyond) > 1:
            says += f", the worst of {len(beyond)} normalizers"
        yield Finding("warning", name, says, value, SHIFTED,
                      "put dropout behind the last normalizer that stores statistics, or in front "
                      "of those that store none: group, layer")  # fmt: skip


def of_noise(found: Sequence[Noise]) -> Iterator[Finding]:
    """Outputs that depend on who else is in the batch."""
    known = [n for n in found if not math.isnan(n.disturbance)]
    worst = max(known, key=lambda n: n.disturbance, default=None)
    if worst is not None and worst.disturbance > NOISE.value:
        says = (
            f"in batches of {worst.batch_size} an output varies by {worst.disturbance:.2g} "
            "deviations with the samples beside it"
        )
        yield Finding("warning", worst.name, says, worst.disturbance, NOISE,
                      "larger or synchronized batches; or batch_renorm, group, "
                      "filter_response")  # fmt: skip


def of_propagation(found: Sequence[Layer]) -> Iterator[Finding]:
    """Signals that explode, vanish, collapse or die."""
    for layer in found:
        if not math.isfinite(layer.mean_square):
            yield Finding("severe", layer.name, "its output is not finite", layer.mean_square,
                          _A_NUMBER, "lower the learning rate, or start from an earlier "
                          "checkpoint; in float16, scale the loss")  # fmt: skip
            return
    weights = [la for la in found if la.kind.startswith(("Conv", "Linear")) and la.gradient > 0]
    if len(weights) >= 8:  # a slope of fewer points says little
        rate = 1 / growth([la.gradient for la in weights])
        if rate > EXPLODES.value:
            says = f"gradients grow by {rate:.3g} from each weight layer to the one before it"
            yield Finding("severe" if rate > 1.5 else "warning", "model", says, rate, EXPLODES,
                          "larger groups, residual branches, or scale them down at the start "
                          "(skipinit)")  # fmt: skip
        elif rate < VANISHES.value:
            says = f"gradients shrink by {rate:.3g} from each weight layer to the one before it"
            remedy = "a normalizer behind each weight layer, or residual branches"
            yield Finding("warning", "model", says, rate, VANISHES, remedy)
    for layer in found:
        if layer.dead > DEAD.value:
            says = f"{layer.dead:.0%} of the channels are zero at all samples and positions"
            remedy = "a lower learning rate or warm-up; β or τ that lets them live"
            yield Finding("warning", layer.name, says, layer.dead, DEAD, remedy)
    last = next((la for la in reversed(found[:-1]) if not math.isnan(la.cosine)), None)
    if last is not None and last.cosine > COLLAPSED.value:
        says = f"samples point the same way: their mean cosine is {last.cosine:.3f}"
        yield Finding("note", last.name, says, last.cosine, COLLAPSED,
                      "smaller groups, or batch statistics")  # fmt: skip


def of_curvature(found: Eigenvalues, lr: float | None) -> Iterator[Finding]:
    """A step that is too long for the curvature."""
    top = float(found.values[0])
    if lr is not None and lr * top > SHARP.value:
        says = f"η·λ_max = {lr * top:.3g}, over 2: gradient descent does not descend"
        yield Finding("warning", "model", says, lr * top, SHARP,
                      "a lower learning rate, or warm-up")  # fmt: skip


def of_landscape(found: Landscape, lr: float) -> Iterator[Finding]:
    """A gradient that does not predict the next."""
    if not math.isfinite(found.loss):
        return  # said by `of_loss`
    if not all(math.isfinite(loss) for loss in found.losses):
        yield Finding("severe", "model", "the loss is not finite along the gradient", math.inf,
                      _A_NUMBER, "a lower learning rate")  # fmt: skip
    elif found.smoothness * lr > 2 * SHARP.value:
        value = found.smoothness * lr
        says = f"along the gradient η·β = {value:.3g}: the gradient turns within a step"
        limit = Threshold(2 * SHARP.value, SHARP.source + "; twice that")
        remedy = "a lower learning rate, or a normalizer behind each weight layer"
        yield Finding("note", "model", says, value, limit, remedy)


def of_scale(found: Sequence[ScaleOf]) -> Iterator[Finding]:
    """Weights far from where decay will take them."""
    off = [
        (max(s.norm / s.equilibrium, s.equilibrium / s.norm), s)
        for s in found
        if s.equilibrium and s.norm
    ]
    beyond = [(ratio, s) for ratio, s in off if ratio > OUT_OF_BALANCE.value]
    if beyond:
        ratio, worst = max(beyond, key=lambda pair: pair[0])
        says = (
            f"{len(beyond)} of {len(off)} weights without a scale are far from their balance: "
            f"‖w‖ is {worst.norm:.3g} here, and goes to {worst.equilibrium:.3g} under this "
            "learning rate and decay, so that effective rates still drift"
        )
        yield Finding("note", worst.name, says, ratio, OUT_OF_BALANCE,
                      "train longer, or keep norms fixed by rescaling weights (method "
                      "rescaling)")  # fmt: skip


def of_factors(found: Sequence[Factors]) -> Iterator[Finding]:
    """Inputs of layers that are badly conditioned, where the batch is large enough to tell."""
    enough = [f for f in found if f.inputs.observations >= len(f.inputs.values)]
    bad = [(f.inputs.condition(0.8), f) for f in enough]
    bad = [(k, f) for k, f in bad if k > CONDITION.value]
    if bad:
        worst = max(bad, key=lambda pair: pair[0])
        says = f"its inputs' second moments have κ₀.₈ = {worst[0]:.2g}, one of {len(bad)} layers"
        yield Finding("note", worst[1].name, says, worst[0], CONDITION,
                      "a normalizer in front of it; whitening (iterative) if that is not "
                      "enough")  # fmt: skip


def of_biases(gradients: dict[str, float], weights: dict[str, float]) -> Iterator[Finding]:
    """Biases that a normalizer behind them removes.

    Args:
        gradients: Norm of the gradient of each layer's bias.
        weights: Norm of the gradient of its weight.
    """
    idle = [n for n, g in gradients.items() if weights.get(n, 0) * ZERO_BIAS.value > g]
    if idle:
        says = f"{len(idle)} biases change nothing: a normalizer behind them subtracts them again"
        yield Finding("note", idle[0], says, gradients[idle[0]], ZERO_BIAS,
                      "bias=False saves their memory and decay")  # fmt: skip


def ranked(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """The severest first, each group in the order in which it was found."""
    return tuple(sorted(findings, key=lambda f: ORDER.index(f.severity)))
