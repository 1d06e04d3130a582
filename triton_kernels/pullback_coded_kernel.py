"""The pullback where averages lie in the formats of :mod:`.codes`. On a grid an average was written beside the weights
as they were before the base's step, so it is read beside these; it is written beside the weights as they are read back.
Without a second moment of the step, the dither is of the new average."""

from __future__ import annotations

from collections import namedtuple

import torch
import triton
import triton.language as tl

from ..definitions import PULLBACK
from . import coded, codes, pullback_kernel
from .checks import Call, Play
from .pace_kernel import add_statistics
from .pullback import PullbackScalars, pullback_rule
from .pullback_kernel import PullbackOptions, pullback_scalars
from .scalars import store_fields
from .storage import load

# `before` says whether those weights are read; whether the distance is measured from them is a flag of its own.
Flags = coded.with_bits(pullback_kernel.Flags, PULLBACK, "from_before")
CodedScalars = namedtuple("CodedScalars", (*PullbackScalars._fields, *coded.ROUNDING))
FIELDS = CodedScalars._fields


def play(call: Call) -> Play:
    plain = pullback_kernel.play(call)
    grid = any(t.dtype in (torch.int8, torch.int16) for t in call.lists["e"])
    flags = plain.flags._replace(before=grid or plain.flags.before)
    return Play(Flags(*flags, from_before=plain.flags.before), plain.may_be_empty | {"before": not grid})


@triton.jit
def pullback_coded_scalars(options, given, to):
    o = PullbackOptions(*options)
    fields = pullback_scalars(options, given, to)
    rounding = coded.rounding(given.t, o.ema_update_freq, fields.moves, fields.weight)
    store_fields(to.scalars + len(fields), rounding, to.mask)


@triton.jit
def pullback_coded_round(
    sums, fields, row_ptr, operands, at, end, F: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr
):
    """The elements of one block that lie before `end`."""
    s = CodedScalars(*fields)
    x_ptr, before_ptr, v_ptr, e_ptr, _, _, _, e_beside = operands
    here = coded.elements(at, end, BLOCK)
    moves = here.i < tl.where(s.moves != 0.0, end, at)
    x = load(x_ptr, here.i, here.mask if F.pull or F.stats or F.e < 24 else moves)
    before = load(before_ptr, here.i, here.mask, x)
    v = load(v_ptr, here.i, here.mask, x)
    was = coded.load_average(e_ptr, e_beside, here, here.mask if F.pull else moves, before, F.e, BLOCK)
    r = pullback_rule(s, x, before, v, was.e, F.from_before, F.moment, F.pull)
    h = codes.dither_by(r.x, codes.settled(r.e), codes.bits_of(s.key))
    back = x
    if F.pull:
        back = coded.store_weight(x_ptr, None, here, r.x, h, 0)
    coded.store_average(e_ptr, e_beside, here, moves, was, r.e, back, h, s.spread, s.share, F.e, BLOCK)
    if F.stats:
        sums = add_statistics(sums, r, here.mask, VECTOR)
    return sums
