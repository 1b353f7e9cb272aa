"""Residual networks of CIFAR type: post-activation (1512.03385) and pre-activation (1603.05027).

One block serves all orders, because every part but the two convolutions may be absent:

    version 1       conv → [norm ReLU] → conv → norm → (+ shortcut) → ReLU
    version 2       [norm ReLU] → conv → [norm ReLU] → conv → (+ shortcut)
    before_weight   [ReLU norm] → conv → [ReLU norm] → conv → (+ shortcut)

A before_weight normalizer (IC layer, 1905.05928) leads to the last order for both versions. In
the last two the shortcut carries the sum as it is, neither normalized nor rectified.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import pad

from .plan import ImageShape, NetworkError, NormFactory, check_choice, check_size
from .units import bare, classifier, conv, goes_before_weight, make, stage


class PadShortcut(nn.Module):
    """Option A of 1512.03385: every second pixel, and zeros for the additional channels.

    Args:
        additional: number of channels to add.

    Shape:
        ``(N, C, H, W) -> (N, C + additional, ⌈H/2⌉, ⌈W/2⌉)``

    Example:
        >>> PadShortcut(3)(torch.ones(1, 2, 5, 5)).sum(dim=(0, 2, 3))
        tensor([9., 9., 0., 0., 0.])
    """

    def __init__(self, additional: int) -> None:
        super().__init__()
        self.additional = additional

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """Subsample and pad."""
        return pad(x_NCHW[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.additional))

    def extra_repr(self) -> str:
        """The channels added."""
        return f"additional={self.additional}"


class Block(nn.Module):
    """Basic residual block of two 3×3 convolutions.

    Args:
        norm: the normalizer's factory.
        inputs: channels C.
        outputs: channels D; where it differs from C, the block halves the maps.
        preactivated: whether normalizer and activation stand before the convolutions.
        shortcut: ``"A"`` or ``"B"``, for blocks that halve the maps.

    Shape:
        ``(N, C, H, W) -> (N, D, H, W)`` or ``(N, D, ⌈H/2⌉, ⌈W/2⌉)``
    """

    def __init__(
        self, norm: NormFactory, inputs: int, outputs: int, *, preactivated: bool, shortcut: str
    ) -> None:
        super().__init__()
        between = stage(norm, outputs)
        stride = 1 if inputs == outputs else 2
        # The sum of a pre-activated block is read by stages like `between` alone (of the next
        # blocks, and the last one), so a bias before the sum is needed only where they lack one.
        reader = between if preactivated else bare(norm, outputs)
        self.before = stage(norm, inputs) if preactivated else nn.Identity()
        self.conv1 = conv(inputs, outputs, followed_by=between, stride=stride)
        self.between = between
        self.conv2 = conv(outputs, outputs, followed_by=reader)
        self.after = nn.Identity() if preactivated else reader
        self.shortcut: nn.Module = nn.Identity()
        if stride == 2 and shortcut == "A":
            self.shortcut = PadShortcut(outputs - inputs)
        elif stride == 2:
            project = conv(inputs, outputs, followed_by=reader, stride=2, kernel=1)
            after = nn.Identity() if preactivated else bare(norm, outputs)
            self.shortcut = nn.Sequential(OrderedDict(conv=project, after=after))
        self.join = nn.Identity() if preactivated else nn.ReLU()

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """Add the branch to the shortcut."""
        branch = self.conv2(self.between(self.conv1(self.before(x_NCHW))))
        joined: torch.Tensor = self.join(self.after(branch) + self.shortcut(x_NCHW))
        return joined


@dataclass(frozen=True, kw_only=True)
class ResNetPlan:
    """Residual network with three groups of n blocks of width w, 2w, 4w.

    Args:
        depth: weight layers, 6n + 2: the first convolution, 2n in each group, the head.
        width: channels w of the first group.
        version: 1 (post-activation) or 2 (pre-activation).
        shortcut: where the maps are halved, ``"A"`` (subsample and pad with zeros, as the paper
            does on CIFAR) or ``"B"`` (1×1 convolution of stride 2).

    Raises:
        NetworkError: a depth that is not 6n + 2, or another option outside its range.

    Example:
        >>> ResNetPlan(depth=8, width=8, version=2).describe()
        'ResNet-8, width 8, pre-activation'
    """

    depth: int = 20
    width: int = 16
    version: int = 1
    shortcut: str = "A"

    def __post_init__(self) -> None:
        check_size("resnet", "depth", self.depth)
        if self.depth < 8 or self.depth % 6 != 2:
            lower = self.depth - (self.depth - 2) % 6
            near = "8" if lower < 8 else f"{lower} and {lower + 6}"
            raise NetworkError(
                f"resnet: depth must be 6n+2 with n ≥ 1; received {self.depth}, nearest: {near}"
            )
        check_size("resnet", "width", self.width)
        check_choice("resnet", "version", self.version, (1, 2))
        check_choice("resnet", "shortcut", self.shortcut, ("A", "B"))

    def describe(self) -> str:
        """Depth, width, order and, where it is not the default, the shortcut."""
        order = "post-activation" if self.version == 1 else "pre-activation"
        shortcut = ", 1×1 shortcuts" if self.shortcut == "B" else ""
        return f"ResNet-{self.depth}, width {self.width}, {order}{shortcut}"

    def assemble(self, norm: NormFactory, *, classes: int, image_shape: ImageShape) -> nn.Module:
        """Build the network: ``stem first blocks last pool flatten head``.

        Args:
            norm: the normalizer's factory.
            classes: K.
            image_shape: C, H, W.

        Returns:
            The network, with torch's initial weights.

        Shape:
            ``(N, C, H, W) -> (N, K)``
        """
        preactivated = self.version == 2 or goes_before_weight(make(norm, self.width))
        widths = [self.width << group for group in range(3) for _ in range((self.depth - 2) // 6)]
        blocks = nn.Sequential()
        for inputs, outputs in zip([self.width, *widths], widths, strict=False):
            blocks.append(
                Block(norm, inputs, outputs, preactivated=preactivated, shortcut=self.shortcut)
            )
        # Without `first`, the stem's output is read by stages like the one of the first block.
        first = stage(norm, self.width)
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            stem=conv(image_shape[0], self.width, followed_by=first),
            first=nn.Identity() if preactivated else first,
            blocks=blocks,
            last=stage(norm, widths[-1]) if preactivated else nn.Identity(),
        )
        return nn.Sequential(layers | classifier(widths[-1], classes))
