"""How smooth the loss is along the gradient, and along random directions.

Along the gradient: the protocol of Santurkar et al. 2018 (1805.11604), at one point of training,
with one batch or the mean over several. Along random directions: slices with filter-wise scaling
(1712.09913), in which each unit moves by a share of its own length. Three things are treated as
the function has them: weights whose scale the network removes move orthogonally to themselves,
since the rest of the movement does nothing; biases and the parameters of normalizers stay, unless
asked, since a random direction of their full size would replace them; and statistics of the batch
are measured anew at each point.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normlab.diagnostics.subject import Subject
from normlab.weights import units

Small = Literal["keep", "share"]


@dataclass(frozen=True)
class Landscape:
    """Loss and gradient at θ − s·g, for steps s along the gradient g.

    Attributes:
        steps: s.
        losses: L(θ − s·g).
        changes: ‖∇L(θ − s·g) − g‖.
        loss: L(θ).
        gradient: ‖g‖.
    """

    steps: tuple[float, ...]
    losses: tuple[float, ...]
    changes: tuple[float, ...]
    loss: float
    gradient: float

    @property
    def variation(self) -> tuple[float, float]:
        """Least and largest loss along the gradient."""
        return min(self.losses), max(self.losses)

    @property
    def predictiveness(self) -> tuple[float, float]:
        """Least and largest change of the gradient."""
        return min(self.changes), max(self.changes)

    @property
    def smoothness(self) -> float:
        """Effective β: the largest ‖∇L(θ − s·g) − g‖/‖s·g‖; 0 where the gradient is zero."""
        found = [c / (s * self.gradient) for s, c in zip(self.steps, self.changes, strict=True)
                 if s * self.gradient > 0]  # fmt: skip
        return max(found, default=0.0)


def along_gradient(
    subject: Subject, lr: float, *, span: tuple[float, float] = (0.5, 4.0), points: int = 8
) -> Landscape:
    """Measure loss and gradient along the gradient.

    Args:
        subject: An entered `Subject`.
        lr: Learning rate that steps are multiples of.
        span: Least and largest multiple: ½ to 4 for convolutional networks, 1/100 to 30 for deep
            linear ones in 1805.11604.
        points: Number of steps, spaced evenly from the least to the largest.

    Returns:
        The landscape.

    Raises:
        ValueError: If the steps are not positive or there is none.

    Example:
        >>> x, y = torch.eye(2), torch.zeros(2, 1)
        >>> with Subject(nn.Linear(2, 1, bias=False), nn.MSELoss(), [(x, y)]) as subject:
        ...     round(along_gradient(subject, 0.1).smoothness, 4)  # L = ½·‖w‖², so β = 1
        1.0
    """
    low, high = (lr * share for share in span)
    if not 0 < low <= high or points < 1:
        raise ValueError(
            f"steps are positive: lr={lr}, span={span}, points={points} give none; "
            "give a positive lr, a span (low, high) with 0 < low ≤ high, and points ≥ 1"
        )
    g = subject.gradient()
    with torch.no_grad():
        start = float(subject.loss())
    steps = torch.linspace(low, high, points, dtype=torch.float64, device="cpu").tolist()
    losses, changes = [], []
    for step in steps:
        at = {name: p - step * g[name] for name, p in subject.parameters.items()}
        with torch.no_grad():
            losses.append(float(subject.loss(at)))
        now = subject.gradient(at)
        changes.append(norm([now[name] - g[name] for name in g]))
    return Landscape(tuple(steps), tuple(losses), tuple(changes), start, norm(list(g.values())))


def norm(parts: Sequence[Tensor]) -> float:
    """‖·‖ of tensors taken as one vector."""
    return math.sqrt(sum(float(p.double().square().sum()) for p in parts))


@dataclass(frozen=True)
class CovariateShift:
    """What updating the layers before one does to its gradient (1805.11604, definition 2.1).

    Attributes:
        name: Dotted name of the layer.
        difference: ‖G − G′‖₂.
        cosine: cos(G, G′); nan where one is zero.
    """

    name: str
    difference: float
    cosine: float


def covariate_shift(
    subject: Subject,
    lr: float | None = None,
    *,
    updated: Mapping[str, Tensor] | None = None,
    layers: Collection[str] | None = None,
) -> list[CovariateShift]:
    """Measure internal covariate shift at weight layers: G against G′, on the same batch.

    G is the gradient of a layer's weights (its own parameters of two axes or more) at the current
    parameters, G′ the same with all layers before it moved to their next values.

    Args:
        subject: An entered `Subject`.
        lr: The next values are θ − lr·g, unless they are given.
        updated: The next values by name of the parameter.
        layers: Names of layers to measure; None for all with a weight. A parametrized weight
            belongs to the module that holds it, such as ``0.parametrizations.weight``.

    Returns:
        One for each layer, in order of execution. The first is always 0: nothing is before it.

    Raises:
        ValueError: If neither or both of `lr` and `updated` are given, or a layer is unknown.
    """
    if (lr is None) == (updated is None):
        raise ValueError("give lr, or the updated parameters, and not both")
    g = subject.gradient()
    if updated is None:
        assert lr is not None
        updated = {name: p - lr * g[name] for name, p in subject.parameters.items()}
    order = execution(subject)
    own = {n: [k for k in g if k.rpartition(".")[0] == n and g[k].ndim > 1] for n in order}
    wanted = [name for name in order if own[name]]
    if layers is not None:
        unknown = sorted(set(layers) - set(wanted))
        if unknown:
            raise ValueError(
                f"no layer with a trainable weight is named {', '.join(unknown)}; there are "
                f"{', '.join(wanted)}"
            )
        wanted = [name for name in wanted if name in layers]
    found = []
    for name in wanted:
        before = order[: order.index(name)]
        moved = {
            key: updated[key] if key.rpartition(".")[0] in before else p
            for key, p in subject.parameters.items()
        }
        now = subject.gradient(moved)
        G, after = (
            torch.cat([of[key].double().reshape(-1) for key in own[name]]) for of in (g, now)
        )
        sizes = float(G.norm() * after.norm())
        cosine = float((G * after).sum()) / sizes if sizes else float("nan")
        found.append(CovariateShift(name, float((G - after).norm()), cosine))
    return found


def execution(subject: Subject) -> list[str]:
    """Names of the modules that own trainable parameters, in the order in which they run."""
    owners = {name.rpartition(".")[0] for name in subject.parameters}
    seen: dict[str, None] = {}

    def ran(name: str) -> Any:
        def after(*_: Any) -> None:
            seen.setdefault(name)

        return after

    # Not `watched`, which leaves out modules that return what their last part did.
    with contextlib.ExitStack() as stack, torch.no_grad():
        for name in owners:
            module = subject.model.get_submodule(name)
            stack.callback(module.register_forward_hook(ran(name)).remove)
        subject.evaluate(subject.batches[0])
    return list(seen)


def direction(
    subject: Subject,
    seed: int = 0,
    *,
    invariant: Mapping[str, Literal["filter", "layer"]] | None = None,
    small: Small = "keep",
) -> dict[str, Tensor]:
    """Draw a random direction, scaled to the parameters unit by unit (1712.09913).

    Args:
        subject: A `Subject`.
        seed: Of the direction.
        invariant: Layers whose weight has no scale, as `normlab.diagnostics.scale` finds them: the
            direction is orthogonal to each unit (``"filter"``) or to the weight (``"layer"``).
        small: What parameters of one axis or none and those of normalizers do (biases, scales,
            ε, colouring matrices): ``"keep"`` their value, or move by a ``"share"`` of their
            length.

    Returns:
        By name of the parameter: ‖d_i‖ = ‖w_i‖ for each unit i of a weight, ‖d‖ = ‖w‖ where it is
        orthogonal to the whole.
    """
    draw = torch.Generator().manual_seed(seed)
    normalizers = _normalizers(subject.model)
    found = {}
    for name, parameter in subject.parameters.items():
        p = parameter.double()  # 1e-30 is 0 in narrower formats
        d = torch.randn(p.shape, generator=draw, dtype=torch.float64, device="cpu").to(p.device)
        layer, _, kind = name.rpartition(".")
        owner = subject.model.get_submodule(layer)
        known = kind == "weight" and isinstance(owner, units.WEIGHT_LAYERS)
        if p.ndim < 2 or (not known and any(_within(layer, outer) for outer in normalizers)):
            whole = _scaled(d.reshape(1, -1), p.reshape(1, -1)).reshape(p.shape)
            found[name] = (torch.zeros_like(p) if small == "keep" else whole).to(parameter)
            continue
        at = units.layout(owner) if known else None  # else the first axis counts units
        rows, w = (
            (d.flatten(1), p.flatten(1)) if at is None else (units.rows(d, at), units.rows(p, at))
        )
        removed = (invariant or {}).get(layer) if kind == "weight" else None
        if removed == "filter":
            rows = rows - w * (_dot(rows, w) / _dot(w, w).clamp(min=1e-30))
        rows = _scaled(rows, w)
        if removed == "layer":  # once all units have their lengths
            rows = rows - w * ((rows * w).sum() / w.square().sum().clamp(min=1e-30))
            rows = rows * (w.norm() / rows.norm().clamp(min=1e-30))
        found[name] = (rows.reshape(p.shape) if at is None else at.undo(rows)).to(parameter)
    return found


def _normalizers(model: nn.Module) -> list[str]:
    kinds = units.normalizers()
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def _within(name: str, outer: str) -> bool:
    """Whether a module lies in another, or is it."""
    return name == outer or not outer or name.startswith(f"{outer}.")


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, keepdim=True)


def _scaled(d: Tensor, like: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(d, dim=-1, keepdim=True).clamp(min=1e-30)
    scaled: Tensor = d * (torch.linalg.vector_norm(like, dim=-1, keepdim=True) / length)
    return scaled


def slice_losses(
    subject: Subject,
    directions: Sequence[Mapping[str, Tensor]],
    *,
    extent: float = 1.0,
    points: int = 11,
) -> Tensor:
    """Evaluate the loss on a line or plane through the parameters.

    Args:
        subject: An entered `Subject`.
        directions: One or two, as `direction` gives them.
        extent: Coordinates run from −extent to extent.
        points: Along each axis; odd, so that the middle is the model itself.

    Returns:
        Losses of shape (points,) or (points, points), float64.

    Raises:
        ValueError: If there are other than one or two directions, or no point.
    """
    if len(directions) not in (1, 2):
        raise ValueError(f"one or two directions; received {len(directions)}")
    losses = []
    with torch.no_grad():
        for place in itertools.product(ticks(extent, points), repeat=len(directions)):
            at = {
                name: p + sum(t * d[name] for t, d in zip(place, directions, strict=True))
                for name, p in subject.parameters.items()
            }
            losses.append(float(subject.loss(at)))
    shape = [points] * len(directions)
    return torch.tensor(losses, dtype=torch.float64, device="cpu").reshape(shape)


def ticks(extent: float, points: int) -> tuple[float, ...]:
    """Coordinates along one direction; the middle one of an odd number is exactly 0.

    Example:
        >>> ticks(1.0, 5)
        (-1.0, -0.5, 0.0, 0.5, 1.0)
    """
    if not 0 < extent < math.inf or points < 1:
        raise ValueError(
            f"a slice has an extent above 0 and a point or more; received {extent}, {points}"
        )
    return tuple(extent * (2 * i - (points - 1)) / max(points - 1, 1) for i in range(points))


@dataclass(frozen=True)
class Slice:
    """The loss on a line or plane through the parameters, along random directions.

    Attributes:
        ticks: Coordinates along each direction. At 0 is the model; at 1 each unit of a weight has
            moved by its own length.
        losses: Shape (points,), or (points, points) with the first direction along the first axis;
            float64.
        orthogonal: How many weights moved orthogonally to themselves, since they have no scale;
            None if it was not known which have none.
    """

    ticks: tuple[float, ...]
    losses: Tensor
    orthogonal: int | None


def loss_slice(
    subject: Subject,
    axes: Literal[1, 2] = 1,
    *,
    extent: float = 1.0,
    points: int = 11,
    seed: int = 0,
    invariant: Mapping[str, Literal["filter", "layer"]] | None = None,
) -> Slice:
    """Evaluate the loss on a line or plane spanned by directions of `direction`.

    Args:
        subject: An entered `Subject`.
        axes: 1 for a line, 2 for a plane.
        extent: Coordinates run from −extent to extent.
        points: Along each axis; odd, so that the middle is the model itself.
        seed: Of the first direction; the second has the next one.
        invariant: Layers whose weight has no scale, see `direction`; None if that is not known.

    Returns:
        The slice.

    Raises:
        ValueError: As `slice_losses`.

    Example:
        >>> x, y = torch.eye(2), torch.zeros(2, 1)
        >>> with Subject(nn.Linear(2, 1, bias=False), nn.MSELoss(), [(x, y)]) as subject:
        ...     found = loss_slice(subject, 2, points=3)
        >>> found.ticks, found.losses.shape
        ((-1.0, 0.0, 1.0), torch.Size([3, 3]))
    """
    directions = [direction(subject, seed + axis, invariant=invariant) for axis in range(axes)]
    losses = slice_losses(subject, directions, extent=extent, points=points)
    return Slice(ticks(extent, points), losses, None if invariant is None else len(invariant))
