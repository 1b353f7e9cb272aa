"""Comparisons that several claims rest on: each is one ``normlab compare``, resumable."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path

from normlab.claims.claim import Scale

RESNET8 = "--network resnet:depth=8,width=8,version=2"

LEAGUE = (
    "none", "batch", "instance", "layer", "group", "rms", "position", "filter_response",
    "evonorm_b0", "evonorm_s0", "switchable", "batch_renorm", "l1_batch", "online", "power",
    "kalman_batch", "variance", "iterative", "dyt", "ic", "momentum_batch", "stochastic",
    "streaming", "representative_batch", "batch_channel", "batch_instance",
    "instance_enhanced_batch", "mode", "pixel", "ibn",
)  # fmt: skip

EXPERIMENTS = {
    "fashion-mini-sharing": (
        "Who shares statistics: 64 samples, or 8 samples of one class",
        "--normalizers none batch ic group instance filter_response batch_renorm "
        "--condition 64 8:class --network resnet:depth=8,width=16 --seeds 3 --epochs 1 "
        "--tune-epochs 0.3 --lrs 0.03 0.1 0.3 1 --points 5",
    ),
    "fashion-mini-ic": (
        "The independent-component layer and the usual order",
        "--normalizers batch ic --network resnet20 --epochs 2 --tune-epochs 0.5 "
        "--lrs 0.03 0.1 0.3 1 --points 8",
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
    "fashion-mini-micro": (
        "Few samples share statistics: renormalization and Kalman normalization",
        "--normalizers batch batch_renorm kalman_batch group "
        f"--condition 4 4:class {RESNET8} --epochs 1 --tune-epochs 0.5 "
        "--lrs 0.03 0.1 0.3 --points 4",
    ),
    "fashion-mini-preconditioning-dense": (
        "Preconditioning, batch normalization and plain descent",
        "--normalizers none batch preconditioning --network mlp:depth=3,width=100 "
        "--batch-size 1 60 --epochs 1 --tune-epochs 0.25 "
        "--lrs 0.001 0.003 0.01 0.03 0.1 0.3 1 3 --momentum 0 --seeds 8 --points 8",
    ),
    "fashion-mini-deviations": (
        "Other deviations than batch normalization's, and noise behind it",
        "--normalizers none batch noisy_batch l1_batch lp_batch:p=2 lp_batch:p=max "
        "--network cnn:depth=8,width=8 --epochs 1 --tune-epochs 0.5 --lrs 0.03 0.1 0.3 "
        "--seeds 8 --points 4",
    ),
    "fashion-mini-league": (
        "Thirty normalizers of activations: 64 or 4 samples share statistics",
        f"--normalizers {' '.join(LEAGUE)} --baseline batch --condition 64 4 {RESNET8} "
        "--seeds 3 --epochs 1 --tune-epochs 0.25 --lrs 0.03 0.1 0.3 1 --points 4",
    ),
    "fashion-mini-vit": (
        "Normalizers of transformers",
        "--normalizers none layer rms dyt --network vit:depth=4,width=32 --epochs 2 "
        "--tune-epochs 0.5 --lrs 0.03 0.1 0.3 --points 4",
    ),
    "fashion-mini-rescaling": (
        "Weight rescaling, weight decay and weight standardization",
        "--normalizers batch batch+rescaling batch+standardization --network resnet8 "
        "--epochs 3 --tune-epochs 1 --lrs 0.03 0.1 0.3 1 --points 8",
    ),
}
"""Title and options by name, at the cpu scale; records lie in the folder of that name."""

_RESNET20 = "--network resnet:depth=20,width=16,version=2"
GPU = {
    "fashion-mini-sharing": "--network resnet20 --epochs 20 --tune-epochs 3",
    "fashion-mini-ic": "--network resnet110 --epochs 60 --tune-epochs 6 --points 15",
    "fashion-mini-filter-response": f"{_RESNET20} --epochs 30 --tune-epochs 3",
    "fashion-mini-filter-response-one": f"{_RESNET20} --epochs 5 --tune-epochs 1",
    "fashion-mini-micro": f"{_RESNET20} --epochs 20 --tune-epochs 3",
    "fashion-mini-preconditioning-dense": "--epochs 5 --tune-epochs 1",
    "fashion-mini-deviations": "--network vgg:depth=11,head=vgg --augment none --epochs 21 "
    "--tune-epochs 3 --lrs 0.01 0.03 0.1 0.3",
    "fashion-mini-league": f"{_RESNET20} --epochs 10 --tune-epochs 1 --seeds 3",
    "fashion-mini-vit": "--network vit:depth=6,width=192 --epochs 60 --tune-epochs 6 "
    "--lrs 0.01 0.03 0.1 0.3 1",
    "fashion-mini-rescaling": "--network vgg16 --epochs 60 --tune-epochs 6",
}
"""What differs at the gpu scale: nearer to the papers' settings, on all of CIFAR-10."""

_ON_GPU = "--data cifar10 --device cuda --seeds 5"

# What makes any of them a matter of seconds: whether it runs.
_SMOKE = "--seeds 1 --epochs 0.1 --tune-epochs 0.1 --lrs 0.1 --points 1 --train-limit 200"


def options(name: str, scale: Scale) -> str | None:
    """The options of a comparison at a scale, of equal ones the last; None where it has none."""
    words = EXPERIMENTS[name][1]
    if scale == "cpu":
        return words
    if scale == "smoke":
        return f"{words} {_SMOKE}"
    return f"{words} {_ON_GPU} {GPU[name]}" if name in GPU else None


def records(name: str, scale: Scale) -> str:
    """Name of the folder of a comparison's records at a scale.

    Example:
        >>> [records("fashion-mini-ic", scale) for scale in ("cpu", "smoke", "gpu")]
        ['fashion-mini-ic', 'fashion-mini-ic-smoke', 'cifar10-ic']
    """
    if scale == "gpu":
        return f"cifar10-{name.removeprefix('fashion-mini-')}"
    return name if scale == "cpu" else f"{name}-{scale}"


def seeds(name: str, scale: Scale) -> int:
    """How many final runs each arm has."""
    words = shlex.split(options(name, scale) or "")
    given = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--seeds"]
    return int(given[-1]) if given else 3


def command(name: str, out: str | Path, scale: Scale = "cpu") -> list[str]:
    """Return the arguments of an experiment's ``normlab`` call."""
    words = options(name, scale)
    if words is None:
        raise ValueError(f"the comparison {name} has no scale {scale!r}")
    title = EXPERIMENTS[name][0]
    return ["compare", *shlex.split(words), "--out", str(out), "--title", title]


def run(name: str, scale: Scale, out: str | Path, workers: int = 2) -> None:
    """Run or resume a comparison.

    Raises:
        KeyboardInterrupt: If it was interrupted; finished runs are kept.
        RuntimeError: If it failed.
    """
    from normlab.cli import main

    workers = 1 if scale == "smoke" else workers  # starting another takes longer than the work
    with contextlib.redirect_stdout(sys.stderr):  # a table in between would not be JSON
        status = main([*command(name, out, scale), "--workers", str(workers)])
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise RuntimeError(f"the comparison {name} ended with status {status}")
