"""Batch normalization preconditioning: its algebra against dense matrices, and what it counts."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normlab as nl
from gradients.gradient_cases import backward, batch, gradients, rewritten, sgd, small_model
from normlab.gradients.inputs import InputStatistics

CARD = nl.catalogue("gradient")["preconditioning"]
EXACT = {"rho": 0.0, "eps1": 0.0, "eps2": 0.0}  # the batch's own statistics, nothing added
ROUNDING = {"rtol": 1e-9, "atol": 1e-11}  # float64, through inverses of variances


def bnp(model, **options):
    return nl.gradient("preconditioning", model, **options)


def dense_matrix(mean, variance, n_in, n, eps1=1e-2, eps2=1e-4):
    """P Pᵀ of METHODS §5, with one column per input feature and the bias's first."""
    sigma = (variance + eps1 * variance.max() + eps2).sqrt()
    u = torch.eye(len(mean) + 1, dtype=torch.float64)
    u[0, 1:] = -mean
    d = torch.diag(torch.cat([torch.ones(1, dtype=torch.float64), 1 / sigma]))
    p = u @ d / max(n_in / n, 1.0) ** 0.5
    return p @ p.T


def linear_run(n, steps=1, **options):
    """A dense layer's gradients before and after, and its inputs, over some steps."""
    torch.manual_seed(n)
    layer = nn.Linear(5, 3).double()
    optimizer = sgd(layer, lr=0.0)
    transform = bnp(layer, **options).attach(optimizer)
    inputs = []
    for _ in range(steps):
        x = 2 + torch.randn(n, 5, dtype=torch.float64) * torch.tensor([0.1, 1, 3, 1, 2]).double()
        inputs.append(x)
        layer.zero_grad()
        (layer(x) - 1).square().mean().backward()
        before = gradients(layer)
        optimizer.step()
    return before, gradients(layer), inputs, transform


@pytest.mark.parametrize("n", [1, 3, 5, 20])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", ["total", "within"])
def test_a_dense_layers_update_is_the_dense_matrix(n, steps, kind):
    before, after, inputs, transform = linear_run(n, steps, variance=kind)
    mean, variance = torch.zeros(5).double(), torch.ones(5).double()
    for x in inputs:
        between = 0.99 * (x.mean(0) - mean).square() if kind == "total" else 0.0
        mean = 0.99 * mean + 0.01 * x.mean(0)
        variance = 0.99 * variance + 0.01 * ((x - x.mean(0)).square().mean(0) + between)
    old = torch.cat([before["bias"][:, None], before["weight"]], 1)
    new = torch.cat([after["bias"][:, None], after["weight"]], 1)
    torch.testing.assert_close(new, old @ dense_matrix(mean, variance, 5, n), **ROUNDING)
    known = {"mean": mean, "variance": variance, "samples": n}
    torch.testing.assert_close(CARD.reference(old, None, **known), new, **ROUNDING)
    state = transform.state_dict()[""]
    torch.testing.assert_close(state["mean"], mean, **ROUNDING)
    torch.testing.assert_close(state["variance"], variance, **ROUNDING)
    assert state["samples"] == n
    assert state["pending_rows"] == 0


@pytest.mark.parametrize("n", [1, 4])
def test_the_variance_is_that_of_all_samples_weighted_by_age(n):
    """Of every sample so far, and a start of mean 0 and variance 1; batches of one included."""
    *_, inputs, transform = linear_run(n, 40, rho=0.8)
    ages = torch.arange(39, -1, -1).double()
    weight = (0.2 * 0.8**ages / n).repeat_interleave(n)[:, None]
    rows, start = torch.cat(inputs), 0.8**40
    mean = (weight * rows).sum(0)
    variance = (weight * (rows - mean) ** 2).sum(0) + start * (1 + mean**2)
    state = transform.state_dict()[""]
    torch.testing.assert_close(state["mean"], mean, **ROUNDING)
    torch.testing.assert_close(state["variance"], variance, **ROUNDING)
    # With the batches' own variances alone, a batch of one sample has none.
    *_, within = linear_run(1, 40, rho=0.8, variance="within")
    torch.testing.assert_close(
        within.state_dict()[""]["variance"], torch.full((5,), start).double(), **ROUNDING
    )


