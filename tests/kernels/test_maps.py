"""EvoNorm and layers through one curve for each map, against the plain formulas in float64."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import normlab as nl
from kernels.kernel_cases import arrange, build, close, functions, same_with_threads
from normlab.kernels import dispatch
from normlab.kernels.cpu import function, maps

pytestmark = pytest.mark.skipif(
    dispatch.compiled_kernels() is None, reason=f"no compiled kernels: {dispatch.reason()}"
)

METHODS = [
    ("evonorm_s0", {"groups": 2}), ("evonorm_s0", {"groups": 2, "bessel": True}),
    ("evonorm_s0", {"groups": 1, "affine": False}), ("evonorm_s0", {"groups": 2, "eps": 0.1}),
    ("evonorm_b0", {}), ("evonorm_b0", {"bessel": True}), ("evonorm_b0", {"affine": False}),
    ("switchable", {}), ("switchable", {"over": ("layer", "instance"), "affine": False}),
    ("switchable", {"over": "batch"}), ("sparse_switchable", {}),
]  # fmt: skip
NAMES = ["evonorm_s0", "evonorm_b0", "switchable"]
FUSED = {maps._Fused, function._Normalize}  # of which a layer has one
ORDERS = ["rows", "columns", "sliced", "reversed"]


def run(layer, x, dy, backend):
    """y, the gradients, and the buffers after the pass."""
    layer, x = copy.deepcopy(layer), x.detach().clone().requires_grad_()
    with nl.kernels.backend(backend):
        y = layer(x)
        assert bool(FUSED & functions(y)) == (backend == "auto")
        grads = torch.autograd.grad(y, [x, *layer.parameters()], dy.to(y.dtype))
    buffers = [b for b in layer.buffers() if b.is_floating_point()]
    return [y.detach(), *grads, *buffers]


def values(shape, seed, channel_dim):
    """x of another mean and deviation in each sample and channel, and dy."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    place = [1] * len(shape)
    place[0], place[channel_dim] = shape[0], shape[channel_dim]
    of_map = torch.rand(place, generator=g, dtype=torch.float64)
    return (x + of_map) * (0.5 + of_map), torch.randn(shape, generator=g, dtype=torch.float64)


@st.composite
def problems(draw):
    name, options = draw(st.sampled_from(METHODS))
    channels = draw(st.sampled_from([2, 4, 6, 34, 66]))
    n = draw(st.integers(1, 7))
    positions = draw(st.lists(st.sampled_from([1, 2, 3, 5, 7, 8, 19]), max_size=3))
    last = draw(st.booleans())
    shape = (n, *positions, channels) if last else (n, channels, *positions)
    order, train = draw(st.sampled_from(ORDERS)), draw(st.booleans())
    return name, options, channels, shape, -1 if last else 1, order, train, draw(st.integers(0, 99))


def compare(problem, dtype, tolerance):
    name, options, channels, shape, channel_dim, order, train, seed = problem
    layer = build(name, options, channels, None, channel_dim, seed).train(train)
    x, dy = (t.to(dtype) for t in values(shape, seed, channel_dim))
    areas = shape[0] * options.get("groups", 1) if name == "evonorm_s0" else channels
    if "switchable" in name:  # any of the maps
        areas = shape[0] * channels
    if x.numel() // areas < 3:
        return  # the deviation of one or two members may be any fraction of them, or refused
    exact = copy.deepcopy(layer).double()
    layer = layer.double() if dtype == torch.float64 else layer
    if name == "evonorm_b0" and dtype != torch.float64:
        dy = away_from_the_kink(exact, x.double(), dy)
    ours = run(layer, arrange(x, order), arrange(dy, order), "auto")
    close(ours, run(exact, x.double(), dy.double(), "reference"), tolerance)


def away_from_the_kink(layer, x, dy):
    """dy without the elements where both sides of B0's maximum are equal but for rounding."""
    layer, x = copy.deepcopy(layer), x.movedim(layer.channel_dim, 1)
    dims = [d for d in range(x.ndim) if d != 1]
    batch = x.var(dims, correction=0, keepdim=True)
    one = [1] * (x.ndim - 2)
    if not layer.training:
        batch = layer.running_var.view(1, -1, *one)
    flat = x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)
    size = flat.shape[2]
    own = flat.var(2, correction=0) * (size / max(size - 1, 1) if layer.bessel else 1)
    line = layer.v.view(1, -1, *one) * x + (own + layer.eps).sqrt().view(*own.shape, *one)
    near = ((line - (batch + layer.eps).sqrt()).abs() < 1e-5).movedim(1, layer.channel_dim)
    return dy.masked_fill(near, 0)


