"""The language of specs: what it accepts, and what its errors say."""

import dataclasses

import pytest
import torch
from network_fakes import Batch
from torch import nn

from normlab.networks import (
    CnnPlan,
    DeepLinearPlan,
    MlpPlan,
    NetworkError,
    ResNetPlan,
    VggPlan,
    build,
    describe,
    names,
    parse,
)
from normlab.networks import spec as spec_module


@pytest.mark.parametrize(
    ("spec", "plan"),
    [
        ("mlp", MlpPlan(depth=3, width=256)),
        ("mlp2", MlpPlan(depth=2)),
        ("cnn:depth=10", CnnPlan(depth=10, width=16)),
        ("vgg", VggPlan(depth=11, width=64)),
        ("vgg11:head=vgg", VggPlan(head="vgg")),
        ("cnn:stages=4,growth=1,halve=last", CnnPlan(stages=4, growth=1, halve="last")),
        ("deep_linear", DeepLinearPlan(depth=25, width=10)),
        ("deep_linear3:width=4", DeepLinearPlan(depth=3, width=4)),
        ("resnet164", ResNetPlan(depth=164)),
        ("resnet38:block=bottleneck", ResNetPlan(depth=38, block="bottleneck")),
        (
            "resnet:version=2,branch=scaled,alpha=.1",
            ResNetPlan(version=2, branch="scaled", alpha=0.1),
        ),
        (
            "resnet:version=2,branch=scaled,alpha=1",
            ResNetPlan(version=2, branch="scaled", alpha=1.0),
        ),
        ("vgg13: width=8", VggPlan(depth=13, width=8)),
        ("resnet20", ResNetPlan(depth=20, width=16, version=1, shortcut="A")),
        (" resnet : depth = 8 , shortcut = B ", ResNetPlan(depth=8, shortcut="B")),
        ("resnet:depth=8,width=8,version=2", ResNetPlan(depth=8, width=8, version=2)),
        ("resnet14:shortcut=B", ResNetPlan(depth=14, shortcut="B")),
    ],
)
def test_specs_that_are_understood(spec, plan):
    assert parse(spec) == plan


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("mlp1", "MLP, 1 hidden layer, width 256"),
        ("cnn", "plain CNN, 6 convolutions, width 16"),
        ("vgg16", "VGG-16, width 64"),
        ("resnet:depth=8,width=8,version=2", "ResNet-8, width 8, pre-activation"),
        ("resnet20:shortcut=B", "ResNet-20, width 16, post-activation, 1×1 shortcuts"),
        ("resnet56:width=32,shortcut=3x3", "ResNet-56, width 32, post-activation, 3×3 shortcuts"),
        ("resnet164:version=2", "ResNet-164, width 16, pre-activation, bottlenecks"),
        ("resnet1001", "ResNet-1001, width 16, post-activation, bottlenecks"),
        ("resnet110", "ResNet-110, width 16, post-activation"),
        ("resnet38", "ResNet-38, width 16, post-activation"),
        ("resnet38:block=bottleneck", "ResNet-38, width 16, post-activation, bottlenecks"),
        ("resnet164:block=basic", "ResNet-164, width 16, post-activation"),
        ("resnet:branch=skipinit", "ResNet-20, width 16, post-activation, SkipInit"),
        (
            "resnet:version=2,branch=scaled",
            "ResNet-20, width 16, pre-activation, branches scaled by 0.2",
        ),
        ("vgg11:head=vgg", "VGG-11, width 64, three linear layers"),
        ("deep_linear", "deep linear network, 25 layers, width 10"),
        ("cnn:width=64,stages=4", "plain CNN, 6 convolutions, width 64 to 512, 4 stages"),
        ("cnn:width=64,stages=1", "plain CNN, 6 convolutions, width 64 throughout, 1 stage"),
        ("cnn:growth=1", "plain CNN, 6 convolutions, width 16 throughout, 3 stages"),
        (
            "cnn:halve=last",
            "plain CNN, 6 convolutions, width 16 to 64, 3 stages, the last of each strided",
        ),
        ("my.nets:make", "my.nets:make (imported)"),
    ],
)
def test_descriptions(spec, text):
    assert describe(spec) == text


