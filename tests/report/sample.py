"""A made-up comparison that looks like a real one: what the report's tests draw."""

from __future__ import annotations

import math
import random
from typing import Any

# label: final accuracy under the two conditions, milliseconds per step, MiB saved for backward
ARMS = {
    "none": (0.846, 0.845, 9.1, 41.0),
    "batch": (0.894, 0.552, 11.9, 58.0),
    "ic": (0.884, 0.571, 13.0, 66.0),
    "group": (0.881, 0.882, 12.7, 58.5),
    "filter_response": (0.886, 0.885, 12.1, 57.0),
    "batch_renorm": (0.887, 0.803, 14.6, 58.0),
}
ABOUT = {
    "none": ("No normalization", {}, None),
    "batch": ("Batch normalization", {"momentum": 0.1}, "n c * -> c (n *)"),
    "ic": ("Independent components", {"drop": 0.05}, "n c * -> c (n *)"),
    "group": ("Group normalization", {"groups": 8}, "n (g c) * -> (n g) (c *)"),
    "filter_response": ("Filter response normalization", {}, "n c * -> (n c) (*)"),
    "batch_renorm": ("Batch renormalization", {"rmax": 3.0, "dmax": 5.0}, "n c * -> c (n *)"),
}
GRID = (0.003, 0.01, 0.03, 0.1, 0.3)
EPOCHS = 12


def curve(draw: random.Random, goal: float, seed: int, speed: float) -> dict[str, Any]:
    epochs = range(1, EPOCHS + 1)
    shares = [1 - math.exp(-epoch / speed) for epoch in epochs]
    return {
        "seed": seed,
        "epoch": list(epochs),
        "step": [150 * epoch for epoch in epochs],
        "train_loss": [
            2.3 * (1 - s) + 0.35 * (1 - goal) + draw.uniform(0.01, 0.03) for s in shares
        ],
        "valid_accuracy": [0.1 + (goal - 0.1) * s + draw.gauss(0, 0.006) for s in shares],
        "valid_loss": [2.3 * (1 - s) + 1 - goal for s in shares],
    }


def tuning(draw: random.Random, label: str, goal: float) -> list[dict[str, Any]]:
    best = 0.01 if label == "none" else 0.1
    trials = []
    for lr in GRID:
        lost = label == "none" and lr >= 0.1
        value = goal - 0.03 * math.log10(lr / best) ** 2 + draw.gauss(0, 0.003)
        trials.append(
            {
                "lr": lr,
                "valid_accuracy": None if lost else value,
                "outcome": "diverged" if lost else "finished",
            }
        )
    return trials


def arm(label: str, condition: str, seeds: int) -> dict[str, Any]:
    draw = random.Random(f"{label} {condition}")
    goal = ARMS[label][0 if condition == "iid64" else 1]
    milliseconds, mebibytes = ARMS[label][2:]
    lost = 1 if (label, condition) == ("none", "class8") else 0
    values = [goal + draw.gauss(0, 0.004) for _ in range(seeds - lost)]
    base = ARMS["batch"][0 if condition == "iid64" else 1]
    mean = sum(values) / max(len(values), 1)
    difference = {"mean": mean - base, "low": min(values, default=0) - base - 0.003, "p": 0.031}
    difference |= {"high": max(values, default=0) - base + 0.003, "n": len(values)}
    spread = {"mean": mean, "low": min(values, default=0), "high": max(values, default=0)}
    spread["values"] = values
    time = milliseconds / 1000
    return {
        "normalizer": label,
        "condition": condition,
        "lr": 0.01 if label == "none" else 0.1,
        "lr_at_edge": label == "ic" and condition == "iid64",
        "n": len(values),
        "diverged": lost,
        "failed": 0,
        "reasons": ["training loss is not finite"] * lost,
        "accuracy": spread if values else None,
        "difference": None if label == "batch" else difference,
        "curves": [
            curve(draw, goal, s, 1.6 if label != "none" else 2.6) for s in range(len(values))
        ],
        "seconds_per_step": {"median": time, "low": 0.96 * time, "high": 1.07 * time},
        "peak_memory_bytes": None,
        "saved_for_backward_bytes": mebibytes * 2**20,
        "tuning": tuning(draw, label, goal),
    }


def sample(seeds: int = 2) -> dict[str, Any]:
    """Six normalizers under two conditions; one run diverged."""
    lost = {
        "normalizer": "none",
        "condition": "class8",
        "lr": 0.01,
        "seed": 1,
        "phase": "final",
        "outcome": "diverged",
        "reason": "training loss is not finite",
        "step": 412,
        "record": "runs/none-class8-lr0.01-seed1.jsonl",
    }
    return {
        "schema": 1,
        "title": "Which normalizer for a small residual network on Fashion-MNIST?",
        "created": "2025-03-02T14:05:00+00:00",
        "complete": True,
        "runs_done": 84,
        "runs_planned": 84,
        "data": {
            "name": "fashion_mini",
            "title": "Fashion-MNIST, reduced",
            "train": 8000,
            "valid": 1000,
            "test": 2000,
            "classes": 10,
            "note": "28 × 28 grey images; a balanced subset.",
            "fingerprint": "sha256:3f9a1c",
        },
        "network": {
            "spec": "resnet:8",
            "description": "Residual network, 8 layers, 16 to 64 channels",
            "parameters": {label: 77_850 + 672 * (label != "none") for label in ARMS},
        },
        "baseline": "batch",
        "metric": "test accuracy",
        "conditions": [
            condition("iid64", "64 i.i.d. samples share statistics", 64, "iid"),
            condition("class8", "8 samples of one class share statistics", 8, "class"),
        ],
        "normalizers": [
            dict(zip(("label", "name", "title", "options", "pattern"), entry, strict=True))
            for entry in ((label, label, *ABOUT[label]) for label in ARMS)
        ],
        "arms": [arm(label, c, seeds) for c in ("iid64", "class8") for label in ARMS],
        "diverged_runs": [lost],
        "summary": [
            "With 64 i.i.d. samples sharing statistics, batch has the best mean test accuracy "
            "(89.4 %); filter_response, batch_renorm and ic are within one percentage point.",
            "With 8 samples of one class sharing statistics, batch falls to 55 %, while group "
            "and filter_response, which never mix samples, keep their accuracy.",
            "One run of none diverged; it is counted, not dropped.",
        ],
        "recipe": {"optimizer": "sgd", "momentum": 0.9, "schedule": "cosine", "epochs": EPOCHS},
        "environment": {"normlab": "0.1.0", "torch": "2.11.0", "device": "cpu, 2 threads"},
        "command": "normlab compare --data fashion_mini --network resnet:8 --seeds 2",
    }


def condition(name: str, label: str, norm_batch: int, composition: str) -> dict[str, Any]:
    sizes = {"batch_size": 64, "norm_batch": norm_batch}
    return {"id": name, "label": label, "composition": composition, **sizes}
