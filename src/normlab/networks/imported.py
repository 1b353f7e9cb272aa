"""Networks from elsewhere: ``package.module:callable``."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .plan import ImageShape, NetworkError, NormFactory


def locate(path: str) -> Callable[..., Any]:
    """Import what an import path names.

    Args:
        path: ``package.module:callable``; the part after the colon may contain dots.

    Returns:
        The callable.

    Raises:
        NetworkError: the module cannot be imported, has no such attribute, or it is not callable.

    Example:
        >>> locate("torch.nn:Linear").__name__
        'Linear'
    """
    module_name, _, attribute = path.strip().partition(":")
    if not all(part.isidentifier() for part in f"{module_name}.{attribute}".split(".")):
        raise NetworkError(f"an import path must read package.module:callable; received {path!r}")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # a module may raise anything while it is imported
        raise NetworkError(
            f"network {path!r}: module {module_name!r} cannot be imported "
            f"({type(error).__name__}: {error}); its folder must be on PYTHONPATH"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            owner = getattr(found, "__name__", type(found).__name__)
            raise NetworkError(f"network {path!r}: {owner!r} has no attribute {part!r}")
        found = getattr(found, part)
    if not callable(found):
        raise NetworkError(
            f"network {path!r} must name something callable, received {type(found).__name__}"
        )
    return found  # type: ignore[no-any-return]


def call(path: str, norm: NormFactory, *, classes: int, image_shape: ImageShape) -> nn.Module:
    """Build an imported network, with the keywords ``classes`` and ``image_shape`` if it has them.

    Args:
        path: see `locate`.
        norm: the normalizer's factory, passed as the first argument.
        classes: K.
        image_shape: C, H, W.

    Returns:
        The network, with the weights that the callable gave it.

    Raises:
        NetworkError: the callable does not take a norm, or returns no module. What it raises
            itself is passed on.
    """
    function = locate(path)
    accepted = {"classes": classes, "image_shape": image_shape}
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # some built-in callables have none
        accepted = {}
    else:
        parameters = signature.parameters.values()
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            named = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}
            accepted = {name: value for name, value in accepted.items() if name in named}
        try:
            signature.bind(norm, **accepted)
        except TypeError as error:
            raise NetworkError(
                f"network {path!r} must be callable as f(norm), optionally with classes= and "
                f"image_shape=; its signature is {signature} ({error})"
            ) from error
    network = function(norm, **accepted)
    if not isinstance(network, nn.Module):
        raise NetworkError(
            f"network {path!r} must return an nn.Module, received {type(network).__name__}"
        )
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in network.parameters()):
        with torch.no_grad():  # lazy layers take their shapes from a first input
            network.eval()(torch.zeros(2, *image_shape))
        network.train()
    return network


def source_digest(spec: str) -> str:
    """Digest of the source file of an imported network, so that edited code is another network.

    Args:
        spec: A network's spec.

    Returns:
        16 hexadecimal digits; empty for a built-in network.

    Raises:
        NetworkError: If the import path leads nowhere.
    """
    from .spec import parse

    if parse(spec) is not None:
        return ""
    target = inspect.unwrap(locate(spec))
    try:
        path = inspect.getsourcefile(target if inspect.isroutine(target) else type(target))
        content = Path(path).read_bytes() if path else spec.encode()
    except (OSError, TypeError):  # built in C, or typed at a prompt
        content = spec.encode()
    return hashlib.sha256(content).hexdigest()[:16]
