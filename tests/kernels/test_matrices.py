"""Whitening without transposed copies: every order of memory, all gradients, against float64."""

import pytest
import torch

import normlab as nl
from normlab.core.partition import partition
from normlab.kernels import matrices

NAMES = ("decorrelated", "pca", "cholesky", "iterative", "group_whitening")
BATCH, GROUP = "n (g c) * -> g c (n *)", "n (g c) * -> n g (c *)"


def ordered(x, order):
    if order == "last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if order == "slice":
        return torch.cat([x, x], 0)[: len(x)].requires_grad_(False)
    return torch.stack([x, -x], -1)[..., 0] if order == "strided" else x.contiguous()


def bound(pattern, shape, groups, channel_dim=1):
    return partition(pattern).bind(shape, channel_dim=channel_dim, sizes={"g": groups})


@pytest.mark.parametrize("shape", [(5, 6), (3, 6, 7), (2, 6, 3, 4), (1, 6, 2, 3, 2), (4, 6, 1, 1)])
@pytest.mark.parametrize("pattern", [BATCH, GROUP])
@pytest.mark.parametrize("order", ["plain", "last"])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_pieces_are_views_of_the_same_areas(shape, pattern, order, groups):
    x = ordered(torch.randn(shape), order)
    layout = bound(pattern, shape, groups)
    found = matrices.pieces(x, layout)
    if found is None:  # variables and members interleaved, or one variable: the caller copies
        assert (pattern == GROUP and order == "last") or groups == 6
        x = x.contiguous()
        found = matrices.pieces(x, layout)
        if found is None and groups == 6:
            return
    assert found.data_ptr() == x.data_ptr()
    members = found.permute(1, 2, 0, 3).flatten(2)
    assert torch.equal(members, layout.regroup(x))
    back = matrices.joined(found, layout)
    assert torch.equal(back, x)
    assert back.data_ptr() == x.data_ptr()


def run(name, x, dy, dtype, backend, **options):
    """Output and gradients in a dtype."""
    layer = nl.norm(name, 6, **options).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.rand(p.shape, generator=generator).to(dtype))
    x = x.detach().to(dtype).requires_grad_()
    with nl.kernels.backend(backend):
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy.to(dtype))], y


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", ["plain", "last", "slice", "strided"])
@pytest.mark.parametrize("other", ["plain", "last"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [((40, 6), {}), ((9, 6, 11), {"groups": 3}), ((8, 6, 5, 7), {"groups": 2}),
     ((9, 5, 6), {"groups": 2, "channel_dim": -1})],
)  # fmt: skip
def test_values_and_gradients(name, order, other, shape, options):
    if name == "group_whitening" and len(shape) == 2:
        pytest.skip("one position has no covariance")
    torch.manual_seed(0)
    x, dy = ordered(torch.randn(shape), order) + 2, ordered(torch.randn(shape), other)
    expected, _ = run(name, x, dy, torch.float64, "reference", **options)
    exact, _ = run(name, x, dy, torch.float64, "auto", **options)
    found, y = run(name, x, dy, torch.float32, "auto", **options)
    for a, b, c in zip(exact, found, expected, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-10)
        # Condition numbers of these covariances are under 100, so that float32 keeps 4 digits.
        torch.testing.assert_close(b.double(), c, rtol=1e-3, atol=1e-4 * float(c.abs().max()))
    if order in ("plain", "last") and len(shape) == 4:
        assert y.stride() == x.stride()


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_rounded_once(name):
    torch.manual_seed(0)
    x, dy = torch.randn(2, 8, 6, 5, 7).to(torch.bfloat16)
    expected, _ = run(name, x, dy, torch.float64, "reference", groups=2)
    found, _ = run(name, x, dy, torch.bfloat16, "auto", groups=2)
    for a, b in zip(found[:2], expected[:2], strict=True):
        # Half a unit in the last place, and sums in float32 besides; parameters have been rounded.
        torch.testing.assert_close(a.double(), b, rtol=2.0**-7, atol=2.0**-8 * float(b.abs().max()))


@pytest.mark.parametrize("order", ["plain", "last"])
@pytest.mark.parametrize("name", ["decorrelated", "iterative", "group_whitening"])
def test_a_mean_far_from_zero_cancels_nothing(name, order):
    torch.manual_seed(0)
    x = ordered((torch.randn(8, 6, 9, 9) + 1e4), order)
    dy = torch.randn(8, 6, 9, 9)
    expected, _ = run(name, x, dy, torch.float64, "reference", groups=2)
    found, _ = run(name, x, dy, torch.float32, "auto", groups=2)
    for a, b in zip(found, expected, strict=True):
        # x itself is given to 1/1000 of its deviation, exactly; the mean to half of that.
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=2e-3 * float(b.abs().max()))


@pytest.mark.parametrize("order", ["plain", "last"])
def test_derivatives_of_any_order(order):
    torch.manual_seed(0)
    shape = (3, 4, 2, 3)
    layout = bound(BATCH, shape, 2)
    x = ordered(torch.randn(shape, dtype=torch.float64), order).requires_grad_()
    w = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(2, 2, 1, dtype=torch.float64, requires_grad=True)

    def both(x, w, shift):
        found = matrices.covariance(matrices.pieces(x, layout))
        y = matrices.product(w @ found.matrix, found.centered, shift)
        return matrices.joined(y, layout), found.matrix

    assert torch.autograd.gradcheck(both, (x, w, shift), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(both, (x, w, shift))


@pytest.mark.parametrize("order", ["plain", "last"])
def test_one_tensor_waits_for_the_backward_pass(order):
    x = ordered(torch.randn(16, 64, 8, 8), order).requires_grad_()
    layer = nl.norm("iterative", 64)
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    # Beside it, some tens of matrices of 16×16.
    assert sum(kept.values()) < 2 * x.nbytes
    assert sum(n for n in kept.values() if n >= x.nbytes) == x.nbytes
    assert y.shape == x.shape


def test_transforms_of_torch_func_take_the_other_path():
    torch.manual_seed(0)
    x = torch.randn(3, 8, 6, 4, dtype=torch.float64)
    layer = nl.norm("group_whitening", 6, groups=2).double()
    slope = torch.func.grad(lambda x: layer(x).pow(3).sum())
    leaf = x[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(layer(leaf).pow(3).sum(), leaf)
    torch.testing.assert_close(slope(x[0]), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_that_is_not_finite_is_nan(name):
    x = torch.randn(8, 6, 5, 5)
    x[2, 1, 0, 0] = torch.inf
    layer = nl.norm(name, 6, groups=2)
    y = layer(x)
    assert y[2].isnan().any()
    if name != "group_whitening":
        assert y[:, :3].isnan().all()
        assert y[:, 3:].isfinite().all()
        assert layer.running_mean.isfinite().all()
