"""Wiring of binary networks: bookkeeping of variances, shapes, counts, and the three arms."""

from itertools import pairwise

import pytest
import torch
from network_fakes import FAKES, Batch
from torch import nn
from torch.nn import functional as F

from normlab.networks import NetworkError, weight_layers
from normlab.networks.binary import (
    BinaryConv2d,
    RPReLU,
    RSign,
    ScaledStdConv2d,
    binary_layers,
    standardized,
)
from normlab.networks.reactnet import BiRealPlan, ReActNetPlan, Unit, expected_variances

GRAY, COLOR = (1, 28, 28), (3, 32, 32)
A2 = 0.2**2
UNUSED = ("gate.weight", "gate.bias", "mix.weight", "mix.bias")
SMALL = {
    "a": ReActNetPlan(layout="a", width=4, stages=3, blocks=1),
    "18": ReActNetPlan(layout="18", width=4, stages=2, blocks=2),
    "bireal": BiRealPlan(width=4, stages=2, blocks=2),
    "a, free": ReActNetPlan(layout="a", width=4, stages=3, blocks=1, norm_free=True),
    "18, free": ReActNetPlan(layout="18", width=4, stages=2, blocks=2, norm_free=True),
    "bireal, free": BiRealPlan(width=4, stages=2, blocks=2, norm_free=True),
    "large": ReActNetPlan(layout="18", width=4, stages=2, blocks=1, stem="imagenet"),
    "large a": ReActNetPlan(layout="a", width=4, stages=2, blocks=1, stem="imagenet"),
    "released": ReActNetPlan(layout="18", width=4, stages=2, norm_free=True, downsample="binary"),
}


def net(plan, norm=nn.Identity, image_shape=GRAY, classes=7):
    torch.manual_seed(0)
    return plan.assemble(norm, classes=classes, image_shape=image_shape)


def units(network):
    return [m for m in network.modules() if isinstance(m, Unit)]


def in_steps(*counts):
    """1 + n·α² for each n."""
    return pytest.approx([1 + n * A2 for n in counts], rel=1e-14)


def test_variances_are_those_of_nf_resnets():
    # Every unit adds α²; one that halves starts from 1 and leaves 1 + α².
    assert expected_variances("18", (4, 4, 4)) == in_steps(0, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3)
    assert expected_variances("a", (1, 2, 1)) == in_steps(0, 1, 2, 1, 2, 3, 4, 1)


def test_released_variances_are_off_by_one():
    # 18: the first of a stage adds nothing. a: the first unit of a block that halves is followed by
    # another step, and the return to 1 comes after the second.
    released = {"bookkeeping": "released"}
    assert expected_variances("18", (4, 4, 4), **released) == in_steps(
        0, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2
    )
    assert expected_variances("a", (1, 2, 2), **released) == in_steps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1)


def test_units_carry_the_factors():
    plan = ReActNetPlan(layout="18", width=4, norm_free=True)
    factors = [(u.alpha, u.beta) for u in units(net(plan))]
    variances = expected_variances("18", (4, 4, 4, 4))
    assert factors == [(0.2, pytest.approx(v**-0.5)) for v in variances]
    assert {u.halves for u in units(net(plan))} == {False, True}
    other = ReActNetPlan(layout="18", width=4, norm_free=True, alpha=0.5, bookkeeping="released")
    found = [u.beta for u in units(net(other))][:4]
    assert found == pytest.approx([1, 1, 1.25**-0.5, 1.5**-0.5])
    assert {(u.alpha, u.beta) for u in units(net(SMALL["18"]))} == {(1.0, 1.0)}


