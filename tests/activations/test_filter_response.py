"""Filter response normalization (1911.09737): its variants, learned ε, and the affine TLU."""

import copy

import numpy as np
import pytest
import torch
from torch.func import functional_call

import normlab as nl
from activations.cases import arrays, build, sample
from normlab.core.card import invariances
from normlab.core.operation import LearnedEps

TIGHT = {"rtol": 1e-10, "atol": 1e-11}  # float64 rounding of two orders of the same sums
VARIANTS = [{"over": over, **groups, "centered": centered}
            for over, groups in (("map", {}), ("sample", {}), ("group", {"groups": 3}))
            for centered in (False, True)]  # fmt: skip


def formula(layer, x, options):
    """In numpy; areas of one sample at a time."""
    over, centered = options.get("over", "map"), options.get("centered", False)
    groups = {"map": x.shape[1], "sample": 1, "group": options.get("groups")}[over]
    eps = options.get("eps", 1e-6)
    p = arrays(layer)
    eps += abs(float(p["eps_learned"])) if options.get("learned_eps") else 0.0
    rows = x.reshape(x.shape[0], groups, -1)
    rows = rows - rows.mean(2, keepdims=True) if centered else rows
    xhat = (rows / np.sqrt((rows**2).mean(2, keepdims=True) + eps)).reshape(x.shape)
    shape = (1, -1, *[1] * (x.ndim - 2))
    y = p["weight"].reshape(shape) * xhat + p["bias"].reshape(shape)
    activation = options.get("activation", "tlu")
    if activation == "relu":
        y = np.maximum(y, 0)
    if activation in ("tlu", "affine_tlu"):
        slope = p["slope"].reshape(shape) if activation == "affine_tlu" else 0.0
        y = np.maximum(y, slope * y + p["threshold"].reshape(shape))
    return torch.as_tensor(y)


@pytest.mark.parametrize("activation", ["tlu", "affine_tlu", "relu", None])
@pytest.mark.parametrize("options", VARIANTS)
def test_variants_of_the_ablation(options, activation):
    options = {**options, "activation": activation, "learned_eps": activation == "tlu"}
    layer = build("filter_response", options)
    for shape in ((8, 6, 5), (4, 6, 5, 3)):
        x = sample(shape)
        for training in (True, False):
            torch.testing.assert_close(
                layer.train(training)(x), formula(layer, x.numpy(), options), **TIGHT
            )


SAME = [({"over": "map"}, "instance", {}), ({"over": "sample"}, "layer", {"over": "sample"}),
        ({"over": "group", "groups": 2}, "group", {"groups": 2})]  # fmt: skip


@pytest.mark.parametrize(("options", "name", "others"), SAME)
def test_centred_variants_are_the_known_methods(options, name, others):
    more = {"eps": 1e-5, "activation": None}
    layer = build("filter_response", {**options, "centered": True, **more})
    x = sample((8, 6, 5))
    torch.testing.assert_close(layer(x), build(name, {**others, **more})(x), **TIGHT)


def test_the_uncentred_sample_is_rms():
    layer = build("filter_response", {"over": "sample", "eps": 0.1, "activation": None})
    other = build("rms", {"over": "sample", "eps": 0.1})
    x = sample((8, 6, 5))
    other.weight.data.copy_(layer.weight)
    bias = layer.bias.detach()[:, None]
    torch.testing.assert_close(layer(x) - bias, other(x), **TIGHT)


def test_groups_and_words():
    assert nl.FilterResponseNorm(64, over="group").groups == 16
    assert nl.FilterResponseNorm(64).groups is None
    assert "centered=True" in repr(nl.FilterResponseNorm(6, centered=True))
    with pytest.raises(ValueError, match="over is 'map', 'sample' or 'group'; received 'batch'"):
        nl.FilterResponseNorm(6, over="batch")
    with pytest.raises(nl.PartitionError, match="has no groups of channels; received groups=2"):
        nl.FilterResponseNorm(6, groups=2)
    with pytest.raises(nl.PartitionError, match=r"length 6.*g=4"):
        nl.FilterResponseNorm(6, over="group", groups=4)


