"""PACE's rule in the sweep."""

from __future__ import annotations

import triton
import triton.language as tl

from .pace import pace_rule
from .scalars import PACE_WIDTH, STAT_WIDTH, load_pace_scalars, skipped
from .storage import load, store
from .sums import STATS_WIDTH, add_stats, merged_stats, no_stats, store_stats, total_stats
from .sweep import GROUP, find_stretch, operand, whole_groups
from .table import E, G, M, V, X


@triton.jit
def _pace_round(
    s,
    x_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    e_ptr,
    at,
    end,
    X_FORMAT: tl.constexpr,
    G_FORMAT: tl.constexpr,
    MOMENT: tl.constexpr,
    PULL: tl.constexpr,
    AVERAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The elements of one block that lie before `end`; which ones, and what the rule gave."""
    i = at + tl.arange(0, BLOCK)
    mask = i < end
    moves = i < tl.where(s.moves != 0.0, end, at)
    x = load(x_ptr + i, mask, X_FORMAT)
    g = load(g_ptr + i, mask, G_FORMAT)
    v = load(v_ptr + i, mask, tl.float32)
    m = g
    if MOMENT:
        m = load(m_ptr + i, mask, tl.float32)
    e = x
    if PULL:
        e = load(e_ptr + i, mask, tl.float32)
    elif AVERAGE:
        e = load(e_ptr + i, moves, tl.float32)
    r = pace_rule(s, g, x, m, v, e, MOMENT, PULL, AVERAGE)
    store(x_ptr + i, r.x, mask, X_FORMAT)
    store(v_ptr + i, r.v, mask, tl.float32)
    if MOMENT:
        store(m_ptr + i, r.m, mask, tl.float32)
    if AVERAGE:  # where it rests, this costs no memory access
        store(e_ptr + i, r.e, moves, tl.float32)
    return r, mask


@triton.jit(do_not_specialize=["first_block"])
def _pace_kernel(
    table_ptr,
    blocks_ptr,
    scalars_ptr,
    stat_scalars_ptr,
    rows_ptr,
    found_inf_ptr,
    first_block,
    X_FORMAT: tl.constexpr,
    G_FORMAT: tl.constexpr,
    MOMENT: tl.constexpr,
    PULL: tl.constexpr,
    AVERAGE: tl.constexpr,
    STATS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One step of a stretch of one tensor; its statistics, where STATS, go to its place in `rows`."""
    if skipped(found_inf_ptr):
        return
    part = find_stretch(table_ptr, blocks_ptr, first_block)
    s = load_pace_scalars(scalars_ptr + part.tensor * PACE_WIDTH)
    x_ptr = operand(part, X, X_FORMAT, ALIGNED)
    g_ptr = operand(part, G, G_FORMAT, ALIGNED)
    m_ptr = operand(part, M, tl.float32, ALIGNED)
    v_ptr = operand(part, V, tl.float32, ALIGNED)
    e_ptr = operand(part, E, tl.float32, ALIGNED)
    whole = whole_groups(part.count)
    sums = no_stats(BLOCK // VECTOR)
    for at in range(0, whole, BLOCK):
        r, mask = _pace_round(
            s, x_ptr, g_ptr, m_ptr, v_ptr, e_ptr, at, whole, X_FORMAT, G_FORMAT, MOMENT, PULL, AVERAGE, BLOCK
        )
        if STATS:
            sums = add_stats(sums, r, mask, VECTOR)
    all = total_stats(sums)
    if whole < part.count:
        r, mask = _pace_round(
            s, x_ptr, g_ptr, m_ptr, v_ptr, e_ptr, whole, part.count, X_FORMAT, G_FORMAT, MOMENT, PULL, AVERAGE, GROUP
        )
        if STATS:
            all = merged_stats(all, total_stats(add_stats(no_stats(GROUP), r, mask, 1)))
    if STATS:
        row_ptr = stat_scalars_ptr + part.tensor * STAT_WIDTH
        store_stats(
            rows_ptr + part.place * STATS_WIDTH,
            all,
            part.count,
            tl.load(row_ptr),
            tl.load(row_ptr + 1),
            tl.load(row_ptr + 2),
        )
