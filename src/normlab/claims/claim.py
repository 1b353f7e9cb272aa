"""A paper's claim, and how it is held against a measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

from normlab.claims.rules import Judgement, Rule, Verdict

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
        records: The files that it was read from: its own, or those of a comparison's runs.
    """

    seed: int
    values: Mapping[str, float]
    records: tuple[str, ...]


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

    def obstacle(self, scale: Scale) -> str:
        """Why nothing can be run here at that scale; empty where it can."""
        if not self.protocol.seeds(scale):
            return f"the protocol has no {scale} scale"
        if scale == "gpu" and not torch.cuda.is_available():
            return "torch finds no GPU here ('normlab doctor' says what it finds)"
        return ""

    def judge(self, scale: Scale) -> Judgement:
        """Compute the verdict from the records of a scale.

        Args:
            scale: ``"smoke"`` (seconds: does it run?), ``"cpu"`` or ``"gpu"``.

        Returns:
            The judgement. Where records are missing it is ``"open"``, or ``"not testable here"``
            if they cannot be made here: the protocol has no such scale, or there is no GPU.
        """
        wanted = self.protocol.seeds(scale)
        found = self.protocol.read(self, scale) if wanted else []
        records = tuple(dict.fromkeys(name for one in found for name in one.records))
        if wanted and len(found) >= wanted:
            judged = self.rule.judge([one.values for one in found])
            return replace(judged, records=records)
        on_record = f"{len(found)} of {wanted} repetitions are on record"
        verdict: Verdict = "open"
        if obstacle := self.obstacle(scale):
            verdict, on_record = "not testable here", obstacle
        return Judgement(verdict, None, None, None, len(found), records, on_record)
