"""Layers of binary networks: shifted sign, shifted PReLU, and convolutions with one-bit weights.

A binary convolution multiplies signs by signs and keeps one real scale a filter. See `signs` for
the functions that these layers are made of, and their gradients.

Sources: Bi-Real Net (1808.00278), ReActNet (2003.03488), BNN − BN = ? (2104.08215).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .plan import check_choice, check_size
from .signs import binarized, effective, sign, sign_quadratic, standardized

__all__ = [
    "LATENTS",
    "SCALES",
    "BinaryConv2d",
    "RPReLU",
    "RSign",
    "ScaledStdConv2d",
    "binarize_weights",
    "binarized",
    "binary_layers",
    "sign",
    "sign_quadratic",
    "standardized",
]

SCALES = ("mean", "none")
LATENTS = ("kaiming", "positive")


class RSign(nn.Module):
    """Sign with a learned threshold: y = sign(x + b_c), ReActNet (2003.03488).

    Backward, the derivative of Bi-Real Net's piecewise quadratic (1808.00278), see
    `sign_quadratic`.

    Args:
        num_channels: C.
        zero: sign(0). 1, the default, keeps outputs binary; 0 is the quirk of released code, whose
            ``torch.sign`` has a third value.
        shift: Whether there is a ``bias`` b, 0 at first; Bi-Real Net has none.

    Shape:
        (N, C, *) → (N, C, *), of −1 and +1.

    Raises:
        NetworkError: If ``num_channels`` or ``zero`` is out of range.

    Example:
        >>> RSign(2)(torch.tensor([[-0.5, 0.0]]))
        tensor([[-1.,  1.]], grad_fn=<AddBackward0>)
    """

    def __init__(self, num_channels: int, *, zero: int = 1, shift: bool = True) -> None:
        super().__init__()
        check_size("RSign", "num_channels", num_channels)
        check_choice("RSign", "zero", zero, (1, 0))
        self.num_channels, self.zero = num_channels, zero
        self.bias = nn.Parameter(torch.zeros(num_channels)) if shift else None

    def forward(self, x: Tensor) -> Tensor:
        """Shift and take the sign."""
        return sign_quadratic(x if self.bias is None else x + _along(self.bias, x), self.zero)

    def extra_repr(self) -> str:
        """Print the options that are not the default."""
        zero = "" if self.zero == 1 else f", zero={self.zero}"
        return f"{self.num_channels}{zero}{', shift=False' if self.bias is None else ''}"


class RPReLU(nn.Module):
    """Shifted PReLU: y = PReLU_c(x + b1_c) + b2_c, ReActNet (2003.03488).

    Args:
        num_channels: C.

    Attributes:
        before: b1, (C,), 0 at first.
        slope: Slope of the negative side, (C,), 0.25 at first.
        after: b2, (C,), 0 at first.

    Shape:
        (N, C, *) → (N, C, *).

    Raises:
        NetworkError: If ``num_channels`` is out of range.

    Example:
        >>> RPReLU(2)(torch.tensor([[-1.0, 2.0]])).tolist()
        [[-0.25, 2.0]]
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        check_size("RPReLU", "num_channels", num_channels)
        self.before = nn.Parameter(torch.zeros(num_channels))
        self.slope = nn.Parameter(torch.full((num_channels,), 0.25))
        self.after = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Shift, bend and shift."""
        bent: Tensor = F.prelu(x + _along(self.before, x), self.slope)
        return bent + _along(self.after, x)

    def extra_repr(self) -> str:
        """Print C."""
        return str(len(self.slope))


class ScaledStdConv2d(nn.Conv2d):
    """A real convolution with scaled weight standardization: gain_c·Ŵ (2101.08692).

    Ŵ is that of `standardized`; the activation's gain is 1, as in BNN − BN = ? (2104.08215).

    Args:
        in_channels: C.
        out_channels: D.
        kernel_size: Side length.
        stride: Of the convolution.
        padding: With zeros.
        bias: Whether there is one.

    Attributes:
        gain: (D, 1, 1, 1), 1 at first: of the weight's rank, so that adaptive clipping, which
            treats vectors as one unit, clips each filter's gain alone.

    Shape:
        (N, C, H, W) → (N, D, H′, W′).

    Example:
        >>> conv = ScaledStdConv2d(3, 8, 3, padding=1)
        >>> bool(conv.effective().sum(dim=(1, 2, 3)).abs().max() < 1e-5)
        True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.gain = nn.Parameter(torch.ones(out_channels, 1, 1, 1))

    def effective(self) -> Tensor:
        """The weight that the convolution uses, of ``weight``'s shape."""
        return effective(self.weight, self.gain, None)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        y: Tensor = self._conv_forward(x, self.effective(), self.bias)
        return y


