"""Times whole training steps of a small residual network with each normalization method in it.

    python benchmarks/steps.py                       # every case of _steps.py
    python benchmarks/steps.py --only adaptive_clip  # one, and what it is held against
    python benchmarks/steps.py --tiny --out elsewhere    # seconds: does it run at all?

A step is a forward pass, the loss, a backward pass and the optimizer. What is reported is its time
as a multiple of that of the same network without the method, in the same rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from layers import DTYPES, LAYOUTS, RECORDS, positive, settle


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--only", nargs="+", metavar="NAME", help="names of cases; all")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="float32")
    p.add_argument("--layout", choices=LAYOUTS, default="nchw", help="nchw")
    p.add_argument("--batch", type=positive, help="images in a batch; 128, or 4 with --tiny")
    p.add_argument("--rounds", type=positive, help="steps of each case; 12, or 2 with --tiny")
    p.add_argument("--threads", type=positive, default=1, help="1")
    p.add_argument("--tiny", action="store_true", help="a tiny network, to see that it runs")
    p.add_argument("--out", type=Path, default=RECORDS, metavar="DIR", help="records/")
    p.add_argument("--resume", action="store_true", help="do nothing where this run has its record")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = parser()
    options = command.parse_args(argv)
    options.rounds = options.rounds or (2 if options.tiny else 12)
    options.batch = options.batch or (4 if options.tiny else 128)
    settle(options.threads)
    # Only now: loading torch reads the settings.
    from _steps import chosen, run

    try:
        cases = chosen(options.only)
    except KeyError as error:
        command.error(error.args[0])
    return run(cases, options)


if __name__ == "__main__":
    sys.exit(main())