def test_every_name_builds_with_its_defaults():
    known = ["mlp", "cnn", "vgg", "resnet", "deep_linear"]
    assert names()[: len(known)] == known
    for name in known:
        network = build(name, Batch, classes=2, image_shape=(1, 8, 8))
        assert network(torch.randn(2, 1, 8, 8)).shape == (2, 2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnt20", r"unknown network 'resnt20'; did you mean resnet\?"),
        ("VGG11", r"did you mean vgg\?"),
        ("resnett:depth=8", r"did you mean resnet or reactnet\?"),
        ("transformer", r"unknown network 'transformer'; known networks: mlp, cnn, vgg, resnet"),
        ("", "unknown network ''"),
        ("resnet:depht=8", "no option 'depht'; its options are depth, width, version, shortcut"),
        ("mlp:version=2", "mlp has no option 'version'; its options are depth, width"),
        ("resnet20:depth=8", r"depth is given twice \(20 and 8\)"),
        ("resnet:", "must read name=value; received ''"),
        ("resnet:8", "must read name=value; received '8'"),
        ("resnet:depth=", "must read name=value"),
        ("resnet:depth=8,", "must read name=value; received ''"),
        ("resnet:depth=eight", "depth must be a whole number; received 'eight'"),
        ("resnet:depth=8.0", "depth must be a whole number; received '8.0'"),
        ("cnn:width=1_6", "width must be a whole number; received '1_6'"),
        ("cnn:width=__import__('os')", "width must be a whole number"),
        ("cnn:width=0", "width must be a whole number, at least 1; received 0"),
        ("mlp:depth=-1", "depth must be a whole number, at least 1; received -1"),
        ("resnet21", r"6n\+2 or, with bottlenecks, 9n\+2 with n ≥ 1; .* 21, nearest: 20 and 26$"),
        ("resnet1", r"nearest: 8$"),
        ("resnet21:block=basic", r"must be 6n\+2 with n ≥ 1; received 21, nearest: 20 and 26$"),
        ("resnet8:block=bottleneck", r"must be 9n\+2 with n ≥ 1; received 8, nearest: 11$"),
        ("resnet20:block=wide", "block must be one of auto, basic, bottleneck; received 'wide'"),
        ("resnet20:branch=half", "branch must be one of plain, skipinit, scaled; received 'half'"),
        ("resnet20:branch=scaled", r"received version=1, add version=2$"),
        ("resnet20:alpha=0.1", "alpha belongs to branch=scaled; received alpha=0.1"),
        ("resnet20:version=2,branch=scaled,alpha=0", "alpha must be positive"),
        ("resnet20:version=2,branch=scaled,alpha=nan", "alpha must be a number; received 'nan'"),
        ("resnet20:version=2,branch=scaled,alpha=1_0", "alpha must be a number; received '1_0'"),
        ("cnn:growth=3", "growth must be one of 1, 2; received 3"),
        ("cnn:halve=middle", "halve must be one of first, last; received 'middle'"),
        ("cnn:stages=0", "stages must be a whole number, at least 1; received 0"),
        ("vgg11:head=wide", "head must be one of linear, vgg; received 'wide'"),
        ("deep_linear0", "deep_linear: depth must be a whole number, at least 1; received 0"),
        ("deep_liner", r"did you mean deep_linear\?"),
        ("resnet2", r"6n\+2 .* nearest: 8$"),
        ("resnet7", r"6n\+2 .* nearest: 8$"),
        ("resnet9", r"6n\+2 .* nearest: 8 and 11$"),
        ("resnet8:version=3", "version must be one of 1, 2; received 3"),
        ("resnet8:shortcut=C", "shortcut must be one of A, B, 3x3; received 'C'"),
        ("vgg12", "depth must be one of 11, 13, 16, 19; received 12"),
        (20, "must be a string, received int"),
    ],
)
def test_specs_that_are_refused(spec, message):
    with pytest.raises(NetworkError, match=message):
        describe(spec)


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """A plan as a colleague would register it."""

    wide: bool = False
    rate: float = 0.5

    def assemble(self, norm, *, classes, image_shape):
        return nn.Linear(image_shape[0], classes)

    def describe(self):
        return f"{self.wide} {self.rate}"

    def initialize(self, network, generator):
        network.weight.data.fill_(self.rate)


