"""MADA around its rule: scalars, round, flags, and what a block of it sums."""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl

from ..definitions import mada as known
from .checks import Call, Play, check_length, require
from .mada import MadaScalars, mada_rule, mada_weights
from .pace import PaceScalars
from .pace_kernel import pace_fields
from .scalars import gain_weight, load_fields, power, single, store_fields
from .storage import load, store
from .sums import add

MadaOptions = namedtuple("MadaOptions", [option.name for option in known.MADA.options])
Flags = namedtuple("MadaFlags", (*known.MADA.flags, "pull"))
Coefficients = namedtuple("Coefficients", known.COEFFICIENTS)

# The row of scalars: the new step's, those of the step that is redone, the pullback's, and whether no gradient was kept
# yet.
FIELDS = (*MadaScalars._fields, *(f"last {name}" for name in MadaScalars._fields), *PaceScalars._fields, "first")
STEP = tl.constexpr(len(MadaScalars._fields))
PULL = tl.constexpr(len(PaceScalars._fields))
DONE, REDO, NO_GRADIENT = map(tl.constexpr, (known.DONE, known.REDO, known.NO_GRADIENT))
REMEMBERED = tl.constexpr(len(known.LAST_SCALARS))
# The scalars of a step that leaves the moments as they are and has no sensitivities.
_ONES = ("beta1", "beta2", "beta3", "lion_beta2", "mean_old", "eps")
NO_STEP = tl.constexpr(tuple(float(name in _ONES) for name in MadaScalars._fields))


def play(call: Call) -> Play:
    """The lists that are not empty say what is in play."""
    o, learn = call.options, call.options["learn"]
    adam, diff, second, lion = (call.has(symbol) for symbol in "vnwl")
    lag, pull, average = learn != 0, o["lambda_pullback"] != 0.0, call.has("e")

    def in_play(name: str, vertex: float) -> bool:
        return bool(learn >> known.COEFFICIENTS.index(name) & 1) or o[name] != vertex

    require(
        adam or not (lag or diff or second or pull or in_play("gamma", 0.0)),
        "exp_avg_sqs may be empty only where gamma is 0 and nothing is learned or pulls",
    )
    require(lion or not in_play("gamma", 1.0), "exp_avg_lions may be empty only where gamma is fixed at 1")
    require(not adam or diff or not in_play("beta3", 0.0), "exp_avg_diffs may be empty only where beta3 is fixed at 0")
    require(
        not adam or second or not in_play("rho", 1.0), "second_exp_avg_sqs may be empty only where rho is fixed at 1"
    )
    missing = call.tensors["coefficients"] is None
    require(not (lag and missing), "coefficients may be missing only where nothing is learned")
    check_length("last_scalars", call.rows, call.params, None if lag or diff else "")
    stay = call.capturable and lag and diff
    flags = Flags(lag, diff, second, lion, adam, average, stay, pull and average and adam)
    empty = {"m": not adam, **dict.fromkeys("vnwl", True), "e": not pull}
    return Play(flags, may_be_empty=empty | {"last_g": not (lag or diff), "older_g": not (lag and diff)})


