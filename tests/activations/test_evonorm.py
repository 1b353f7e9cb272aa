"""EvoNorm-B0 and -S0 (2004.02967): formulas by numpy, the second branch, the linear form."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import normlab as nl
from activations.cases import build, sample
from normlab.networks import units

TIGHT = {"rtol": 1e-10, "atol": 1e-11}  # float64 rounding of two orders of the same sums
SHAPES = [(8, 6), (8, 6, 5), (4, 6, 5, 3)]
GROUPS = {"groups": 3}


def axes(x):
    return tuple(range(2, x.ndim))


def column(p, x):
    return p.detach().numpy().reshape(1, -1, *[1] * (x.ndim - 2))


def b0(layer, x, variance=None, bessel=False, eps=1e-5):
    """The formula with numpy's variances; a variance where it is the stored one."""
    batch = x.var((0, *axes(x)), keepdims=True) if variance is None else column(variance, x)
    own = x.var(axes(x), keepdims=True, ddof=int(bessel)) if axes(x) else np.zeros_like(x)
    v, weight, bias = (column(p, x) for p in (layer.v, layer.weight, layer.bias))
    return weight * x / np.maximum(np.sqrt(batch + eps), v * x + np.sqrt(own + eps)) + bias


def s0(layer, x, groups=3, bessel=False, eps=1e-5):
    v, weight, bias = (column(p, x) for p in (layer.v, layer.weight, layer.bias))
    parts = x.reshape(x.shape[0], groups, -1)
    variance = parts.var(2, ddof=int(bessel), keepdims=True)
    deviation = np.broadcast_to(np.sqrt(variance + eps), parts.shape).reshape(x.shape)
    return weight * x / (1 + np.exp(-v * x)) / deviation + bias


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, torch.as_tensor(expected), **(tolerance or TIGHT))


