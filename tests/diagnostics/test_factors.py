"""Factors of K-FAC where they are exact, and known covariances."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from normlab.diagnostics.curvature import Curvature
from normlab.diagnostics.factors import factors
from normlab.diagnostics.subject import Subject

F = nn.functional


def test_one_sample_of_a_linear_layer_is_exact():
    """With one sample Fisher's block is A ⊗ G of the model's own labels; here G is 2/n·1."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False).double()
    x, y = torch.randn(1, 3).double(), torch.randn(1, 2).double()
    with Subject(nn.Sequential(model), F.mse_loss, [(x, y)]) as subject:
        gauss = Curvature(subject, "gauss_newton").eigenvalues(steps=6, tolerance=1e-12)
        (found,) = factors(subject)
    assert math.isclose(float(found.inputs.values[0]), float(x.square().sum()))
    assert math.isclose(float(gauss.values[0]), float(found.inputs.values[0]), rel_tol=1e-9)
    g = (model(x) - y).detach()  # ∂(mean of squares)/∂y = 2·(f − y)/2
    assert math.isclose(float(found.gradients.values[0]), float(g.square().sum()), rel_tol=1e-9)


@pytest.mark.parametrize("centred", [False, True])
def test_second_moments_by_hand(centred):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2, stride=2, bias=False), nn.Flatten(), nn.Linear(12, 2)
    ).double()
    batches = [(torch.randn(5, 2, 4, 4).double() + 1, torch.randint(0, 2, (5,))) for _ in range(2)]
    with Subject(model, F.cross_entropy, batches) as subject:
        conv, linear = factors(subject, centred=centred)
    assert (conv.name, linear.name) == ("0", "2")
    x = torch.cat([b[0] for b in batches])
    a = F.unfold(x, 2, stride=2).movedim(1, 2).reshape(-1, 8)
    outs, grads = [], []
    for part, target in batches:
        y = model[0](part)
        y.retain_grad()
        F.cross_entropy(model[2](y.flatten(1)), target).backward()
        grads.append(y.grad.movedim(1, -1).reshape(-1, 3) * len(part))
        outs.append(y.detach().flatten(1))

    def spectrum(rows):
        m = rows - rows.mean(0) if centred else rows
        return torch.linalg.eigvalsh(m.T @ m / len(m)).flip(0)

    torch.testing.assert_close(conv.inputs.values, spectrum(a))
    torch.testing.assert_close(
        conv.gradients.values, spectrum(torch.cat(grads)), rtol=1e-6, atol=1e-9
    )
    torch.testing.assert_close(
        linear.inputs.values, spectrum(torch.cat(outs)).clamp(min=0), rtol=1e-6, atol=1e-9
    )
    assert conv.inputs.observations == 40
    values = spectrum(a)
    assert math.isclose(conv.inputs.condition(), float(values[0] / values[-1]), rel_tol=1e-6)
    assert math.isclose(conv.inputs.condition(0.5), float(values[0] / values[3]), rel_tol=1e-6)
    # 10 observations of 12 inputs have no full rank.
    assert linear.inputs.condition() == math.inf
    assert linear.condition() == math.inf


def test_a_dead_layer():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[0].bias.data.fill_(-100)
    batch = torch.randn(4, 2), torch.zeros(4, 2)
    with Subject(model, F.mse_loss, [batch]) as subject:
        (found,) = factors(subject)
    assert math.isnan(found.gradients.condition())


def test_parametrized_and_checkpointed_layers():
    """A parametrization that does nothing, and a forward pass that runs twice, change nothing."""

    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batch = torch.randn(7, 3).double(), torch.randint(0, 2, (7,))
    with Subject(model, F.cross_entropy, [batch]) as subject:
        expected = factors(subject)
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    for one in (model, Checkpointed(model)):
        with Subject(one, F.cross_entropy, [batch]) as subject:
            found = factors(subject)
        assert len(found) == len(expected) == 2
        for f, e in zip(found, expected, strict=True):
            assert f.inputs.observations == e.inputs.observations == 7
            torch.testing.assert_close(f.inputs.values, e.inputs.values)
            torch.testing.assert_close(f.gradients.values, e.gradients.values)


def test_what_is_not_finite():
    model = nn.Sequential(nn.Linear(2, 2))
    batch = torch.full((4, 2), math.nan), torch.zeros(4, 2)
    with Subject(model, F.mse_loss, [batch]) as subject:
        (found,) = factors(subject)
    assert math.isnan(found.inputs.condition())
