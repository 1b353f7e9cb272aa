"""What normalizers do to a sample that depends on its company, and on training or evaluation."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normlab.core.population import Population
from normlab.core.stored import StoringLayer, keeps_statistics
from normlab.diagnostics.held import held
from normlab.diagnostics.subject import Subject
from normlab.diagnostics.subject import outputs as floating
from normlab.diagnostics.watch import channel_dim, watched


@dataclass(frozen=True)
class Stored:
    """Stored statistics of one normalizer beside those of the population that it met.

    Attributes:
        name: Dotted name.
        mean: Largest |μ_stored − μ|/max(σ, √ε) over channels; inf where a stored one is not finite,
            nan where none is stored.
        variance: The ratio σ²_stored/σ² farthest from 1, of all channels but those with σ² < ε,
            which are constant to the layer; inf where a stored one is not finite or negative, nan
            where none is stored.
        channel: The channel of that ratio.
        discrepancy: The largest ‖y_eval − y_train‖/‖y_train‖ of a batch, of this layer alone, both
            on the input that it met; nan where it cannot be called with its input alone.
    """

    name: str
    mean: float
    variance: float
    channel: int
    discrepancy: float


def stored(subject: Subject) -> list[Stored]:
    """Hold the stored statistics of normalizers against those of their inputs.

    The population is all batches together: its variance counts what lies between batches, which
    an average of the batches' variances leaves out. Inputs are those of the subject's mode.

    Args:
        subject: An entered `Subject`.

    Returns:
        One for each normalizer that stores statistics and ran, in order of execution.

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> layer.running_var.fill_(4)
        tensor([4., 4.])
        >>> x = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
        >>> with Subject(layer, nn.functional.mse_loss, [(x, x)]) as subject:
        ...     stored(subject)[0].variance
        4.0
    """
    found: dict[str, Population] = {}
    differences: dict[str, list[float]] = {}

    with torch.no_grad():
        for batch in subject.batches:  # one at a time: inputs of all layers are large
            for name, xs in _inputs(subject, [batch], keeps_statistics).items():
                module = subject.model.get_submodule(name)
                for x in xs:
                    found.setdefault(name, Population()).add(x, channel_dim(module, x))
                    differences.setdefault(name, []).append(_discrepancy(module, x))
    return [
        _compared(name, subject.model.get_submodule(name), seen, differences[name])
        for name, seen in found.items()
    ]


def _inputs(
    subject: Subject, batches: Sequence[Any], chosen: Callable[[nn.Module], bool]
) -> dict[str, list[Tensor]]:
    """Inputs of chosen modules, batch by batch."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        found.setdefault(name, []).append(x.detach().clone())  # it may be written to later

    with watched(subject.model, keep, only=lambda _, module: chosen(module)):
        for batch in batches:
            subject.evaluate(batch)
    return found


def _compared(name: str, module: nn.Module, seen: Population, differences: list[float]) -> Stored:
    mean, variance = seen.mean, seen.variance
    kept = dict(module.named_buffers(recurse=False))
    eps = float(torch.as_tensor(getattr(module, "eps", 0.0)).detach().max())
    off = ratio = math.nan
    channel = -1
    if (running := kept.get("running_mean")) is not None and running.numel() == len(mean):
        here = running.double().reshape(-1)
        shift = ((here - mean).abs() / variance.clamp(min=eps).sqrt()).nan_to_num(0.0)
        off = float(torch.where(here.isfinite(), shift, math.inf).max())
    if (running := kept.get("running_var")) is not None and running.numel() == len(variance):
        here = running.double().reshape(-1)
        ratios = torch.where(variance < eps, 1.0, here / variance).nan_to_num(1.0)
        ratios = torch.where(here.isfinite() & (here >= 0), ratios, math.inf)
        channel = int(ratios.log().abs().argmax())
        ratio = float(ratios[channel])
    return Stored(name, off, ratio, channel, max(differences, default=math.nan))


