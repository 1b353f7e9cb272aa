"""Layers that are one differentiable formula of their input, without stored statistics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from normlab.activations._conditions import attached, outside
from normlab.core.checks import check_channels, check_input
from normlab.core.operation import Standardize
from normlab.kernels.recompute import recomputed
from normlab.kernels.reference import accumulated, masked, moments


class Formula(nn.Module):
    """Abstract: y = γ·f(x) + β, of which the backward pass keeps the arguments alone.

    A subclass gives `formula`, which sees channels first, float32 at least, zeros in the padding.

    Args:
        num_channels: C.
        channel_dim: 1, or −1 for (…, C).
        parameters: Name → (initial value, shape), in the order in which `formula` takes them;
            ``weight`` and ``bias`` are γ and β, and are not passed on.
        shown: Options for `repr`.
    """

    def __init__(
        self,
        num_channels: int,
        channel_dim: int,
        parameters: Mapping[str, tuple[float, tuple[int, ...]]],
        shown: Mapping[str, object],
    ) -> None:
        super().__init__()
        check_channels(num_channels, channel_dim)
        self.num_channels, self.channel_dim = num_channels, channel_dim
        self._starts = {name: start for name, (start, _) in parameters.items()}
        self._shown = dict(shown)
        for name, (_, shape) in parameters.items():
            setattr(self, name, nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set parameters to their initial values."""
        for name, start in self._starts.items():
            getattr(self, name).fill_(start)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize x; see the class."""
        return self._run(x, mask)

    def formula(self, x: Tensor, valid: Tensor | None, *given: Tensor | None) -> Tensor:
        """f: x̂ of shape (N, C, *), from x, a mask (N, 1, *), context and own parameters.

        Each method has its own.
        """
        raise NotImplementedError

    def affine(self, y: Tensor, weight: Tensor | None, bias: Tensor | None, *_: object) -> Tensor:
        """γ·y + β, per channel."""
        shape = (-1, *[1] * (y.ndim - 2))
        y = y if weight is None else y * weight.view(shape)
        return y if bias is None else y + bias.view(shape)

    def _run(self, x: Tensor, mask: Tensor | None, *context: Tensor | None) -> Tensor:
        """Check the arguments and compute, with `context` before the parameters."""
        check_input(self, x, mask, self.num_channels, self.channel_dim)
        if x.numel() == 0:
            return attached(x, self.parameters())  # nothing to average
        first = x.movedim(-1, 1) if self.channel_dim == -1 else x
        own = [getattr(self, n) for n in self._starts if n not in ("weight", "bias")]
        edge = [getattr(self, name, None) for name in ("weight", "bias")]
        y = recomputed(self._whole, first, mask, *edge, *context, *own)
        return y.movedim(1, -1) if self.channel_dim == -1 else y

    def _whole(
        self, x: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None,
        *given: Tensor | None,
    ) -> Tensor:  # fmt: skip
        valid = None if mask is None else mask.unsqueeze(1)
        y = self.formula(masked(accumulated(x), valid), valid, *given)
        return masked(self.affine(y, weight, bias, *given), valid).to(x.dtype)

    def extra_repr(self) -> str:
        """Print the options."""
        shown = {**self._shown, **({"channel_dim": -1} if self.channel_dim == -1 else {})}
        parts = [str(v) if k == "pattern" else f"{k}={v}" for k, v in shown.items()]
        return ", ".join([str(self.num_channels), *parts])


def affine_parameters(
    channels: int, scale: bool = True, shift: bool = True
) -> dict[str, tuple[float, tuple[int, ...]]]:
    """γ, initially 1, and β, initially 0, of shape (C,), each if wanted."""
    wanted = {"weight": (1.0, scale), "bias": (0.0, shift)}
    return {name: (start, (channels,)) for name, (start, here) in wanted.items() if here}


def check_index(
    layer: nn.Module, name: str, index: Tensor, shape: tuple[int, ...], count: int
) -> None:
    """Raise for whole numbers that come beside x and are none of [0, count).

    Args:
        layer: Named in the message.
        name: Of the argument.
        index: Of that shape, of dtype int64 or int32 (or bool, where count is 2).
        shape: Expected.
        count: Elsewhere than on the CPU, what is out of range is left to the device.

    Raises:
        TypeError: For another dtype.
        ValueError: For another shape, or numbers out of range.
    """
    if index.dtype not in (torch.int64, torch.int32) and (index.dtype, count) != (torch.bool, 2):
        raise TypeError(f"{name} of {layer} are whole numbers (int64); received {index.dtype}")
    if tuple(index.shape) != shape:
        raise ValueError(f"{name} of {layer} have shape {shape}; received {tuple(index.shape)}")
    wrong = outside(index, count)
    if wrong is not None:
        raise ValueError(f"{name} of {layer} are in [0, {count}); received {wrong}")


def mean_over(x: Tensor, valid: Tensor | None, dims: tuple[int, ...]) -> Tensor:
    """Mean over axes, kept with length 1; padding, zero in x, is not counted.

    Args:
        x: (N, C, *), zeros in the padding.
        valid: (N, 1, *), True where valid, or None.
        dims: At least one axis.
    """
    if valid is None or all(d == 1 for d in dims):
        return x.mean(dims, keepdim=True)
    count = valid.to(x.dtype).expand(-1, x.shape[1], *x.shape[2:]).sum(dims, keepdim=True)
    return x.sum(dims, keepdim=True) / count.clamp(min=1)


def standardized(x: Tensor, valid: Tensor | None, dims: tuple[int, ...], eps: float) -> Tensor:
    """(x − μ)/√(σ² + ε) over axes of (N, C, *), 0 in the padding."""
    mean, variance, _ = moments(x, dims, Standardize(eps=eps), valid)
    assert mean is not None
    assert variance is not None
    return masked(x - mean, valid) * (variance + eps).rsqrt()


def root(x: Tensor) -> Tensor:
    """√x, at 0 with the gradient 0."""
    return x.clamp(min=torch.finfo(x.dtype).tiny).sqrt()
