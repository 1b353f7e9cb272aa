"""The closed forms against the plain formulas: values, gradients and statistics."""

import copy

import pytest
import torch

import normlab as nl
from activations.cases import CASES, build, sample

TIGHT = {"rtol": 1e-10, "atol": 1e-11}  # two orders of the same float64 sums
LAYERS = [c for c in CASES if c.values[0] not in ("none", "dyt")]


def outcome(layer, x, mask):
    layer, x = copy.deepcopy(layer), x.clone().requires_grad_()
    y = layer(x, mask)
    weights = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)
    wanted = [x, *layer.parameters()]
    first = torch.autograd.grad((y**3 * weights).sum(), wanted, create_graph=True)
    second = torch.autograd.grad(sum((g * g).sum() for g in first), wanted, allow_unused=True)
    return [y, *first, *[g for g in second if g is not None], *layer.buffers()]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(("name", "options"), LAYERS)
def test_backends_agree(name, options, masked, training):
    layer, x = build(name, options), sample((8, 6, 5))
    layer(x)
    layer.train(training)
    mask = None
    if masked:
        mask = torch.arange(5) < torch.tensor([5, 2, 3, 4, 5, 2, 5, 3])[:, None]
    fast = outcome(layer, x, mask)
    with nl.kernels.backend("reference"):
        plain = outcome(layer, x, mask)
    assert len(fast) == len(plain)
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


def test_the_backend_is_set_and_restored():
    assert nl.kernels.backend.name() == "auto"
    with nl.kernels.backend("reference"):
        assert nl.kernels.backend.name() == "reference"
        with nl.kernels.backend("auto"):
            assert nl.kernels.backend.name() == "auto"
        assert nl.kernels.backend.name() == "reference"
    with pytest.raises(KeyError), nl.kernels.backend("reference"):
        raise KeyError
    assert nl.kernels.backend.name() == "auto"
    nl.kernels.backend("reference")
    assert nl.kernels.backend.name() == "reference"
    nl.kernels.backend("auto")


def test_the_backends_differ_in_what_they_run():
    x = sample((8, 6, 5)).requires_grad_()
    fast = build("batch", {})(x).grad_fn
    with nl.kernels.backend("reference"):
        plain = build("batch", {})(x).grad_fn
    assert type(fast) is not type(plain)
