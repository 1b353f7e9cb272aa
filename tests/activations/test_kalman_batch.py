"""Batch Kalman normalization, alone and linked, beside the formulas in numpy."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import normlab as nl

EPS = 1e-5


def pair(p=0.9, **options):
    """Kalman(3) → ReLU → conv of stride 2 → Kalman(4), linked, in float64, parameters moved."""
    first, second = nl.BatchKalmanNorm(3), nl.BatchKalmanNorm(4, prediction=p, **options)
    net = nn.Sequential(first, nn.ReLU(), nn.Conv2d(3, 4, 3, 2, 1, bias=False), second).double()
    with torch.no_grad():
        for q in net.parameters():
            q.add_(0.3 * torch.randn(q.shape, dtype=q.dtype))
    nl.link(net, torch.zeros(2, 3, 6, 5).double())
    return net


def data(seed=1, n=4):
    g = torch.Generator().manual_seed(seed)
    return 1 + 2 * torch.randn(n, 3, 6, 5, generator=g, dtype=torch.float64)


def conv(x, w):
    """Cross-correlation of stride 2 with padding 1, by loops."""
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    h, k = (x.shape[2] - 3) // 2 + 1, (x.shape[3] - 3) // 2 + 1
    y = np.zeros((x.shape[0], w.shape[0], h, k))
    for i in range(h):
        for j in range(k):
            patch = x[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            y[:, :, i, j] = np.einsum("nchw,dchw->nd", patch, w)
    return y


def moments(x):
    return x.mean((0, 2, 3)), x.var((0, 2, 3))


def col(v):
    return np.reshape(v, (1, -1, 1, 1))


def oracle(net, x, xi, p):
    """Output and filtered statistics of both layers, from the formulas."""
    q = {k: v.detach().numpy() for k, v in net.named_parameters()}
    m0, v0 = moments(x)
    y = col(q["0.weight"]) * (x - col(m0)) / np.sqrt(col(v0) + EPS) + col(q["0.bias"])
    u = conv(np.maximum(y, 0), q["2.weight"])
    predicted = moments(conv(np.maximum(col(m0) + np.sqrt(col(v0)) * xi, 0), q["2.weight"]))
    mb, vb = moments(u)
    m = p * predicted[0] + (1 - p) * mb
    v = p * predicted[1] + (1 - p) * vb + p * (1 - p) * (mb - predicted[0]) ** 2
    if (predicted[1] / vb).mean() >= 100:
        m, v = mb, vb
    out = col(q["3.weight"]) * (u - col(m)) / np.sqrt(col(v) + EPS) + col(q["3.bias"])
    return out, (m0, v0), (m, v), u


def draw(seed):
    """The numbers that the layer draws after this seed."""
    torch.manual_seed(seed)
    return torch.randn(1, 3, 6, 5, dtype=torch.float64).numpy()


@pytest.mark.parametrize("p", [0.9, 0.05])
def test_linked_layers_beside_the_formulas_in_training_and_evaluation(p):
    net = pair(p)
    stored = [[np.zeros(3), np.ones(3)], [np.zeros(4), np.ones(4)]]
    for step in range(3):
        x = data(step)
        expected, *found, _ = oracle(net, x.numpy(), draw(step), p)
        torch.manual_seed(step)
        # Float64, sums in another order.
        torch.testing.assert_close(net(x), torch.from_numpy(expected), rtol=1e-10, atol=1e-10)
        for old, new in zip(stored, found, strict=True):
            old[:] = [0.9 * a + 0.1 * b for a, b in zip(old, new, strict=True)]
    for layer, (m, v) in zip((net[0], net[3]), stored, strict=True):
        np.testing.assert_allclose(layer.running_mean, m, rtol=1e-10, atol=1e-12)  # as above
        np.testing.assert_allclose(layer.running_var, v, rtol=1e-10)
    net.eval()
    x, state = data(9), torch.get_rng_state()
    y = net(x)
    assert torch.equal(torch.get_rng_state(), state)  # evaluation draws nothing
    u = net[2](net[1](net[0](x)))
    view = (1, -1, 1, 1)
    m, v = (torch.from_numpy(s).view(view) for s in stored[1])
    expected = net[3].weight.view(view) * (u - m) / (v + EPS).sqrt() + net[3].bias.view(view)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)  # as above


def test_a_prediction_that_is_far_too_wide_is_not_used():
    net = pair(0.9)
    with torch.no_grad():
        net[0].weight.fill_(1e-3)
        net[0].bias.fill_(0)
    expected, _, found, u = oracle(net, data().numpy(), draw(5), 0.9)
    assert np.array_equal(found[0], u.mean((0, 2, 3)))  # the guard is what is tested here
    torch.manual_seed(5)
    # Float64, sums in another order.
    torch.testing.assert_close(net(data()), torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


def run(net, seed=0):
    def function(x, *parameters):
        names = [n for n, _ in net.named_parameters()]
        buffers = {n: b.clone() for n, b in net.named_buffers()}
        torch.manual_seed(seed)
        state = {**buffers, **dict(zip(names, parameters, strict=True))}
        return torch.func.functional_call(net, state, (x,))

    return function


@pytest.mark.parametrize("form", ["released", "paper"])
def test_gradients_flow_through_the_prediction(form):
    net = pair(0.5, form=form)
    inputs = [data().requires_grad_(), *(p.detach().clone().requires_grad_()
                                         for p in net.parameters())]  # fmt: skip
    assert torch.autograd.gradcheck(run(net), inputs, fast_mode=True)


def test_detach_leaves_values_and_cuts_the_gradient_of_the_prediction():
    net = pair(0.5)
    results = []
    for cut in (False, True):
        net[3].detach = cut
        torch.manual_seed(0)
        y = net(data())
        results.append((y.detach(), torch.autograd.grad((y**3).sum(), net[2].weight)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.allclose(results[0][1], results[1][1], rtol=1e-3)


def test_the_two_component_mixture_is_what_the_update_is():
    """p·v⁻ + (1 − p)·v_B + p(1 − p)(m_B − μ⁻)² is the variance of all numbers of both samples."""
    layer = nl.BatchKalmanNorm(3, prediction=0.25).double()
    before, batch = torch.randn(3, 100).double() + 2, torch.randn(3, 300).double()
    layer._predict = lambda like: (before.mean(1), before.var(1, correction=0))
    m, v = layer._filter(batch.mean(1), batch.var(1, correction=0))
    union = torch.cat([before, batch], 1)
    torch.testing.assert_close(m, union.mean(1), rtol=1e-12, atol=1e-12)  # float64 rounding
    torch.testing.assert_close(v, union.var(1, correction=0), rtol=1e-12, atol=0)


def test_the_papers_form():
    net = pair(0.7, form="paper")
    layer = net[3]
    assert {n for n, _ in layer.named_parameters()} == {
        "weight", "bias", "transition", "offset", "gain", "noise"}  # fmt: skip
    predicted = torch.tensor([1.0, -2.0, 0.5, 0]).double(), torch.tensor([1.0, 2, 3, 4]).double()
    layer._predict = lambda like: predicted
    mb, vb = torch.randn(4).double(), torch.rand(4).double()
    a, b, g, r = (getattr(layer, n).detach() for n in ("transition", "offset", "gain", "noise"))
    q, noise = 1 / (1 + torch.exp(-g)), torch.log1p(torch.exp(r))
    pm, pv = a * predicted[0] + b, a * a * predicted[1] + noise
    m, v = layer._filter(mb, vb)
    # Float64 rounding.
    torch.testing.assert_close(m, (1 - q) * pm + q * mb, rtol=1e-12, atol=1e-12)
    expected = (1 - q) * pv + q * vb + q * (1 - q) * (mb - pm) ** 2
    torch.testing.assert_close(v, expected, rtol=1e-12, atol=1e-12)


def test_the_papers_form_starts_with_the_released_weights():
    layer = nl.BatchKalmanNorm(4, form="paper", prediction=0.9).double()
    assert layer.transition.eq(1).all()
    assert layer.offset.eq(0).all()
    # Float64 rounding of log and exp.
    assert torch.sigmoid(layer.gain[0]).item() == pytest.approx(0.1, rel=1e-6)
    assert nn.functional.softplus(layer.noise[0]).item() == pytest.approx(0.01, rel=1e-5)


def test_the_papers_form_takes_equal_channels_from_the_predecessor_itself():
    net = nn.Sequential(nl.BatchKalmanNorm(3, form="paper"), nn.ReLU(), nn.Conv1d(3, 3, 1),
                        nl.BatchKalmanNorm(3, form="paper"))  # fmt: skip
    nl.link(net, torch.randn(4, 3, 5))
    net(torch.randn(4, 3, 5))
    got = net[3]._predict(torch.zeros(3))
    assert all(torch.equal(a, b) for a, b in zip(got, net[0].filtered, strict=True))


def test_the_papers_form_needs_to_be_linked_before_training():
    layer = nl.BatchKalmanNorm(3, form="paper")
    with pytest.raises(RuntimeError, match=r"call nl.link\(model, example\)"):
        layer(torch.randn(4, 3, 5))
    assert layer.eval()(torch.randn(4, 3, 5)).isfinite().all()
    nl.link(layer, torch.randn(4, 3, 5))  # now known to be the first
    assert layer.train()(torch.randn(4, 3, 5)).isfinite().all()


def test_unlinked_and_first_layers_are_batch_normalization():
    alone, net, x = nl.BatchKalmanNorm(3).double(), pair(), data()
    batch = nl.BatchNorm(3).double()
    assert torch.equal(alone(x), batch(x))
    assert net[0].before is None
    assert net[3].before is not None


def test_policies_and_finite_statistics_of_linked_layers():
    net = pair()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with nl.statistics(net, update=False):
        net(data())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    x = data()
    x[0, 0, 0, 0] = math.nan
    net(x)
    assert all(v.isfinite().all() for v in net.state_dict().values())
    with nl.statistics(net, update="accumulate"):
        net(data())
        assert nl.statistics.commit(net) == 2
    stored = net[3].running_var.clone()
    net.eval()(data())
    assert torch.equal(net[3].running_var, stored)


def test_channels_last_and_no_positions():
    net = nn.Sequential(nl.BatchKalmanNorm(3, channel_dim=-1), nn.ReLU(), nn.Linear(3, 4),
                        nl.BatchKalmanNorm(4, channel_dim=-1))  # fmt: skip
    found = nl.link(net, torch.randn(4, 5, 3))
    assert found["3"] == "0 → relu → 2"
    y = net(torch.randn(4, 5, 3))
    assert y.isfinite().all()
    flat = nn.Sequential(nl.BatchKalmanNorm(3), nn.Linear(3, 4), nl.BatchKalmanNorm(4))
    nl.link(flat, torch.randn(4, 3))
    flat(torch.randn(8, 3))
    assert flat[2].filtered[1].gt(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_and_autocast(dtype):
    net = pair().to(dtype)
    assert net(data().to(dtype)).dtype == dtype
    assert net[3].running_var.dtype in (torch.float32, torch.float64)
    model = pair().float()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(data().float())
    y.float().pow(2).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_compiled_gradients_are_those_of_eager():
    net, x = pair(), data()
    results = []
    for call in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        net.zero_grad()
        net[0].reset_running_stats()
        net[3].reset_running_stats()
        torch.manual_seed(4)
        y = call(x)
        y.pow(3).sum().backward()
        state = [net[3].running_var.clone(), net[3].running_mean.clone()]
        results.append([y.detach(), *(p.grad.clone() for p in net.parameters()), *state])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)  # float64, another order


@pytest.mark.parametrize(
    ("options", "message"),
    [({"form": "kalman"}, "form is .*received 'kalman'"),
     ({"prediction": 1.0}, "prediction is .*received 1.0"),
     ({"samples": 0}, "samples is at least 1.*received 0")],
)  # fmt: skip
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        nl.BatchKalmanNorm(3, **options)
