"""The short language in which networks are named: ``resnet20``, ``resnet:depth=8,version=2``.

    spec    = known [depth] [":" options]  |  module ":" callable
    options = name "=" value {"," name "=" value}

The name before the first colon decides: a known network takes options, anything else is imported.
"""

from __future__ import annotations

import dataclasses
import re
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from . import imported
from .cnn import CnnPlan
from .deep_linear import DeepLinearPlan
from .mlp import MlpPlan
from .plan import ImageShape, NetworkError, NormFactory, Plan, check_size
from .reactnet import BiRealPlan, ReActNetPlan
from .resnet import ResNetPlan
from .vgg import VggPlan
from .vit import VitPlan
from .weights import initialize

# Every network that a spec can name: register a new one here, a frozen dataclass that is a `Plan`.
_PLANS: dict[str, type[Any]] = {
    "mlp": MlpPlan,
    "cnn": CnnPlan,
    "vgg": VggPlan,
    "resnet": ResNetPlan,
    "deep_linear": DeepLinearPlan,
    "vit": VitPlan,
    "bireal": BiRealPlan,
    "reactnet": ReActNetPlan,
}


def names() -> list[str]:
    """Names of the known networks.

    Returns:
        The names.

    Example:
        >>> names()
        ['mlp', 'cnn', 'vgg', 'resnet', ...]
    """
    return list(_PLANS)


def build(spec: str, norm: NormFactory, *, classes: int, image_shape: ImageShape) -> nn.Module:
    """Build a network around a normalizer.

    The weights of a known network depend on torch's random state and on nothing else: two
    normalizers under one seed start from equal convolutions and linear layers, and leave the
    random state equal. An imported network draws its own weights; see `align`.

    Args:
        spec: ``"resnet20"``, ``"resnet:depth=8,width=8"``, …, or ``"package.module:callable"``,
            called as ``callable(norm)``, with ``classes=`` and ``image_shape=`` if it takes them.
        norm: ``norm(channels, **options) -> nn.Module``.
        classes: K.
        image_shape: C, H, W.

    Returns:
        The network, on the CPU (or torch's default device), in training mode.

    Raises:
        NetworkError: the spec, a size or the factory is wrong.

    Shape:
        of the network: ``(N, C, H, W) -> (N, K)``

    Example:
        >>> net = build("resnet8", nn.BatchNorm2d, classes=10, image_shape=(1, 28, 28))
        >>> net(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    if not callable(norm):
        raise NetworkError(
            f"norm must be a factory called as norm(channels), received {type(norm).__name__}"
        )
    check_size("build", "classes", classes)
    if len(image_shape) != 3:
        raise NetworkError(f"image_shape must be (channels, height, width), received {image_shape}")
    for axis, size in zip(("channels", "height", "width"), image_shape, strict=True):
        check_size("build", f"image_shape ({axis})", size)
    plan = parse(spec)
    if plan is None:
        return imported.call(spec, norm, classes=classes, image_shape=image_shape)
    seed = int(torch.randint(2**62, (), device="cpu"))
    with torch.random.fork_rng(devices=[]):
        network = plan.assemble(norm, classes=classes, image_shape=image_shape)
    start = getattr(plan, "initialize", initialize)
    start(network, torch.Generator("cpu").manual_seed(seed))
    return network


def describe(spec: str) -> str:
    """Say in a few words what a spec stands for, without building it.

    Args:
        spec: as for `build`. An import path is not imported.

    Returns:
        Text such as ``"VGG-11, width 64"``.

    Raises:
        NetworkError: the spec is wrong.

    Example:
        >>> describe("resnet:depth=8,width=8,version=2")
        'ResNet-8, width 8, pre-activation'
    """
    plan = parse(spec)
    return f"{spec} (imported)" if plan is None else plan.describe()


def parse(spec: str) -> Plan | None:
    """Read a spec.

    Args:
        spec: as for `build`.

    Returns:
        The plan of a known network, None for an import path.

    Raises:
        NetworkError: unknown network, unknown, doubled or malformed option, impossible value.

    Example:
        >>> parse("vgg13:width=16")
        VggPlan(depth=13, width=16, head='linear')
    """
    if not isinstance(spec, str):
        raise NetworkError(f"a network's spec must be a string, received {type(spec).__name__}")
    head, colon, tail = (part.strip() for part in spec.partition(":"))
    match = re.fullmatch(r"([a-zA-Z_]+)([0-9]*)", head)
    name, depth = match.groups() if match else (head, "")
    if name not in _PLANS:
        if not colon or "=" in tail or not tail:
            raise NetworkError(_unknown(head))
        return None
    pairs = ([f"depth={depth}"] if depth else []) + (tail.split(",") if colon else [])
    given = _options(spec, pairs)
    fields = {field.name: field.default for field in dataclasses.fields(_PLANS[name])}
    for option in given:
        if option not in fields:
            raise NetworkError(
                f"{spec!r}: {name} has no option {option!r}; its options are {', '.join(fields)}"
            )
    plan: Plan = _PLANS[name](
        **{option: _value(name, option, text, fields[option]) for option, text in given.items()}
    )
    return plan


def _options(spec: str, pairs: list[str]) -> dict[str, str]:
    """Split ``name=value`` pairs; the values stay text."""
    given: dict[str, str] = {}
    for pair in pairs:
        option, equals, value = (part.strip() for part in pair.partition("="))
        if not (option and equals and value):
            raise NetworkError(f"{spec!r}: an option must read name=value; received {pair!r}")
        if option in given:
            raise NetworkError(
                f"{spec!r}: {option} is given twice ({given[option]} and {value}); keep one"
            )
        given[option] = value
    return given


# float() and int() would also take "1_0", "nan" and digits of other scripts.
_NUMBERS = {int: r"[+-]?[0-9]+", float: r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"}
_BOOLS = {"true": True, "false": False}


def _value(name: str, option: str, text: str, default: object) -> Any:
    """Turn an option's text into the type of its default."""
    if isinstance(default, bool):  # before int, which it is to Python
        if text.lower() not in _BOOLS:
            raise NetworkError(f"{name}: {option} must be true or false; received {text!r}")
        return _BOOLS[text.lower()]
    for kind, pattern in _NUMBERS.items():
        if isinstance(default, kind):
            if not re.fullmatch(pattern, text):
                noun = "whole number" if kind is int else "number"
                raise NetworkError(f"{name}: {option} must be a {noun}; received {text!r}")
            return kind(text)
    return text


def _unknown(head: str) -> str:
    """Message for a name that is neither known nor part of an import path."""
    stem = head.lower().rstrip("0123456789")
    near = get_close_matches(stem, _PLANS, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return (
        f"unknown network {head!r}; {hint}known networks: {', '.join(_PLANS)}; "
        "or an import path package.module:callable"
    )
