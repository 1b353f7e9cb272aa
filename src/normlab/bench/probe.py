"""What is measured of a network before it is trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

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

    weighted = {n: m for n, m in twin.named_modules() if isinstance(m, _WEIGHTED)}
    # Cached, so that a parametrized weight is one tensor, whose gradient can be kept.
    devices = {t.device for t in twin.parameters() if t.device.type != "cpu"}
    kind = next((device.type for device in devices), "cuda")
    with (
        torch.random.fork_rng(devices=list(devices), device_type=kind),
        parametrize.cached(),
    ):
        handles = [m.register_forward_hook(watch(n)) for n, m in weighted.items()]
        for module in weighted.values():
            if parametrize.is_parametrized(module, "weight"):
                module.weight.retain_grad()
        loss = nn.functional.cross_entropy(twin(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        for handle in handles:
            handle.remove()
        for name, row in rows.items():
            gradient = weighted[name].weight.grad
            row["weight_gradient_norm"] = math.nan if gradient is None else float(gradient.norm())
        kept = saved_bytes(lambda: nn.functional.cross_entropy(twin(images), labels))
    return list(rows.values()), kept
