"""Binary networks with batch norm, without it, and norm-free: the three arms of 2104.08215, small.

    python -m normlab.bench.binary --out runs/binary       # teacher, rates, 3 arms × 3 seeds
    python -m normlab.bench.binary --smoke --out elsewhere    # seconds: does it run at all?

A teacher is trained on fashion-mini; then each arm, in two stages, on the teacher's outputs. The
learning rate of each arm is the one of the grid with the best validation accuracy, by one run of a
seed of its own. Then `--seeds` runs an arm are tested. Each run is one file of JSON lines under
``<out>/runs``; what has ended is not run again, and an interrupted run goes on. ``summary.md`` is
written from these files alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import normlab as nl
from normlab import data as sets
from normlab.bench import stages
from normlab.bench.environment import environment
from normlab.bench.records import SCHEMA, Record, Store, write_text
from normlab.networks.binary import binary_layers
from normlab.networks.reactnet import ReActNetPlan

DATA, TEACHER, TUNE_SEED = "fashion-mini", "resnet:depth=8,width=8", 1000


@dataclass(frozen=True)
class Arm:
    """What differs between the arms, and nothing else does."""

    title: str
    norm: str
    norm_free: bool
    clip: float
    imagenet: float  # top-1 of ReActNet-A in 2104.08215, percent


ARMS = {
    "batch": Arm("batch norm", "batch", False, 0.0, 69.4),
    "none": Arm("nothing", "none", False, 0.0, 34.1),
    "norm_free": Arm("norm-free, clipped", "none", True, 0.02, 68.0),
}
SMOKE = {
    "width": 4, "stages": 2, "blocks": 1, "limit": 240, "batch_size": 20, "epochs": 0.5,
    "tune_epochs": 0.5, "teacher_epochs": 1.0, "seeds": 2, "lrs": [2e-3, 8e-3],
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """Return the command line's."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="all three")
    p.add_argument("--seeds", type=int, default=3, help="runs of each arm; 3")
    p.add_argument("--lrs", nargs="+", type=float, default=[5e-4, 2e-3, 8e-3, 3.2e-2])
    p.add_argument("--epochs", type=float, default=3.0, help="of each of the two stages; 3")
    p.add_argument("--tune-epochs", type=float, default=1.0, help="of each stage, in tuning; 1")
    p.add_argument("--teacher-epochs", type=float, default=4.0, help="4")
    p.add_argument("--layout", choices=("18", "a"), default="18", help="of ReActNet; 18")
    p.add_argument("--width", type=int, default=8, help="channels of the first stage; 8")
    p.add_argument("--stages", type=int, default=3, help="3")
    p.add_argument("--blocks", type=int, default=2, help="of each stage, at most; 2")
    p.add_argument("--batch-size", type=int, default=64, help="64")
    p.add_argument("--limit", type=int, default=0, help="images; 0 for all")
    p.add_argument("--threads", type=int, default=1, help="1")
    p.add_argument("--smoke", action="store_true", help="tiny, to see that it runs")
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    return p


