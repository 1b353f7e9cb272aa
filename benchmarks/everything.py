"""Runs the benchmarks one after the other, and goes on where an earlier run was interrupted.

    python benchmarks/everything.py            # `make bench`: two or three hours, into records/
    python benchmarks/everything.py --short    # `make bench-short`: two minutes, prints its tables

Threads and allocator are fixed when a process starts, so each part is a process of its own: layers
with one thread and with two, where there are two cores, training steps, accuracy in bfloat16, runs
with `nl.Recorder`, and what a call costs, which is printed alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHORT_LAYERS = ["--methods", "batch", "filter_response", "group", "rms", "--shapes", "A"]
SHORT_STEPS = ["--only", "batch", "filter_response", "group", "native batch"]


def parts(short: bool, out: Path, cores: int) -> list[list[str]]:
    """The command lines, without the interpreter.

    Args:
        short: Few methods at one shape in few rounds, and tables printed.
        out: Where records go.
        cores: How many cores there are; with one, nothing runs with two threads.
    """
    counts = ("1", "2") if cores > 1 else ("1",)
    if short:
        lines = [["layers.py", *SHORT_LAYERS, "--rounds", "3", "--show", "--threads", n]
                 for n in counts]  # fmt: skip
        lines.append(["steps.py", *SHORT_STEPS, "--rounds", "3"])
    else:
        every = ["--shapes", "A", "B", "C", "D", "--compile", "--resume"]
        # Of the other methods one thread tells enough.
        lines = [["layers.py", *every, *["--targets"] * (n != "1"), "--threads", n]
                 for n in counts]  # fmt: skip
        lines += [
            ["steps.py", "--dtype", dtype, "--layout", layout, "--threads", n, "--resume"]
            for n in counts
            for dtype in ("float32", "bfloat16")
            for layout in ("nchw", "channels_last")
        ]
    lines += [["accuracy.py"], ["recorder.py", *["--only", "mlp", "--rounds", "2"] * short]]
    recorded = [[*line, "--out", str(out)] for line in lines]
    return [[str(HERE / script), *words] for script, *words in [*recorded, ["overhead.py"]]]


def run(line: list[str]) -> int:
    """Run a part to its end, which after Ctrl-C is when it has written what it has."""
    child = subprocess.Popen([sys.executable, *line])
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue  # the terminal has told the child too


def main() -> int:
    """Run all parts; return the worst exit status, or 130 at once after Ctrl-C."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="two minutes, to see and to print")
    parser.add_argument("--out", type=Path, metavar="DIR", help="records/; build/bench if short")
    options = parser.parse_args()
    root = HERE.parent
    out = options.out or (root / "build" / "bench" if options.short else root / "records")
    lines = parts(options.short, out, os.cpu_count() or 1)
    worst = 0
    for i, line in enumerate(lines, start=1):
        shown = " ".join([Path(line[0]).name, *line[1:]])
        print(f"== {i} of {len(lines)}: {shown}", file=sys.stderr, flush=True)
        status = run(line)
        if status in (130, -2):
            return 130
        worst = max(worst, abs(status))
    return worst


if __name__ == "__main__":
    sys.exit(main())
