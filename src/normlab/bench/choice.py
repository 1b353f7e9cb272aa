"""Normalizers as the command line names them: ``group``, ``group:groups=4``, ``lp_batch:p=max``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn


class ChoiceError(ValueError):
    """A normalizer's spec that cannot be read."""


@dataclass(frozen=True)
class Choice:
    """One arm of a comparison.

    Attributes:
        label: The spec as given; names the arm everywhere.
        name: Name in the catalogue.
        options: Options given.
    """

    label: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def factory(self, forward_passes: int | None = None) -> Callable[..., nn.Module]:
        """Return ``norm(channels, **options)``.

        Args:
            forward_passes: Training passes that a run will make. Methods whose schedules were
                written for much longer runs shrink them to it, where no option says otherwise.

        Returns:
            The factory.
        """
        from normlab.discovery import catalogue

        card = catalogue("activation")[self.name]
        adapted = card.for_steps(forward_passes) if card.for_steps and forward_passes else {}
        options = {**adapted, **self.options}
        return lambda channels, **more: card.make(channels, **{**options, **more})

    def adapted(self, forward_passes: int) -> dict[str, str]:
        """Return, as text, the options that `factory` adds for a run of that length."""
        from normlab.discovery import catalogue

        card = catalogue("activation")[self.name]
        added = card.for_steps(forward_passes) if card.for_steps else {}
        return {k: str(v) for k, v in added.items() if k not in self.options}


def _value(text: str) -> Any:
    """Read a value: a number, a truth value, none, or a word."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse(spec: str) -> Choice:
    """Read ``name`` or ``name:option=value,option=value``, and check it against the card.

    Args:
        spec: The text.

    Returns:
        The choice.

    Raises:
        ChoiceError: If the text, the name or an option is wrong; near names are suggested.

    Example:
        >>> parse("group:groups=4").options
        {'groups': 4}
        >>> parse("grop")
        Traceback (most recent call last):
        ...
        normlab.bench.choice.ChoiceError: no method is called 'grop'. Did you mean group, ...
    """
    from normlab.discovery import catalogue

    name, _, tail = spec.strip().partition(":")
    options: dict[str, Any] = {}
    for pair in filter(None, tail.split(",")):
        option, equals, value = (part.strip() for part in pair.partition("="))
        if not (option and equals and value) or option in options:
            raise ChoiceError(
                f"normalizer {spec!r}: options read name=value, each once; received {pair!r}"
            )
        options[option] = _value(value)
    try:
        card = catalogue("activation")[name]
        unknown = [option for option in options if option not in card.options]
        if unknown:
            card.make(8, **{unknown[0]: None})  # raises, with suggestions
    except (KeyError, TypeError) as error:
        raise ChoiceError(str(error)) from error
    return Choice(spec.strip(), name, options)
