"""PACE around its rule: scalars, round, flags, and what a block of it sums."""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl

from ..definitions import PACE
from .checks import Call, Play
from .pace import PaceScalars, pace_rule
from .scalars import average_moves, double, gain_weight, grad_factor, power, single, store_fields
from .storage import load, store
from .sums import add

PaceOptions = namedtuple("PaceOptions", [option.name for option in PACE.options])
Flags = namedtuple("PaceFlags", PACE.flags)
FIELDS = PaceScalars._fields


def play(call: Call) -> Play:
    moment, pull, average = (call.options["beta1"] != 0.0, call.options["lambda_pullback"] != 0.0, call.has("e"))
    flags = Flags(moment, pull and average, average, call.tensors["stats"] is not None)
    return Play(flags, may_be_empty={"m": not moment, "e": not pull})


@triton.jit
def pace_fields(o, t, factor):
    """PaceScalars, from options that contain PACE's."""
    w_gain = gain_weight(o, t)
    w = tl.where(o.ema_kappa == o.ema_kappa, w_gain, o.beta_ema)
    return PaceScalars(
        grad_factor=grad_factor(o, factor),
        beta1=single(o.beta1),
        one_minus_beta1=single(1.0 - o.beta1),
        beta2=single(o.beta2),
        one_minus_beta2=single(1.0 - o.beta2),
        inv_bias2=single(1.0 / (1.0 - power(o.beta2, t))),
        eps=single(o.eps),
        decay=single(1.0 - o.lr * o.weight_decay),
        shrink=single(o.lr * o.weight_decay),
        step_size=single(o.lr / (1.0 - power(o.beta1, t))),
        gain=single(o.lr * o.lambda_pullback * w_gain),
        gain_cap=single(tl.where(o.clamp_pullback != 0.0, 1.0, float("inf"))),
        weight=single(w),
        from_step=single(o.pullback_from_step),
        moves=single(average_moves(o, t)),
    )


@triton.jit
def store_gain(o, gain, t, to):
    """The factors and the cap of the statistics: averaging weight, gain, cap."""
    if to.factors is not None:
        tl.store(to.factors, gain_weight(o, t), mask=to.mask)
        tl.store(to.factors + 1, gain, mask=to.mask)
        tl.store(to.factors + 2, tl.where(o.clamp_pullback != 0.0, double(1.0), double(float("inf"))), mask=to.mask)


@triton.jit
def pace_scalars(options, given, to):
    o = PaceOptions(*options)
    store_fields(to.scalars, pace_fields(o, given.t, given.factor), to.mask)
    store_gain(o, o.lr * o.lambda_pullback * gain_weight(o, given.t), given.t, to)


@triton.jit
def pace_round(sums, fields, row_ptr, operands, at, end, F: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """The elements of one block before `end`."""
    s = PaceScalars(*fields)
    x_ptr, g_ptr, m_ptr, v_ptr, e_ptr = operands
    i = at + tl.arange(0, BLOCK)
    mask = i < end
    moves = i < tl.where(s.moves != 0.0, end, at)
    x = load(x_ptr, i, mask)
    g = load(g_ptr, i, mask)
    v = load(v_ptr, i, mask)
    m = load(m_ptr, i, mask, g)
    e = load(e_ptr, i, mask if F.pull else moves, x)
    r = pace_rule(s, g, x, m, v, e, F.moment, F.pull, F.average)
    store(x_ptr, i, r.x, mask)
    store(v_ptr, i, r.v, mask)
    store(m_ptr, i, r.m, mask)
    store(e_ptr, i, r.e, moves)  # if it does not move, this costs no memory access
    if F.stats:
        sums = add_statistics(sums, r, mask, VECTOR)
    return sums


@triton.jit
def add_statistics(sums, r, mask, VECTOR: tl.constexpr):
    clipped = tl.where(r.lambda_ >= 1.0, 1.0, 0.0)
    squares = (r.adamw * r.adamw, r.pullback * r.pullback, r.update * r.update)
    return add(sums, (r.inv_D, r.clamped, clipped) + squares, r.inv_D, mask, VECTOR)  # noqa: RUF005


@triton.jit
def store_statistics(row_ptr, factors_ptr, sums, count):
    """A program's row: `block_stats` in csrc/stats.h, which explains weight, gain and cap."""
    weight = tl.load(factors_ptr)
    gain = tl.load(factors_ptr + 1)
    cap = tl.load(factors_ptr + 2)
    low = sums.low.to(tl.float32, bitcast=True).to(tl.float64)
    high = sums.high.to(tl.float32, bitcast=True).to(tl.float64)
    inv_D, clamped, clipped, adamw_sq, pullback_sq, update_sq = sums.terms
    raw = (weight * inv_D, weight * low, weight * high)
    effective = (gain * inv_D, gain * low, gain * high)
    least = tl.where(effective[1] > cap, cap, effective[1])  # keeps NaN
    most = tl.where(effective[2] > cap, cap, effective[2])
    tail = (clamped, least, most, clipped, adamw_sq, pullback_sq, update_sq)
    row = (count.to(tl.float64),) + raw + effective + tail  # noqa: RUF005
    for k in tl.static_range(len(row)):
        tl.store(row_ptr + k, row[k])
