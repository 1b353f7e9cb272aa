"""Whitening layers beside numpy and scipy formulas: values, stored statistics, exact laws."""

import copy
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch

import normlab as nl
from activations.cases import build, sample
from normlab.core.whitening import Whiten

C = 6
BATCH = ("decorrelated", "pca", "cholesky", "iterative")
FULL = ("decorrelated", "pca", "cholesky")
STORED = ("matrix", "covariance")
EPS = {"decorrelated": 1e-3, "pca": 1e-3, "cholesky": 1e-3, "iterative": 1e-5}
# Float64 through decompositions by two libraries, amplified by at most 1/√ε ≈ 30.
SAME = {"rtol": 1e-10, "atol": 1e-11}


# --- Formulas -----------------------------------------------------------------------------------


def newton(a, steps):
    trace = np.trace(a)
    p = np.eye(len(a))
    for _ in range(steps):
        p = (3 * p - p @ p @ p @ a / trace) / 2
    return p / np.sqrt(trace)


def principal(a):
    u, s, _ = np.linalg.svd(a)
    u = u * np.sign(np.take_along_axis(u, np.abs(u).argmax(0)[None], 0))
    return np.diag(s**-0.5) @ u.T


MATRIX = {
    "decorrelated": lambda a: np.real(scipy.linalg.fractional_matrix_power(a, -0.5)),
    "pca": principal,
    "cholesky": lambda a: np.linalg.inv(np.linalg.cholesky(a)),
    "iterative": partial(newton, steps=5),
}


def moments(rows):
    """μ and Σ of variables along the rows."""
    return rows.mean(1, keepdims=True), np.cov(rows, bias=True).reshape(len(rows), len(rows))


def rows_of(x, group, width):
    x = np.moveaxis(np.asarray(x), 1, 0)
    return x.reshape(len(x), -1)[group * width : (group + 1) * width]


def assembled(rows, x, layer):
    """γ·rows + β of all groups, in the axes of x."""
    flat = np.concatenate(rows)
    flat = flat * layer.weight.detach().numpy()[:, None] + layer.bias.detach().numpy()[:, None]
    first = np.moveaxis(np.asarray(x), 1, 0)
    return torch.from_numpy(np.moveaxis(flat.reshape(first.shape), 0, 1))


