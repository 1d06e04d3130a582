"""PACE with weights or states in the formats of :mod:`.codes`: the same rule, between decoding and encoding.

All roundings are dithered by the weight and the second moment before any of them is rounded, and an average on the grid
is encoded beside the weight as it will be read back: ``csrc/cpu/coded.h``.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import torch
import triton
import triton.language as tl

from ..definitions import PACE
from . import codes, pace_kernel
from .checks import Call, Play
from .codes import float_of, settled
from .pace import PaceScalars, pace_rule
from .pace_kernel import PaceOptions, add_statistics, pace_fields, store_gain
from .scalars import gain_weight, store_fields
from .storage import load, store

# PACE's switches, and whether weights in bfloat16 are rounded by dither. Then what a tensor's formats are, as bits: x
# 24 or 32 with a rest, 16 by dither, 0 plain; m, v and e 8 or 16 (e also 24) in codes, 32 in float32, 0 not in play.
Flags = namedtuple("CodedFlags", (*PACE.flags, "stochastic", "x", "m", "v", "e"), defaults=(0, 0, 0, 0))

# The scalars of PACE; the bits of two uint32, what codes are dithered by and what averages on a grid are; and how far
# such an average moves, 0 if it does not.
CodedScalars = namedtuple("CodedScalars", (*PaceScalars._fields, "key", "spread", "share"))
FIELDS = CodedScalars._fields

Dtypes = tuple[torch.dtype | None, ...]
_RESTS = {None: 0, torch.int16: 32, torch.int8: 24}
_STATES = {None: 0, torch.float32: 32, torch.bfloat16: 16, torch.uint8: 8}
_AVERAGES = {None: 0, torch.float32: 32, torch.bfloat16: 24, torch.int16: 16, torch.int8: 8}


def play(call: Call) -> Play:
    plain = pace_kernel.play(call)
    return Play(Flags(*plain.flags, call.options["stochastic_rounding"]), plain.may_be_empty)


def of_formats(flags: Any, operands: Dtypes, beside: Dtypes) -> Any:
    """The flags for tensors in these formats."""
    x, _, m, v, e = operands
    dithered = flags.stochastic and x == torch.bfloat16
    bits = _RESTS[beside[0]] or 16 * dithered
    return flags._replace(x=bits, m=_STATES[m], v=_STATES[v], e=_AVERAGES[e])


@triton.jit
def pace_coded_scalars(options, given, to):
    o = PaceOptions(*options)
    fields = pace_fields(o, given.t, given.factor)
    store_fields(to.scalars, fields, to.mask)
    moves = tl.floor(given.t / o.ema_update_freq)
    key = float_of(codes.mixed(codes.low_word(given.t) * codes.GOLDEN))
    spread = float_of((codes.low_word(moves) >> 1) * codes.GOLDEN)
    share = tl.where(fields.moves != 0.0, fields.weight, 0.0)
    store_fields(to.scalars + len(fields), (key, spread, share), to.mask)
    store_gain(o, o.lr * o.lambda_pullback * gain_weight(o, given.t), given.t, to)


@triton.jit
def load_codes(ptr, i, mask):
    return tl.load(ptr + i, mask=mask, other=0)


@triton.jit
def load_pair(ptr, rest_ptr, i, mask):
    return codes.joined(load_codes(ptr, i, mask), load_codes(rest_ptr, i, mask))


@triton.jit
def store_pair(ptr, rest_ptr, i, u, mask, BITS: tl.constexpr):
    """Settled bits, of which there are so many."""
    tl.store(ptr + i, codes.high_part(u).to(tl.uint16), mask=mask)
    tl.store(rest_ptr + i, codes.rest_of(u, BITS), mask=mask)


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


@triton.jit
def pace_coded_round(
    sums, fields, row_ptr, operands, at, end, F: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr
):
    """The elements of one block before `end`."""
    s = CodedScalars(*fields)
    x_ptr, g_ptr, m_ptr, v_ptr, e_ptr, x_rest, _, m_scales, v_scales, e_beside = operands
    i = at + tl.arange(0, BLOCK)
    mask = i < end
    moves = i < tl.where(s.moves != 0.0, end, at)

    x = load_pair(x_ptr, x_rest, i, mask) if F.x >= 24 else load(x_ptr, i, mask)
    g = load(g_ptr, i, mask)
    m = g
    if F.m == 8:
        m = codes.load_m(load_codes(m_ptr, i, mask), codes.each(codes.load_scales(m_scales, at, end, BLOCK), BLOCK))
    elif F.m > 0:
        m = load(m_ptr, i, mask)
    if F.v == 8:
        v = codes.load_v(load_codes(v_ptr, i, mask), codes.each(codes.load_scales(v_scales, at, end, BLOCK), BLOCK))
    else:
        v = load(v_ptr, i, mask)
    e = x
    if F.e == 8 or F.e == 16:
        b = codes.each(codes.larger(codes.load_scales(e_beside, at, end, BLOCK), 1), BLOCK)
        place = codes.grid(x, b)
        offset = load_codes(e_ptr, i, mask).to(tl.float32) * codes.power_of_two(b)
        e = place + offset
    elif F.e == 24:
        e = load_pair(e_ptr, e_beside, i, mask if F.pull else moves)
    elif F.e == 32:
        e = load(e_ptr, i, mask if F.pull else moves)

    r = pace_rule(s, g, x, m, v, e, F.moment, F.pull, F.average and F.e >= 24)

    h = codes.dither(r.x, r.v, codes.bits_of(s.key))
    if F.m == 8:
        b = codes.mu_scale(codes.ranks(r.m, BLOCK), 7)
        tl.store(m_ptr + i, codes.store_m(r.m, codes.each(b, BLOCK), h), mask=mask)
        codes.store_scales(m_scales, at, end, b, BLOCK)
    elif F.m == 16:
        u = codes.rounded(settled(r.m), h, 16)
        tl.store(m_ptr + i, codes.high_part(u).to(tl.uint16), mask=mask)
    elif F.m == 32:
        store(m_ptr, i, r.m, mask)
    if F.v == 8:
        new = codes.settled_square(r.v)
        b = codes.mu_scale(codes.ranks(new, BLOCK), 8)
        tl.store(v_ptr + i, codes.store_v(new, codes.each(b, BLOCK), h), mask=mask)
        codes.store_scales(v_scales, at, end, b, BLOCK)
    elif F.v == 16:
        u = codes.rounded(settled(r.v), h >> 16, 16)
        tl.store(v_ptr + i, codes.high_part(u).to(tl.uint16), mask=mask)
    else:
        store(v_ptr, i, r.v, mask)

    back = r.x  # the weight as it will be read back
    if F.x > 0:
        u = settled(r.x)
        if F.x < 32:
            u = codes.rounded(u, h, F.x)
            back = float_of(u)
        if F.x == 16:
            tl.store(x_ptr + i, codes.high_part(u).to(tl.uint16), mask=mask)
        else:
            store_pair(x_ptr, x_rest, i, u, mask, F.x)
    else:
        store(x_ptr, i, r.x, mask)
        back = read_back(x_ptr, r.x)

    if F.e == 8 or F.e == 16:
        copy = s.share == 1.0
        place = tl.where(copy, back, place)
        offset = tl.where(copy, 0.0, offset)
        increment = s.share * (back - (place + offset))
        b = codes.grid_scale(codes.ranks(((place - back) + offset) + increment, BLOCK), F.e)
        u = codes.evenly(codes.bits_of(s.spread), BLOCK)
        code = codes.grid_code(offset, place, increment, back, codes.each(b, BLOCK), u, F.e)
        tl.store(e_ptr + i, code.to(e_ptr.dtype.element_ty), mask=mask)
        codes.store_scales(e_beside, at, end, b, BLOCK)
    elif F.e == 24:
        store_pair(e_ptr, e_beside, i, codes.rounded(settled(r.e), h >> 24, 24), moves, 24)
    elif F.e == 32:
        store(e_ptr, i, r.e, moves)
    if F.stats:
        sums = add_statistics(sums, r, mask, VECTOR)
    return sums
