"""A value that the compiler must keep, not compute again in the backward pass.

Compiled graphs are cut so that cheap values are recomputed in the backward pass. A value read from
a buffer that the same forward pass then updates would be recomputed from the new contents, which
makes gradients silently wrong. An opaque operation is never recomputed.
"""

# No `from __future__ import annotations`: the operation's schema is read from live annotations.
import torch
from torch import Tensor


@torch.library.custom_op("normlab::hold", mutates_args=())
def _hold(x: Tensor) -> Tensor:
    return x.clone()


@_hold.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def copied(x: Tensor) -> Tensor:
    """Return a copy of a buffer, which compiled graphs save for the backward pass.

    Args:
        x: A buffer that the same forward pass may update.

    Returns:
        The copy; with plain operations where a model is exported.
    """
    traced = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return _hold(x) if traced else x.clone()


def hold(x: Tensor) -> Tensor:
    """Return x, as a copy that compiled graphs save for the backward pass.

    Args:
        x: A tensor without gradient.

    Returns:
        x itself outside the compiler, and where a model is exported, whose operations must be
        ones that other programs know.
    """
    traced = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return _hold(x) if traced else x