@settings(max_examples=150)
@given(problems())
def test_float64(problem):
    # Sums of at most 50000 terms in another order; two or three members amplify by 1/deviation.
    compare(problem, torch.float64, [1e-9])


@settings(max_examples=150)
@given(problems())
def test_float32(problem):
    # y: a few roundings of 6e-8. Gradients: areas of few members, whose deviation may by chance be
    # a tenth of the values, lose a digit in 1/D.
    compare(problem, torch.float32, [4e-6, 2e-5])


@settings(max_examples=100)
@given(problems())
def test_bfloat16(problem):
    # One rounding on the way out, 2^-9 of an element, 2^-8 at most by the size of the mantissa;
    # sums over elements are in float32 inside.
    compare(problem, torch.bfloat16, [2**-8, 2**-8, 2e-5])


@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("shape", [(1, 2, 2**20), (2, 4, 300, 500), (3, 34, 33, 31)])
@pytest.mark.parametrize("name", NAMES)
def test_long_sums_and_samples_in_parts(name, shape, order):
    """Sums over many positions do not drift, and samples that are few are cut for threads."""
    g = torch.Generator().manual_seed(2)
    x = values(shape, 2, 1)[0].float()  # of maps that differ, so that a mixture has gradients
    layer = build(name, {"groups": 2} if name == "evonorm_s0" else {}, shape[1])
    dy = away_from_the_kink(layer, x, torch.rand(shape, generator=g)) if "b0" in name else x + 0.1
    ours = run(layer, arrange(x, order), arrange(dy, order), "auto")
    exact = run(copy.deepcopy(layer).double(), x.double(), dy.double(), "reference")
    # A few roundings of 6e-8, of moments, coefficients and results; in dx times 1/D. The weights
    # of a mixture have gradients that cancel.
    close(ours, exact, [4e-6, 4e-6, 4e-6, 4e-6, 4e-5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite(bad, train, channel_dim, dtype):
    """NaN and infinities reach the elements that they reach in the plain formulas."""
    for name, options in METHODS:
        layer = build(name, options, 6, None, channel_dim).train(train)
        layer = layer.double() if dtype == torch.float64 else layer
        x, dy = values((6, 6, 35) if channel_dim == 1 else (6, 35, 6), 3, channel_dim)
        x[2, 3, 3] = bad
        ours, plain = (run(layer, x.to(dtype), dy.to(dtype), b) for b in ("auto", "reference"))
        for i, (a, b) in enumerate(zip(ours, plain, strict=True)):
            assert torch.equal(a.isnan(), b.isnan()), (name, i)
            assert torch.equal(a.isinf(), b.isinf()), (name, i)


@pytest.mark.parametrize("which", ["v", "weight", "bias"])
def test_a_parameter_that_is_nan(which):
    for name in ("evonorm_s0", "evonorm_b0"):
        layer = build(name, {}, 6)
        with torch.no_grad():
            getattr(layer, which)[2] = float("nan")
        x, dy = (t.float() for t in values((3, 6, 35), 3, 1))
        ours, plain = (run(layer, x, dy, backend) for backend in ("auto", "reference"))
        for i, (a, b) in enumerate(zip(ours, plain, strict=True)):
            assert torch.equal(a.isnan(), b.isnan()), (name, i)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gate_everywhere(dtype):
    """Over the whole range, from where exp vanishes to where it overflows."""
    u = torch.cat([torch.linspace(-200, 200, 8001), torch.tensor([-1e18, 1e18, 1e-30, -0.0])])
    x = u.to(dtype).view(1, 1, -1)
    layer = nl.EvoNormS0(1, 1).to(dtype)
    with torch.no_grad():
        layer.weight.fill_(2**20)
    y = run(layer, x, torch.ones_like(x), "auto")
    exact = run(copy.deepcopy(layer).double(), x.double(), torch.ones_like(x).double(), "reference")
    # 1e-7 of the gate itself, times x, over all x: the largest are 1e18.
    close(y[:1], exact[:1], [2**-8 if dtype == torch.bfloat16 else 1e-6])
    x = x[..., :8001].contiguous()
    y, exact = (run(layer.to(d), x.to(d), torch.ones_like(x, dtype=d), b)
                for d, b in ((dtype, "auto"), (torch.float64, "reference")))  # fmt: skip
    close(y, exact, [2**-8] if dtype == torch.bfloat16 else [2e-6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("v", [1e20, 1e37, 1e38, 3e38])
def test_gate_where_its_argument_is_huge(v, dtype):
    """A gate that is all open or shut has no slope, and v·x may overflow."""
    layer = build("evonorm_s0", {"groups": 2}, 4).to(dtype)
    with torch.no_grad():
        layer.v.fill_(v if dtype != torch.float64 else v * 1e269)
    for deviation in (1.0, 30.0):
        x, dy = (t.to(dtype) for t in values((3, 4, 35), 3, 1))
        x *= deviation
        ours = run(layer, x, dy, "auto")
        exact = copy.deepcopy(layer).double()
        with torch.no_grad():  # a gate as steep as it needs to be: reference and double overflow
            exact.v.fill_(1e20)
        exact = run(exact, x.double(), dy.double(), "reference")
        tolerance = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2**-8}[dtype]
        close(ours, exact, [tolerance])  # as above: sums in another order, or one rounding


def test_a_tie_is_shared():
    """Where both sides of B0's maximum are equal, each gets half, as torch has it."""
    x = torch.tensor([1.0, -1.0, 2.0, -2.0]).view(1, 1, 4)  # one sample: σ²_c = σ²_nc
    layer = nl.EvoNormB0(1)
    with torch.no_grad():
        layer.v.fill_(0.0)  # so that v·x + √… = √…, exactly
    dy = torch.tensor([0.3, 0.1, -0.5, 0.7]).view(1, 1, 4)
    ours, plain = (run(layer, x, dy, backend) for backend in ("auto", "reference"))
    assert plain[4].abs() > 0.01  # ∂L/∂v, which one side alone has
    close(ours, [t.double() for t in plain], [1e-6])


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads):
    """Bit for bit: pieces and the order of their sums depend on the shape alone."""

    def results():
        found = []
        for name, options in METHODS:
            for shape in [(6, 34, 9, 11), (7, 4), (3, 2, 3000), (1, 6, 500)]:
                for order in ("rows", "columns"):
                    layer = build(name, options, shape[1])
                    x, dy = (arrange(t.float(), order) for t in values(shape, 1, 1))
                    found += run(layer, x, dy, "auto")
        return found

    same_with_threads(results, threads)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train", [True, False])
def test_derivatives_that_kernels_do_not_have(name, train):
    """Second derivatives, forward mode and torch.func are those of the plain formulas."""
    layer = build(name, {}, 4).double().train(train)
    layer.update = False
    x = values((3, 4, 5), 1, 1)[0].requires_grad_()
    names = [n for n, _ in layer.named_parameters()]
    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def call(x, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, given, (x,))

    assert FUSED & functions(call(x, *parameters))
    torch.autograd.gradcheck(call, (x, *parameters), check_forward_ad=True)
    torch.autograd.gradgradcheck(call, (x, *parameters))
    ours = torch.func.grad(lambda x: call(x, *parameters).square().sum())(x)
    (plain,) = torch.autograd.grad(call(x, *parameters).square().sum(), x)
    torch.testing.assert_close(ours, plain)
    batched = torch.eye(3, dtype=torch.float64)
    y = call(x, *parameters).flatten()[:3]
    rows = torch.autograd.grad(y, x, batched, is_grads_batched=True, retain_graph=True)[0]
    for row, one in zip(rows, batched, strict=True):
        torch.testing.assert_close(row, torch.autograd.grad(y, x, one, retain_graph=True)[0])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_that_are_not_asked_for(name):
    layer = build(name, {}, 6)
    x, dy = (t.float() for t in values((3, 6, 5, 4), 1, 1))
    whole = run(layer, x, dy, "auto")
    for frozen in (["v"], ["weight"], ["v", "weight", "bias"], ["x"], ["x", "v"]):
        one = copy.deepcopy(layer)
        wanted = {"x": x.clone(), **dict(one.named_parameters())}
        for key, tensor in wanted.items():
            tensor.requires_grad_(key not in frozen)
        one(wanted["x"]).backward(dy)
        for (key, tensor), expected in zip(wanted.items(), whole[1:], strict=False):
            if key in frozen:
                assert tensor.grad is None
            else:
                # In another order of passes, which round differently.
                torch.testing.assert_close(tensor.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_saves_the_input_and_little_else(name):
    saved = []
    x = torch.randn(16, 32, 24, 24, requires_grad=True)

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        nl.norm(name, 32)(x)
    bytes_ = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert sum(bytes_.values()) < 1.05 * x.untyped_storage().nbytes()


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tie_belongs_half_to_each_side(channel_dim, dtype):
    """Of one sample both deviations of B0 are equal, and the lines meet where x is 0."""
    layer = build("evonorm_b0", {}, 5, None, channel_dim).to(dtype)
    exact = copy.deepcopy(layer).double()
    shape = (1, 5, 6, 6) if channel_dim == 1 else (1, 6, 6, 5)
    x, dy = (t.to(dtype) for t in values(shape, 1, channel_dim))
    x = x.clamp(min=0)
    assert (x == 0).sum() > 5
    ours, plain = run(layer, x, dy, "auto"), run(exact, x.double(), dy.double(), "reference")
    close(ours, plain, [1e-9 if dtype == torch.float64 else 2e-5])  # as above


@pytest.mark.parametrize("name", ["evonorm_b0", "switchable"])
@pytest.mark.parametrize("narrow", ["all", "some"])
def test_parameters_in_bfloat16_are_read_as_they_are(name, narrow):
    layer = build(name, {}, 6, None, 1)
    for p in list(layer.parameters())[narrow == "some" :]:
        p.data = p.data.bfloat16()
    exact = copy.deepcopy(layer).double()
    x, dy = (t.bfloat16() for t in values((4, 6, 35), 2, 1))
    if name == "evonorm_b0":
        dy = away_from_the_kink(exact, x.double(), dy)
    ours = run(layer, x, dy, "auto")
    wide = run(exact, x.double(), dy.double(), "reference")
    # Gradients of parameters are rounded to bfloat16 once, as y is.
    close(ours, wide, [2**-8])
    for p, gradient in zip(layer.parameters(), ours[2:], strict=False):
        assert gradient.dtype == p.dtype


def test_numbers_of_another_length_are_refused_as_without_kernels():
    layer = nl.SwitchableNorm(6)
    layer.mean_weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises((ValueError, RuntimeError)):
        layer(torch.randn(3, 6, 4))
    wrong = nl.EvoNormB0(6)
    wrong.v = torch.nn.Parameter(torch.ones(4))
    with pytest.raises(RuntimeError):
        wrong(torch.randn(3, 6, 4))


@pytest.mark.parametrize("name", ["evonorm_b0", "switchable", "sparse_switchable", "batch_renorm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_saved_moments_in_another_dtype_are_read_as_such(name, dtype):
    """Hooks on saved tensors may hand back what they like: here small ones, in another dtype."""
    layer = build(name, {}, 6, None, 1)
    x, dy = (t.float() for t in values((4, 6, 35), 2, 1))
    exact = copy.deepcopy(layer).double()
    expected = torch.autograd.grad(exact(x.double().requires_grad_()), exact.weight, dy.double())

    def pack(t):
        return t.to(dtype) if t.numel() in (6, 24) and not isinstance(t, torch.nn.Parameter) else t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x.requires_grad_())
    (found,) = torch.autograd.grad(y, layer.weight, dy)
    # Moments near 1 rounded to float16, 2^-11, in sums of 140 terms.
    close([found], list(expected), [2e-2 if dtype == torch.float16 else 2e-5])


def test_a_subclass_that_stores_something_else_still_does():
    class Sevens(nl.SwitchableNorm):
        def _batch(self, maps, parameters, given):
            found = super()._batch(maps, parameters, given)
            return found._replace(mean=torch.full_like(found.mean, 7.0))

    layer = Sevens(6, momentum=1.0)
    layer(torch.randn(3, 6, 5))
    assert (layer.running_mean == 7).all()
