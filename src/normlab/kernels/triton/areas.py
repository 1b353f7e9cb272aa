"""Kernels whose programs hold whole areas: x is read once and y is written once.

An area has M1 × M2 members at strides s1, s2; areas stand along two axes, at strides so and sa:

    address = a_out·so + a_in·sa + i·s1 + j·s2,   channel = (a_in mod groups)·CA + i·CM.

Instance norm in channels first is a_in = (n, c), CA = 1, CM = 0, M2 = P; a layer norm over the last
axis is a_in = (n, p), CA = 0, CM = 1, M1 = C. A program takes BA areas as one tile of BA × B1 × B2
elements. Strides, and the length of the contiguous axis UNIT, come in units of ALIGN (`scaled`).
INDEX is the type of addresses: 64 bits only where a tensor needs them.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from normlab.kernels.triton.device import (
    activate,
    epsilon,
    inverse_deviation,
    parameter,
    scaled,
    slope,
    step,
    through_statistics,
)

_LENGTHS = ["a_in", "tiles", "groups", "m1", "m2", "so", "sa", "s1", "s2"]


@triton.jit
def _offsets(a, so, sa, s1, s2, outer, UNIT: tl.constexpr, ALIGN: tl.constexpr,
             B1: tl.constexpr, B2: tl.constexpr, INDEX: tl.constexpr):  # fmt: skip
    """Addresses of a tile relative to the tensor."""
    start = a.to(INDEX) * step(sa, 0, UNIT, ALIGN) + outer.to(INDEX) * so * ALIGN
    along1 = tl.arange(0, B1).to(INDEX) * step(s1, 1, UNIT, ALIGN)
    along2 = tl.arange(0, B2).to(INDEX) * step(s2, 2, UNIT, ALIGN)
    return start[:, None, None] + along1[None, :, None] + along2[None, None, :]


@triton.jit(do_not_specialize=_LENGTHS)
def forward_areas(
    x, y, gamma, beta, tau, mean, moment, learned, eps,
    a_in, tiles, groups, m1, m2, so, sa, s1, s2,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, BA: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    CA: tl.constexpr, CM: tl.constexpr, ACT: tl.constexpr,
    SHIFT: tl.constexpr, ABOUT: tl.constexpr, SCALE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Measure areas, keep their statistics, and write y, unless that is None."""
    a_in = scaled(a_in, 0, UNIT, ALIGN)
    m1 = scaled(m1, 1, UNIT, ALIGN)
    m2 = scaled(m2, 2, UNIT, ALIGN)
    pid = tl.program_id(0)
    outer = (pid // tiles).to(tl.int64)
    a = (pid % tiles) * BA + tl.arange(0, BA)
    i = tl.arange(0, B1)
    real = a < a_in
    known = real[:, None] & (i < m1)[None, :]
    mask = known[:, :, None] & (tl.arange(0, B2) < m2)[None, None, :]
    at = _offsets(a, so, sa, s1, s2, outer, UNIT, ALIGN, B1, B2, INDEX)
    size = m1.to(tl.float32) * m2.to(tl.float32)

    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    mu = tl.zeros([BA], tl.float32)
    z = v
    if SHIFT or (SCALE and ABOUT):
        mu = tl.sum(tl.sum(v, 2), 1) / size
        z = tl.where(mask, v - mu[:, None, None], 0.0)
        left = tl.sum(tl.sum(z, 2), 1) / size  # what rounding left of the mean
        mu += left
        square = tl.sum(tl.sum(z * z, 2), 1) / size
        square = tl.maximum(square - left * left, 0.0)
        if not ABOUT:
            square += mu * mu
    else:
        square = tl.sum(tl.sum(z * z, 2), 1) / size
    index = outer * a_in + a
    if SHIFT or (SCALE and ABOUT):
        tl.store(mean + index, mu, mask=real)
    if SCALE:
        tl.store(moment + index, square, mask=real)

    if y is not None:
        inverse = inverse_deviation(square, epsilon(eps, learned), SCALE)
        channel = ((a % groups) * CA)[:, None] + (i * CM)[None, :]
        weight = parameter(gamma, channel, known, 1.0) * inverse[:, None]
        offset = parameter(beta, channel, known, 0.0)
        line = parameter(tau, channel, known, 0.0)
        u = v
        if SHIFT:
            u = v - mu[:, None, None]
        u = activate(u * weight[:, :, None] + offset[:, :, None], line[:, :, None], ACT)
        tl.store(y + at, u.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*_LENGTHS, "work", "plane"])
