"""Independent components (1905.05928): what independent gates do to dependence, and the gates."""

import itertools
import math

import pytest
import torch

import normlab as nl
from activations.cases import build, sample
from normlab.core.recovery import Affine

EXACT = {"rel": 1e-12, "abs": 1e-13}  # sums of at most some hundred float64 terms
Z = 5.0  # standard errors: a normal estimate fails by chance once in 1.7 million seeds
KEPT = [0.5, 0.8, 0.95]


# --- The theorems, by enumeration ---------------------------------------------------------------


def joint(values, seed):
    """A symmetric joint distribution of two units, which so have the same mean and deviation."""
    weights = torch.rand(len(values), len(values), generator=torch.Generator().manual_seed(seed))
    weights = (weights + weights.T + 3 * torch.eye(len(values))).double()
    shares = (weights / weights.sum()).tolist()
    return {(a, b): shares[i][j] for i, a in enumerate(values) for j, b in enumerate(values)}


def gated(distribution, p):
    """The joint distribution after two independent gates, over all four patterns."""
    out = {}
    for (a, b), share in distribution.items():
        for g, h in itertools.product((0, 1), repeat=2):
            key = (g * a, h * b)
            chance = (p if g else 1 - p) * (p if h else 1 - p)
            out[key] = out.get(key, 0.0) + share * chance
    return out


def expectation(distribution, function):
    return sum(q * function(a, b) for (a, b), q in distribution.items())


def correlation(distribution):
    a, b = expectation(distribution, lambda a, b: a), expectation(distribution, lambda a, b: b)
    products = expectation(distribution, lambda a, b: a * b) - a * b
    squares = expectation(distribution, lambda a, b: a * a) - a * a
    return products / math.sqrt(squares * (expectation(distribution, lambda a, b: b * b) - b * b))


def marginal(distribution, which):
    out = {}
    for key, q in distribution.items():
        out[key[which]] = out.get(key[which], 0.0) + q
    return out


def information(distribution):
    first, second = marginal(distribution, 0), marginal(distribution, 1)
    return sum(q * math.log(q / first[a] / second[b]) for (a, b), q in distribution.items() if q)


def entropy(shares):
    return -sum(q * math.log(q) for q in shares if q)


def centred(distribution):
    mean = expectation(distribution, lambda a, b: a)
    return {(a - mean, b - mean): q for (a, b), q in distribution.items()}


@pytest.mark.parametrize("p", KEPT)
@pytest.mark.parametrize("seed", range(5))
def test_gates_shrink_correlation_by_p_at_mean_zero(seed, p):
    before = centred(joint([-1.5, 0.2, 1.0, 3.0], seed))
    after = gated(before, p)
    assert correlation(after) == pytest.approx(p * correlation(before), **EXACT)


@pytest.mark.parametrize("p", KEPT)
@pytest.mark.parametrize("seed", range(5))
def test_a_mean_makes_the_shrinkage_stronger(seed, p):
    before = joint([-0.5, 0.2, 1.0, 3.0], seed)
    mean = expectation(before, lambda a, b: a)
    variance = expectation(before, lambda a, b: a * a) - mean**2
    ratio = correlation(gated(before, p)) / correlation(before)
    assert ratio == pytest.approx(p / (1 + (1 - p) * mean**2 / variance), **EXACT)
    assert ratio < p - 1e-6


@pytest.mark.parametrize("p", KEPT)
@pytest.mark.parametrize("seed", range(5))
def test_gates_shrink_information_by_p_squared_where_nothing_is_zero(seed, p):
    before = joint([-1.0, 0.5, 2.0], seed)
    ratio = information(gated(before, p)) / information(before)
    assert ratio == pytest.approx(p**2, rel=1e-10)  # a quotient of small differences
    scaled = {(a / p, b / p): q for (a, b), q in gated(before, p).items()}
    assert information(scaled) == pytest.approx(information(gated(before, p)), **EXACT)


@pytest.mark.parametrize("p", KEPT)
@pytest.mark.parametrize("seed", range(5))
def test_information_shrinks_more_where_units_may_be_zero(seed, p):
    """As after a ReLU: a gate that was shut is then not seen to be shut."""
    before = joint([0.0, 0.5, 2.0], seed)
    assert information(gated(before, p)) < (p**2 - 1e-3) * information(before)


