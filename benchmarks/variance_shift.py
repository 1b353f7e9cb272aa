"""How far dropout upstream shifts the input variance of normalizers in evaluation.

    python benchmarks/variance_shift.py               # minutes, into records/variance-shift
    python benchmarks/variance_shift.py --steps 5 --out elsewhere

Networks with IC layers of several dropout rates are trained on fashion-mini, and then the variance
of what enters each batch normalization is measured in evaluation and in training mode. Within an IC
layer dropout comes after the normalization; it is the next layer's statistics that see its masks.
Beside them stands the unit that 1801.05134 warns of, dropout immediately before batch
normalization, where the ratio has a closed form.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded

import torch
from torch import nn
from torch.nn import functional as F

import normlab as nl
from normlab.bench.environment import environment
from normlab.bench.records import write_text
from normlab.networks import variance_shift

OUT = Path(__file__).resolve().parent.parent / "records" / "variance-shift"
RATES = (0.0, 0.05, 0.2, 0.5)


class DropoutBatch(nn.Module):
    """Dropout, then batch normalization: the order to avoid."""

    placement = "before_weight"

    def __init__(self, channels: int, rate: float) -> None:
        super().__init__()
        self.dropout, self.batch = nn.Dropout(rate), nl.BatchNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop and normalize."""
        return self.batch(self.dropout(x))


FORMS = {
    "ic": lambda rate: partial(nl.norm, "ic", dropout=rate),
    "dropout, then batch": lambda rate: partial(DropoutBatch, rate=rate),
}


def measure(form: str, rate: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one network; return the ratios of its layers."""
    data = nl.data.load("fashion-mini")
    torch.manual_seed(seed)
    net = nl.networks.build(
        options.network, FORMS[form](rate), classes=10, image_shape=data.image_shape
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    order = nl.data.batches(data.train_labels, 64, seed=seed, epoch=0)[: options.steps]
    for step, chosen in enumerate(order):
        for group in optimizer.param_groups:  # to 0, so that the stored statistics settle
            group["lr"] = 0.1 * (1 - step / len(order))
        optimizer.zero_grad()
        logits = net(data.prepare(data.train_images[chosen]))
        F.cross_entropy(logits, data.train_labels[chosen]).backward()
        optimizer.step()
    batches = [data.prepare(data.test_images[i : i + 250]) for i in range(0, 1000, 250)]
    shifts = variance_shift(net, batches)
    return {
        "form": form,
        "rate": rate,
        "seed": seed,
        "layers": [
            {"name": s.name, "measured": s.measured, "predicted": s.predicted} for s in shifts
        ],
    }


def table(rows: list[dict[str, Any]], head: dict[str, Any]) -> str:
    """Write the summary in Markdown."""
    lines = [
        "# Variance in evaluation over variance in training, at the inputs of batch normalization",
        "",
        f"{head['network']} on fashion-mini, {head['steps']} steps, n = {head['seeds']} seeds; "
        f"{head['environment']['cpu']}, torch {head['environment']['torch']}. Over layers and "
        "seeds; predicted by v/((c² + v)/p − c²) (1801.05134) where dropout stands just before.",
        "",
        "| unit | rate | least | mean | predicted, mean |",
        "|---|---|---|---|---|",
    ]
    for form in FORMS:
        for rate in RATES:
            layers = [
                layer
                for row in rows
                if (row["form"], row["rate"]) == (form, rate)
                for layer in row["layers"]
            ]
            ratios = [layer["measured"] for layer in layers]
            known = [layer["predicted"] for layer in layers if layer["predicted"] is not None]
            said = f"{statistics.mean(known):.3f}" if known else ""
            mean = statistics.mean(ratios)
            lines.append(f"| {form} | {rate:g} | {min(ratios):.3f} | {mean:.3f} | {said} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line, measure, and write record and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=168)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--network", default="resnet:depth=8,width=8")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    head = {"schema": 1, "kind": "variance shift", "environment": environment()}
    head |= {k: v for k, v in vars(options).items() if k != "out"}
    rows = [
        measure(form, rate, seed, options)
        for form in FORMS
        for rate in RATES
        for seed in range(options.seeds)
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "runs.json", json.dumps({**head, "rows": rows}, indent=1) + "\n")
    text = table(rows, head)
    write_text(options.out / "summary.md", text)
    print(text)


if __name__ == "__main__":
    main()
