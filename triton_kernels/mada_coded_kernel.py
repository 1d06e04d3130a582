"""MADA where weights or states lie in the formats of :mod:`.codes`: as PACE (pace_coded_kernel.py). Where the last step
is redone, its moments go on to the new step as they are in registers, and are rounded once, where they are stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..definitions import MADA
from . import coded, codes, mada_kernel
from .checks import Call, Play
from .mada import mada_weights
from .mada_kernel import PULL, STEP, MadaOptions, last_gradient, mada_scalars, moved
from .pace import PaceScalars
from .scalars import load_fields, store_fields
from .storage import load

Flags = coded.with_bits(mada_kernel.Flags, MADA, "stochastic", "nearest")
FIELDS = (*mada_kernel.FIELDS, *coded.ROUNDING)
ROUNDING = tl.constexpr(len(mada_kernel.FIELDS))

# Which bits of the dither are an operand's own. Of the gradients the one that is new is rounded, wherever it goes: what
# was read from bfloat16 comes through as it is.
_OWN = {o.symbol: o.dither for o in MADA.operands}
M_BITS, N_BITS, W_BITS, L_BITS, G_BITS = (tl.constexpr(_OWN[symbol]) for symbol in ("m", "n", "w", "l", "last_g"))


def play(call: Call) -> Play:
    plain, o = mada_kernel.play(call), call.options
    # As on the CPU and in torch an average pulls also by 0, which of an infinite weight makes NaN.
    flags = plain.flags._replace(pull=plain.flags.average and plain.flags.adam)
    return Play(Flags(*flags, o["stochastic_rounding"], o["second_max"]), plain.may_be_empty)


@triton.jit
def mada_coded_scalars(options, given, to):
    o = MadaOptions(*options)
    pull = mada_scalars(options, given, to)
    rounding = coded.rounding(given.t, o.ema_update_freq, pull.moves, pull.weight)
    store_fields(to.scalars + ROUNDING, rounding, to.mask)


@triton.jit
def mada_coded_round(
    sums, fields, row_ptr, operands, at, end, F: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr
):
    """The elements of one block that lie before `end`."""
    x_ptr, g_ptr, m_ptr, v_ptr, n_ptr, w_ptr, l_ptr, last_ptr, older_ptr, e_ptr = operands[:10]
    x_rest, _, m_scales, v_scales, n_scales, _, l_scales, _, _, e_beside = operands[10:]
    here = coded.elements(at, end, BLOCK)
    first = tl.load(row_ptr + (2 * STEP + PULL)) != 0.0
    g = tl.load(row_ptr + 2 * STEP) * load(g_ptr, here.i, here.mask)
    m = coded.load_moment(m_ptr, m_scales, here, g, F.m, BLOCK)
    v = coded.load_square(v_ptr, v_scales, here, g, F.v, BLOCK)
    n = coded.load_moment(n_ptr, n_scales, here, g, F.n, BLOCK)
    w = load(w_ptr, here.i, here.mask, g)
    l = coded.load_moment(l_ptr, l_scales, here, g, F.l, BLOCK)  # noqa: E741
    last_g = last_gradient(first, last_ptr, here.i, here.mask, g, F)
    older_g = load(older_ptr, here.i, here.mask, g)
    r = moved(sums, row_ptr, g, last_g, older_g, m, n, v, w, l, here.mask, F, VECTOR)
    pull = PaceScalars(*load_fields(row_ptr + 2 * STEP, PULL))
    key, spread, share = load_fields(row_ptr + ROUNDING, 3)
    moves = here.i < tl.where(pull.moves != 0.0, end, at)
    x = coded.load_weight(x_ptr, x_rest, here, F.x)
    was = coded.load_average(e_ptr, e_beside, here, here.mask if F.pull else moves, x, F.e, BLOCK)
    a = mada_weights(pull, x, was.e, r.update, r.inv_D, F.pull, F.average and F.e >= 24)
    if F.adam:
        h = codes.dither(a.x, r.v, codes.bits_of(key))
    else:
        h = codes.dither_by(a.x, codes.settled(r.l), codes.bits_of(key))
    coded.store_moment(m_ptr, m_scales, here, r.m, codes.own_bits(h, M_BITS), F.m, BLOCK)
    coded.store_square(v_ptr, v_scales, here, r.v, h, F.v, BLOCK)
    coded.store_moment(n_ptr, n_scales, here, r.n, codes.own_bits(h, N_BITS), F.n, BLOCK)
    coded.store_dithered(w_ptr, here.i, r.w, codes.own_bits(h, W_BITS), here.mask, F.w)
    coded.store_moment(l_ptr, l_scales, here, r.l, codes.own_bits(h, L_BITS), F.l, BLOCK)
    back = coded.store_weight(x_ptr, x_rest, here, a.x, h, F.x)
    coded.store_average(e_ptr, e_beside, here, moves, was, a.e, back, h, spread, share, F.e, BLOCK)
    own = codes.own_bits(h, G_BITS)
    if F.lag and F.diff:
        if F.stay:
            coded.store_dithered(older_ptr, here.i, last_g, own, here.mask, F.older_g)
            coded.store_dithered(last_ptr, here.i, g, own, here.mask, F.last_g)
        else:  # the caller exchanges the two
            coded.store_dithered(older_ptr, here.i, g, own, here.mask, F.older_g)
            coded.store_dithered(last_ptr, here.i, g, own, here.i < tl.where(first, end, at), F.last_g)
    else:
        coded.store_dithered(last_ptr, here.i, g, own, here.mask, F.last_g)
    return r.sums
