"""Signals through the layers against closed forms."""

import math

import pytest
import torch
from torch import nn

import normlab as nl
from normlab.diagnostics.propagation import growth, propagation
from normlab.diagnostics.subject import Subject

F = nn.functional


def measured(model, batches, loss=F.mse_loss, **options):
    with Subject(model, loss, batches) as subject:
        return {layer.name: layer for layer in propagation(subject, **options)}


def test_a_deep_linear_network():
    """Orthogonal layers times 2: variance ×4 a layer, gradient norm ×2 towards the input."""
    torch.manual_seed(0)
    layers = []
    for _ in range(6):
        q, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
        layer = nn.Linear(8, 8, bias=False).double()
        layer.weight.data = 2 * q
        layers.append(layer)
    x = torch.randn(32, 8, dtype=torch.float64)
    x = x - x.mean(0)
    found = list(measured(nn.Sequential(*layers), [(x, torch.zeros_like(x))]).values())
    total = float(x.square().sum())
    for i, layer in enumerate(found):
        assert math.isclose(layer.mean_square, total / x.numel() * 4 ** (i + 1), rel_tol=1e-9)
        # Centred inputs: the mean square is the variance.
        assert math.isclose(layer.variance, layer.mean_square, rel_tol=1e-9)
        # L = mean y²; ∂L/∂y = 2y/numel, pulled back through orthogonal layers times 2.
        last = 2 * math.sqrt(total * 4**6) / x.numel()
        assert math.isclose(layer.gradient, last * 2 ** (5 - i), rel_tol=1e-9)
    assert math.isclose(growth([layer.variance for layer in found]), 4, rel_tol=1e-9)
    assert math.isclose(growth([layer.gradient for layer in found]), 0.5, rel_tol=1e-9)
    # Angles are those of the inputs.
    unit = x / x.norm(dim=1, keepdim=True)
    M = unit @ unit.T
    for layer in found:
        assert math.isclose(layer.cosine, float((M.sum() - 32) / (32 * 31)), abs_tol=1e-9)
        assert math.isclose(
            layer.stable_rank, 32 / float(torch.linalg.eigvalsh(M)[-1]), rel_tol=1e-9
        )


@pytest.mark.parametrize(("rank", "n"), [(1, 6), (3, 6)])
def test_ranks(rank, n):
    """Samples that are copies of `rank` orthogonal ones."""
    x = torch.eye(rank, 5, dtype=torch.float64).repeat(n // rank, 1)
    layer = nn.Linear(5, 5, bias=False).double()
    layer.weight.data = torch.eye(5, dtype=torch.float64)
    found = measured(layer, [(x, x)])[""]
    assert math.isclose(found.stable_rank, rank, rel_tol=1e-9)
    assert math.isclose(found.effective_rank, rank, rel_tol=1e-9)


def test_dead_units():
    layer = nn.Linear(2, 4)
    layer.bias.data = torch.tensor([-100.0, 100.0, -100.0, -100.0])
    found = measured(nn.Sequential(layer, nn.ReLU()), [(torch.randn(9, 2), torch.zeros(9, 4))] * 2)
    assert found["1"].dead == 0.75
    assert found["0"].dead == 0


def test_inplace_and_residual_and_shared():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act = nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)

        def forward(self, x):
            return self.act(self.a(x)) + self.act(x.clone())

    found = measured(
        nn.Sequential(Block(), Block()), [(torch.randn(4, 3, 2, 2), torch.zeros(4, 3, 2, 2))]
    )
    assert list(found) == ["0.a", "0.act", "0", "1.a", "1.act", "1"]
    assert found["0.a"].variance > found["0.act"].variance  # seen before it was written to
    assert all(layer.gradient > 0 for layer in found.values())


def test_one_sample_and_nothing_behind_it():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            self.unused(x)
            return self.used(x)

    found = measured(Aside(), [(torch.randn(1, 3), torch.zeros(1, 2))])
    assert math.isnan(found["unused"].gradient)
    assert found["used"].gradient > 0
    assert math.isnan(found["used"].cosine)
    assert math.isnan(found["used"].stable_rank)


def test_normalized_layers_have_the_variance_that_they_set():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nl.BatchNorm(6), nn.Flatten(), nn.Linear(6 * 36, 2))
    found = measured(model, [(torch.randn(16, 2, 8, 8) * 7, torch.zeros(16, 2))])
    assert math.isclose(found["1"].variance, 1, rel_tol=1e-3)  # ε of 1e-5 in variances near 1
    assert found["1"].kind == "BatchNorm"


@pytest.mark.parametrize("values", [[], [1.0], [0.0, -1.0], [float("nan"), 2.0]])
def test_growth_of_nothing(values):
    assert math.isnan(growth(values))


def test_one_number_a_sample_is_one_channel():
    """A regression's output, whose last batch is smaller."""
    model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    batches = [(torch.randn(n, 3), torch.zeros(n)) for n in (8, 5)]
    found = measured(model, batches)["1"]
    exact = [float(model(x).detach().var(correction=0)) for x, _ in batches]
    assert math.isclose(found.variance, sum(exact) / 2, rel_tol=1e-5)
    assert found.dead == 0


def test_outputs_without_elements_say_nothing():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.a(x) + self.b(x[:0]).sum()

    found = measured(Routed(), [(torch.randn(4, 3), torch.zeros(4, 3))])
    assert list(found) == ["a", ""]


def test_channels_that_depend_on_the_batch():
    """Attention maps, say, of sequences of two lengths."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Flatten(1))
    batches = [(torch.randn(4, n, 3), torch.zeros(4, 3 * n)) for n in (2, 5)]
    assert measured(model, batches)["1"].dead == 0
