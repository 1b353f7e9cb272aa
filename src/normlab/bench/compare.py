"""The main job: tune and train every arm of a plan, resumably, and write the report."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from normlab.bench.analysis import analyse
from normlab.bench.plan import Plan, chosen_rate
from normlab.bench.pool import Pool
from normlab.bench.recipe import Condition, RunSpec
from normlab.bench.records import Record, Store, StoreError, write_text


@dataclass(frozen=True)
class Machine:
    """How runs are spread over this machine, and where the data lies; no part of the result.

    Attributes:
        workers: Worker processes.
        threads: Torch threads of each.
        data_dir: Folder of the data set.
        size: Image size for image folders.
        path: Folders to import networks from.
        device: Where networks train: ``"cpu"``, or ``"cuda"`` for a GPU that all workers share.
    """

    workers: int = 2
    threads: int = 1
    data_dir: str | None = None
    size: int | None = None
    path: tuple[str, ...] = ()
    device: str = "cpu"


class Watcher(Protocol):
    """What is told of the progress of a comparison."""

    def plan(self, units: float, done: float, runs: int, ended: int) -> None:
        """The whole work in epochs and in runs, and how much of each had been done before."""

    def trained(self, run_id: str, share: float) -> None:
        """A run has come that many epochs further."""

    def ended(self, spec: RunSpec, record: Record | None) -> None:
        """A run has ended; None where it was stopped."""


class Job:
    """A comparison in progress.

    Args:
        plan: What is compared.
        store: Where records go.
        machine: How runs are spread.
        watcher: Told of progress.
    """

    def __init__(self, plan: Plan, store: Store, machine: Machine, watcher: Watcher) -> None:
        self.plan, self.store, self.machine, self.watcher = plan, store, machine, watcher
        self.records: dict[str, Record | None] = {}
        self.waiting: dict[tuple[str, Condition], set[str]] = {}
        self.queue: deque[RunSpec] = deque()

    def run(self) -> bool:
        """Run what is missing.

        Returns:
            Whether everything is done; False after an interruption from the keyboard, which
            loses nothing that finished.

        Raises:
            StoreError: If records cannot be written or a worker died.
        """
        m = self.machine
        self.plan.save(self.store)
        todo = self._tuning_to_do()
        self._announce()
        ready = [arm for arm in self.plan.arms() if not self.waiting.get(arm)]
        self.queue = deque([*(s for arm in ready for s in self._finals_to_do(arm)), *todo])
        if not self.queue:
            return True
        pool = Pool(
            m.workers,
            m.threads,
            str(self.store.directory),
            self.plan.data,
            m.data_dir,
            m.size,
            list(m.path),
            m.device,
            self.watcher.trained,
        )
        with pool:
            try:
                self._feed(pool)
                while ended := pool.wait():
                    for spec, record in ended:
                        self._ended(spec, record)
                    self._feed(pool)
            except KeyboardInterrupt:
                pool.stop()
                return False
        return True

    def _record(self, spec: RunSpec) -> Record | None:
        """The record of a run that has ended, or None."""
        if spec.id not in self.records:
            record = self.store.of(spec)
            ended = record is not None and record.outcome in ("finished", "diverged")
            self.records[spec.id] = record if ended else None
        return self.records[spec.id]

    def _tuning_to_do(self) -> list[RunSpec]:
        """Tuning runs without a record; remembers which arms wait for which."""
        todo = []
        for normalizer, condition in self.plan.arms():
            missing = [s for s in self.plan.tuning(normalizer, condition) if not self._record(s)]
            self.waiting[normalizer, condition] = {spec.id for spec in missing}
            todo += missing
        return todo

    def _rate(self, arm: tuple[str, Condition]) -> float | None:
        return chosen_rate(self.plan, [self._record(spec) for spec in self.plan.tuning(*arm)])

    def _finals_to_do(self, arm: tuple[str, Condition]) -> list[RunSpec]:
        rate = self._rate(arm)
        finals = [] if rate is None else self.plan.finals(*arm, rate)
        return [spec for spec in finals if not self._record(spec)]

    def _feed(self, pool: Pool) -> None:
        """Give the workers their next runs, one ahead, so that the queue can still be reordered."""
        while self.queue and pool.outstanding <= self.machine.workers:
            pool.submit(self.queue.popleft())

    def _ended(self, spec: RunSpec, record: Record | None) -> None:
        self.records[spec.id] = record
        self.watcher.ended(spec, record)
        arm = (spec.normalizer, spec.condition)
        if spec.phase == "tune" and record is not None:
            self.waiting[arm].discard(spec.id)
            if not self.waiting[arm]:
                # Whole arms first: a comparison that is stopped early has something to say.
                self.queue.extendleft(reversed(self._finals_to_do(arm)))

    def _announce(self) -> None:
        """Tell the watcher how much there is to do; a final run's rate does not change its size."""
        total = done = 0.0
        ended = 0
        for arm in self.plan.arms():
            for spec in self.plan.tuning(*arm):
                total += spec.epochs
                ended += bool(self._record(spec))
                done += spec.epochs * bool(self._record(spec))
            rate = None if self.waiting[arm] else self._rate(arm)
            for spec in self.plan.finals(*arm, rate or self.plan.recipe.lrs[0]):
                total += spec.epochs
                ended += bool(rate and self._record(spec))
                done += spec.epochs * bool(rate and self._record(spec))
        self.watcher.plan(total, done, self.plan.runs_planned, ended)


def compare(
    plan: Plan,
    out: str | Path,
    *,
    machine: Machine | None = None,
    watcher: Watcher,
) -> tuple[dict[str, Any], bool]:
    """Run a comparison, or what of it is missing, and write its report.

    Args:
        plan: What is compared.
        out: Folder for records, ``comparison.json`` and ``report.html``.
        machine: How runs are spread over this machine.
        watcher: Told of progress.

    Returns:
        The comparison as plain values, and whether it is complete.

    Raises:
        StoreError: If records cannot be written, a worker died, or another process uses the folder.
    """
    from filelock import FileLock, Timeout

    store = Store(out)
    lock = FileLock(store.directory / ".lock", timeout=0)
    try:
        with lock:
            complete = Job(plan, store, machine or Machine(), watcher).run()
    except Timeout:
        raise StoreError(
            f"another comparison is writing to {store.directory}; wait for it, or choose another "
            "--out"
        ) from None
    return report(out), complete


def report(out: str | Path) -> dict[str, Any]:
    """Analyse a record folder, and write ``comparison.json`` and ``report.html`` into it.

    Args:
        out: The folder.

    Returns:
        The comparison as plain values.

    Raises:
        StoreError: If the folder holds no comparison or cannot be written.
    """
    if not (Path(out) / "plan.json").is_file():
        raise StoreError(f"{out} holds no plan.json: give a folder that 'normlab compare' wrote")
    store = Store(out)
    comparison = analyse(Plan.load(store), store)
    text = json.dumps(comparison, indent=1, allow_nan=False) + "\n"
    write_text(store.directory / "comparison.json", text)
    from normlab.report import write

    write(comparison, store.directory / "report.html")
    return comparison
