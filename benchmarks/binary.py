"""Binary networks with batch norm, without it, and norm-free: see `normlab.bench.binary`.

python benchmarks/binary.py                    # teacher, learning rates, 3 arms × 3 seeds
python benchmarks/binary.py --smoke --out elsewhere   # seconds: does it run at all?
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded

from normlab.bench.binary import main

OUT = Path(__file__).resolve().parent.parent / "records" / "binary-fashion-mini"

if __name__ == "__main__":
    sys.exit(main(["--out", str(OUT), *sys.argv[1:]]))
