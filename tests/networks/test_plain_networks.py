"""Groups of plain convolutional networks, the deep linear network and its task."""

import pytest
import torch
from network_fakes import FAKES, Batch
from torch import nn

from normlab.networks import CnnPlan, NetworkError, build, deep_linear_task


def widths(plan):
    return [width for width, _ in plan.layers()]


def strided(plan):
    return [i for i, (_, stride) in enumerate(plan.layers()) if stride == 2]


def test_networks_of_ten_and_forty_convolutions():
    # Layer lists of the code of 2106.05956.
    ten = CnnPlan(depth=10, width=64, stages=5, halve="last")
    assert widths(ten) == [64, 64, 128, 128, 256, 256, 512, 512, 512, 512]
    assert strided(ten) == [1, 3, 5, 7]
    forty = CnnPlan(depth=40, width=64, stages=5, halve="last")
    assert widths(forty) == [64] * 8 + [128] * 8 + [256] * 8 + [512] * 16
    assert strided(forty) == [7, 15, 23, 31]


def test_four_stages_reach_eight_times_the_width():
    plan = CnnPlan(depth=10, width=64, stages=4)
    assert widths(plan) == [64] * 3 + [128] * 2 + [256] * 3 + [512] * 2
    assert strided(plan) == [3, 5, 8]


def test_uniform_networks():
    assert CnnPlan(depth=4, width=64, stages=1).layers() == [(64, 1)] * 4
    growing = CnnPlan(depth=4, width=8, stages=2, growth=1)
    assert growing.layers() == [(8, 1), (8, 1), (8, 2), (8, 1)]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_group_needs_a_convolution(depth):
    assert CnnPlan(depth=depth, stages=5).layers() == CnnPlan(depth=depth).layers()
    assert CnnPlan(depth=2).layers() == [(16, 1), (32, 2)]


def linear(norm=nn.Identity, spec="deep_linear", image_shape=(10, 1, 1), seed=0):
    torch.manual_seed(seed)
    return build(spec, norm, classes=10, image_shape=image_shape)


def test_deep_linear_network_is_a_product_of_matrices():
    network = linear().double()
    product = torch.eye(10, dtype=torch.float64)
    for weight in network.parameters():  # weights alone: no bias anywhere
        assert weight.shape == (10, 10)
        product = weight @ product
    assert len(list(network.parameters())) == 25
    x = torch.randn(7, 10, dtype=torch.float64)
    # 25 products of 10 × 10 in float64: rounding far below 1e-12 of values near 1.
    torch.testing.assert_close(network(x), x @ product.T, rtol=1e-10, atol=1e-12)


def test_weights_of_the_deep_linear_network_are_glorot():
    weights = torch.stack(list(linear().parameters()))
    bound = (6 / 20) ** 0.5
    assert 0.95 * bound < weights.abs().max() <= bound
    # 2500 uniform draws: the relative standard error of their variance is √(0.8/2500) ≈ 0.018.
    assert weights.var().item() == pytest.approx(0.1, rel=0.08)


@pytest.mark.parametrize("kind", FAKES)
def test_deep_linear_network_with_every_normalizer(kind):
    network = linear(FAKES[kind], "deep_linear:depth=4,width=6", (3, 4, 4))
    reference = linear(Batch, "deep_linear:depth=4,width=6", (3, 4, 4))
    for name in ("linear1", "linear2", "linear3", "head"):
        layer = getattr(network, name)
        assert layer.bias is None
        assert torch.equal(layer.weight, getattr(reference, name).weight)
    assert not any(isinstance(layer, nn.ReLU) for layer in network.modules())
    network(torch.randn(5, 3, 4, 4)).square().sum().backward()
    assert network.linear1.weight.grad.abs().max() > 0


def test_the_task_has_a_linear_solution():
    state = torch.get_rng_state()
    x, y, matrix = deep_linear_task(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert (x.shape, y.shape, matrix.shape) == ((1000, 10), (1000, 10), (10, 10))
    solved = torch.linalg.lstsq(x.double(), y.double()).solution.T
    # y was rounded to float32, and x is well conditioned.
    torch.testing.assert_close(solved.float(), matrix, rtol=1e-5, atol=1e-5)
    # 10⁴ normal draws: mean and variance within five standard errors.
    assert abs(x.mean()) < 0.05
    assert abs(x.var() - 1) < 0.07
    again, other = deep_linear_task(3), deep_linear_task(4)
    assert all(torch.equal(a, b) for a, b in zip(again, (x, y, matrix), strict=True))
    assert not torch.equal(other[0], x)


def test_impossible_tasks_are_refused():
    with pytest.raises(NetworkError, match="samples must be a whole number"):
        deep_linear_task(0, samples=0)
    with pytest.raises(NetworkError, match="size must be a whole number"):
        deep_linear_task(0, size=-1)
