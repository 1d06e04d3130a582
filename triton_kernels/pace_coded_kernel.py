"""PACE with weights or states in the formats of :mod:`.codes`: the same rule, between decoding and encoding.

All roundings are dithered by the weight and the second moment before any of them is rounded, and an average on the grid
is encoded beside the weight as it will be read back: ``csrc/cpu/coded.h``.
"""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl

from ..definitions import PACE
from . import coded, codes, pace_kernel
from .checks import Call, Play
from .pace import PaceScalars, pace_rule
from .pace_kernel import PaceOptions, add_statistics, pace_fields, store_gain
from .scalars import gain_weight, store_fields
from .storage import load

Flags = coded.with_bits(pace_kernel.Flags, PACE, "stochastic")
CodedScalars = namedtuple("CodedScalars", (*PaceScalars._fields, *coded.ROUNDING))
FIELDS = CodedScalars._fields


def play(call: Call) -> Play:
    plain = pace_kernel.play(call)
    return Play(Flags(*plain.flags, call.options["stochastic_rounding"]), plain.may_be_empty)


@triton.jit
def pace_coded_scalars(options, given, to):
    o = PaceOptions(*options)
    fields = pace_fields(o, given.t, given.factor)
    store_fields(to.scalars, fields, to.mask)
    rounding = coded.rounding(given.t, o.ema_update_freq, fields.moves, fields.weight)
    store_fields(to.scalars + len(fields), rounding, to.mask)
    store_gain(o, o.lr * o.lambda_pullback * gain_weight(o, given.t), given.t, to)


@triton.jit
def pace_coded_round(
    sums, fields, row_ptr, operands, at, end, F: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr
):
    """The elements of one block before `end`."""
    s = CodedScalars(*fields)
    x_ptr, g_ptr, m_ptr, v_ptr, e_ptr, x_rest, _, m_scales, v_scales, e_beside = operands
    here = coded.elements(at, end, BLOCK)
    moves = here.i < tl.where(s.moves != 0.0, end, at)
    x = coded.load_weight(x_ptr, x_rest, here, F.x)
    g = load(g_ptr, here.i, here.mask)
    m = coded.load_moment(m_ptr, m_scales, here, g, F.m, BLOCK)
    v = coded.load_square(v_ptr, v_scales, here, g, F.v, BLOCK)
    was = coded.load_average(e_ptr, e_beside, here, here.mask if F.pull else moves, x, F.e, BLOCK)
    r = pace_rule(s, g, x, m, v, was.e, F.moment, F.pull, F.average and F.e >= 24)
    h = codes.dither(r.x, r.v, codes.bits_of(s.key))
    coded.store_moment(m_ptr, m_scales, here, r.m, h, F.m, BLOCK)
    coded.store_square(v_ptr, v_scales, here, r.v, h, F.v, BLOCK)
    back = coded.store_weight(x_ptr, x_rest, here, r.x, h, F.x)
    coded.store_average(e_ptr, e_beside, here, moves, was, r.e, back, h, s.spread, s.share, F.e, BLOCK)
    if F.stats:
        sums = add_statistics(sums, r, here.mask, VECTOR)
    return sums
