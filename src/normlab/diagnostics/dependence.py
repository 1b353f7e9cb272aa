"""How dependent units are: correlation, mutual information, whiteness, and what a gate does to it.

IC layers (1905.05928) drop each normalized unit with probability 1 − p. With independent gates
g ~ Bernoulli(p) and x̂ = g·x,

    I(x̂_i; x̂_j) = p²·I(x_i; x_j)      where P(x = 0) = 0, else at most that
    corr(x̂_i, x̂_j) = p·corr(x_i, x_j)  where E x = 0, else that times 1/(1 + (1 − p)·m²/σ²),

m and σ the mean and deviation of both units. `zeros` and `offset` of a `Dependence` say whether the
conditions hold.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normlab.diagnostics.subject import Subject
from normlab.diagnostics.watch import by_channel, channel_dim, watched
from normlab.weights.units import normalizers


@dataclass(frozen=True)
class Dependence:
    """Dependence between the units (channels) of one tensor.

    Attributes:
        name: Dotted name of the module whose output it is.
        correlation: Mean of |corr| over pairs of units.
        information: Mean mutual information over pairs, in nats, under a Gaussian model:
            −½·log(1 − corr²).
        whiteness: ‖R − 1‖_F/√(C·(C − 1)), R the matrix of correlations: 0 for white units, 1 for
            equal ones.
        condition: λ_max/λ_min of the covariance; inf where it has no full rank.
        zeros: Share of exact zeros: above 0, the law of mutual information is a bound.
        offset: Mean of |m|/σ over units: above 0, the law of correlation has another factor.
    """

    name: str
    correlation: float
    information: float
    whiteness: float
    condition: float
    zeros: float
    offset: float


def dependence(rows: Tensor, name: str = "") -> Dependence:
    """Measure the dependence between the rows of a matrix.

    Args:
        rows: (units, observations). Constant units are left out.
        name: To put into the result.

    Returns:
        The measurement; nan where fewer than two units vary.

    Raises:
        ValueError: If there are fewer than two observations.

    Example:
        >>> x = torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]])
        >>> found = dependence(x)
        >>> found.correlation, found.condition
        (0.0, 1.0)
    """
    if rows.ndim != 2 or rows.shape[1] < 2:
        raise ValueError(
            f"correlations need a matrix (units, observations) with two observations or more; "
            f"received {tuple(rows.shape)}"
        )
    zeros = float((rows == 0).double().mean())
    rows = rows.double()
    mean = rows.mean(1, keepdim=True)
    centred = rows - mean
    deviation = centred.square().mean(1).sqrt()
    varies = deviation > 1e-12 * rows.abs().amax(1).clamp(min=1e-300)
    centred, deviation, mean = centred[varies], deviation[varies], mean[varies, 0]
    units = len(deviation)
    if units < 2:
        nan = math.nan
        return Dependence(name, nan, nan, nan, nan, zeros, nan)
    covariance = centred @ centred.T / rows.shape[1]
    correlations = covariance / torch.outer(deviation, deviation)
    pairs = correlations[torch.triu(torch.ones_like(correlations, dtype=torch.bool), 1)]
    spectrum = torch.linalg.eigvalsh(covariance)
    rank_limit = float(spectrum[-1]) * 1e-12 * units
    condition = math.inf if spectrum[0] <= rank_limit else float(spectrum[-1] / spectrum[0])
    # 1 − corr² of equal units is rounding: information is bounded at 17 nats or so.
    information = -0.5 * torch.log1p(-pairs.square().clamp(max=1 - 1e-15))
    return Dependence(
        name,
        float(pairs.abs().mean()),
        float(information.mean()),
        float(pairs.square().mean().sqrt()),
        condition,
        zeros,
        float((mean.abs() / deviation).mean()),
    )


def by_layer(subject: Subject, *, units: int = 256) -> list[Dependence]:
    """Measure each module's output; observations are samples and positions of all batches.

    Args:
        subject: An entered `Subject`.
        units: Most channels of a layer, the first ones.

    Returns:
        In order of execution; the model's input is first, under the name ``"input"``. Modules with
        one observation, and those whose number of channels depends on the batch, are left out.
    """
    runs: list[dict[str, Tensor]] = []

    def see(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        if not runs[-1]:  # the first module to finish is the first to start
            runs[-1]["input"] = _rows(module, x, units)
        runs[-1].setdefault(name, _rows(module, y, units))

    with torch.no_grad(), watched(subject.model, see):
        for batch in subject.batches:
            runs.append({})
            subject.evaluate(batch)
    return [dependence(rows, name) for name, rows in _joined(runs).items()]


@dataclass(frozen=True)
class Around:
    """Dependence between units before and after one module.

    Attributes:
        name: Dotted name.
        before: Of its input.
        after: Of its output.
    """

    name: str
    before: Dependence
    after: Dependence


def around(
    subject: Subject, layers: Collection[str] | None = None, *, units: int = 256
) -> list[Around]:
    """Measure what modules do to the dependence between units.

    Args:
        subject: An entered `Subject`.
        layers: Names of modules; None for all normalizers.
        units: Most channels of a tensor, the first ones.

    Returns:
        In order of execution, over all batches.

    Example:
        >>> from normlab.activations.decorrelated import DecorrelatedBatchNorm
        >>> mixed = torch.randn(64, 2) @ torch.tensor([[1.0, 1.0], [0.0, 1.0]])
        >>> model = nn.Sequential(DecorrelatedBatchNorm(2, groups=1, eps=1e-7))
        >>> model.append(nn.Linear(2, 1)) and None
        >>> with Subject(model, nn.functional.mse_loss, [(mixed, torch.zeros(64, 1))]) as subject:
        ...     (found,) = around(subject)
        >>> found.before.correlation > 0.5, found.after.correlation < 1e-3
        (True, True)
    """
    kinds = normalizers()
    runs: list[dict[str, Tensor]] = []

    def chosen(name: str, module: nn.Module) -> bool:
        return isinstance(module, kinds) if layers is None else name in layers

    def see(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        if x.numel():
            runs[-1].setdefault(f"{name}<", _rows(module, x, units))
            runs[-1].setdefault(f"{name}>", _rows(module, y, units))

    with torch.no_grad(), watched(subject.model, see, only=chosen):
        for batch in subject.batches:
            runs.append({})
            subject.evaluate(batch)
    rows = _joined(runs)
    names = [key[:-1] for key in rows if key.endswith(">") and f"{key[:-1]}<" in rows]
    return [
        Around(name, dependence(rows[f"{name}<"], name), dependence(rows[f"{name}>"], name))
        for name in names
    ]


def _joined(runs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Observations of all batches, of what can be joined and is enough to correlate."""
    found = {}
    for name, first in runs[0].items():
        rows = [run[name] for run in runs if name in run and len(run[name]) == len(first)]
        if len(rows) == len(runs) and sum(part.shape[1] for part in rows) > 1:
            found[name] = torch.cat(rows, 1)
    return found