@triton.jit
def mada_fields(o, lr, q, t):
    bias1 = 1.0 - power(q.beta1, t)
    bias2 = 1.0 - power(q.beta2, t)
    pull_gain = lr * o.lambda_pullback * gain_weight(o, t)
    return MadaScalars(
        beta1=single(q.beta1),
        one_minus_beta1=single(1.0 - q.beta1),
        beta2=single(q.beta2),
        one_minus_beta2=single(1.0 - q.beta2),
        beta3=single(q.beta3),
        one_minus_beta3=single(1.0 - q.beta3),
        lion_beta1=single(o.lion_beta1),
        one_minus_lion_beta1=single(1.0 - o.lion_beta1),
        lion_beta2=single(o.lion_beta2),
        one_minus_lion_beta2=single(1.0 - o.lion_beta2),
        rho=single(q.rho),
        one_minus_rho=single(1.0 - q.rho),
        c=single(q.c),
        one_minus_c=single(1.0 - q.c),
        mean_new=single(1.0 / t),
        mean_old=single((t - 1.0) / t),
        eps=single(o.eps),
        inv_eps=single(1.0 / o.eps),
        inv_bias1=single(1.0 / bias1),
        inv_bias2=single(1.0 / bias2),
        adam_size=single(lr * q.gamma),
        lion_size=single(lr * (1.0 - q.gamma)),
        bias1_slope=single(t * power(q.beta1, t - 1.0) / bias1),
        bias2_slope=single(t * power(q.beta2, t - 1.0)),
        square_slope=single(2.0 * q.rho * (1.0 - q.beta2) / bias2),
        pull_gain=single(tl.where(o.pullback_from_step != 0.0, pull_gain, 0.0)),
        gain_cap=single(tl.where(o.clamp_pullback != 0.0, 1.0, float("inf"))),
        second_max=single(o.second_max),
    )


@triton.jit
def mada_factors(lr, q, t):
    """The factors common to all coordinates: h_q is the factor of q times the sum of the terms."""
    bias1 = 1.0 - power(q.beta1, t)
    bias2 = 1.0 - power(q.beta2, t)
    A = lr * q.gamma
    square = q.rho * (1.0 - q.beta2)
    return -A / bias1, A / bias2, A, A / bias2, A * square / bias2, lr


@triton.jit
def read_coefficients(ptr, o):
    """The coefficients: those whose bit of `learn` is set from memory, the others as given."""
    q = (o.beta1, o.beta2, o.beta3, o.rho, o.c, o.gamma)
    if ptr is not None:
        learn = o.learn.to(tl.int32)
        q = [tl.where((learn >> k & 1) != 0, tl.load(ptr + k), q[k]) for k in tl.tuple(range(len(q)))]
    return Coefficients(*q)


@triton.jit
def mada_scalars(options, given, to):
    """The scalars of the new step, of the last one, which is redone if its sums are needed, and of the pullback; and
    what this step leaves for the next."""
    o = MadaOptions(*options)
    t = given.t
    q = read_coefficients(given.numbers, o)
    store_fields(to.scalars, mada_fields(o, o.lr, q, t), to.mask)
    pull = pace_fields(o, t, given.factor)
    store_fields(to.scalars + 2 * STEP, pull, to.mask)
    if to.last is not None:
        last = [tl.load(to.last + k, mask=to.mask, other=0.0) for k in tl.tuple(range(REMEMBERED))]
        tl.store(to.scalars + (2 * STEP + PULL), (last[0] == NO_GRADIENT).to(tl.float32), mask=to.mask)
        if to.factors is not None:
            redo = last[0] > DONE
            last_q = Coefficients(last[2], last[3], last[4], last[5], last[6], last[7])
            fields = mada_fields(o, last[1], last_q, t - 1.0)
            for k in tl.static_range(len(fields) - 1):
                tl.store(to.scalars + (STEP + k), tl.where(redo, fields[k], NO_STEP[k]), mask=to.mask)
            tl.store(to.scalars + (2 * STEP - 1), fields.second_max, mask=to.mask)
            factors = mada_factors(last[1], last_q, t - 1.0)
            for k in tl.static_range(len(factors)):
                tl.store(to.factors + k, tl.where(redo, factors[k], 0.0), mask=to.mask)
        tl.store(to.last, REDO if to.factors is not None else DONE, mask=to.mask)
        tl.store(to.last + 1, o.lr, mask=to.mask)
        store_fields(to.last + 2, q, to.mask)
    return pull


# What a round has after the rule: the sums, the moments that are stored, and where the step leads to.
Moved = namedtuple("Moved", "sums m n v w l update inv_D")