def _discrepancy(module: nn.Module, x: Tensor) -> float:
    """Between the two modes of one layer on the same input."""
    results = []
    for mode in ("train", "eval"):
        with held(module, mode):
            try:
                results.append(module(x).double())
            except (ValueError, TypeError):
                # A batch that is too small for training; a layer that needs more than its input.
                return math.nan
    return float((results[1] - results[0]).norm() / results[0].norm())


@dataclass(frozen=True)
class Discrepancy:
    """How far the whole model's output moves between training and evaluation.

    Attributes:
        output: ‖f_eval − f_train‖/‖f_train‖ over the batches, dropout off in both; nan where the
            model returns an object of its own, without tensors that can be found in it.
        loss_train: Mean loss with statistics of the batch.
        loss_eval: Mean loss in evaluation.
    """

    output: float
    loss_train: float
    loss_eval: float


def discrepancy(subject: Subject) -> Discrepancy:
    """Compare the model with statistics of the batch and with stored ones; dropout is off in both.

    Args:
        subject: An entered `Subject`, in any mode.

    Returns:
        The comparison.
    """
    outputs: dict[str, list[Tensor]] = {"train": [], "eval": []}
    losses: dict[str, list[float]] = {"train": [], "eval": []}
    with torch.no_grad():
        for mode in outputs:
            with (
                _without_dropout(subject.model) if mode == "train" else held(subject.model, "eval")
            ):
                for batch in subject.batches:
                    result = subject.evaluate(batch)
                    first = next(floating(result.output), None)
                    outputs[mode] += [] if first is None else [first.double().reshape(-1)]
                    losses[mode].append(float(result.loss))
    moved = math.nan
    if outputs["train"]:
        a, b = (torch.cat(outputs[mode]) for mode in ("train", "eval"))
        moved = float((b - a).norm() / a.norm())
    count = len(subject.batches)
    return Discrepancy(moved, sum(losses["train"]) / count, sum(losses["eval"]) / count)


