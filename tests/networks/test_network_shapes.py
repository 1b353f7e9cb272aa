"""Sizes, published parameter counts, gradients and initial weights."""

import itertools
import math

import pytest
import torch
from network_fakes import FAKES, Batch, Ic
from torch import nn

from normlab.networks import align, build, weight_layers

SPECS = [
    "mlp:width=16",
    "cnn:depth=5,width=4",
    "vgg11:width=4",
    "resnet8:width=4",
    "resnet8:width=4,version=2",
    "resnet8:width=4,shortcut=B",
    "resnet8:width=4,version=2,shortcut=B",
    "resnet11:width=4,shortcut=3x3",
    "resnet11:width=4,version=2,branch=scaled",
    "vgg11:width=4,head=vgg",
]
GRAY, COLOR = (1, 28, 28), (3, 32, 32)


def net(spec, norm, image_shape=GRAY, seed=0):
    torch.manual_seed(seed)
    return build(spec, norm, classes=7, image_shape=image_shape)


def weights(network):
    return {name: layer.weight for name, layer in weight_layers(network)}


@pytest.mark.parametrize("image_shape", [GRAY, COLOR, (2, 9, 5)])
@pytest.mark.parametrize("kind", FAKES)
@pytest.mark.parametrize("spec", SPECS)
def test_logits_have_one_row_per_image(spec, kind, image_shape):
    assert net(spec, FAKES[kind], image_shape)(torch.randn(2, *image_shape)).shape == (2, 7)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", [kind for kind in FAKES if kind != "greedy"])
def test_every_parameter_gets_a_gradient(spec, kind):
    network = net(spec, FAKES[kind])
    network(torch.randn(4, *GRAY)).square().sum().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None]
    assert without == []
    assert all(p.grad.isfinite().all() for p in network.parameters())
    assert all(layer.weight.grad.abs().max() > 0 for _, layer in weight_layers(network))


def test_a_batch_of_one_works_before_weight():
    # IC stands on the maps before the pooling, where one image still has many members.
    for spec in ("resnet8:width=4", "cnn:width=4"):
        assert net(spec, Ic)(torch.randn(1, *GRAY)).isfinite().all()


@pytest.mark.parametrize("depth", [8, 14, 20])
def test_resnet_has_depth_minus_one_convolutions(depth):
    for version in (1, 2):
        network = net(f"resnet:depth={depth},width=2,version={version}", Batch)
        convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
        assert len(convolutions) == depth - 1


@pytest.mark.parametrize(("depth", "convolutions"), [(11, 8), (13, 10), (16, 13), (19, 16)])
def test_vgg_has_the_convolutions_of_the_paper(depth, convolutions):
    network = net(f"vgg{depth}:width=2", Batch, COLOR)
    found = [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(found) == convolutions
    assert sorted(set(found)) == [2, 4, 8, 16]
    assert sum(isinstance(m, nn.MaxPool2d) for m in network.modules()) == 5


def test_cnn_halves_the_maps_at_each_doubling():
    convolutions = [m for m in net("cnn:depth=8", Batch).modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [16] * 3 + [32] * 3 + [64] * 2
    assert [m.stride[0] for m in convolutions] == [1, 1, 1, 2, 1, 1, 2, 1]


def test_mlp_has_the_asked_sizes():
    sizes = [tuple(weight.shape) for weight in weights(net("mlp", Batch)).values()]
    assert sizes == [(256, 784), (256, 256), (256, 256), (7, 256)]


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)
def test_resnet_sizes_of_table_6(depth, millions):
    # Table 6 of 1512.03385, 10 classes, shortcut A; the paper's digits decide the rounding.
    found = size(f"resnet{depth}", nn.BatchNorm2d) / 1e6
    assert round(found, 1 if depth == 110 else 2) == millions


def size(spec, norm):
    network = build(spec, norm, classes=10, image_shape=COLOR)
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("options", ["version=1", "version=2", "version=2,shortcut=B"])
def test_size_of_resnet_164(options):
    # 1.7M in Table 4 of 1603.05027.
    assert round(size(f"resnet164:{options}", nn.BatchNorm2d) / 1e6, 1) == 1.7


def test_size_of_vgg_a_on_cifar():
    # Convolutions with biases, and linear layers 512 → 512 → 512 → 10, counted by hand.
    widths = [3, 64, 128, 256, 256, 512, 512, 512, 512]
    convolutions = sum((9 * c + 1) * d for c, d in itertools.pairwise(widths))
    assert size("vgg11:head=vgg", nn.Identity) == convolutions + 2 * 512 * 513 + 10 * 513


def test_pad_shortcut_keeps_every_second_pixel():
    block = net("resnet8:width=4", nn.Identity).blocks[1]
    x = torch.randn(2, 4, 7, 6)
    short = block.shortcut(x)
    assert short.shape == (2, 8, 4, 3)
    assert torch.equal(short[:, :4], x[:, :, ::2, ::2])
    assert short[:, 4:].abs().max() == 0


@pytest.mark.parametrize("spec", SPECS)
def test_all_normalizers_start_from_the_same_weights(spec):
    # The names are equal as well, and in the same order.
    reference = weights(net(spec, Batch))
    states = set()
    for norm in FAKES.values():
        found = weights(net(spec, norm))
        states.add(int(torch.randint(2**62, ())))
        assert list(found) == list(reference)
        assert all(torch.equal(found[name], reference[name]) for name in reference)
    assert len(states) == 1


@pytest.mark.parametrize("spec", SPECS)
def test_the_seed_decides_the_weights(spec):
    first, again, other = (net(spec, Batch, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_initial_weights_have_the_declared_spread():
    network = net("vgg11:width=32", nn.Identity)
    conv, head = network.conv3, network.head  # 64 → 128 channels: fan in ≠ fan out
    expected = math.sqrt(2 / (conv.out_channels * 9))
    # 73728 draws: the relative standard error of the spread is 1/√(2·73728) ≈ 0.003.
    assert conv.weight.std().item() == pytest.approx(expected, rel=0.01)
    assert conv.bias.abs().max() == 0
    bound = 1 / math.sqrt(head.in_features)
    assert 0.95 * bound < head.weight.abs().max() <= bound
    assert 0 < head.bias.abs().max() <= bound


def test_weights_inside_a_normalizer_are_left_to_it():
    network = net("cnn:width=4", FAKES["greedy"])
    assert not any("norm" in name for name, _ in weight_layers(network))
    assert network.unit1.norm.mix.bias.abs().max() > 0


def test_align_copies_what_fits():
    model, reference = net("cnn:width=4", FAKES["fused"], seed=1), net("cnn:width=4", Batch)
    nn.init.constant_(reference.unit1.norm.weight, 3.0)
    own = model.unit1.norm.threshold.clone()
    copied = align(model, reference)
    assert copied == [name for name, _ in model.named_parameters() if "threshold" not in name]
    ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    assert all(torch.equal(ours[name], theirs[name]) for name in copied)
    assert torch.equal(model.unit1.norm.threshold, own)
    nn.init.zeros_(reference.head.bias)  # a copy, not a shared tensor
    assert model.head.bias.abs().max() > 0


def test_align_can_spare_the_normalizers_and_skips_other_shapes():
    model, reference = net("cnn:width=4", Batch, seed=1), net("cnn:width=4", Batch, COLOR)
    nn.init.constant_(reference.unit1.norm.weight, 3.0)
    copied = align(model, reference, weights_only=True)
    assert copied == [*(f"conv{i}.weight" for i in range(2, 7)), "head.weight", "head.bias"]
    assert model.unit1.norm.weight.max() == 1
