"""Goes through the cells, shows progress, and writes what is there whenever it ends."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from _cases import LAST, cases
from _cells import Cell, cells, places
from _record import Record
from _timing import ROTATION, Inputs, measure

Measured = tuple[Cell, list[dict[str, Any]]]
SAVE_EVERY = 15.0  # seconds


def unknown_methods(names: list[str]) -> list[str]:
    """Names that are no row's."""
    known = cases()
    return [name for name in names if name not in known]


def run(options: argparse.Namespace) -> int:
    """Measure what the options ask for; return the exit status."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    asked = [cell for place in places(options) for cell in cells(options, place)]
    if not asked:
        print(f"nothing to measure: D takes {', '.join(LAST)} alone", file=sys.stderr)
        return 2
    record = Record(options)
    left = [cell for cell in asked if cell.key not in record.cells]
    if len(left) < len(asked):
        print(f"{len(asked) - len(left)} of {len(asked)} cells are in the record", file=sys.stderr)
    results = measured(left, options.rounds, 0 if options.tiny else ROTATION)
    status = follow(results, len(left), record, progress(len(left)))
    if options.show:
        print(record.text())
    return status


def measured(left: Iterable[Cell], rounds: int, rotation: float) -> Iterator[Measured]:
    """Measure place by place, so that only one place's tensors are alive."""
    for place, group in itertools.groupby(left, key=lambda cell: cell.place):
        inputs = Inputs(place, rotation)
        for cell in group:
            yield cell, measure(cell, inputs, rounds)
        del inputs  # before the next place's are made


def follow(
    results: Iterable[Measured], total: int, record: Record, show: Callable[..., None]
) -> int:
    """Collect rows; write the record at the end, on Ctrl-C, and from time to time before.

    Args:
        results: Cells with their rows.
        total: How many cells there will be.
        record: Where rows go.
        show: Called with the number of cells done, the cell and its rows.

    Returns:
        The exit status: 0, 1 where a variant failed, 130 after Ctrl-C.
    """
    done, saved, interrupted = 0, time.monotonic(), False
    try:
        for cell, rows in results:
            record.add(rows)
            done += 1
            show(done, cell, rows)
            if time.monotonic() - saved > SAVE_EVERY:
                record.write()
                saved = time.monotonic()
        record.complete = done == total
    except KeyboardInterrupt:
        print("\ninterrupted; what was measured is kept, --resume continues", file=sys.stderr)
        interrupted = True
    for path in record.write():
        print(path)
    return 130 if interrupted else int(record.errors > 0)


def progress(total: int) -> Callable[..., None]:
    """Return a function that prints a line for a measured cell."""
    begun = time.monotonic()

    def show(done: int, cell: Cell, rows: list[dict[str, Any]]) -> None:
        spent = time.monotonic() - begun
        left = spent / done * (total - done)
        seen = "  ".join(
            f"{r['variant']} {r['forward_ratio']:.1f}/{r['both_ratio']:.1f}"
            if r["error"] is None
            else f"{r['variant']} failed: {r['error'].splitlines()[0][:80]}"
            for r in rows
        )
        print(f"[{done}/{total}, {left:.0f} s left] {cell}: {seen}", file=sys.stderr, flush=True)

    return show
