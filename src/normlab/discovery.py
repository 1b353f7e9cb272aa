"""Finds the cards: every module of a site package that has a ``CARD``."""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache
from typing import Any

from torch import nn

from normlab.core.card import Card, Catalogue, Site

_SITES: dict[Site, str] = {
    "activation": "normlab.activations",
    "weight": "normlab.weights",
    "gradient": "normlab.gradients",
}


@lru_cache(maxsize=1)
def _cards() -> tuple[Card, ...]:
    """All cards, by year and name."""
    found = []
    for package in _SITES.values():
        parent = importlib.import_module(package)
        for info in pkgutil.iter_modules(parent.__path__):
            module = importlib.import_module(f"{package}.{info.name}")
            if hasattr(module, "CARD"):
                found.append(module.CARD)
    return tuple(sorted(found, key=lambda card: (card.year, card.name)))


def catalogue(site: Site | None = None) -> Catalogue:
    """Return the cards by name, the oldest method first.

    Args:
        site: ``"activation"``, ``"weight"`` or ``"gradient"``; None for all.

    Returns:
        An ordered mapping from name to card.

    Raises:
        ValueError: If the site is unknown.

    Example:
        >>> catalogue()["batch"].year
        2015
        >>> catalogue()["bacth"]
        Traceback (most recent call last):
        ...
        normlab.core.card.UnknownNameError: no method is called 'bacth'. Did you mean batch, ...
    """
    if site not in (None, "activation", "weight", "gradient"):
        raise ValueError(f"site is 'activation', 'weight' or 'gradient'; received {site!r}")
    return Catalogue({c.name: c for c in _cards() if site in (None, c.site)})


def norm(name: str, channels: int, **options: Any) -> nn.Module:
    """Build an activation layer by name.

    Args:
        name: Name in the catalogue.
        channels: Number of channels C.
        **options: Options of the method, e.g. ``groups=8``; ``channel_dim=-1`` for (…, C).

    Returns:
        The layer.

    Raises:
        KeyError: If no method has that name; near ones are suggested.
        TypeError: If an option is unknown; near ones are suggested.

    Example:
        >>> norm("group", 64, groups=8)
        GroupNorm(64, n (g c) * -> (n g) (c *), groups=8, eps=1e-05)
    """
    layer: nn.Module = catalogue("activation")[name].make(channels, **options)
    return layer


def layer_class(name: str) -> type[Any] | None:
    """Return the class of that name among the cards' layers."""
    return next((c.layer for c in _cards() if c.layer.__name__ == name), None)


def layer_names() -> list[str]:
    """Names of all layer classes."""
    return [card.layer.__name__ for card in _cards()]
