"""Finds and loads the compiled kernels that suit this processor."""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
import struct
from functools import lru_cache
from pathlib import Path

import torch

ABI = 11
ENTRIES = ("normlab", "normlab_lines", "normlab_powers")
"""Families of functions, each of a forward and a backward direction; see `Call`."""
SWITCH = "NORMLAB_KERNELS"
FOLDER = Path(__file__).resolve().parent
# What torch itself found the processor (and ATEN_CPU_CAPABILITY) to allow, best library first.
_LEVELS = {"AVX512": ("avx512", "avx2", "baseline"), "AVX2": ("avx2", "baseline")}


class Call(ctypes.Structure):
    """What calls of one case have in common; the first part of `struct Call` of call.h."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in (
            "n", "c", "p", "bn", "bc", "xn", "xc", "xp", "gn", "gc", "gp", "yn", "yc", "yp",
            "mn", "mg", "mp", "columns", "act", "shift", "about_mean", "scale", "from_batch",
        )],
        *[(name, ctypes.c_double) for name in ("power", "factor")],
    ]  # fmt: skip


OF_ONE_CALL = struct.Struct("dq8P").pack
"""The second part: ε; flags, 1 to measure, and 2, 4, 8 where γ, β, τ are bfloat16 beside statistics
in float32; and addresses of x, γ, β, τ, the mean, the moment, r and y, 0 for what there is not."""
OF_GRADIENTS = struct.Struct("7P").pack
"""The third part: addresses of ∂L/∂y, and of the gradients of x, r, γ, β, τ and ε."""
OF_CORRECTIONS = struct.Struct("4P2d").pack
"""The last part: addresses of the mean and deviation that statistics are corrected towards, of r
and of d; rmax and dmax."""


@lru_cache(maxsize=1)
def load() -> tuple[ctypes.CDLL | None, str]:
    """Load the best library that was built and that this processor can run.

    The choice is made at the first call and holds for the process. Threads that come first at the
    same time load the same library twice, which the system makes one.

    Returns:
        The library, or None; and in words, which one it is or why there is none, with the repair.

    Raises:
        ValueError: If the environment variable NORMLAB_KERNELS is neither ``off`` nor ``auto``.
    """
    switch = os.environ.get(SWITCH) or "auto"
    if switch.lower() == "off":
        return None, f"switched off by the environment variable {SWITCH}={switch}; unset it"
    if switch.lower() != "auto":
        raise ValueError(
            f"the environment variable {SWITCH} is auto or off; received {switch!r}; unset it"
        )
    capability = torch.backends.cpu.get_cpu_capability()
    failed: list[str] = []
    for level in _levels(capability):
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            path = FOLDER / f"_{level}{suffix}"
            if not path.is_file():
                continue
            try:
                library = _open(path)
            except (OSError, AttributeError) as error:
                failed.append(f"{path.name} does not load: {error}")
                continue
            said = "; ".join([f"{path.name}, for a processor with {capability}", *failed])
            return library, f"{said}; {_repair()}" if failed else said
    return None, "; ".join([*failed, _repair()] if failed else ["none were built", _repair()])


def ready() -> ctypes.CDLL:
    """Return what `load` found, which must be a library, with as many threads as torch has here.

    Torch tells OpenMP so in each thread of Python where it first works, which may be after us.
    """
    torch.get_num_threads()  # tells it
    library = load()[0]
    assert library is not None
    return library


def _levels(capability: str) -> tuple[str, ...]:
    """Instruction sets to look for, best first; torch names none beyond AVX512."""
    levels = _LEVELS.get(capability, ("baseline",))
    rounds_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return ("avx512bf16", *levels) if capability == "AVX512" and rounds_bfloat16 else levels


def _open(path: Path) -> ctypes.CDLL:
    """The library of that file, with its functions declared; OSError if it is not one of ours."""
    library = ctypes.CDLL(str(path))
    library.normlab_abi.restype = ctypes.c_int
    found = library.normlab_abi()
    if found != ABI:
        raise OSError(f"built for interface {found} where this normlab has {ABI}")
    for entry in ENTRIES:  # which take bytes and a number: to declare that makes calls slower
        _ = getattr(library, f"{entry}_forward"), getattr(library, f"{entry}_backward")
    _ = library.normlab_units, library.normlab_rewrite, library.normlab_maps, library.normlab_blend
    _ = library.normlab_middle
    library.normlab_stream_from.restype = None
    return library


def _repair() -> str:
    """The command that builds the libraries, for a checkout or an installed package."""
    root = FOLDER.parents[3]
    if (root / "setup.py").is_file() and (FOLDER / "normalize.cpp").is_file():
        command = f"pip install --no-deps -e {root}"
    else:
        command = (
            "pip install --force-reinstall --no-deps --no-cache-dir SOURCE "
            "(the folder or archive that normlab was installed from)"
        )
    return f"with a C++ compiler (CXX, or g++ or clang++), build them by: {command}"
