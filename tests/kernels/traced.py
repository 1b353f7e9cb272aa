"""What tests of kernels in traced graphs share."""

import warnings

import pytest
import torch
from torch import fx

from activations.cases import sample

TIGHT = {"rtol": 1e-9, "atol": 1e-10}  # float64 sums in two orders


@pytest.fixture(autouse=True)
def quiet():
    """Nothing compiled before counts, and warnings of the compiler itself are not ours."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def inputs(shape):
    """In rows, in columns of half precision, and in an order of memory that the kernels copy."""
    x = sample(shape, dtype=torch.float32)
    yield x
    yield x.bfloat16().to(memory_format=torch.channels_last)
    yield x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)


def leaf(t):
    return None if t is None else t.clone(memory_format=torch.preserve_format).requires_grad_()


def traced(layer, **options):
    """The layer compiled as one graph, and the names of what was in the graph."""
    from torch._dynamo.backends.debugging import aot_eager

    seen = set()

    def backend(graph, example):
        graphs = [m for m in graph.modules() if isinstance(m, fx.GraphModule)]
        seen.update(str(node.target) for g in graphs for node in g.graph.nodes)
        return aot_eager(graph, example)

    return torch.compile(layer, backend=backend, fullgraph=True, **options), seen


def train(step, layer, x):
    """y, all gradients, and the buffers after a pass."""
    x = leaf(x)
    y = step(x)
    y.float().pow(3).sum().backward()
    grads = [p.grad for p in layer.parameters()]
    layer.zero_grad()
    return [y.detach(), x.grad, *grads, *map(torch.clone, layer.buffers())]
