"""``normlab compare``: the main job."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from normlab.bench.plan import Plan
    from normlab.bench.recipe import Condition, Recipe
    from normlab.data import ImageData


@dataclass(frozen=True)
class Compare:
    """Train one network with several normalizers on real data, fairly, and write a report.

    Finished runs are kept in --out: the same command goes on where it was stopped.
    """

    normalizers: tuple[str, ...] = ("none", "batch", "ic", "group", "filter_response")
    """Methods of the catalogue, with options as in group:groups=4."""
    baseline: str | None = None
    """The one that the others are held against; default: batch, or else the first."""
    network: str = "resnet8"
    """mlp, cnn10, vgg11, resnet20, resnet:depth=8,width=8,version=2, …, or package.module:callable,
    which is called with a factory norm(channels)."""
    data: str = "fashion-mini"
    """fashion-mini (part of the package), fashion-mnist, cifar10, cifar100 or folder."""
    data_dir: str | None = None
    """Where the data set lies; default: the environment variable NORMLAB_DATA_DIR."""
    image_size: int | None = None
    """Side length that images of a folder are scaled and cropped to."""
    batch_size: tuple[int, ...] = (64,)
    """Samples of an optimizer step."""
    norm_batch: tuple[int, ...] = ()
    """Samples that share statistics (the optimizer's batch is split, gradients accumulate);
    default: the whole batch."""
    composition: tuple[Literal["iid", "class"], ...] = ("iid",)
    """Whether the samples that share statistics are i.i.d. or of one class."""
    condition: tuple[str, ...] = ()
    """Conditions one by one instead of the grid of --norm-batch and --composition: 64, 8:class."""
    seeds: int = 3
    """Final runs of each arm."""
    epochs: float = 3.0
    """Passes over the training data in a final run."""
    tune_epochs: float | None = None
    """Passes in a tuning run; default: as many."""
    lrs: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    """Learning rates to tune over, for each normalizer and condition."""
    train_limit: int | None = None
    """Train on that many images only (balanced)."""
    validation: float = 0.1
    """Share of the training data held out for tuning."""
    weight_decay: float = 5e-4
    """On weights; scales, shifts and biases have none."""
    momentum: float = 0.9
    """Of the optimizer."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises from 0."""
    augment: Literal["default", "none", "crop-flip"] = "default"
    """Random crops (4 pixels) and flips; the default is both for CIFAR, none otherwise."""
    points: int = 6
    """Measurements along each run."""
    out: str = "runs/compare"
    """Folder for records and the report."""
    workers: int = 2
    """Worker processes."""
    threads: int = 1
    """Torch threads of each worker; small networks are fastest with one."""
    device: str = "cpu"
    """Where networks train: cpu, or cuda (cuda:1, …) for a GPU that all workers share."""
    title: str = ""
    """Heading of the report."""
    json: bool = False
    """Print the comparison as JSON instead of a table."""

    def run(self) -> int:
        """Run the comparison.

        Returns:
            The exit status: 130 if it was interrupted.

        Raises:
            PlanError: If it cannot be run as asked.
            DataError: If the data cannot be read.
            StoreError: If records cannot be written.
        """
        from normlab.bench.compare import Machine, compare
        from normlab.commands.progress import Watch

        if min(self.workers, self.threads, self.seeds) < 1:
            raise ValueError("workers, threads and seeds are at least 1")
        path = [os.getcwd()] if ":" in self.network else []
        sys.path[:0] = [p for p in path if p not in sys.path]
        # A scheduler's request to end is Ctrl-C by another name: checkpoint, report, go on later.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        device = usable(self.device)
        plan = self.plan()
        machine = Machine(
            self.workers, self.threads, self.data_dir, self.image_size, tuple(path), device
        )
        with Watch(quiet=self.json) as watch:
            result, complete = compare(plan, self.out, machine=machine, watcher=watch)
        show_result(result, self.out, self.json)
        if not complete:
            print("Interrupted: the same command goes on from here.", file=sys.stderr)
            return 130
        return 0

    def conditions(self) -> tuple[Condition, ...]:
        """Return who shares statistics, from either way of saying it."""
        from normlab.bench.recipe import Condition, PlanError

        found = []
        for text in self.condition:
            size, _, composition = text.partition(":")
            if not size.isdecimal():
                raise PlanError(f"a condition reads 8 or 8:class; received {text!r}")
            kind: Any = composition or "iid"
            found += [Condition(b, int(size), kind) for b in self.batch_size]
        if found:
            return tuple(found)
        for batch in self.batch_size:
            for kind in self.composition:
                sizes = self.norm_batch or (batch,)
                # A whole batch of one class would be another optimization problem.
                # One sample is of one class anyway.
                usable = [n for n in sizes if kind == "iid" or 1 < n <= batch // 2]
                found += [Condition(batch, n, kind) for n in usable]
        if not found:
            raise PlanError(
                "no condition is left: composition 'class' needs --norm-batch of at most half "
                "the batch"
            )
        return tuple(dict.fromkeys(found))

    def recipe(self) -> Recipe:
        """Return how networks are trained."""
        from normlab.bench.recipe import Recipe

        crops = self.augment == "crop-flip" or (
            self.augment == "default" and self.data.startswith("cifar")
        )
        return Recipe(
            epochs=self.epochs,
            tune_epochs=self.epochs if self.tune_epochs is None else self.tune_epochs,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            lrs=tuple(sorted(set(self.lrs))),
            validation=self.validation,
            train_limit=self.train_limit,
            crop=4 if crops else 0,
            flip=crops,
            points=self.points,
        )

    def plan(self) -> Plan:
        """Return what these options mean; reads the data set."""
        from normlab import data as sets
        from normlab import networks
        from normlab.bench.plan import Plan

        data = sets.load(self.data, self.data_dir, size=self.image_size)
        default = "batch" if "batch" in self.normalizers else self.normalizers[0]
        return Plan(
            data=self.data,
            fingerprint=data.fingerprint(),
            network=self.network,
            normalizers=self.normalizers,
            baseline=self.baseline or default,
            conditions=self.conditions(),
            seeds=tuple(range(self.seeds)),
            recipe=self.recipe(),
            title=self.title,
            code=networks.source_digest(self.network),
            command=shlex.join(["normlab", *sys.argv[1:]]),
            facts=_facts(self, data),
        )


def usable(device: str) -> str:
    """A device that networks can train on here.

    Args:
        device: As torch names it.

    Returns:
        The same.

    Raises:
        ValueError: If torch knows no such device, or finds none.
    """
    import torch

    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        kind, index = device, 0
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"networks train on cpu or cuda; received the device {device!r}")
    if kind == "cuda" and index >= (found := torch.cuda.device_count()):
        raise ValueError(
            f"the device {device!r} needs a GPU, and torch finds {found or 'none'} here; "
            "'normlab doctor' says what there is"
        )
    return device


def _facts(options: Compare, data: ImageData) -> dict[str, Any]:
    """What the report says of the data and the network."""
    from normlab import networks

    train = min(options.train_limit or len(data.train_labels), len(data.train_labels))
    valid = round(options.validation * train)
    return {
        "title": data.title,
        "data": {
            "title": data.title,
            "train": train - valid,
            "valid": valid,
            "test": len(data.test_labels),
            "classes": data.num_classes,
            "note": data.note,
        },
        "network": {"description": networks.describe(options.network)},
    }


def show_result(comparison: dict[str, Any], out: str, as_json: bool) -> None:
    """Print a comparison, and where its report is.

    Args:
        comparison: As `normlab.bench.compare.report` returns it.
        out: The record folder.
        as_json: Print JSON alone.
    """
    from normlab.cli import print_json

    if as_json:
        print_json(comparison)
        return
    from rich.console import Console
    from rich.text import Text

    from normlab.report import terminal_table

    console = Console()
    console.print(terminal_table(comparison))
    for sentence in comparison["summary"]:
        console.print(Text(f"• {sentence}"))
    console.print(Text(f"Report: {Path(out) / 'report.html'}", style="bold"))