@pytest.mark.parametrize("shape", [(16, 6), (16, 6, 1, 1)])
def test_fully_connected_layers_with_learned_eps(shape):
    """x/√(x² + ε) in each element: odd, increasing, and ε sets where it bends."""
    layer = nl.FilterResponseNorm(6, learned_eps=True, activation=None).double()
    x = sample(shape)
    eps = 1e-6 + layer.eps_learned.item()
    assert eps == pytest.approx(1.01e-4)
    torch.testing.assert_close(layer(x), x / (x * x + eps).sqrt(), **TIGHT)
    x = torch.linspace(-0.1, 0.1, 16, dtype=torch.float64).view(16, *[1] * (len(shape) - 1))
    x = x.expand(shape)
    y = layer(x)
    assert (y.diff(dim=0) > 1e-4).all()
    torch.testing.assert_close(layer(-x), -y, **TIGHT)
    flat = nl.FilterResponseNorm(6, activation=None).double()(x)
    assert (flat.abs() > 0.98).all()  # the fixed ε = 1e-6 leaves the sign alone


@pytest.mark.parametrize("eps_l", [1e-4, -1e-4, 0.3])
def test_the_gradient_of_the_learned_eps(eps_l):
    layer, x = build("filter_response", {"learned_eps": True}), sample((4, 6)).requires_grad_()
    layer.eps_learned.data.fill_(eps_l)
    named = dict(layer.named_parameters())
    y = functional_call(layer, named, (x,)).pow(2).sum()
    got = torch.autograd.grad(y, named["eps_learned"])[0]
    w, b, t = (named[n] for n in ("weight", "bias", "threshold"))
    eps = torch.tensor(eps_l, dtype=torch.float64, requires_grad=True)
    u = w * x / (x * x + 1e-6 + eps.abs()).sqrt() + b
    want = torch.autograd.grad(torch.maximum(u, t).pow(2).sum(), eps)[0]
    torch.testing.assert_close(got, want, **TIGHT)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("recovery", [nl.Affine(), nl.Affine(scale=False, shift=False), nl.TLU()])
def test_the_gradient_of_the_learned_eps_beside_stored_statistics(recovery, p):
    """As where batch normalization with such an ε is tuned with its statistics held."""
    operation = nl.Standardize(eps=LearnedEps(init=0.1), p=p)
    layer = nl.Normalize(6, "n c * -> c (n *)", operation=operation, statistics=nl.Running(),
                         recovery=recovery).double()  # fmt: skip
    layer(sample((8, 6, 5)))
    layer.eval()
    x, parameters = sample((4, 6, 3), seed=1).requires_grad_(), tuple(layer.parameters())
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[1, 1:] = False
    got = torch.autograd.grad(layer(x, mask).pow(3).sum(), (x, *parameters))
    with nl.kernels.backend("reference"):
        want = torch.autograd.grad(layer(x, mask).pow(3).sum(), (x, *parameters))
    torch.testing.assert_close(got, want, **TIGHT)
    named = dict(layer.named_parameters())

    def function(eps):
        return functional_call(layer, {**named, "eps_learned": eps}, (x, mask))

    eps = named["eps_learned"]
    assert torch.autograd.gradcheck(function, eps, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, eps)


# --- The affine TLU -----------------------------------------------------------------------------


def test_it_starts_as_relu():
    layer, relu = (nl.FilterResponseNorm(6, activation=a) for a in ("affine_tlu", "relu"))
    x = torch.randn(8, 6, 5)
    torch.testing.assert_close(layer(x), relu(x))  # which compiled kernels may fuse
    assert layer.slope.tolist() == layer.threshold.tolist() == [0.0] * 6
    assert layer.activation == "affine_tlu"


