"""Codes of compressed states, and weights with a rest beside their bfloat16 part: the bits of ``csrc/codes.h``, which
says what they are and why.

Elements come in flat blocks, of whole code blocks of 32; values per code block (ranks, scales) are a 32nd as many. A
scale is an int32, dithers are uint32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arith import larger, smaller

CODE_BLOCK = tl.constexpr(32)
GOLDEN = tl.constexpr(0x9E3779B1)
RANK_OF_ZERO = tl.constexpr(0x800000)
ROUNDER = tl.constexpr(12582912.0)  # 1.5 · 2^23


@triton.jit
def bits_of(a):
    return a.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(u):
    return u.to(tl.float32, bitcast=True)


# ---- dither ---------------------------------------------------------------------------------------------------------


@triton.jit
def mixed(h):
    h = h ^ (h >> 16)
    h = h * 0x21F0AAAD
    h = h ^ (h >> 15)
    h = h * 0x735A2D97
    return h ^ (h >> 15)


@triton.jit
def low_word(count):
    """Of a count in float64, modulo 2^32; 0 of one that is no whole number below 2^53."""
    good = (count >= 0.0) & (count < 9007199254740992.0)
    return tl.where(good, count, 0.0).to(tl.int64).to(tl.uint32)


@triton.jit
def settled(a):
    """The bits of a float, with one NaN for all."""
    return tl.where(a == a, bits_of(a), 0x7FC00000)


@triton.jit
def settled_square(v):
    """A second moment with infinity for NaN."""
    u = bits_of(v)
    return float_of(tl.where(u < 0x7F800000, u, 0x7F800000))


@triton.jit
def dither(x, v, key):
    """32 bits for each element, of the new weight and second moment before they are rounded."""
    return mixed((settled(x) * GOLDEN) ^ bits_of(settled_square(v)) ^ key)


@triton.jit
def dither_by(x, bits, key):
    """The same of other bits where there is no second moment."""
    return mixed((settled(x) * GOLDEN) ^ bits ^ key)


@triton.jit
def own_bits(h, DITHER: tl.constexpr):
    """From an operand's own 16 bits on (`dither` in its definition), of the words that follow h."""
    for _ in tl.static_range(DITHER // 2):
        h = mixed(h + GOLDEN)
    return h >> 16 if DITHER % 2 == 1 else h


# ---- scales of code blocks ------------------------------------------------------------------------------------------


@triton.jit
def power_of_two(b):
    return (b << 23).to(tl.float32, bitcast=True)


@triton.jit
def ranks(a, BLOCK: tl.constexpr):
    """The largest finite magnitude of each code block, as bits."""
    rank = ((bits_of(a) & 0x7FFFFFFF) + RANK_OF_ZERO).to(tl.int32, bitcast=True)
    most = tl.max(tl.reshape(rank, (BLOCK // CODE_BLOCK, CODE_BLOCK)), axis=1)
    return larger(most, RANK_OF_ZERO) - RANK_OF_ZERO


@triton.jit
def each(b, BLOCK: tl.constexpr):
    """The scale of each element, from the scales of code blocks."""
    rows = tl.broadcast_to(tl.expand_dims(b, 1), (BLOCK // CODE_BLOCK, CODE_BLOCK))
    return tl.reshape(rows, (BLOCK,))


@triton.jit
def scale_places(at, end, BLOCK: tl.constexpr):
    """The offsets of the scales of a block of elements, which begins at `at`, and which of them exist."""
    first = tl.arange(0, BLOCK // CODE_BLOCK)
    return at // CODE_BLOCK + first, at + first * CODE_BLOCK < end


@triton.jit
def load_scales(ptr, at, end, BLOCK: tl.constexpr):
    places, there = scale_places(at, end, BLOCK)
    return tl.load(ptr + places, mask=there, other=127).to(tl.int32)


@triton.jit
def store_scales(ptr, at, end, b, BLOCK: tl.constexpr):
    places, there = scale_places(at, end, BLOCK)
    tl.store(ptr + places, b.to(tl.uint8), mask=there)


# ---- m and v: mu-law ------------------------------------------------------------------------------------------------


@triton.jit
def mu_scale(largest, BITS: tl.constexpr):
    BINADES: tl.constexpr = 1 << (BITS - 4)
    full = tl.where((largest & 0x7FFFFF) >= 0x700000 - (1 << (24 - BINADES)), 1, 0)
    return smaller(larger((largest >> 23) + full + 1 - BINADES, 24), 254 - BINADES)


@triton.jit
def mu_encoded(magnitude, b, d, BITS: tl.constexpr):
    u = bits_of(magnitude + power_of_two(b)) + d
    return smaller((u >> 19).to(tl.int32, bitcast=True) - 16 * b, (1 << BITS) - 1)


@triton.jit
def mu_decoded(code, b):
    o = b << 23
    return ((code << 19) + o).to(tl.float32, bitcast=True) - o.to(tl.float32, bitcast=True)


@triton.jit
def load_m(code, b):
    return float_of(bits_of(mu_decoded((code & 0x7F).to(tl.int32), b)) | ((code & 0x80).to(tl.uint32) << 24))


@triton.jit
def store_m(m, b, h):
    sign = tl.where(m == m, (bits_of(m) >> 24) & 0x80, 0)
    code = mu_encoded(float_of(bits_of(m) & 0x7FFFFFFF), b, ((h & 0xFF) << 11) | 0x400, 7)
    return (code.to(tl.uint32, bitcast=True) | sign).to(tl.uint8)


@triton.jit
def load_v(code, b):
    return tl.where(code == 0xFF, float("inf"), mu_decoded(code.to(tl.int32), b))


@triton.jit
def store_v(v_settled, b, h):
    return larger(mu_encoded(v_settled, b, (((h >> 8) & 0x7FF) << 8) | 0x80, 8), 1).to(tl.uint8)


# ---- e: on a grid of its own, beside x ------------------------------------------------------------------------------


@triton.jit
def nearest_whole(a):
    return (a + ROUNDER) - ROUNDER


@triton.jit
def floor_of(a):
    r = nearest_whole(a)
    return r - tl.where(r > a, 1.0, 0.0)


@triton.jit
def unit_of(h):
    """In [0, 1)."""
    return float_of((h >> 9) | 0x3F800000) - 1.0


@triton.jit
def evenly(spread, BLOCK: tl.constexpr):
    """The dithers of a block's elements, in [0, 1); `spread` is half the average's moves times GOLDEN."""
    place = (tl.arange(0, BLOCK) & (CODE_BLOCK - 1)).to(tl.uint32)
    return unit_of(spread + place * 0x6487ED51)


@triton.jit
def grid(x, b):
    """The multiple of the block's power of two next to x."""
    a = x * power_of_two(254 - b)
    return tl.where(tl.abs(a) < 4194304.0, nearest_whole(a) * power_of_two(b), x)


@triton.jit
def grid_scale(largest, BITS: tl.constexpr):
    FULL: tl.constexpr = 0x780000 if BITS == 8 else 0x7FFA00
    full = tl.where((largest & 0x7FFFFF) >= FULL, 1, 0)
    return larger((largest >> 23) + full - (BITS - 2), 1)


@triton.jit
def grid_code(offset, g, increment, x, b, u, BITS: tl.constexpr):
    """Of an average at g + offset that is to move by the increment, beside its new weight x."""
    inverse = power_of_two(254 - b)
    a = (offset + (g - grid(x, b))) * inverse
    whole = nearest_whole(a)
    t = whole + floor_of(((a - whole) + increment * inverse) + u)
    TOP: tl.constexpr = (1 << (BITS - 1)) - 1
    most = tl.full(t.shape, TOP, tl.float32)
    t = tl.where(t < -most, -most, tl.where(t < most, t, most))  # NaN: the last
    return t.to(tl.int32)


# ---- x, and e on its own: bfloat16 and a rest -----------------------------------------------------------------------


@triton.jit
def rounded(u, d, BITS: tl.constexpr):
    """The bits of settled floats, cut to so many by stochastic rounding."""
    BELOW: tl.constexpr = (1 << (32 - BITS)) - 1
    return (u + (d & BELOW)) & (0xFFFFFFFF - BELOW)


@triton.jit
def high_part(u):
    """The nearest bfloat16, ties away from zero."""
    return (u + 0x8000) >> 16


@triton.jit
def joined(high, rest):
    """The float of a bfloat16's bits and an int16 or int8; of 0 no rest is negative."""
    u = high.to(tl.uint32) << 16
    r = rest.to(tl.int32)
    if rest.dtype == tl.int8:
        r = r * 256
    return float_of(u + tl.where((u << 1) == 0, larger(r, 0), r).to(tl.uint32, bitcast=True))


@triton.jit
def rest_of(u, BITS: tl.constexpr):
    """What the high part of settled bits leaves over of 32, int16, or of 24, int8."""
    rest = (u - (high_part(u) << 16)).to(tl.int32, bitcast=True)
    return rest.to(tl.int16) if BITS == 32 else (rest >> 8).to(tl.int8)
