"""The language of specs: what it accepts, and what its errors say."""

import pytest
import torch
from network_fakes import Batch
from torch import nn

from normlab.networks import (
    CnnPlan,
    MlpPlan,
    NetworkError,
    ResNetPlan,
    VggPlan,
    build,
    describe,
    names,
    parse,
)


@pytest.mark.parametrize(
    ("spec", "plan"),
    [
        ("mlp", MlpPlan(depth=3, width=256)),
        ("mlp2", MlpPlan(depth=2)),
        ("cnn:depth=10", CnnPlan(depth=10, width=16)),
        ("vgg", VggPlan(depth=11, width=64)),
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
        ("my.nets:make", "my.nets:make (imported)"),
    ],
)
def test_descriptions(spec, text):
    assert describe(spec) == text


def test_every_name_builds_with_its_defaults():
    assert names() == ["mlp", "cnn", "vgg", "resnet"]
    for name in names():
        network = build(name, Batch, classes=2, image_shape=(1, 8, 8))
        assert network(torch.randn(2, 1, 8, 8)).shape == (2, 2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnt20", r"unknown network 'resnt20'; did you mean resnet\?"),
        ("VGG11", r"did you mean vgg\?"),
        ("resnett:depth=8", r"did you mean resnet\?"),
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
        ("resnet21", r"6n\+2 with n ≥ 1; received 21, nearest: 20 and 26$"),
        ("resnet2", r"6n\+2 .* nearest: 8$"),
        ("resnet7", r"6n\+2 .* nearest: 8$"),
        ("resnet9", r"6n\+2 .* nearest: 8 and 14$"),
        ("resnet8:version=3", "version must be one of 1, 2; received 3"),
        ("resnet8:shortcut=C", "shortcut must be one of A, B; received 'C'"),
        ("vgg12", "depth must be one of 11, 13, 16, 19; received 12"),
        (20, "must be a string, received int"),
    ],
)
def test_specs_that_are_refused(spec, message):
    with pytest.raises(NetworkError, match=message):
        describe(spec)


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
