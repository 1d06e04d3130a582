"""Operands that may lie in the formats of :mod:`.codes`: what is compiled in of that, and the loads and stores that
rounds share. ``csrc/cpu/coded.h`` does the same.

A kernel's flags have the bits of each such operand, by its symbol: a weight 24 or 32 with a rest, 16 by dither, 0
plain; a moment or a square 8 in codes, 16 by dither, 32 in float32, 0 not in play; a second moment or a gradient 16 by
dither, 32 plain, 0 not in play; an average or an iterate 8 or 16 on a grid beside its weight, 24 with a rest, 32 in
float32, 0 not in play.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..definitions.kit import Definition
from . import codes
from .codes import float_of, settled
from .storage import load, store

Dtypes = tuple[torch.dtype | None, ...]

_STATES = {None: 0, torch.float32: 32, torch.bfloat16: 16, torch.uint8: 8}
_AVERAGES = {None: 0, torch.float32: 32, torch.bfloat16: 24, torch.int16: 16, torch.int8: 8}
_BITS: dict[str, dict[torch.dtype | None, int]] = dict.fromkeys(("moment", "square", "second", "gradient"), _STATES)
_BITS |= dict.fromkeys(("average", "iterate"), _AVERAGES)
_RESTS = {torch.int16: 32, torch.int8: 24}


# ---- flags and scalars ----------------------------------------------------------------------------------------------


def with_bits(plain: Any, definition: Definition, *own: str) -> Any:
    """The type of a coded kernel's flags: those of the plain one, others of its own, and the bits of operands, which
    are not a call's but a tensor's (`of_formats`). Of its own are "stochastic", whether weights in bfloat16 are rounded
    by dither, and "nearest", whether second moments in it are not."""
    symbols = [o.symbol for o in definition.operands if o.codec is not None]
    return namedtuple(f"Coded{plain.__name__}", (*plain._fields, *own, *symbols), defaults=[0] * len(symbols))


def of_formats(definition: Definition, flags: Any, operands: Dtypes, beside: Dtypes) -> Any:
    """The flags for tensors in these formats."""
    found: dict[str, Any] = {}
    for operand, dtype, its in zip(definition.operands, operands, beside, strict=True):
        if operand.codec is None:
            continue
        bits = _BITS[operand.codec][dtype] if operand.codec != "weight" else 0 if its is None else _RESTS[its]
        if operand.codec == "weight" and its is None and dtype == torch.bfloat16 and flags.stochastic:
            bits = 16
        elif operand.codec == "second" and bits == 16 and flags.nearest:
            bits = 32  # as it lies
        elif operand.codec == "iterate":
            found["increment"] = bits in (8, 16)
        found[operand.symbol] = bits
    return flags._replace(**found)


def lies(codec: str | None, word: str) -> tuple[torch.dtype | None, torch.dtype | None]:
    """How an operand of so many bits lies, and what lies beside it; or of a dtype by its name, or "dithered"."""
    if word == "-":
        return None, None
    if not word.isdigit():
        return getattr(torch, "bfloat16" if word == "dithered" else word), None
    if codec == "weight":
        return torch.bfloat16, next(dtype for dtype, bits in _RESTS.items() if bits == int(word))
    assert codec is not None
    beside = {8: torch.uint8} | ({16: torch.uint8, 24: torch.int8} if codec in ("average", "iterate") else {})
    return next(dtype for dtype, bits in _BITS[codec].items() if bits == int(word)), beside.get(int(word))


# Scalars: the bits of two uint32, what codes are dithered by and what averages on a grid are; and how far such an
# average moves, 0 where it rests.
ROUNDING = ("key", "spread", "share")


@triton.jit
def dither_key(t):
    return float_of(codes.mixed(codes.low_word(t) * codes.GOLDEN))


@triton.jit
def rounding(t, update_freq, moves, weight):
    taken = tl.floor(t / update_freq)
    key = dither_key(t)
    spread = float_of((codes.low_word(taken) >> 1) * codes.GOLDEN)
    return key, spread, tl.where(moves != 0.0, weight, 0.0)


# ---- elements -------------------------------------------------------------------------------------------------------


class Here(NamedTuple):
    """The elements of a block: their places, which of them are there, and where they begin and end."""

    i: tl.tensor
    mask: tl.tensor
    at: tl.tensor
    end: tl.tensor


@triton.jit
def elements(at, end, BLOCK: tl.constexpr):
    i = at + tl.arange(0, BLOCK)
    return Here(i, i < end, at, end)


@triton.jit
def load_codes(ptr, i, mask):
    return tl.load(ptr + i, mask=mask, other=0)


@triton.jit
def load_each_scale(ptr, here, BLOCK: tl.constexpr):
    return codes.each(codes.load_scales(ptr, here.at, here.end, BLOCK), BLOCK)


@triton.jit
def load_pair(ptr, rest_ptr, i, mask):
    return codes.joined(load_codes(ptr, i, mask), load_codes(rest_ptr, i, mask))


@triton.jit
def store_pair(ptr, rest_ptr, i, u, mask, BITS: tl.constexpr):
    """Settled bits, of which there are so many."""
    tl.store(ptr + i, codes.high_part(u).to(tl.uint16), mask=mask)
    tl.store(rest_ptr + i, codes.rest_of(u, BITS), mask=mask)


@triton.jit
def store_high(ptr, i, value, h, mask, HALF: tl.constexpr = 0):
    """Into bfloat16, rounded by the lower or the upper half of h."""
    u = settled(value)
    u = codes.rounded(u, h >> 16 if HALF == 1 else h, 16)
    tl.store(ptr + i, codes.high_part(u).to(tl.uint16), mask=mask)


# ---- moments --------------------------------------------------------------------------------------------------------


@triton.jit
def load_moment(ptr, scales, here, absent, BITS: tl.constexpr, BLOCK: tl.constexpr):
    value = absent
    if BITS == 8:
        value = codes.load_m(load_codes(ptr, here.i, here.mask), load_each_scale(scales, here, BLOCK))
    elif BITS > 0:
        value = load(ptr, here.i, here.mask)
    return value


@triton.jit
def store_moment(ptr, scales, here, m, d, BITS: tl.constexpr, BLOCK: tl.constexpr):
    if BITS == 8:
        b = codes.mu_scale(codes.ranks(m, BLOCK), 7)
        tl.store(ptr + here.i, codes.store_m(m, codes.each(b, BLOCK), d), mask=here.mask)
        codes.store_scales(scales, here.at, here.end, b, BLOCK)
    elif BITS == 16:
        store_high(ptr, here.i, m, d, here.mask)
    elif BITS == 32:
        store(ptr, here.i, m, here.mask)


@triton.jit
def load_square(ptr, scales, here, absent, BITS: tl.constexpr, BLOCK: tl.constexpr):
    value = absent
    if BITS == 8:
        value = codes.load_v(load_codes(ptr, here.i, here.mask), load_each_scale(scales, here, BLOCK))
    elif BITS > 0:
        value = load(ptr, here.i, here.mask)
    return value


@triton.jit
def store_square(ptr, scales, here, v, h, BITS: tl.constexpr, BLOCK: tl.constexpr):
    if BITS == 8:
        new = codes.settled_square(v)
        b = codes.mu_scale(codes.ranks(new, BLOCK), 8)
        tl.store(ptr + here.i, codes.store_v(new, codes.each(b, BLOCK), h), mask=here.mask)
        codes.store_scales(scales, here.at, here.end, b, BLOCK)
    elif BITS == 16:
        store_high(ptr, here.i, v, h, here.mask, 1)
    elif BITS == 32:
        store(ptr, here.i, v, here.mask)


@triton.jit
def store_dithered(ptr, i, value, h, mask, BITS: tl.constexpr):
    """What lies in bfloat16 or plain."""
    if BITS == 16:
        store_high(ptr, i, value, h, mask)
    elif BITS == 32:
        store(ptr, i, value, mask)


# ---- weights --------------------------------------------------------------------------------------------------------


@triton.jit
def load_weight(ptr, rest, here, BITS: tl.constexpr):
    return load_pair(ptr, rest, here.i, here.mask) if BITS >= 24 else load(ptr, here.i, here.mask)


@triton.jit
def store_weight(ptr, rest, here, x, h, BITS: tl.constexpr):
    """Returns the weight as it will be read back."""
    back = x
    if BITS > 0:
        u = settled(x)
        if BITS < 32:
            u = codes.rounded(u, h, BITS)
            back = float_of(u)
        if BITS == 16:
            tl.store(ptr + here.i, codes.high_part(u).to(tl.uint16), mask=here.mask)
        else:
            store_pair(ptr, rest, here.i, u, here.mask, BITS)
    else:
        store(ptr, here.i, x, here.mask)
        back = read_back(ptr, x)
    return back


@triton.jit
def read_back(ptr, x):
    """A weight as it is after a plain store."""
    if ptr.dtype.element_ty == tl.uint16:
        u = codes.bits_of(x)
        nearest = (u + (((u >> 16) & 1) + 0x7FFF)) & 0xFFFF0000
        x = float_of(tl.where(x == x, nearest, 0x7FC00000))
    elif ptr.dtype.element_ty == tl.float16:
        x = x.to(tl.float16).to(tl.float32)
    return x


# ---- averages -------------------------------------------------------------------------------------------------------


class Average(NamedTuple):
    """An average, and of one on a grid where it lies: at grid + offset."""

    e: tl.tensor
    grid: tl.tensor
    offset: tl.tensor


@triton.jit
def load_average(ptr, beside, here, mask, x, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """x: the weight that it was written beside. On a grid all elements are read, otherwise those of the mask."""
    e = x
    grid = x
    offset = x
    if BITS == 8 or BITS == 16:
        b = codes.each(codes.larger(codes.load_scales(beside, here.at, here.end, BLOCK), 1), BLOCK)
        grid = codes.grid(x, b)
        offset = load_codes(ptr, here.i, here.mask).to(tl.float32) * codes.power_of_two(b)
        e = grid + offset
    elif BITS == 24:
        e = load_pair(ptr, beside, here.i, mask)
    elif BITS == 32:
        e = load(ptr, here.i, mask)
    return Average(e, grid, offset)


@triton.jit
def store_grid(ptr, scales, here, grid, offset, increment, back, u, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """What lay at grid + offset and moves by the increment, beside its weight as it will be read back; dithered by u,
    in [0, 1)."""
    b = codes.grid_scale(codes.ranks(((grid - back) + offset) + increment, BLOCK), BITS)
    code = codes.grid_code(offset, grid, increment, back, codes.each(b, BLOCK), u, BITS)
    tl.store(ptr + here.i, code.to(ptr.dtype.element_ty), mask=here.mask)
    codes.store_scales(scales, here.at, here.end, b, BLOCK)


@triton.jit
def store_apart(ptr, rest, here, e, h, moves, BITS: tl.constexpr):
    """What lies by itself, in the elements `moves`."""
    if BITS == 24:
        store_pair(ptr, rest, here.i, codes.rounded(settled(e), h >> 24, 24), moves, 24)
    elif BITS == 32:
        store(ptr, here.i, e, moves)


@triton.jit
def store_average(ptr, beside, here, moves, was, e, back, h, spread, share, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """`was`: where it lay before. On a grid it moves by its share of the way to the weight, and is written also where
    it rests; otherwise it is `e`, in the elements `moves`."""
    if BITS == 8 or BITS == 16:
        copy = share == 1.0
        grid = tl.where(copy, back, was.grid)
        offset = tl.where(copy, 0.0, was.offset)
        increment = share * (back - (grid + offset))
        u = codes.evenly(codes.bits_of(spread), BLOCK)
        store_grid(ptr, beside, here, grid, offset, increment, back, u, BITS, BLOCK)
    else:
        store_apart(ptr, beside, here, e, h, moves, BITS)
