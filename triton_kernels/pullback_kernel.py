"""The pullback around its rule: scalars, round, flags."""

from __future__ import annotations

from collections import namedtuple

import torch
import triton
import triton.language as tl

from ..definitions import PULLBACK
from .checks import Call, Play, require
from .pace_kernel import add_statistics, store_gain
from .pullback import PullbackScalars, pullback_rule
from .scalars import average_moves, gain_weight, power, single, store_fields
from .storage import load, store

PullbackOptions = namedtuple("PullbackOptions", [option.name for option in PULLBACK.options])
Flags = namedtuple("PullbackFlags", PULLBACK.flags)
FIELDS = PullbackScalars._fields


def play(call: Call) -> Play:
    gain = call.options["gain"]
    pull = call.options["lambda_pullback"] != 0.0 if gain is None else gain != 0.0
    before, moment = call.has("before"), call.has("v")
    grid = any(t.dtype in (torch.int8, torch.int16) for t in call.lists["e"])
    require(
        not grid or before or not call.params,
        "befores must not be empty where emas are int8 or int16, which are read beside them",
    )
    require(grid or pull or not before, "befores must be empty where nothing pulls")
    require(pull or not moment, "second_moments must be empty where nothing pulls")
    require(gain is None or not moment, "second_moments must be empty where gain is given")
    before = before and pull and not call.options["pullback_from_step"]
    flags = Flags(before, moment, pull, True, call.tensors["stats"] is not None)
    return Play(flags, may_be_empty={"before": True, "v": gain is not None or not pull})


@triton.jit
def pullback_scalars(options, given, to):
    o = PullbackOptions(*options)
    t = given.t
    w_gain = gain_weight(o, t)
    gain = tl.where(o.gain == o.gain, o.gain, o.lr * o.lambda_pullback * w_gain)  # but for 1 / D
    fields = PullbackScalars(
        inv_bias2=single(1.0 / (1.0 - power(o.beta2, t + o.step_offset))),
        eps=single(o.eps),
        gain=single(gain),
        gain_cap=single(tl.where(o.clamp_pullback != 0.0, 1.0, float("inf"))),
        weight=single(tl.where(o.ema_kappa == o.ema_kappa, w_gain, o.beta_ema)),
        moves=single(average_moves(o, t)),
    )
    store_fields(to.scalars, fields, to.mask)
    store_gain(o, gain, t, to)
    return fields


@triton.jit
def pullback_round(
    sums, fields, row_ptr, operands, at, end, F: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr
):
    """The elements of one block before `end`."""
    s = PullbackScalars(*fields)
    x_ptr, before_ptr, v_ptr, e_ptr = operands
    i = at + tl.arange(0, BLOCK)
    mask = i < end
    moves = i < tl.where(s.moves != 0.0, end, at)
    x = load(x_ptr, i, mask if F.pull or F.stats else moves)
    before = load(before_ptr, i, mask, x)
    v = load(v_ptr, i, mask, x)
    e = load(e_ptr, i, mask if F.pull else moves)
    r = pullback_rule(s, x, before, v, e, F.before, F.moment, F.pull)
    if F.pull:
        store(x_ptr, i, r.x, mask)
    store(e_ptr, i, r.e, moves)  # if it does not move, this costs no memory access
    if F.stats:
        sums = add_statistics(sums, r, mask, VECTOR)
    return sums