def test_expected_variances_hold_for_linear_units():
    # Without RPReLU and without halving, and with branches of variance 1, the bookkeeping is exact.
    plan = BiRealPlan(width=64, stages=1, norm_free=True, alpha=0.5)
    network = net(plan).eval()
    x, seen = torch.randn(8, 64, 16, 16), []
    with torch.no_grad():
        for unit in units(network):
            seen.append(x.var().item())
            x = unit(x)
    # A branch is a sum of 576 signs, less at the border where zeros are padded; filters and signs
    # are random. Its variance is mean|Ŵ|²·576 = 2/π of the real weight's for normal latents and
    # 3/4 for torch's uniform ones, so the growth of variance is 3/4 of the bookkeeping's.
    expected = [1 + 0.75 * 0.25 * n for n in range(4)]
    assert seen == pytest.approx(expected, rel=0.15)


def oracle(unit, x):
    """A unit from METHODS: h′ = RPReLU(s + α·conv(sign(β·h + b)))."""
    scaled = unit.beta * x
    signs = torch.where(scaled + unit.sign.bias.view(-1, 1, 1) >= 0, 1.0, -1.0).to(x.dtype)
    short = x
    if unit.halves:
        short = F.avg_pool2d(scaled, 2, 2)
    if hasattr(unit.shortcut, "conv"):
        weight = unit.shortcut.conv
        short = F.conv2d(short, weight.gain * standardized(weight.weight))
    parts = []
    for branch in unit.branches:
        weight, padding = branch.conv.effective(), branch.conv.padding
        parts.append(
            short + unit.alpha * F.conv2d(signs, weight, None, branch.conv.stride, padding)
        )
    total = torch.cat(parts, 1) + unit.act.before.view(-1, 1, 1)
    bent = torch.where(total > 0, total, unit.act.slope.view(-1, 1, 1) * total)
    return bent + unit.act.after.view(-1, 1, 1)


@pytest.mark.parametrize("name", ["a, free", "18, free"])
def test_every_unit_against_the_oracle(name):
    network = net(SMALL[name]).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        x = network.stem(torch.randn(3, *GRAY, dtype=torch.double))
        for unit in units(network):
            y = unit(x)
            # The same sums in another order.
            torch.testing.assert_close(y, oracle(unit, x), rtol=1e-11, atol=1e-12)
            x = y


def test_batch_norm_stands_between_convolution_and_sum():
    network = net(SMALL["a"], nn.BatchNorm2d).double()
    unit, x = units(network)[3], torch.randn(4, 8, 6, 6, dtype=torch.double)
    assert len(unit.branches) == 2
    y = unit(x)
    parts = []
    for branch in unit.branches:
        z = branch.conv(torch.where(x >= 0, 1.0, -1.0).double())
        z = (z - z.mean((0, 2, 3), keepdim=True)) / (
            z.var((0, 2, 3), keepdim=True, correction=0) + 1e-5
        ).sqrt()
        parts.append(z + x)
    joined = torch.cat(parts, 1)
    # Rounding of batch statistics.
    torch.testing.assert_close(y, F.leaky_relu(joined, 0.25), rtol=1e-9, atol=1e-10)


def test_channels_double_by_two_convolutions_on_one_input():
    found = units(net(ReActNetPlan(width=4)))
    doubling = [u for u in found if len(u.branches) == 2]
    assert len(found) == 26
    assert len(doubling) == 5
    for unit in doubling:
        first, second = (branch.conv for branch in unit.branches)
        assert first.kernel_size == second.kernel_size == (1, 1)
        assert first.weight.shape == second.weight.shape
        assert first.out_channels == first.in_channels
        assert not torch.equal(first.weight, second.weight)
        assert isinstance(unit.act, RPReLU)
        assert len(unit.act.slope) == 2 * first.in_channels  # one, after the concatenation
        assert not len(unit.shortcut)
    assert [u.halves for u in found].count(True) == 4


