"""Cross-iteration batch normalization beside its formulas, with slopes in closed form."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import unfold

import normlab as nl
from normlab import networks

EPS = 1e-5


def data(step):
    g = torch.Generator().manual_seed(step)
    return 1 + torch.randn(2, 2, 6, 5, generator=g, dtype=torch.float64)


def made(**options):
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, bias=False), nl.CrossIterationBatchNorm(3, **options)
    ).double()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([0.5, 1.5, -2.0]))
        net[1].bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
    nl.link(net, data(0))
    return net


class Oracle:
    """Every batch's statistics and slopes, from patches: ∂μ_c/∂w_c = mean of the patches."""

    def __init__(self, window, burn_in):
        self.window, self.burn_in, self.seen, self.running = window, burn_in, [], [0.0, 1.0]

    def step(self, x, net, g):
        w = net[0].weight.detach().clone().requires_grad_()
        x = x.clone().requires_grad_()
        patches = unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 18)
        u = patches @ w.flatten(1).T  # (N·P, C)
        m, nu = u.mean(0), (u**2).mean(0)
        means, squares = [m], [nu]
        others = self.seen[-(self.window - 1) :] if self.window > 1 else []
        for old in others if len(self.seen) >= self.burn_in else []:
            move = (w - old[4]).detach().flatten(1)
            means.append(old[0] + (old[2] * move).sum(1))
            squares.append(old[1] + (old[3] * move).sum(1))
        means, squares = torch.stack(means), torch.stack(squares)
        ok = (squares >= means**2).double()
        ok[0] = 1
        mean = (ok * means).sum(0) / ok.sum(0)
        variance = (ok * squares).sum(0) / ok.sum(0) - mean**2
        gamma, beta = (p.detach() for p in net[1].parameters())
        y = gamma * (u - mean) / (variance + EPS).sqrt() + beta
        y = y.view(2, 30, 3).transpose(1, 2).view(2, 3, 6, 5)
        grads = torch.autograd.grad((y * g).sum(), (x, w))
        p = patches.detach()
        slope, slope2 = p.mean(0).expand(3, -1), 2 * (u.detach().T @ p) / len(p)
        self.seen.append((m.detach(), nu.detach(), slope, slope2, w.detach().clone()))
        batch = m.detach(), u.detach().var(0)
        self.running = [0.9 * a + 0.1 * b for a, b in zip(self.running, batch, strict=True)]
        return y.detach(), *grads


@pytest.mark.parametrize("options", [{"window": 3}, {"window": 8, "burn_in": 3}, {"window": 1}])
def test_training_and_evaluation_beside_the_formulas(options):
    net = made(**options)
    oracle = Oracle(options["window"], options.get("burn_in", 0))
    for step in range(7):
        x, g = (
            data(step).requires_grad_(),
            torch.ones(2, 3, 6, 5).double() + data(step + 50).sum(1)[:, None],
        )
        y = net(x)
        net.zero_grad()
        y.backward(g)
        expected = oracle.step(x.detach(), net, g)
        for a, b in zip((y.detach(), x.grad, net[0].weight.grad), expected, strict=True):
            # Float64; the oracle forms E[x²] − E[x]².
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
        with torch.no_grad():
            net[0].weight.add_(0.05 * torch.randn_like(net[0].weight))
    for name, value in zip(("running_mean", "running_var"), oracle.running, strict=True):
        torch.testing.assert_close(getattr(net[1], name), value, rtol=1e-10, atol=1e-10)  # as above
    net.eval()
    u, view = net[0](data(9)), (1, -1, 1, 1)
    z = (u - net[1].running_mean.view(view)) / (net[1].running_var.view(view) + EPS).sqrt()
    expected = net[1].weight.view(view) * z + net[1].bias.view(view)
    torch.testing.assert_close(net(data(9)), expected, rtol=1e-12, atol=1e-12)  # float64 rounding


def test_means_are_carried_over_exactly_because_they_are_linear_in_the_weights():
    net, x = made(window=4), data(1)
    for _ in range(4):
        net(x)
        with torch.no_grad():
            net[0].weight.mul_(1.5).add_(torch.randn_like(net[0].weight))
    layer, u = net[1], net[0](x)
    mean = u.mean((0, 2, 3))
    pooled = layer._pool_batches(mean, u.var((0, 2, 3), correction=0), net[0].weight)[0]
    torch.testing.assert_close(pooled, mean, rtol=1e-10, atol=1e-10)  # float64 rounding


