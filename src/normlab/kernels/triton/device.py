"""What the Triton kernels share: activations with their slopes, addresses, lines of an area.

Activations are numbers here, as in the compiled kernels: 0 none, 1 ReLU, 2 SiLU, 3 TLU. All
arithmetic is in float32. A function returns early only on compile-time flags.
"""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def activate(u, tau, ACT: tl.constexpr):
    """a(u); NaN stays."""
    if ACT == 1:
        u = tl.where(u <= 0, 0.0, u)
    if ACT == 2:
        u = u / (1.0 + tl.exp(-u))
    if ACT == 3:
        u = tl.where(u <= tau, tau, u)
    return u


@triton.jit
def slope(u, tau, d, ACT: tl.constexpr):
    """∂L/∂u from d = ∂L/∂y; at NaN it passes, as torch has it."""
    if ACT == 1:
        d = tl.where(u <= 0, 0.0, d)
    if ACT == 2:
        gate = 1.0 / (1.0 + tl.exp(-u))
        d = d * gate * (1.0 + u * (1.0 - gate))
    if ACT == 3:
        d = tl.where(u <= tau, 0.0, d)
    return d


@triton.jit
def step(stride, AXIS: tl.constexpr, UNIT: tl.constexpr, ALIGN: tl.constexpr):
    """The stride of an axis that was passed in units of ALIGN; 1 along the contiguous axis.

    The product tells the compiler that rows begin at multiples of ALIGN, without which it cannot
    load several elements at once; lengths need no compilation of their own for it.
    """
    if AXIS == UNIT:
        return 1
    else:
        return stride * ALIGN


@triton.jit
def scaled(length, AXIS: tl.constexpr, UNIT: tl.constexpr, ALIGN: tl.constexpr):
    """The length of an axis: passed in units of ALIGN along the contiguous axis alone."""
    if AXIS == UNIT:
        return length * ALIGN
    else:
        return length


@triton.jit
def parameter(pointer, at, mask, default: tl.constexpr):
    """γ, β or τ in float32; `default` where the layer has none."""
    if pointer is None:
        return tl.full(at.shape, default, tl.float32)
    else:
        return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def inverse_deviation(moment, eps, SCALE: tl.constexpr):
    """1/√(M + ε), correctly rounded: one number an area is cheap."""
    if SCALE:
        return tl.div_rn(tl.full(moment.shape, 1.0, tl.float32), tl.sqrt_rn(moment + eps))
    else:
        return tl.full(moment.shape, 1.0, tl.float32)


@triton.jit
def epsilon(eps, learned):
    """ε: a number, or what a tensor holds."""
    if learned is None:
        return eps
    else:
        return tl.load(learned).to(tl.float32)


@triton.jit
def through_statistics(
    sum_h, sum_hx, inside, inverse, size, SHIFT: tl.constexpr, SCALE: tl.constexpr
):
    """k and h of ∂L/∂x = γ·g/D − (x − b·μ)·k − h, from Σh and Σh·x̂."""
    k = tl.zeros(sum_h.shape, tl.float32)
    h = tl.zeros(sum_h.shape, tl.float32)
    if SCALE:
        k = sum_hx / (size * inside)
    if SHIFT:
        h = sum_h * inverse / size
    return k, h
