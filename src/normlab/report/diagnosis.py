"""A diagnosis as figures and as one self-contained page."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from normlab.report import coerce
from normlab.report.charts.base import Figure, Row, frame, plot, x_axis, y_axis
from normlab.report.extra import need
from normlab.report.look import Look
from normlab.report.page import filled, put
from normlab.report.svg import inline

_LINES = (
    ("variance", "Variance of activations", "mean over channels", True),
    ("gradient", "Gradient at the outputs", "‖∂L/∂y‖", True),
    ("cosine", "Angle between samples", "mean cosine", False),
    ("stable_rank", "Rank of the samples' cosines", "stable rank", False),
)


def _number(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    found = coerce.number(value)
    if found is None or not math.isfinite(found):
        return "–" if value is None else str(value)
    return f"{found:.4g}"


def build(diagnosis: Mapping[str, Any], look: Look) -> Iterator[Figure]:
    """Draw every figure that has data.

    Args:
        diagnosis: As `Diagnosis.to_json` returns it.
        look: For the page or for Python users.

    Yields:
        The figures.
    """
    numbers = coerce.table(diagnosis.get("numbers"))
    layers = [coerce.table(one) for one in coerce.items(numbers.get("propagation"))]
    for key, title, unit, log in _LINES:
        rows = [
            {"at": depth, "value": value, "layer": coerce.text(layer.get("name"))}
            for depth, layer in enumerate(layers)
            if (value := coerce.number(layer.get(key))) is not None
            and math.isfinite(value) and (value > 0 or not log)
        ]  # fmt: skip
        if len(rows) > 1:
            yield _line(key, title, unit, rows, look, label="module, in order", log=log)
    walk = coerce.table(numbers.get("landscape"))
    for key, title, unit in (
        ("losses", "Loss along the gradient", "loss"),
        ("changes", "Change of the gradient along it", "‖∇L(θ − s·g) − g‖"),
    ):
        rows = _points(walk.get("steps"), walk.get(key), "s")
        if len(rows) > 1:
            yield _line(key, title, unit, rows, look, label="step s", log=False)
    line = coerce.table(numbers.get("slice"))
    if len(rows := _points(line.get("ticks"), line.get("losses"), "t")) > 1:
        yield _line("slice", "Loss along a random direction", "loss", rows, look, log=False,
                    label="share of each unit's length", caption=_kept(line))  # fmt: skip
    yield from _plane(coerce.table(numbers.get("plane")), look)
    curve = coerce.table(numbers.get("spectrum"))
    rows = _points(curve.get("values"), curve.get("density"), "λ")
    densities = [coerce.number(row["value"]) or 0.0 for row in rows]
    for row, density in zip(rows, densities, strict=True):  # tails of bells have no lower end
        row["value"] = max(density, 1e-6 * max(densities))
    if len(rows) > 1 and max(densities) > 0:
        yield _line("spectrum", "Spectral density of the Hessian", "density", rows, look,
                    label="eigenvalue", log=True, marks=False)  # fmt: skip


def _points(at: Any, values: Any, letter: str) -> list[Row]:
    """Finite values with their places."""
    pairs = zip(coerce.items(at), coerce.items(values), strict=False)
    found = [(coerce.number(x), coerce.number(y)) for x, y in pairs]
    return [
        {"at": x, "value": y, "layer": f"{letter} = {x:.3g}"}
        for x, y in found
        if x is not None and y is not None
    ]


def _kept(one: Mapping[str, Any]) -> str:
    """What moves how, on a slice."""
    count = coerce.whole(one.get("orthogonal"))
    kept = "Biases and parameters of normalizers stay. "
    if count is None:
        return kept + "Which weights have no scale was not measured: all move in full."
    return kept + f"Weights without a scale ({count}) move orthogonally to themselves."


def _plane(plane: Mapping[str, Any], look: Look) -> Iterator[Figure]:
    """The loss on a plane as a map: the stronger the colour, the higher."""
    ticks = [x for one in coerce.items(plane.get("ticks")) if (x := coerce.number(one)) is not None]
    grid = [[coerce.number(v) for v in coerce.items(row)]
            for row in coerce.items(plane.get("losses"))]  # fmt: skip
    known = [v for row in grid for v in row if v is not None]
    square = {len(grid), *map(len, grid)} == {len(ticks)}
    if len(ticks) < 2 or not square or not known:
        return
    low, high = min(known), max(known)
    log = low > 0 and high > 30 * low
    shade = _shades(low, high, log)
    half = (ticks[-1] - ticks[0]) / (len(ticks) - 1) / 2
    rows = [
        {"a": a - half, "a2": a + half, "b": b - half, "b2": b + half, "shade": shade(value),
         "said": f"({a:.3g}, {b:.3g}): {value:.4g}"}
        for (a, b), value in zip(itertools.product(ticks, ticks), itertools.chain(*grid),
                                 strict=True)
        if value is not None
    ]  # fmt: skip
    alt = need("altair")
    ends = {"nice": False, "domain": [ticks[0] - half, ticks[-1] + half]}
    cells = plot(rows).mark_rect(color=look.colour(0)).encode(
        x=x_axis("a", "share of each unit's length, direction 1", scale=ends, grid=False),
        x2="a2:Q",
        y=y_axis("b", "direction 2", scale=ends, grid=False),
        y2="b2:Q",
        fillOpacity=alt.FillOpacity("shade:Q", scale=alt.Scale(domain=[0, 1], range=[0, 1]),
                                    legend=None),
        tooltip="said:N",
        description=alt.Description("said:N"),
    )  # fmt: skip
    here = plot([{"a": 0.0, "b": 0.0}]).mark_point(shape="cross", filled=True, size=70, opacity=1,
                                                   color=look.tone("ink"))  # fmt: skip
    here = here.encode(x="a:Q", y="b:Q")
    missing = len(ticks) ** 2 - len(known)
    caption = (
        f"From {low:.3g} (faint) to {high:.3g} (strong){', on a log scale' if log else ''}; "
        f"the cross is the model. {_kept(plane)}"
    )
    if missing:
        caption += f" {missing} losses are not finite."
    table = [["1 \\ 2", *(f"{b:.3g}" for b in ticks)]]
    table += [[f"{a:.3g}", *map(_cell, row)] for a, row in zip(ticks, grid, strict=True)]
    yield Figure("plane", "diagnosis", "Loss on a plane of random directions", "", caption,
                 frame([cells, here], look), table)  # fmt: skip


def _shades(low: float, high: float, log: bool) -> Callable[[float], float]:
    """Opacity of a value: a dozen steps, whose borders are contours."""

    def place(value: float) -> float:
        return math.log(value) if log else value

    room = place(high) - place(low)

    def shade(value: float) -> float:
        share = (place(value) - place(low)) / room if room > 0 else 0.0
        return 0.06 + 0.94 * min(math.floor(share * 12), 11) / 11

    return shade


def _line(
    key: str, title: str, unit: str, rows: list[Row], look: Look, *, label: str, log: bool,
    marks: bool = True, caption: str = "",
) -> Figure:  # fmt: skip
    for row in rows:
        row["said"] = f"{row['layer']}: {row['value']:.4g}"
    scale = {"type": "log", "nice": False} if log else {}
    alt = need("altair")
    chart = plot(rows).encode(
        x=x_axis("at", label),
        y=y_axis("value", unit, format="~g", scale=scale),
        tooltip="said:N",
        description=alt.Description("said:N"),
    )
    colour = look.colour(0)
    layers = [chart.mark_line(strokeWidth=1.6, color=colour)]
    if marks:
        layers.append(chart.mark_point(filled=True, size=28, opacity=1, color=colour))
    table = [["Where", unit], *([row["layer"], _number(row["value"])] for row in rows)]
    return Figure(key, "diagnosis", title, "", caption or unit, frame(layers, look), table)


def figures(diagnosis: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures as Altair charts by key, each with its title."""
    return {
        f.key: f.chart.properties(title=[f.title, f.caption])
        for f in build(diagnosis, Look(page=False))
    }


