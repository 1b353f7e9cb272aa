"""The landscape against quadratics and a hand-made protocol."""

import math

import pytest
import torch
from torch import nn

import normlab as nl
from normlab.diagnostics import landscape as ls
from normlab.diagnostics.subject import Subject

F = nn.functional


class Quadratic(nn.Module):
    """f(x) = w, so that a loss of w alone can be given."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, x):
        return self.w


def test_a_quadratic():
    """L = ½·wᵀ·A·w: g = A·w, ∇L(w − s·g) − g = −s·A·g, β = ‖A·g‖/‖g‖."""
    A = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    model = Quadratic([1.0, 2.0])
    with Subject(model, lambda w, y: 0.5 * w @ A @ w, [(torch.ones(1), None)]) as subject:
        found = ls.along_gradient(subject, 0.1, span=(0.5, 4), points=5)
    w = model.w.detach()
    g = A @ w
    assert math.isclose(found.gradient, float(g.norm()))
    assert math.isclose(found.loss, float(0.5 * w @ A @ w))
    assert found.steps == pytest.approx([0.05, 0.1375, 0.225, 0.3125, 0.4])
    for s, loss, change in zip(found.steps, found.losses, found.changes, strict=True):
        at = w - s * g
        assert math.isclose(loss, float(0.5 * at @ A @ at))
        assert math.isclose(change, float(s * (A @ g).norm()))
    assert math.isclose(found.smoothness, float((A @ g).norm() / g.norm()))
    assert found.variation == (min(found.losses), max(found.losses))
    assert found.predictiveness == (found.changes[0], found.changes[-1])


def test_a_flat_loss():
    model = Quadratic([1.0])
    with Subject(model, lambda w, y: 0 * w.sum(), [(torch.ones(1), None)]) as subject:
        assert ls.along_gradient(subject, 0.1).smoothness == 0


@pytest.mark.parametrize(
    "wrong", [{"lr": 0}, {"lr": -1}, {"lr": 1, "points": 0}, {"lr": 1, "span": (2, 1)}]
)
def test_wrong_steps(wrong):
    with (
        Subject(Quadratic([1.0]), lambda w, y: w.sum(), [(torch.ones(1), None)]) as subject,
        pytest.raises(ValueError, match="steps are positive"),
    ):
        ls.along_gradient(subject, **wrong)


def deep_linear():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(3)]).double()
    return model, (torch.randn(9, 4).double(), torch.randn(9, 4).double())


def test_covariate_shift_by_hand():
    model, (x, y) = deep_linear()
    lr = 0.3

    def gradient(*weights):
        ws = [w.clone().requires_grad_() for w in weights]
        h = x
        for w in ws:
            h = h @ w.T
        return torch.autograd.grad(F.mse_loss(h, y), ws)

    now = [layer.weight.detach() for layer in model]
    g = gradient(*now)
    moved = [w - lr * d for w, d in zip(now, g, strict=True)]
    with Subject(model, F.mse_loss, [(x, y)]) as subject:
        found = ls.covariate_shift(subject, lr)
        by_values = ls.covariate_shift(
            subject, updated={f"{i}.weight": w for i, w in enumerate(moved)}, layers=["2"]
        )
    assert [f.name for f in found] == ["0", "1", "2"]
    for i, f in enumerate(found):
        after = gradient(*moved[:i], *now[i:])[i]
        assert math.isclose(f.difference, float((g[i] - after).norm()), abs_tol=1e-12)
        cosine = float((g[i] * after).sum() / (g[i].norm() * after.norm()))
        assert math.isclose(f.cosine, cosine, abs_tol=1e-12)
    assert found[0].difference == 0
    assert by_values == [found[2]]


def test_layers_are_in_order_of_execution():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.last(self.first(x))

    batch = torch.ones(3, 2), torch.zeros(3, 2)
    with Subject(Backwards(), F.mse_loss, [batch]) as subject:
        assert ls.execution(subject) == ["first", "last"]
        assert [f.name for f in ls.covariate_shift(subject, 0.1)] == ["first", "last"]
        with pytest.raises(ValueError, match="named middle; there are first, last"):
            ls.covariate_shift(subject, 0.1, layers=["middle"])
        with pytest.raises(ValueError, match="not both"):
            ls.covariate_shift(subject)


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nl.BatchNorm(4), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, groups=2),
        nl.BatchNorm(6), nn.Flatten(), nn.Linear(150, 3),
    ).double()  # fmt: skip
    return model, (torch.randn(8, 2, 6, 6).double(), torch.randint(0, 3, (8,)))


def test_directions_have_the_lengths_of_units():
    model, batch = network()
    with Subject(model, F.cross_entropy, [batch]) as subject:
        d = ls.direction(subject)
        shared = ls.direction(subject, small="share")
        assert not torch.equal(ls.direction(subject, 1)["0.weight"], d["0.weight"])
    assert torch.equal(d["0.weight"], shared["0.weight"])
    torch.testing.assert_close(
        d["0.weight"].flatten(1).norm(dim=1), model[0].weight.flatten(1).norm(dim=1)
    )

    # Units of a transposed convolution: 2 groups of 3, each over its 2 inputs.
    def unit(w):
        return w.view(2, 2, 3, 2, 2).permute(0, 2, 1, 3, 4).reshape(6, -1)

    torch.testing.assert_close(unit(d["3.weight"]).norm(dim=1), unit(model[3].weight).norm(dim=1))
    assert not any(d[k].any() for k in ("0.bias", "1.weight", "1.bias"))
    torch.testing.assert_close(shared["1.weight"].norm(), model[1].weight.norm())


def test_what_has_no_scale_moves_orthogonally():
    """With the part along the weight removed, a slice is the same whatever the weight's length."""
    model, batch = network()
    invariant = {"0": "filter", "3": "filter"}
    curves = []
    for factor in (1.0, 7.0):
        with torch.no_grad():
            model[0].weight.mul_(factor)
            model[0].bias.mul_(factor)
        with Subject(model, F.cross_entropy, [batch]) as subject:
            d = ls.direction(subject, invariant=invariant)
            curves.append(ls.slice_losses(subject, [d], points=5))
    dots = (d["0.weight"] * model[0].weight).flatten(1).sum(1)
    assert dots.abs().max() < 1e-9 * model[0].weight.square().sum()
    # ε of 1e-5 counts for less behind weights that are 7 times as large.
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-3, atol=0)
    with Subject(model, F.cross_entropy, [batch]) as subject:
        whole = ls.direction(subject, invariant={"0": "layer"})["0.weight"]
    w = model[0].weight.detach()
    assert abs(float((whole * w).sum())) < 1e-9 * float(w.square().sum())
    torch.testing.assert_close(whole.norm(), w.norm())


