"""What a law finds, and the report that collects it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


class ConformanceError(AssertionError):
    """A layer that breaks laws; the message lists them with their numbers."""


class NotApplicable(Exception):
    """Raised by a law that says nothing about this layer, with the reason."""


@dataclass(frozen=True)
class Finding:
    """What a law measured. It holds where ``measured <= tolerance``.

    Attributes:
        measured: The number that the law is about.
        tolerance: The largest value at which the law holds.
        reason: Why the tolerance is what it is.
        detail: Where the number was found, or what is wrong.
    """

    measured: float
    tolerance: float
    reason: str
    detail: str


class Worst:
    """The largest of several measurements, and where it was found."""

    def __init__(self) -> None:
        self.value, self.where, self.count = -1.0, "", 0

    def see(self, where: str, value: float) -> None:
        """Take in a measurement; NaN counts as infinite."""
        value = value if value == value else float("inf")
        self.count += 1
        if value > self.value:
            self.value, self.where = value, where

    def finding(self, tolerance: float, reason: str, note: str = "") -> Finding:
        """Compare the largest with the tolerance.

        Raises:
            NotApplicable: If nothing was measured.
        """
        if not self.count:
            raise NotApplicable(note or "there was nothing to compare")
        among = f" (worst of {self.count})" if self.count > 1 else ""
        detail = f"{self.where}{among}" + (f"; {note}" if note else "")
        return Finding(self.value, tolerance, reason, detail)


def violations(found: list[str], otherwise: str) -> Finding:
    """Make a finding of a law that is kept or broken, with nothing to measure but how often."""
    return Finding(len(found), 0, "one violation is too many", "; ".join(found) or otherwise)


@dataclass(frozen=True)
class LawResult:
    """The outcome of one law.

    Attributes:
        law: Name of the law.
        passed: Whether it holds; None where it does not apply.
        detail: Where the number was found, what went wrong, or why the law does not apply.
        measured: The number that the law is about; None where it was not reached.
        tolerance: The largest value at which the law holds; None likewise.
        reason: Why the tolerance is what it is.
    """

    law: str
    passed: bool | None
    detail: str
    measured: float | None = None
    tolerance: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        word = {True: "ok", False: "FAIL", None: "-"}[self.passed]
        numbers = ""
        if self.measured is not None and self.tolerance is not None:
            sign = "≤" if self.passed else ">"
            numbers = f"{self.measured:.2g} {sign} {self.tolerance:.2g}"
        return f"{word:<5}{self.law:<25}{numbers:<18} {self.detail}".rstrip()


@dataclass(frozen=True)
class Report:
    """The outcome of all laws; true where none is broken.

    Attributes:
        subject: The layer, as it prints itself.
        results: One result a law, in the order of the table.

    Example:
        >>> report = Report("Mine(6)", (LawResult("moments", False, "mean", 0.3, 1e-6),))
        >>> print(report)
        Mine(6): 0 laws hold, 1 broken, 0 do not apply
          FAIL moments                  0.3 > 1e-06        mean
        >>> bool(report), report["moments"].measured
        (False, 0.3)
    """

    subject: str
    results: tuple[LawResult, ...]

    def __iter__(self) -> Iterator[LawResult]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, law: str) -> LawResult:
        """Return the result of a law by its name."""
        for result in self.results:
            if result.law == law:
                return result
        raise KeyError(f"law {law!r} was not checked; checked: {[r.law for r in self.results]}")

    def __bool__(self) -> bool:
        return self.passed

    @property
    def passed(self) -> bool:
        """Whether no law is broken."""
        return not self.failures

    @property
    def failures(self) -> tuple[LawResult, ...]:
        """The broken laws."""
        return tuple(r for r in self.results if r.passed is False)

    def __str__(self) -> str:
        held = sum(r.passed is True for r in self.results)
        skipped = sum(r.passed is None for r in self.results)
        head = (
            f"{self.subject}: {held} laws hold, {len(self.failures)} broken, {skipped} do not apply"
        )
        return "\n".join([head, *(f"  {_short(str(result))}" for result in self.results)])

    def raise_for_failures(self) -> None:
        """Raise if a law is broken.

        Raises:
            ConformanceError: With the broken laws, their numbers and tolerances.
        """
        if self.failures:
            rows = [
                f"  {r}" + (f" [tolerance: {r.reason}]" if r.reason else "") for r in self.failures
            ]
            names = ", ".join(r.law for r in self.failures)
            raise ConformanceError("\n".join([f"{self.subject} breaks {names}:", *rows]))


def _short(line: str, width: int = 160) -> str:
    """Cut a long line, for the table."""
    return line if len(line) <= width else line[: width - 1] + "…"