def _tables(numbers: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Every probe's numbers as a table: a row for each layer, or one of all."""
    found = []
    for probe, result in numbers.items():
        records = [_flat(one) for one in _records(result) if one]
        if not records or probe == "biases":
            continue
        keys = [k for k, v in records[0].items() if not _long(v)]
        if not keys:
            continue
        body = [[_cell(record.get(k)) for k in keys] for record in records]
        found.append((probe.replace("_", " "), [[k.replace("_", " ") for k in keys], *body]))
    return found


def _records(result: Any) -> list[Mapping[str, Any]]:
    """A result as rows: a list of them, a mapping from names to rows, or a single one."""
    if rows := coerce.items(result):
        return [coerce.table(row) for row in rows]
    whole = coerce.table(result)
    if whole and all(isinstance(value, Mapping) for value in whole.values()):
        return [{"name": name, **row} for name, row in whole.items()]
    return [whole]


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose parts, such as the two factors of a layer, stand side by side."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        inner = value.items() if isinstance(value, Mapping) else ()
        found.update({f"{key} {name}": part for name, part in inner} or {key: value})
    return found


def _long(value: Any) -> bool:
    return isinstance(value, list) and (len(value) > 4 or any(isinstance(v, list) for v in value))


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_cell, value)) or "–"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    return _number(value) if isinstance(value, int | float) else str(value)


def render(diagnosis: Mapping[str, Any], title: str = "Diagnosis") -> str:
    """Draw a diagnosis as one HTML page that needs no network.

    Args:
        diagnosis: As `Diagnosis.to_json` returns it, or as read from a file.
        title: Heading.

    Returns:
        The page's text.
    """
    markup = need("markupsafe").Markup
    panels = [
        {"id": f"figure-{i}", "figure": f, "svg": markup(inline(f.chart, f.title))}
        for i, f in enumerate(build(diagnosis, Look(page=True)), start=1)
    ]
    findings = []
    for one in map(coerce.table, coerce.items(diagnosis.get("findings"))):
        limit = coerce.table(one.get("threshold"))
        findings.append({
            **{k: coerce.text(one.get(k)) for k in ("severity", "place", "says", "remedy")},
            "limit": _number(limit.get("value")), "source": coerce.text(limit.get("source")),
        })  # fmt: skip
    return filled(
        "diagnosis.html",
        title=title,
        mode=coerce.text(diagnosis.get("mode")),
        facts=[(k.replace("_", " "), _cell(v))
               for k, v in coerce.table(diagnosis.get("facts")).items()],
        findings=findings,
        skipped=[(k, str(v)) for k, v in coerce.table(diagnosis.get("skipped")).items()],
        seconds=[(k, _number(v)) for k, v in coerce.table(diagnosis.get("seconds")).items()],
        panels=panels,
        tables=_tables(coerce.table(diagnosis.get("numbers"))),
    )  # fmt: skip


def write(
    diagnosis: Mapping[str, Any], path: str | os.PathLike[str], title: str = "Diagnosis"
) -> Path:
    """Write the page to a file, whole or not at all.

    Args:
        diagnosis: As `Diagnosis.to_json` returns it.
        path: The file to create or replace.
        title: Heading.

    Returns:
        The path that was written.

    Raises:
        OSError: The file could not be written; what stood there before is untouched.
    """
    return put(render(diagnosis, title), path)
