"""Times every activation layer against a copy of its input, torch's own layers and the compiler.

    python benchmarks/layers.py                      # all methods, shapes A, B and D
    python benchmarks/layers.py --compile            # and torch.compile of those with a target
    python benchmarks/layers.py --tiny --out elsewhere    # seconds: does it run at all?

What is measured, and how, stands in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

SHAPES, DTYPES, LAYOUTS = "ABCD", ("float32", "bfloat16"), ("nchw", "channels_last")
RECORDS = Path(__file__).resolve().parent.parent / "records"


def settings(threads: int) -> dict[str, str]:
    """Environment that a measurement needs, read by libraries when they are loaded.

    glibc maps, page-faults and unmaps every result over 32 MB, which costs several times what the
    layers do; without mapping and trimming, memory is taken once and used again.
    """
    return {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }


def settle(threads: int) -> None:
    """Start this process again under `settings`, unless it runs under them."""
    wanted = settings(threads)
    if sys.platform == "win32" or all(os.environ.get(k) == v for k, v in wanted.items()):
        return  # Windows has no exec that keeps the process; the record shows what was in force
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--methods", nargs="+", metavar="NAME", help="rows: names of the catalogue; all")
    p.add_argument(
        "--targets", action="store_true", help="only rows that --compile takes by itself"
    )
    p.add_argument("--shapes", nargs="+", choices=SHAPES, default=list("ABD"), help="A B D")
    p.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="both")
    p.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="both")
    p.add_argument(
        "--compile", nargs="*", metavar="NAME", help="also torch.compile; of those with a target"
    )
    p.add_argument("--compile-shapes", nargs="+", choices=SHAPES, help="where to compile; all")
    p.add_argument("--no-native", action="store_true", help="leave torch's own layers out")
    p.add_argument("--rounds", type=positive, help="rounds of each cell; 15, or 2 with --tiny")
    p.add_argument("--threads", type=positive, default=1, help="1")
    p.add_argument("--tiny", action="store_true", help="tiny tensors, to see that it runs")
    p.add_argument("--out", type=Path, default=RECORDS, metavar="DIR", help="records/")
    p.add_argument("--resume", action="store_true", help="continue the record of such a run")
    p.add_argument("--show", action="store_true", help="print the table at the end")
    return p


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"at least 1; received {text}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = parser()
    options = command.parse_args(argv)
    options.rounds = options.rounds or (2 if options.tiny else 15)
    settle(options.threads)
    # Only now: loading torch reads the settings.
    from _cases import COMPILED
    from _run import run, unknown_methods

    if options.targets and options.methods is None:
        options.methods = list(COMPILED)
    unknown = unknown_methods([*(options.methods or []), *(options.compile or [])])
    if unknown:
        command.error(f"the catalogue has no {', '.join(unknown)}")
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
