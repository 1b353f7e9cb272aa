"""What watching a training run with `nl.Recorder` costs: whole runs with it and without.

    python benchmarks/recorder.py                    # minutes
    python benchmarks/recorder.py --only mlp
    python benchmarks/recorder.py --tiny --out elsewhere  # seconds: does it run at all?

A run is a fresh network, its optimizer and, in one of the two, a fresh recorder with its default
options; its steps are forward pass, loss, backward pass and optimizer, from the first one on. The
two alternate, in an order that alternates too. Reported is the time with the recorder as a multiple
of that without.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from layers import RECORDS, positive, settle

if TYPE_CHECKING:
    from torch import nn

    from normlab.diagnostics.recorder import Recorder

TARGET = 1.05


@dataclass(frozen=True)
class Case:
    """One kind of run.

    Attributes:
        name: Of the network.
        build: Makes it.
        shape: Of the input, batch first.
        steps: Of a run.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    steps: int


def cases(tiny: bool) -> list[Case]:
    """ResNet-20 with batch normalization, and two networks whose steps are short."""
    from functools import partial

    from torch import nn

    import normlab as nl

    def resnet(spec: str) -> nn.Module:
        return nl.networks.build(
            spec, partial(nl.norm, "batch"), classes=10, image_shape=(3, 32, 32)
        )

    def mlp(width: int) -> nn.Module:
        hidden = [nn.Linear(width, width), nl.BatchNorm(width), nn.ReLU()]
        return nn.Sequential(nn.Linear(32, width), nl.BatchNorm(width), nn.ReLU(), *hidden,
                             nn.Linear(width, 10))  # fmt: skip

    if tiny:
        return [Case("resnet20", lambda: resnet("resnet:depth=8,width=4"), (4, 3, 32, 32), 21),
                Case("mlp", lambda: mlp(8), (4, 32), 41)]  # fmt: skip
    return [
        Case("small mlp", lambda: mlp(16), (16, 32), 4000),
        Case("mlp", lambda: mlp(256), (128, 32), 1000),
        Case("resnet20", lambda: resnet("resnet20"), (128, 3, 32, 32), 40),
    ]


def run(case: Case, recorded: bool) -> tuple[float, float, Recorder | None]:
    """Train; return seconds on the clock of this process, wall seconds, and the recorder."""
    import torch
    from torch.nn import functional as F

    import normlab as nl
    from _timing import now

    torch.manual_seed(0)
    model = case.build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    x, y = torch.randn(case.shape), torch.randint(10, case.shape[:1])
    recorder = nl.Recorder(model) if recorded else None
    start, wall = now(), time.perf_counter()
    for _ in range(case.steps):
        optimizer.zero_grad()
        with nullcontext() if recorder is None else recorder.step(lr=1e-4) as step:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            if step is not None:
                step.loss = loss
        optimizer.step()
    return now() - start, time.perf_counter() - wall, recorder


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Time runs with and without, in turn; one row."""
    times: dict[bool, list[float]] = {True: [], False: []}
    walls: dict[bool, list[float]] = {True: [], False: []}
    moments, stated = [], []
    gc.collect()
    for turn in range(rounds):
        for recorded in (False, True) if turn % 2 else (True, False):
            seconds, wall, recorder = run(case, recorded)
            times[recorded].append(seconds)
            walls[recorded].append(wall)
            if recorder is not None:
                moments.append(len(recorder.moments))
                stated.append(recorder.spent / wall)
    ratios = [a / b for a, b in zip(times[True], times[False], strict=True)]
    return {
        "case": case.name, "shape": list(case.shape), "steps": case.steps,
        "step_ms": min(times[False]) / case.steps * 1e3,
        "ratio": min(times[True]) / min(times[False]),
        "median_ratio": median(ratios), "ratios": ratios,
        "wall_ratio": min(walls[True]) / min(walls[False]),
        "moments": median(moments), "stated_share": median(stated), "target": TARGET,
    }  # fmt: skip


def markdown(record: dict[str, Any]) -> str:
    """Return the record as text."""
    env = record["environment"]
    lines = [f"# Training runs with nl.Recorder, {record['date'][:10]}, {env['cpu']}", ""]
    lines += ["**Tiny networks: these times say nothing.**", ""] if record["tiny"] else []
    lines += [
        f"- command: `{record['command']}`",
        f"- threads: {record['threads']} of {env['cores']} cores",
        f"- versions: torch {env['torch']}, normlab {env['normlab']}, revision {env['revision']}",
        f"- load: {record['load_at_start']} to {record['load_at_end']}",
        f"- rounds: {record['rounds']}, {record['clock']}",
        "",
        "Times of whole runs with the recorder over those without: of the least of all rounds, the "
        "middle of the rounds' own ratios, and the least by the clock on the wall. *Stated* is "
        "what the recorder says that it spent.",
        "",
        "| network | input | steps | ms | moments | ratio | median | wall | stated | target |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in record["rows"]:
        shape = "×".join(map(str, r["shape"]))
        ratio = f"{r['ratio']:.3f}" if r["ratio"] <= r["target"] else f"**{r['ratio']:.3f}**"
        lines.append(
            f"| {r['case']} | {shape} | {r['steps']} | {r['step_ms']:.3g} | {r['moments']:g} "
            f"| {ratio} | {r['median_ratio']:.3f} | {r['wall_ratio']:.3f} "
            f"| {r['stated_share']:.3f} | ≤ {r['target']} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the record; return the exit status."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--only", nargs="+", metavar="NAME", help="names of networks; all")
    p.add_argument("--rounds", type=positive, help="pairs of runs; 5, or 2 with --tiny")
    p.add_argument("--threads", type=positive, default=1, help="1")
    p.add_argument("--tiny", action="store_true", help="tiny networks, to see that it runs")
    p.add_argument("--out", type=Path, default=RECORDS, metavar="DIR", help="records/")
    options = p.parse_args(argv)
    options.rounds = options.rounds or (2 if options.tiny else 5)
    settle(options.threads)
    # Only now: loading torch reads the settings.
    import torch

    from _record import header, load, replace, stem

    torch.set_num_threads(options.threads)
    known = {case.name: case for case in cases(options.tiny)}
    unknown = [name for name in options.only or () if name not in known]
    if unknown:
        p.error(f"no case is called {', '.join(unknown)}; there are: {', '.join(known)}")
    head = header("recorder", options)
    path, rows = stem("recorder", head, options.out), []
    for name in options.only or known:
        rows.append(measure(known[name], options.rounds))
        record = head | {"load_at_end": load(), "rows": rows}
        # After each of them, so that Ctrl-C keeps what was measured.
        replace(path.with_name(path.name + ".json"), json.dumps(record, indent=1) + "\n")
        replace(path.with_name(path.name + ".md"), markdown(record))
    print(markdown(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
