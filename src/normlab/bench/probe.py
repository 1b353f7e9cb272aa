"""What is measured of a network before it is trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that one forward pass keeps for its gradient, each storage counted once.

    Args:
        forward: Runs the pass.

    Returns:
        The bytes, parameters and the input included where the pass keeps them.
    """
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = forward()
    del kept
    return sum(storages.values())


def initial_statistics(
    model: nn.Module, images: Tensor, labels: Tensor
) -> tuple[list[dict[str, Any]], int]:
    """Measure a network at its initial weights, in training mode, on a copy.

    Args:
        model: The network; it and the random state stay as they are.
        images: (N, C, H, W) standardized: the samples of one normalization batch.
        labels: (N,).

    Returns:
        For each weight layer in order of use its name, the standard deviation of its output, and
        the norm of the gradient at its weight; and the bytes that a forward pass keeps for the
        gradient.
    """
    twin = copy.deepcopy(model).train()
    rows: dict[str, dict[str, Any]] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            rows[name] = {"name": name, "output_std": float(output.detach().float().std())}

        return hook

    with torch.random.fork_rng(devices=[]):
        handles = [
            module.register_forward_hook(watch(name))
            for name, module in twin.named_modules()
            if isinstance(module, _WEIGHTED)
        ]
        loss = nn.functional.cross_entropy(twin(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        for handle in handles:
            handle.remove()
        kept = saved_bytes(lambda: nn.functional.cross_entropy(twin(images), labels))
    modules = dict(twin.named_modules())
    for name, row in rows.items():
        gradient = modules[name].weight.grad
        norm = math.nan if gradient is None else float(gradient.norm())
        row["weight_gradient_norm"] = norm
    return list(rows.values()), kept
