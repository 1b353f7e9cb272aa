"""Binary residual networks: Bi-Real Net (1808.00278) and ReActNet (2003.03488), with or without BN.

Every one-bit convolution has a shortcut of its own. One unit serves all networks:

    h′ = RPReLU(s + α·norm(conv(sign(β·h))))        s = h, or where maps are halved
                                                    s = shortcut(pool(β·h))

    batch norm       norm = batch norm, α = β = 1
    naive            norm = nothing,    α = β = 1
    norm_free        norm = nothing,    α = 0.2, β = 1/√(expected variance of h), and standardized
                     weights with gains: BNN − BN = ? (2104.08215), after NF-ResNets (2101.08692)

First convolution and classifier keep real weights. Averages of a halving unit's shortcut and the
PReLU change the variance as well; the papers' bookkeeping leaves that out, and so does this one.
It expects too much: of a centered Gaussian sum, a PReLU of slope 1/4 leaves 17/32 of the second
moment; the variance of a one-bit branch is 2/π where latent weights are normal; and the first
convolution, with weights of mean 0, hardly sees what neighboring pixels share. Norm-free networks
therefore begin with small features, which gains, slopes and classifier have to outgrow.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from . import scaling
from .binary import LATENTS
from .one_bit import Style, Unit
from .plan import ImageShape, NetworkError, NormFactory, check_choice, check_size
from .units import classifier

__all__ = ["BiRealPlan", "ReActNetPlan", "Unit", "expected_variances"]

ALPHA = 0.2
STEMS = ("cifar", "imagenet")
BOOKKEEPINGS = ("exact", "released")
_BLOCKS = {"18": (4, 4, 4, 4), "a": (1, 2, 2, 6, 2)}
_WIDTHS = {"18": 64, "a": 32}


def expected_variances(
    layout: str, stages: Sequence[int], alpha: float = ALPHA, bookkeeping: str = "exact"
) -> list[float]:
    """The variance that the input of each unit is expected to have, in their order.

    The first convolution gives 1. A unit adds α², since its branch has variance 1. A unit that
    halves the maps takes its shortcut from the input divided by its deviation, so it starts again
    from 1 and leaves 1 + α².

    Args:
        layout: ``"18"``, one unit a block, the first of each stage but the first halving; ``"a"``,
            two units a block, the first unit of each stage but the first halving.
        stages: Blocks of each stage.
        alpha: α.
        bookkeeping: ``"exact"``, or ``"released"`` as in the paper's code. There, with ``"18"``,
            the first block of a stage adds nothing; with ``"a"``, the return to 1 comes one unit
            late and forgets the first of the two α².

    Returns:
        One variance a unit; β is 1/√ of it.

    Example:
        >>> [round(v, 2) for v in expected_variances("18", (2, 3))]
        [1.0, 1.04, 1.08, 1.04, 1.08]
        >>> [round(v, 2) for v in expected_variances("18", (2, 3), bookkeeping="released")]
        [1.0, 1.0, 1.04, 1.0, 1.04]
    """
    units = 2 if layout == "a" else 1
    places = [
        (stage, unit) for stage, blocks in enumerate(stages) for unit in range(blocks * units)
    ]
    if bookkeeping == "exact":
        return list(scaling.expected_variances([s > 0 and u == 0 for s, u in places], alpha))
    found, variance = [], 1.0
    for stage, unit in places:
        found.append(variance)
        # In "a" the second unit of a transition is followed by the reset, the first is not.
        resets = stage > 0 and unit == 1 if layout == "a" else unit == 0
        variance = 1.0 if resets else variance + alpha**2
    return found


def _network(
    plan: BiRealPlan | ReActNetPlan, style: Style, layout: str, classes: int, images: int
) -> nn.Module:
    """Stem, units, head."""
    width = plan.width or _WIDTHS[layout]
    counts = _counts(layout, plan.stages, plan.blocks)
    variances = [1.0] * sum(counts) * 2
    if style.norm_free:
        variances = expected_variances(layout, counts, style.alpha, plan.bookkeeping)
    units, channels = nn.Sequential(), width
    left = iter(variances)
    for stage, blocks in enumerate(counts):
        outputs = width << (stage + (layout == "a"))
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            if layout == "18":
                units.append(Unit(style, channels, outputs, 3, stride=stride, variance=next(left)))
            else:
                units.append(Unit(style, channels, channels, 3, stride=stride, variance=next(left)))
                split = channels != outputs
                units.append(Unit(style, channels, outputs, 1, split=split, variance=next(left)))
            channels = outputs
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=_stem(style, layout, plan.stem, images, width),
        units=units,
        last=style.norms(channels, channels)[0],
    )
    return nn.Sequential(layers | classifier(channels, classes))


def _counts(layout: str, stages: int, blocks: int) -> list[int]:
    """Blocks of each stage; 0 stands for the paper's numbers."""
    paper = _BLOCKS[layout]
    return [min(blocks or n, n) for n in paper[: stages or len(paper)]]