def test_the_example_of_units_that_are_zero_or_two():
    """Alike four times in five, kept every second time: 0.097, not p² = 0.25."""
    before = {(0, 0): 0.4, (2, 2): 0.4, (0, 2): 0.1, (2, 0): 0.1}
    ratio = information(gated(before, 0.5)) / information(before)
    assert ratio == pytest.approx(0.097, abs=5e-4)  # three digits


@pytest.mark.parametrize("p", KEPT)
def test_the_entropy_that_gates_cost(p):
    before = joint([-1.0, 0.5, 2.0], 1)
    h = entropy(marginal(before, 0).values())
    gate = entropy([p, 1 - p])
    after = entropy(marginal(gated(before, p), 0).values())
    assert after == pytest.approx(p * h + gate, **EXACT)


# --- The layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["element", "channel"])
def test_the_layers_output_loses_correlation_by_p_on_average_over_all_gates(mask):
    """β = 0; all 2⁶ patterns of 3 samples of 2 units, of the values before dropout."""
    p, layer = 0.8, build("ic", {"dropout": 0.0, "eps": 0.0, "mask": mask}, channels=2)
    layer.bias.data.zero_()
    y = layer(sample((3, 2))).detach()
    before = (y[:, 0] * y[:, 1]).mean() / y.pow(2).mean(0).prod().sqrt()
    products = squares = 0.0
    for pattern in itertools.product((0, 1), repeat=6):
        chance = math.prod(p if g else 1 - p for g in pattern)
        z = y * torch.tensor(pattern, dtype=torch.float64).view(3, 2) / p
        products += chance * (z[:, 0] * z[:, 1]).mean()
        squares += chance * z.pow(2).mean(0)
    after = products / squares.prod().sqrt()
    assert after.item() == pytest.approx(p * before.item(), **EXACT)


def gates(shape, rate, mask, seed=0, channel_dim=1):
    """Which elements the layer keeps, and the factor by which it raises them."""
    layer = nl.norm("ic", shape[channel_dim], dropout=rate, mask=mask, channel_dim=channel_dim)
    plain = nl.norm("ic", shape[channel_dim], dropout=0.0, channel_dim=channel_dim)
    x = torch.randn(shape)
    torch.manual_seed(seed)
    y, whole = layer(x), plain(x)
    kept = y != 0
    torch.testing.assert_close(y[kept], whole[kept] / (1 - rate), rtol=1e-6, atol=0)  # one product
    return kept.movedim(channel_dim, 1)


def independent(kept, rate):
    """Rate, and agreement of neighbours along every axis at two distances."""
    count, p = kept.numel(), 1 - rate
    k = kept.double()
    assert abs(k.mean().item() - p) < Z * math.sqrt(p * rate / count)
    for dim in range(k.ndim):
        for step in (1, 3):
            product = ((k - p) * (k.roll(step, dim) - p)).mean().item()
            assert abs(product) < Z * p * rate / math.sqrt(count)


@pytest.mark.parametrize("rate", [0.05, 0.4])
def test_elements_have_independent_gates(rate):
    independent(gates((64, 16, 12, 10), rate, "element"), rate)


@pytest.mark.parametrize("rate", [0.05, 0.4])
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_channels_have_independent_gates_and_drop_as_a_whole(rate, channel_dim):
    shape = (600, 64, 2, 3) if channel_dim == 1 else (600, 2, 3, 64)
    kept = gates(shape, rate, "channel", channel_dim=channel_dim)
    assert torch.equal(kept, kept[:, :, :1, :1].expand_as(kept))
    independent(kept[:, :, 0, 0], rate)


def test_without_positions_a_channel_is_an_element():
    independent(gates((800, 64), 0.3, "channel"), 0.3)


