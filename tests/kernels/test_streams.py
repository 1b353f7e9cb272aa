"""Results that are stored past the caches are those that are not."""

import ctypes
import itertools
from contextlib import contextmanager

import pytest
import torch

import normlab as nl
from kernels.kernel_cases import arrange, build, values
from normlab.kernels import dispatch
from normlab.kernels.cpu import library

pytestmark = pytest.mark.skipif(
    dispatch.compiled_kernels() is None, reason=f"no compiled kernels: {dispatch.reason()}"
)
USUAL, NEVER = 8 << 20, 1 << 60

# Of every kernel that may: blocks of rows and columns, single positions, curves of single maps.
METHODS = [
    ("batch", {}, "relu"), ("instance", {}, None), ("layer", {"over": "sample"}, "silu"),
    ("group", {"groups": 2}, "silu"), ("ghost_batch", {"batch_size": 2}, None),
    ("filter_response", {}, None), ("position", {}, None), ("rms", {"over": "position"}, None),
    ("evonorm_b0", {}, None), ("evonorm_s0", {"groups": 2}, None), ("switchable", {}, None),
]  # fmt: skip
# Rows of whole lines of memory, of parts of lines, shorter than a line; the same of columns.
SHAPES = [(4, 6, 8, 16), (4, 10, 7, 7), (3, 34, 14, 14), (4, 64, 3, 1), (2, 32, 5, 5), (4, 6, 1, 2)]


@contextmanager
def stored_past(size):
    """Results of so many bytes or more."""
    tell = library.load()[0].normlab_stream_from
    tell(ctypes.c_int64(size))
    try:
        yield
    finally:
        tell(ctypes.c_int64(USUAL))


def run(layer, x, dy, residual=None):
    x = x.detach().requires_grad_()
    more = {} if residual is None else {"residual": residual.detach().requires_grad_()}
    y = layer(x, **more)
    wanted = [x, *more.values(), *layer.parameters()]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy, allow_unused=True)]


def tensors(shape, order, dtype=torch.float32, seed=1):
    return [arrange(t.to(dtype), order) for t in values(shape, seed, 1)]


def same(ours, others):
    """But for rounding: of a sum of products the compiler fuses one, here or there another."""
    for a, b in zip(ours, others, strict=True):
        assert (a is None) is (b is None)
        if a is not None:
            ulps = 8 if a.dtype is torch.float32 else 1
            bound = ulps * torch.finfo(a.dtype).eps * float(b.abs().max())
            torch.testing.assert_close(a, b, rtol=0, atol=bound)


@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize(("name", "options", "activation"), METHODS)
def test_results_do_not_depend_on_how_they_are_stored(name, options, activation, order):
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16)):
        layer = build(name, options, shape[1], activation).to(dtype)
        x, dy = tensors(shape, order, dtype)
        with stored_past(NEVER):
            wanted = run(layer, x, dy)
        with stored_past(0):
            same(run(layer, x, dy), wanted)


@pytest.mark.parametrize("order", ["rows", "columns"])
def test_with_a_residual(order):
    for shape, activation in itertools.product(SHAPES, ("relu", None)):
        layer = nl.norm("group", shape[1], groups=2, activation=activation)
        x, dy = tensors(shape, order)
        r, _ = tensors(shape, order, seed=2)
        with stored_past(NEVER):
            wanted = run(layer, x, dy, r)
        with stored_past(0):
            same(run(layer, x, dy, r), wanted)


@pytest.mark.parametrize("order", ["rows", "columns"])
def test_threads_that_share_a_line_of_memory(order):
    threads = torch.get_num_threads()
    try:
        for name in ("instance", "evonorm_s0", "batch"):
            layer = build(name, {}, 32)
            x, dy = tensors((7, 32, 3, 3), order)
            torch.set_num_threads(1)
            with stored_past(NEVER):
                wanted = run(layer, x, dy)
            for many in (2, 3, 5):
                torch.set_num_threads(many)
                with stored_past(0):
                    same(run(layer, x, dy), wanted)
    finally:
        torch.set_num_threads(threads)


def test_the_usual_size():
    layer, (x, _) = build("instance", {}, 16), tensors((1, 16, 360, 370), "rows")
    assert x.numel() * 4 > USUAL
    y, *_ = run(layer, x, x)
    with stored_past(NEVER):
        same([y], run(layer, x, x)[:1])
