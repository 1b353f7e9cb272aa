"""Random numbers of a forward pass: the same again, and the caller's own untouched."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator

import torch
from torch import nn


def _accelerators(model: nn.Module) -> set[torch.device]:
    return {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}


def reseed(model: nn.Module, seed: int = 0) -> None:
    """Seed what a forward pass might draw from, and what `same_random_state` puts back.

    ``torch.manual_seed`` would seed accelerators that the model is not on as well.
    """
    torch.default_generator.manual_seed(seed)
    for device in _accelerators(model):
        with torch.accelerator.device_index(device.index or 0):
            torch.get_device_module(device).manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


@contextlib.contextmanager
def same_random_state(model: nn.Module) -> Iterator[None]:
    """Put back every generator that a forward pass might draw from."""
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
        random.setstate(plain)
        if numpy is not None:
            numpy.random.set_state(arrays)
