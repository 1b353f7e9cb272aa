"""The ledger as one self-contained page, and as Markdown for the documentation."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normlab.claims.claim import Claim, Scale
from normlab.claims.rules import Exact, Judgement, Verdict
from normlab.report.charts.base import frame, plot, x_axis
from normlab.report.extra import need
from normlab.report.look import Look
from normlab.report.page import filled, put
from normlab.report.svg import inline

VERDICTS: tuple[Verdict, ...] = (
    "reproduced", "partly", "not reproduced", "contradicted", "open", "not testable here",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A claim with its judgement, in words."""

    claim: Claim
    judgement: Judgement
    size: str

    @property
    def effect(self) -> str:
        """Effect with its interval and unit."""
        j = self.judgement
        if j.effect is None or j.low is None or j.high is None:
            return "–"
        span = "" if j.low == j.high else f" ({j.low:.3g} to {j.high:.3g})"
        return f"{j.effect:.3g}{span} {self.claim.rule.unit}".rstrip()

    @property
    def verdict(self) -> str:
        """The verdict, and whether it is one for want of repetitions."""
        return self.judgement.verdict + " (undecided)" * self.judgement.undecided


def rows(claims: Sequence[Claim], scale: Scale) -> list[Row]:
    """Judge every claim from the records of a scale."""
    return [Row(c, c.judge(scale), c.protocol.text(scale)) for c in claims]


def tally(found: Sequence[Row]) -> str:
    """How many claims have which verdict, in words.

    Args:
        found: The ledger's rows.

    Returns:
        A sentence.
    """
    counts = Counter(row.judgement.verdict for row in found)
    undecided = sum(row.judgement.undecided for row in found)
    of_which = {"not reproduced": f" ({undecided} of them undecided)"} if undecided else {}
    said = ", ".join(f"{counts[v]} {v}{of_which.get(v, '')}" for v in VERDICTS if counts[v])
    return f"{len(found)} claims: {said}."


def figures(found: Sequence[Row], look: Look) -> list[tuple[str, Any]]:
    """Draw effects with their intervals, one figure for each unit that two claims share.

    Args:
        found: The ledger's rows.
        look: For the page or for Python users.

    Returns:
        Title and Altair chart of each.
    """
    by_unit: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        j = row.judgement
        if j.effect is None or j.low is None or j.high is None:
            continue
        if not all(map(math.isfinite, (j.effect, j.low, j.high))):
            continue
        unit = row.claim.rule.unit
        floor = 1e-17 if unit == Exact.unit else -math.inf  # 0 has no logarithm
        by_unit.setdefault(unit, []).append({
            "id": row.claim.id, "verdict": j.verdict, "effect": max(j.effect, floor),
            "low": max(j.low, floor), "high": max(j.high, floor),
            "said": f"{row.claim.id}: {row.effect}, {row.verdict}",
        })  # fmt: skip
    return [
        (unit or "effect", _forest(points, unit, look))
        for unit, points in by_unit.items()
        if len(points) > 1
    ]


def _forest(points: list[dict[str, Any]], unit: str, look: Look) -> Any:
    alt = need("altair")
    log = {"type": "log"} if unit == Exact.unit else {}
    order = [p["id"] for p in points]
    y = alt.Y("id:N", sort=order, title=None, axis=alt.Axis(labelLimit=260, domain=False))
    chart = plot(points).encode(y=y, tooltip="said:N", description=alt.Description("said:N"))
    colour = alt.Color(
        "verdict:N",
        scale=alt.Scale(domain=list(VERDICTS), range=[look.colour(i) for i in (2, 4, 3, 1, 6, 6)]),
        legend=alt.Legend(title=None, orient="top", columns=3) if not look.page else None,
    )
    shape = alt.Shape(
        "verdict:N", legend=None,
        scale=alt.Scale(domain=list(VERDICTS),
                        range=["circle", "diamond", "square", "cross", "circle", "circle"]),
    )  # fmt: skip
    span = x_axis("low", unit or "effect", scale=log, format="~g")
    layers = [
        chart.mark_rule(strokeWidth=2).encode(x=span, x2="high:Q", color=colour),
        chart.mark_point(filled=True, size=60, opacity=1).encode(
            x=x_axis("effect", unit or "effect", scale=log, format="~g"), color=colour, shape=shape
        ),
    ]
    if not log:
        zero = alt.Chart(alt.Data(values=[{"at": 0}])).mark_rule(
            strokeDash=[3, 3], color=look.tone("muted")
        )
        layers.insert(0, zero.encode(x="at:Q"))
    return frame(layers, look, height=24 * len(points) + 20)


def render(claims: Sequence[Claim], scale: Scale) -> str:
    """Draw the ledger as one HTML page that needs no network."""
    markup = need("markupsafe").Markup
    found = rows(claims, scale)
    drawn = [
        (title, markup(inline(chart, title))) for title, chart in figures(found, Look(page=True))
    ]
    return filled("ledger.html", rows=found, scale=scale, tally=tally(found), figures=drawn)


def write(claims: Sequence[Claim], scale: Scale, path: str | os.PathLike[str]) -> Path:
    """Write the ledger's page to a file, whole or not at all.

    Args:
        claims: In the order of display.
        scale: Whose records are read.
        path: The file to create or replace.

    Returns:
        The path that was written.

    Raises:
        OSError: The file could not be written; what stood there before is untouched.
    """
    return put(render(claims, scale), path)


def markdown(claims: Sequence[Claim], scale: Scale) -> str:
    """The ledger as Markdown: a section for each paper, a table row for each claim.

    Args:
        claims: In the order of display.
        scale: Whose records are read.

    Returns:
        The text, without a heading of its own.
    """
    found = rows(claims, scale)
    lines = [tally(found), ""]
    paper = None
    for row in found:
        c, j = row.claim, row.judgement
        if c.paper is not paper:
            paper = c.paper
            lines += ["", f"## {paper.title}", "",
                      f"{paper.authors} {paper.year}, arXiv {paper.arxiv}", "",
                      "| claim | verdict | effect | n |", "|---|---|---|---|"]  # fmt: skip
        note = "".join(f" *{t[:1].upper()}{t[1:]}.*" for t in (c.note, j.why) if t)
        cells = (
            f"`{c.id}`: {c.sentence} Reported: {c.reported} ({c.original}). Here: {row.size}. "
            f"Rule: {c.rule.text()}.{note}",
            f"**{row.verdict}**", row.effect, str(j.n),
        )  # fmt: skip
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