def test_registered_plans_say_how_options_are_read_and_weights_start(monkeypatch):
    monkeypatch.setitem(spec_module._PLANS, "other_net", Elsewhere)
    assert describe("other_net:wide=True,rate=1e-3") == "True 0.001"
    assert describe("other_net:wide=false") == "False 0.5"
    with pytest.raises(NetworkError, match="wide must be true or false; received '1'"):
        parse("other_net:wide=1")
    network = build("other_net:rate=2", Batch, classes=2, image_shape=(3, 1, 1))
    assert torch.equal(network.weight, torch.full((2, 3), 2.0))


def test_plans_refuse_wrong_types():
    with pytest.raises(NetworkError, match="received '3'"):
        MlpPlan(depth="3")
    with pytest.raises(NetworkError, match="received True"):
        CnnPlan(depth=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 0}, "classes must be a whole number, at least 1"),
        ({"image_shape": (28, 28)}, r"image_shape must be \(channels, height, width\)"),
        ({"image_shape": (1, 28, 0)}, r"image_shape \(width\) must be"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(NetworkError, match=message):
        build("mlp", Batch, **({"classes": 3, "image_shape": (1, 4, 4)} | change))


MODULE = """
from torch import nn

def plain(norm):
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm(4))

def sized(norm, *, classes, image_shape):
    return nn.Linear(image_shape[1], classes)

def classes_only(norm, classes=2):
    return nn.Linear(1, classes)

def anything(norm, **options):
    return nn.Linear(len(options), options["classes"])

def nothing(norm): ...

def needy(norm, depth): ...

def failing(norm):
    raise RuntimeError("from inside")

class Holder:
    build = staticmethod(plain)

number = 3
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "network_elsewhere.py").write_text(MODULE)
    (tmp_path / "network_broken.py").write_text("import not_installed_anywhere")
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda path: build(path, Batch, classes=5, image_shape=(1, 6, 6))
    monkeypatch.delitem(__import__("sys").modules, "network_elsewhere", raising=False)


def test_imported_networks_get_what_they_accept(elsewhere):
    assert isinstance(elsewhere("network_elsewhere:plain")[1], Batch)
    assert isinstance(elsewhere("network_elsewhere:Holder.build")[1], Batch)
    assert elsewhere("network_elsewhere:sized").weight.shape == (5, 6)
    assert elsewhere("network_elsewhere:classes_only").weight.shape == (5, 1)
    assert elsewhere("network_elsewhere:anything").weight.shape == (5, 2)
    assert isinstance(elsewhere("torch.nn:Identity"), nn.Identity)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("network_missing:f", "module 'network_missing' cannot be imported.*PYTHONPATH"),
        ("network_broken:f", "'network_broken' cannot be imported.*not_installed_anywhere"),
        ("network_elsewhere:f", "'network_elsewhere' has no attribute 'f'"),
        ("network_elsewhere:Holder.f", "'Holder' has no attribute 'f'"),
        ("network_elsewhere:number", "must name something callable, received int"),
        ("network_elsewhere:nothing", "must return an nn.Module, received NoneType"),
        ("network_elsewhere:needy", r"signature is \(norm, depth\)"),
        ("net/work.py:f", "must read package.module:callable"),
        ("network_elsewhere:f:g", "must read package.module:callable"),
        ("network_elsewhere", "unknown network"),
        ("network_elsewhere:", "unknown network"),
    ],
)
def test_import_paths_that_are_refused(elsewhere, path, message):
    with pytest.raises(NetworkError, match=message):
        elsewhere(path)


def test_errors_of_an_imported_network_pass_unchanged(elsewhere):
    with pytest.raises(RuntimeError, match=r"^from inside$"):
        elsewhere("network_elsewhere:failing")