def test_dropped_channels_get_no_gradient():
    layer, x = nl.norm("ic", 6, dropout=0.5, mask="channel"), torch.randn(8, 6, 5)
    y = layer(x.requires_grad_())
    dropped = (y == 0).all(2)
    assert dropped.any()
    y.retain_grad()
    (y * 3).sum().backward()
    torch.manual_seed(0)
    other = build("ic", {"dropout": 0.5, "mask": "channel"})
    other.update = False

    def repeated(x):
        torch.manual_seed(0)
        return other(x)

    z = sample((4, 6, 3)).requires_grad_()
    assert torch.autograd.gradcheck(repeated, (z,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(repeated, (z,))


def test_channel_gates_keep_the_input_alone():
    layer, kept = nl.norm("ic", 64, dropout=0.1, mask="channel"), 0
    x = torch.randn(8, 64, 16, 16, requires_grad=True)

    def pack(tensor):
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert kept <= 1.1 * x.numel() * 4


@pytest.mark.parametrize("mask", ["element", "channel"])
def test_evaluation_drops_nothing(mask):
    layer, plain = nl.norm("ic", 6, dropout=0.5, mask=mask), nl.BatchNorm(6)
    x = torch.randn(8, 6, 5)
    layer(x), plain(x)
    assert torch.equal(layer.eval()(x), plain.eval()(x))


COMPOSITIONS = {"relu-ic-conv": "before_weight", "ic-conv-relu": "ic-conv-relu",
                "conv-relu-ic": "conv-relu-ic"}  # fmt: skip


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_compositions_change_where_it_stands_not_what_it_is(composition):
    layer, first = nl.norm("ic", 6, composition=composition), nl.norm("ic", 6)
    assert layer.placement == COMPOSITIONS[composition]
    assert first.placement == "before_weight"
    x = torch.randn(8, 6, 5)
    outputs = []
    for one in (layer, first):
        torch.manual_seed(1)
        outputs.append(one(x))
    assert torch.equal(*outputs)
    assert nl.BatchNorm(6).placement == "after_weight"


def test_other_words_are_refused():
    with pytest.raises(ValueError, match=r"composition is one of relu-ic-conv, .*received 'A'"):
        nl.norm("ic", 6, composition="A")
    with pytest.raises(ValueError, match="mask is 'element' or 'channel'; received 'map'"):
        nl.norm("ic", 6, mask="map")
    with pytest.raises(ValueError, match="received 'row'"):
        Affine(drop="row")


def test_the_pattern_shows_what_is_not_the_default():
    shown = repr(nl.norm("ic", 6, mask="channel", composition="conv-relu-ic"))
    assert "mask=channel" in shown
    assert "composition=conv-relu-ic" in shown
    assert "mask" not in repr(nl.norm("ic", 6))


def test_both_masks_keep_the_laws():
    for mask in ("element", "channel"):
        nl.check_normalizer(
            lambda c, mask=mask: nl.norm("ic", c, dropout=0.3, mask=mask)
        ).raise_for_failures()


# --- What the next layer's statistics see (1801.05134) ------------------------------------------


def shift(c, v, p):
    """Var_test/Var_train of an input of mean c, variance v behind a dropout that keeps p."""
    return v / ((c * c + v) / p - c * c)


@pytest.mark.parametrize("p", KEPT)
@pytest.mark.parametrize("seed", range(4))
def test_the_variance_behind_a_dropout_by_enumeration(seed, p):
    before = marginal(joint([-1.0, 0.4, 2.5], seed), 0)
    c = sum(a * q for a, q in before.items())
    v = sum((a - c) ** 2 * q for a, q in before.items())
    after = [(g * a / p, q * (p if g else 1 - p)) for a, q in before.items() for g in (0, 1)]
    mean = sum(a * q for a, q in after)
    variance = sum((a - mean) ** 2 * q for a, q in after)
    assert mean == pytest.approx(c, **EXACT)
    assert v / variance == pytest.approx(shift(c, v, p), **EXACT)
    assert shift(c, v, p) < 1


def test_the_variance_shift_measured_on_two_layers():
    """An IC layer of γ = 1.5, β = 0.7 drops in front of another batch normalization."""
    p, layer, after = 0.8, nl.norm("ic", 8, dropout=0.2), nl.BatchNorm(8, momentum=None)
    with torch.no_grad():
        layer.weight.fill_(1.5)
        layer.bias.fill_(0.7)
    x = torch.randn(100, 8, 50, 20)
    after(layer(x))
    with nl.statistics(layer, use="batch", update=False):
        test = layer.eval()(x).var((0, 2, 3))
    ratio = test / after.running_var
    # A variance of 10⁵ elements of kurtosis about 4 deviates by √(3/10⁵) = 0.6 %; five times that.
    torch.testing.assert_close(ratio, torch.full((8,), shift(0.7, 2.25, p)), rtol=0.03, atol=0)
