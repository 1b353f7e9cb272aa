"""Which implementation of the kernels is in use."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor

from normlab.core.operation import Operation
from normlab.core.partition import Layout
from normlab.kernels import closed_form, reference
from normlab.kernels.cpu import call, library
from normlab.kernels.triton import call as gpu

# Families of compiled kernels, asked in this order. Each has the functions `supports`, `normalize`
# and `moments` of `normlab.kernels.cpu.call`. Those for CPUs have `covers`, `place`, `forward` and
# `backward` too, by which they serve traced graphs.
FAMILIES: tuple[ModuleType, ...] = (call,)
_GPU: tuple[ModuleType, ...] = (gpu,)

_BACKENDS: dict[str, ModuleType] = {
    "auto": closed_form,
    "reference": reference,
    "torch": closed_form,
    "cpu": closed_form,
    "triton": closed_form,
}
_current = "auto"


class backend:
    """Choose the implementation of the kernels, for good or for a ``with`` block.

    Args:
        name: ``"auto"`` for the fastest one present: compiled kernels where they cover the case,
            else torch operations with gradients in closed form, saving the input once.
            ``"torch"`` for the latter alone; ``"reference"`` for plain differentiable torch
            operations; ``"cpu"`` and ``"triton"`` as ``"auto"``, but an error where no kernels were
            built, or where there is no Triton with a GPU.

    Raises:
        ValueError: If this installation has no such backend.

    Example:
        >>> import normlab as nl
        >>> with nl.kernels.backend("reference"):
        ...     nl.kernels.backend.name()
        'reference'
    """

    def __init__(self, name: str) -> None:
        global _current
        if name not in _BACKENDS:
            raise ValueError(
                f"backend {name!r} is not part of this installation; "
                f"available: {', '.join(_BACKENDS)}"
            )
        if name == "cpu" and compiled_kernels() is None:
            raise ValueError(f"backend 'cpu' is not part of this installation: {reason()}")
        if name == "triton" and not gpu.available():
            raise ValueError(f"backend 'triton' is not part of this installation: {gpu.reason()}")
        self._previous, _current = _current, name

    def __enter__(self) -> backend:
        return self

    def __exit__(self, *error: object) -> None:
        global _current
        _current = self._previous

    @staticmethod
    def name() -> str:
        """Return the name of the backend in use."""
        return _current


def compiled_kernels() -> ModuleType | None:
    """Return the module of compiled kernels, or None where none were built."""
    return call if library.load()[0] is not None else None


def reason() -> str:
    """Say which compiled kernels are in use, or why none are."""
    return library.load()[1]


def _untraced() -> tuple[ModuleType, ...]:
    """Families of compiled kernels that are wanted and present, where nothing is traced."""
    if _current in ("torch", "reference"):
        return ()
    built = FAMILIES if library.load()[0] is not None else ()
    if _current == "triton":
        return _GPU + built
    return built if gpu.interpreted() else built + _GPU


def compiled_for_cpu() -> bool:
    """Return whether compiled kernels for CPUs are wanted and present, and nothing is traced."""
    unwanted = _current in ("torch", "reference") or torch.compiler.is_compiling()
    return not unwanted and library.load()[0] is not None


def traced() -> ModuleType | None:
    """Return the module of kernels as operations where a graph that may hold them is traced.

    An exported program holds them only where they were asked for by name: other programs do not
    know them.
    """
    if not torch.compiler.is_compiling() or _current in ("torch", "reference"):
        return None
    # Only now: its registration loads the compiler, which takes seconds.
    from normlab.kernels.cpu import ops

    wanted = _current == "cpu" or not torch.compiler.is_exporting()
    return ops if wanted and ops.present() else None


def covering(layout: Layout, operation: Operation, activation: str | None) -> ModuleType | None:
    """Return the family of kernels for a case, whatever its tensors, built or not; or None."""
    for family in FAMILIES:
        if family.covers(layout, operation, activation):
            return family
    return None


def kernels_for(
    x: Tensor,
    layout: Layout,
    operation: Operation,
    activation: str | None,
    parameters: tuple[Tensor | None, ...] = (),
    buffers: Iterable[Tensor | None] = (),
    residual: Tensor | None = None,
) -> ModuleType | None:
    """Return the family of compiled kernels that computes this case, or None.

    In a traced graph they stand as operations of torch, on CPUs; see `traced`.

    Args:
        x: The input.
        layout: Π bound to its shape.
        operation: Φ.
        activation: The fused activation.
        parameters: γ, β and τ.
        buffers: Stored statistics.
        residual: r, which not every family adds.

    Returns:
        A module with the functions `normalize` and `moments`.
    """
    families: tuple[ModuleType, ...]
    if torch.compiler.is_compiling():
        operations = traced()
        families = () if operations is None else (operations,)
    else:
        families = _untraced()
    if residual is not None:
        families = tuple(f for f in families if getattr(f, "ADDS", False))
        buffers = (*buffers, residual)
    for family in families:
        if family.supports(x, layout, operation, activation, parameters, buffers):
            return family
    return None


def implementation() -> ModuleType:
    """Return the module whose `normalize` is in use.

    The compiler differentiates and fuses plain operations itself, and does not trace functions
    with a forward-mode rule, so it always gets the reference.
    """
    if torch.compiler.is_compiling():
        return reference
    return _BACKENDS[_current]