def test_constants_and_options():
    assert CARD.options["rho"] == 0.99
    assert CARD.options["eps1"] == 1e-2
    assert CARD.options["eps2"] == 1e-4
    assert CARD.options["count"] == "samples"
    old, plain, _, _ = linear_run(2, scale=1.0)
    _, scaled, _, _ = linear_run(2, scale="inputs")  # q² = 5/2
    torch.testing.assert_close(scaled["weight"], plain["weight"] / 2.5, **ROUNDING)
    torch.testing.assert_close(scaled["bias"], plain["bias"] / 2.5, **ROUNDING)
    assert not torch.allclose(old["bias"], plain["bias"])
    model = small_model()
    for wrong in ({"rho": 1.5}, {"eps1": -1.0}, {"scale": "x"}, {"scale": 0}, {"count": "rows"},
                  {"variance": "all"}):  # fmt: skip
        with pytest.raises(ValueError, match="received"):
            bnp(model, **wrong)


@pytest.mark.parametrize(
    ("kind", "groups", "shape"),
    [
        (nn.Conv1d, 1, (3, 4, 6)),
        (nn.Conv2d, 1, (3, 4, 5, 6)),
        (nn.Conv2d, 2, (3, 4, 5, 6)),
        (nn.Conv2d, 4, (1, 4, 5, 6)),
        (nn.Conv3d, 2, (2, 4, 3, 4, 5)),
    ],
)
@pytest.mark.parametrize("count", ["samples", "positions"])
def test_a_convolutions_update_is_the_dense_matrix_of_each_group(kind, groups, shape, count):
    torch.manual_seed(0)
    layer = kind(4, 8, 2, groups=groups, stride=2, padding=1).double()
    optimizer = sgd(layer, lr=0.0)
    bnp(layer, rho=0.3, count=count, variance="within").attach(optimizer)
    x = 1 + torch.arange(1.0, 5.0).reshape(4, *[1] * (len(shape) - 2)) * torch.randn(shape)
    layer(x.double()).sin().sum().backward()
    before = gradients(layer)
    optimizer.step()
    flat = x.double().movedim(1, 0).flatten(1)
    mean, variance = 0.7 * flat.mean(1), 0.3 + 0.7 * flat.var(1, correction=0)
    n = shape[0] if count == "samples" else flat.shape[1]
    taps, each, out = 2 ** (len(shape) - 2), 4 // groups, 8 // groups
    for g in range(groups):
        units, channels = slice(g * out, (g + 1) * out), slice(g * each, (g + 1) * each)
        tap_mean = mean[channels].repeat_interleave(taps)
        tap_variance = variance[channels].repeat_interleave(taps)
        matrix = dense_matrix(tap_mean, tap_variance, each * taps, n)
        old = torch.cat([before["bias"][units, None], before["weight"][units].flatten(1)], 1)
        new = torch.cat([layer.bias.grad[units, None], layer.weight.grad[units].flatten(1)], 1)
        torch.testing.assert_close(new, old @ matrix, **ROUNDING)


def test_a_step_is_that_of_the_network_with_normalized_inputs():
    """w = D⁻¹v, b = c − μᵀw: a gradient step in (v, c), mapped back, is the preconditioned one."""
    torch.manual_seed(0)
    x = 4 + torch.randn(30, 5).double() * torch.arange(1.0, 6.0)
    y = torch.randn(30, 2).double()
    layer = nn.Linear(5, 2).double()
    mean, sigma = x.mean(0), x.std(0, correction=0)
    v = (layer.weight.detach() * sigma).requires_grad_()
    c = (layer.bias.detach() + layer.weight.detach() @ mean).requires_grad_()
    ((((x - mean) / sigma) @ v.T + c).tanh() - y).square().mean().backward()
    new_weight = (v - 0.1 * v.grad) / sigma
    new_bias = (c - 0.1 * c.grad) - new_weight @ mean
    optimizer = sgd(layer, lr=0.1)
    bnp(layer, **EXACT).attach(optimizer)
    (layer(x).tanh() - y).square().mean().backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight, new_weight, **ROUNDING)
    torch.testing.assert_close(layer.bias, new_bias, **ROUNDING)