@contextlib.contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Statistics of the batch as in training, all else as in evaluation."""
    with held(model, "eval"):
        for module in model.modules():
            if isinstance(module, StoringLayer):  # its own dropout or noise stays off
                module.use = "batch"
            elif keeps_statistics(module):
                module.train()
        yield


@dataclass(frozen=True)
class Shift:
    """What dropout does to the variance of one normalizer's input.

    Attributes:
        name: Dotted name of the normalizer.
        ratio: Σ_c Var_without/Σ_c Var_with, c the channels: the variance that evaluation meets as a
            multiple of that which training stores; nan where the input is constant.
    """

    name: str
    ratio: float


def dropout_shift(subject: Subject) -> list[Shift]:
    """Measure the shift of variance by dropout in front of normalizers that store statistics.

    For dropout that keeps with probability p, right in front of the normalizer, a channel of mean m
    and variance v has v/((m² + v)/p − m²) ≤ 1 (Li et al. 2018, 1801.05134). Statistics are those of
    the batch with dropout and without, so that nothing else differs, as it does between training
    and evaluation (`normlab.networks.variance_shift` measures all of that).

    Args:
        subject: An entered `Subject`, in any mode.

    Returns:
        One for each normalizer that stores statistics and ran, in order of execution.

    Example:
        >>> model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3))
        >>> x = torch.randn(4096, 3)
        >>> with Subject(model, nn.functional.mse_loss, [(x, x)]) as subject:
        ...     round(dropout_shift(subject)[0].ratio, 1)
        0.5
    """
    populations: list[dict[str, Population]] = []
    with torch.no_grad():
        for around in (_without_dropout(subject.model), held(subject.model, "train")):
            found: dict[str, Population] = {}
            with around:
                for batch in subject.batches:
                    for name, xs in _inputs(subject, [batch], keeps_statistics).items():
                        module = subject.model.get_submodule(name)
                        for x in xs:
                            found.setdefault(name, Population()).add(x, channel_dim(module, x))
            populations.append(found)
    off, on = populations
    return [
        Shift(name, float(off[name].variance.sum() / on[name].variance.sum()))
        for name in off
        if name in on
    ]


@dataclass(frozen=True)
class Noise:
    """Stochastic normalization disturbance of one normalizer (Huang et al., CVPR 2020).

    Attributes:
        name: Dotted name.
        batch_size: Samples that were normalized together.
        disturbance: √ of the mean over samples and elements of the variance, over co-batches, of
            the layer's output, divided by the output's deviation: 0 where samples are independent.
        relative_to: The output's deviation.
    """

    name: str
    batch_size: int
    disturbance: float
    relative_to: float


def disturbance(
    layer: nn.Module, pool: Tensor, batch_size: int, *, draws: int = 16, seed: int = 0
) -> tuple[float, float]:
    """Measure how much a layer's output for a sample depends on the samples beside it.

    Args:
        layer: A normalizer, measured in training mode.
        pool: Samples to draw from, (M, …), M ≥ batch_size.
        batch_size: Of the co-batches. Each draw splits a permutation of the pool into batches of
            that size, so that every sample meets new company.
        draws: Number of permutations.
        seed: Of the permutations.

    Returns:
        √ of the mean variance of an output over draws, and the deviation of all outputs.

    Raises:
        ValueError: If the pool has fewer samples than a batch.

    Example:
        >>> x = torch.randn(64, 3)
        >>> noise, size = disturbance(nn.LayerNorm(3), x, 8)
        >>> noise < 1e-6 * size
        True
    """
    whole = len(pool) // batch_size * batch_size if batch_size > 0 else 0
    if not whole:
        raise ValueError(
            f"a co-batch takes {batch_size} of the pool's {len(pool)} samples; give more batches, "
            "or a smaller batch_size"
        )
    draw = torch.Generator().manual_seed(seed)
    each = (-1, *[1] * (pool.ndim - 1))  # a number for each sample, beside its elements
    mean = squares = torch.zeros(pool.shape, dtype=torch.float64, device=pool.device)
    seen = torch.zeros(len(pool), dtype=torch.float64, device=pool.device)
    with torch.no_grad():
        for _ in range(draws):
            order = torch.randperm(len(pool), generator=draw)[:whole]
            y, met = torch.zeros_like(mean), torch.zeros_like(seen)
            for part in torch.split(order, batch_size):
                with held(layer, "train"):
                    y[part] = layer(pool[part]).double()
                met[part] = 1
            # Welford's recurrence, for each sample by how often it was drawn.
            seen = seen + met
            delta = y - mean
            mean = mean + delta * (met / seen.clamp(min=1)).reshape(each)
            squares = squares + met.reshape(each) * delta * (y - mean)
    often = seen >= 2
    variance = squares[often] / (seen[often] - 1).reshape(each)
    size = float(mean[often].std(correction=0)) if bool(often.any()) else math.nan
    return math.sqrt(float(variance.mean())) if variance.numel() else math.nan, size


def takes_batch(module: nn.Module) -> bool:
    """Whether a normalizer's statistics range over samples, whether it stores them or not."""
    if isinstance(module, StoringLayer) and module.partition.shared:
        return True
    return keeps_statistics(module) or isinstance(module, nn.modules.batchnorm._BatchNorm)


def noise(subject: Subject, batch_size: int, *, draws: int = 16) -> list[Noise]:
    """Measure `disturbance` of each normalizer on the inputs that it meets.

    Args:
        subject: An entered `Subject`; the samples of all its batches are the pool.
        batch_size: Of the co-batches.
        draws: Permutations of the pool.

    Returns:
        One for each normalizer that takes statistics of the batch, in order of execution; those
        that need more than their input are left out.
    """
    with torch.no_grad():
        inputs = _inputs(subject, subject.batches, takes_batch)
    found = []
    for name, xs in inputs.items():
        layer, pool = subject.model.get_submodule(name), torch.cat(xs)
        try:
            value, size = disturbance(layer, pool, batch_size, draws=draws, seed=subject.seed)
        except TypeError:
            continue
        found.append(Noise(name, batch_size, value / size if size else math.nan, size))
    return found