@pytest.mark.parametrize("image_shape", [GRAY, COLOR, (2, 9, 5)])
@pytest.mark.parametrize("kind", FAKES)
@pytest.mark.parametrize("name", SMALL)
def test_any_normalizer_and_size(name, kind, image_shape):
    network = net(SMALL[name], FAKES[kind], image_shape)
    y = network(torch.randn(4, *image_shape))
    assert y.shape == (4, 7)
    y.square().sum().backward()
    # A greedy normalizer has weights that it does not use.
    used = [p for n, p in network.named_parameters() if not n.endswith(UNUSED)]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in used)
    assert all(layer.weight.grad.abs().max() > 0 for _, layer in weight_layers(network))


@pytest.mark.parametrize("name", SMALL)
def test_weights_have_equal_names_in_all_arms(name):
    reference = [(n, w.weight.shape) for n, w in weight_layers(net(SMALL[name], Batch))]
    for norm in FAKES.values():
        assert [(n, w.weight.shape) for n, w in weight_layers(net(SMALL[name], norm))] == reference
    bound, free = net(SMALL["18"], Batch), net(SMALL["18, free"])
    assert [n for n, _ in weight_layers(bound)] == [n for n, _ in weight_layers(free)]


def test_maps_halve_and_channels_double():
    found = []
    network = net(ReActNetPlan(layout="18", width=4), image_shape=COLOR)
    for unit in units(network):
        unit.register_forward_hook(lambda m, i, y: found.append(tuple(y.shape[1:])))
    network(torch.zeros(1, *COLOR))
    assert found == [
        shape for k in range(4) for shape in [(4 << k, 32 >> k, 32 >> k)] * 4
    ]  # fmt: skip
    found.clear()
    network = net(ReActNetPlan(layout="a", width=4, stem="imagenet"), image_shape=(3, 64, 64))
    for unit in units(network):
        unit.register_forward_hook(lambda m, i, y: found.append(tuple(y.shape[1:])))
    network(torch.zeros(1, 3, 64, 64))
    expected = [(8, 32)] + [(16, 16)] * 2 + [(32, 8)] * 2 + [(64, 4)] * 6 + [(128, 2)] * 2
    assert found[1::2] == [(c, s, s) for c, s in expected]  # a block is two units


def test_large_stem():
    stem = net(ReActNetPlan(layout="18", width=4, stem="imagenet"), image_shape=COLOR).stem
    assert stem.conv.kernel_size == (7, 7)
    assert stem(torch.zeros(1, 3, 64, 64)).shape == (1, 4, 16, 16)
    stem = net(ReActNetPlan(layout="a", width=4, stem="imagenet"), image_shape=COLOR).stem
    assert stem(torch.zeros(1, 3, 64, 64)).shape == (1, 4, 32, 32)


def real_parameters(network):
    binary = {id(layer.weight) for layer in binary_layers(network)}
    return sum(p.numel() for p in network.parameters() if id(p) not in binary)


def test_counts_of_the_papers_networks():
    # By hand. 18: 3×3 one-bit convolutions 4·64²·9 + 64·128·9 + 3·128²·9 + …, real 1×1 shortcuts.
    network = net(ReActNetPlan(layout="18"), Batch, COLOR, classes=1000)
    pairs = [(64, 64)] * 4
    for c in (64, 128, 256):
        pairs += [(c, 2 * c)] + [(2 * c, 2 * c)] * 3
    assert sum(w.weight.numel() for w in binary_layers(network)) == sum(9 * i * o for i, o in pairs)
    shifts = sum(i + 3 * o + 2 * o for i, o in pairs)  # threshold, RPReLU, batch norm
    shortcuts = sum(i * o + 2 * o for i, o in pairs if i != o)
    real = 64 * 3 * 9 + 2 * 64 + shifts + shortcuts + 512 * 1000 + 1000
    assert real_parameters(network) == real
    # a: 13 blocks of a 3×3 on C channels and C·D weights of 1×1, either once or in two halves.
    network = net(ReActNetPlan(), Batch, COLOR, classes=1000)
    widths = [32, 64, 128, 128, 256, 256] + [512] * 6 + [1024] * 2
    blocks = list(pairwise(widths))
    expected = sum(9 * i * i + i * o for i, o in blocks)
    assert sum(w.weight.numel() for w in binary_layers(network)) == expected
    shifts = sum((i + 3 * i + 2 * i) + (i + 3 * o + 2 * o) for i, o in blocks)
    real = 32 * 3 * 9 + 2 * 32 + shifts + 1024 * 1000 + 1000
    assert real_parameters(network) == real