class BinaryConv2d(nn.Conv2d):
    """A convolution with one-bit weights and one real scale a filter.

        W_b = mean|W|·sign(W)                plain (ReActNet, 2003.03488)
        W_b = gain_c·mean|Ŵ|·sign(Ŵ)         standardized, with Ŵ = (W−μ)/(σ+1e-5)/√fan_in
                                             (BNN − BN = ?, 2104.08215)

    with the gradient of clamp(W, −1, 1) or clamp(Ŵ, −1, 1) in the place of the signs'. The real
    ``weight`` W stays the parameter. Signs of activations are the caller's business (`RSign`).
    Padding is with zeros, as in released code, which is a third value at the border.

    Args:
        in_channels: C.
        out_channels: D.
        kernel_size: Side length.
        stride: Of the convolution.
        padding: With zeros.
        bias: Whether there is one; released code has none.
        scale: ``"mean"``, or ``"none"`` for signs alone.
        standardize: Whether Ŵ takes the place of W, with a learned ``gain``, 1 at first.
        binarize: False uses W, or gain_c·Ŵ, as it is: the first of two training stages.
        zero: sign(0), 1 or 0.
        latent: How W is drawn. ``"kaiming"``: torch's default. ``"positive"``: U(0, 0.001) as in
            released code, a quirk. All signs are then equal at first where W is not centered, so
            that it does harm unless a first stage with real weights goes before.

    Shape:
        (N, C, H, W) → (N, D, H′, W′).

    Raises:
        NetworkError: If an option is not among its choices.

    Example:
        >>> conv = BinaryConv2d(4, 2, 3, padding=1, standardize=True)
        >>> [len(filter_.unique()) for filter_ in conv.effective()]
        [2, 2]
        >>> conv(torch.ones(1, 4, 5, 5)).shape
        torch.Size([1, 2, 5, 5])
    """

    gain: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = False,
        *,
        scale: str = "mean",
        standardize: bool = False,
        binarize: bool = True,
        zero: int = 1,
        latent: str = "kaiming",
    ) -> None:
        for option, value, choices in (
            ("scale", scale, SCALES),
            ("zero", zero, (1, 0)),
            ("latent", latent, LATENTS),
        ):
            check_choice("BinaryConv2d", option, value, choices)
        self.latent = latent  # read by reset_parameters, which the next line calls
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.scale, self.binarize, self.zero = scale, binarize, zero
        self.gain = nn.Parameter(torch.ones(out_channels, 1, 1, 1)) if standardize else None

    def effective(self) -> Tensor:
        """The weight that the convolution uses, of ``weight``'s shape."""
        standardize = self.gain is not None
        if not self.binarize and not standardize:
            return self.weight
        scale = self.scale if self.binarize else None
        return effective(self.weight, self.gain, scale, self.zero, standardize=standardize)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        y: Tensor = self._conv_forward(x, self.effective(), self.bias)
        return y

    def reset_parameters(self) -> None:
        """Draw W anew."""
        super().reset_parameters()
        if self.latent == "positive":
            nn.init.uniform_(self.weight, 0, 1e-3)

    def extra_repr(self) -> str:
        """torch's, and the options that are not the default."""
        own = {
            "scale='none'": self.scale == "none",
            "standardize=True": self.gain is not None,
            "binarize=False": not self.binarize,
        }
        inherited: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return ", ".join([inherited, *(text for text, shown in own.items() if shown)])


def binary_layers(model: nn.Module) -> Iterator[BinaryConv2d]:
    """Walk over the binary convolutions of a model."""
    return (layer for layer in model.modules() if isinstance(layer, BinaryConv2d))


def binarize_weights(model: nn.Module, enabled: bool) -> int:
    """Switch between real weights (the first training stage) and one-bit weights (the second).

    Args:
        model: Changed in place; its parameters are not.
        enabled: Whether binary convolutions use one-bit weights.

    Returns:
        How many weights are concerned.

    Example:
        >>> binarize_weights(nn.Sequential(BinaryConv2d(4, 2, 3)), False)
        72
    """
    layers = list(binary_layers(model))
    for layer in layers:
        layer.binarize = enabled
    return sum(layer.weight.numel() for layer in layers)


def _along(vector: Tensor, x: Tensor) -> Tensor:
    """View a vector of channels so that it broadcasts against (N, C, *)."""
    return vector.view(-1, *[1] * (x.ndim - 2))
