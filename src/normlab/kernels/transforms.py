"""Which `torch.func` transforms a tensor belongs to: the one place that asks torch's internals."""

from __future__ import annotations

import torch
from torch import Tensor


def transformed(*tensors: Tensor) -> bool:
    """Whether any tensor belongs to a running transform (vmap, grad, jvp …)."""
    if torch.compiler.is_compiling():
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # no public equivalent exists
    return any(wrapped(t) for t in tensors)


def vmap_level(x: Tensor) -> int:
    """Level of the innermost vmap that x is batched by, 0 for none; grad and jvp do not count."""
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(x):
        x = functorch.get_unwrapped(x)
    return functorch.maybe_get_level(x) if functorch.is_batchedtensor(x) else 0
