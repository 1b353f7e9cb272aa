"""What is measured: shapes, and for each method the layers to be timed on them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import normlab as nl
from normlab.activations._areas import default_groups
from normlab.core.card import Card

DIMS = {
    "A": (64, 64, 32, 32),
    "B": (128, 256, 14, 14),
    "C": (32, 64, 112, 112),
    "D": (8, 1024, 768),
}
SHORT = {"A": (4, 16, 6, 6), "B": (4, 32, 3, 3), "C": (2, 16, 9, 9), "D": (2, 5, 16)}
ON_D = ("layer", "rms", "dyt")  # the methods of transformers
Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Place:
    """A kind of input; cells of one place share their tensors.

    Attributes:
        shape: Letter of the shape.
        dims: (N, C, H, W), or (N, L, C) for D.
        dtype: Name of the dtype, of the parameters too.
        layout: ``"nchw"``, ``"channels_last"``, or ``"nlc"`` for D.
    """

    shape: str
    dims: tuple[int, ...]
    dtype: str
    layout: str

    @property
    def channel_dim(self) -> int:
        return -1 if self.layout == "nlc" else 1

    @property
    def channels(self) -> int:
        return self.dims[self.channel_dim]

    def tensor(self) -> Tensor:
        """Random values; a mean beside 0, as activations have."""
        x = torch.randn(self.dims).add_(0.5).to(getattr(torch, self.dtype))
        last = self.layout == "channels_last"
        return x.contiguous(memory_format=torch.channels_last) if last else x


@dataclass(frozen=True)
class Cell:
    """A method at a place, with its variants: normlab first, then those it is held against."""

    method: str
    place: Place
    variants: dict[str, Build]

    def __str__(self) -> str:
        return f"{self.method} {self.place.shape} {self.place.dtype} {self.place.layout}"


class Permuted(nn.Module):
    """A layer for (…, C), on (N, C, H, W): how torch normalizes over channels at each position."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x.permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)


def native(card: Card, place: Place) -> Build | None:
    """Return torch's own layer for the same job, or None where torch has none."""
    c, last = place.channels, place.channel_dim == -1
    own: dict[str, Build] = {
        "none": nn.Identity,
        "layer": (lambda: nn.LayerNorm(c)) if last else (lambda: nn.GroupNorm(1, c)),
        # Over the sample, torch's weight has one element for each of the sample's.
        "rms": lambda: nn.RMSNorm(c if last else place.dims[1:]),
        "group": lambda: nn.GroupNorm(default_groups(c), c),
        "position": lambda: Permuted(nn.LayerNorm(c)),
        "ic": lambda: nn.Sequential(nn.BatchNorm2d(c), nn.Dropout(card.options["dropout"])),
    }
    if card.name in own:
        return own[card.name]
    twin = card.twin
    return None if twin is None or last else lambda: twin(c, len(place.dims) - 2)


def ours(card: Card, place: Place) -> Build:
    """Return the builder of normlab's layer with its default options."""
    return lambda: card.make(place.channels, channel_dim=place.channel_dim)


def compiled(build: Build) -> Build:
    """Return the builder of a layer's compiled form."""

    def made() -> nn.Module:
        torch.compiler.reset()  # else the recompilation limit of `forward` ends the list early
        layer = build()
        layer.compile(dynamic=False)
        return layer

    return made


def places(options: argparse.Namespace) -> list[Place]:
    """All places that the options ask for."""
    dims = SHORT if options.short else DIMS
    return [
        Place(shape, dims[shape], dtype, layout)
        for shape in options.shapes
        for dtype in options.dtypes
        for layout in (("nlc",) if shape == "D" else options.layouts)
    ]


def cells(options: argparse.Namespace, place: Place) -> list[Cell]:
    """The cells of one place, in the catalogue's order."""
    found = []
    for name, card in nl.catalogue("activation").items():
        if options.methods is not None and name not in options.methods:
            continue
        if place.shape == "D" and name not in ON_D:
            continue
        variants = {"normlab": ours(card, place)}
        torch_own = None if options.no_native else native(card, place)
        if torch_own is not None:
            variants["native"] = torch_own
        if name in (options.compile or ()) and place.shape in options.compile_shapes:
            variants["compile"] = compiled(ours(card, place))
        found.append(Cell(name, place, variants))
    return found