def test_the_condition_number_of_least_squares_is_that_of_standardized_inputs():
    """P Pᵀ H has the eigenvalues of Pᵀ H P, the Hessian of standardized inputs."""
    torch.manual_seed(0)
    x = 10 + torch.randn(50, 4).double() @ torch.diag(torch.tensor([0.1, 1, 5, 20]).double())
    z = (x - x.mean(0)) / x.std(0, correction=0)
    ones = torch.ones(50, 1).double()
    plain, standard = torch.cat([ones, x], 1), torch.cat([ones, z], 1)
    hessian = plain.T @ plain / 50
    layer = nn.Linear(4, 1).double()
    transform = bnp(layer, **EXACT)
    optimizer = sgd(layer, lr=0.0)
    transform.attach(optimizer)
    layer(x).sum().backward()
    columns = []
    for column in hessian.T:  # the transform, applied to each column of H as a gradient
        layer.bias.grad, layer.weight.grad = column[:1].clone(), column[1:][None].clone()
        optimizer.step()
        columns.append(torch.cat([layer.bias.grad, layer.weight.grad[0]]))
    eigenvalues = torch.linalg.eigvals(torch.stack(columns, 1)).real
    expected = torch.linalg.eigvalsh(standard.T @ standard / 50)
    # Eigenvalues of a matrix that is not symmetric, of condition number about 1e6.
    torch.testing.assert_close(eigenvalues.sort().values, expected, rtol=1e-7, atol=0)
    assert torch.linalg.cond(hessian) > 1e4
    assert expected.max() / expected.min() < 3


def test_descent_is_faster_on_badly_scaled_inputs():
    torch.manual_seed(0)
    x = 5 + torch.randn(64, 6).double() * torch.tensor([0.1, 0.3, 1, 3, 10, 30]).double()
    y = x @ torch.randn(6, 1).double()
    losses = {}
    for on in (True, False):
        layer = nn.Linear(6, 1).double()
        optimizer = sgd(layer, lr=0.3 if on else 1e-4)  # the plain one diverges above
        if on:
            bnp(layer, **EXACT).attach(optimizer)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (layer(x) - y).square().mean()
            loss.backward()
            optimizer.step()
        losses[on] = float(loss.detach())
    assert losses[True] < 1e-3 * losses[False]


def statistics_after(model, x, forward=None, **options):
    """State after one backward pass and step."""
    optimizer = sgd(model, lr=0.0)
    transform = bnp(model, **options).attach(optimizer)
    (forward or model)(x).square().sum().backward()
    optimizer.step()
    return transform.state_dict()


def assert_same(state, other):
    for name, numbers in other.items():
        for key, value in numbers.items():
            # Float64 rounding.
            torch.testing.assert_close(state[name][key], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_does_not_count_twice(reentrant):
    model = small_model()
    x = batch()[0].requires_grad_()

    def forward(x):
        return checkpoint(model, x, use_reentrant=reentrant)

    plain = statistics_after(small_model(), x)
    assert_same(statistics_after(model, x, forward), plain)
    assert plain["0"]["samples"] == 7


def test_what_does_not_count():
    model = small_model()
    optimizer = sgd(model, lr=0.0)
    transform = bnp(model).attach(optimizer)
    start = transform.state_dict()
    x, y = batch()
    model.eval()
    backward(model)  # evaluation mode
    model.train()
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model(x)
    model(x)  # nobody differentiates it
    torch.func.functional_call(model, dict(model.named_parameters()), x)
    torch.func.vmap(torch.func.grad(lambda x: model(x[None]).sum()))(x)
    assert_same(transform.state_dict(), start)
    before = gradients(model)
    optimizer.step()  # no batch yet: gradients as they are
    assert all(torch.equal(v, before[n]) for n, v in gradients(model).items())
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()  # one forward pass is one batch
    optimizer.step()
    assert transform.state_dict()["0"]["samples"] == 7
    model(torch.empty(0, 2, 5, 5).double()).sum().backward()
    assert transform.state_dict()["0"]["pending_rows"] == 0


def test_inputs_that_are_not_finite_never_enter():
    layer = nn.Linear(3, 2)
    optimizer = sgd(layer)
    transform = bnp(layer).attach(optimizer)
    layer(torch.tensor([[1.0, float("nan"), 2.0]])).sum().backward()
    start = transform.state_dict()
    assert start[""]["pending_rows"] == 0
    layer.zero_grad()
    layer(torch.randn(4, 3)).sum().backward()
    layer(torch.full((2, 3), float("inf"))).sum().backward()
    assert transform.state_dict()[""]["pending_rows"] == 4
    before = gradients(layer)
    optimizer.step()
    assert torch.equal(layer.bias.grad, before["bias"])  # the weight's is not finite: both stay
    assert transform.state_dict()[""]["mean"].isfinite().all()
    assert transform.state_dict()[""]["samples"] == 4


def test_a_layer_used_twice_sees_one_batch_of_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4).double()
            self.same = self.inner

        def forward(self, x):
            return self.inner(input=self.same(x).tanh())

    torch.manual_seed(0)
    model = Twice()
    x = torch.randn(6, 4).double()
    both = torch.cat([x, model.inner(x).tanh()]).detach()
    state = statistics_after(model, x, rho=0.0)
    assert list(state) == ["inner"]
    assert state["inner"]["samples"] == 12
    torch.testing.assert_close(state["inner"]["mean"], both.mean(0))
    torch.testing.assert_close(state["inner"]["variance"], both.var(0, correction=0))