def _stem(style: Style, layout: str, kind: str, images: int, width: int) -> nn.Sequential:
    """First convolution, with real weights: 3×3, or for large images as the papers have it."""
    large = kind == "imagenet"
    kernel = 7 if large and layout == "18" else 3
    # No normalizer before it: the input is an image, standardized already.
    after = style.norms(width, width)[1]
    conv = style.conv(images, width, kernel, 2 if large else 1, after, binary=False)
    stem = nn.Sequential(OrderedDict(conv=conv, after=after))
    if large and layout == "18":
        stem.add_module("pool", nn.MaxPool2d(3, 2, padding=1))
    return stem


def _check(owner: str, plan: BiRealPlan | ReActNetPlan, layout: str) -> None:
    """Refuse options outside their range."""
    for option, most in (("width", None), ("stages", len(_BLOCKS[layout])), ("blocks", None)):
        value = getattr(plan, option)
        check_size(owner, option, value, minimum=0)
        if most is not None and value > most:
            raise NetworkError(f"{owner}: {option} must be at most {most}; received {value}")
    check_choice(owner, "stem", plan.stem, STEMS)
    check_choice(owner, "norm_free", plan.norm_free, (False, True))
    check_choice(owner, "bookkeeping", plan.bookkeeping, BOOKKEEPINGS)
    check_choice(owner, "downsample", plan.downsample, ("real", "binary"))
    check_choice(owner, "sign_zero", plan.sign_zero, (1, 0))
    check_choice(owner, "latent", plan.latent, LATENTS)
    alpha = plan.alpha
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise NetworkError(f"{owner}: alpha must be a positive number; received {alpha!r}")


def _style(plan: BiRealPlan | ReActNetPlan, norm: NormFactory, shifts: bool) -> Style:
    """What a plan's units share."""
    return Style(
        norm=norm,
        norm_free=bool(plan.norm_free),
        alpha=float(plan.alpha) if plan.norm_free else 1.0,
        shifts=shifts,
        downsample=plan.downsample,
        zero=plan.sign_zero,
        latent=plan.latent,
    )


def _words(name: str, plan: BiRealPlan | ReActNetPlan, layout: str) -> str:
    """Name, size, and what is not the default."""
    counts = _counts(layout, plan.stages, plan.blocks)
    size = "" if tuple(counts) == _BLOCKS[layout] else f" [{','.join(map(str, counts))}]"
    words = [f"{name}{size}", f"width {plan.width or _WIDTHS[layout]}"]
    words += [f"norm-free (α={plan.alpha:g})"] if plan.norm_free else []
    words += ["released bookkeeping"] if plan.bookkeeping == "released" else []
    words += ["binary shortcuts"] if plan.downsample == "binary" else []
    words += ["sign(0)=0"] if plan.sign_zero == 0 else []
    words += ["positive latent weights"] if plan.latent == "positive" else []
    return ", ".join(words + ([f"{plan.stem} stem"] if plan.stem != "cifar" else []))


