"""How it is measured: interleaved rounds beside a copy, over inputs that no cache holds."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

import torch
from torch import Tensor, nn

from _cases import Build
from _cells import Cell, Place

ROTATION = 160e6  # bytes; several times the largest common last-level cache
ENOUGH = 10.0  # seconds: rounds of a cell end after them, but not before the third


class Inputs:
    """Tensors of one place, used in turn, so that each comes from memory and not from a cache."""

    def __init__(self, place: Place, rotation: float = ROTATION) -> None:
        first = place.tensor()
        count = max(2, -(-int(rotation) // first.nbytes))
        self.x = [first, *(place.tensor() for _ in range(count - 1))]
        self.dy = [place.tensor() for _ in range(count)]
        self.out = [torch.empty_like(x) for x in self.x]
        for x in self.x:
            x.requires_grad_()
        self._turn = 0

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next x, dy and destination of a copy."""
        self._turn = (self._turn + 1) % len(self.x)
        return self.x[self._turn], self.dy[self._turn], self.out[self._turn]


@dataclass
class Variant:
    """One timed layer; `error` ends its measurement, not that of others."""

    name: str
    layer: nn.Module | None = None
    error: str | None = None
    first_s: float | None = None
    saved: float | None = None
    forward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)


def cpu_time() -> bool:
    """Whether times are processor time, of all threads of this process, or else wall time.

    With one thread the two differ by the time that other processes took the processor away, which
    says nothing of the layer. Processor time needs a clock that resolves microseconds.
    """
    return sys.platform == "linux" and torch.get_num_threads() == 1


def now() -> float:
    """Seconds, on the clock of this run."""
    return time.process_time() if cpu_time() else time.perf_counter()


def page_faults() -> int:
    """Pages that the system gave to this process so far; 0 where it does not tell."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def forward(layer: nn.Module, inputs: Inputs) -> float:
    """Milliseconds of a forward pass in training mode, recording for a backward pass."""
    x, _, _ = inputs.next()
    start = now()
    layer(x)
    return (now() - start) * 1e3


def both(layer: nn.Module, inputs: Inputs) -> float:
    """Milliseconds of a forward pass and the gradients of x and all parameters."""
    x, dy, _ = inputs.next()
    parameters = list(layer.parameters())
    start = now()
    torch.autograd.grad(layer(x), [x, *parameters], dy)
    return (now() - start) * 1e3


def copy(inputs: Inputs) -> float:
    """Milliseconds of the floor: x is read once, as much is written."""
    x, _, out = inputs.next()
    source = x.detach()
    start = now()
    out.copy_(source)
    return (now() - start) * 1e3


def saved_ratio(layer: nn.Module, x: Tensor) -> float:
    """Bytes that wait for the backward pass, x included, parameters not, per byte of x."""
    own = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers()]}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)  # lives until all is counted, so that no address is used twice
    total = sum(kept.values())
    del y
    return total / x.nbytes


def attempt(variant: Variant, work: Callable[[], Any]) -> Any:
    """Do it; a failure is noted on the variant, which is then left out of what follows."""
    if variant.error is not None:
        return None
    try:
        return work()
    except Exception as error:  # whatever it is, the other cells go on
        variant.error = f"{type(error).__name__}: {str(error)[:500]}"
        return None


def prepared(name: str, build: Build, place: Place, inputs: Inputs) -> Variant:
    """Build a layer in the dtype of its input, and run it once: compilers work at that time."""
    variant = Variant(name)

    def start() -> None:
        variant.layer = build().to(getattr(torch, place.dtype)).train()
        begun = time.perf_counter()
        both(variant.layer, inputs)
        variant.first_s = time.perf_counter() - begun
        variant.saved = saved_ratio(variant.layer, inputs.next()[0])

    attempt(variant, start)
    return variant


def measure(cell: Cell, inputs: Inputs, rounds: int) -> list[dict[str, Any]]:
    """Measure a cell: one row for each variant."""
    variants = [prepared(n, build, cell.place, inputs) for n, build in cell.variants.items()]
    copies: list[float] = []
    done, begun = 0, time.perf_counter()
    gc.collect()
    gc.disable()  # a collection in the middle of a measurement is noise
    try:
        while done < rounds and (done < 3 or time.perf_counter() - begun < ENOUGH):
            shift = done % len(variants)  # no variant always comes after the same one
            for v in variants[shift:] + variants[:shift]:
                attempt(v, partial(one_round, v, inputs, copies))
            done += 1
    finally:
        gc.enable()
    return [row(cell, v, copies, done) for v in variants]


def one_round(variant: Variant, inputs: Inputs, copies: list[float]) -> None:
    """Time a copy, a forward pass, a copy, and a forward with a backward pass."""
    assert variant.layer is not None
    copies.append(copy(inputs))
    variant.forward.append(forward(variant.layer, inputs))
    copies.append(copy(inputs))
    before = page_faults()
    variant.both.append(both(variant.layer, inputs))
    variant.faults.append(page_faults() - before)


def row(cell: Cell, variant: Variant, copies: list[float], rounds: int) -> dict[str, Any]:
    """Sum up a variant; fields without a measurement are None."""
    place = cell.place
    found: dict[str, Any] = {
        "method": cell.case.name, "options": dict(cell.case.options),
        "shape": place.shape, "dims": list(place.dims), "dtype": place.dtype,
        "layout": place.layout, "variant": variant.name, "rounds": rounds,
        "target": cell.case.target(place.positions, place.last),
        "forward_ms": None, "both_ms": None, "copy_ms": None,
        "forward_ratio": None, "both_ratio": None,
        "page_faults": None, "saved_ratio": variant.saved,
        "first_call_s": variant.first_s, "error": variant.error,
    }  # fmt: skip
    if variant.error is None:
        floor = min(copies)
        found["forward_ms"], found["both_ms"] = spread(variant.forward), spread(variant.both)
        found["copy_ms"] = spread(copies)
        found["page_faults"] = int(median(variant.faults))
        once, both_ways = cell.case.floor
        found["forward_ratio"] = min(variant.forward) / (once * floor)
        found["both_ratio"] = min(variant.both) / (both_ways * floor)
    return found


def spread(times: list[float]) -> dict[str, float]:
    """Least and middle time; load from elsewhere shows in their distance."""
    return {"min": min(times), "median": median(times)}
