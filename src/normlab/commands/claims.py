"""``normlab claims``: the ledger of papers' claims."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from normlab.claims import Claim, Scale


@dataclass(frozen=True)
class Claims:
    """List papers' claims with their verdicts, run their protocols, or write the ledger."""

    action: Annotated[Literal["list", "run", "report"], tyro.conf.Positional] = "list"
    """list: verdicts from the records that there are; run: make missing observations; report:
    write the ledger's page."""
    ids: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Claims, as paper/name, or whole papers; default: all."""
    scale: Literal["smoke", "cpu", "gpu"] = "cpu"
    """smoke: does it run (seconds); cpu: what verdicts rest on; gpu."""
    out: Path = Path("claims.html")
    """File of the report."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Do it.

        Returns:
            The exit status: 0; 1 if a protocol failed.

        Raises:
            ValueError: If an id is unknown.
        """
        chosen = self.chosen()
        if self.action == "report":
            from normlab.claims import page

            print(page.write(list(chosen.values()), self.scale, self.out))
            return 0
        failed = self._run(chosen) if self.action == "run" else 0
        self._show(chosen)
        return int(failed > 0)

    def chosen(self) -> dict[str, Claim]:
        """The claims that were asked for."""
        import difflib

        from normlab.claims import ledger

        everything = ledger()
        if not self.ids:
            return everything
        found: dict[str, Claim] = {}
        for wanted in self.ids:
            some = {k: c for k, c in everything.items() if wanted in (k, c.paper.key)}
            if not some:
                names = [*everything, *{c.paper.key for c in everything.values()}]
                near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.4)
                hint = f"; did you mean {', '.join(near)}?" if near else ""
                raise ValueError(f"no claim or paper is named {wanted!r}{hint}")
            found |= some
        return found

    def _run(self, chosen: dict[str, Claim]) -> int:
        """Run the protocols; one that fails is said and does not cost the others."""
        failed = 0
        for claim in chosen.values():
            if obstacle := claim.obstacle(self.scale):
                print(f"{claim.id} is not testable here: {obstacle}", file=sys.stderr)
                continue
            try:
                claim.protocol.run(claim, self.scale, lambda text: print(text, file=sys.stderr))
            except Exception as error:
                failed += 1
                print(f"{claim.id} failed: {type(error).__name__}: {error}", file=sys.stderr)
        return failed

    def _show(self, chosen: dict[str, Claim]) -> None:
        rows = [row(claim, self.scale) for claim in chosen.values()]
        if self.json:
            from normlab.cli import print_json
            from normlab.core.structure import plain

            print_json(plain(rows))
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for name in ("id", "verdict", "effect", "95 % interval", "n"):
            table.add_column(name, no_wrap=True)
        for one in rows:
            low_high = one["interval"]
            table.add_row(
                Text(one["id"]), one["verdict"] + " (undecided)" * one["undecided"],
                "–" if one["effect"] is None else f"{one['effect']:.3g}",
                "–" if low_high is None else f"{low_high[0]:.3g} to {low_high[1]:.3g}",
                str(one["n"]),
            )  # fmt: skip
        wide = Console(width=200).measure(table).maximum
        Console(width=max(Console().width, wide)).print(table)  # a narrow terminal breaks lines


def row(claim: Claim, scale: Scale) -> dict[str, Any]:
    """One line of the ledger as JSON values.

    Args:
        claim: The claim.
        scale: At which its records are read.

    Returns:
        id, paper, sentence, scale, verdict, undecided, why, effect, unit, interval, n, records and
        note.
    """
    judged = claim.judge(scale)
    return {
        "id": claim.id,
        "paper": f"{claim.paper.authors} {claim.paper.year}, {claim.paper.arxiv}",
        "sentence": claim.sentence,
        "scale": scale,
        "verdict": judged.verdict,
        "undecided": judged.undecided,
        "why": judged.why,
        "effect": judged.effect,
        "unit": claim.rule.unit,
        "interval": None if judged.low is None else [judged.low, judged.high],
        "n": judged.n,
        "records": list(judged.records),
        "note": claim.note,
    }