def test_with_constant_weights_the_batches_are_pooled_as_one():
    net = made(window=3)
    for step in range(2):
        net(data(step))
    u = net[0](torch.cat([data(0), data(1), data(2)]))
    last = u[4:]
    mean, variance = last.mean((0, 2, 3)), last.var((0, 2, 3), correction=0)
    got = net[1]._pool_batches(mean, variance, net[0].weight)
    torch.testing.assert_close(got[0], u.mean((0, 2, 3)), rtol=1e-10, atol=1e-10)  # rounding
    expected = u.var((0, 2, 3), correction=0)
    torch.testing.assert_close(got[1], expected, rtol=1e-10, atol=1e-10)


def test_policies_and_what_is_not_finite():
    net = made(window=3)
    net(data(0))
    kept = {n: b.clone() for n, b in net.named_buffers()}
    with nl.statistics(net, update=False):
        net(data(1))
    assert all(torch.equal(b, kept[n]) for n, b in net.named_buffers())
    x = data(1)
    x[0, 0, 0, 0] = math.nan
    net(x)
    assert all(b.isfinite().all() for b in net.buffers())
    assert int(net[1].recorded) == 1
    assert net(data(2)).isfinite().all()
    with torch.no_grad():
        assert net(data(2)).isfinite().all()  # nothing to differentiate: batch normalization
    net[1].reset_running_stats()
    assert int(net[1].recorded) == 0


def test_micro_batches_that_wait_for_commit_are_not_recorded():
    net = made(window=3)
    with nl.statistics(net, update="accumulate"):
        net(data(0))
        assert nl.statistics.commit(net) == 1
    assert int(net[1].recorded) == 0


def test_masked_positions_count_for_nothing():
    net, x = made(window=3), data(1)
    nets = [net, copy.deepcopy(net)]
    mask = torch.zeros(2, 6, 5, dtype=torch.bool)
    mask[:, :, :3] = True
    for _ in range(2):
        u, v = (net[0](x) for net in nets)
        y, alone = nets[0][1](u, mask=mask), nets[1][1](v[..., :3])
    torch.testing.assert_close(y[..., :3], alone, rtol=1e-10, atol=1e-12)  # float64 rounding
    assert y[..., 3:].eq(0).all()


def test_loading_empties_the_history():
    """It belongs to weights that are gone: the first pass afterwards is batch normalization."""
    net, fresh = made(window=3), made(window=3)
    with torch.no_grad():
        fresh[0].weight.mul_(-30)
    for step in range(3):
        net(data(step))
    net.load_state_dict(fresh.state_dict())
    assert torch.equal(net(data(4)), fresh(data(4)))


@pytest.mark.parametrize("spec", ["mlp:depth=2", "cnn:depth=3", "resnet8"])
def test_networks_train_and_their_copies_are_linked_among_themselves(spec):
    def build():
        return networks.build(
            spec, lambda c: nl.norm("cross_iteration_batch", c, window=3), classes=3,
            image_shape=(1, 16, 16),
        )  # fmt: skip

    model, x = build(), torch.randn(4, 1, 16, 16)
    keys = list(model.state_dict())
    nl.link(model, x)
    assert list(model.state_dict()) == keys
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).logsumexp(1).mean().backward()
        optimizer.step()
    other = copy.deepcopy(model)
    assert torch.equal(other(x), model(x))
    ours = set(map(id, other.modules()))
    layers = [m for m in other.modules() if isinstance(m, nl.CrossIterationBatchNorm)]
    assert all(id(layer.before[0]) in ours for layer in layers)
    assert any(int(layer.recorded) > 3 for layer in layers)
    fresh = build()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_errors():
    net = nn.Sequential(nl.CrossIterationBatchNorm(3))
    with pytest.raises(ValueError, match=r"0: .*needs a layer with a weight of shape \(3, …\)"):
        nl.link(net, torch.randn(4, 3, 5))
    net = made()
    with pytest.raises(RuntimeError, match=r"does not depend on the weight.*nl.link\(model"):
        net[1](torch.randn(4, 3, 5).double().requires_grad_())
    for options in ({"window": 0}, {"burn_in": -1}):
        with pytest.raises(ValueError, match=r"is at least .*received"):
            nl.CrossIterationBatchNorm(3, **options)


# Torch's own, where a graph is broken at a tensor that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_gradients_are_those_of_eager():
    results = []
    for backend in (None, "aot_eager"):
        torch.manual_seed(0)
        net = made(window=3)
        call = net if backend is None else torch.compile(net, backend=backend)
        found = []
        for step in range(4):
            x = data(step).requires_grad_()
            net.zero_grad()
            y = call(x)
            y.pow(3).sum().backward()
            found += [y.detach(), x.grad, net[0].weight.grad.clone()]
            with torch.no_grad():
                net[0].weight.mul_(1.1)
        results.append([*found, *(b.clone() for b in net.buffers())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)  # float64, another order