@pytest.mark.parametrize(
    ("layer", "shape", "samples", "rows"),
    [
        (nn.Linear(4, 2), (4,), 1, 1),
        (nn.Linear(4, 2), (3, 5, 4), 3, 15),
        (nn.Conv1d(4, 2, 2), (4, 5), 1, 5),
        (nn.Conv2d(4, 2, 2), (3, 4, 5, 6), 3, 90),
    ],
)
def test_samples_and_positions_with_and_without_a_batch_axis(layer, shape, samples, rows):
    state = statistics_after(layer.double(), torch.randn(shape).double())
    assert state[""]["samples"] == samples
    assert state[""]["rows"] == rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("order", ["plain", "last", "strided", "alike"])
@pytest.mark.parametrize("kind", ["conv", "dense", "tokens"])
def test_statistics_do_not_depend_on_the_order_of_memory(kind, order, dtype):
    torch.manual_seed(1)
    shape = {"conv": (3, 5, 4, 7), "dense": (33, 5), "tokens": (3, 7, 5)}[kind]
    layer = nn.Conv2d(5, 2, 1) if kind == "conv" else nn.Linear(5, 2)
    x = torch.randn(shape, dtype=torch.float64).mul(3).add(40).to(dtype)
    if order == "last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif order == "strided":
        x = torch.stack([x, -x], 2)[:, :, 0]
    elif order == "alike":
        x = x[:1].expand(shape)
    n, mean, variance, _ = InputStatistics(layer.to(dtype)).of(x)
    rows = (x.movedim(1, -1) if kind == "conv" else x).reshape(-1, 5).double()
    # Sums of about 100 numbers in float32, of 40 beside a deviation of 3.
    close = {"rtol": 1e-12, "atol": 0} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 0}
    assert n == len(rows)
    torch.testing.assert_close(mean.double(), rows.mean(0), **close)
    torch.testing.assert_close(variance.double(), rows.var(0, correction=0), **close)


def test_statistics_shared_between_processes():
    """A reduction that doubles is two processes with equal batches: same moments, twice the N."""
    x = batch()[0]
    alone = statistics_after(small_model(), x)
    shared = statistics_after(small_model(), x, reduce=lambda t: 2 * t)
    for name in alone:
        # Float64 rounding.
        torch.testing.assert_close(shared[name]["mean"], alone[name]["mean"], rtol=1e-12, atol=0)
        torch.testing.assert_close(
            shared[name]["variance"], alone[name]["variance"], rtol=1e-12, atol=0
        )
        assert shared[name]["samples"] == 14


def test_two_processes_with_different_batches():
    layer = nn.Linear(4, 2).double()
    halves = torch.randn(3, 4).double(), 5 + torch.randn(6, 4).double()
    one, two, whole = (InputStatistics(layer) for _ in range(3))
    one.add(one.of(halves[0]))
    two.add(two.of(halves[1]))
    whole.add(whole.of(torch.cat(halves)))
    # Each process sees its own term and the other's; the mean is needed before the variance.
    n = [s.pending[0] for s in (one, two)]
    pooled = (n[0] * one.pending[1] + n[1] * two.pending[1]) / (n[0] + n[1])
    other = [
        n[1], n[1] * two.pending[1], n[1] * (two.pending[2] + (two.pending[1] - pooled) ** 2),
        n[1], two.pending[3],
    ]  # fmt: skip
    one.fold(0.0, lambda t: t + other.pop(0), True)
    whole.fold(0.0, None, True)
    torch.testing.assert_close(one.mean, whole.mean, rtol=1e-12, atol=0)  # float64 rounding
    torch.testing.assert_close(one.variance, whole.variance, rtol=1e-12, atol=0)
    assert one.samples == whole.samples == 9