class Oracle:
    """Training steps and evaluation of one method."""

    def __init__(self, name, groups, stored, momentum, eps):
        self.f, self.groups, self.stored, self.momentum = MATRIX[name], groups, stored, momentum
        self.width, self.ridge, self.steps = C // groups, eps * np.eye(C // groups), 0
        self.mean = np.zeros((groups, self.width, 1))
        self.square = np.stack([np.eye(self.width)] * groups)

    def train(self, x, layer):
        self.steps += 1
        weight = 1 / self.steps if self.momentum is None else self.momentum
        rows = []
        for g in range(self.groups):
            z = rows_of(x, g, self.width)
            mean, sigma = moments(z)
            w = self.f(sigma + self.ridge)
            rows.append(w @ (z - mean))
            square = w if self.stored == "matrix" else sigma
            self.mean[g] += weight * (mean - self.mean[g])
            self.square[g] += weight * (square - self.square[g])
        return assembled(rows, x, layer)

    def evaluate(self, x, layer):
        rows = []
        for g in range(self.groups):
            w = self.square[g]
            w = w if self.stored == "matrix" else self.f(w + self.ridge)
            rows.append(w @ (rows_of(x, g, self.width) - self.mean[g]))
        return assembled(rows, x, layer)


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", BATCH)
def test_training_and_evaluation_are_the_formula(name, groups, stored, momentum):
    layer = build(name, {"groups": groups, "stored": stored, "momentum": momentum})
    oracle = Oracle(name, groups, stored, momentum, EPS[name])
    for step, shape in enumerate([(8, C, 5), (9, C), (3, C, 2, 7)]):
        x = sample(shape, seed=step)
        # Two evaluations and two decompositions; the batch of 9 has eigenvalues near ε.
        torch.testing.assert_close(layer.train()(x), oracle.train(x, layer), rtol=1e-8, atol=1e-9)
        y = sample((4, C, 3), seed=9)
        expected = oracle.evaluate(y, layer)
        torch.testing.assert_close(layer.eval()(y), expected, rtol=1e-8, atol=1e-9)
    found = getattr(layer, f"running_{stored}").numpy()
    np.testing.assert_allclose(found, oracle.square, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(layer.running_mean.numpy(), oracle.mean.reshape(-1), **SAME)
    assert int(layer.num_batches_tracked) == 3


@pytest.mark.parametrize(("operation", "groups"), [("iterative", 3), ("decorrelated", 2)])
def test_group_whitening_is_the_formula(operation, groups):
    layer = build("group_whitening", {"groups": groups, "operation": operation})
    f = MATRIX[operation]
    x = sample((5, C, 4, 3))
    out = []
    for one in x.numpy():
        mean, sigma = moments(one.reshape(groups, -1))
        w = f(sigma + 1e-5 * np.eye(groups))
        out.append((w @ (one.reshape(groups, -1) - mean)).reshape(C, 4, 3))
    gamma, beta = (p.detach()[:, None, None] for p in (layer.weight, layer.bias))
    expected = torch.from_numpy(np.stack(out)) * gamma + beta
    torch.testing.assert_close(layer(x), expected, **SAME)
    torch.testing.assert_close(layer.eval()(x), expected, **SAME)
    assert not list(layer.buffers())


def test_defaults_are_those_of_the_papers():
    for name in BATCH:
        layer = nl.norm(name, 48)
        assert (layer.eps, layer.groups, layer.stored) == (EPS[name], 3, "matrix")
        assert layer.statistics.momentum == 0.1
        assert [nl.norm(name, c).groups for c in (1, 16, 17, 18)] == [1, 1, 17, 2]
    layer = nl.norm("group_whitening", 64)
    assert (layer.eps, layer.groups) == (1e-5, 32)
    assert [nl.norm("group_whitening", c).groups for c in (1, 2, 7, 128)] == [1, 1, 1, 32]


# --- Exact laws ---------------------------------------------------------------------------------


def white(name, x, groups=1, **options):
    """The output without recovery at ε = 0, each group's channels along the rows."""
    layer = nl.norm(name, C, groups=groups, eps=0.0, affine=False, **options).double()
    y = layer(x).detach()
    return [torch.from_numpy(rows_of(y, g, C // groups)) for g in range(groups)]


def one(size):
    return torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("name", FULL)
def test_each_group_comes_out_white(name, groups):
    for rows in white(name, sample((8, C, 5)), groups):
        m = rows.shape[1]
        # Float64 rounding times the condition number of Σ, below 100.
        torch.testing.assert_close(rows @ rows.T / m, one(C // groups), rtol=0, atol=1e-12)
        torch.testing.assert_close(rows.mean(1), torch.zeros(C // groups).double(), **SAME)


@pytest.mark.parametrize("name", FULL)
def test_eps_leaves_the_part_of_the_variance_that_it_adds(name):
    x, eps = sample((8, C, 5)), 0.5
    y = nl.norm(name, C, eps=eps, affine=False).double()(x)
    rows, (_, sigma) = torch.from_numpy(rows_of(y, 0, C)), moments(rows_of(x, 0, C))
    found = torch.linalg.eigvalsh(rows @ rows.T / rows.shape[1])
    if name == "cholesky":  # its output covariance is I − εWWᵀ, with other eigenvectors than Σ
        w = torch.from_numpy(MATRIX[name](sigma + eps * np.eye(C)))
        expected = torch.linalg.eigvalsh(one(C) - eps * w @ w.T)
    else:
        expected = torch.from_numpy(np.linalg.eigvalsh(sigma))
        expected = expected / (expected + eps)
    torch.testing.assert_close(found, expected, **SAME)


def matrix(name, x, **options):
    """W of a batch."""
    layer = nl.norm(name, C, momentum=1.0, groups=1, **options).double()
    layer(x)
    return layer.running_matrix[0]


def test_zca_is_the_symmetric_whitening_and_the_nearest():
    x = sample((8, C, 5))
    w = matrix("decorrelated", x, eps=0.0)
    torch.testing.assert_close(w, w.T, **SAME)
    assert (torch.linalg.eigvalsh(w) > 0).all()
    z = torch.from_numpy(rows_of(x, 0, C))
    z = z - z.mean(1, keepdim=True)
    nearest = ((w @ z - z) ** 2).sum()
    for name in ("pca", "cholesky"):
        assert nearest < ((matrix(name, x, eps=0.0) @ z - z) ** 2).sum()
    for seed in range(5):
        q, _ = torch.linalg.qr(sample((C, C), seed=seed))
        assert nearest < ((q @ w @ z - z) ** 2).sum()


def test_cholesky_without_eps_needs_channels_that_vary():
    """Fewer members than channels leave a factor, as rounding is allowed for."""
    layer = nl.CholeskyWhitening(12, 2, eps=0.0).double()
    assert layer(sample((4, 12))).isfinite().all()
    x = sample((4, 12, 5))
    x[:, 3] = 2.0
    y = layer(x)
    assert y[:, :6].isnan().all()
    assert y[:, 6:].isfinite().all()


def test_cholesky_is_lower_triangular_and_blind_to_the_scale_of_channels():
    x = sample((8, C, 5))
    w = matrix("cholesky", x)
    assert torch.equal(w, w.tril())
    assert (w.diagonal() > 0).all()
    scale = torch.tensor([0.1, 3.0, 1e3, 1.0, 7.0, 1e-2]).double()[:, None]
    torch.testing.assert_close(white("cholesky", x * scale), white("cholesky", x), **SAME)


def test_pca_orders_axes_by_variance_and_fixes_their_signs():
    x = sample((8, C, 5))
    w = matrix("pca", x, eps=0.0)
    gram = w @ w.T  # Λ⁻¹
    torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-12)  # rounding
    assert (gram.diagonal().diff() > 0).all()
    assert (w.gather(1, w.abs().argmax(1, keepdim=True)) > 0).all()
    torch.testing.assert_close(matrix("pca", -x, eps=0.0), w, **SAME)


@pytest.mark.parametrize("name", FULL)
def test_linear_maps_within_a_group_turn_the_output_and_no_more(name):
    """Inner products of members (Mahalanobis) and the covariance stay, whatever the map."""
    x, m = sample((8, C, 5)), sample((C, C), seed=3)
    mapped = torch.einsum("ij,njp->nip", m, x)
    (a,), (b,) = white(name, x), white(name, mapped)
    # Rounding times the condition number of the map, below 1e3.
    torch.testing.assert_close(a.T @ a, b.T @ b, rtol=0, atol=1e-9)
    torch.testing.assert_close(b @ b.T / b.shape[1], one(C), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [*BATCH, "group_whitening"])
def test_shifts_leave_no_trace(name):
    x, layer = sample((8, C, 5)), build(name, {"groups": 2})
    shift = torch.tensor([[3.0], [-7.0], [1e3], [0.5], [2.0], [-1.0]]).double()
    if name == "group_whitening":
        shift = shift[:2].repeat_interleave(3, 0)
    torch.testing.assert_close(layer(x + shift), layer(x), rtol=0, atol=1e-9)  # rounding of 1e3


def test_iterations_approach_zca():
    x = sample((8, C, 5)) * torch.linspace(0.3, 2, C).double()[:, None]
    (target,) = white("decorrelated", x)
    far = [(white("iterative", x, iterations=t)[0] - target).abs().max() for t in range(14)]
    assert all(later < earlier for earlier, later in pairwise(far[:9]))
    assert far[13] < 1e-12  # convergence is quadratic in the end: rounding is what is left
    (late,) = white("iterative", x, iterations=60)
    assert (late - target).abs().max() < 1e-12  # and it stays there: P³Σ would blow rounding up
    assert far[5] > 0.1


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_iterations_leave_the_variances_that_theory_says(steps):
    """Eigenvalue λ of Σ/tr Σ comes out as λ·p_T(λ)², p ← ½(3p − p³λ) from p₀ = 1."""
    x = sample((8, C, 5))
    _, sigma = moments(rows_of(x, 0, C))
    share = np.linalg.eigvalsh(sigma) / np.trace(sigma)
    p = np.ones(C)
    for _ in range(steps):
        p = (3 * p - p**3 * share) / 2
    (rows,) = white("iterative", x, iterations=steps)
    found = np.linalg.eigvalsh((rows @ rows.T / rows.shape[1]).numpy())
    np.testing.assert_allclose(found, np.sort(share * p**2), rtol=1e-11)  # rounding
    assert found.max() <= 1 + 1e-12


def test_groups_of_a_sample_come_out_orthonormal_where_members_suffice():
    layer = nl.GroupWhitening(C, 3, eps=0.0, affine=False, operation="decorrelated").double()
    rows = layer(sample((5, C, 4, 3))).view(5, 3, -1)
    gram = rows @ rows.mT / rows.shape[-1]
    torch.testing.assert_close(gram, one(3).expand(5, 3, 3), rtol=0, atol=1e-12)  # rounding
    # 2 members a group are 1 direction, which is all that can come out.
    rows = layer(sample((5, C))).view(5, 3, 2)
    values = torch.linalg.eigvalsh(rows @ rows.mT / 2)
    # Directions without extent are divided by √(1e-16), the floor on eigenvalues, so that
    # rounding of 1e-16 enters as 1e-8.
    torch.testing.assert_close(values[:, 2], torch.ones(5).double(), rtol=1e-7, atol=0)
    assert (values[:, :2].abs() < 1e-7).all()


@pytest.mark.parametrize("name", BATCH)
def test_groups_of_one_channel_are_batch_normalization(name):
    x = sample((8, C, 5))
    y = nl.norm(name, C, groups=C, eps=1e-3, affine=False).double()(x)
    expected = nl.BatchNorm(C, eps=1e-3, affine=False).double()(x)
    torch.testing.assert_close(y, expected, **SAME)  # Newton starts where Σ/tr Σ = 1


# --- Fewer members than channels, masks, precision, layouts --------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.0, None])
@pytest.mark.parametrize("name", ["decorrelated", "pca", "iterative", "cholesky"])
def test_fewer_members_than_channels(name, eps, dtype):
    """Directions that the batch has are white, the others 0 — not blown up from rounding errors."""
    options = {} if eps is None else {"eps": eps}
    layer = nl.norm(name, C, affine=False, **options).to(dtype)
    x = sample((4, C)).to(dtype).requires_grad_()
    y = layer(x)
    y.pow(3).sum().backward()
    if name == "cholesky" and eps == 0:  # a factor of rounding errors, of any size, or none
        return
    assert x.grad.isfinite().all()
    found = torch.linalg.eigvalsh(torch.cov(y.detach().double().T, correction=0))
    # Rounding over the floor on eigenvalues leaves up to about √(rounding) in float32.
    assert (found[:3].abs() < 1e-3).all()
    assert (found[3:] > 0.5).all()
    assert (found[3:] < 1.001).all()


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", BATCH)
def test_masked_positions_are_left_out(name, stored):
    masked, plain = (build(name, {"groups": 2, "stored": stored}) for _ in range(2))
    x = sample((8, C, 5))
    mask = torch.rand(8, 5) < 0.6
    spoilt = torch.where(mask[:, None], x, torch.nan)
    members = x.movedim(1, -1)[mask]
    for train in (True, False):
        y = masked.train(train)(spoilt, mask=mask)
        torch.testing.assert_close(y.movedim(1, -1)[mask], plain.train(train)(members), **SAME)
        assert (y.movedim(1, -1)[~mask] == 0).all()
    for a, b in zip(masked.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, **SAME)


def test_masked_positions_of_group_whitening_and_samples_without_any():
    layer, x = build("group_whitening", {"groups": 3}), sample((3, C, 5))
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    y = layer(torch.where(mask[:, None], x, torch.inf), mask=mask)
    torch.testing.assert_close(y[:1][..., mask[0]], layer(x[:1][..., mask[0]]), **SAME)
    torch.testing.assert_close(y[1:2], layer(x[1:2]), **SAME)
    assert (y[2] == 0).all()


@pytest.mark.parametrize("name", [*BATCH, "group_whitening"])
def test_low_precision_is_computed_in_float32(name):
    layer = nl.norm(name, C, groups=2)
    low = copy.deepcopy(layer).bfloat16()
    x = sample((8, C, 5)).bfloat16()
    y = low(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x.float()).bfloat16())
    for a, b in zip(low.buffers(), layer.buffers(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    expected = layer(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x.float()), expected)


@pytest.mark.parametrize("name", [*BATCH, "group_whitening"])
def test_channels_last_comes_out_channels_last(name):
    layer, x = build(name, {"groups": 2}), sample((8, C, 5, 3))
    y = layer(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert layer(x).is_contiguous()
    last = build(name, {"groups": 2}, channel_dim=-1)
    torch.testing.assert_close(last(x.movedim(1, -1)).movedim(-1, 1), y, **SAME)


# --- Policies, pooling, processes, errors -------------------------------------------------------


def state(layer):
    return {k: v.clone() for k, v in layer.state_dict().items()}


def same(a, b):
    return all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", BATCH)
def test_policies(name, stored):
    layer, x = build(name, {"groups": 2, "stored": stored}), sample((8, C, 5))
    layer(sample((8, C, 5), seed=2))
    batch, evaluated = copy.deepcopy(layer).train(), copy.deepcopy(layer).eval()
    expected, stored_y, before = batch(x), evaluated(x), state(layer)
    assert same(before, state(evaluated))
    with nl.statistics(layer, use="stored", update=False):
        assert torch.equal(layer.train()(x), stored_y)
        assert same(state(layer), before)
    with nl.statistics(layer, use="batch", update=False):
        assert torch.equal(layer.eval()(x), expected)
        assert same(state(layer), before)
    with nl.statistics(layer, use="stored", update=True):
        assert torch.equal(layer.train()(x), stored_y)
        assert same(state(layer), state(batch))
    layer.reset_running_stats()
    fresh = build(name, {"groups": 2, "stored": stored})
    assert same(state(layer), state(fresh))
    assert "stored=" + stored in repr(layer)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", BATCH)
def test_micro_batches_pool_to_their_union(name, stored, masks):
    whole, parts = (build(name, {"groups": 2, "stored": stored}) for _ in range(2))
    x, mask = sample((9, C, 5)), torch.rand(9, 5) < 0.7 if masks else None
    whole(x, mask=mask)
    with nl.statistics(parts, update="accumulate"):
        for piece in (slice(0, 2), slice(2, 6), slice(6, 9)):
            parts(x[piece], mask=None if mask is None else mask[piece])
    assert int(parts.num_batches_tracked) == 0
    assert nl.statistics.commit(parts) == 1
    assert nl.statistics.commit(parts) == 0
    for a, b in zip(parts.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(a, b, **SAME)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", BATCH)
def test_a_group_with_values_that_are_not_finite_is_left_alone(name, stored, value):
    layer, clean = (build(name, {"groups": 2, "stored": stored}) for _ in range(2))
    x = sample((8, C, 5))
    clean(x)
    before = state(layer)
    x[2, 4, 1] = value
    y = layer(x)
    assert y[:, :3].isfinite().all()
    assert y[:, 3:].isnan().all()
    square = f"running_{stored}"
    for name_, at in (("running_mean", slice(3, None)), (square, slice(1, None))):
        assert torch.equal(state(layer)[name_][at], before[name_][at])
    torch.testing.assert_close(layer.running_mean[:3], clean.running_mean[:3], **SAME)
    torch.testing.assert_close(getattr(layer, square)[0], getattr(clean, square)[0], **SAME)
    assert int(layer.skipped_updates) == 3


def test_areas_with_one_valid_member_do_not_enter_the_statistics():
    layer, x = build("decorrelated", {}), sample((8, C, 5))
    mask = torch.zeros(8, 5, dtype=torch.bool)
    mask[0, 0] = True
    before = state(layer)
    y = layer(x, mask=mask)
    torch.testing.assert_close(y[0, :, 0], layer.bias, **SAME)
    assert same(before, state(layer))


@pytest.mark.parametrize("name", BATCH)
def test_statistics_are_shared_between_processes(name):
    """Two processes that hold the same batch sum to twice their sums: one batch of both."""
    make = partial(build, name, {"groups": 2})
    alone, shared = make(), build(name, {"groups": 2, "reduce": lambda t: 2 * t})
    x, v = (sample((8, C, 5), seed=s) for s in (1, 2))
    both, half = torch.cat([x, x]).requires_grad_(), x.clone().requires_grad_()
    y, z = alone(both), shared(half)
    torch.testing.assert_close(z, y[:8], **SAME)
    (y * torch.cat([v, v])).sum().backward()
    (z * v).sum().backward()
    torch.testing.assert_close(half.grad, both.grad[:8], rtol=1e-8, atol=1e-9)  # other sums
    for a, b in zip(alone.buffers(), shared.buffers(), strict=True):
        torch.testing.assert_close(a, b, **SAME)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("decorrelated", {"groups": 4}, nl.PartitionError, "channel axis of length 6.*g=4"),
        ("group_whitening", {"groups": 0}, nl.PartitionError, "g=0"),
        ("pca", {"groups": 2.0}, TypeError, "whole number; received 2.0"),
        ("pca", {"stored": "sigma"}, ValueError, "'matrix' or 'covariance'; received 'sigma'"),
        ("cholesky", {"eps": -1e-3}, ValueError, "eps is a finite number"),
        ("cholesky", {"momentum": 1.5}, ValueError, "momentum is .*received 1.5"),
        ("iterative", {"iterations": -1}, ValueError, "iterations is at least 0; received -1"),
        ("iterative", {"iterations": 2.5}, TypeError, "iterations is a whole number"),
        ("group_whitening", {"operation": "svd"}, ValueError, "operation is .*received 'svd'"),
        ("iterative", {"channel_dim": 2}, ValueError, "channel_dim is 1 or -1; received 2"),
    ],
)
def test_options_out_of_range(name, options, error, message):
    with pytest.raises(error, match=message):
        nl.norm(name, C, **options)


def test_areas_of_one_member():
    layer = nl.GroupWhitening(C, C)
    with pytest.warns(RuntimeWarning, match="one member"):
        y = layer(torch.randn(4, C))
    assert (y == 0).all()
    layer(torch.randn(4, C))  # warnings are errors here
    with pytest.raises(nl.PartitionError, match="names no variables"):
        Whiten(C, "n (g c) * -> (n g) (c *)", lambda a: a, groups=2, eps=0.0,
               statistics=nl.Running())  # fmt: skip
