"""Schedule-free AdamW around its rule: scalars, round, flags."""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl

from ..definitions import SCHEDULE_FREE
from .checks import Call, Play
from .scalars import grad_factor, power, single, store_fields
from .schedule_free import ScheduleFreeScalars, schedule_free_rule
from .storage import load, store

ScheduleFreeOptions = namedtuple("ScheduleFreeOptions", [option.name for option in SCHEDULE_FREE.options])
Flags = namedtuple("ScheduleFreeFlags", SCHEDULE_FREE.flags)
FIELDS = ScheduleFreeScalars._fields


def play(call: Call) -> Play:
    return Play(Flags(increment=False), may_be_empty={})


@triton.jit
def schedule_free_scalars(options, given, to):
    o = ScheduleFreeOptions(*options)
    t = tl.load(given.numbers) if given.numbers is not None else o.count
    share = tl.load(given.numbers + 1) if given.numbers is not None else o.share
    fields = ScheduleFreeScalars(
        grad_factor=grad_factor(o, given.factor),
        beta2=single(o.beta2),
        one_minus_beta2=single(1.0 - o.beta2),
        inv_bias2=single(1.0 / (1.0 - power(o.beta2, t))),
        eps=single(o.eps),
        weight_decay=single(o.weight_decay),
        share=single(share),
        y_size=single(o.lr * (1.0 - o.beta1 * (1.0 - share))),
        z_size=single(o.lr),
    )
    store_fields(to.scalars, fields, to.mask)


@triton.jit
def schedule_free_round(
    sums, fields, row_ptr, operands, at, end, F: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr
):
    """The elements of one block before `end`."""
    y_ptr, g_ptr, v_ptr, z_ptr = operands
    i = at + tl.arange(0, BLOCK)
    mask = i < end
    g = load(g_ptr, i, mask)
    y = load(y_ptr, i, mask)
    v = load(v_ptr, i, mask)
    z = load(z_ptr, i, mask)
    r = schedule_free_rule(ScheduleFreeScalars(*fields), g, y, v, z, F.increment)
    store(y_ptr, i, r.y, mask)
    store(v_ptr, i, r.v, mask)
    store(z_ptr, i, r.z, mask)
    return sums
