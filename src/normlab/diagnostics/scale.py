"""Weights whose scale the network removes: their effective learning rate and where it settles.

If f(a·w) = f(w) for a > 0, then ⟨w, ∇L⟩ = 0 and ∇L(a·w) = ∇L(w)/a, so that the step that counts is
that of the direction w/‖w‖, with learning rate η/‖w‖². Under weight decay λ the norm settles where
‖w‖⁴ = η·‖∇̃‖²/(2λ), ∇̃ the gradient at ‖w‖ = 1 (2009.12836, arXiv 1706.05350).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normlab.diagnostics.subject import Subject, arguments
from normlab.diagnostics.watch import watched
from normlab.weights import units
from normlab.weights.invariance import Kind, Tolerance, captured, scale_invariant
from normlab.weights.span import orthogonal_share

_SPANNED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class ScaleOf:
    """The scale of one weight; numbers per unit are means over its units (filters).

    Attributes:
        name: Dotted name of the layer.
        invariant: ``"filter"``, ``"layer"``, or None where the network depends on the scale.
        norm: ‖w‖ of a unit, or of the whole weight if only the whole has no scale.
        gradient: ‖∇L‖ at it.
        radial: |⟨w, ∇L⟩|/(‖w‖·‖∇L‖): 0 for an invariant weight, up to ε.
        rate: Effective learning rate η/‖w‖²; None without a learning rate, or not invariant.
        equilibrium: ‖w‖ where η·‖∇̃‖²/(2λ) puts it; None without decay, or not invariant.
        outside: ‖P⊥w‖/‖w‖, the share outside the span of the layer's inputs on these batches;
            None for layers without such a span here.
    """

    name: str
    invariant: Kind | None
    norm: float
    gradient: float
    radial: float
    rate: float | None
    equilibrium: float | None
    outside: float | None


def scale(
    subject: Subject,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    layers: Collection[str] | None = None,
    span: bool = True,
    tolerance: Tolerance | None = None,
) -> list[ScaleOf]:
    """Find the weights that have no scale, by testing the function, and say where they stand.

    Args:
        subject: An entered `Subject`.
        lr: η.
        weight_decay: λ, as SGD adds it: w ← w − η·(g + λ·w).
        layers: Names of layers; None for all Linear and convolutions with a trainable weight.
        span: Whether to measure the part outside the input span: a singular value decomposition
            of each layer's inputs.
        tolerance: Of the test, see `normlab.weights.invariance`.

    Returns:
        One for each layer, in the model's order.

    Raises:
        ValueError: If a layer is unknown.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
        >>> batch = torch.randn(16, 3), torch.randint(0, 2, (16,))
        >>> with Subject(model, nn.functional.cross_entropy, [batch]) as subject:
        ...     [(w.name, w.invariant) for w in scale(subject)]
        [('0', 'filter'), ('3', None)]
    """
    names = weight_layers(subject, layers)
    if not names:
        return []
    args, kwargs, _ = arguments(subject.batches[0])
    call = captured(subject.model, args, kwargs)
    invariant = scale_invariant(subject.model, names, call, tolerance)
    shares = outside(subject, names) if span else {}
    gradients = subject.gradient()
    found = []
    for name in names:
        layer = subject.model.get_submodule(name)
        w = subject.parameters[f"{name}.weight"].detach()
        at, kind = units.layout(layer), invariant.get(name)
        rows, slopes = (units.rows(t, at).double() for t in (w, gradients[f"{name}.weight"]))
        if kind == "layer":
            rows, slopes = rows.reshape(1, -1), slopes.reshape(1, -1)
        found.append(_standing(name, kind, rows, slopes, lr, weight_decay, shares.get(name)))
    return found


def weight_layers(
    subject: Subject, layers: Collection[str] | None = None, *, parametrized: bool = False
) -> list[str]:
    """Names of Linear and convolution layers with a trainable weight, all or those chosen.

    With `parametrized`, also of those whose weight is computed from trainable parameters.
    """

    def trained(name: str, module: nn.Module) -> bool:
        if f"{name}.weight".lstrip(".") in subject.parameters:
            return True
        inside = f"{name}.parametrizations.weight.".lstrip(".")
        return parametrized and any(key.startswith(inside) for key in subject.parameters)

    names = [
        name
        for name, module in subject.model.named_modules()
        if isinstance(module, units.WEIGHT_LAYERS) and trained(name, module)
    ]
    unknown = sorted(set(layers or ()) - set(names))
    if unknown:
        raise ValueError(
            f"no layer with a trainable weight is named {', '.join(unknown)}; there are "
            f"{', '.join(names)}"
        )
    return names if layers is None else [name for name in names if name in layers]


def _standing(
    name: str,
    kind: Kind | None,
    w: Tensor,
    g: Tensor,
    lr: float | None,
    decay: float | None,
    outside: float | None,
) -> ScaleOf:
    length, slope = w.norm(dim=1), g.norm(dim=1)
    dots = (w * g).sum(1).abs()
    sizes = length * slope
    alive = sizes > 0
    radial = float((dots[alive] / sizes[alive]).mean()) if bool(alive.any()) else math.nan
    rate = equilibrium = None
    if kind is not None and lr is not None and bool((length > 0).all()):
        rate = float((lr / length.square()).mean())
        if decay:
            unit = slope * length  # the gradient at ‖w‖ = 1
            equilibrium = float((lr * unit.square() / (2 * decay)).pow(0.25).mean())
    return ScaleOf(
        name, kind, float(length.mean()), float(slope.mean()), radial, rate, equilibrium, outside
    )


def outside(subject: Subject, layers: Collection[str] | None = None) -> dict[str, float]:
    """Measure ‖P⊥w‖/‖w‖, the part of each weight outside the span of its inputs (2102.03497).

    Args:
        subject: An entered `Subject`; its first batch is taken.
        layers: Names of layers; None for all Linear and convolutions with a trainable weight.

    Returns:
        By name; layers whose weight is 0 and transposed convolutions are left out.
    """
    names = weight_layers(subject, layers)
    inputs: dict[str, Tensor] = {}

    def see(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        if name in names and isinstance(module, _SPANNED):
            inputs.setdefault(name, x.detach())

    with torch.no_grad(), watched(subject.model, see):
        subject.evaluate(subject.batches[0])
        found: dict[str, float] = {}
        for name, x in inputs.items():
            layer: Any = subject.model.get_submodule(name)
            if float(layer.weight.detach().norm()):
                found[name] = orthogonal_share(layer, x)
    return found
