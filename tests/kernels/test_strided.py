"""The compiled kernels read slices, transposed and expanded tensors where they are."""

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import normlab as nl
from kernels.kernel_cases import build, close, values
from normlab.kernels import dispatch

pytestmark = pytest.mark.skipif(
    dispatch.compiled_kernels() is None, reason=f"no compiled kernels: {dispatch.reason()}"
)

METHODS = [
    ("batch", {}), ("instance", {}), ("layer", {"over": "sample"}), ("group", {"groups": 2}),
    ("rms", {"over": "sample"}), ("ghost_batch", {"batch_size": 2}),
    ("filter_response", {"activation": None}),
]  # fmt: skip
SHAPE = (4, 6, 3, 5)


def columns(t):
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def sliced(t, *more):
    """The same values as a slice of a larger tensor: `more` elements of each axis."""
    big = t.new_full([s + m for s, m in zip(t.shape, more, strict=True)], float("nan"))
    return big[tuple(slice(m // 2, m // 2 + s) for s, m in zip(t.shape, more, strict=True))]


def every_other(t):
    return t.new_full((2 * len(t), *t.shape[1:]), float("nan"))[::2]


# Views onto larger memory, in which the values are then put.
VIEWS = {
    "channels": lambda t: sliced(t, 0, 5, 0, 0),
    "samples": every_other,
    "transposed": lambda t: torch.empty_like(t.transpose(0, 1).contiguous()).transpose(0, 1),
    "channels last, channels": lambda t: sliced(t.movedim(1, -1), 0, 0, 0, 5).movedim(-1, 1),
    "channels last, samples": lambda t: every_other(t.movedim(1, -1)).movedim(-1, 1),
    "channels last, rows": lambda t: sliced(t.movedim(1, -1), 0, 3, 0, 0).movedim(-1, 1),
}
# Axes that repeat one value.
EXPANDED = {"samples": (1, 6, 3, 5), "channels": (4, 1, 3, 5), "both": (1, 1, 3, 5)}


def copies(function):
    """How many elements torch copied meanwhile, parameters and the like left out."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        result = function()
    sizes = [torch.Size(e.input_shapes[0]).numel() for e in record.events()
             if e.name in ("aten::copy_", "aten::clone")]  # fmt: skip
    return result, sum(size for size in sizes if size > 100)


def check(layer, x, dy, dtype, copied=None):
    """Values, gradients and that nothing of x's size was copied."""
    saved = []

    def pack(t):
        saved.append(t.data_ptr())
        return t

    x = x.detach().requires_grad_()
    ours = copy.deepcopy(layer)
    wanted = [x, *ours.parameters()]

    def both():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = ours(x)
        return y, torch.autograd.grad(y, wanted, dy)

    (y, grads), moved = copies(both)
    assert (x.data_ptr() in saved) is (copied != "x")
    assert (moved > 0) is (copied is not None)
    exact, z = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    with nl.kernels.backend("reference"):
        w = exact(z)
        plain = torch.autograd.grad(w, [z, *exact.parameters()], dy.double())
    # float32: a few roundings, and 1/D of areas of 15 members; bfloat16: one of the result.
    tolerance = {torch.float32: [4e-6, 2e-5], torch.bfloat16: [2**-8, 2**-8, 2e-5]}
    close([y.detach(), *grads], [w.detach(), *plain], tolerance.get(dtype, [1e-11]))
    return y.detach(), grads[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("name", "options"), METHODS)
def test_slices_are_read_in_place(name, options, view, dtype):
    for channel_dim in (1, -1):
        layer = build(name, options, 6, None if name == "filter_response" else "silu", channel_dim)
        layer = layer.double() if dtype == torch.float64 else layer
        x, dy = values(SHAPE, 3, 1)
        x = VIEWS[view](x.to(dtype)).copy_(x)
        by_rows = view in ("channels", "samples", "transposed")
        # The gradient has gaps elsewhere.
        dys = [dy.to(dtype), VIEWS["samples"](dy.to(dtype)).copy_(dy)]
        dys += [VIEWS["channels"](dy.to(dtype)).copy_(dy)]
        dys = dys if by_rows else [columns(d) for d in dys[:2]] + [
            VIEWS["channels last, rows"](dy.to(dtype)).copy_(dy)]  # fmt: skip
        for d in dys:
            if channel_dim == -1:
                y, dx = check(layer, x.movedim(1, -1), d.movedim(1, -1), dtype)
            else:
                y, dx = check(layer, x, d, dtype)
            order = torch.empty_like(x if channel_dim == 1 else x.movedim(1, -1)).stride()
            assert y.stride() == dx.stride() == order  # dense, as torch's own layers give it


@pytest.mark.parametrize("axis", EXPANDED)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("name", "options"), METHODS)
def test_expanded_axes_are_read_in_place(name, options, axis, last):
    layer = build(name, options, 6).double()
    x, dy = values(SHAPE, 3, 1)
    small = x[tuple(slice(s) for s in EXPANDED[axis])].contiguous()
    if last and axis != "samples":
        return  # by columns there is nothing to expand but samples and positions
    small = columns(small) if last else small
    y, dx = check(layer, small.expand(SHAPE), columns(dy) if last else dy, torch.float64)
    assert all(t.stride() in (dy.stride(), columns(dy).stride()) or t.is_contiguous() or
               torch.empty_like(t).stride() == t.stride() for t in (y, dx))  # fmt: skip
    # Of a gradient that repeats along one position axis, no row is dense.
    check(layer, small.expand(SHAPE), dy[..., :1].expand(SHAPE), torch.float64, copied="dy")


def test_overlapping_windows():
    """Windows of a signal share memory; what is read twice is not written."""
    signal = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for name, options in METHODS:
        layer = build(name, options, 6).double()
        x = signal.as_strided((4, 6, 40), (7, 3, 1))
        kept = signal.clone()
        check(layer, x, torch.randn(4, 6, 40, dtype=torch.float64), torch.float64)
        assert torch.equal(signal, kept)


def test_what_no_order_fits_is_copied_once():
    layer = build("batch", {}, 6)
    x, dy = (t.float() for t in values((4, 6, 3, 10), 3, 1))
    for view in (x[..., ::2], x[..., 1:6], x.transpose(2, 3)[:, :, ::2]):
        d = dy.flatten()[: view.numel()].view(view.shape)
        check(layer, view, d, torch.float32, copied="x") if not view.is_contiguous() else None


@pytest.mark.parametrize("shape", [(12, 6), (12, 6, 1, 1)])
def test_without_positions(shape):
    """A sample is a row of channels, at any stride."""
    for name, options in METHODS:
        if name in ("instance", "filter_response"):
            continue
        for channel_dim in (1, -1):
            layer = build(name, options, 6, None, channel_dim).double()
            x, dy = values((24, 9, *shape[2:]), 3, 1)
            if channel_dim == -1:
                x, dy = x.movedim(1, -1), dy.movedim(1, -1)
                check(layer, x[::2, ..., 2:8], dy[:12, ..., :6], torch.float64)
            else:
                check(layer, x[::2, 2:8], dy[:12, :6], torch.float64)
