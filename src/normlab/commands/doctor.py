"""``normlab doctor``: what is in use on this machine, why, and what would help."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

EXTRAS = {
    "lab": (
        "tyro", "rich", "jinja2", "scipy", "altair", "vl-convert-python", "pillow", "filelock",
    ),
    "triton": ("triton",),
    "diagnostics": ("scikit-learn",),
    "export": ("onnx", "onnxscript", "onnxruntime"),
}  # fmt: skip


@dataclass(frozen=True)
class Doctor:
    """Say what this installation uses, why, and what would help."""

    json: bool = False
    """Print JSON instead of text."""

    def run(self) -> int:
        """Print what was found.

        Returns:
            The exit status: 0, also where there is advice.
        """
        found = examine()
        if self.json:
            from normlab.cli import print_json

            print_json(found)
            return 0
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        advice = found.pop("advice")
        for key, value in found.items():
            table.add_row(key.replace("_", " "), Text(_text(value)))
            if key in advice:
                table.add_row("", Text(f"→ {advice[key]}", style="yellow"))
        Console().print(table)
        return 0


def examine() -> dict[str, Any]:
    """Return what is in use, as JSON values.

    Returns:
        Facts in the order of display, and under "advice", by the name of the fact, what would help.
    """
    import torch

    from normlab.bench.environment import environment
    from normlab.kernels import backend

    advice: dict[str, str] = {}
    found: dict[str, Any] = dict(environment())
    found["installed_in"] = str(Path(__file__).resolve().parents[1])
    found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    found["backend"] = backend.name()
    found["compiled_kernels"] = _kernels(advice)
    found["compiler"] = _compiler()
    found["threads"] = _threads(advice)
    found["large_results"] = _allocator(advice)
    found["gpu_support"] = _gpu(advice)
    for extra, packages in EXTRAS.items():
        versions = {name: _version(name) for name in packages}
        found[f"extra_{extra}"] = versions
        if missing := [name for name, number in versions.items() if number is None]:
            advice[f"extra_{extra}"] = (
                f"missing: {', '.join(missing)}; pip install 'normlab[{extra}]'"
            )
    found["data_folder"] = _data(advice)
    found["advice"] = advice
    return found


def _kernels(advice: dict[str, str]) -> dict[str, Any]:
    from normlab.kernels.cpu import library

    try:
        loaded, words = library.load()
    except ValueError as error:  # of a setting: layers raise it, this command shows it
        loaded, words = None, "none in use"
        advice["compiled_kernels"] = str(error)
    said, _, repair = words.rpartition("; ")
    if said:
        words, advice["compiled_kernels"] = said, repair
    return {"in_use": loaded is not None, "which": words}


def _compiler() -> str | None:
    """The C++ compiler that an installation would find."""
    named = os.environ.get("CXX", "").split()
    return next(filter(None, map(shutil.which, named[:1] or ["c++", "g++", "clang++", "cl"])), None)


def _threads(advice: dict[str, str]) -> dict[str, Any]:
    import torch

    threads = torch.get_num_threads()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if usable and threads > usable:
        advice["threads"] = (
            f"{threads} threads share {usable} cores, and wait for each other; "
            f"set OMP_NUM_THREADS={usable} or call torch.set_num_threads({usable})"
        )
    setting = os.environ.get("OMP_NUM_THREADS")
    return {"torch": threads, "usable_cores": usable, "OMP_NUM_THREADS": setting}


def _allocator(advice: dict[str, str]) -> dict[str, Any]:
    """Whether results over 32 MB, which glibc maps anew each time, come from huge pages."""
    names = ("THP_MEM_ALLOC_ENABLE", "MALLOC_MMAP_MAX_", "LD_PRELOAD")
    settings = {name: os.environ.get(name) for name in names}
    if sys.platform != "linux":
        return settings
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        pages = text.partition("[")[2].partition("]")[0] or None
    except OSError:
        pages = None
    known = settings["THP_MEM_ALLOC_ENABLE"] not in (None, "0") or any(
        settings[name] for name in names[1:]
    )
    if not known and pages == "madvise":
        advice["large_results"] = (
            "for tensors over 32 MB set THP_MEM_ALLOC_ENABLE=1 before Python starts: torch then "
            "takes them in huge pages, with far fewer page faults"
        )
    return {**settings, "huge_pages": pages}


def _gpu(advice: dict[str, str]) -> dict[str, Any]:
    import torch

    available = torch.cuda.is_available()
    if torch.version.cuda and not available:
        advice["gpu_support"] = "torch is built for CUDA, but finds no device: see nvidia-smi"
    from normlab.kernels.triton import call

    triton = (_version("triton") or "present") if find_spec("triton") else None
    if available and triton is None:
        advice["gpu_support"] = call.reason()
    return {
        "cuda": torch.version.cuda, "in_reach": available, "triton": triton,
        "kernels": call.reason(),
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _data(advice: dict[str, str]) -> dict[str, Any]:
    from normlab.data.places import VARIABLE

    folder = os.environ.get(VARIABLE) or None
    if folder and not Path(folder).expanduser().is_dir():
        advice["data_folder"] = f"{folder} is no folder; set {VARIABLE} to one that exists"
    return {VARIABLE: folder}


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k.replace('_', ' ') if k.islower() else k}: {_text(v)}"
                         for k, v in value.items())  # fmt: skip
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
