"""The record of a run: one JSON file, and a Markdown table of the same numbers beside it."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import normlab as nl
from _table import markdown
from _timing import cpu_time
from normlab.bench.environment import environment

SCHEMA = 2
ALLOCATOR = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "THP_MEM_ALLOC_ENABLE", "LD_PRELOAD")


def revision() -> str:
    """Source revision of the checkout; "+" marks local changes, files not yet added included."""
    here = str(Path(__file__).resolve().parent)

    def git(*args: str) -> str:
        line = ["git", "-C", here, *args]
        return subprocess.run(
            line, capture_output=True, text=True, timeout=30, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/src", ":/benchmarks")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def load() -> list[float] | None:
    """Load averages over 1, 5 and 15 minutes; None where the system has none."""
    return [round(v, 2) for v in os.getloadavg()] if hasattr(os, "getloadavg") else None


def sources() -> str:
    """Digest of the code that is measured and that measures, built libraries included."""
    digest = hashlib.sha256()
    for folder in (Path(nl.__file__).parent, Path(__file__).parent):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".so"):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def command() -> str:
    """The command without directories, so that it reads the same on every machine."""
    words = f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".rstrip()
    return re.sub(r" --(out[ =]\S+|resume|show)", "", words)


def header(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a measurement is of, and what it runs on."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "tiny": options.tiny,
        "rounds": options.rounds,
        "environment": environment() | {"revision": revision()},
        "sources": sources(),
        "threads": torch.get_num_threads(),
        "clock": "processor time" if cpu_time() else "wall time",
        "libc": " ".join(platform.libc_ver()),
        "allocator": {name: os.environ.get(name) for name in ALLOCATOR},
        "load_at_start": load(),
    }


def stem(kind: str, head: dict[str, Any], out: Path) -> Path:
    """A path without suffix for a new record."""
    threads = "" if head["threads"] == 1 else f"-{head['threads']}-threads"
    return free(out, f"{kind}-{head['date'][:10]}-{slug(head['environment']['cpu'])}{threads}")


class Record:
    """Rows with what they were measured on.

    With `options.resume`, the newest record of the same command, sources and surroundings in
    `options.out` is continued.

    Attributes:
        complete: Whether every cell that was asked for is in it.
        cells: (method, shape, dtype, layout) of the rows so far.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.complete = False
        self.cells: set[tuple[str, ...]] = set()
        self._rows: list[dict[str, Any]] = []
        self._head = header("layers", options)
        if not (options.resume and self._continue(options.out)):
            self._stem = stem("layers", self._head, options.out)

    def _continue(self, folder: Path) -> bool:
        """Take over the record that began as this one does; return whether there is one."""
        found = same("layers", self._head, folder)
        if found is None:
            return False
        path, content = found
        self._stem, self.complete = path.with_suffix(""), content["complete"]
        self._head |= {key: content[key] for key in ("date", "load_at_start")}
        self._take(content["rows"])
        return True

    def _take(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self.cells.add((row["method"], row["shape"], row["dtype"], row["layout"]))
            self._rows.append(row)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Add the rows of a cell, with the load at this time."""
        now = load()
        self._take([{**row, "load": now[0] if now else None} for row in rows])

    @property
    def errors(self) -> int:
        """How many rows hold an error."""
        return sum(row["error"] is not None for row in self._rows)

    def content(self) -> dict[str, Any]:
        """The record as it stands."""
        end = {"load_at_end": load(), "complete": self.complete, "rows": self._rows}
        return self._head | end

    def text(self) -> str:
        """The readable form."""
        return markdown(self.content())

    def write(self) -> list[Path]:
        """Write both files; return their paths."""
        texts = {".json": json.dumps(self.content(), indent=1) + "\n", ".md": self.text()}
        paths = []
        for suffix, text in texts.items():
            paths.append(self._stem.with_name(self._stem.name + suffix))
            replace(paths[-1], text)
        return paths


def identity(head: dict[str, Any]) -> dict[str, Any]:
    """What has to agree for two runs to be one: all of the head but times and the revision.

    The digest of the sources says more than the revision, which changes with any text.
    """
    timed = ("date", "load_at_start", "load_at_end", "complete", "rows", "environment")
    fixed = {key: value for key, value in head.items() if key not in timed}
    around = {k: v for k, v in head["environment"].items() if k != "revision"}
    return json.loads(json.dumps(fixed | around))


def same(kind: str, head: dict[str, Any], folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest record of the same command, sources and surroundings, or None."""
    for path in sorted(folder.glob(f"{kind}-*.json"), key=lambda p: -p.stat().st_mtime):
        content = json.loads(path.read_text(encoding="utf-8"))
        if identity(content) == identity(head):
            return path, content
    return None


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = path.with_name(f".{path.name}.{os.getpid()}")
    waiting.write_text(text, encoding="utf-8")
    waiting.replace(path)


def slug(text: str) -> str:
    """Letters and digits of a text, joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "cpu"


def free(folder: Path, name: str) -> Path:
    """A path without suffix that no record has yet: a second run of a day is numbered."""
    stem, number = folder / name, 1
    while stem.with_name(stem.name + ".json").exists():
        number += 1
        stem = folder / f"{name}-{number}"
    return stem
