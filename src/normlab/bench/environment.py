"""What a measurement ran on."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@lru_cache(maxsize=1)
def environment() -> dict[str, str]:
    """Return hardware, versions and source revision, as flat text.

    Example:
        >>> sorted(environment())[:3]
        ['cores', 'cpu', 'normlab']
    """
    import numpy
    import torch

    import normlab

    found = {
        "normlab": normlab.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "revision": _revision(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu() -> str:
    """Name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _revision() -> str:
    """Source revision, where the package runs from a checkout; "+" marks local changes."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):
            return "installed package"
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "-uno", "-s") else "")
    except (OSError, subprocess.SubprocessError):
        return "installed package"


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of peak memory, where the system allows (Linux, CUDA).

    Args:
        device: A GPU's own memory is measured, or that of this process.
    """
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # elsewhere the peak counts from the start of the process
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Return the peak of memory since `reset_peak_memory`, in bytes.

    Args:
        device: A GPU, for what its tensors took, or the processor, for the resident size of this
            process.

    Returns:
        The peak; 0 where the system does not tell.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
