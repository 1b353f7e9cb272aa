"""All probes that fit a time budget, and what they find, in plain words."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normlab.core.stored import keeps_statistics
from normlab.core.structure import plain, tensors
from normlab.diagnostics import (
    curvature,
    dependence,
    factors,
    findings,
    landscape,
    propagation,
    scale,
    stochasticity,
)
from normlab.diagnostics.findings import Finding
from normlab.diagnostics.held import Mode
from normlab.diagnostics.lanczos import Eigenvalues
from normlab.diagnostics.subject import Loss, Subject

_BASIS = 2.0**29
"""Most numbers that Lanczos' vectors may take together: 4 GiB."""

Progress = Callable[[str, int, int], None]
"""Called with the name of the probe that begins, its number, and how many there are."""


@dataclass(frozen=True)
class Diagnosis:
    """What probes measured and found.

    Attributes:
        mode: In which mode the model was measured; probes that compare modes say so themselves.
        findings: The severest first.
        numbers: Results by probe, objects of the probes' own classes.
        seconds: How long each probe took.
        skipped: Probes that were not run, with the reason.
        facts: Parameters, batches, versions.
    """

    mode: Mode
    findings: tuple[Finding, ...]
    numbers: dict[str, Any]
    seconds: dict[str, float]
    skipped: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [str(f) for f in self.findings] or ["nothing to report"]
        lines += [f"(not run: {name}, {reason})" for name, reason in self.skipped.items()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values; what is not finite becomes a word."""
        found: dict[str, Any] = plain(self, derived=True)
        return found

    def figures(self) -> dict[str, Any]:
        """Figures as Altair charts by key, to restyle or combine.

        Raises:
            ImportError: Without the drawing libraries (``pip install 'normlab[lab]'``).
        """
        from normlab.report import diagnosis

        return diagnosis.figures(self.to_json())

    def write(self, path: str | os.PathLike[str], title: str = "Diagnosis") -> Path:
        """Write findings, figures and numbers as one HTML page that needs no network.

        Args:
            path: The file to create or replace.
            title: Heading.

        Returns:
            The path that was written.

        Raises:
            OSError: The file could not be written; what stood there before is untouched.
            ImportError: Without the drawing libraries (``pip install 'normlab[lab]'``).
        """
        from normlab.report import diagnosis

        return diagnosis.write(self.to_json(), path, title)


@dataclass(frozen=True)
class _Probe:
    """A probe in the list of `diagnose`.

    Attributes:
        name: Key of its result.
        cost: Seconds expected, in evaluations of the gradient on one batch.
        run: Measures; gets the seconds that it may take, and the results before it.
        judge: What its result means.
        whole: Whether it measures on all batches, or on the first alone.
    """

    name: str
    cost: float
    run: Callable[[Subject, float, Mapping[str, Any]], Any]
    judge: Callable[[Any], Iterator[Finding]] = lambda result: iter(())
    whole: bool = False


def diagnose(
    model: nn.Module,
    loss: Loss | None,
    batches: Iterable[Any],
    *,
    mode: Mode = "train",
    lr: float | None = None,
    weight_decay: float | None = None,
    budget: float = 60.0,
    limit: int = 8,
    progress: Progress | None = None,
    seed: int = 0,
) -> Diagnosis:
    """Measure a model with every probe that fits the budget, and say what is wrong with it.

    The model, its statistics, gradients and random states stay as they are, bit for bit.

    Args:
        model: Any module.
        loss: ``loss(output, target)``, see `normlab.diagnostics.subject.Subject`.
        batches: Of training data. The first alone serves probes of higher order; statistics of
            the population come from all.
        mode: ``"train"`` (statistics of the batch), ``"stored"``, ``"eval"`` or ``"as_is"``.
        lr: Learning rate of the training, for what depends on it.
        weight_decay: Its weight decay.
        budget: Seconds; infinite for all probes.
        limit: Most batches to take.
        progress: Called as each probe begins.
        seed: Of random directions and dropout.

    Returns:
        The diagnosis.

    Raises:
        ValueError: If batches or loss are not of the expected form, or a number is out of range.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> batches = [(torch.randn(32, 4), torch.randint(0, 2, (32,))) for _ in range(3)]
        >>> with torch.no_grad():
        ...     _ = model[1].running_var.mul_(100)
        >>> found = diagnose(model, nn.functional.cross_entropy, batches, budget=5)
        >>> found.findings[0].place, found.findings[0].severity
        ('1', 'severe')
    """
    _check_numbers(lr, weight_decay, budget)
    begun = time.monotonic()
    with Subject(model, loss, batches, mode=mode, limit=limit, seed=seed) as whole:
        pass
    first = Subject(model, loss, whole.batches[:1], mode=mode, seed=seed)
    with first:
        start = time.monotonic()
        first.gradient()
        unit = time.monotonic() - start
        with torch.no_grad():
            value = float(first.loss())
    probes = _probes(whole, lr, weight_decay)
    numbers: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    skipped: dict[str, str] = {}
    found: list[Finding] = [*findings.of_loss(value)]
    for place, probe in enumerate(probes, start=1):
        left = budget - (time.monotonic() - begun)
        subject = whole if probe.whole else first
        expected = probe.cost * unit * len(subject.batches)
        if expected > left:
            skipped[probe.name] = f"about {expected:.0f} s, of {max(left, 0):.0f} s left"
            continue
        if progress is not None:
            progress(probe.name, place, len(probes))
        start = time.monotonic()
        with subject:
            try:
                numbers[probe.name] = probe.run(subject, left, numbers)
            except Exception as error:
                # One probe that a model does not allow must not cost the others: torch may have no
                # second derivative or no memory, a layer refuse a batch that is too small.
                skipped[probe.name] = f"failed: {type(error).__name__}: {str(error)[:300]}"
                continue
        seconds[probe.name] = time.monotonic() - start
        found += probe.judge(numbers[probe.name])
    facts = {
        "loss": value,
        "parameters": sum(p.numel() for p in first.parameters.values()),
        "batches": len(whole.batches),
        "model": type(first.model).__name__,
        "torch": torch.__version__,
        "lr": lr,
        "weight_decay": weight_decay,
        "budget": budget,
    }
    return Diagnosis(mode, findings.ranked(found), numbers, seconds, skipped, facts)


def _check_numbers(lr: float | None, weight_decay: float | None, budget: float) -> None:
    if not budget > 0:
        raise ValueError(f"budget is above 0, in seconds; received {budget}")
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"lr is a number above 0, or None where there is none; received {lr}")
    if weight_decay is not None and not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay is a number from 0, or None; received {weight_decay}")


def _probes(subject: Subject, lr: float | None, weight_decay: float | None) -> list[_Probe]:
    """The probes in order of what they tell for their cost."""
    modules = [*subject.model.modules()]
    stores = any(keeps_statistics(module) for module in modules)
    layers = {name.rpartition(".")[0] for name in subject.parameters}
    probes = [
        _Probe("propagation", 3, lambda s, *_: propagation.propagation(s), findings.of_propagation),
        _Probe("biases", 1, lambda s, *_: _bias_gradients(s), lambda f: findings.of_biases(*f)),
    ]
    if stores:
        probes += [
            _Probe("stored", 2, lambda s, *_: stochasticity.stored(s), findings.of_stored,
                   whole=True),
            _Probe("discrepancy", 1, lambda s, *_: stochasticity.discrepancy(s),
                   findings.of_discrepancy, whole=True),
        ]  # fmt: skip
    if stores and any(_drops(module) for module in modules):
        probes += [_Probe("dropout_shift", 2, lambda s, *_: stochasticity.dropout_shift(s),
                          findings.of_shift)]  # fmt: skip
    if any(stochasticity.takes_batch(module) for module in modules):
        size = max(2, _samples(subject) // 4)
        probes += [_Probe("noise", 6, lambda s, *_: stochasticity.noise(s, size, draws=8),
                          findings.of_noise)]  # fmt: skip
    probes += [
        _Probe("scale", 14, lambda s, *_: scale.scale(s, lr=lr, weight_decay=weight_decay,
                                                      span=False), findings.of_scale),
        _Probe("dependence", 2, lambda s, *_: dependence.by_layer(s, units=128)),
        _Probe("slice", 6, lambda s, _, n: landscape.loss_slice(s, invariant=_invariant(n))),
    ]  # fmt: skip
    if lr is not None:
        rate = lr
        probes += [
            _Probe("landscape", 13, lambda s, *_: landscape.along_gradient(s, rate, points=8),
                   lambda found: findings.of_landscape(found, rate)),
        ]  # fmt: skip
    probes += [
        _Probe("curvature", 10, lambda s, left, _: _top(s, "hessian", left),
               lambda found: findings.of_curvature(found, lr)),
        _Probe("factors", 6, lambda s, *_: factors.factors(s), findings.of_factors),
        _Probe("plane", 10, _plane),
    ]  # fmt: skip
    if lr is not None:
        # One gradient for each layer that is measured, beside that of the start.
        cost = 2 + sum(p.ndim > 1 for p in subject.parameters.values())
        probes.append(
            _Probe("covariate_shift", cost, lambda s, *_: landscape.covariate_shift(s, rate))
        )
    probes += [
        _Probe("span", 20, lambda s, *_: [{"name": n, "outside": v}
                                          for n, v in scale.outside(s).items()]),
    ]  # fmt: skip
    if subject.criterion is not None:
        probes.append(_Probe("gauss_newton", 15, lambda s, left, _: _top(s, "gauss_newton", left)))
    probes += [
        _Probe("spectrum", 100, lambda s, *_: _spectrum(s)),
        _Probe("curvature_by_layer", 12 * len(layers), lambda s, *_: curvature.by_layer(s)),
    ]
    return probes


def _drops(module: nn.Module) -> bool:
    """Whether a module may drop something in training: by its class, or by a rate of its own."""
    own = getattr(getattr(module, "recovery", None), "dropout", 0.0)
    return bool(own) or "drop" in type(module).__name__.lower()


def _invariant(numbers: Mapping[str, Any]) -> dict[str, Any] | None:
    """Which weights have no scale, if that was measured."""
    if "scale" not in numbers:
        return None
    return {one.name: one.invariant for one in numbers["scale"] if one.invariant is not None}


def _plane(subject: Subject, left: float, numbers: Mapping[str, Any]) -> landscape.Slice:
    """The loss on a plane, of as many points as there is time for: 5×5 to 15×15."""
    start = time.monotonic()
    with torch.no_grad():
        subject.loss()
    each = max(time.monotonic() - start, 1e-6)
    side = int(min(15, math.sqrt(0.4 * max(left, 0) / each)))
    points = max(5, side - 1 + side % 2)  # odd, so that the model is one of them
    return landscape.loss_slice(subject, 2, points=points, invariant=_invariant(numbers))


def _samples(subject: Subject) -> int:
    return max((len(t) for t in tensors(subject.batches[0]) if t.ndim), default=2)


def _bias_gradients(subject: Subject) -> tuple[dict[str, float], dict[str, float]]:
    """Norms of the gradients of biases and weights, of weight layers that have both."""
    g = subject.gradient()
    names = [n for n in scale.weight_layers(subject) if f"{n}.bias" in g]
    return (
        {n: float(g[f"{n}.bias"].double().norm()) for n in names},
        {n: float(g[f"{n}.weight"].double().norm()) for n in names},
    )


def _top(subject: Subject, matrix: curvature.Matrix, left: float) -> Eigenvalues:
    """The top eigenvalue to 1 %, in as many products as there is time and memory for."""
    operator = curvature.Curvature(subject, matrix)
    start = time.monotonic()
    operator(torch.ones(operator.size, dtype=torch.float64, device="cpu"))
    each = max(time.monotonic() - start, 1e-6)
    steps = max(2, int(min(30, _BASIS / operator.size, 0.4 * left / each)))
    return operator.eigenvalues(steps=steps, tolerance=1e-2)


def _spectrum(subject: Subject) -> dict[str, Any]:
    """Spectral density and trace of the Hessian."""
    operator = curvature.Curvature(subject)
    found = operator.density(steps=max(2, int(min(40, _BASIS / operator.size))), draws=1)
    values, density = found.curve()
    trace = found.moment(1) * operator.size
    return {"values": values, "density": density, "trace": trace, "points": found}
