"""Statistics of a whole tensor, by the fastest kernels that cover it."""

from __future__ import annotations

from torch import Tensor

from normlab.core.operation import Operation
from normlab.core.partition import Layout
from normlab.kernels import dispatch, reference
from normlab.kernels.reference import Moments, Spec


def moments(x: Tensor, layout: Layout, operation: Operation) -> Moments:
    """Measure each area of x.

    Args:
        x: A tensor without gradient.
        layout: Π bound to its shape.
        operation: Φ, which says what is measured.

    Returns:
        The moments, in the shape of the split view with reduced axes kept.
    """
    dims = layout.member_dims
    kernels = dispatch.kernels_for(x, layout, operation, None)
    if kernels is not None:
        found: Moments = kernels.moments(x, layout, Spec(dims, operation, None))
        return found
    return reference.moments(layout.split(x), dims, operation)
