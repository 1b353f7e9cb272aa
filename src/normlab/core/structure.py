"""What is inside: models in wrappers, tensors and numbers in nested containers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor, nn


def inner(model: nn.Module) -> nn.Module:
    """What was compiled, or is copied to several devices; its names are those of checkpoints."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply a function to the tensors in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        return function(value)
    if is_dataclass(value) and not isinstance(value, type):  # in transformers a mapping, too
        parts = {f.name: mapped(getattr(value, f.name), function) for f in fields(value) if f.init}
        return replace(value, **parts)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(v, function) for v in value))
    if isinstance(value, tuple | list):
        return type(value)(mapped(v, function) for v in value)
    if isinstance(value, Mapping):
        return {k: mapped(v, function) for k, v in value.items()}
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """Walk over the tensors in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))


def plain(value: Any, *, derived: bool = False) -> Any:
    """Nested values as those of JSON: what is not finite becomes a word.

    Args:
        value: Tensors, numbers, containers, dataclasses.
        derived: Whether properties of dataclasses are put in beside their fields.

    Example:
        >>> plain({"a": (1, float("nan")), 2: None})
        {'a': [1, 'nan'], '2': None}
    """
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(k): plain(v, derived=derived) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, derived=derived) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    names = [f.name for f in fields(value)]
    if derived:
        names += [n for n, v in vars(type(value)).items() if isinstance(v, property)]
    return {name: plain(getattr(value, name), derived=derived) for name in names}