ANYWHERE = [("batch", {}), ("group", {"groups": 2}), ("ghost_batch", {"batch_size": 3}),
            ("batch_renorm", {"rmax": 1.0, "dmax": 0.0}), ("layer", {"over": "position"}),
            ("filter_response", {"learned_eps": True})]  # fmt: skip


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("name", "options"), ANYWHERE)
def test_wherever_an_activation_may_stand(name, options, affine):
    layer = build(name, {**options, "activation": "affine_tlu"}, affine=affine)
    plain = build(name, {**options, "activation": None}, affine=affine)
    kept = ("weight", "bias", "eps_learned")
    same = {k: v for k, v in layer.state_dict().items() if k in kept}
    plain.load_state_dict(same, strict=False)
    x = sample((8, 6, 5))
    for training in (True, False):
        u = plain.train(training)(x)
        line = layer.slope[:, None] * u + layer.threshold[:, None]
        torch.testing.assert_close(layer.train(training)(x), torch.maximum(u, line), **TIGHT)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "options"), ANYWHERE)
def test_its_derivatives(name, options, training):
    layer = build(name, {**options, "activation": "affine_tlu"})
    x = sample((4, 6, 3), seed=3).requires_grad_()
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[1, 1:] = False
    layer(sample((8, 6, 5)))
    layer.train(training)
    if layer.stored_names:
        layer.update = False
    named = dict(layer.named_parameters())

    def function(x, *values):
        return functional_call(layer, dict(zip(named, values, strict=True)), (x, mask))

    inputs = (x, *named.values())
    # r and d of a renormalization are constants to the gradient: here 1 and 0, always.
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    fast = torch.autograd.grad(function(*inputs).pow(3).sum(), inputs)
    with nl.kernels.backend("reference"):
        slow = torch.autograd.grad(function(*inputs).pow(3).sum(), inputs)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


def test_by_hand():
    """Where the line holds, ∂z/∂u = κ, ∂z/∂τ = 1 and ∂z/∂κ = u; where not, 1, 0 and 0."""
    layer = nl.Normalize(2, "n c * -> (n c) (*)", operation=nl.Center(),
                         recovery=nl.Affine(False, False, "affine_tlu")).double()  # fmt: skip
    layer.slope.data.fill_(0.25)
    layer.threshold.data.fill_(-0.5)
    x = torch.tensor([[[3.0, -3.0, 1.0, -1.0]] * 2], dtype=torch.float64, requires_grad=True)
    y = layer(x)
    expected = torch.tensor([3.0, -1.25, 1.0, -0.75], dtype=torch.float64)
    torch.testing.assert_close(y, expected.expand(1, 2, 4), **TIGHT)
    y.sum().backward()
    assert layer.threshold.grad.tolist() == [2.0, 2.0]
    assert layer.slope.grad.tolist() == pytest.approx([-4.0, -4.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_the_input_alone(dtype):
    layer, kept = nl.FilterResponseNorm(64, activation="affine_tlu").to(dtype), 0
    x = torch.randn(8, 64, 16, 16, dtype=dtype, requires_grad=True)

    def pack(tensor):
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert kept <= 1.1 * x.numel() * x.element_size()


@pytest.mark.parametrize(
    ("options", "kinds", "per"),
    [({"activation": "affine_tlu"}, "scale", "sample and channel"),
     ({"over": "group", "groups": 3, "centered": True}, "scale shift", "sample and group"),
     ({"over": "sample", "activation": None}, "scale", "sample")],
)  # fmt: skip
def test_other_options_keep_the_laws(options, kinds, per):
    nl.check_normalizer(
        lambda c: nl.FilterResponseNorm(c, **options), invariances=invariances(per, kinds)
    ).raise_for_failures()


def test_the_compiler_takes_it_whole():
    layer, x = nl.FilterResponseNorm(6, activation="affine_tlu"), torch.randn(8, 6, 5)
    layer.slope.data.fill_(0.2)
    z, other = x.clone().requires_grad_(), copy.deepcopy(layer)
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x.requires_grad_()).sum().backward()
    other(z).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-5)  # float32 sums
    torch.testing.assert_close(layer.slope.grad, other.slope.grad, rtol=1e-4, atol=1e-5)


def test_the_card_asks_for_a_warm_up():
    assert nl.catalogue()["filter_response"].warmup == 0.1