def _rows(module: nn.Module, x: Tensor, units: int) -> Tensor:
    return by_channel(x.detach(), channel_dim(module, x))[:units] if x.ndim > 1 else x[None]


def information(x: Tensor, y: Tensor, *, neighbors: int = 3, seed: int = 0) -> float:
    """Estimate the mutual information of two variables from samples, by nearest neighbors.

    Kraskov, Stögbauer & Grassberger 2004 (cond-mat/0305641), as scikit-learn has it: for
    continuous variables without repeated values, whatever their distribution.

    Args:
        x: Samples of the first, (M,).
        y: Of the second, (M,).
        neighbors: k.
        seed: Of the noise that breaks ties.

    Returns:
        I(x; y) in nats, at least 0.

    Raises:
        ImportError: Without scikit-learn.
    """
    try:
        from sklearn.feature_selection import mutual_info_regression
    except ImportError as error:
        raise ImportError(
            "mutual information from samples needs scikit-learn; install it with: "
            "pip install 'normlab[diagnostics]'"
        ) from error
    a, b = (t.detach().double().cpu().numpy() for t in (x, y))
    found = mutual_info_regression(a[:, None], b, n_neighbors=neighbors, random_state=seed)
    return float(found[0])


def discrete_information(joint: Tensor) -> float:
    """Mutual information of two discrete variables, exactly.

    Args:
        joint: P(x = i, y = j), (I, J); it sums to 1.

    Returns:
        Σ P·log(P/(P_x·P_y)) in nats.

    Example:
        >>> round(discrete_information(torch.eye(2) / 2), 6)  # log 2
        0.693147
    """
    joint = joint.double()
    both = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    held = joint > 0
    return float((joint[held] * (joint[held] / both[held]).log()).sum())


def gated(joint: Tensor, values_x: Tensor, values_y: Tensor, keep: float) -> Tensor:
    """The joint distribution of g₁·x and g₂·y for independent gates g ~ Bernoulli(keep).

    Args:
        joint: P(x = values_x[i], y = values_y[j]).
        values_x: Values of x.
        values_y: Values of y.
        keep: p.

    Returns:
        P over (0 and the values of x other than 0) × (likewise of y).
    """
    for axis, values in ((0, values_x), (1, values_y)):
        marginal = joint.sum(axis, keepdim=True)
        kept = keep * joint.index_select(axis, (values != 0).nonzero()[:, 0])
        at_zero = keep * joint.index_select(axis, (values == 0).nonzero()[:, 0])
        zero = (1 - keep) * marginal + at_zero.sum(axis, keepdim=True)
        joint = torch.cat([zero, kept], axis)
    return joint


def gated_correlation(correlation: float, offset: float, keep: float) -> float:
    """The correlation after independent gates, for units of equal mean and deviation.

    Args:
        correlation: Before.
        offset: m/σ.
        keep: p.

    Returns:
        corr·p/(1 + (1 − p)·m²/σ²).

    Example:
        >>> gated_correlation(0.5, 0.0, 0.95)
        0.475
    """
    return correlation * keep / (1 + (1 - keep) * offset**2)
