"""What the parametrizations of weights have in common: the matrix, its dtype, and the setter."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from normlab.core.operation import Operation
from normlab.kernels import reference as kernels
from normlab.kernels import units as rows
from normlab.kernels.cpu.units import How
from normlab.weights import units


class Parametrization(nn.Module):
    """Abstract: computes a layer's weight from the stored one, row by row or as a matrix.

    A subclass defines `compute`. Reading the weight never changes state. Assigning to
    ``layer.weight`` stores the value; what is read is what the method makes of it.

    Args:
        layer: Linear, ConvNd or ConvTransposeNd.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layout = units.layout(layer)
        self.groups = units.groups(layer)
        start = cast(Tensor, layer.weight).detach()
        self.units, self.fan_in = units.rows(start, self.layout).shape

    def compute(self, matrix: Tensor) -> Tensor:
        """Return the matrix in use; one row a unit, float32 at least. Each method has its own."""
        raise NotImplementedError

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight in use.

        Args:
            weight: The stored weight.

        Returns:
            The weight in use, in the shape and dtype of the stored one.

        Shape:
            That of the layer's weight, both.
        """
        matrix = kernels.accumulated(units.rows(weight, self.layout))
        kind = weight.device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):  # its products would round to 8 bits
                used = self.compute(matrix)
        else:
            used = self.compute(matrix)
        return self.layout.undo(used).to(weight.dtype)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return what is stored when `value` is assigned to the weight: the value itself."""
        return value

    def prepare(self, layer: nn.Module) -> None:
        """Called once the layer is parametrized, for hooks."""

    def release(self, layer: nn.Module) -> None:
        """Called once the layer is no longer parametrized, to undo `prepare`."""

    def need_two_inputs(self) -> None:
        """Refuse layers whose units have a single incoming weight, which centring turns to 0."""
        if self.fan_in < 2:
            raise ValueError(
                f"{type(self).__name__} subtracts the mean of each unit's incoming weights, which "
                f"leaves nothing of fan_in={self.fan_in}; it takes fan_in ≥ 2. Leave the layer "
                "out with skip=[its name]."
            )

    def extra_repr(self) -> str:
        """Pattern, and the numbers of units and of incoming weights of each."""
        return f"{self.layout.partition}, units={self.units}, fan_in={self.fan_in}"


class Unitwise(Parametrization):
    """Abstract: Φ of the core on the incoming weights of each unit, then a gain.

    w = Φ(v)·g, with Φ centring, scaling or standardization as for activations.

    Args:
        layer: Linear, ConvNd or ConvTransposeNd.
        operation: Φ.
        gain: Initial g, (units, 1), or None for no gain.
        constant: Fixed factor of g.
    """

    gain: nn.Parameter | None

    def __init__(
        self,
        layer: nn.Module,
        operation: Operation,
        gain: Tensor | None = None,
        constant: float = 1.0,
    ) -> None:
        super().__init__(layer)
        self.spec = kernels.Spec((1,), operation, None)
        self.constant = constant
        if operation.shift:
            self.need_two_inputs()
        self.register_parameter("gain", None if gain is None else nn.Parameter(gain))

    def factor(self, gain: Tensor | None) -> Tensor | None:
        """Return the gain with its constant, or None where both are 1."""
        if gain is None:
            return None
        gain = kernels.accumulated(gain)
        return gain if self.constant == 1 else gain * self.constant

    def compute(self, matrix: Tensor) -> Tensor:
        """Φ, then the gain."""
        how = self.compiled()
        return rows.standardize(matrix, self.gain, how) if how else self.formula(matrix, self.gain)

    def compiled(self) -> How | None:
        """What compiled kernels are to do; None where there are none for Φ."""
        op = self.spec.operation
        if not op.shift or op.p != 2 or op.about != "mean" or op.factor != 1:
            return None
        return How(self.formula, cast(float, op.eps), "inside", self.constant)

    def formula(self, matrix: Tensor, gain: Tensor | None) -> Tensor:
        """Φ, then the gain, in torch operations."""
        operation = self.spec.operation
        eps = cast(float, operation.eps)
        mean, moment, _ = kernels.moments(matrix, (1,), operation)
        factor = self.factor(gain)
        used = kernels.apply(matrix, mean, moment, factor, None, None, eps, None, self.spec)
        return used if factor is not None or self.constant == 1 else used * self.constant


def grouped(weight: Tensor, layer: nn.Module) -> Tensor:
    """Return a weight of a layer as (groups, units, fan_in), in float32 at least.

    Units of different convolution groups read different inputs.
    """
    rows = kernels.accumulated(units.rows(weight, units.layout(layer)))
    return rows.reshape(units.groups(layer), -1, rows.shape[1])


def ones(layer: nn.Module) -> Tensor:
    """Return a gain of 1 for each unit of a layer: (units, 1), like its weight otherwise."""
    weight = cast(Tensor, layer.weight).detach()
    at = units.layout(layer)
    return torch.ones(units.rows(weight, at).shape[0], 1, dtype=weight.dtype, device=weight.device)
