"""The experiments behind docs/findings.md: each is one ``normlab compare``, resumable.

python benchmarks/experiments.py                     # what there is
python benchmarks/experiments.py filter-response     # run it, into records/filter-response
python benchmarks/experiments.py ic --out /tmp/ic    # elsewhere
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from normlab.cli import main

RECORDS = Path(__file__).resolve().parent.parent / "records"
RESNET8 = "--network resnet:depth=8,width=8,version=2"

EXPERIMENTS = {
    "fashion-mini-sharing": (
        "Who shares statistics: 64 samples, or 8 samples of one class",
        "--normalizers none batch ic group instance filter_response batch_renorm "
        "--condition 64 8:class --network resnet:depth=8,width=16 --seeds 3 --epochs 1 "
        "--tune-epochs 0.3 --lrs 0.03 0.1 0.3 1 --points 5",
    ),
    "fashion-mini-ic": (
        "The independent-component layer and the usual order, ResNet-20",
        "--normalizers batch ic --network resnet20 --epochs 2 --tune-epochs 0.5 "
        "--lrs 0.03 0.1 0.3 1 --points 8",
    ),
    "fashion-mini-ic-compositions": (
        "The three compositions of the independent-component layer, ResNet-20",
        "--normalizers batch ic ic:composition=ic-conv-relu ic:composition=conv-relu-ic "
        "--network resnet20 --epochs 2 --tune-epochs 0.5 --lrs 0.03 0.1 0.3 1 --points 8",
    ),
    "fashion-mini-ic-deep": (
        "The independent-component layer and the usual order, ResNet-56",
        "--normalizers batch ic --network resnet:depth=56,width=8 --epochs 1 "
        "--tune-epochs 0.5 --lrs 0.01 0.03 0.1 0.3 --points 8",
    ),
    "fashion-mini-filter-response": (
        "Batch size and filter response normalization",
        f"--normalizers batch group filter_response batch_renorm --condition 32 8 4 2 {RESNET8} "
        "--epochs 1 --tune-epochs 0.5 --lrs 0.03 0.1 0.3 1 --points 4",
    ),
    "fashion-mini-filter-response-one": (
        "One sample a normalization batch: batch and filter response normalization",
        f"--normalizers batch filter_response --condition 1 {RESNET8} "
        "--epochs 1 --tune-epochs 0.5 --lrs 0.03 0.1 0.3 1 --points 4",
    ),
    "fashion-mini-filter-response-long": (
        "Batch size and filter response normalization, three epochs",
        f"--normalizers batch group filter_response --condition 32 2 {RESNET8} "
        "--epochs 3 --tune-epochs 0.5 --lrs 0.03 0.1 0.3 --points 6",
    ),
    "fashion-mini-micro": (
        "Few samples share statistics: renormalization and Kalman normalization",
        "--normalizers batch batch_renorm kalman_batch group "
        f"--condition 4 4:class {RESNET8} --epochs 1 --tune-epochs 0.5 "
        "--lrs 0.03 0.1 0.3 --points 4",
    ),
    "fashion-mini-preconditioning-dense": (
        "Preconditioning, batch normalization and plain descent: dense network",
        "--normalizers none batch preconditioning --network mlp:depth=3,width=100 "
        "--batch-size 1 60 --epochs 1 --tune-epochs 0.25 "
        "--lrs 0.001 0.003 0.01 0.03 0.1 0.3 1 3 --momentum 0 --points 8",
    ),
    "fashion-mini-preconditioning-conv": (
        "Preconditioning, batch normalization and plain descent: convolutional network",
        "--normalizers none batch preconditioning --network cnn:depth=5,width=8 "
        "--batch-size 1 60 --epochs 1 --tune-epochs 0.25 "
        "--lrs 0.01 0.03 0.1 0.3 1 --momentum 0 --points 8",
    ),
    "fashion-mini-rescaling": (
        "Weight rescaling, weight decay and weight standardization",
        "--normalizers batch batch+rescaling batch+standardization --network resnet8 "
        "--epochs 3 --tune-epochs 1 --lrs 0.03 0.1 0.3 1 --points 8",
    ),
}


def command(name: str, out: str | None) -> list[str]:
    """Return the arguments of an experiment's ``normlab`` call."""
    title, options = EXPERIMENTS[name]
    place = ["--out", out or str(RECORDS / name), "--title", title]
    return ["compare", *shlex.split(options), *place]


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
    sys.argv[1:] = [*command(options.name, options.out), "--workers", str(options.workers)]
    return main()


if __name__ == "__main__":
    sys.exit(run())
