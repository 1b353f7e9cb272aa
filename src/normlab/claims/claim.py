"""A paper's claim, and how it is held against a measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from normlab.claims.rules import Judgement, Rule

Scale = Literal["smoke", "cpu", "gpu"]
SCALES: tuple[Scale, ...] = ("smoke", "cpu", "gpu")


@dataclass(frozen=True)
class Paper:
    """Where claims come from.

    Attributes:
        key: Short name, the first part of its claims' ids.
        title: In full.
        authors: Family names.
        year: Of the first version.
        arxiv: Identifier.
    """

    key: str
    title: str
    authors: str
    year: int
    arxiv: str


@dataclass(frozen=True)
class Observation:
    """One repetition of a protocol.

    Attributes:
        seed: Which repetition.
        values: Numbers by name.
        record: What names it: a file and its line, or runs of a comparison.
    """

    seed: int
    values: Mapping[str, float]
    record: str


class Procedure(Protocol):
    """How observations are made and where they are kept."""

    def text(self, scale: Scale) -> str:
        """Say in words what is done at that scale."""

    def seeds(self, scale: Scale) -> int:
        """How many repetitions there are; 0 where the scale has none."""

    def read(self, claim: Claim, scale: Scale) -> list[Observation]:
        """Read the observations that are on record."""

    def run(self, claim: Claim, scale: Scale, progress: Callable[[str], None]) -> None:
        """Make those that are missing."""


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper, and the test that it gets.

    Attributes:
        name: Second part of the id.
        paper: Its source.
        sentence: What is claimed, in our words.
        reported: Effect and direction that the paper reports.
        original: The size at which the paper tested it.
        protocol: How it is tested here.
        rule: How observations decide, fixed before the run.
        version: Raised when the protocol changes: older records then no longer count.
        note: What the scale can and cannot show.
    """

    name: str
    paper: Paper
    sentence: str
    reported: str
    original: str
    protocol: Procedure
    rule: Rule
    version: int = 1
    note: str = ""

    @property
    def id(self) -> str:
        """paper/name."""
        return f"{self.paper.key}/{self.name}"

    def judge(self, scale: Scale) -> Judgement:
        """Compute the verdict from the records of a scale.

        Args:
            scale: ``"smoke"`` (seconds: does it run?), ``"cpu"`` or ``"gpu"``.

        Returns:
            The judgement; ``"not testable here"`` where the protocol has no such scale, and
            ``"open"`` where records are missing.
        """
        wanted = self.protocol.seeds(scale)
        if not wanted:
            return Judgement("not testable here", None, None, None, 0, ())
        found = self.protocol.read(self, scale)
        if len(found) < wanted:
            return Judgement("open", None, None, None, len(found), _records(found))
        judged = self.rule.judge([one.values for one in found])
        return Judgement(
            judged.verdict, judged.effect, judged.low, judged.high, len(found), _records(found)
        )


def _records(found: Sequence[Observation]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one.record for one in found))
