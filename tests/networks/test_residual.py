"""Scaled and learned branches, bottlenecks, shortcuts."""

import math

import pytest
import torch
from network_fakes import FAKES, Batch, Fused, IcConvRelu, order
from torch import nn

from normlab.networks import ResNetPlan, build, weight_layers
from normlab.networks.residual import PadShortcut
from normlab.networks.scaling import Scale, SkipInit, expected_variances

IMAGE = (3, 12, 12)


def net(spec, norm=nn.Identity, image_shape=IMAGE, seed=0):
    torch.manual_seed(seed)
    return build(spec, norm, classes=5, image_shape=image_shape)


def branch_of(block, x):
    for name in block.branch:
        x = getattr(block, name)(x)
    return x


def test_expected_variances_by_hand():
    # 1, then + α² a block; the third block is a transition, which starts at 1 and counts itself.
    found = list(expected_variances([False, False, True, False, False], 0.5))
    assert found == [1.0, 1.25, 1.5, 1.25, 1.5]
    # NF-ResNets begin with a transition: nothing but the first block's own growth is left.
    assert list(expected_variances([True, False], 0.5)) == [1.0, 1.25]


@pytest.mark.parametrize("shortcut", ["A", "B", "3x3"])
@pytest.mark.parametrize("kind", ["none", "batch", "before"])
def test_scaled_blocks_follow_the_formula(kind, shortcut):
    spec = f"resnet14:width=4,version=2,branch=scaled,alpha=0.5,shortcut={shortcut}"
    network = net(spec, FAKES[kind]).eval()
    # Two blocks a group, α² = 1/4: the third and the fifth block are transitions.
    variances = [1, 1.25, 1.5, 1.25, 1.5, 1.25]
    x = torch.randn(2, 4, 8, 8)
    for i, (block, variance) in enumerate(zip(network.blocks, variances, strict=True)):
        shrunk = x / math.sqrt(variance)
        short = block.shortcut(shrunk) if i in (2, 4) else x
        expected = short + 0.5 * branch_of(block, shrunk)
        out = block(x)
        # The same operations but one: x·v^(−1/2) in place of x/√v.
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        x = out


def test_variance_of_scaled_branches_is_the_expected_one():
    # Kaiming's weights keep second moments through ReLU, and projections keep them as well.
    expected = list(expected_variances([False] * 4 + [True, False], 0.5))
    found = torch.zeros(6)
    for seed in range(4):
        text = "resnet26:width=32,version=2,branch=scaled,shortcut=B,alpha=0.5"
        network = net(text, seed=seed)
        inputs = []
        for block in network.blocks:
            block.register_forward_pre_hook(lambda _, args, to=inputs: to.append(args[0]))
        with torch.no_grad():
            network.blocks(torch.randn(4, 32, 32, 32))
        found += torch.tensor([x.square().mean().item() for x in inputs[:6]]) / 4
    # Zero padding takes 1/24 of the taps of each of two convolutions, so up to 4% of the sums, and
    # chance about 2%. Without β the fourth and fifth would be 1.95 and 2.44, not 1.75 and 2.
    torch.testing.assert_close(found[:5], torch.tensor(expected[:5]), rtol=0.1, atol=0)
    # The transition starts again. Its strided convolution doubles the channels and so halves its
    # variance under Kaiming's fan out: between 1 and 1 + α².
    assert 1 < found[5] < expected[5]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", FAKES)
def test_skipinit_blocks_begin_as_their_shortcut(kind, version):
    network = net(f"resnet8:width=4,version={version},branch=skipinit", FAKES[kind])
    x = torch.randn(2, 4, 6, 6)
    positive = x.relu() if isinstance(network.blocks[0].join, nn.ReLU) else x
    assert torch.equal(network.blocks[0](x), positive)
    network(torch.randn(4, *IMAGE)).square().sum().backward()
    alphas = [p for name, p in network.named_parameters() if name.endswith("scale.alpha")]
    assert len(alphas) == 3
    assert all(alpha.shape == () and alpha == 0 and alpha.grad != 0 for alpha in alphas)
    # At α = 0 nothing else on a branch has a gradient, but all of it is in the graph.
    assert all(layer.weight.grad is not None for _, layer in weight_layers(network))


def test_skipinit_is_the_plain_branch_at_one():
    plain, skip = net("resnet8:width=4"), net("resnet8:width=4,branch=skipinit")
    for block in skip.blocks:
        nn.init.ones_(block.scale.alpha)
    x = torch.randn(2, *IMAGE)
    assert torch.equal(plain(x), skip(x))


@pytest.mark.parametrize("branch", ["skipinit", "scaled"])
@pytest.mark.parametrize("kind", FAKES)
def test_branches_do_not_change_weights(branch, kind):
    reference = net("resnet8:width=4,version=2", Batch)
    found = net(f"resnet8:width=4,version=2,branch={branch}", FAKES[kind])
    pairs = zip(weight_layers(reference), weight_layers(found), strict=True)
    assert all(a == b and torch.equal(x.weight, y.weight) for (a, x), (b, y) in pairs)


def test_plain_networks_have_no_scales():
    kinds = {type(module) for module in net("resnet8:width=4").modules()}
    assert not kinds & {Scale, SkipInit}


def test_bottleneck_shapes():
    plan = ResNetPlan(depth=20, width=4, block="bottleneck")
    assert plan.shapes() == [
        (4, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)
    ]  # fmt: skip
    block = net("resnet20:width=4,block=bottleneck").blocks[2]
    convolutions = [block.conv1, block.conv2, block.conv3]
    shapes = [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0]) for c in convolutions]
    assert shapes == [(16, 8, 1, 2), (8, 8, 3, 1), (8, 32, 1, 1)]


def test_bottlenecks_have_depth_minus_one_convolutions():
    network = net("resnet29:width=2", Batch)
    assert sum(isinstance(m, nn.Conv2d) for m in network.modules()) == 28


def test_padding_adds_channels_alone_at_stride_one():
    x = torch.randn(2, 3, 5, 4)
    out = PadShortcut(2, stride=1)(x)
    assert torch.equal(out[:, :3], x)
    assert out[:, 3:].abs().max() == 0


@pytest.mark.parametrize(("shortcut", "kernel"), [("B", 1), ("3x3", 3)])
def test_projections(shortcut, kernel):
    network = net(f"resnet8:width=4,shortcut={shortcut}", Batch)
    assert isinstance(network.blocks[0].shortcut, nn.Identity)
    project = network.blocks[1].shortcut.conv
    assert project.kernel_size == (kernel, kernel)
    assert project.stride == (2, 2)
    assert project.bias is None
    assert order(network.blocks[1].shortcut, 4, 6, 6) == "conv norm"


def test_a_fused_layer_in_a_composition_needs_no_relu():
    class Both(IcConvRelu):
        activation = "tlu"

    network = net("resnet8:width=4", Both)
    assert not any(isinstance(layer, nn.ReLU) for layer in network.modules())
    assert network(torch.randn(2, *IMAGE)).shape == (2, 5)


def test_fused_layers_keep_their_activation_on_skipinit_branches():
    expected = "conv fused " + "conv fused conv bare relu " * 3 + "mean linear"
    assert order(net("resnet8:width=4,branch=skipinit", Fused), *IMAGE) == expected
