"""Curvature against dense matrices and known spectra."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import normlab as nl
from normlab.diagnostics import lanczos
from normlab.diagnostics.curvature import Curvature, by_layer
from normlab.diagnostics.subject import Subject

F = nn.functional


def problem(norm, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh(), nn.Linear(5, 3)).double()
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return model, (torch.randn(12, 4).double(), torch.randint(0, 3, (12,)))


def dense(model, batch, training):
    """∇²L by torch.autograd.functional, on a copy of the parameters in one vector."""
    model.train(training)
    state = {k: p.detach() for k, p in model.named_parameters()}
    sizes = [p.numel() for p in state.values()]

    def loss(flat):
        parts = flat.split(sizes)
        at = {k: a.view_as(p) for (k, p), a in zip(state.items(), parts, strict=True)}
        buffers = {k: b.clone() for k, b in model.named_buffers()}
        out = torch.func.functional_call(model, (at, buffers), batch[0])
        return F.cross_entropy(out, batch[1])

    flat = torch.cat([p.reshape(-1) for p in state.values()])
    return torch.autograd.functional.hessian(loss, flat)


def matrix(curvature):
    return torch.stack([curvature(e) for e in torch.eye(curvature.size, dtype=torch.float64)])


NORMS = [nn.BatchNorm1d, nl.BatchNorm, lambda c: nl.norm("layer", c),
         lambda c: nl.norm("filter_response", c), lambda c: nl.norm("batch_renorm", c)]  # fmt: skip


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_hessian_is_that_of_the_trained_function(norm, mode):
    model, batch = problem(norm(5))
    exact = dense(model, batch, mode == "train")
    with Subject(model, F.cross_entropy, [batch], mode=mode) as subject:
        found = matrix(Curvature(subject))
    # Float64; the two differ in the order of sums alone.
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-10)


def test_evaluation_mode_is_another_matrix():
    model, batch = problem(nn.BatchNorm1d(5))
    tops = []
    for mode in ("train", "eval"):
        exact = torch.linalg.eigvalsh(dense(model, batch, mode == "train"))
        with Subject(model, F.cross_entropy, [batch], mode=mode) as subject:
            found = Curvature(subject).eigenvalues(steps=30, tolerance=1e-6)
        top = exact[exact.abs().argmax()]
        torch.testing.assert_close(found.values[0], top, rtol=1e-6, atol=0)
        tops.append(float(top))
    assert abs(tops[0] / tops[1] - 1) > 0.2


def test_gauss_newton_of_the_squared_error_is_jacobian_squared():
    model, (x, _) = problem(nn.BatchNorm1d(5))
    y = torch.randn(12, 3).double()
    with Subject(model, F.mse_loss, [(x, y)]) as subject:
        found = matrix(Curvature(subject, "gauss_newton"))
        at = subject.leaves()
        out = subject.evaluate((x, y), at).output.reshape(-1)
        rows = [torch.autograd.grad(o, list(at.values()), retain_graph=True) for o in out]
    jacobian = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    torch.testing.assert_close(found, jacobian.T @ jacobian * 2 / len(out), rtol=1e-9, atol=1e-12)


def test_gauss_newton_of_the_cross_entropy_is_fishers_matrix():
    model, (x, y) = problem(nl.BatchNorm(5))
    with Subject(model, F.cross_entropy, [(x, y)]) as subject:
        found = matrix(Curvature(subject, "gauss_newton"))
        at = subject.leaves()
        logits = subject.evaluate((x, y), at).output
        fisher = torch.zeros_like(found)
        for row in logits:  # E over the model's own labels of ∇log p·∇log pᵀ, output by output
            p = row.softmax(0).detach()
            slopes = [torch.autograd.grad(r, list(at.values()), retain_graph=True) for r in row]
            J = torch.stack([torch.cat([g.reshape(-1) for g in s]) for s in slopes])
            fisher += J.T @ (torch.diag(p) - torch.outer(p, p)) @ J / len(logits)
    torch.testing.assert_close(found, fisher, rtol=1e-9, atol=1e-12)


def test_several_batches_are_averaged():
    model, batch = problem(nn.BatchNorm1d(5))
    halves = [(batch[0][:6], batch[1][:6]), (batch[0][6:], batch[1][6:])]
    exact = (dense(model, halves[0], True) + dense(model, halves[1], True)) / 2
    with Subject(model, F.cross_entropy, halves) as subject:
        torch.testing.assert_close(matrix(Curvature(subject)), exact, rtol=1e-8, atol=1e-10)


def test_blocks_of_layers():
    model, batch = problem(nl.BatchNorm(5))
    exact = dense(model, batch, True)
    with Subject(model, F.cross_entropy, [batch]) as subject:
        found = by_layer(subject, steps=30, tolerance=1e-8)
    start = 0
    for name, size in {"0": 25, "1": 10, "3": 18}.items():
        block = torch.linalg.eigvalsh(exact[start : start + size, start : start + size])
        top = block[block.abs().argmax()]
        torch.testing.assert_close(found[name].values[0], top, rtol=1e-6, atol=1e-9)
        start += size


def test_a_linear_loss_has_no_curvature():
    with Subject(nn.Linear(2, 1), lambda out, y: out.mean(), [(torch.ones(3, 2), None)]) as subject:
        for kind in ("hessian", "gauss_newton"):
            assert Curvature(subject, kind)(torch.ones(3, dtype=torch.float64)).abs().max() == 0


def test_wrong_uses():
    with Subject(nn.Linear(2, 1), None, [(torch.ones(3, 2), None)]) as subject:
        with pytest.raises(ValueError, match="'fisher'"):
            Curvature(subject, "fisher")
        with pytest.raises(ValueError, match="give loss="):
            Curvature(subject, "gauss_newton")
        with pytest.raises(ValueError, match="named w"):
            Curvature(subject, names=["w"])


# --- numerics on known matrices ------------------------------------------------------------------


def symmetric(values, seed=0):
    torch.manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T


def test_eigenvalues_of_a_spectrum_like_a_networks():
    """Few large ones above a bulk: 1 % within 30 products, with residuals that are true bounds."""
    torch.manual_seed(1)
    values = [40.0, 31.0, -12.0, *(0.5 * torch.randn(300)).tolist()]
    A = symmetric(values)
    found = lanczos.eigenvalues(lambda v: A @ v, len(values), 3, steps=30, tolerance=1e-2)
    assert found.converged
    assert found.products <= 30
    for value, residual, exact in zip(found.values, found.residuals, values[:3], strict=True):
        assert abs(value - exact) <= 0.01 * abs(exact)
        assert abs(value - exact) <= residual + 1e-9


def test_not_converged_is_said():
    A = symmetric(torch.linspace(1, 2, 200).tolist())
    found = lanczos.eigenvalues(lambda v: A @ v, 200, steps=3, tolerance=1e-8)
    assert not found.converged
    assert found.products == 3


@pytest.mark.parametrize("values", [[2.0], [3.0, 3.0, 3.0], [0.0, 0.0], [1.0, -1.0]])
def test_degenerate_spectra(values):
    A = symmetric(values)
    found = lanczos.eigenvalues(lambda v: A @ v, len(values))
    assert abs(float(found.values[0].abs()) - max(map(abs, values))) < 1e-9


def test_trace_and_its_error():
    A = symmetric([5.0, 1.0, -2.0, 0.5] * 5)
    found = lanczos.trace(lambda v: A @ v, 20, draws=400)
    # A normal mean of 400 draws is within four standard errors all but once in 16 000.
    assert abs(found.value - 22.5) < 4 * found.error
    off = 2 * (A.square().sum() - A.diag().square().sum())
    assert 0.8 < found.error / math.sqrt(off / 400) < 1.2
    assert math.isnan(lanczos.trace(lambda v: A @ v, 20, draws=1).error)


def test_density_has_the_moments_of_the_spectrum():
    values = torch.linspace(-1, 3, 60).tolist()
    A = symmetric(values)
    found = lanczos.density(lambda v: A @ v, 60, steps=60, draws=40)
    assert abs(float(found.weights.sum()) - 1) < 1e-9
    for order in (1, 2, 3):
        exact = sum(v**order for v in values) / 60
        # 40 draws of an average of 60 numbers: 2 % of the moment's size, four deviations.
        assert abs(found.moment(order) - exact) < 0.15 * max(abs(v) ** order for v in values)
    at, curve = found.curve()
    assert abs(float(torch.trapezoid(curve, at)) - 1) < 0.01


def test_a_spectrum_of_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        lanczos.eigenvalues(lambda v: v * math.nan, 4)


@pytest.mark.parametrize("form", ["tuple", "dataclass"])
def test_gauss_newton_with_outputs_that_feed_others(form):
    """A model that returns its features too, on which the loss depends through the logits alone."""

    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor
        features: torch.Tensor

    class Both(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            h = self.inner[:-1](x)
            y = self.inner[-1](h)
            return (y, h) if form == "tuple" else Output(y, h)

    def loss(out, y):
        return F.cross_entropy(out[0] if form == "tuple" else out.logits, y)

    model, batch = problem(nl.BatchNorm(5))
    with Subject(model, F.cross_entropy, [batch]) as subject:
        exact = matrix(Curvature(subject, "gauss_newton"))
    with Subject(Both(model), loss, [batch]) as subject:
        found = matrix(Curvature(subject, "gauss_newton"))
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)  # float64, other order of sums


def test_gauss_newton_needs_outputs_that_it_finds():
    class Hidden(nn.Linear):
        def forward(self, x):
            return type("Result", (), {"y": super().forward(x)})()

    with (
        Subject(Hidden(2, 1), lambda out, y: out.y.mean(), [(torch.ones(3, 2), None)]) as subject,
        pytest.raises(ValueError, match="Result"),
    ):
        Curvature(subject, "gauss_newton")(torch.ones(3, dtype=torch.float64))


def test_sparse_gradients():
    """An embedding is a linear layer of one-hot inputs."""
    torch.manual_seed(0)
    tables = [nn.Embedding(5, 3, sparse=sparse).double() for sparse in (True, False)]
    tables[1].weight.data = tables[0].weight.data
    ids, y = torch.tensor([0, 3, 3, 1]), torch.tensor([0, 1, 2, 0])
    found = []
    for table in tables:
        with Subject(table, F.cross_entropy, [(ids, y)]) as subject:
            found.append((matrix(Curvature(subject)), subject.gradient()["weight"]))
    torch.testing.assert_close(found[0], found[1])
