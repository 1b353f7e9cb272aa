"""Residual blocks: the order of layers on a branch, and what stands on the shortcut.

A branch is a chain of two or three convolutions. Its wiring is what stands before the first,
between two, and after the last of them, and so decides what the shortcut carries:

    wiring          before      between     after       sum     from
    post            –           norm ReLU   norm        ReLU    version 1, 1512.03385
    pre             norm ReLU   norm ReLU   –           –       version 2, 1603.05027
    relu-ic-conv    ReLU norm   ReLU norm   –           –       IC layers, 1905.05928
    ic-conv-relu    norm        ReLU norm   ReLU        –       IC layers
    conv-relu-ic    –           ReLU norm   ReLU norm   –       IC layers

The three compositions of IC layers are rotations of one cycle. They differ in what is added to
the shortcut: the output of a convolution, of a ReLU, or of a normalizer.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn
from torch.nn.functional import pad

from .plan import NormFactory
from .scaling import Scale
from .units import act, bare, conv, make, placement, stage


def wiring(norm: NormFactory, channels: int, *, version: int) -> str:
    """Choose the wiring for a normalizer.

    Args:
        norm: the factory.
        channels: any number of channels, to build one layer and look at its placement.
        version: of the residual network; a normalizer that stands before weights overrides it.

    Returns:
        One of the wirings in the module's table.

    Example:
        >>> wiring(nn.BatchNorm2d, 8, version=2)
        'pre'
    """
    where = placement(make(norm, channels))
    if where == "after_weight":
        return "post" if version == 1 else "pre"
    return "relu-ic-conv" if where == "before_weight" else where


def before_branch(norm: NormFactory, channels: int, wired: str) -> nn.Module:
    """What stands between a sum and the weight layer that reads it; also the head of a network.

    Args:
        norm: the factory.
        channels: C of the sum.
        wired: the wiring.

    Returns:
        The layers, an identity where there are none.

    Shape:
        ``(N, C, *) -> (N, C, *)``
    """
    if wired in ("post", "conv-relu-ic"):
        return nn.Identity()
    if wired == "ic-conv-relu":
        return nn.Sequential(OrderedDict(norm=make(norm, channels)))
    return stage(norm, channels)


def after_branch(norm: NormFactory, channels: int, wired: str) -> nn.Module:
    """What stands between the last weight layer of a branch and the sum.

    Args:
        norm: the factory.
        channels: C of the branch.
        wired: the wiring.

    Returns:
        The layers, an identity where there are none.

    Shape:
        ``(N, C, *) -> (N, C, *)``
    """
    if wired == "post":
        return bare(norm, channels)
    if wired == "conv-relu-ic":
        return stage(norm, channels)
    own = act(make(norm, channels)) if wired == "ic-conv-relu" else {}
    return nn.Sequential(OrderedDict(own)) if own else nn.Identity()


class PadShortcut(nn.Module):
    """Option A of 1512.03385: every ``stride``-th pixel, and zeros for the additional channels.

    Args:
        additional: number of channels to add.
        stride: 2 where the maps are halved, 1 where only channels are added.

    Shape:
        ``(N, C, H, W) -> (N, C + additional, ⌈H/stride⌉, ⌈W/stride⌉)``

    Example:
        >>> PadShortcut(3)(torch.ones(1, 2, 5, 5)).sum(dim=(0, 2, 3))
        tensor([9., 9., 0., 0., 0.])
    """

    def __init__(self, additional: int, stride: int = 2) -> None:
        super().__init__()
        self.additional = additional
        self.stride = stride

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """Subsample and pad."""
        s = self.stride
        return pad(x_NCHW[:, :, ::s, ::s], (0, 0, 0, 0, 0, self.additional))

    def extra_repr(self) -> str:
        """The channels added, and the stride."""
        return f"additional={self.additional}, stride={self.stride}"


class Block(nn.Module):
    """Residual block y = a(shortcut(x) + α·f(β·x)), basic or bottleneck, in any wiring.

    Basic: two 3×3 convolutions. Bottleneck: 1×1, 3×3, 1×1, where the first has the stride and the
    last four times the channels of the others (1512.03385, 1603.05027). Where the shape changes,
    the shortcut reads β·x, otherwise x itself. Unlike the code of 1603.05027, a projection never
    reads the normalized and rectified x.

    Args:
        norm: the normalizer's factory.
        inputs: channels C.
        outputs: channels D.
        stride: 2 to halve the maps.
        wired: see the module's table; ``"post"`` makes a the ReLU, any other the identity.
        shortcut: ``"A"``, ``"B"`` or ``"3x3"``, for blocks that change the shape.
        bottleneck: whether the block is one; D is then a multiple of 4.
        scale: multiplies the branch by α; an identity for α = 1.
        beta: β.

    Shape:
        ``(N, C, H, W) -> (N, D, ⌈H/stride⌉, ⌈W/stride⌉)``
    """

    def __init__(
        self,
        norm: NormFactory,
        inputs: int,
        outputs: int,
        *,
        stride: int,
        wired: str,
        shortcut: str = "A",
        bottleneck: bool = False,
        scale: nn.Module | None = None,
        beta: float = 1.0,
    ) -> None:
        super().__init__()
        inner = outputs // 4 if bottleneck else outputs
        between = stage(norm, inner)
        after = after_branch(norm, outputs, wired)
        # Except in version 1 the sum is read by stages like `between` (of the next blocks, and the
        # last one), so a bias before the sum is needed only where they lack one.
        reader = after if wired == "post" else between
        first = 1 if bottleneck else 3
        self.before = before_branch(norm, inputs, wired)
        self.conv1 = conv(inputs, inner, followed_by=between, stride=stride, kernel=first)
        self.between = between
        self.conv2 = conv(inner, inner, followed_by=between if bottleneck else reader)
        if bottleneck:
            self.between2 = stage(norm, inner)
            self.conv3 = conv(inner, outputs, followed_by=reader, kernel=1)
        self.after = after
        # Weight layers are initialized in the order of registration: the shortcut is last.
        self.branch = tuple(name for name, _ in self.named_children())
        self.changes_shape = inputs != outputs or stride != 1
        self.shortcut: nn.Module = nn.Identity()
        if self.changes_shape and shortcut == "A":
            self.shortcut = PadShortcut(outputs - inputs, stride)
        elif self.changes_shape:
            side = 3 if shortcut == "3x3" else 1
            project = conv(inputs, outputs, followed_by=reader, stride=stride, kernel=side)
            end = bare(norm, outputs) if wired == "post" else nn.Identity()
            self.shortcut = nn.Sequential(OrderedDict(conv=project, after=end))
        self.shrink: nn.Module = Scale(beta) if beta != 1 else nn.Identity()
        self.scale = scale or nn.Identity()
        self.join = nn.ReLU() if wired == "post" else nn.Identity()

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """Add the branch to the shortcut."""
        shrunk = self.shrink(x_NCHW)
        branch = shrunk
        for name in self.branch:
            branch = getattr(self, name)(branch)
        short = self.shortcut(shrunk if self.changes_shape else x_NCHW)
        joined: torch.Tensor = self.join(self.scale(branch) + short)
        return joined