@triton.jit
def last_gradient(first, last_ptr, i, mask, g, F: tl.constexpr):
    """Where no gradient was kept yet, this one, so that d = g − g."""
    last_g = g
    if F.lag or F.diff:
        last_g = tl.where(first, g, load(last_ptr, i, mask))
    return last_g


@triton.jit
def moved(sums, row_ptr, g, last_g, older_g, m, n, v, w, l, mask, F: tl.constexpr, VECTOR: tl.constexpr):  # noqa: E741
    """The rule, once for the new step and, with F.lag, before that for the last one."""
    # Scalars are loaded where they are used, and anew for each block, from the L1 cache: all of them together, some 60,
    # would take as many registers as the operands.
    if F.lag:  # the moments that are kept are those before the last step: it is redone, and they become those after it
        redo = MadaScalars(*load_fields(row_ptr + STEP, STEP))
        last = mada_rule(redo, last_g, older_g, g, m, n, v, w, l, F, True)
        sums = add(sums, last.terms, None, mask, VECTOR)
        m, n, v, w, l = last.m, last.n, last.v, last.w, last.l  # noqa: E741
    now = MadaScalars(*load_fields(row_ptr, STEP))
    r = mada_rule(now, g, last_g, g, m, n, v, w, l, F, False)
    if not F.lag:
        m, n, v, w, l = r.m, r.n, r.v, r.w, r.l  # noqa: E741
    return Moved(sums, m, n, v, w, l, r.update, r.inv_D)


@triton.jit
def mada_round(sums, fields, row_ptr, operands, at, end, F: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """The elements of one block that lie before `end`."""
    x_ptr, g_ptr, m_ptr, v_ptr, n_ptr, w_ptr, l_ptr, last_ptr, older_ptr, e_ptr = operands
    i = at + tl.arange(0, BLOCK)
    mask = i < end
    first = tl.load(row_ptr + (2 * STEP + PULL)) != 0.0
    g = tl.load(row_ptr + 2 * STEP) * load(g_ptr, i, mask)
    m = load(m_ptr, i, mask, g)
    v = load(v_ptr, i, mask, g)
    n = load(n_ptr, i, mask, g)
    w = load(w_ptr, i, mask, g)
    l = load(l_ptr, i, mask, g)  # noqa: E741
    last_g = last_gradient(first, last_ptr, i, mask, g, F)
    older_g = load(older_ptr, i, mask, g)
    r = moved(sums, row_ptr, g, last_g, older_g, m, n, v, w, l, mask, F, VECTOR)
    # Weights and the average come last, where fewer registers are taken.
    pull = PaceScalars(*load_fields(row_ptr + 2 * STEP, PULL))
    moves = i < tl.where(pull.moves != 0.0, end, at)
    x = load(x_ptr, i, mask)
    e = load(e_ptr, i, mask if F.pull else moves, x)
    a = mada_weights(pull, x, e, r.update, r.inv_D, F.pull, F.average)
    store(x_ptr, i, a.x, mask)
    store(m_ptr, i, r.m, mask)
    store(v_ptr, i, r.v, mask)
    store(n_ptr, i, r.n, mask)
    store(w_ptr, i, r.w, mask)
    store(l_ptr, i, r.l, mask)
    store(e_ptr, i, a.e, moves)
    if F.lag and F.diff:
        if F.stay:
            store(older_ptr, i, last_g, mask)
            store(last_ptr, i, g, mask)
        else:  # the caller exchanges the two
            store(older_ptr, i, g, mask)
            store(last_ptr, i, g, i < tl.where(first, end, at))
    else:
        store(last_ptr, i, g, mask)
    return r.sums


@triton.jit
def store_hypergradients(row_ptr, factors_ptr, sums, count):
    """A program's row: its sums times its tensor's factors (`mada_factors`)."""
    for k in tl.static_range(len(sums.terms)):
        tl.store(row_ptr + k, tl.load(factors_ptr + k) * sums.terms[k])
