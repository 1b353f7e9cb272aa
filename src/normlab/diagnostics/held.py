"""Measuring a model without leaving a trace in it."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normlab.core.stored import StoringLayer, keeps_statistics

Mode = Literal["train", "stored", "eval", "as_is"]
MODES: tuple[Mode, ...] = ("train", "stored", "eval", "as_is")


@contextlib.contextmanager
def held(model: nn.Module, mode: Mode = "as_is") -> Iterator[nn.Module]:
    """Put a model into a mode; on leaving, put back all that its modules hold, bit for bit.

    Parameters, buffers, attributes, modes, containers of a module's own, however deep: whatever a
    forward pass may write to. It takes the memory of a copy of the model.

    Args:
        model: Any module.
        mode: ``"train"``: every module as in training, so that normalizers take the batch's
            statistics and dropout drops. ``"stored"``: as in training, but normalizers that store
            statistics use the stored ones. ``"eval"``: as in evaluation. ``"as_is"``: each module
            as it stands.

    Yields:
        The model.

    Raises:
        ValueError: If the mode is another word.

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> with held(layer, "train"):
        ...     _ = layer(torch.randn(5, 2))
        >>> layer.running_mean
        tensor([0., 0.])
    """
    if mode not in MODES:
        raise ValueError(f"mode is one of {', '.join(MODES)}; received {mode!r}")
    before = [_Snapshot(module) for module in model.modules()]
    try:
        _set(model, mode)
        yield model
    finally:
        for snapshot in before:
            snapshot.restore()


def _set(model: nn.Module, mode: Mode) -> None:
    if mode == "as_is":
        return
    model.train(mode != "eval")
    for module in model.modules() if mode == "stored" else ():
        if isinstance(module, StoringLayer) and module.stored_names:
            module.use, module.update = "stored", False
        elif keeps_statistics(module):
            module.eval()


class _Snapshot:
    """What a module holds: attributes, and in them containers and tensors, however deep."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(vars(module))
        self.containers: list[tuple[Any, Any]] = []
        self.tensors: list[tuple[Tensor, Tensor]] = []
        seen: set[int] = set()
        waiting = list(self.attributes.values())
        while waiting:
            value = waiting.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if _plain(value):
                self.tensors.append((value, value.detach().clone()))
            elif isinstance(value, tuple):
                waiting += value
            elif _container(value):
                self.containers.append((value, value.copy()))
                waiting += value.values() if isinstance(value, dict) else value

    def restore(self) -> None:
        """Put everything back, into the same objects."""
        vars(self.module).clear()
        vars(self.module).update(self.attributes)
        for container, content in self.containers:
            if not _unchanged(container, content):  # some must not be written to at all
                container.clear()
                _filled(container, content)
        with torch.no_grad():
            for tensor, value in self.tensors:
                # Not where nothing was written: a graph that needs the tensor shall stay valid.
                if not _same(tensor, value):
                    tensor.copy_(value)


def _filled(container: Any, content: Any) -> None:
    container.extend(content) if hasattr(container, "extend") else container.update(content)


def _unchanged(container: Any, content: Any) -> bool:
    """Whether two containers hold the same objects in the same order."""

    def parts(value: Any) -> list[Any]:
        return [p for item in value.items() for p in item] if isinstance(value, dict) else [*value]

    a, b = parts(container), parts(content)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _container(value: Any) -> bool:
    return isinstance(value, list | dict | set | deque)


def _plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_meta and not is_lazy(value)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits."""
    if a.shape != b.shape:  # resized in place
        a.resize_(b.shape)
        return False
    return torch.equal(*(t.reshape(-1).contiguous().view(torch.uint8) for t in (a, b)))
