"""Kernels for areas too large for one program: sums of pieces, what they make together, apply.

A tensor is N × C × P at strides sn, sc, sp, and an area is `bn` samples and `bc` channels with all
their positions. A program takes BC channels. Its piece of a block of `bn` samples is `units`
consecutive tiles of BP positions; a sample has `chunks` of them. Pieces are combined in a fixed
order. Strides, and the length of the contiguous axis UNIT (0 channels, 1 positions), come in units
of ALIGN (`scaled`). INDEX is the type of addresses: 64 bits only where a tensor needs them.
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

_LENGTHS = ["c", "p", "sn", "sc", "sp", "bn", "bc", "chunks"]
_PIECES = [*_LENGTHS, "units", "pieces"]


@triton.jit
def _tile(n, chunk, channel, c, p, sn, sc, sp,
          UNIT: tl.constexpr, ALIGN: tl.constexpr, BP: tl.constexpr,
          INDEX: tl.constexpr):  # fmt: skip
    """Addresses of BC channels × BP positions of sample n, and which of them exist."""
    j = chunk * BP + tl.arange(0, BP)
    start = channel.to(INDEX) * step(sc, 0, UNIT, ALIGN) + n.to(INDEX) * sn * ALIGN
    at = start[:, None] + (j.to(INDEX) * step(sp, 1, UNIT, ALIGN))[None, :]
    return at, (channel < c)[:, None] & (j < p)[None, :]


@triton.jit
def _coefficients(area, channel, known, gamma, beta, tau, mean, moment, learned, eps,
                  SHIFT: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    """μ, 1/D, γ, β and τ of BC channels."""
    mu = tl.zeros(channel.shape, tl.float32)
    square = tl.full(channel.shape, 1.0, tl.float32)
    if SHIFT:
        mu = tl.load(mean + area, mask=known, other=0.0)
    if SCALE:
        square = tl.load(moment + area, mask=known, other=1.0)
    inverse = inverse_deviation(square, epsilon(eps, learned), SCALE)
    return (
        mu,
        inverse,
        parameter(gamma, channel, known, 1.0),
        parameter(beta, channel, known, 0.0),
        parameter(tau, channel, known, 0.0),
    )


@triton.jit(do_not_specialize=_PIECES)
def line_moments(
    x, count, mean, square, c, p, sn, sc, sp, bn, bc, chunks, units, pieces,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
    INDEX: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """Count, mean and sum of squares about it (about 0 unless CENTRED) of a piece's channels."""
    c = scaled(c, 0, UNIT, ALIGN)
    p = scaled(p, 1, UNIT, ALIGN)
    pid = tl.program_id(0)
    blocks = tl.cdiv(c, BC)
    piece = pid // blocks
    outer = piece // pieces
    k = piece % pieces
    channel = (pid % blocks) * BC + tl.arange(0, BC)
    known = channel < c
    first = (tl.zeros([BC], tl.int64) + outer) * bn
    last = tl.minimum((k + 1) * units, bn * chunks)

    # Sums of differences from the mean of the first tile. They cancel little, for that tile is
    # part of the piece: were its mean far from the others', the sum of squares would be large.
    base = tl.zeros([BC], tl.float32)
    total = tl.zeros([BC, BP], tl.float32)
    power = tl.zeros([BC, BP], tl.float32)
    size = tl.zeros([BC], tl.float32)
    if CENTRED:
        unit = k * units
        n = first + unit // chunks
        at, mask = _tile(n, unit % chunks, channel, c, p, sn, sc, sp, UNIT, ALIGN, BP, INDEX)
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        base = tl.sum(v, 1) / (tl.zeros([BC], tl.float32) + tl.minimum(p - unit % chunks * BP, BP))
    for unit in range(k * units, last):
        n = first + unit // chunks
        at, mask = _tile(n, unit % chunks, channel, c, p, sn, sc, sp, UNIT, ALIGN, BP, INDEX)
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if CENTRED:
            v = tl.where(mask, v - base[:, None], 0.0)
            total += v
        power += v * v
        size += tl.minimum(p - unit % chunks * BP, BP)
    left = tl.sum(total, 1) / size
    to = (tl.zeros([BC], tl.int64) + piece) * c + channel
    tl.store(count + to, size, mask=known)
    tl.store(mean + to, base + left, mask=known)
    tl.store(square + to, tl.sum(power, 1) - left * left * size, mask=known)


