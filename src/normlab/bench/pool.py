"""Worker processes that train runs, one thread each."""

from __future__ import annotations

import multiprocessing as mp
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import Any

from normlab.bench.recipe import RunSpec
from normlab.bench.records import Record, StoreError

_GRACE_SECONDS = 3.0


@dataclass
class _Worker:
    """What a worker process keeps between runs."""

    directory: str
    data: str
    data_dir: str | None
    size: int | None
    stop: Any
    messages: Any
    parent: int
    path: list[str]
    device: str
    tasks: dict[Any, Any] = field(default_factory=dict)


_worker: _Worker | None = None


def _start(threads: int, *state: Any) -> None:
    """Set a worker process up."""
    global _worker
    # Ctrl-C reaches the whole process group; the parent decides, and tells through `stop`.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _worker = _Worker(*state)
    sys.path[:0] = [p for p in _worker.path if p not in sys.path]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """End an orphaned worker: idle, it would wait for work for ever."""
    parent = mp.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        time.sleep(_GRACE_SECONDS)  # a run in progress sees it too, and checkpoints
        os._exit(1)


def _train(spec: RunSpec) -> Record | None:
    """Train one run in a worker; None where it was stopped."""
    from normlab import data as sets
    from normlab.bench.records import Store
    from normlab.bench.train import Stopped, Task, train

    w = _worker
    assert w is not None
    if "data" not in w.tasks:
        w.tasks["data"] = sets.load(w.data, w.data_dir, size=w.size)
    key = (spec.recipe.validation, spec.recipe.train_limit)
    if key not in w.tasks:
        w.tasks[key] = Task(w.tasks["data"], spec)

    def stop() -> bool:
        return bool(w.stop.is_set()) or os.getppid() != w.parent  # an orphan stops by itself

    try:
        return train(
            spec,
            w.tasks[key],
            Store(w.directory),
            device=w.device,
            progress=lambda n: w.messages.put((spec.id, n)),
            stop=stop,
        )
    except Stopped:
        return None


class Pool:
    """Trains runs in worker processes; a context manager.

    Args:
        workers: Number of processes.
        threads: Torch threads of each.
        directory: Record folder.
        data: Name of the data set.
        data_dir: Where it lies.
        size: Image size for image folders.
        path: Folders to import networks from.
        device: Where networks train.
        progress: Called with a run's id and the epochs it has just come further.
    """

    def __init__(
        self,
        workers: int,
        threads: int,
        directory: str,
        data: str,
        data_dir: str | None,
        size: int | None,
        path: list[str],
        device: str,
        progress: Callable[[str, float], None],
    ) -> None:
        # Spawned, not forked: a fork of a process that has used torch can hang.
        context = mp.get_context("spawn")
        self._stop = context.Event()
        self._messages = context.Queue()
        self._progress = progress
        self._futures: dict[Future[Record | None], RunSpec] = {}
        shared = (self._stop, self._messages, os.getpid(), path, device)
        self._executor = ProcessPoolExecutor(
            workers,
            context,
            initializer=_start,
            initargs=(threads, directory, data, data_dir, size, *shared),
        )

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def submit(self, spec: RunSpec) -> None:
        """Queue a run."""
        self._futures[self._executor.submit(_train, spec)] = spec

    @property
    def outstanding(self) -> int:
        """Runs that were submitted and have not ended."""
        return len(self._futures)

    def stop(self) -> None:
        """Ask workers to checkpoint and return."""
        self._stop.set()

    def wait(self) -> list[tuple[RunSpec, Record | None]]:
        """Wait for runs to end, passing progress on.

        Returns:
            Runs that ended, with their records; empty where none is left.

        Raises:
            StoreError: If a worker could not write, or died.
        """
        while self._futures:
            done, _ = wait(self._futures, timeout=0.2, return_when=FIRST_COMPLETED)
            self._drain()
            if done:
                return [(self._futures.pop(future), _result(future)) for future in done]
        return []

    def _drain(self) -> None:
        while True:
            try:
                self._progress(*self._messages.get_nowait())
            except queue.Empty:
                return


def _result(future: Future[Record | None]) -> Record | None:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise StoreError(
            "a worker process died (out of memory, perhaps: try --workers 1). Finished runs are "
            "safe; the same command goes on from them."
        ) from error