@pytest.mark.parametrize("bessel", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_b0_over_steps_and_in_evaluation(shape, bessel):
    layer, stored = build("evonorm_b0", {"bessel": bessel}), torch.ones(6, dtype=torch.float64)
    for seed in range(3):
        x = sample(shape, seed=seed)
        close(layer(x), b0(layer, x.numpy(), bessel=bessel))
        # The running variance is biased whatever `bessel` says, as in both codes.
        stored = 0.9 * stored + 0.1 * torch.as_tensor(x.numpy().var((0, *axes(x))))
        close(layer.running_var.double(), stored, rtol=1e-6, atol=0)  # kept in float32 or more
    x = sample(shape, seed=9)
    close(layer.eval()(x), b0(layer, x.numpy(), layer.running_var, bessel))


@pytest.mark.parametrize("bessel", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_s0_in_both_modes(shape, bessel):
    layer, x = build("evonorm_s0", {**GROUPS, "bessel": bessel}), sample(shape)
    for training in (True, False):
        close(layer.train(training)(x), s0(layer, x.numpy(), bessel=bessel))


@pytest.mark.parametrize("bessel", [False, True])
def test_s0_of_an_input_wider_than_its_parameters(bessel):
    layer = nl.EvoNormS0(6, **GROUPS, bessel=bessel)
    nn.init.uniform_(layer.weight)
    x = sample((8, 6, 5))
    close(layer(x), s0(layer, x.numpy(), bessel=bessel))


def test_both_branches_of_b0_are_taken():
    layer, x = nl.EvoNormB0(6).double(), sample((8, 6, 5))
    y, batch = layer(x), x.std((0, 2), correction=0, keepdim=True)
    first = torch.isclose(y, x / batch, rtol=1e-4, atol=0)  # ε
    assert first[x < 0].double().mean() > 0.9
    assert 0 < first.double().mean() < 1
    assert y[~first].max() < 1  # x/(x + √…), which saturates at 1/v


def test_b0_without_positions_has_the_second_branch_vx_plus_root_eps():
    layer, x = nl.EvoNormB0(6).double(), sample((8, 6))
    batch = (x.var(0, correction=0) + 1e-5).sqrt()
    close(layer(x), x / torch.maximum(batch, x + 1e-5**0.5))
    other = nl.EvoNormB0(6, bessel=True).double()  # 0/0 in the code that corrects; 0 here
    close(other(x), layer(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["evonorm_b0", "evonorm_s0"])
def test_gradients_against_differences_and_the_plain_formula(name, training):
    options = GROUPS if name == "evonorm_s0" else {}
    layer, x = build(name, options), sample((4, 6, 3), seed=3).requires_grad_()
    layer(sample((8, 6, 5)))
    layer.train(training)
    if name == "evonorm_b0":
        layer.update = False
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[1, 1:] = mask[2] = False
    named = dict(layer.named_parameters())

    def function(x, *values):
        return functional_call(layer, dict(zip(named, values, strict=True)), (x, mask))

    inputs = (x, *named.values())
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    fast = torch.autograd.grad(function(*inputs).pow(2).sum(), inputs)
    with nl.kernels.backend("reference"):
        plain = torch.autograd.grad(function(*inputs).pow(2).sum(), inputs)
    for a, b in zip(fast, plain, strict=True):
        close(a, b)


@pytest.mark.parametrize("name", ["evonorm_b0", "evonorm_s0"])
def test_masked_positions_count_nowhere(name):
    layer = build(name, GROUPS if name == "evonorm_s0" else {})
    x = sample((8, 6, 7))
    mask = torch.ones(8, 7, dtype=torch.bool)
    mask[:, 5:] = False
    y = layer(x, mask)
    assert (y[:, :, 5:] == 0).all()
    close(y[:, :, :5], build(name, GROUPS if name == "evonorm_s0" else {})(x[:, :, :5]))


@pytest.mark.parametrize("name", ["evonorm_b0", "evonorm_s0"])
def test_without_its_nonlinearity_it_is_affine_alone(name):
    layer, x = build(name, {"activation": None}), sample((8, 6, 5))
    weight, bias = layer.weight[:, None], layer.bias[:, None]
    close(layer(x), (weight * x + bias).detach())
    assert layer.activation is None
    assert [n for n, _ in layer.named_parameters()] == ["weight", "bias"]
    assert not list(layer.buffers())
    layer(sample((1, 6)))  # nothing is averaged


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("channel_dim", "affine"), [(1, True), (-1, True), (1, False)])
@pytest.mark.parametrize("name", ["evonorm_b0", "evonorm_s0"])
def test_gradients_of_the_linear_form(name, channel_dim, affine, backend):
    """∂L/∂x = γ·∂L/∂y, ∂L/∂γ = Σ x·∂L/∂y, ∂L/∂β = Σ ∂L/∂y, in two dtypes."""
    for dtype, tolerance in ((torch.float64, TIGHT), (torch.float32, {"rtol": 1e-5, "atol": 1e-5})):
        layer = build(name, {"activation": None, "affine": affine, "channel_dim": channel_dim})
        layer = layer.to(dtype)
        x, dy = (sample((4, 6, 5, 3), seed=s).movedim(1, channel_dim).to(dtype) for s in (1, 2))
        x.requires_grad_()
        shape = [6 if i == channel_dim % 4 else 1 for i in range(4)]
        rest = [i for i in range(4) if i != channel_dim % 4]
        weight = layer.weight.detach().view(shape) if affine else 1.0
        with nl.kernels.backend(backend):
            y = layer(x)
            found = torch.autograd.grad(y, [x, *layer.parameters()], dy)
        expected = [weight * dy, (x * dy).sum(rest), dy.sum(rest)] if affine else [dy]
        torch.testing.assert_close(list(found), [t.detach() for t in expected], **tolerance)


@pytest.mark.parametrize("name", ["evonorm_b0", "evonorm_s0"])
def test_networks_add_no_activation_and_find_the_linear_form(name):
    def factory(channels, **options):
        return nl.norm(name, channels, **options)

    assert [n for n, _ in units.stage(factory, 8).named_children()] == ["norm"]
    assert units.bare(factory, 8).norm.activation is None
    assert not units.needs_bias(units.stage(factory, 8))


@pytest.mark.parametrize("name", ["evonorm_b0", "evonorm_s0"])
def test_another_activation_is_refused(name):
    with pytest.raises(ValueError, match=r"activation is 'evonorm'.*received 'relu'"):
        nl.norm(name, 6, activation="relu")


def test_the_scale_laws():
    """At ε = 0, S0(a·x; v/a) = S0(x), and B0(a_c·x) = B0(x): both of its branches scale."""
    x, a = sample((8, 6, 5)), 7.0
    layer = build("evonorm_s0", {**GROUPS, "eps": 0.0})
    other = copy.deepcopy(layer)
    other.v.data.div_(a)
    close(other(a * x), layer(x).detach())
    layer = build("evonorm_b0", {"eps": 0.0})
    factors = torch.linspace(0.2, 9, 6, dtype=torch.float64)[:, None]
    close(layer(factors * x), build("evonorm_b0", {"eps": 0.0})(x))


@pytest.mark.parametrize(("channels", "groups"), [(6, 1), (16, 4), (256, 32)])
def test_the_default_number_of_groups(channels, groups):
    assert nl.EvoNormS0(channels).groups == groups


@pytest.mark.parametrize("name", ["evonorm_b0", "evonorm_s0"])
def test_only_the_input_is_kept(name):
    layer, kept = nl.norm(name, 64), 0
    x = torch.randn(8, 64, 16, 16, requires_grad=True)

    def pack(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert kept <= 1.1 * x.numel()


@pytest.mark.parametrize("name", ["evonorm_b0", "evonorm_s0", "iterative"])
def test_activation_checkpointing(name):
    """It lets a backward pass read what was saved once, and no more."""
    layer = nl.norm(name, 6).double()
    a, b = (sample((8, 6, 5)).requires_grad_() for _ in range(2))
    checkpoint(layer, a, use_reentrant=False).pow(3).sum().backward()
    layer(b).pow(3).sum().backward()
    assert torch.equal(a.grad, b.grad)


# The compiler itself makes an instance of a function of autograd, which torch warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["evonorm_b0", "evonorm_s0"])
def test_the_compiler_takes_it_whole(name):
    layer, x = nl.norm(name, 8), torch.randn(4, 8, 5)
    other = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    for module, given in ((compiled, a), (other, b)):
        module(given).pow(3).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)  # float32 sums
    for mine, theirs in zip(layer.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_accumulated_micro_batches_store_the_variance_of_their_union():
    layer, x = nl.EvoNormB0(6).double(), sample((8, 6, 5))
    with nl.statistics(layer, update="accumulate"):
        layer(x[:3]), layer(x[3:])
        assert nl.statistics.commit(layer) == 1
    whole = nl.EvoNormB0(6).double()
    whole(x)
    torch.testing.assert_close(layer.running_var, whole.running_var, rtol=1e-6, atol=0)


def test_a_network_of_them_trains():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(3, 8, 3), nl.EvoNormB0(8), nn.Conv1d(8, 8, 3), nl.EvoNormS0(8),
                        nn.Flatten(), nn.Linear(8 * 6, 2))  # fmt: skip
    x, t = torch.randn(32, 3, 10), torch.randint(0, 2, (32,))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(net(x), t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
