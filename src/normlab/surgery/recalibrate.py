"""Stored statistics computed anew, from data, for the weights that a model has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from normlab.core.population import Population
from normlab.core.stored import StoringLayer


@dataclass(frozen=True)
class Recalibrated:
    """What happened to one normalizer.

    Attributes:
        name: Dotted name.
        mean: Largest change of a stored mean, in new deviations; nan where none is stored.
        variance: The ratio old/new of a stored variance farthest from 1; likewise.
    """

    name: str
    mean: float
    variance: float


@torch.no_grad()
def recalibrate(
    model: nn.Module, batches: Iterable[Any], *, limit: int | None = None
) -> list[Recalibrated]:
    """Replace the stored statistics of all normalizers by those of the data.

    One pass over the batches: normalizers use the batch's statistics, as in training, all else
    (dropout above all) is as in evaluation. Each normalizer's inputs over all batches count as one
    population, so that the variance between batches is part of it; an average of the batches'
    variances (`torch.optim.swa_utils.update_bn`) leaves that out. Nothing else of the model
    changes; on an error or Ctrl-C nothing does.

    Args:
        model: Any module; torch's own batch and instance normalization and this package's layers.
        batches: Inputs: a tensor, a tuple of arguments, a mapping of keywords, or a pair (input,
            target) as a loader gives them, of which the target is left out.
        limit: Most batches to take.

    Returns:
        One for each normalizer that was changed, in the model's order.

    Raises:
        ValueError: If there is no normalizer with stored statistics, or no batch.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> found = recalibrate(model, [torch.randn(8, 3) for _ in range(5)])
        >>> [r.name for r in found]
        ['1']
    """
    chosen = {name: m for name, m in model.named_modules() if _stores(m)}
    if not chosen:
        raise ValueError(
            "no module of this model stores statistics, so there is nothing to recalibrate"
        )
    before = {name: _statistics(m) for name, m in chosen.items()}
    try:
        seen, used = _measured(model, chosen, batches, limit)
        if not used:
            raise ValueError("recalibration needs at least one batch; received none")
        for name, module in chosen.items():
            if isinstance(module, StoringLayer):
                _commit(module)
            elif name in seen:
                _write(module, seen[name])
    except BaseException:
        for name, module in chosen.items():
            for key, value in before[name].items():
                getattr(module, key).copy_(value)
            if isinstance(module, StoringLayer):
                module._pooled = None
        raise
    return [_change(name, before[name], _statistics(m)) for name, m in chosen.items()]


def _stores(module: nn.Module) -> bool:
    if isinstance(module, StoringLayer):
        return bool(module.stored_names)
    return isinstance(module, _NormBase) and module.running_mean is not None


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    buffers = module.named_buffers(recurse=False)
    return {k: b.clone() for k, b in buffers if k.startswith("running_") or "num_batches" in k}


def _measured(
    model: nn.Module, chosen: Mapping[str, nn.Module], batches: Iterable[Any], limit: int | None
) -> tuple[dict[str, Population], int]:
    """Run the batches; our layers pool by themselves, inputs of torch's are measured by hooks."""
    seen: dict[str, Population] = {}
    used = 0
    with contextlib.ExitStack() as stack:
        stack.callback(_restore, [(m, m.training) for m in model.modules()])
        model.eval()
        for name, module in chosen.items():
            if isinstance(module, StoringLayer):  # not in training, where some drop or add noise
                stack.callback(_set_policies, module, module.use, module.update)
                _set_policies(module, "batch", "accumulate")
                module._pooled = None
            else:
                module.training = True
                stack.callback(setattr, module, "momentum", cast(Any, module).momentum)
                cast(Any, module).momentum = 0.0  # what it writes changes nothing
                kept = cast(Tensor, module.num_batches_tracked)
                stack.callback(kept.copy_, kept.clone())
                handle = module.register_forward_pre_hook(_adder(seen, name), with_kwargs=True)
                stack.callback(handle.remove)
        for batch in islice(batches, limit):
            _run(model, batch)
            used += 1
    return seen, used


def _restore(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def _set_policies(module: StoringLayer, use: Any, update: Any) -> None:
    module.use, module.update = use, update


def _adder(seen: dict[str, Population], name: str) -> Any:
    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        seen.setdefault(name, Population()).add(x, 1)

    return add


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, list | tuple) and len(batch) == 2 and not isinstance(batch[1], Mapping):
        batch = batch[0]  # an input with its target
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple):
        model(*batch)
    else:
        model(batch)


def _commit(module: StoringLayer) -> None:
    """Fold the pool in with weight 1: the old statistics count for nothing."""
    statistics = module.statistics
    module.statistics = replace(cast(Any, statistics), momentum=1.0)
    try:
        module.commit()
    finally:
        module.statistics = statistics


def _write(module: nn.Module, found: Population) -> None:
    layer: Any = module
    layer.running_mean.copy_(found.mean)
    # torch stores the unbiased variance.
    layer.running_var.copy_(found.squares / max(found.count - 1, 1))


def _change(name: str, old: dict[str, Tensor], new: dict[str, Tensor]) -> Recalibrated:
    nan = float("nan")
    mean = ratio = nan
    if "running_var" in new:
        ratios = (old["running_var"] / new["running_var"]).double().reshape(-1)
        ratio = float(ratios[ratios.log().abs().nan_to_num(0.0).argmax()])
        if "running_mean" in new:
            moved = (old["running_mean"] - new["running_mean"]).abs() / new["running_var"].sqrt()
            mean = float(moved.nan_to_num(0.0).max())
    return Recalibrated(name, mean, ratio)
