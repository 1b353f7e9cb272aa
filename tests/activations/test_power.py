"""Power normalization beside its formulas, forward and backward, in numpy."""

import math

import numpy as np
import pytest
import torch

import normlab as nl

C, EPS = 3, 1e-5


def data(step, n=4):
    g = torch.Generator().manual_seed(step)
    return 0.5 + 1.5 * torch.randn(n, C, 5, generator=g, dtype=torch.float64)


def made(**options):
    layer = nl.PowerNorm(C, **options).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.5, -2.0]))
        layer.bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
    return layer


def mean(x):
    return x.mean((0, 2))[None, :, None]


class Oracle:
    """The paper's two algorithms, step by step: PN-V in the warm-up, PN after it."""

    def __init__(self, layer, alpha=0.9, alpha_back=0.9, released=False):
        self.gamma = layer.weight.detach().numpy()[None, :, None]
        self.beta = layer.bias.detach().numpy()[None, :, None]
        self.square, self.nu = np.ones((1, C, 1)), np.zeros((1, C, 1))
        self.alpha, self.alpha_back, self.released = alpha, alpha_back, released

    def step(self, x, g, warm):
        batch = mean(x**2)
        psi = np.sqrt((batch if warm else self.square) + EPS)
        z = x / psi
        h = self.gamma * g
        below = np.sqrt(batch + EPS) if self.released and not warm else psi
        gx = (h - z * (mean(h * z) if warm else self.nu)) / below
        self.square = self.alpha * self.square + (1 - self.alpha) * batch
        lam, gam = mean(h * z), mean(z * z)
        self.nu = self.nu * (1 - (1 - self.alpha_back) * gam) + (1 - self.alpha_back) * lam
        return self.gamma * z + self.beta, gx, (g * z).sum((0, 2)), g.sum((0, 2))


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("warmup", [0, 2])
def test_training_and_evaluation_beside_the_paper(warmup, released):
    layer = made(warmup=warmup, released=released, momentum=0.2, backward_momentum=0.3)
    oracle = Oracle(layer, 0.8, 0.7, released)
    for step in range(5):
        x = data(step).requires_grad_()
        g = data(step + 100)
        y = layer(x)
        layer.zero_grad()
        y.backward(g)
        expected = oracle.step(x.detach().numpy(), g.numpy(), step < warmup)
        got = y.detach(), x.grad, layer.weight.grad, layer.bias.grad
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)  # float64, another order
        np.testing.assert_allclose(layer.running_square, oracle.square.ravel(), rtol=1e-12)
        np.testing.assert_allclose(layer.running_control, oracle.nu.ravel(), rtol=1e-9)
    x = data(9)
    view = (1, -1, 1)
    root = (layer.running_square.view(view) + EPS).sqrt()
    expected = layer.weight.view(view) * x / root + layer.bias.view(view)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-12, atol=1e-12)  # rounding
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_in_the_steady_state_the_gradient_is_the_exact_one():
    """With the same batch again and again, ψ² and ν settle where PN-V computes them."""
    layer, x, g = made(warmup=0, eps=0.0), data(1), data(2)
    for _ in range(400):
        z = x.clone().requires_grad_()
        layer(z).backward(g)
    exact = x.clone().requires_grad_()
    made(warmup=1, eps=0.0)(exact).backward(g)
    # 0.9^400 = 5e-19 of the start is left.
    torch.testing.assert_close(z.grad, exact.grad, rtol=1e-9, atol=1e-9)


def function(layer):
    names = [n for n, _ in layer.named_parameters()]

    def call(x, *parameters):
        buffers = {n: b.clone() for n, b in layer.named_buffers()}
        given = {**buffers, **dict(zip(names, parameters, strict=True))}
        return torch.func.functional_call(layer, given, (x,))

    return call, [p.detach().clone().requires_grad_() for p in layer.parameters()]


def test_the_gradient_of_the_warm_up_is_exact():
    call, parameters = function(made(warmup=1))
    inputs = [data(1).requires_grad_(), *parameters]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_policies():
    layer, x = made(warmup=0), data(1)
    layer(x).sum().backward()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with nl.statistics(layer, update=False):
        layer(x.requires_grad_()).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    parts = made(warmup=0)
    with nl.statistics(parts, update="accumulate"):
        for part in data(3).split(2):
            parts(part.requires_grad_()).pow(2).sum().backward()
        assert nl.statistics.commit(parts) == 1
    whole = made(warmup=0)
    whole(data(3))
    # Float64 rounding.
    torch.testing.assert_close(parts.running_square, whole.running_square, rtol=1e-12, atol=0)
    assert parts.running_control.eq(0).all()


def test_nothing_that_is_not_finite_is_stored():
    layer = made(warmup=0)
    x = data(1)
    x[0, 0, 0] = math.nan
    layer(x.requires_grad_()).sum().backward()
    y = layer(data(2).requires_grad_())
    y.backward(torch.full_like(y, math.inf))
    assert all(b.isfinite().all() for b in layer.buffers())


def test_a_backward_pass_may_be_repeated():
    layer = made(warmup=0)
    for step in range(2):
        layer(data(step).requires_grad_()).pow(2).sum().backward()
    assert layer.running_control.ne(0).all()
    x = data(5).requires_grad_()
    y = layer(x).pow(2).sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, x)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
def test_compiled_gradients_are_those_of_eager_in_one_graph():
    """Two passes forward before those backward: each has the statistics of its own forward pass."""
    torch._dynamo.reset()
    results = []
    for backend in (None, "aot_eager"):
        layer = made(warmup=1)
        call = layer if backend is None else torch.compile(layer, backend=backend, fullgraph=True)
        found = []
        for step in range(4):
            xs = [data(2 * step + i).requires_grad_() for i in range(2)]
            ys = [call(x) for x in xs]
            for i, y in enumerate(ys):
                y.backward(data(50 + 2 * step + i))
            found += [y.detach() for y in ys] + [x.grad for x in xs]
        results.append([*found, *(b.clone() for b in layer.buffers())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)  # float64, another order


def test_masked_positions_count_for_nothing():
    layer, alone, x, g = made(warmup=0), made(warmup=0), data(1), data(2)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[:, 3:] = False
    for _ in range(3):
        a, b = x.clone(), x[:, :, :3].clone().requires_grad_()
        a[:, :, 3:] = math.nan
        a.requires_grad_()
        layer(a, mask=mask).backward(g)
        alone(b).backward(g[:, :, :3])
    # Float64 rounding.
    torch.testing.assert_close(a.grad[:, :, :3], b.grad, rtol=1e-10, atol=1e-12)
    assert a.grad[:, :, 3:].eq(0).all()


@pytest.mark.parametrize("options", [{"warmup": -1}, {"backward_momentum": 2.0}])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match="received"):
        nl.PowerNorm(3, **options)


def test_the_warm_up_of_short_runs():
    card = nl.catalogue()["power"]
    assert card.for_steps(500) == {"warmup": 50}
    assert card.for_steps(10**6) == {"warmup": 10_000}