def test_slices():
    model, batch = network()
    with Subject(model, F.cross_entropy, [batch]) as subject:
        a, b = ls.direction(subject, 0), ls.direction(subject, 1)
        line = ls.slice_losses(subject, [a], points=3, extent=0.5)
        plane = ls.slice_losses(subject, [a, b], points=3, extent=0.5)
        here = float(subject.loss())
        moved = {k: p + 0.5 * a[k] - 0.5 * b[k] for k, p in subject.parameters.items()}
        corner = float(subject.loss(moved))
        with pytest.raises(ValueError, match="received 3"):
            ls.slice_losses(subject, [a, a, a])
    assert line.shape == (3,)
    assert plane.shape == (3, 3)
    assert line[1] == plane[1, 1] == here
    torch.testing.assert_close(plane[:, 1], line)
    assert math.isclose(plane[2, 0], corner)


def test_a_slice_is_the_loss_along_its_directions():
    model, batch = network()
    invariant = {"0": "filter", "3": "filter"}
    with Subject(model, F.cross_entropy, [batch]) as subject:
        found = ls.loss_slice(subject, 2, points=3, extent=0.5, seed=4, invariant=invariant)
        a, b = (ls.direction(subject, seed, invariant=invariant) for seed in (4, 5))
        assert ls.loss_slice(subject).orthogonal is None
        with pytest.raises(ValueError, match="extent above 0"):
            ls.loss_slice(subject, extent=0.0)
    assert found.ticks == (-0.5, 0.0, 0.5)
    assert found.orthogonal == 2
    for i, s in enumerate(found.ticks):
        for j, t in enumerate(found.ticks):
            state = {k: p + s * a[k] + t * b[k] for k, p in model.named_parameters()}
            logits = torch.func.functional_call(model, state, batch[0])  # in training mode
            exact = float(F.cross_entropy(logits, batch[1]).detach())
            assert math.isclose(float(found.losses[i, j]), exact, rel_tol=1e-12)


@pytest.mark.parametrize("points", [1, 2, 5, 11, 15])
def test_ticks(points):
    found = ls.ticks(0.3, points)
    assert found == pytest.approx(
        torch.linspace(-0.3, 0.3, points, dtype=torch.float64).tolist() if points > 1 else [0.0]
    )
    assert points % 2 == 0 or found[points // 2] == 0


def test_parameters_of_normalizers_stay_however_many_axes_they_have():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.LayerNorm((4, 4, 4)), nl.norm("whitening_coloring", 4, groups=1),
        nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip
    batch = torch.randn(8, 2, 6, 6), torch.randint(0, 3, (8,))
    with Subject(model, F.cross_entropy, [batch]) as subject:
        kept, shared = ls.direction(subject), ls.direction(subject, small="share")
    inside = [k for k in kept if k.startswith(("1.", "2."))]
    assert max(kept[k].ndim for k in inside) == 3
    for k in inside:
        assert not kept[k].any()
        p = model.get_parameter(k).detach()
        torch.testing.assert_close(shared[k].norm(), p.norm())
    assert kept["0.weight"].any()


def test_covariate_shift_of_parametrized_weights():
    """A parametrization that does nothing changes nothing."""
    model, batch = deep_linear()
    with Subject(model, F.mse_loss, [batch]) as subject:
        expected = ls.covariate_shift(subject, 0.3)
    for layer in model:
        nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    with Subject(model, F.mse_loss, [batch]) as subject:
        found = ls.covariate_shift(subject, 0.3)
    assert [f.name for f in found] == [f"{i}.parametrizations.weight" for i in range(3)]
    assert [f.difference for f in found] == pytest.approx([f.difference for f in expected])


def test_modules_that_return_what_their_last_part_did_are_in_the_order():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.ones(2, 2)), nn.Linear(2, 2)

        def forward(self, x):
            return self.inner(x @ self.scale)

    model = nn.Sequential(Outer(), nn.Linear(2, 2))
    with Subject(model, F.mse_loss, [(torch.ones(3, 2), torch.zeros(3, 2))]) as subject:
        assert ls.execution(subject) == ["0.inner", "0", "1"]
