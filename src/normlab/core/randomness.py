"""Random numbers of a forward pass: the same again, and the caller's own untouched."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn


def _accelerators(model: nn.Module) -> set[torch.device]:
    return {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}


def _held(owners: Iterable[object]) -> Iterator[Any]:
    """Generators that objects keep as attributes of their own."""
    numpy = sys.modules.get("numpy")
    kinds = (torch.Generator, random.Random, *((numpy.random.Generator,) if numpy else ()))
    for owner in owners:
        yield from (value for value in vars(owner).values() if isinstance(value, kinds))


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    else:
        generator.bit_generator.state = type(generator.bit_generator)(seed).state


def _putting_back(generator: Any) -> Callable[[], object]:
    """What puts a generator back into the state that it is in now."""
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return lambda: generator.set_state(state)
    if isinstance(generator, random.Random):
        version = generator.getstate()
        return lambda: generator.setstate(version)
    bits, numbers = generator.bit_generator, generator.bit_generator.state
    return lambda: setattr(bits, "state", numbers)


def reseed(model: nn.Module, seed: int = 0) -> None:
    """Seed what a forward pass might draw from, and what `same_random_state` puts back.

    ``torch.manual_seed`` would seed accelerators that the model is not on as well.
    """
    for generator in _held(model.modules()):
        _seed(generator, seed)
    torch.default_generator.manual_seed(seed)
    for device in _accelerators(model):
        with torch.accelerator.device_index(device.index or 0):
            torch.get_device_module(device).manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


@contextlib.contextmanager
def same_random_state(model: nn.Module, *others: object) -> Iterator[None]:
    """Put back every generator that a forward pass might draw from.

    Args:
        model: Its modules may keep generators of their own.
        *others: Objects that may, too: a loader and its samplers.
    """
    own = [_putting_back(g) for g in _held([*model.modules(), *others])]
    places = _accelerators(model)
    kinds = sorted({d.type for d in places}) or ["cuda"]
    numpy = sys.modules.get("numpy")
    plain, arrays = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with contextlib.ExitStack() as stack:
            for kind in kinds:
                indices = [d.index or 0 for d in places if d.type == kind]
                stack.enter_context(torch.random.fork_rng(indices, device_type=kind))
            yield
    finally:
        for put_back in own:
            put_back()
        random.setstate(plain)
        if numpy is not None:
            numpy.random.set_state(arrays)
