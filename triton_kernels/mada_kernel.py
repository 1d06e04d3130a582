"""MADA's rule in the sweep."""

from __future__ import annotations

import triton
import triton.language as tl

from .mada import mada_rule, mada_weights
from .scalars import (
    FACTOR_WIDTH,
    MADA_FIRST,
    MADA_PULL,
    MADA_REDO,
    MADA_WIDTH,
    load_mada_scalars,
    load_pace_scalars,
    skipped,
)
from .storage import load, store
from .sums import HYPER_WIDTH, add_terms, merged_terms, no_sums, store_terms, total_terms
from .sweep import GROUP, find_stretch, operand, whole_groups
from .table import LAST_G, OLDER_G, E, G, L, M, N, V, W, X


@triton.jit
def _mada_round(
    sums,
    row_ptr,
    x_ptr,
    g_ptr,
    m_ptr,
    n_ptr,
    v_ptr,
    w_ptr,
    l_ptr,
    last_ptr,
    older_ptr,
    e_ptr,
    at,
    end,
    X_FORMAT: tl.constexpr,
    G_FORMAT: tl.constexpr,
    LAG: tl.constexpr,
    DIFF: tl.constexpr,
    SECOND: tl.constexpr,
    LION: tl.constexpr,
    ADAM: tl.constexpr,
    AVERAGE: tl.constexpr,
    PULL: tl.constexpr,
    ROLES_STAY: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The elements of one block that lie before `end`; what they add to the sums of the hypergradients."""
    # Scalars are loaded where they are used, and anew for each block, from the L1 cache: all of them together, some 60,
    # would take as many registers as the operands.
    i = at + tl.arange(0, BLOCK)
    mask = i < end
    first = tl.load(row_ptr + MADA_FIRST) != 0.0
    grad_factor = tl.load(row_ptr + MADA_PULL)
    g = grad_factor * load(g_ptr + i, mask, G_FORMAT)
    m, n, v, w, l, last_g, older_g = g, g, g, g, g, g, g  # noqa: E741
    if ADAM:
        m = load(m_ptr + i, mask, tl.float32)
        v = load(v_ptr + i, mask, tl.float32)
    if DIFF:
        n = load(n_ptr + i, mask, tl.float32)
    if SECOND:
        w = load(w_ptr + i, mask, tl.float32)
    if LION:
        l = load(l_ptr + i, mask, tl.float32)  # noqa: E741
    if LAG or DIFF:  # where no gradient was kept yet, this one, so that d = g − g
        last_g = tl.where(first, g, load(last_ptr + i, mask, tl.float32))
    if LAG and DIFF:
        older_g = load(older_ptr + i, mask, tl.float32)
    if LAG:  # the moments that are kept are those before the last step: it is redone, and they become those after it
        redo = load_mada_scalars(row_ptr + MADA_REDO)
        last = mada_rule(redo, last_g, older_g, g, m, n, v, w, l, ADAM, DIFF, SECOND, LION, AVERAGE, True)
        sums = add_terms(sums, last.terms, mask, DIFF, SECOND, LION, VECTOR)
        m, n, v, w, l = last.m, last.n, last.v, last.w, last.l  # noqa: E741
    now = load_mada_scalars(row_ptr)
    r = mada_rule(now, g, last_g, g, m, n, v, w, l, ADAM, DIFF, SECOND, LION, AVERAGE, False)
    if not LAG:
        m, n, v, w, l = r.m, r.n, r.v, r.w, r.l  # noqa: E741
    # Weights and the average come last, where fewer registers are taken.
    pull = load_pace_scalars(row_ptr + MADA_PULL)
    moves = i < tl.where(pull.moves != 0.0, end, at)
    x = load(x_ptr + i, mask, X_FORMAT)
    e = x
    if PULL:
        e = load(e_ptr + i, mask, tl.float32)
    elif AVERAGE:
        e = load(e_ptr + i, moves, tl.float32)
    a = mada_weights(pull, x, e, r.update, r.inv_D, PULL, AVERAGE)
    store(x_ptr + i, a.x, mask, X_FORMAT)
    if ADAM:
        store(m_ptr + i, m, mask, tl.float32)
        store(v_ptr + i, v, mask, tl.float32)
    if DIFF:
        store(n_ptr + i, n, mask, tl.float32)
    if SECOND:
        store(w_ptr + i, w, mask, tl.float32)
    if LION:
        store(l_ptr + i, l, mask, tl.float32)
    if AVERAGE:
        store(e_ptr + i, a.e, moves, tl.float32)
    if LAG and DIFF:
        if ROLES_STAY:
            store(older_ptr + i, last_g, mask, tl.float32)
            store(last_ptr + i, g, mask, tl.float32)
        else:  # the caller exchanges the two
            store(older_ptr + i, g, mask, tl.float32)
            store(last_ptr + i, g, i < tl.where(first, end, at), tl.float32)
    elif LAG or DIFF:
        store(last_ptr + i, g, mask, tl.float32)
    return sums


@triton.jit(do_not_specialize=["first_block"])
def _mada_kernel(
    table_ptr,
    blocks_ptr,
    scalars_ptr,
    factors_ptr,
    rows_ptr,
    found_inf_ptr,
    first_block,
    X_FORMAT: tl.constexpr,
    G_FORMAT: tl.constexpr,
    LAG: tl.constexpr,
    DIFF: tl.constexpr,
    SECOND: tl.constexpr,
    LION: tl.constexpr,
    ADAM: tl.constexpr,
    AVERAGE: tl.constexpr,
    PULL: tl.constexpr,
    ROLES_STAY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One step of a stretch of one tensor; its sums of the hypergradients, where LAG, go to its place in `rows`."""
    if skipped(found_inf_ptr):
        return
    part = find_stretch(table_ptr, blocks_ptr, first_block)
    row_ptr = scalars_ptr + part.tensor * MADA_WIDTH
    x_ptr = operand(part, X, X_FORMAT, ALIGNED)
    g_ptr = operand(part, G, G_FORMAT, ALIGNED)
    m_ptr = operand(part, M, tl.float32, ALIGNED)
    n_ptr = operand(part, N, tl.float32, ALIGNED)
    v_ptr = operand(part, V, tl.float32, ALIGNED)
    w_ptr = operand(part, W, tl.float32, ALIGNED)
    l_ptr = operand(part, L, tl.float32, ALIGNED)
    last_ptr = operand(part, LAST_G, tl.float32, ALIGNED)
    older_ptr = operand(part, OLDER_G, tl.float32, ALIGNED)
    e_ptr = operand(part, E, tl.float32, ALIGNED)
    whole = whole_groups(part.count)
    sums = no_sums(BLOCK // VECTOR)
    for at in range(0, whole, BLOCK):
        sums = _mada_round(
            sums, row_ptr, x_ptr, g_ptr, m_ptr, n_ptr, v_ptr, w_ptr, l_ptr, last_ptr, older_ptr, e_ptr,
            at, whole, X_FORMAT, G_FORMAT, LAG, DIFF, SECOND, LION, ADAM, AVERAGE, PULL, ROLES_STAY, BLOCK, VECTOR,
        )  # fmt: skip
    totals = total_terms(sums)
    if whole < part.count:
        rest = _mada_round(
            no_sums(GROUP), row_ptr, x_ptr, g_ptr, m_ptr, n_ptr, v_ptr, w_ptr, l_ptr, last_ptr, older_ptr,
            e_ptr, whole, part.count, X_FORMAT, G_FORMAT, LAG, DIFF, SECOND, LION, ADAM, AVERAGE, PULL, ROLES_STAY,
            GROUP, 1,
        )  # fmt: skip
        totals = merged_terms(totals, total_terms(rest))
    if LAG:
        store_terms(rows_ptr + part.place * HYPER_WIDTH, factors_ptr + part.tensor * FACTOR_WIDTH, totals)
