"""Schedule-free AdamW where weights or states lie in the formats of :mod:`.codes`: as PACE (pace_coded_kernel.py), but
that z on a grid moves by its step, which the rule leaves in its place, and is dithered as everything else is."""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl

from ..definitions import SCHEDULE_FREE
from . import coded, codes, schedule_free_kernel
from .checks import Call, Play
from .schedule_free import ScheduleFreeScalars, schedule_free_rule
from .schedule_free_kernel import schedule_free_scalars
from .storage import load

Flags = coded.with_bits(schedule_free_kernel.Flags, SCHEDULE_FREE, "stochastic")
CodedScalars = namedtuple("CodedScalars", (*ScheduleFreeScalars._fields, "key"))
FIELDS = CodedScalars._fields
KEY = tl.constexpr(FIELDS.index("key"))
Z_BITS = tl.constexpr(next(o.dither for o in SCHEDULE_FREE.operands if o.symbol == "z"))


def play(call: Call) -> Play:
    plain = schedule_free_kernel.play(call)
    return Play(Flags(*plain.flags, call.options["stochastic_rounding"]), plain.may_be_empty)


@triton.jit
def schedule_free_coded_scalars(options, given, to):
    schedule_free_scalars(options, given, to)
    tl.store(to.scalars + KEY, coded.dither_key(given.t), mask=to.mask)


@triton.jit
def schedule_free_coded_round(
    sums, fields, row_ptr, operands, at, end, F: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr
):
    """The elements of one block that lie before `end`."""
    s = CodedScalars(*fields)
    y_ptr, g_ptr, v_ptr, z_ptr, y_rest, _, v_scales, z_beside = operands
    here = coded.elements(at, end, BLOCK)
    g = load(g_ptr, here.i, here.mask)
    y = coded.load_weight(y_ptr, y_rest, here, F.y)
    v = coded.load_square(v_ptr, v_scales, here, g, F.v, BLOCK)
    was = coded.load_average(z_ptr, z_beside, here, here.mask, y, F.z, BLOCK)
    r = schedule_free_rule(s, g, y, v, was.e, F.increment)
    h = codes.dither(r.y, r.v, codes.bits_of(s.key))
    coded.store_square(v_ptr, v_scales, here, r.v, h, F.v, BLOCK)
    back = coded.store_weight(y_ptr, y_rest, here, r.y, h, F.y)
    own = codes.own_bits(h, Z_BITS)
    if F.increment:
        coded.store_grid(z_ptr, z_beside, here, was.grid, was.offset, r.z, back, codes.unit_of(own), F.z, BLOCK)
    else:
        coded.store_apart(z_ptr, z_beside, here, r.z, own, here.mask, F.z)
    return sums
