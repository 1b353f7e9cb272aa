"""Progress of a comparison on the terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from normlab.bench.recipe import RunSpec
    from normlab.bench.records import Record

_LINE_SECONDS = 15.0


class Watch:
    """A bar with the time left; without a terminal, a line now and then.

    Args:
        quiet: Whether standard output is kept for something else; progress then goes to the
            standard error.
    """

    def __init__(self, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        self.console = Console(stderr=quiet)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("runs"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=None, left="")
        self.begun = self.said = time.monotonic()
        self.work = self.done_before = self.epochs_ended = 0.0
        self.ended_runs = self.runs = 0

    def __enter__(self) -> Watch:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def plan(self, units: float, done: float, runs: int, ended: int) -> None:
        """Learn how much there is to do: epochs and runs, and how many were done before."""
        self.work, self.done_before, self.runs, self.ended_runs = units, done, runs, ended
        self.bar.update(self.task, total=runs, completed=ended)
        if ended:
            self.console.print(f"{ended} of {runs} runs are on record already.")

    def trained(self, run_id: str, share: float) -> None:
        """Learn that a run has come that many epochs further."""
        self.epochs_ended += share
        left = self._left()
        self.bar.update(self.task, left=left)
        if not self.console.is_terminal and time.monotonic() - self.said > _LINE_SECONDS:
            self.said = time.monotonic()
            self.console.print(f"{self.ended_runs} of {self.runs} runs, {left}")

    def ended(self, spec: RunSpec, record: Record | None) -> None:
        """Learn that a run has ended."""
        if record is None:
            return
        self.ended_runs += 1
        self.bar.update(self.task, completed=self.ended_runs)
        if record.outcome != "finished":
            from rich.text import Text

            what = f"{spec.normalizer}, lr {spec.lr:g}, {spec.condition.id}, {spec.phase}"
            self.console.print(Text(f"{what}: {record.outcome}: {record.end.get('reason')}"))

    def _left(self) -> str:
        """Estimate the time left from the epochs done since the start."""
        spent = time.monotonic() - self.begun
        if spent < 5 or not self.epochs_ended:
            return ""
        rest = max(self.work - self.done_before - self.epochs_ended, 0)
        seconds = spent / self.epochs_ended * rest
        return f"about {seconds / 60:.0f} min left" if seconds > 90 else f"{seconds:.0f} s left"