def test_layers_that_cannot_be_taken():
    model = nn.Sequential(
        nn.Linear(4, 4, bias=False), nn.Conv1d(4, 4, 1, bias=False), nn.Linear(4, 2)
    )
    with pytest.raises(ValueError, match=r"2 have no bias: '0', '1'.*bias='skip'"):
        bnp(model)
    assert list(bnp(model, bias="skip").layers) == ["2"]
    assert list(bnp(model, skip=["0", "1"]).layers) == ["2"]
    assert list(bnp(model, skip=["0", "1*", "2.bias"]).layers) == []
    with pytest.raises(ValueError, match=r"nothing in this model. Did you mean"):
        bnp(model, skip="2.weigth")
    model[0].weight.requires_grad_(False)  # frozen: nothing to precondition
    assert list(bnp(model, skip=lambda name, p: name.startswith("1")).layers) == ["2"]

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.utils.parametrizations.weight_norm(model[1])
    with pytest.raises(ValueError, match=r"parametrized tensors: '1'.*skip="):
        bnp(model)
    assert list(bnp(model, skip="1").layers) == ["0"]

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.ConvTranspose1d(4, 4, 2))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="shared with another layer: '1'"):
        bnp(model)
    with pytest.raises(ValueError, match="run one forward pass"):
        bnp(nn.LazyLinear(3))


def test_layers_that_never_run_stay_plain():
    model = nn.ModuleDict({"used": nn.Linear(4, 2), "idle": nn.Linear(4, 2)}).double()
    optimizer = sgd(model, lr=0.0)
    bnp(model).attach(optimizer)
    model["used"](torch.randn(3, 4).double()).sum().backward()
    model["idle"].weight.grad = torch.ones(2, 4).double()
    model["idle"].bias.grad = torch.ones(2).double()
    optimizer.step()
    assert (model["idle"].weight.grad == 1).all()
    assert not torch.allclose(model["used"].bias.grad, torch.tensor(3.0).double())


def test_the_state_is_of_these_layers():
    transform, other = bnp(small_model()), bnp(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="state is of layers"):
        transform.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"'0' has 3 input channels.*\(5,\)"):
        other.load_state_dict(bnp(nn.Sequential(nn.Linear(5, 3))).state_dict())
    taken = transform.state_dict()
    taken["0"]["mean"] += 1  # a copy
    assert (transform.state_dict()["0"]["mean"] == 0).all()


def test_copies_gather_for_themselves():
    model = small_model()
    transform = bnp(model)
    optimizer = sgd(model, lr=0.0)
    transform.attach(optimizer)
    other, its = copy.deepcopy((model, transform))
    its.attach(sgd(other))
    backward(other)
    assert its.state_dict()["0"]["pending_rows"] == 7 * 25
    assert transform.state_dict()["0"]["pending_rows"] == 0


def test_hooks_left_by_an_optimizer_that_is_gone_fall_silent():
    model = small_model()
    transform = bnp(model)
    nl.gradient.chain(transform).attach(sgd(model))
    gc.collect()  # that optimizer, and the chain with it
    transform.attach(optimizer := sgd(model, lr=0.0))
    backward(model)
    assert transform.state_dict()["0"]["pending_rows"] == 7 * 25
    optimizer.step()
    assert transform.state_dict()["0"]["samples"] == 7


def test_autocast():
    model = small_model(torch.float32)
    optimizer = sgd(model)
    transform = bnp(model).attach(optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        nn.functional.cross_entropy(model(batch(dtype=torch.float32)[0]), batch()[1]).backward()
    optimizer.step()
    assert all(v.dtype == torch.float32 for v in transform.state_dict()["5"].values())
    assert transform.state_dict()["5"]["samples"] == 7


def test_compiled_models_count_too():
    """One graph, valid for every step; backend "aot_eager" has no generated code."""
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    states = []
    for network, run in ((model, compiled), (plain, plain)):
        optimizer = sgd(network)
        transform = bnp(network).attach(optimizer)
        torch.manual_seed(0)
        for step in range(3):
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                run(torch.randn(4, 2, 5).double()).square().sum().backward()
            optimizer.step()
        states.append((transform.state_dict(), gradients(network)))
    assert_same(*(s for s, _ in states))
    assert states[0][0]["0"]["samples"] == 4
    for n, g in states[0][1].items():
        torch.testing.assert_close(g, states[1][1][n], **ROUNDING)


def test_rewritten_before_weight_decay():
    """Weight decay is added to the rewritten gradient, not preconditioned itself."""
    model, twin = small_model(), small_model()
    optimizer = sgd(model, lr=0.1, weight_decay=0.5)
    bnp(model).attach(optimizer)
    start = model[7].weight.detach().clone()
    backward(model)
    optimizer.step()
    probe = bnp(twin)
    carrier = sgd(twin, lr=0.0)
    probe.attach(carrier)
    backward(twin)
    carrier.step()
    expected = start - 0.1 * (twin[7].weight.grad + 0.5 * start)
    torch.testing.assert_close(model[7].weight.detach(), expected, **ROUNDING)
    assert "7.weight" in rewritten(twin, bnp(twin))
