"""Tools of the laws: seeds, states, and the distance between tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Factory = Callable[[int], nn.Module]


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Set the seed of torch's generators for a block, and put their state back after it."""
    cuda: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(range(torch.cuda.device_count()) if cuda else []):
        # Not torch.manual_seed: that would also seed generators that were not saved above.
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed_all(seed)
        yield


def state(layer: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, those left out of the state dict too."""
    named = [*layer.named_parameters(), *layer.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Names whose tensors differ in any bit, with how far; NaN equals NaN."""
    found = list(before.keys() ^ after.keys())
    for name in before.keys() & after.keys():
        a, b = before[name], after[name]
        if a.shape != b.shape or not ((a == b) | ((a != a) & (b != b))).all():
            found.append(f"{name} by {gap(b, a):.2g}")
    return sorted(found)


def gap(actual: Tensor, expected: Tensor) -> float:
    """max|actual − expected| / max(1, max|expected|); infinite for other shapes and for NaN."""
    if actual.shape != expected.shape:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    a, b = actual.detach().double(), expected.detach().double()
    value = ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()
    return value if math.isfinite(value) else math.inf


def direction(like: Tensor, seed: int = 7) -> Tensor:
    """A fixed random tensor of that shape, the same for every memory layout."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def build(factory: Factory, channels: int) -> nn.Module:
    """Call the factory.

    Raises:
        TypeError: If it does not return a module.
    """
    layer = factory(channels)
    if not isinstance(layer, nn.Module):
        raise TypeError(f"factory({channels}) returns a layer; received {type(layer).__name__}")
    return layer
