"""The computations under Π and Φ, in interchangeable implementations."""

from normlab.kernels.dispatch import backend as backend
