"""Residual networks of CIFAR type: post-activation (1512.03385) and pre-activation (1603.05027).

A before_weight normalizer (IC layer, 1905.05928) leads to its own wiring for both versions; see
`residual` for all of them. The stem ends like a branch, and the head begins like one.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from torch import nn

from .plan import ImageShape, NetworkError, NormFactory, check_choice, check_size
from .residual import Block, after_branch, before_branch, wiring
from .scaling import Scale, SkipInit, expected_variances
from .units import classifier, conv, stage

# Weight layers of one block of each group: the depth is this times n, and 2.
_PERIODS = {"basic": 6, "bottleneck": 9}
_SHORTCUTS = {"A": "", "B": ", 1×1 shortcuts", "3x3": ", 3×3 shortcuts"}


@dataclass(frozen=True, kw_only=True)
class ResNetPlan:
    """Residual network with three groups of n blocks of width w, 2w, 4w.

    Args:
        depth: weight layers: the first convolution, 2n in each group (6n + 2 in all) or, with
            bottlenecks, 3n (9n + 2), and the head.
        width: channels w of the first group. With bottlenecks, that of their inner convolutions;
            the groups are then 4w, 8w, 16w wide.
        version: 1 (post-activation) or 2 (pre-activation).
        shortcut: where a block changes the shape, ``"A"`` (subsample and pad with zeros, as the
            paper does on CIFAR), ``"B"`` (1×1 convolution) or ``"3x3"`` (3×3 convolution, as in
            2106.05956).
        block: ``"basic"``, ``"bottleneck"``, or ``"auto"``: the one that fits the depth; where both
            do, basic up to 110 and bottleneck beyond, as the papers have it (110, 164).
        branch: ``"plain"``, h + f(h); ``"skipinit"``, h + α·f(h) with a learned scalar α, at first
            0 (2002.10444); or ``"scaled"``, h + α·f(h/√v) with the expected variance v of h
            (2101.08692). v grows by α² a block and starts again at 1 where the shape changes; it
            is that of version 2 with weights that keep variance and a projection shortcut.
        alpha: α of scaled branches.

    Raises:
        NetworkError: a depth that is not 6n + 2 (9n + 2), another option outside its range, scaled
            branches in version 1, or an α for branches that are not scaled.

    Example:
        >>> ResNetPlan(depth=8, width=8, version=2).describe()
        'ResNet-8, width 8, pre-activation'
        >>> ResNetPlan(depth=164, version=2).describe()
        'ResNet-164, width 16, pre-activation, bottlenecks'
    """

    depth: int = 20
    width: int = 16
    version: int = 1
    shortcut: str = "A"
    block: str = "auto"
    branch: str = "plain"
    alpha: float = 0.2

    def __post_init__(self) -> None:
        check_size("resnet", "depth", self.depth)
        check_choice("resnet", "block", self.block, ("auto", *_PERIODS))
        self._check_depth()
        check_size("resnet", "width", self.width)
        check_choice("resnet", "version", self.version, (1, 2))
        check_choice("resnet", "shortcut", self.shortcut, tuple(_SHORTCUTS))
        check_choice("resnet", "branch", self.branch, ("plain", "skipinit", "scaled"))
        if self.branch == "scaled" and self.version == 1:
            raise NetworkError(
                "resnet: branch=scaled counts the variance of sums that no ReLU has cut; received "
                "version=1, add version=2"
            )
        if not 0 < self.alpha < math.inf:
            raise NetworkError(f"resnet: alpha must be positive and finite; received {self.alpha}")
        if self.branch != "scaled" and self.alpha != ResNetPlan.alpha:
            raise NetworkError(
                f"resnet: alpha belongs to branch=scaled; received alpha={self.alpha} with "
                f"branch={self.branch}"
            )

    def _check_depth(self) -> None:
        """Refuse a depth of which no network of the wanted blocks is made."""
        periods = [p for name, p in _PERIODS.items() if self.block in ("auto", name)]
        if any(self.depth > p and self.depth % p == 2 for p in periods):
            return
        rule = " or, with bottlenecks, ".join(f"{p}n+2" for p in periods)
        below = [self.depth - (self.depth - 2) % p for p in periods]
        above = min(max(low, 2) + p for low, p in zip(below, periods, strict=True))
        lower = max((low for low, p in zip(below, periods, strict=True) if low > p), default=0)
        near = f"{lower} and {above}" if lower else f"{above}"
        raise NetworkError(
            f"resnet: depth must be {rule} with n ≥ 1; received {self.depth}, nearest: {near}"
        )

    @property
    def bottleneck(self) -> bool:
        """Whether blocks are bottlenecks."""
        if self.block != "auto":
            return self.block == "bottleneck"
        # Both fit 20, 38, 56, …, 110, 128, …, 164: published are 110 as basic, 164 as bottleneck.
        return self.depth % 9 == 2 and (self.depth > 110 or self.depth % 6 != 2)

    def describe(self) -> str:
        """Depth, width, order and whatever is not the default."""
        order = "post-activation" if self.version == 1 else "pre-activation"
        blocks = ", bottlenecks" if self.bottleneck else ""
        branch = {
            "plain": "",
            "skipinit": ", SkipInit",
            "scaled": f", branches scaled by {self.alpha:g}",
        }[self.branch]
        return (
            f"ResNet-{self.depth}, width {self.width}, {order}"
            f"{blocks}{_SHORTCUTS[self.shortcut]}{branch}"
        )

    def shapes(self) -> list[tuple[int, int, int]]:
        """Channels in, channels out and stride of each block.

        Example:
            >>> ResNetPlan(depth=14).shapes()[:3]
            [(16, 16, 1), (16, 16, 1), (16, 32, 2)]
        """
        n = self.depth // _PERIODS["bottleneck" if self.bottleneck else "basic"]
        outputs = [
            (4 if self.bottleneck else 1) * self.width << group
            for group in range(3)
            for _ in range(n)
        ]
        inputs = [self.width, *outputs[:-1]]
        return [
            (before, after, 2 if i and i % n == 0 else 1)
            for i, (before, after) in enumerate(zip(inputs, outputs, strict=True))
        ]

    def _block(
        self, norm: NormFactory, wired: str, shape: tuple[int, int, int], variance: float
    ) -> Block:
        """One block, given the expected variance of its input."""
        inputs, outputs, stride = shape
        scaled = self.branch == "scaled"
        scale = Scale(self.alpha) if scaled else SkipInit() if self.branch == "skipinit" else None
        return Block(
            norm,
            inputs,
            outputs,
            stride=stride,
            wired=wired,
            shortcut=self.shortcut,
            bottleneck=self.bottleneck,
            scale=scale,
            beta=variance**-0.5 if scaled else 1.0,
        )

    def assemble(self, norm: NormFactory, *, classes: int, image_shape: ImageShape) -> nn.Module:
        """Build the network ``stem first blocks last pool flatten head``; see `Plan`."""
        wired = wiring(norm, self.width, version=self.version)
        shapes = self.shapes()
        changes = [inputs != outputs or stride != 1 for inputs, outputs, stride in shapes]
        blocks = nn.Sequential(
            *(
                self._block(norm, wired, shape, variance)
                for shape, variance in zip(
                    shapes, expected_variances(changes, self.alpha), strict=True
                )
            )
        )
        # Without layers of its own, the stem's output is read by stages like this one.
        reader = stage(norm, self.width)
        width = shapes[-1][1]
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            stem=conv(image_shape[0], self.width, followed_by=reader),
            first=reader if wired == "post" else after_branch(norm, self.width, wired),
            blocks=blocks,
            last=before_branch(norm, width, wired),
        )
        return nn.Sequential(layers | classifier(width, classes))
