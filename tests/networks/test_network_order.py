"""Where the normalizer stands, and which weight layers have a bias."""

import pytest
import torch
from network_fakes import FAKES, Batch, ConvReluIc, Fused, Ic, IcConvRelu, order
from torch import nn

import normlab as nl
from normlab.networks import NetworkError, build, weight_layers
from normlab.networks.units import placement

IMAGE = (1, 12, 12)


def net(spec, norm):
    return build(spec, norm, classes=3, image_shape=IMAGE)


ORDERS = [
    ("mlp:depth=2,width=8", Batch, "linear norm relu linear norm relu linear"),
    ("mlp:depth=2,width=8", Fused, "linear fused linear fused linear"),
    ("mlp:depth=2,width=8", Ic, "linear relu ic linear relu ic linear"),
    ("cnn:depth=2,width=4", Batch, "conv norm relu conv norm relu mean linear"),
    ("cnn:depth=2,width=4", Fused, "conv fused conv fused mean linear"),
    ("cnn:depth=2,width=4", Ic, "conv relu ic conv relu ic mean linear"),
    ("cnn:depth=2,width=4", nn.Identity, "conv relu conv relu mean linear"),
    ("deep_linear:depth=3", Batch, "linear norm linear norm linear"),
    ("deep_linear:depth=3", Fused, "linear bare linear bare linear"),
    ("deep_linear:depth=3", Ic, "linear ic linear ic linear"),
]


@pytest.mark.parametrize(("spec", "norm", "expected"), ORDERS)
def test_order_in_plain_networks(spec, norm, expected):
    assert order(net(spec, norm), *IMAGE) == expected


def test_order_around_pooling():
    # 12 → 6 → 3 → 1: three poolings, and none in the groups that see 1×1 maps.
    pooled, single = "conv norm relu max ", "conv norm relu "
    expected = pooled * 2 + single + pooled + single * 4 + "mean linear"
    assert order(net("vgg11:width=2", Batch), *IMAGE) == expected
    before = order(net("vgg11:width=2", Ic), *IMAGE)
    assert before.startswith("conv relu max ic conv relu max ic conv relu ic conv relu max ic conv")
    assert before.endswith("conv relu ic mean linear")


@pytest.mark.parametrize("spec", ["mlp:width=8", "cnn:width=4", "vgg11:width=2", "vgg:head=vgg"])
@pytest.mark.parametrize("rotated", [IcConvRelu, ConvReluIc])
def test_compositions_are_one_network_without_shortcuts(spec, rotated):
    assert order(net(spec, rotated), *IMAGE) == order(net(spec, Ic), *IMAGE)


def test_linear_layers_of_vgg_are_normalized():
    head = "mean linear norm relu linear norm relu linear"
    assert order(net("vgg11:width=2,head=vgg", Batch), *IMAGE).endswith(head)
    head = "ic mean linear relu ic linear relu ic linear"
    assert order(net("vgg11:width=2,head=vgg", Ic), *IMAGE).endswith(head)


def test_order_in_resnet_version_1():
    blocks = "conv norm relu conv norm relu " * 3
    assert order(net("resnet8:width=2", Batch), *IMAGE) == f"conv norm relu {blocks}mean linear"


def test_branch_of_version_1_ends_without_activation_of_its_own():
    blocks = "conv fused conv bare relu " * 3
    assert order(net("resnet8:width=2", Fused), *IMAGE) == f"conv fused {blocks}mean linear"


def test_projection_of_version_1_is_normalized_without_activation():
    plain, halving = "conv fused conv bare relu ", "conv fused conv bare conv bare relu "
    expected = f"conv fused {plain}{halving}{halving}mean linear"
    assert order(net("resnet8:width=2,shortcut=B", Fused), *IMAGE) == expected


def test_order_in_resnet_version_2():
    batch = "conv " + "norm relu conv norm relu conv " * 3 + "norm relu mean linear"
    assert order(net("resnet8:width=2,version=2", Batch), *IMAGE) == batch
    fused = "conv " + "fused conv fused conv " * 3 + "fused mean linear"
    assert order(net("resnet8:width=2,version=2", Fused), *IMAGE) == fused


@pytest.mark.parametrize("version", [1, 2])
def test_before_weight_gives_one_residual_order_for_both_versions(version):
    expected = "conv " + "relu ic conv relu ic conv " * 3 + "relu ic mean linear"
    assert order(net(f"resnet8:width=2,version={version}", Ic), *IMAGE) == expected


