"""How far layers in bfloat16 are from float64: normlab's, torch's, and formulas plainly written.

    python benchmarks/accuracy.py                      # methods with a target: seconds
    python benchmarks/accuracy.py --methods rms batch

Errors are in units of the rounding to bfloat16 of each element: up to 1 is what the exact result,
rounded, has. Each entry is that of y / of the input's gradient / of the worst parameter's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from layers import RECORDS, settle

LEGEND = """\
The largest error of an element, in units of its rounding to bfloat16: of y / of the gradient of the
input / of that of the worst parameter; more than 1 is **bold**. Then the largest error of a
gradient as a share of its largest element. Parameters in bfloat16. *normlab* is the layer,
*operations* the same without compiled kernels, *native* torch's own layer, and *plain* the formula
in torch operations as one would write it, in bfloat16 throughout."""


def main() -> int:
    """Check, print and write the record; return 1 where a gradient of normlab's is over 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="those with a target")
    parser.add_argument("--out", type=Path, default=RECORDS, metavar="DIR", help="records/")
    options = parser.parse_args()
    settle(1)
    # Only now: loading torch reads the settings.
    from _accuracy import CANCELLED, PLACES, check, table
    from _cases import COMPILED, LAST, cases
    from _record import header, load, replace, stem

    known = cases()
    unknown = [name for name in options.methods or () if name not in known]
    if unknown:
        parser.error(f"no row is called {', '.join(unknown)}")
    options.tiny, options.rounds = False, 1
    head = header("accuracy", options) | {"cancelled": CANCELLED}
    rows = [
        check(known[name], place)
        for name in options.methods or COMPILED
        for place in PLACES
        if not place.last or name in LAST
    ]
    env = head["environment"]
    title = f"# Accuracy in bfloat16, {head['date'][:10]}, {env['cpu']}"
    facts = f"torch {env['torch']}, normlab {env['normlab']}, revision {env['revision']}."
    text = "\n\n".join([title, facts, LEGEND, table(rows)]) + "\n"
    print(text)
    path = stem("accuracy", head, options.out)
    record = head | {"load_at_end": load(), "rows": rows}
    replace(path.with_name(path.name + ".json"), json.dumps(record, indent=1) + "\n")
    replace(path.with_name(path.name + ".md"), text)
    return int(any(v > 1 for row in rows for v in row["roundings"]["normlab"].values()))


if __name__ == "__main__":
    sys.exit(main())