@dataclass(frozen=True, kw_only=True)
class BiRealPlan:
    """Bi-Real Net: four stages of four 3×3 one-bit convolutions, each with its shortcut.

    Signs have no threshold and sums no activation; otherwise as `ReActNetPlan` with layout 18.
    Where no normalizer shifts, convolutions have a bias.

    Args:
        width: Channels of the first stage, doubled by each other; 0 for the paper's 64.
        stages: The first so many stages; 0 for all four.
        blocks: At most so many convolutions a stage; 0 for all four.
        stem: ``"cifar"``, 3×3; ``"imagenet"``, 7×7 of stride 2 and max pooling, which the released
            CIFAR code of 2104.08215 has as well, by oversight.
        norm_free: Whether weights are standardized and units scaled by α and β. Build it with a
            normalizer that does nothing.
        alpha: α.
        bookkeeping: ``"exact"`` or ``"released"``, see `expected_variances`.
        downsample: ``"real"``, or ``"binary"`` as in the code of 2104.08215: the 1×1 convolutions
            of shortcuts.
        sign_zero: sign(0), 1 or, as in released code, 0.
        latent: ``"kaiming"`` or ``"positive"``, see `BinaryConv2d`.

    Raises:
        NetworkError: An option is outside its range.

    Example:
        >>> BiRealPlan(width=8, stages=2, norm_free=True).describe()
        'Bi-Real-18 [4,4], width 8, norm-free (α=0.2)'
    """

    width: int = 64
    stages: int = 0
    blocks: int = 0
    stem: str = "cifar"
    norm_free: bool = False
    alpha: float = ALPHA
    bookkeeping: str = "exact"
    downsample: str = "real"
    sign_zero: int = 1
    latent: str = "kaiming"

    def __post_init__(self) -> None:
        _check("bireal", self, "18")

    def describe(self) -> str:
        """Size, and options that are not the default."""
        return _words("Bi-Real-18", self, "18")

    def assemble(self, norm: NormFactory, *, classes: int, image_shape: ImageShape) -> nn.Module:
        """Build the network: ``stem units last pool flatten head``.

        Args:
            norm: The normalizer's factory.
            classes: K.
            image_shape: C, H, W.

        Returns:
            The network, with torch's initial weights.

        Shape:
            ``(N, C, H, W) -> (N, K)``
        """
        return _network(self, _style(self, norm, False), "18", classes, image_shape[0])


@dataclass(frozen=True, kw_only=True)
class ReActNetPlan:
    """ReActNet: thresholds before signs, RPReLU after sums.

    Args:
        layout: ``"a"``, MobileNet's: blocks of a 3×3 and a 1×1 one-bit convolution with channels
            w | 2w | 4w ×2 | 8w ×2 | 16w ×6 | 32w ×2, doubled by two parallel 1×1 convolutions on
            the same input. ``"18"``, Bi-Real Net's: four stages of four 3×3.
        width: Channels w after the stem; 0 for the paper's: 32 (a), 64 (18).
        stages: The first so many stages; 0 for all five (a) or four (18).
        blocks: At most so many blocks a stage; 0 for the paper's.
        stem: ``"cifar"``, 3×3; ``"imagenet"``, 3×3 of stride 2 (a), or 7×7 of stride 2 and max
            pooling (18), which the released CIFAR code of 2104.08215 has as well, by oversight.
        norm_free: As for `BiRealPlan`, and so on.
        alpha: α.
        bookkeeping: ``"exact"`` or ``"released"``.
        downsample: ``"real"`` or ``"binary"``; layout 18 alone has such convolutions.
        sign_zero: sign(0), 1 or 0.
        latent: ``"kaiming"`` or ``"positive"``.

    Raises:
        NetworkError: An option is outside its range.

    Example:
        >>> import torch
        >>> plan = ReActNetPlan(layout="18", width=8, stages=2, blocks=1)
        >>> plan.describe()
        'ReActNet-18 [1,1], width 8'
        >>> net = plan.assemble(nn.BatchNorm2d, classes=10, image_shape=(1, 28, 28))
        >>> net(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    layout: str = "a"
    width: int = 0
    stages: int = 0
    blocks: int = 0
    stem: str = "cifar"
    norm_free: bool = False
    alpha: float = ALPHA
    bookkeeping: str = "exact"
    downsample: str = "real"
    sign_zero: int = 1
    latent: str = "kaiming"

    def __post_init__(self) -> None:
        # layout=18 may be given as a number.
        object.__setattr__(self, "layout", str(self.layout))
        check_choice("reactnet", "layout", self.layout, tuple(_BLOCKS))
        _check("reactnet", self, self.layout)

    def describe(self) -> str:
        """Layout, size, and options that are not the default."""
        return _words(f"ReActNet-{self.layout.upper()}", self, self.layout)

    def assemble(self, norm: NormFactory, *, classes: int, image_shape: ImageShape) -> nn.Module:
        """Build the network: ``stem units last pool flatten head``.

        Args:
            norm: The normalizer's factory.
            classes: K.
            image_shape: C, H, W.

        Returns:
            The network, with torch's initial weights.

        Shape:
            ``(N, C, H, W) -> (N, K)``
        """
        return _network(self, _style(self, norm, True), self.layout, classes, image_shape[0])