def test_first_and_last_layer_are_real():
    for plan in SMALL.values():
        network = net(plan)
        assert not isinstance(network.stem.conv, BinaryConv2d)
        assert isinstance(network.stem.conv, ScaledStdConv2d) == plan.norm_free
        assert type(network.head) is nn.Linear


def test_shortcut_convolutions_are_real_unless_asked():
    def shortcuts(**options):
        network = net(ReActNetPlan(layout="18", width=4, **options))
        return {type(u.shortcut.conv) for u in units(network) if hasattr(u.shortcut, "conv")}

    assert shortcuts() == {nn.Conv2d}
    assert shortcuts(norm_free=True) == {ScaledStdConv2d}
    assert shortcuts(downsample="binary") == shortcuts(downsample="binary", norm_free=True)
    assert shortcuts(downsample="binary") == {BinaryConv2d}


def test_bi_real_net_has_plain_signs_and_sums():
    network = net(SMALL["bireal"], Batch)
    assert not any(isinstance(m, RPReLU) for m in network.modules())
    assert all(m.bias is None for m in network.modules() if isinstance(m, RSign))
    # Something must shift: a normalizer, or else the convolution.
    assert all(layer.bias is None for layer in binary_layers(network))
    assert all(layer.bias is not None for layer in binary_layers(net(SMALL["bireal"])))
    assert all(layer.bias is None for layer in binary_layers(net(SMALL["18"])))


def test_options_reach_the_layers():
    plan = ReActNetPlan(layout="18", width=4, stages=1, sign_zero=0, latent="positive")
    network = net(plan)
    assert {u.sign.zero for u in units(network)} == {0}
    assert {layer.zero for layer in binary_layers(network)} == {0}
    assert all((layer.weight >= 0).all() for layer in binary_layers(network))
    free = net(SMALL["18, free"])
    assert all(layer.gain is not None for layer in binary_layers(free))
    assert all(layer.gain is None for layer in binary_layers(net(SMALL["18"])))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: ReActNetPlan(layout="b"), "layout"),
        (lambda: ReActNetPlan(width=-1), "width"),
        (lambda: ReActNetPlan(stages=6), "stages"),
        (lambda: ReActNetPlan(layout="18", stages=5), "stages"),
        (lambda: ReActNetPlan(stem="large"), "stem"),
        (lambda: ReActNetPlan(bookkeeping="wrong"), "bookkeeping"),
        (lambda: ReActNetPlan(norm_free="yes"), "norm_free"),
        (lambda: BiRealPlan(alpha=0), "alpha"),
        (lambda: BiRealPlan(downsample="none"), "downsample"),
        (lambda: BiRealPlan(blocks=1.5), "blocks"),
    ],
)
def test_bad_options_are_named(make, names):
    with pytest.raises(NetworkError, match=names):
        make()


def test_descriptions_say_what_is_unusual():
    assert ReActNetPlan().describe() == "ReActNet-A, width 32"
    assert BiRealPlan().describe() == "Bi-Real-18, width 64"
    plan = ReActNetPlan(
        layout="18", blocks=1, norm_free=True, bookkeeping="released", downsample="binary",
        sign_zero=0, latent="positive", stem="imagenet",
    )  # fmt: skip
    assert plan.describe() == (
        "ReActNet-18 [1,1,1,1], width 64, norm-free (α=0.2), released bookkeeping, "
        "binary shortcuts, sign(0)=0, positive latent weights, imagenet stem"
    )