@triton.jit(do_not_specialize=["c", "bc", "pieces"])
def combine_moments(
    count, part_mean, part_square, mean, moment, c, bc, pieces,
    BC: tl.constexpr, BK: tl.constexpr,
    SHIFT: tl.constexpr, ABOUT: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Statistics of an area from its pieces, by Chan's formula; one program an area."""
    area = tl.program_id(0)
    groups = c // bc
    outer = area // groups
    first = (area % groups) * bc
    zero = tl.zeros([1, 1], tl.int64)
    # Means are taken from that of the first piece, so that a common mean costs no digits.
    base = tl.load(part_mean + (zero + outer * pieces) * c + first)
    sizes = tl.zeros([BK, BC], tl.float32)
    sums = tl.zeros([BK, BC], tl.float32)
    for from_k in range(0, pieces, BK):
        for from_c in range(0, bc, BC):
            k = from_k + tl.arange(0, BK)
            j = from_c + tl.arange(0, BC)
            mask = (k < pieces)[:, None] & (j < bc)[None, :]
            at = (zero + outer * pieces + k[:, None]) * c + first + j[None, :]
            n = tl.load(count + at, mask=mask, other=0.0)
            m = tl.load(part_mean + at, mask=mask, other=0.0)
            sizes += n
            sums += tl.where(mask, n * (m - base), 0.0)
    size = tl.sum(tl.sum(sizes, 1), 0)
    mu = tl.sum(tl.sum(base, 1), 0) + tl.sum(tl.sum(sums, 1), 0) / size
    squares = tl.zeros([BK, BC], tl.float32)
    for from_k in range(0, pieces, BK):
        for from_c in range(0, bc, BC):
            k = from_k + tl.arange(0, BK)
            j = from_c + tl.arange(0, BC)
            mask = (k < pieces)[:, None] & (j < bc)[None, :]
            at = (zero + outer * pieces + k[:, None]) * c + first + j[None, :]
            squares += tl.load(part_square + at, mask=mask, other=0.0)
            if SHIFT or (SCALE and ABOUT):
                n = tl.load(count + at, mask=mask, other=0.0)
                delta = tl.load(part_mean + at, mask=mask, other=0.0) - mu
                squares += tl.where(mask, n * delta * delta, 0.0)
    square = tl.maximum(tl.sum(tl.sum(squares, 1), 0), 0.0) / size
    if SHIFT or (SCALE and ABOUT):
        if not ABOUT:
            square += mu * mu
        tl.store(mean + area, mu)
    if SCALE:
        tl.store(moment + area, square)


@triton.jit(do_not_specialize=_LENGTHS)
def apply_lines(
    x, y, gamma, beta, tau, mean, moment, learned, eps, c, p, sn, sc, sp, bn, bc, chunks,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
    INDEX: tl.constexpr, ACT: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Write y; the last tiles first, which are the ones that a cache still holds."""
    c = scaled(c, 0, UNIT, ALIGN)
    p = scaled(p, 1, UNIT, ALIGN)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    blocks = tl.cdiv(c, BC)
    unit = pid // blocks
    n = tl.zeros([BC], tl.int64) + unit // chunks
    channel = (pid % blocks) * BC + tl.arange(0, BC)
    known = channel < c
    at, mask = _tile(n, unit % chunks, channel, c, p, sn, sc, sp, UNIT, ALIGN, BP, INDEX)
    area = n // bn * (c // bc) + channel // bc
    mu, inverse, weight, offset, threshold = _coefficients(
        area, channel, known, gamma, beta, tau, mean, moment, learned, eps, SHIFT, SCALE
    )
    u = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    u = (u - mu[:, None]) * (weight * inverse)[:, None] + offset[:, None]
    u = activate(u, threshold[:, None], ACT)
    tl.store(y + at, u.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*_PIECES, "plane"])
def line_sums(
    x, dy, gamma, beta, tau, mean, moment, learned, eps, part,
    c, p, sn, sc, sp, bn, bc, chunks, units, pieces, plane,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
    INDEX: tl.constexpr, ACT: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Sums of g·x̂, g and ∂L/∂τ over a piece's channels, in three planes."""
    c = scaled(c, 0, UNIT, ALIGN)
    p = scaled(p, 1, UNIT, ALIGN)
    pid = tl.program_id(0)
    blocks = tl.cdiv(c, BC)
    piece = pid // blocks
    outer = piece // pieces
    k = piece % pieces
    channel = (pid % blocks) * BC + tl.arange(0, BC)
    known = channel < c
    first = (tl.zeros([BC], tl.int64) + outer) * bn
    area = (tl.zeros([BC], tl.int64) + outer) * (c // bc) + channel // bc
    mu, inverse, weight, offset, threshold = _coefficients(
        area, channel, known, gamma, beta, tau, mean, moment, learned, eps, SHIFT, SCALE
    )
    weight = weight * inverse
    last = tl.minimum((k + 1) * units, bn * chunks)
    sum_g = tl.zeros([BC, BP], tl.float32)
    sum_gx = tl.zeros([BC, BP], tl.float32)
    sum_t = tl.zeros([BC, BP], tl.float32)
    for unit in range(k * units, last):
        n = first + unit // chunks
        at, mask = _tile(n, unit % chunks, channel, c, p, sn, sc, sp, UNIT, ALIGN, BP, INDEX)
        z = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mu[:, None]
        d = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        g = slope(z * weight[:, None] + offset[:, None], threshold[:, None], d, ACT)
        g = tl.where(mask, g, 0.0)
        sum_g += g
        sum_gx += tl.where(mask, g * z, 0.0)
        if ACT == 3:
            sum_t += d - g
    to = part + (tl.zeros([BC], tl.int64) + piece) * c + channel
    tl.store(to, tl.sum(sum_gx, 1) * inverse, mask=known)
    tl.store(to + plane, tl.sum(sum_g, 1), mask=known)
    if ACT == 3:
        tl.store(to + 2 * plane, tl.sum(sum_t, 1), mask=known)


@triton.jit(do_not_specialize=["c", "bc", "pieces", "plane", "members"])
def combine_sums(
    part, gamma, mean, moment, learned, eps, rates, shifts, deps,
    c, bc, pieces, plane, members,
    BC: tl.constexpr, BK: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr,
    SINGLE: tl.constexpr,
):  # fmt: skip
    """k, h and ∂L/∂ε of an area from the sums of its pieces; one program an area."""
    area = tl.program_id(0)
    groups = c // bc
    outer = area // groups
    first = (area % groups) * bc
    zero = tl.zeros([1, 1], tl.int64)
    sum_h = tl.zeros([BK, BC], tl.float32)
    sum_hx = tl.zeros([BK, BC], tl.float32)
    for from_c in range(0, bc, BC):
        j = from_c + tl.arange(0, BC)
        weight = parameter(gamma, first + j, j < bc, 1.0)[None, :]
        for from_k in range(0, pieces, BK):
            k = from_k + tl.arange(0, BK)
            mask = (k < pieces)[:, None] & (j < bc)[None, :]
            at = (zero + outer * pieces + k[:, None]) * c + first + j[None, :]
            sum_hx += weight * tl.load(part + at, mask=mask, other=0.0)
            sum_h += weight * tl.load(part + plane + at, mask=mask, other=0.0)
    one = tl.zeros([1], tl.float32)
    total_h = one + tl.sum(tl.sum(sum_h, 1), 0)
    total_hx = one + tl.sum(tl.sum(sum_hx, 1), 0)
    small = epsilon(eps, learned)
    square = one + 1.0
    at = area + tl.arange(0, 1)
    if SCALE:
        square = tl.load(moment + at)
    inside = square + small
    inverse = inverse_deviation(square, small, SCALE)
    if deps is not None:
        tl.store(deps + at, -total_hx / (2.0 * inside))
    size = one + members
    k, h = through_statistics(total_h, total_hx, inside, inverse, size, SHIFT, SCALE)
    if SINGLE:
        k = one
    tl.store(rates + at, k)
    tl.store(shifts + at, h)


@triton.jit(do_not_specialize=_LENGTHS)
def gradient_lines(
    x, dy, dx, gamma, beta, tau, mean, moment, learned, eps, rates, shifts,
    c, p, sn, sc, sp, bn, bc, chunks,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
    INDEX: tl.constexpr, ACT: tl.constexpr, SHIFT: tl.constexpr, ABOUT: tl.constexpr,
    SCALE: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """∂L/∂x = γ·g/D − (x − b·μ)·k − h; without the last two where `rates` is None."""
    c = scaled(c, 0, UNIT, ALIGN)
    p = scaled(p, 1, UNIT, ALIGN)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    blocks = tl.cdiv(c, BC)
    unit = pid // blocks
    n = tl.zeros([BC], tl.int64) + unit // chunks
    channel = (pid % blocks) * BC + tl.arange(0, BC)
    known = channel < c
    at, mask = _tile(n, unit % chunks, channel, c, p, sn, sc, sp, UNIT, ALIGN, BP, INDEX)
    area = n // bn * (c // bc) + channel // bc
    mu, inverse, weight, offset, threshold = _coefficients(
        area, channel, known, gamma, beta, tau, mean, moment, learned, eps, SHIFT, SCALE
    )
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    u = (v - mu[:, None]) * (weight * inverse)[:, None] + offset[:, None]
    g = slope(u, threshold[:, None], d, ACT)
    if SINGLE:  # 1 − x²/(M + ε) would cancel
        small = epsilon(eps, learned)
        square = tl.load(moment + area, mask=known, other=1.0)
        inverse = inverse * small / (square + small)
    out = g * (weight * inverse)[:, None]
    if rates is not None:
        out -= tl.load(shifts + area, mask=known, other=0.0)[:, None]
        if SCALE:
            k = tl.load(rates + area, mask=known, other=0.0)[:, None]
            about = tl.zeros([BC], tl.float32)
            if ABOUT:
                about = tl.load(mean + area, mask=known, other=0.0)
            # Where nothing flows through M, what x holds does not matter, be it NaN.
            out -= tl.where(k != 0, (v - about[:, None]) * k, 0.0)
    tl.store(dx + at, out.to(dx.dtype.element_ty), mask=mask)
