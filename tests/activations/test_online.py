"""Online normalization beside its formulas, sample by sample, in numpy."""

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
    layer = nl.OnlineNorm(C, **options).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.5, -2.0]))
        layer.bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
    return layer


class Oracle:
    """One sample after the other; the guard's own gradient in closed form."""

    def __init__(self, layer, alpha, rate, guard):
        self.gamma, self.beta = (p.detach().numpy()[:, None] for p in (layer.weight, layer.bias))
        self.alpha, self.rate, self.guard = alpha, rate, guard
        self.mean, self.var = np.zeros((C, 1)), np.ones((C, 1))
        self.p, self.q = np.zeros((C, 1)), np.zeros((C, 1))

    def tail(self, w):
        if self.guard == "layer_scaling":
            return w / np.sqrt((w**2).mean() + EPS)
        return np.clip(w, -5, 5) if self.guard == "clamp" else w

    def step(self, xs, gs):
        a = self.alpha
        ys, gxs, gammas, betas = [], [], 0.0, 0.0
        for x, g in zip(xs, gs, strict=True):
            scale = np.sqrt(self.var + EPS)
            z = (x - self.mean) / scale
            w = self.gamma * z + self.beta
            y = self.tail(w)
            if self.guard == "layer_scaling":
                g = (g - y * (g * y).mean()) / np.sqrt((w**2).mean() + EPS)
            elif self.guard == "clamp":
                g = g * (np.abs(w) < 5)
            h = self.gamma * g - self.rate * self.p * z
            self.p = self.p + (h * z).mean(1, keepdims=True)
            gx = h / scale - self.rate * self.q
            self.q = self.q + gx.mean(1, keepdims=True)
            m, v = x.mean(1, keepdims=True), x.var(1, keepdims=True)
            self.var = a * self.var + (1 - a) * v + a * (1 - a) * (m - self.mean) ** 2
            self.mean = a * self.mean + (1 - a) * m
            ys.append(y)
            gxs.append(gx)
            gammas, betas = gammas + (g * z).sum(1), betas + g.sum(1)
        return np.stack(ys), np.stack(gxs), gammas, betas


@pytest.mark.parametrize("guard", ["layer_scaling", "clamp", None])
def test_training_and_evaluation_beside_the_formulas(guard):
    layer = made(guard=guard, momentum=0.1, backward_momentum=0.2)
    oracle = Oracle(layer, 0.9, 0.2, guard)
    for step in range(4):
        x, g = (4 * data(step)).requires_grad_(), data(step + 100)
        y = layer(x)
        layer.zero_grad()
        y.backward(g)
        expected = oracle.step(x.detach().numpy(), g.numpy())
        got = y.detach(), x.grad, layer.weight.grad, layer.bias.grad
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)  # float64, another order
        kept = (oracle.mean, oracle.var, oracle.p, oracle.q)
        for name, value in zip(layer.stored_names, kept, strict=True):
            np.testing.assert_allclose(getattr(layer, name), value[:, 0], rtol=1e-9, atol=1e-11)
    x = data(9)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    z = (x.numpy() - oracle.mean) / np.sqrt(oracle.var + EPS)
    expected = np.stack([oracle.tail(w) for w in oracle.gamma * z + oracle.beta])
    # Float64 rounding.
    np.testing.assert_allclose(layer.eval()(x).detach(), expected, rtol=1e-9, atol=1e-11)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_the_gradient_of_evaluation_is_exact():
    layer = made(momentum=0.1)
    layer(data(1).requires_grad_()).pow(3).sum().backward()
    assert layer.control_product.ne(0).all()
    layer.eval()
    assert torch.autograd.gradcheck(layer, data(2).requires_grad_(), fast_mode=True)


def test_a_batch_is_its_samples_one_by_one():
    whole, alone, x, g = made(), made(), data(1), data(2)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    whole(a).backward(g)
    for i in range(len(x)):
        alone(b[i : i + 1]).backward(g[i : i + 1])
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)  # float64 rounding
    for name in whole.stored_names:
        torch.testing.assert_close(getattr(whole, name), getattr(alone, name))  # as above


def test_in_the_steady_state_gradients_are_orthogonal_to_the_output_and_to_one():
    """With one sample again and again: mean(∂L/∂x) = 0 and mean(∂L/∂x·z) = 0, as batch norm's."""
    layer = made(guard=None, momentum=0.2, backward_momentum=0.2, eps=0.0)
    x, g = data(1, n=1), data(2, n=1)
    for _ in range(300):
        z = x.clone().requires_grad_()
        layer(z).backward(g)
    exact = x.clone().requires_grad_()
    batch = nl.BatchNorm(C, eps=0.0).double()
    batch.load_state_dict({**batch.state_dict(), **dict(layer.named_parameters())})
    batch(exact).backward(g)
    # 0.8^300 = 1e-29 of the start is left.
    torch.testing.assert_close(z.grad, exact.grad, rtol=1e-8, atol=1e-10)


def test_policies():
    layer = made(momentum=0.1)
    layer(data(1).requires_grad_()).pow(3).sum().backward()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with nl.statistics(layer, update=False):
        layer(data(2).requires_grad_()).pow(3).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    parts, whole, x = made(momentum=0.1), made(momentum=0.1), data(3)
    with nl.statistics(parts, update="accumulate"):
        y = torch.cat([parts(part.clone().requires_grad_()) for part in x.split(2)])
        y.pow(3).sum().backward()
        assert parts.running_mean.eq(0).all()
        assert parts.control_product.eq(0).all()
        assert nl.statistics.commit(parts) == 1
        assert nl.statistics.commit(parts) == 0
    # Float64 rounding.
    torch.testing.assert_close(y, whole(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.running_var, whole.running_var, rtol=1e-12, atol=1e-12)
    assert int(parts.num_batches_tracked) == 1


def test_a_sample_that_is_not_finite_reaches_its_own_output_alone():
    layer, other = made(momentum=0.1), made(momentum=0.1)
    x = data(1)
    x[1, 0, 0] = math.nan
    y = layer(x.requires_grad_())
    y.sum().backward()
    assert all(b.isfinite().all() for b in layer.buffers())
    assert y[1].isnan().any()
    torch.testing.assert_close(y[0], other(data(1))[0], rtol=1e-12, atol=0)  # rounding
    assert y[2:].isfinite().all()


def test_samples_without_a_valid_position_change_nothing():
    layer, alone, x, g = made(), made(), data(1), data(2)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[2] = False
    keep = [0, 1, 3]
    a, b = x.clone().requires_grad_(), x[keep].clone().requires_grad_()
    layer(a, mask=mask).backward(g)
    alone(b).backward(g[keep])
    torch.testing.assert_close(a.grad[keep], b.grad, rtol=1e-12, atol=1e-12)  # float64 rounding
    for name in layer.stored_names:
        torch.testing.assert_close(getattr(layer, name), getattr(alone, name))  # as above


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
def test_compiled_gradients_are_those_of_eager_in_one_graph():
    """Two passes forward before those backward: each has the statistics of its own forward pass."""
    torch._dynamo.reset()
    results = []
    for backend in (None, "aot_eager"):
        layer = made(momentum=0.1)
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


@pytest.mark.parametrize("options", [{"backward_momentum": 2.0}, {"guard": "none"}])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match="received"):
        nl.OnlineNorm(3, **options)