COMPOSITIONS = {
    # stem, one branch, head: each branch begins after the shortcut and ends before the sum.
    Ic: ("conv", "relu ic conv", "relu ic mean linear"),
    IcConvRelu: ("conv relu", "ic conv relu", "ic mean linear"),
    ConvReluIc: ("conv relu ic", "conv relu ic", "mean linear"),
}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("norm", COMPOSITIONS)
def test_compositions_around_a_sum(norm, version):
    stem, unit, head = COMPOSITIONS[norm]
    for depth, times in ((8, 2), (11, 3)):  # 6n+2 basic, 9n+2 bottleneck
        network = net(f"resnet{depth}:width=2,version={version}", norm)
        assert order(network, *IMAGE) == " ".join([stem, *[unit] * 3 * times, head])
        for block in network.blocks:
            assert order(block, block.conv1.in_channels, 6, 6) == " ".join([unit] * times)


@pytest.mark.parametrize("norm", COMPOSITIONS)
def test_projections_of_compositions_are_bare_convolutions(norm):
    block = net("resnet8:width=2,shortcut=B", norm).blocks[1]
    assert order(block.shortcut, 2, 6, 6) == "conv"


def test_compositions_of_the_layer_itself():
    compositions = ("relu-ic-conv", "ic-conv-relu", "conv-relu-ic")
    for composition, fake in zip(compositions, COMPOSITIONS, strict=True):
        real = nl.norm("ic", 2, composition=composition)
        assert placement(real) == placement(fake(2))


def test_order_in_bottlenecks():
    unit = "norm relu conv "
    assert order(net("resnet11:width=2,version=2", Batch), *IMAGE) == (
        f"conv {unit * 9}norm relu mean linear"
    )
    branch = "conv norm relu conv norm relu conv norm relu "
    assert (
        order(net("resnet11:width=2", Batch), *IMAGE) == f"conv norm relu {branch * 3}mean linear"
    )


@pytest.mark.parametrize(
    ("version", "norm"),
    [(2, Batch), (2, nn.Identity), (1, Ic), (2, Ic), (1, IcConvRelu), (1, ConvReluIc)],
)
def test_shortcut_carries_the_unrectified_sum(version, norm):
    network = net(f"resnet8:width=4,version={version}", norm).eval()
    block = network.blocks[0]
    nn.init.zeros_(block.conv2.weight)  # leaves the shortcut alone
    if block.conv2.bias is not None:
        nn.init.zeros_(block.conv2.bias)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(block(x.clone()), x)


def test_output_of_a_version_1_block_is_rectified():
    network = net("resnet8:width=4", nn.Identity)
    assert network.blocks[0](torch.randn(2, 4, 6, 6)).min() == 0


def biases(network):
    return {name: layer.bias is not None for name, layer in weight_layers(network)}


SPECS = [
    "mlp:depth=2,width=8",
    "cnn:width=4",
    "vgg11:width=2",
    "resnet8:width=2",
    "resnet8:width=2,shortcut=B",
    "resnet8:width=2,version=2",
    "resnet8:width=2,version=2,shortcut=B",
    "resnet11:width=2,shortcut=3x3",
    "vgg11:width=2,head=vgg",
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", FAKES)
def test_weight_layers_have_a_bias_unless_the_normalizer_shifts(spec, kind):
    shifts = kind in ("batch", "fused", "greedy")
    found = biases(net(spec, FAKES[kind]))
    assert found.pop("head")
    assert set(found.values()) == {not shifts}


def test_a_layer_that_is_both_before_weight_and_activation_needs_no_relu():
    class Both(Ic):
        activation = "tlu"

    network = net("cnn:depth=2,width=4", Both)
    assert not any(isinstance(layer, nn.ReLU) for layer in network.modules())
    assert biases(network) == {"conv1": True, "conv2": True, "head": True}


def test_bare_needs_a_factory_that_can_leave_the_activation_out():
    with pytest.raises(NetworkError, match="does not accept activation=None"):
        net("resnet8", lambda channels: Fused(channels))
    with pytest.raises(NetworkError, match="must have no activation"):
        net("resnet8", lambda channels, activation="tlu": Fused(channels))


def test_wrong_factories_are_named():
    with pytest.raises(NetworkError, match=r"must return an nn\.Module, received int"):
        net("mlp", lambda channels: channels)
    with pytest.raises(NetworkError, match=r"must be a factory.*received str"):
        net("mlp", "group")

    class Odd(Batch):
        placement = "above"

    with pytest.raises(NetworkError, match=r"Odd\.placement.*'above'"):
        net("mlp", Odd)
