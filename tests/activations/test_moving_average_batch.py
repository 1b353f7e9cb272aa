"""Moving average batch normalization beside its formulas, forward and backward, in numpy."""

import math

import numpy as np
import pytest
import torch

import normlab as nl

C, EPS = 3, 1e-5


def data(step, n=4):
    g = torch.Generator().manual_seed(step)
    return (1 + step % 3) * (0.5 + 1.5 * torch.randn(n, C, 5, generator=g, dtype=torch.float64))


def made(**options):
    layer = nl.MovingAverageBatchNorm(C, **options).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.5, -2.0]))
        layer.bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
    return layer


def mean(x):
    return x.mean((0, 2))[None, :, None]


class Oracle:
    """Lists of all batches' statistics, from which windows are cut."""

    def __init__(self, layer, momentum, window, warmup, renorm_after, rmax):
        self.gamma = layer.weight.detach().numpy()[None, :, None]
        self.beta = layer.bias.detach().numpy()[None, :, None]
        self.window, self.momentum, self.rmax = window, momentum, rmax
        self.first, self.renorm = max(window, warmup - 1), max(renorm_after, warmup)
        self.squares, self.products, self.running = [], [], np.ones((1, C, 1))

    def step(self, x, g):
        self.squares.append(mean(x**2))
        k, m = len(self.squares), self.window
        chi2 = self.squares[-1] if k <= self.first else sum(self.squares[-m:]) / m
        chi = np.sqrt(chi2 + EPS)
        z, r = x / chi, np.ones(1)
        if k > self.renorm:
            r = np.clip(chi / np.sqrt(self.running + EPS), 1 / self.rmax, self.rmax)
        h = self.gamma * r * g
        self.products.append(mean(h * z))
        psi = self.products[-1] if k <= self.first else sum(self.products[-m:]) / m
        self.running = (1 - self.momentum) * self.running + self.momentum * chi2
        gx = (h - psi * z) / chi
        return self.gamma * r * z + self.beta, gx, (g * r * z).sum((0, 2)), g.sum((0, 2))


@pytest.mark.parametrize(
    "options",
    [
        {"window": 2, "warmup": 0, "renorm_after": 4, "rmax": 1.1, "momentum": 0.2},
        {"window": 3, "warmup": 5, "renorm_after": 0, "rmax": 5.0, "momentum": 0.1},
        {"window": 1, "warmup": 0, "renorm_after": 0, "rmax": 2.0, "momentum": 0.1},
    ],
)
def test_training_and_evaluation_beside_the_formulas(options):
    layer = made(**options)
    oracle = Oracle(layer, **options)
    for step in range(9):
        x, g = data(step).requires_grad_(), data(step + 100)
        y = layer(x)
        layer.zero_grad()
        y.backward(g)
        expected = oracle.step(x.detach().numpy(), g.numpy())
        got = y.detach(), x.grad, layer.weight.grad, layer.bias.grad
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)  # float64, another order
        np.testing.assert_allclose(layer.running_square, oracle.running.ravel(), rtol=1e-12)
    x, view = data(9), (1, -1, 1)
    root = (layer.running_square.view(view) + EPS).sqrt()
    expected = layer.weight.view(view) * x / root + layer.bias.view(view)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-12, atol=1e-12)  # rounding
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_with_one_batch_again_and_again_the_gradient_is_the_exact_one():
    layer, x, g = made(window=4, warmup=0, renorm_after=100), data(1), data(2)
    for _ in range(6):
        z = x.clone().requires_grad_()
        layer(z).backward(g)
    exact = x.clone().requires_grad_()
    made(warmup=10)(exact).backward(g)
    torch.testing.assert_close(z.grad, exact.grad, rtol=1e-10, atol=1e-10)  # float64 rounding


def test_the_windows_gradient_is_linear_in_this_batchs_statistic():
    """A window of two: half of this batch's mean(h·z) is in Ψ, the other half is the last one's."""
    layer, x, g = made(window=2, warmup=0, renorm_after=100), data(1), data(2)
    for _ in range(3):
        layer(x.clone().requires_grad_()).backward(g)
    grads = []
    for scale in (0.0, 1.0, 2.0):
        z = x.clone().requires_grad_()
        with nl.statistics(layer, update=False):
            layer(z).backward(scale * g)
        grads.append(z.grad)
    assert grads[0].abs().max() > 0.01  # what is left of the last batch
    # Affine in ∂L/∂y; float64 rounding.
    torch.testing.assert_close(grads[2] - grads[1], grads[1] - grads[0], rtol=1e-10, atol=1e-12)


def test_policies():
    layer, x = made(window=2, warmup=0), data(1)
    for _ in range(3):
        layer(x.clone().requires_grad_()).sum().backward()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with nl.statistics(layer, update=False):
        layer(data(2).requires_grad_()).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    parts, whole = made(window=2), made(window=2)
    with nl.statistics(parts, update="accumulate"):
        for part in data(3).split(2):
            parts(part.requires_grad_()).pow(2).sum().backward()
        assert nl.statistics.commit(parts) == 1
    whole(data(3))
    for name in ("running_square", "window_square"):
        a, b = getattr(parts, name), getattr(whole, name)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)  # float64 rounding
    assert parts.window_product.eq(0).all()


def test_nothing_that_is_not_finite_is_stored():
    layer = made(window=2, warmup=0)
    for _ in range(3):
        x = data(1)
        x[0, 0, 0] = math.nan
        layer(x.requires_grad_()).sum().backward()
        y = layer(data(2).requires_grad_())
        y.backward(torch.full_like(y, math.inf))
    assert all(b.isfinite().all() for b in layer.buffers())
    assert layer.window_square.shape == (2, C)


def test_the_windows_stay_float32_in_low_precision():
    layer = nl.MovingAverageBatchNorm(C, window=2).bfloat16()
    layer(data(1).bfloat16().requires_grad_()).sum().backward()
    for name in layer.stored_names:
        assert getattr(layer, name).dtype == torch.float32


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
def test_compiled_gradients_are_those_of_eager_in_one_graph():
    """Two passes forward before those backward: each has the statistics of its own forward pass."""
    torch._dynamo.reset()
    results = []
    for backend in (None, "aot_eager"):
        layer = made(window=2, warmup=0, renorm_after=2)
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


def test_centered_weights_make_it_batch_normalization_of_centered_inputs():
    """What the centred weight is for: inputs of mean 0 have their variance for mean square."""
    x = data(1)
    x = x - x.mean((0, 2), keepdim=True)
    batch = nl.BatchNorm(C).double()
    batch.load_state_dict({**batch.state_dict(), **dict(made().named_parameters())})
    torch.testing.assert_close(made()(x), batch(x), rtol=1e-10, atol=1e-10)  # float64 rounding


@pytest.mark.parametrize(
    "options", [{"window": 0}, {"warmup": -1}, {"renorm_after": -1}, {"rmax": 0.5}]
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=r"is at least .*received"):
        nl.MovingAverageBatchNorm(3, **options)


def test_schedules_of_short_runs():
    card = nl.catalogue()["moving_average_batch"]
    assert card.for_steps(400) == {"warmup": 20, "renorm_after": 40}
    assert card.for_steps(10**5) == {"warmup": 100, "renorm_after": 1000}
