"""The readable form of a record."""

from __future__ import annotations

from typing import Any

Rows = list[dict[str, Any]]
Key = tuple[str, ...]
OURS = "normlab"
OTHERS = {"native": "n", "compiled": "c", "compiled native": "nc"}  # with letters for small tables
NOISE = 1.1  # repeated runs differ by about this factor; less is no difference
SHORT_NAMES = {"float32": "fp32", "bfloat16": "bf16", "channels_last": "ch.last"}
SAVED = 1.05  # what a layer may save for its gradient, in multiples of the input
LEGEND = """\
Numbers are *forward / forward and backward*, in multiples of the time that a `copy_` of the input
took in the same rounds: 1 copy for the forward pass (read x, write y), 2.5 for both (and read x
and dy, write dx). 1.0 is the limit of the memory; less is better. *target* is for both, and what is
over it is **bold**. *saved* is what waits for the backward pass, in multiples of the input, the
input included. Training mode, parameters in the dtype of the input, least time of all rounds.
*normlab* is the method with its default options, or those after `+` and `/`; *native* torch's own
layers for the same job; *compiled* `torch.compile` of the formula in torch operations, and of
torch's own layers."""
MEASURES = {"forward": "forward_ms", "forward and backward": "both_ms"}


def markdown(record: dict[str, Any]) -> str:
    """Return the record as text."""
    rows: Rows = record["rows"]
    good = [r for r in rows if r["error"] is None]
    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    parts = [head(record), LEGEND]
    parts += [table(s, [r for r in rows if r["shape"] == s]) for s in shapes]
    parts += [over_target(good), against(good)]
    parts += [failures(rows)] if len(good) < len(rows) else []
    return "\n\n".join(part for part in parts if part) + "\n"


def head(record: dict[str, Any]) -> str:
    """What it was measured on."""
    env = record["environment"]
    lines = [f"# Layers, {record['date'][:10]}, {env['cpu']}", ""]
    if record["tiny"]:
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
    lines.append("| method | target | variant | " + " | ".join(names) + " | saved |")
    lines.append("|---" * (len(columns) + 4) + "|")
    for method, variant in dict.fromkeys((r["method"], r["variant"]) for r in rows):
        found: dict[Key, dict[str, Any]] = {
            (r["dtype"], r["layout"]): r
            for r in rows
            if (r["method"], r["variant"]) == (method, variant)
        }
        cells = [times(found.get(c)) for c in columns]
        target = next(iter(found.values()))["target"]
        first = [method, "" if target is None else f"≤ {target}"]
        line = [*(first if variant == OURS else ["", ""]), variant, *cells, saved(found)]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join([*lines, "", floor(rows)])


def exceeds(row: dict[str, Any]) -> bool:
    """Whether a row of normlab's is over its target, as far as two digits tell."""
    target = row["target"] if row["variant"] == OURS else None
    return target is not None and row["error"] is None and round(row["both_ratio"], 1) > target


def words(key: Key) -> str:
    """Print a key, such as that of a column."""
    return " ".join(SHORT_NAMES.get(part, part) for part in key)


def times(row: dict[str, Any] | None) -> str:
    """Both ratios of a row."""
    if row is None:
        return "–"
    if row["error"] is not None:
        return "failed"
    mark = "**" if exceeds(row) else ""
    return f"{number(row['forward_ratio'])} / {mark}{number(row['both_ratio'])}{mark}"


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


def over_target(rows: Rows) -> str:
    """How many cells keep to their target, and those that do not."""
    held = [r for r in rows if r["variant"] == OURS and r["target"] is not None]
    if not held:
        return ""
    over = {key(r): number(r["both_ratio"]) for r in held if exceeds(r)}
    heavy = {key(r): f"{r['saved_ratio']:.2f}" for r in held if round(r["saved_ratio"], 2) > SAVED}
    parts = [
        f"## Over the target\n\nOf {len(held)} cells with a target {len(held) - len(over)} keep "
        f"to it, {len(over)} do not{':' if over else '.'}",
        grid(over),
        f"Saved is more than {SAVED} in {len(heavy)} of them{':' if heavy else '.'}",
        grid(heavy),
    ]
    return "\n\n".join(part for part in parts if part)


def key(row: dict[str, Any]) -> Key:
    """Name of a row's cell."""
    return row["method"], row["shape"], row["dtype"], row["layout"]


def grid(values: dict[Key, str]) -> str:
    """Values by method and place; only methods and places that have one."""
    if not values:
        return ""
    places = sorted(dict.fromkeys(k[1:] for k in values), key=lambda place: place[0])
    lines = ["| method | " + " | ".join(map(words, places)) + " |"]
    lines.append("|---" * (len(places) + 1) + "|")
    for method in dict.fromkeys(k[0] for k in values):
        found = [values.get((method, *place), "") for place in places]
        lines.append(f"| {method} | {' | '.join(found)} |")
    return "\n".join(lines)


def against(rows: Rows) -> str:
    """Where the best of the other variants is faster than normlab, and how often it is not."""
    by_cell: dict[Key, dict[str, dict[str, Any]]] = {}
    for r in rows:
        if r["method"] != "none":  # two identities
            by_cell.setdefault(key(r), {})[r["variant"]] = r
    held = {k: v for k, v in by_cell.items() if OURS in v and len(v) > 1}
    if not held:
        return ""
    others = [name for name in OTHERS if any(name in v for v in held.values())]
    parts = [f"## Against {'the fastest of ' * (len(others) > 1)}{', '.join(others)}"]
    for what, field in MEASURES.items():
        factors = {}
        for k, variants in held.items():
            ms = {name: float(r[field]["min"]) for name, r in variants.items()}
            best = min((name for name in ms if name != OURS), key=ms.__getitem__)
            factors[k] = (ms[OURS] / ms[best], best)
        parts.append(verdict(what, factors))
    return "\n\n".join(parts)


def verdict(what: str, factors: dict[Key, tuple[float, str]]) -> str:
    """Count faster, equal and slower cells; show by how much they are slower, and than what."""
    slower = {k: f"{f:.1f} {OTHERS[best]}" for k, (f, best) in factors.items() if f > NOISE}
    faster = sum(f < 1 / NOISE for f, _ in factors.values())
    text = (
        f"{what.capitalize()}: of {len(factors)} cells normlab is faster in {faster}, equal within "
        f"{NOISE - 1:.0%} in {len(factors) - faster - len(slower)}, slower in {len(slower)}"
    )
    if not slower:
        return text + "."
    letters = ", ".join(f"{letter} {name}" for name, letter in OTHERS.items())
    return f"{text}, by these factors ({letters}):\n\n{grid(slower)}"


def failures(rows: Rows) -> str:
    """Variants that failed, with their errors."""
    lines = ["## Failed", ""]
    for r in rows:
        if r["error"] is not None:
            cell = " ".join(r[k] for k in ("method", "shape", "dtype", "layout", "variant"))
            lines.append(f"- {cell}: `{r['error'].splitlines()[0]}`")
    return "\n".join(lines)
