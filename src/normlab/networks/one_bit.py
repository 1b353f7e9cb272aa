"""The unit of binary residual networks: a one-bit convolution with a shortcut of its own.

    h′ = RPReLU(s + α·norm(conv(sign(β·h))))        s = h, or where maps are halved
                                                    s = shortcut(pool(β·h))

Sources: Bi-Real Net (1808.00278), ReActNet (2003.03488), BNN − BN = ? (2104.08215).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .binary import BinaryConv2d, RPReLU, RSign, ScaledStdConv2d
from .plan import NormFactory
from .units import bare, goes_before_weight, make, needs_bias


@dataclass(frozen=True, kw_only=True)
class Style:
    """What the units of one network have in common.

    Attributes:
        norm: The normalizer's factory.
        norm_free: Whether weights are standardized, with gains.
        alpha: α; 1 where not norm_free.
        shifts: Whether signs have thresholds and sums an RPReLU, as in ReActNet.
        downsample: ``"real"`` or ``"binary"`` 1×1 convolutions in shortcuts.
        zero: sign(0).
        latent: How one-bit weights' real values are drawn.
    """

    norm: NormFactory
    norm_free: bool
    alpha: float
    shifts: bool
    downsample: str
    zero: int
    latent: str

    def norms(self, inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
        """The normalizers before the sign and after the convolution, one of them empty."""
        if goes_before_weight(make(self.norm, inputs)):
            return bare(self.norm, inputs), nn.Identity()
        return nn.Identity(), bare(self.norm, outputs)

    def conv(
        self, inputs: int, outputs: int, kernel: int, stride: int, after: nn.Module, binary: bool
    ) -> nn.Conv2d:
        """A convolution, with a bias only where nothing after it shifts."""
        sizes = (inputs, outputs, kernel, stride, kernel // 2)
        if binary:
            return BinaryConv2d(
                *sizes,
                bias=not self.shifts and needs_bias(after),
                standardize=self.norm_free,
                zero=self.zero,
                latent=self.latent,
            )
        if self.norm_free:
            return ScaledStdConv2d(*sizes, bias=not self.shifts)
        return nn.Conv2d(*sizes, bias=needs_bias(after) and not self.shifts)


class Unit(nn.Module):
    """One-bit convolution with a shortcut of its own.

    Args:
        style: What the network's units share.
        inputs: Channels C.
        outputs: Channels D: C, or 2C.
        kernel: Side length.
        stride: 1, or 2 for a unit that halves the maps.
        split: Whether D = 2C comes from two convolutions, each added to the same input and then
            concatenated (ReActNet-A), instead of one and a 1×1 convolution in the shortcut.
        variance: Expected variance of the input.

    Attributes:
        alpha: α.
        beta: β = 1/√variance.

    Shape:
        (N, C, H, W) → (N, D, H, W), or (N, D, ⌈H/2⌉, ⌈W/2⌉).
    """

    def __init__(
        self,
        style: Style,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        split: bool = False,
        variance: float = 1.0,
    ) -> None:
        super().__init__()
        each = inputs if split else outputs
        self.alpha, self.beta, self.halves = style.alpha, 1 / math.sqrt(variance), stride == 2
        self.before = style.norms(inputs, each)[0]
        self.sign = RSign(inputs, zero=style.zero, shift=style.shifts)
        self.branches = nn.ModuleList()
        for _ in range(outputs // each):
            after = style.norms(inputs, each)[1]
            conv = style.conv(inputs, each, kernel, stride, after, binary=True)
            self.branches.append(nn.Sequential(OrderedDict(conv=conv, after=after)))
        self.shortcut = nn.Sequential()
        if stride == 2:
            # Rounds up like the convolution; windows at an odd border average what they hold.
            self.shortcut.add_module("pool", nn.AvgPool2d(2, ceil_mode=True))
        if each != inputs:
            before, after = style.norms(inputs, each)
            binary = style.downsample == "binary"
            conv = style.conv(inputs, each, 1, 1, after, binary)
            self.shortcut.add_module("before", before)
            self.shortcut.add_module("conv", conv)
            self.shortcut.add_module("after", after)
        self.act: nn.Module = RPReLU(outputs) if style.shifts else nn.Identity()

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Add each branch to the shortcut, and concatenate where there are two."""
        scaled = x_NCHW if self.beta == 1 else x_NCHW * self.beta
        signs = self.sign(self.before(scaled))
        short = self.shortcut(scaled if self.halves else x_NCHW)
        sums = [torch.add(short, branch(signs), alpha=self.alpha) for branch in self.branches]
        y: Tensor = self.act(torch.cat(sums, 1) if len(sums) > 1 else sums[0])
        return y

    def extra_repr(self) -> str:
        """The factors, where there are any."""
        return "" if self.alpha == self.beta == 1 else f"alpha={self.alpha:g}, beta={self.beta:.4f}"
