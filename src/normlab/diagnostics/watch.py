"""What passes through the modules of a model: inputs and outputs, seen by hooks."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from normlab.core.stored import in_backward
from normlab.core.structure import tensors

See = Callable[[str, nn.Module, Tensor, Tensor], None]
"""Called with a module's name, the module, its first input and its output."""

_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention)


def channel_dim(module: nn.Module, x: Tensor) -> int:
    """The axis of channels: the last for layers of transformers and for (N, L, C), else 1.

    Args:
        module: The layer that x belongs to.
        x: Its input or output.

    Returns:
        1 or −1. Layers of this package state it; for others it follows from their class, else from
        the number of axes.

    Example:
        >>> import torch
        >>> x = torch.ones(5, 3, 7)
        >>> channel_dim(nn.Conv1d(2, 3, 1), x), channel_dim(nn.GELU(), x)
        (1, -1)
    """
    stated = getattr(module, "channel_dim", None)
    if stated in (1, -1):
        return int(stated)
    if isinstance(module, _LAST):
        return -1
    if isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._NormBase | nn.GroupNorm):
        return 1
    return -1 if x.ndim == 3 else 1


def by_channel(x: Tensor, dim: int) -> Tensor:
    """View x as (channels, members): all samples and positions of each channel."""
    return x.movedim(dim, 0).flatten(1)


@contextlib.contextmanager
def watched(
    model: nn.Module, see: See, *, only: Callable[[str, nn.Module], bool] | None = None
) -> Iterator[None]:
    """Call a function after each module's forward pass.

    A module whose output is that of its last part is passed over, so that each tensor is seen
    once; modules whose output has no floating-point numbers are too, and what activation
    checkpointing runs a second time.

    Args:
        model: Any module.
        see: What to call. It must not write to what it is given.
        only: Which modules to look at, by name and module; None for all.
    """
    seen: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # no tensor lives longer for it

    def hook(name: str) -> Any:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = next((t for t in tensors((args, kwargs)) if t.is_floating_point()), None)
            y = next((t for t in tensors(output) if t.is_floating_point()), None)
            if y is None or y.ndim == 0 or y.numel() == 0 or in_backward():
                return
            before, version = seen.get(id(y), (None, -1))
            # Written in place, the same tensor is another output.
            if before is not None and before() is y and version == y._version:
                return
            seen[id(y)] = weakref.ref(y), y._version
            see(name, module, y if given is None else given, y)

        return after

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if only is None or only(name, module):
                handle = module.register_forward_hook(hook(name), with_kwargs=True)
                stack.callback(handle.remove)
        yield
