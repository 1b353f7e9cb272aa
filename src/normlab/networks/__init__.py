"""Networks to put normalizers into: every one takes a factory ``norm(channels) -> nn.Module``.

A spec names the network (``"resnet20"``, ``"cnn:depth=10,width=8"``, ``"my.module:callable"``),
`units` decides where the normalizer stands, and `weights` gives all arms the same start.
"""

from .cnn import CnnPlan
from .imported import source_digest
from .mlp import MlpPlan
from .plan import ImageShape, NetworkError, NormFactory, Plan
from .resnet import ResNetPlan
from .spec import build, describe, names, parse
from .vgg import VggPlan
from .weights import align, weight_layers

__all__ = [
    "CnnPlan",
    "ImageShape",
    "MlpPlan",
    "NetworkError",
    "NormFactory",
    "Plan",
    "ResNetPlan",
    "VggPlan",
    "align",
    "build",
    "describe",
    "names",
    "parse",
    "source_digest",
    "weight_layers",
]
