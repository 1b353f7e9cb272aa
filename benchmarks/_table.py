"""The readable form of a record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Rows = list[dict[str, Any]]
Key = tuple[str, ...]
NOISE = 1.1  # repeated runs differ by about this factor; less is no difference
SHORT_NAMES = {"float32": "fp32", "bfloat16": "bf16", "channels_last": "ch.last"}
LEGEND = """\
Numbers are *forward / forward and backward*, in multiples of the time that a `copy_` of the input
took in the same rounds: 1 copy for the forward pass (read x, write y), 2.5 for both (and read x
and dy, write dx). 1.0 is the limit of the memory; less is better. *saved* is what waits for the
backward pass, in multiples of the input, the input included. Training mode, parameters in the
dtype of the input, least time of all rounds. *normlab* is the method with its default options,
*native* torch's own layer for the same job, *compile* `torch.compile` of normlab's layer."""


def markdown(record: dict[str, Any]) -> str:
    """Return the record as text."""
    rows: Rows = record["rows"]
    good = [r for r in rows if r["error"] is None]
    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    parts = [head(record), LEGEND]
    parts += [table(s, [r for r in rows if r["shape"] == s]) for s in shapes]
    for other, name in (("native", "torch's own layer"), ("compile", "torch.compile of it")):
        if any(r["variant"] == other for r in good):
            parts.append(against(other, name, good))
    parts += [failures(rows)] if len(good) < len(rows) else []
    return "\n\n".join(parts) + "\n"


def head(record: dict[str, Any]) -> str:
    """What it was measured on."""
    env = record["environment"]
    lines = [f"# Layers, {record['date'][:10]}, {env['cpu']}", ""]
    if record["short"]:
        lines += ["**Tiny tensors: these times say nothing.**", ""]
    if not record["complete"]:
        lines += ["**Incomplete: the run was interrupted.**", ""]
    allocator = ", ".join(f"{k}={v}" for k, v in record["allocator"].items() if v is not None)
    loads = [r["load"] for r in record["rows"] if r["load"] is not None]
    facts = {
        "command": f"`{record['command']}`",
        "threads": f"{record['threads']} of {env['cores']} cores",
        "versions": f"torch {env['torch']}, normlab {env['normlab']}, revision {env['revision']}",
        "allocator": allocator or "default",
        "load (1 minute)": f"{min(loads):.1f} to {max(loads):.1f}" if loads else "unknown",
        "rounds": f"{record['rounds']}, {record['clock']}",
    }
    return "\n".join(lines + [f"- {k}: {v}" for k, v in facts.items()])


def table(shape: str, rows: Rows) -> str:
    """One shape: methods and variants down, dtypes and layouts across."""
    columns: list[Key] = list(dict.fromkeys((r["dtype"], r["layout"]) for r in rows))
    dims = "×".join(map(str, rows[0]["dims"]))
    names = [words(c) for c in columns]
    lines = [f"## Shape {shape}: {dims}", ""]
    lines.append("| method | variant | " + " | ".join(names) + " | saved |")
    lines.append("|---" * (len(columns) + 3) + "|")
    for method, variant in dict.fromkeys((r["method"], r["variant"]) for r in rows):
        found: dict[Key, dict[str, Any]] = {
            (r["dtype"], r["layout"]): r
            for r in rows
            if (r["method"], r["variant"]) == (method, variant)
        }
        cells = [times(found.get(c)) for c in columns]
        line = [method if variant == "normlab" else "", variant, *cells, saved(found)]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join([*lines, "", floor(rows)])


def words(key: Key) -> str:
    """Print a key, such as that of a column."""
    return " ".join(SHORT_NAMES.get(part, part) for part in key)


def times(row: dict[str, Any] | None) -> str:
    """Both ratios of a row."""
    if row is None:
        return "–"
    if row["error"] is not None:
        return "failed"
    return f"{number(row['forward_ratio'])} / {number(row['both_ratio'])}"


def number(value: float) -> str:
    """Two digits that count."""
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def saved(found: dict[Key, dict[str, Any]]) -> str:
    """What is saved for the backward pass; a range where columns differ."""
    values = [r["saved_ratio"] for r in found.values() if r["saved_ratio"] is not None]
    if not values:
        return "–"
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def floor(rows: Rows) -> str:
    """The copy's time for each column."""
    best: dict[Key, float] = {}
    for r in rows:
        if r["copy_ms"] is not None:
            key = (r["dtype"], r["layout"])
            best[key] = min(best.get(key, r["copy_ms"]["min"]), r["copy_ms"]["min"])
    seen = [f"{words(k)} {v:.3f} ms" for k, v in best.items()]
    return f"Copy, least of all cells: {', '.join(seen)}."


def against(other: str, name: str, rows: Rows) -> str:
    """Where normlab is slower than another variant, and how often it is not."""
    by_cell: dict[Key, dict[str, dict[str, Any]]] = {}
    for r in rows:
        key = (r["method"], r["shape"], r["dtype"], r["layout"])
        by_cell.setdefault(key, {})[r["variant"]] = r
    pairs = {k: v for k, v in by_cell.items() if {"normlab", other} <= set(v)}
    pairs = {k: v for k, v in pairs.items() if k[0] != "none"}  # two identities
    lines = [f"## Against {name}", ""]
    measures: dict[str, Callable[[dict[str, Any]], float]] = {
        "forward": lambda r: float(r["forward_ms"]["min"]),
        "forward and backward": lambda r: float(r["both_ms"]["min"]),
    }
    for what, ms in measures.items():
        slower = {k: ms(v["normlab"]) / ms(v[other]) for k, v in pairs.items()}
        lines += [verdict(what, slower), ""]
    return "\n".join(lines).rstrip()


def verdict(what: str, factors: dict[Key, float]) -> str:
    """Count faster, equal and slower cells, and name the slower ones, the worst first."""
    slower = {k: f for k, f in factors.items() if f > NOISE}
    faster = sum(f < 1 / NOISE for f in factors.values())
    lines = [
        f"{what.capitalize()}: of {len(factors)} cells normlab is faster in {faster}, equal within "
        f"{NOISE - 1:.0%} in {len(factors) - faster - len(slower)}, slower in {len(slower)}:"
    ]
    for key, factor in sorted(slower.items(), key=lambda item: -item[1]):
        lines.append(f"- {words(key)}: {factor:.1f}× the time")
    return "\n".join(lines) if slower else lines[0].rstrip(":") + "."


def failures(rows: Rows) -> str:
    """Variants that failed, with their errors."""
    lines = ["## Failed", ""]
    for r in rows:
        if r["error"] is not None:
            cell = " ".join(r[k] for k in ("method", "shape", "dtype", "layout", "variant"))
            lines.append(f"- {cell}: `{r['error'].splitlines()[0]}`")
    return "\n".join(lines)
