"""Initial weights of parametrized layers, schemes and gains."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from normlab.networks import NetworkError, align, initialize, weight_layers


class Centred(nn.Module):
    """A parametrization without a right inverse that counts how often it is read."""

    reads = 0

    def forward(self, weight):
        self.reads += 1
        return weight - weight.mean((1, 2, 3), keepdim=True)


class Derived(nn.Conv2d):
    """As a convolution with one-bit weights is written."""

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight.sign(), self.bias)


def chain(kind=nn.Conv2d):
    return nn.Sequential(kind(3, 4, 3), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(5, 2))


def start(model, seed=1, **options):
    initialize(model, torch.Generator().manual_seed(seed), **options)
    return model


def test_parametrized_weights_are_drawn_at_their_source():
    plain, model = start(chain()), chain()
    counter = Centred()
    parametrize.register_parametrization(model[0], "weight", counter, unsafe=True)
    read = counter.reads
    start(model)
    assert counter.reads == read
    assert torch.equal(model[0].parametrizations.weight.original, plain[0].weight)
    for i in (1, 3):
        assert torch.equal(model[i].weight, plain[i].weight)
        assert torch.equal(model[i].bias, plain[i].bias)


def test_power_iterations_are_left_alone():
    model = chain()
    parametrizations.spectral_norm(model[1])
    before = model[1].parametrizations.weight[0]._u.clone()
    start(model)
    assert torch.equal(model[1].parametrizations.weight[0]._u, before)
    assert torch.equal(model[1].parametrizations.weight.original, start(chain())[1].weight)


def test_weights_made_of_several_tensors_are_assigned():
    model = chain()
    parametrizations.weight_norm(model[0])
    start(model)
    # g·v/‖v‖ with g = ‖v‖: two roundings.
    torch.testing.assert_close(model[0].weight, start(chain())[0].weight, rtol=1e-6, atol=1e-7)


def test_subclasses_of_convolutions_are_weight_layers():
    derived, plain = start(chain(Derived)), start(chain())
    assert [name for name, _ in weight_layers(derived)] == ["0", "1", "3"]
    assert torch.equal(derived[0].weight, plain[0].weight)


def test_gains_multiply_what_is_drawn():
    model, plain = chain(), start(chain())
    model[1].init_gain = 0.5
    start(model)
    assert torch.equal(model[1].weight, plain[1].weight * 0.5)
    assert torch.equal(model[3].weight, plain[3].weight)


def test_glorot():
    model = start(nn.Sequential(nn.Conv2d(20, 30, 3), nn.Linear(200, 100)), scheme="glorot")
    for layer, fans in zip(model, (9 * 50, 300), strict=True):
        # Uniform on ±√(6/fans): 5400 or more draws come within a hundredth of the bound.
        bound = (6 / fans) ** 0.5
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        assert layer.bias.abs().max() == 0
    with pytest.raises(NetworkError, match="scheme must be one of he, glorot; received 'uniform'"):
        start(chain(), scheme="uniform")


def test_align_knows_parametrized_weights():
    for weights_only in (True, False):
        model, reference = start(chain(), seed=2), start(chain())
        parametrize.register_parametrization(model[0], "weight", Centred(), unsafe=True)
        copied = align(model, reference, weights_only=weights_only)
        assert set(copied) == {name for name, _ in model.named_parameters()}
        source = model[0].parametrizations.weight.original
        assert torch.equal(source, reference[0].weight)
        assert source is not reference[0].weight
        assert set(align(reference, model)) == {name for name, _ in reference.named_parameters()}