def backward_areas(
    x, dy, dx, gamma, beta, tau, mean, moment, learned, eps, part, deps,
    a_in, tiles, groups, m1, m2, so, sa, s1, s2, work, plane,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, BA: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    CA: tl.constexpr, CM: tl.constexpr, ACT: tl.constexpr,
    SHIFT: tl.constexpr, ABOUT: tl.constexpr, SCALE: tl.constexpr,
    SINGLE: tl.constexpr, PROGRAMS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """∂L/∂x, and sums of g·x̂, g and ∂L/∂τ over each area's channels, or over a program's areas.

    `part` holds three planes of `plane` numbers. With PROGRAMS, all areas have the same channels, a
    program takes every PROGRAMS-th tile, and a row of a plane is a program's sums. Without, a
    program takes one tile, and a row is a sample's (CM), or has one number an area.
    """
    a_in = scaled(a_in, 0, UNIT, ALIGN)
    m1 = scaled(m1, 1, UNIT, ALIGN)
    m2 = scaled(m2, 2, UNIT, ALIGN)
    pid = tl.program_id(0)
    i = tl.arange(0, B1)
    size = m1.to(tl.float32) * m2.to(tl.float32)
    small = epsilon(eps, learned)
    all_gx = tl.zeros([B1], tl.float32)
    all_g = tl.zeros([B1], tl.float32)
    all_t = tl.zeros([B1], tl.float32)

    for tile in range(pid, work, tl.num_programs(0)):
        outer = tl.full([BA], 0, tl.int64) + tile // tiles
        a = (tile % tiles) * BA + tl.arange(0, BA)
        real = a < a_in
        known = real[:, None] & (i < m1)[None, :]
        mask = known[:, :, None] & (tl.arange(0, B2) < m2)[None, None, :]
        at = _offsets(a, so, sa, s1, s2, outer, UNIT, ALIGN, B1, B2, INDEX)
        index = outer * a_in + a

        mu = tl.zeros([BA], tl.float32)
        square = tl.full([BA], 1.0, tl.float32)
        if SHIFT or (SCALE and ABOUT):
            mu = tl.load(mean + index, mask=real, other=0.0)
        if SCALE:
            square = tl.load(moment + index, mask=real, other=1.0)
        inside = square + small
        inverse = inverse_deviation(square, small, SCALE)
        channel = ((a % groups) * CA)[:, None] + (i * CM)[None, :]
        weight = parameter(gamma, channel, known, 1.0)
        offset = parameter(beta, channel, known, 0.0)
        line = parameter(tau, channel, known, 0.0)

        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        z = v
        if SHIFT:
            z = v - mu[:, None, None]
        u = z * (weight * inverse[:, None])[:, :, None] + offset[:, :, None]
        g = tl.where(mask, slope(u, line[:, :, None], d, ACT), 0.0)
        sum_g = tl.sum(g, 2)
        sum_gx = tl.sum(tl.where(mask, g * z, 0.0), 2) * inverse[:, None]
        sum_t = sum_g
        if ACT == 3:
            sum_t = tl.sum(d - g, 2)
        sum_h = tl.sum(tl.where(known, sum_g * weight, 0.0), 1)
        sum_hx = tl.sum(tl.where(known, sum_gx * weight, 0.0), 1)
        if part is not None:
            if PROGRAMS:
                all_gx += tl.sum(tl.where(known, sum_gx, 0.0), 0)
                all_g += tl.sum(tl.where(known, sum_g, 0.0), 0)
                all_t += tl.sum(tl.where(known, sum_t, 0.0), 0)
            elif CM:
                to = part + index[:, None] * m1 + i[None, :]
                tl.store(to, sum_gx, mask=known)
                tl.store(to + plane, sum_g, mask=known)
                tl.store(to + 2 * plane, sum_t, mask=known)
            else:
                tl.store(part + index, tl.sum(sum_gx, 1), mask=real)
                tl.store(part + plane + index, tl.sum(sum_g, 1), mask=real)
                tl.store(part + 2 * plane + index, tl.sum(sum_t, 1), mask=real)
        if deps is not None:
            tl.store(deps + index, -sum_hx / (2.0 * inside), mask=real)
        if dx is not None:
            k, h = through_statistics(sum_h, sum_hx, inside, inverse, size, SHIFT, SCALE)
            if SINGLE:  # 1 − x²/(M + ε) would cancel
                k = tl.zeros([BA], tl.float32)
                inverse = inverse * small / inside
            out = g * (weight * inverse[:, None])[:, :, None] - h[:, None, None]
            if SCALE:
                about = mu if ABOUT else tl.zeros([BA], tl.float32)
                # Where nothing flows through M, what x holds does not matter, be it NaN.
                flow = (v - about[:, None, None]) * k[:, None, None]
                out -= tl.where(k[:, None, None] != 0, flow, 0.0)
            tl.store(dx + at, out.to(dx.dtype.element_ty), mask=mask)

    if PROGRAMS and part is not None:
        to = part + pid.to(tl.int64) * m1 + i
        tl.store(to, all_gx, mask=i < m1)
        tl.store(to + plane, all_g, mask=i < m1)
        tl.store(to + 2 * plane, all_t, mask=i < m1)
