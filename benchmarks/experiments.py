"""The experiments behind docs/findings.md: each is one ``normlab compare``, resumable.

python benchmarks/experiments.py                     # what there is
python benchmarks/experiments.py filter-response     # run it, into records/filter-response
python benchmarks/experiments.py ic --out elsewhere
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from normlab.claims.experiments import EXPERIMENTS, command
from normlab.cli import main

RECORDS = Path(__file__).resolve().parent.parent / "records"


def run() -> int:
    """Read the command line and run; the status is that of ``normlab compare``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=EXPERIMENTS, help="experiment to run")
    parser.add_argument("--out", help="folder for its records")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    options = parser.parse_args()
    if options.name is None:
        for name, (title, words) in EXPERIMENTS.items():
            print(f"{name}\n    {title}\n    normlab compare {words}\n")
        return 0
    out = options.out or RECORDS / options.name
    sys.argv[1:] = [*command(options.name, out), "--workers", str(options.workers)]
    return main()


if __name__ == "__main__":
    sys.exit(run())
