"""The two implicit biases of gradient descent on scale-invariant weights, exactly."""

import pytest
import torch
from torch import nn

import normlab as nl
from normlab.weights.span import orthogonal_component, orthogonal_share, patches

ETA, DECAY = 0.1, 0.7


def problem(conv=False):
    torch.manual_seed(0)
    if conv:
        first = nn.Conv2d(2, 5, 3, padding=1, groups=1, bias=False)
        rest = [nl.BatchNorm(5, eps=0.0), nn.ReLU(), nn.Flatten(), nn.Linear(45, 3)]
        x = torch.randn(1, 2, 3, 3)  # 9 patches of 18 numbers
    else:
        first = nn.Linear(20, 5, bias=False)
        rest = [nl.BatchNorm(5, eps=0.0), nn.ReLU(), nn.Linear(5, 3)]
        x = torch.randn(8, 20)
    return nn.Sequential(first, *rest).double(), x.double()


def descend(model, x, optimizer):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    gradient = model[0].weight.grad.clone()
    optimizer.step()
    return gradient


@pytest.mark.parametrize("conv", [False, True])
def test_gradients_are_orthogonal_and_lengths_grow(conv):
    model, x = problem(conv)
    optimizer = torch.optim.SGD(model.parameters(), lr=ETA)
    for _ in range(5):
        before = model[0].weight.detach().clone().flatten(1)
        g = descend(model, x, optimizer).flatten(1)
        after = model[0].weight.detach().flatten(1)
        zero = torch.zeros(5, dtype=torch.float64)
        # Float64 rounding of inner products of numbers near 1; ε = 0.
        torch.testing.assert_close((before * g).sum(1), zero, rtol=0, atol=1e-12)
        grown = before.square().sum(1) + ETA**2 * g.square().sum(1)
        torch.testing.assert_close(after.square().sum(1), grown, rtol=1e-12, atol=1e-12)
        assert (after.norm(dim=1) > before.norm(dim=1)).all()


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("way", ["plain", "decay", "rescaling"])
def test_the_part_that_inputs_never_reach(conv, way):
    model, x = problem(conv)
    layer = model[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=ETA, weight_decay=DECAY * (way == "decay"))
    if way == "rescaling":
        nl.weight("rescaling", model, example=x).attach(optimizer)
    for _ in range(4):
        old, before = layer.weight.detach().clone().flatten(1), orthogonal_component(layer, x)
        g = descend(model, x, optimizer).flatten(1)
        after = orthogonal_component(layer, x)
        factor = {"plain": 1.0, "decay": 1 - ETA * DECAY}.get(way)
        if way == "rescaling":
            factor = 1 / (old - ETA * g).norm(dim=1, keepdim=True)
        torch.testing.assert_close(after, before * factor, rtol=1e-9, atol=1e-11)  # rounding
        assert before.norm() > 0.1
    share = float(after.norm() / layer.weight.detach().norm())
    assert orthogonal_share(layer, x) == pytest.approx(share)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 3), (5, 2, 4)),
        (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (3, 4, 11)),
        (nn.Conv2d(2, 3, (2, 3), padding="same", padding_mode="circular"), (2, 2, 5, 6)),
        (nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), groups=2), (2, 2, 3, 4, 5)),
    ],
)
def test_patches_times_weights_are_the_outputs(layer, shape):
    layer, x = layer.double(), torch.randn(shape, dtype=torch.float64)
    rows = layer.weight.flatten(1).unflatten(0, (patches(layer, x).shape[0], -1))
    y = patches(layer, x) @ rows.mT  # (G, M, units/G)
    y = y.permute(1, 0, 2).flatten(1) + layer.bias
    expected = layer(x)
    expected = (
        expected.flatten(0, -2) if x.ndim == 3 and shape[-1] == 4 else expected.movedim(1, -1)
    )
    torch.testing.assert_close(y, expected.reshape(y.shape))


def test_full_and_empty_spans():
    layer = nn.Linear(6, 3)
    assert orthogonal_share(layer, torch.randn(50, 6)) < 1e-6
    assert orthogonal_share(layer, torch.zeros(5, 6)) == pytest.approx(1)
    with pytest.raises(TypeError, match="received Embedding"):
        patches(nn.Embedding(2, 3), torch.zeros(1))
