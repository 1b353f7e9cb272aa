"""What one call costs beside its arithmetic: layers on a tensor of 256 numbers, in microseconds.

    python benchmarks/overhead.py

prints forward, and forward and backward, for torch's own batch and group normalization, for layers
of normlab and for the bare entry of the compiled kernels; beside them multiples of a call of
`nn.BatchNorm2d` and of a `torch.autograd.Function` that does nothing. Rounds are interleaved, the
least is taken; one thread. Nothing is recorded or required.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import normlab as nl
from normlab.kernels import dispatch
from normlab.kernels.reference import Spec

ROUNDS, CALLS = 60, 20


class Nothing(torch.autograd.Function):
    """One that saves its input and makes room for a result, as the least that a layer does."""

    @staticmethod
    def forward(ctx, x):
        """Return room for a result."""
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        """Return the gradient as it is."""
        return dy


def bare(layer: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor] | None:
    """The entry of the kernels alone, without the layer around it."""
    layout = layer.partition.bind(x.shape, sizes=layer._sizes(len(x)))
    kernels = dispatch.kernels_for(x, layout, layer.operation, None)
    if kernels is None:
        return None
    spec = Spec(layout.member_dims, layer.operation, None)
    given = layer.weight, layer.bias, None, layer.eps, None
    return lambda x: kernels.normalize(x, layout, spec, *given, from_batch=True)[0]


def passes(layer: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Callable[[], object]]:
    """A forward pass, and one with its backward pass."""
    dy = torch.ones_like(x)
    wanted = [x, *(layer.parameters() if isinstance(layer, nn.Module) else ())]
    return {
        "forward": lambda: layer(x),
        "both": lambda: torch.autograd.grad(layer(x), wanted, dy),
    }


def measure(work: dict[tuple[str, str], Callable[[], object]]) -> dict[tuple[str, str], float]:
    """The least mean of a round of calls, in microseconds."""
    best = dict.fromkeys(work, float("inf"))
    for _ in range(ROUNDS):
        for key, call in work.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            best[key] = min(best[key], (time.perf_counter() - start) / CALLS * 1e6)
    return best


def main() -> None:
    """Time everything and print the table."""
    torch.set_num_threads(1)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    layers: dict[str, Callable[[Tensor], Tensor] | None] = {
        "a Function that does nothing": Nothing.apply,
        "kernels, bare (group)": bare(nl.GroupNorm(2, 8), x),
        "nn.BatchNorm2d": nn.BatchNorm2d(8),
        "nn.BatchNorm2d, evaluation": nn.BatchNorm2d(8).eval(),
        "nn.GroupNorm": nn.GroupNorm(2, 8),
        "BatchNorm": nl.BatchNorm(8),
        "BatchNorm, evaluation": nl.BatchNorm(8).eval(),
        "InstanceNorm": nl.InstanceNorm(8),
        "GroupNorm": nl.GroupNorm(2, 8),
        "RMSNorm": nl.RMSNorm(8),
        "FilterResponseNorm": nl.FilterResponseNorm(8),
        "BatchRenorm": nl.BatchRenorm(8),
    }
    work = {
        (name, direction): call
        for name, layer in layers.items()
        if layer is not None
        for direction, call in passes(layer, x).items()
    }
    found = measure(work)
    print(f"{dispatch.reason()}\n")
    print(f"{'':30}{'forward':>9}{'/BN':>6}{'/Func':>7}{'both':>10}{'/BN':>6}{'/Func':>7}")
    for name in dict.fromkeys(name for name, _ in found):
        cells = ""
        for direction, width in (("forward", 9), ("both", 10)):
            us = found[name, direction]
            native = found["nn.BatchNorm2d", direction]
            least = found["a Function that does nothing", direction]
            cells += f"{us:{width}.1f}{us / native:6.1f}{us / least:7.1f}"
        print(f"{name:30}{cells}")


if __name__ == "__main__":
    main()
