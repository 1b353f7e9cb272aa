"""Transforms of torch.func through training-mode statistics, which they leave as they were."""

import copy

import pytest
import torch
from torch import nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)  # fmt: skip

import normlab as nl
from activations.cases import ONE_EACH, STORING, build, sample

TIGHT = {"rtol": 1e-9, "atol": 1e-10}  # float64; second derivatives lose a digit or two
SHAPE = (4, 6, 3)


def model(name, options, seed=0):
    layer = build(name, options, seed=seed)
    if name == "batch_renorm":
        layer.running_mean.fill_(0.1)
        layer.running_std.fill_(1.1)
    return layer


def state(layer):
    return {k: v.clone() for k, v in layer.state_dict().items()}


def unchanged(layer, before):
    return all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_jacobians(name, options, backend):
    layer, x = model(name, options), sample(SHAPE)
    before = state(layer)
    with nl.kernels.backend(backend):
        reverse, forward = jacrev(layer)(x), jacfwd(layer)(x)
    assert unchanged(layer, before)  # probes do not train the model
    layer.update = False
    plain = torch.autograd.functional.jacobian(layer, x)
    torch.testing.assert_close(reverse, plain, **TIGHT)
    torch.testing.assert_close(forward, plain, **TIGHT)


@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_hessians_and_their_products(name, options):
    layer, x, v = model(name, options), sample((4, 6, 2)), sample((4, 6, 2), seed=7)
    weights = sample((4, 6, 2), seed=8)
    before = state(layer)

    def loss(x):
        return (layer(x) ** 3 * weights).sum()

    forward_over_reverse = jvp(grad(loss), (x,), (v,))[1]
    reverse_over_reverse = vjp(grad(loss), x)[1](v)[0]
    reverse_over_forward = grad(lambda x: jvp(loss, (x,), (v,))[1])(x)
    full = hessian(loss)(x).reshape(x.numel(), -1)
    assert unchanged(layer, before)
    layer.update = False
    expected = torch.autograd.functional.hvp(loss, x, v)[1]
    for product in (forward_over_reverse, reverse_over_reverse, reverse_over_forward):
        torch.testing.assert_close(product, expected, **TIGHT)
    torch.testing.assert_close((full @ v.reshape(-1)).view(x.shape), expected, **TIGHT)
    torch.testing.assert_close(full, full.T, **TIGHT)


@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_hessian_products_in_the_parameters(name, options):
    layer, x = model(name, options), sample(SHAPE)
    parameters = {k: p.detach() for k, p in layer.named_parameters()}
    if not parameters:
        pytest.skip("none")
    tangents = {k: torch.randn_like(p) for k, p in parameters.items()}
    layer.update = False

    def loss(parameters):
        return functional_call(layer, parameters, (x,)).sigmoid().pow(2).sum()

    forward = jvp(grad(loss), (parameters,), (tangents,))[1]
    reverse = vjp(grad(loss), parameters)[1](tangents)[0]
    for key, value in forward.items():
        torch.testing.assert_close(value, reverse[key], **TIGHT)


@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_per_sample_gradients(name, options):
    """Each sample alone as a batch of one, where the layer is defined on it."""
    layer, x = model(name, options), sample((5, 1, 6, 4))
    parameters = {k: p.detach() for k, p in layer.named_parameters()}
    if not parameters:
        pytest.skip("none")
    before = state(layer)

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).pow(3).sum()

    stacked = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    assert unchanged(layer, before)
    layer.update = False
    for i in range(5):
        alone = grad(loss)(parameters, x[i])
        for key, value in alone.items():
            torch.testing.assert_close(stacked[key][i], value, **TIGHT)


@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_stacked_models_train_as_each_alone(name, options):
    """vmap over parameters, buffers and batches: each model updates statistics of its own."""
    models = [model(name, options, seed=s) for s in range(3)]
    if not list(models[0].parameters()):
        pytest.skip("nothing to stack")
    xs = torch.stack([sample((8, 6, 5), seed=s) for s in range(3)])
    parameters, buffers = stack_module_state(models)
    skeleton = copy.deepcopy(models[0])

    def loss(parameters, buffers, x):
        y = functional_call(skeleton, (parameters, buffers), (x,))
        return y.pow(3).sum(), y

    slopes, ys = vmap(grad(loss, has_aux=True))(parameters, buffers, xs)
    for i, alone in enumerate(models):
        y = alone(xs[i])
        y.pow(3).sum().backward()
        torch.testing.assert_close(ys[i], y, **TIGHT)
        for key, p in alone.named_parameters():
            torch.testing.assert_close(slopes[key][i], p.grad, **TIGHT)
        for key, b in alone.named_buffers():
            torch.testing.assert_close(buffers[key][i], b, **TIGHT)


@pytest.mark.parametrize(("name", "options"), STORING)
def test_one_model_on_many_batches(name, options):
    """Buffers that are not part of the transform keep what they hold."""
    layer, xs = model(name, options), torch.stack([sample((8, 6, 5), seed=s) for s in range(3)])
    before = state(layer)
    ys = vmap(layer)(xs)
    assert unchanged(layer, before)
    layer.update = False
    for x, y in zip(xs, ys, strict=True):
        torch.testing.assert_close(y, layer(x), **TIGHT)


def test_randomness_of_dropout_under_vmap():
    layer, x = nl.norm("ic", 6, dropout=0.5), torch.randn(3, 8, 6, 5)
    ys = vmap(layer, randomness="different")(x[:1].expand(3, 8, 6, 5))
    assert not torch.equal(ys[0], ys[1])
    ys = vmap(layer, randomness="same")(x[:1].expand(3, 8, 6, 5))
    assert torch.equal(ys[0], ys[1])


def test_a_network_through_and_through():
    net = nn.Sequential(nn.Linear(4, 6), nl.BatchNorm(6, activation="silu"), nn.Linear(6, 1))
    net = net.double()
    x, before = sample((8, 4)), copy.deepcopy(net.state_dict())
    parameters = {k: p.detach() for k, p in net.named_parameters()}

    def loss(parameters):
        return functional_call(net, parameters, (x,)).pow(2).mean()

    curvature = hessian(loss)(parameters)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    first = curvature["0.weight"]["2.weight"].reshape(24, 6)
    second = curvature["2.weight"]["0.weight"].reshape(6, 24)
    torch.testing.assert_close(first, second.T, **TIGHT)


def test_masks_under_vmap():
    layer = build("group", {"groups": 2})
    xs = torch.stack([sample((4, 6, 5), seed=s) for s in range(3)])
    masks = torch.rand(3, 4, 5) > 0.3
    ys = vmap(layer)(xs, masks)
    for x, mask, y in zip(xs, masks, ys, strict=True):
        torch.testing.assert_close(y, layer(x, mask), **TIGHT)
