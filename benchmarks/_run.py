"""Goes through the cells, shows progress, and writes what is there whenever it ends."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

import normlab as nl
from _cells import Cell, cells, places
from _record import Record
from _timing import ROTATION, Inputs, measure

Measured = tuple[Cell, list[dict[str, Any]]]


def unknown_methods(names: list[str]) -> list[str]:
    """Names that the catalogue does not have."""
    known = nl.catalogue("activation")
    return [name for name in names if name not in known]


def run(options: argparse.Namespace) -> int:
    """Measure what the options ask for; return the exit status."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    record = Record(options)
    total = sum(len(cells(options, place)) for place in places(options))
    if total == 0:
        print("nothing to measure: D takes layer, rms and dyt alone", file=sys.stderr)
        return 2
    return follow(measured(options), total, record, progress(total))


def measured(options: argparse.Namespace) -> Iterator[Measured]:
    """Measure place by place, so that only one place's tensors are alive."""
    for place in places(options):
        inputs = Inputs(place, 0 if options.short else ROTATION)
        for cell in cells(options, place):
            yield cell, measure(cell, inputs, options.rounds)


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
    status = 0
    try:
        for done, (cell, rows) in enumerate(results, start=1):
            record.add(rows)
            show(done, cell, rows)
            status |= any(row["error"] is not None for row in rows)
            if done % 20 == 0:
                record.write()
        record.complete = len(record.cells) == total
    except KeyboardInterrupt:
        print("\ninterrupted; what was measured is kept", file=sys.stderr)
        status = 130
    for path in record.write():
        print(path)
    return status


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
