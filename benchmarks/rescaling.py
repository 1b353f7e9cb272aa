"""Two implicit biases of gradient descent on weights whose scale the next layer removes.

    python benchmarks/rescaling.py               # minutes: into records/rescaling-biases
    python benchmarks/rescaling.py --steps 40 --out elsewhere

A perceptron with batch normalization learns 400 images of fashion-mini, fewer than the 784 pixels:
their span has a complement, which no gradient of the first layer reaches. For each of three arms
(nothing, weight decay, rescaling) and three seeds, the norm of the first and of the second weight
matrix and the share ‖P⊥w‖/‖w‖ of the first one that lies outside the span of the inputs are
recorded along the run, with test accuracy at the end. Without momentum, so that what 2102.03497
derives is exact: ‖w‖ grows with every step, P⊥w stays; decay shrinks both; rescaling shrinks P⊥w.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normlab as nl
from normlab.bench.environment import environment
from normlab.bench.records import write_text
from normlab.weights.span import orthogonal_share

OUT = Path(__file__).resolve().parent.parent / "records" / "rescaling-biases"
ARMS = {"nothing": 0.0, "weight decay": 5e-3, "rescaling": 0.0}


def samples(images: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flat training and test images with their labels; balanced."""
    data = nl.data.load("fashion-mini")
    _, chosen = nl.data.split(data.train_labels, images, 0)
    train = data.prepare(data.train_images[chosen]).flatten(1)
    test = data.prepare(data.test_images).flatten(1)
    return train, data.train_labels[chosen], test, data.test_labels


def network(seed: int) -> nn.Sequential:
    """784 → 100 → 100 → 10 with batch normalization; its units start at length 1 in every arm."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(784, 100, bias=False), nl.BatchNorm(100), nn.ReLU(),
        nn.Linear(100, 100, bias=False), nl.BatchNorm(100), nn.ReLU(),
        nn.Linear(100, 10),
    )  # fmt: skip
    with torch.no_grad():
        for layer in (net[0], net[3]):
            layer.weight.div_(layer.weight.norm(dim=1, keepdim=True))
    return net


def look(net: nn.Sequential, inputs: Tensor, step: int) -> dict[str, float]:
    """Norms, and the share outside the span."""
    first, second = net[0].weight.detach(), net[3].weight.detach()
    share = float(orthogonal_share(net[0], inputs))
    norm = float(first.norm())
    return {
        "step": step,
        "norm_1": norm,
        "norm_2": float(second.norm()),
        "outside_share": share,
        "outside_norm": share * norm,
    }


def run(arm: str, seed: int, lr: float, steps: int, images: int) -> dict[str, Any]:
    """Train one network; return its curve and accuracies."""
    x, labels, test, test_labels = samples(images)
    net = network(seed)
    weights = [net[0].weight, net[3].weight]
    rest = [p for p in net.parameters() if all(p is not w for w in weights)]
    groups = [{"params": weights, "weight_decay": ARMS[arm]}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=lr)
    if arm == "rescaling":
        nl.weight("rescaling", net, example=x[:64]).attach(optimizer)
    generator = torch.Generator().manual_seed(seed)
    points = {round(steps * i / 20) for i in range(21)}
    curve = [look(net, x, 0)]
    for step in range(1, steps + 1):
        batch = torch.randperm(len(x), generator=generator)[:50]
        optimizer.zero_grad()
        F.cross_entropy(net(x[batch]), labels[batch]).backward()
        optimizer.step()
        if step in points:
            curve.append(look(net, x, step))
    net.eval()
    with torch.no_grad():
        right = (net(test).argmax(1) == test_labels).double().mean()
    return {"arm": arm, "seed": seed, "lr": lr, "curve": curve, "test_accuracy": float(right)}


def table(rows: list[dict[str, Any]], head: dict[str, Any]) -> str:
    """Write the summary in Markdown."""
    lines = [
        "# Implicit biases under weight decay and rescaling",
        "",
        f"{head['images']} images of fashion-mini, perceptron 784–100–100–10 with batch "
        f"normalization, {head['steps']} steps of SGD without momentum, batch 50, "
        f"learning rate {head['lr']:g}, n = {head['seeds']}; {head['environment']['cpu']}, torch "
        f"{head['environment']['torch']}. Mean over seeds, first → last step.",
        "",
        "| arm | ‖w₁‖ | ‖w₂‖ | ‖P⊥w₁‖ | ‖P⊥w₁‖/‖w₁‖ | test accuracy, % |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        cells = []
        for key in ("norm_1", "norm_2", "outside_norm", "outside_share"):
            ends = [statistics.mean(row["curve"][i][key] for row in mine) for i in (0, -1)]
            cells.append(f"{ends[0]:.3f} → {ends[1]:.3f}")
        scores = [100 * row["test_accuracy"] for row in mine]
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        cells.append(f"{statistics.mean(scores):.1f}{spread}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line, run all arms, and write record and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if not 0 < options.lr < math.inf or min(options.steps, options.seeds) < 1:
        parser.error("--lr is positive; --steps and --seeds are at least 1")
    head = {"schema": 1, "kind": "rescaling", "environment": environment()}
    head |= {k: v for k, v in vars(options).items() if k != "out"}
    rows = []
    for arm in ARMS:
        for seed in range(options.seeds):
            rows.append(run(arm, seed, options.lr, options.steps, options.images))
            print(f"{arm}, seed {seed}: {rows[-1]['test_accuracy']:.3f}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "runs.json", json.dumps({**head, "rows": rows}, indent=1) + "\n")
    text = table(rows, head)
    write_text(options.out / "summary.md", text)
    print(text)


if __name__ == "__main__":
    main()