class Experiment:
    """The data, the teacher and the runs."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.store = options, Store(options.out)
        data = self.data = sets.load(DATA)
        labels, chosen = data.train_labels, torch.arange(len(data.train_labels))
        if options.limit and options.limit < len(labels):
            chosen = sets.split(labels, options.limit, 0)[1]
        train, valid = (chosen[part] for part in sets.split(labels[chosen], 0.1, 0))
        tested = torch.arange(len(data.test_labels))
        if options.limit and options.limit < len(tested):
            tested = sets.split(data.test_labels, options.limit, 0)[1]
        images, shown = data.train_images, data.test_images
        self.train = stages.Samples(data.prepare(images[train]), labels[train])
        self.valid = stages.Samples(data.prepare(images[valid]), labels[valid])
        self.test = stages.Samples(data.prepare(shown[tested]), data.test_labels[tested])

    def teach(self) -> dict[str, Any]:
        """Train the teacher, or read it; the training samples gain its outputs."""
        o, data = self.options, self.data
        phase = stages.Phase(
            name="teacher", epochs=o.teacher_epochs, lr=5e-3, batch_size=o.batch_size, hard=1.0
        )

        def build() -> nn.Module:
            torch.manual_seed(0)
            factory = lambda c, **k: nl.norm("batch", c, **k)  # noqa: E731
            shape = data.image_shape
            return nl.networks.build(TEACHER, factory, classes=data.num_classes, image_shape=shape)

        teacher = stages.trained(build, [phase], self.train, seed=0, cache=o.out / "teacher.pt")
        soft = stages.logits_of(teacher, self.train.images)
        self.train = stages.Samples(self.train.images, self.train.labels, soft)
        score = stages.accuracy(teacher, self.test.images, self.test.labels)
        return {"network": TEACHER, "phase": asdict(phase), "test_accuracy": score}

    def plan(self, arm: str) -> ReActNetPlan:
        """The network of an arm."""
        o = self.options
        return ReActNetPlan(
            layout=o.layout,
            width=o.width,
            stages=o.stages,
            blocks=o.blocks,
            norm_free=ARMS[arm].norm_free,
        )

    def run(self, arm: str, lr: float, seed: int, purpose: str, teacher: dict[str, Any]) -> Record:
        """Train and record one run, unless that has been done.

        Raises:
            SystemExit: The folder holds a run of that name with other settings.
        """
        o, run_id = self.options, f"{purpose}-{arm}-{lr:g}-{seed}"
        length = o.tune_epochs if purpose == "tune" else o.epochs
        phases = stages.two_stages(
            epochs=(length, length), lr=lr, clip=ARMS[arm].clip, batch_size=o.batch_size
        )
        spec = {
            "arm": arm,
            "norm": ARMS[arm].norm,
            "plan": asdict(self.plan(arm)),
            "phases": [asdict(p) for p in phases],
            "lr": lr,
            "seed": seed,
            "purpose": purpose,
            "teacher": teacher,
            "data": {"name": DATA, "fingerprint": self.data.fingerprint()},
            "samples": [len(self.train.labels), len(self.valid.labels), len(self.test.labels)],
        }
        done = self.store.read(run_id)
        if done is not None and done.spec != spec:
            raise SystemExit(
                f"{self.store.path(run_id)} has other settings than asked for; "
                "choose another --out, or remove it"
            )
        if done is not None and done.outcome is not None:
            return done
        self.train_one(run_id, spec, phases, done is None)
        record = self.store.read(run_id)
        assert record is not None
        return record

    def train_one(
        self, run_id: str, spec: dict[str, Any], phases: Sequence[stages.Phase], new: bool
    ) -> None:
        """Train, and write the record's lines."""
        arm, seed, data = spec["arm"], spec["seed"], self.data
        network = stages.start(
            self.plan(arm),
            lambda c, **k: nl.norm(ARMS[arm].norm, c, **k),
            classes=data.num_classes,
            image_shape=data.image_shape,
            seed=seed,
        )
        if new:
            line = {"event": "start", "schema": SCHEMA, "spec": spec, "environment": environment()}
            line |= {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            line |= {"threads": torch.get_num_threads(), "describe": self.plan(arm).describe()}
            line |= {"parameters": sum(p.numel() for p in network.parameters())}
            line |= {"binary": sum(layer.weight.numel() for layer in binary_layers(network))}
            self.store.rewrite(run_id, [line])
        checkpoint = self.store.checkpoint(run_id)
        outcome = stages.train_phases(network, phases, self.train, seed=seed, checkpoint=checkpoint)
        end: dict[str, Any] = {"event": "end", **asdict(outcome)}
        parts = {"valid": self.valid} | ({"test": self.test} if spec["purpose"] == "test" else {})
        for name, part in parts.items():
            found = None
            if outcome.outcome == "finished":
                found = stages.accuracy(network, part.images, part.labels)
            if found is None:  # it decides nothing: counted as guessing
                end["outcome"], found = "diverged", 1 / data.num_classes
            end[f"{name}_accuracy"] = found
        self.store.append(run_id, end)


def best(records: Sequence[Record]) -> float:
    """The learning rate with the best validation accuracy; of equal ones, the smallest."""
    return float(max(records, key=lambda r: (r.end["valid_accuracy"], -r.spec["lr"])).spec["lr"])


def everything(options: argparse.Namespace) -> list[Record]:
    """All runs, in their order; the summary is written after each."""
    experiment = Experiment(options)
    teacher, records = experiment.teach(), []
    print(f"teacher: {teacher['test_accuracy']:.3f}", file=sys.stderr)

    def run(arm: str, lr: float, seed: int, purpose: str) -> Record:
        record = experiment.run(arm, lr, seed, purpose, teacher)
        records.append(record)
        shown = record.end.get("test_accuracy", record.end["valid_accuracy"])
        print(f"{record.id}: {record.outcome}, {shown:.3f}", file=sys.stderr, flush=True)
        write_text(options.out / "summary.md", summary(records))
        return record

    for arm in options.arms:
        lr = best([run(arm, lr, TUNE_SEED, "tune") for lr in options.lrs])
        for seed in range(options.seeds):
            run(arm, lr, seed, "test")
    return records


def summary(records: Sequence[Record]) -> str:
    """The records as text."""
    first = records[0]
    env, spec, (train, valid, test) = first.environment, first.spec, first.spec["samples"]
    minutes = sum(r.end["seconds"] for r in records) / 60
    lengths = {r.spec["purpose"]: [p["epochs"] for p in r.spec["phases"]] for r in records}
    facts = {
        "network": f"{first.start['describe']}: {first.start['parameters']} parameters, of which "
        f"{first.start['binary']} have one bit in stage 2 (first arm)",
        "data": f"{DATA}, {train} training, {valid} validation and {test} test images",
        "teacher": f"{spec['teacher']['network']}, test accuracy "
        f"{100 * spec['teacher']['test_accuracy']:.1f} %",
        "epochs of the two stages": "; ".join(f"{k} {v}" for k, v in lengths.items()),
        "machine": f"{env['cpu']}, {first.start['threads']} thread, torch {env['torch']}, "
        f"revision {env['revision']}, {minutes:.0f} minutes of steps",
    }
    parts = ["# Binary networks without batch norm", ""]
    parts += [f"- {k}: {v}" for k, v in facts.items()]
    parts += ["", "## Test accuracy, percent", "", *_tested(records)]
    parts += ["", "## Validation accuracy in tuning, percent", "", *_tuned(records)]
    return "\n".join([*parts, "", _SCALE.format(train=train)])


def _tested(records: Sequence[Record]) -> list[str]:
    """The arms, with the paper's numbers beside them."""
    rows = [
        "| arm | lr | mean | sd | least – most | n | diverged | paper, ImageNet |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, about in ARMS.items():
        found = [r for r in records if (r.spec["arm"], r.spec["purpose"]) == (arm, "test")]
        if not found:
            continue
        scores = [100 * r.end["test_accuracy"] for r in found]
        spread = f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else "–"
        broken = sum(r.outcome == "diverged" for r in found)
        rows.append(
            f"| {about.title} | {found[0].spec['lr']:g} | {statistics.mean(scores):.2f} | {spread} "
            f"| {min(scores):.2f} – {max(scores):.2f} | {len(scores)} | {broken} "
            f"| {about.imagenet} |"
        )
    return [*rows, "", "sd is over seeds, for weights and order of samples together."]


def _tuned(records: Sequence[Record]) -> list[str]:
    """The grid; an arm whose best rate lies at its edge is not tuned to the end."""
    tuned = [r for r in records if r.spec["purpose"] == "tune"]
    lrs = sorted({r.spec["lr"] for r in tuned})
    rows = [f"| arm | {' | '.join(f'{lr:g}' for lr in lrs)} |", "|---" * (len(lrs) + 1) + "|"]
    edges = []
    for arm, about in ARMS.items():
        found = {r.spec["lr"]: r for r in tuned if r.spec["arm"] == arm}
        if not found:
            continue
        cells = [
            f"{100 * found[lr].end['valid_accuracy']:.1f}" if lr in found else "" for lr in lrs
        ]
        rows.append(f"| {about.title} | {' | '.join(cells)} |")
        if len(lrs) > 1 and best(list(found.values())) in (lrs[0], lrs[-1]):
            edges.append(about.title)
    note = f"Best at the edge of the grid: {', '.join(edges)}." if edges else ""
    return [*rows, "", note] if note else rows


_SCALE = """\
## What this is not

The paper (2104.08215) trains ReActNet-A on ImageNet: 69.4 % with batch norm, 68.0 % norm-free,
34.1 % with nothing; and ReActNet-18 on CIFAR-10: 92.08 % norm-free, with batch norm about 92.31 %
(the paper tells the difference). Here everything is smaller: {train} gray images of 28×28, a
network of a few ten thousand weights, a few epochs a stage instead of 256, batches of 64 instead
of 256, no augmentation, a small residual network as the teacher instead of dm_nfnet_f0, and
learning rates tuned for each arm instead of 5e-4 for all. Shortcuts have real 1×1 convolutions,
the bookkeeping of variances is exact, and sign(0) is 1; the released code differs in all three,
and its scripts clip gradients in the other arms as well. Norm-free networks begin with features
several times smaller than the others', since the paper's bookkeeping leaves out what RPReLU takes;
a few epochs make up for less of that than 256. What can be compared is the order of the arms, not
the numbers.
"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line, the process's own by default.

    Raises:
        SystemExit: An option is unknown or missing.
    """
    options = parser().parse_args(argv)
    if options.smoke:
        vars(options).update(SMOKE)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    try:
        everything(options)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        return 130
    print(options.out / "summary.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
