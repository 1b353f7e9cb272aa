"""Large means, low precision, and stored statistics that outlive every cast."""

import copy
import io
import pickle

import pytest
import torch

import normlab as nl
from activations.cases import ONE_EACH, STORING, build

STANDARDIZING = [
    c for c in ONE_EACH
    if c.values[0] in ("batch", "instance", "layer", "group", "ghost_batch", "batch_group",
                       "ic", "position", "l1_batch", "variance", "mean_only_batch", "batch_renorm")
]  # fmt: skip


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channel_dim=-1"])
@pytest.mark.parametrize(("name", "options"), STANDARDIZING)
def test_a_large_mean_keeps_the_deviation_exact(name, options, layout):
    x = torch.randn(16, 6, 8, 8)
    x = 1e4 + (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)  # D ≈ 1 in every kind of area
    last = layout == "channel_dim=-1"
    if name == "layer":
        options = {**options, "over": "sample"}
    more = {"channel_dim": -1} if last else {}
    single = nl.norm(name, 6, **options, **more)
    double = copy.deepcopy(single).double()
    if name == "batch_renorm":  # near x's own statistics, as after some training
        for layer in (single, double):
            layer.running_mean.fill_(1e4)
    if layout == "channels_last":
        given = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    else:
        given = (x.movedim(1, -1) if last else x).detach().clone().requires_grad_()
    exact = given.detach().double().requires_grad_()
    weights = torch.randn(given.shape)
    y, z = single(given), double(exact)
    (y * weights).sum().backward()
    (z * weights.double()).sum().backward()
    # Float32 resolves 1e4 to 1e-3/2; that rounding is shared. What is left: 1e4·2⁻²⁴ = 6e-4 per
    # element for outputs that keep the mean (of size 1e4 themselves, hence the relative part).
    torch.testing.assert_close(y.double(), z, rtol=1e-6, atol=1e-3)
    # Gradients are of size 1; through x̂ they inherit its 1e-3 at most. The variance method's x̂ is
    # 1e4 itself, so that its gradient is a difference of sums 1e4 times larger.
    scale = 1e4 if name == "variance" else 1.0
    # The sign of what lies within rounding of the mean, in L1, is not to be told.
    clear = (exact.detach() - 1e4).abs() > (0.2 if name == "l1_batch" else -1.0)
    torch.testing.assert_close(
        given.grad.double()[clear] / scale, exact.grad[clear] / scale, rtol=0, atol=1e-3
    )
    for key in getattr(single, "stored_names", ()):
        torch.testing.assert_close(
            getattr(single, key).double(), getattr(double, key), rtol=1e-5, atol=0
        )


def test_a_small_variance_beside_a_large_mean():
    """Deviations of a few units of rounding: the mean's own rounding must not enter the square."""
    x = 1e4 + 5e-3 * torch.randn(64, 32, 7)
    layer = nl.BatchNorm(32, momentum=1.0)
    layer(x)
    exact = x.double().var((0, 2))
    # Float32 sums of 448 squares, relative 448·2⁻²⁴ at worst.
    torch.testing.assert_close(layer.running_var.double(), exact, rtol=1e-4, atol=0)


def relative(a, b):
    """‖a − b‖/‖b‖."""
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_low_precision_rounds_only_at_the_borders(name, options, dtype, unit):
    layer = build(name, options).to(dtype)
    exact = copy.deepcopy(layer).double()
    x = (torch.randn(16, 6, 8, 8) + 0.5).to(dtype).requires_grad_()
    z = x.detach().double().requires_grad_()
    g = torch.randn(16, 6, 8, 8).to(dtype)
    y, t = layer(x), exact(z)
    assert y.dtype == dtype
    y.backward(g)
    t.backward(g.double())
    # One rounding of the result (unit/√3 on average); a second where sums pass through the dtype.
    assert relative(y.detach(), t.detach()) < unit
    assert x.grad.dtype == dtype
    assert relative(x.grad, z.grad) < unit
    for p, q in zip(layer.parameters(), exact.parameters(), strict=True):
        assert p.grad.dtype == dtype
        assert relative(p.grad, q.grad) < 2 * unit


@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_float32_layer_on_bfloat16_input_keeps_the_dtype_of_the_input(name, options):
    layer = nl.norm(name, 6, **options)
    x = torch.randn(8, 6, 5, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.float().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


CASTS = {
    "bfloat16()": lambda m: m.bfloat16(),
    "half()": lambda m: m.half(),
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "to(cpu, float16)": lambda m: m.to("cpu", torch.float16),
    "inside a model": lambda m: torch.nn.Sequential(m).bfloat16()[0],
    "deepcopy": lambda m: copy.deepcopy(m.bfloat16()),
    "pickle": lambda m: pickle.loads(pickle.dumps(m.bfloat16())),
    "to_empty": lambda m: m.bfloat16().to_empty(device="cpu"),
}


@pytest.mark.parametrize("cast", list(CASTS))
@pytest.mark.parametrize(("name", "options"), STORING)
def test_stored_statistics_are_float32_at_least(name, options, cast):
    layer = nl.norm(name, 6, **options)
    layer(torch.randn(8, 6, 5) + 3)
    before = {k: getattr(layer, k).clone() for k in layer.stored_names}
    after = CASTS[cast](layer)
    for key, value in before.items():
        assert getattr(after, key).dtype == torch.float32
        if cast != "to_empty":
            assert torch.equal(getattr(after, key), value)  # not rounded on the way either
    assert all(p.dtype != torch.float32 for p in after.parameters())
    assert all(getattr(after.double(), key).dtype == torch.float64 for key in before)


@pytest.mark.parametrize(("name", "options"), STORING)
def test_stored_statistics_are_float32_under_a_low_default_dtype(name, options):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        layer = nl.norm(name, 6, **options)
    finally:
        torch.set_default_dtype(before)
    assert all(getattr(layer, key).dtype == torch.float32 for key in layer.stored_names)


@pytest.mark.parametrize(("name", "options"), STORING)
def test_stored_statistics_survive_a_checkpoint(name, options):
    layer = nl.norm(name, 6, **options).bfloat16()
    for seed in range(3):
        torch.manual_seed(seed)
        layer(torch.randn(8, 6, 5, dtype=torch.bfloat16))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = nl.norm(name, 6, **options).bfloat16()
    fresh.load_state_dict(torch.load(file))
    x = torch.randn(8, 6, 5, dtype=torch.bfloat16)
    assert torch.equal(fresh.eval()(x), layer.eval()(x))
    for key in layer.stored_names:
        assert torch.equal(getattr(fresh, key), getattr(layer, key))


@pytest.mark.parametrize("name", ["batch", "batch_renorm"])
def test_running_statistics_of_a_bfloat16_model_reach_the_truth(name):
    layer = nl.norm(name, 2, momentum=0.001).bfloat16()
    torch.manual_seed(0)
    for _ in range(8000):
        layer((5 + 2 * torch.randn(256, 2)).bfloat16())
    # e⁻⁸ of the start is left (0.002), and sampling noise: 2/√256·√(momentum/2) = 0.003 for the
    # mean, 0.008 for the variance; four times that.
    assert (layer.running_mean - 5).abs().max() < 0.015
    stored = getattr(layer, "running_var", None)
    spread = layer.running_std**2 if stored is None else stored
    # The average of σ is biased by 1/(4m) at most; bfloat16 input adds its rounding.
    assert (spread - 4).abs().max() < 0.04
