"""Scale-free weights: found by testing, and their closed forms."""

import math

import pytest
import torch
from torch import nn

import normlab as nl
from normlab.diagnostics.scale import outside, scale
from normlab.diagnostics.subject import Subject

F = nn.functional


def network(norm=nl.BatchNorm):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), norm(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)
    ).double()


def batch():
    torch.manual_seed(1)
    return torch.randn(8, 2, 6, 6).double(), torch.randint(0, 3, (8,))


def measured(model, **options):
    with Subject(model, F.cross_entropy, [batch()]) as subject:
        return {s.name: s for s in scale(subject, **options)}


def test_closed_forms():
    model = network()
    found = measured(model, lr=0.1, weight_decay=1e-2)
    conv, linear = found["0"], found["4"]
    assert (conv.invariant, linear.invariant) == ("filter", None)
    w = model[0].weight.detach().flatten(1)
    model.zero_grad()
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    g = model[0].weight.grad.flatten(1)
    norms = w.norm(dim=1)
    assert math.isclose(conv.norm, float(norms.mean()))
    assert math.isclose(conv.gradient, float(g.norm(dim=1).mean()))
    assert math.isclose(conv.rate, float((0.1 / norms**2).mean()))
    unit = g.norm(dim=1) * norms
    assert math.isclose(conv.equilibrium, float((0.1 * unit**2 / 0.02).pow(0.25).mean()))
    # ⟨w, ∇L⟩ = 0 up to ε/σ², of the order of 1e-5.
    assert conv.radial < 1e-4
    assert linear.radial > 1e-3
    assert linear.rate is linear.equilibrium is None


def test_the_equilibrium_is_one():
    """SGD with decay on a scale-free weight, started at the predicted norm, stays there."""
    torch.manual_seed(0)
    target = torch.randn(10)
    w = torch.randn(10, dtype=torch.float64)
    lr, decay = 0.1, 0.05
    norms = []
    for step in range(4000):
        v = w.clone().requires_grad_()
        noise = torch.randn(10, dtype=torch.float64)
        (g,) = torch.autograd.grad((v / v.norm()) @ (target.double() * 0 + noise), v)
        w = w - lr * (g + decay * w)
        if step > 1000:
            norms.append(float(w.norm()) ** 4)
    # At unit norm E‖∇̃‖² = 9: noise in 10 dimensions less the radial one.
    predicted = lr * 9 / (2 * decay)
    # Mean over 3000 correlated steps, and terms of order ηλ = 0.5 % left out: 10 %.
    assert abs(sum(norms) / len(norms) / predicted - 1) < 0.1


def test_whole_weights():
    found = measured(network(lambda c: nl.norm("layer", c)))
    assert found["0"].invariant == "layer"
    w = network()[0].weight.detach()
    assert math.isclose(found["0"].norm, float(w.norm()))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c)])
def test_layers_of_torch(norm):
    expected = "filter" if norm is nn.BatchNorm2d else "layer"
    assert measured(network(norm), span=False)["0"].invariant == expected


def test_outside_of_the_span():
    model = nn.Linear(3, 1, bias=False)
    model.weight.data = torch.tensor([[3.0, 0.0, 4.0]])
    x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    with Subject(nn.Sequential(model), F.mse_loss, [(x, torch.zeros(2, 1))]) as subject:
        (found,) = scale(subject)
    assert math.isclose(found.outside, 0.8, rel_tol=1e-6)


def test_chosen_layers():
    assert list(measured(network(), layers=["4"])) == ["4"]
    with pytest.raises(ValueError, match="named 9; there are 0, 4"):
        measured(network(), layers=["9"])


@pytest.mark.parametrize("size", [4, 40])
def test_the_part_outside_the_span_against_a_projector(size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(20, 3)).double()
    x = torch.randn(size, 2, 4, 4).double()
    x[:, 1] = 0  # half of each patch is never reached
    with Subject(model, F.cross_entropy, [(x, torch.randint(0, 3, (size,)))]) as subject:
        found = outside(subject)
        assert outside(subject, ["2"]) == {"2": found["2"]}
    rows = {
        "0": F.unfold(x, 3).movedim(1, 2).reshape(-1, 18),
        "2": model[:2](x).detach(),
    }
    for name, seen in rows.items():
        w = model.get_submodule(name).weight.detach().flatten(1)
        left = w - w @ torch.linalg.pinv(seen) @ seen
        assert math.isclose(found[name], float(left.norm() / w.norm()), abs_tol=1e-9)
    assert found["0"] > 0.3
