"""The pullback's rule in the sweep."""

from __future__ import annotations

import triton
import triton.language as tl

from .pullback import pullback_rule
from .scalars import PULLBACK_WIDTH, STAT_WIDTH, load_pullback_scalars, skipped
from .storage import load, store
from .sums import STATS_WIDTH, add_stats, merged_stats, no_stats, store_stats, total_stats
from .sweep import GROUP, find_stretch, operand, whole_groups
from .table import BEFORE as BEFORE_COLUMN
from .table import E, G, X


@triton.jit
def _pullback_round(
    s,
    x_ptr,
    before_ptr,
    v_ptr,
    e_ptr,
    at,
    end,
    X_FORMAT: tl.constexpr,
    V_FORMAT: tl.constexpr,
    BEFORE: tl.constexpr,
    MOMENT: tl.constexpr,
    PULL: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The elements of one block that lie before `end`; which ones, and what the rule gave."""
    i = at + tl.arange(0, BLOCK)
    mask = i < end
    moves = i < tl.where(s.moves != 0.0, end, at)
    x = load(x_ptr + i, mask if PULL or STATS else moves, X_FORMAT)
    before = x
    if BEFORE:
        before = load(before_ptr + i, mask, X_FORMAT)
    v = x
    if MOMENT:
        v = load(v_ptr + i, mask, V_FORMAT)
    e = load(e_ptr + i, mask if PULL else moves, tl.float32)
    r = pullback_rule(s, x, before, v, e, BEFORE, MOMENT, PULL)
    if PULL:
        store(x_ptr + i, r.x, mask, X_FORMAT)
    store(e_ptr + i, r.e, moves, tl.float32)  # where it rests, this costs no memory access
    return r, mask


@triton.jit(do_not_specialize=["first_block"])
def _pullback_kernel(
    table_ptr,
    blocks_ptr,
    scalars_ptr,
    stat_scalars_ptr,
    rows_ptr,
    found_inf_ptr,
    first_block,
    X_FORMAT: tl.constexpr,
    G_FORMAT: tl.constexpr,
    BEFORE: tl.constexpr,
    MOMENT: tl.constexpr,
    PULL: tl.constexpr,
    STATS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The pull and the average of a stretch of one tensor; its statistics, where STATS, go to its place in `rows`. The
    second moment lies where a gradient would: G_FORMAT is its format."""
    if skipped(found_inf_ptr):
        return
    part = find_stretch(table_ptr, blocks_ptr, first_block)
    s = load_pullback_scalars(scalars_ptr + part.tensor * PULLBACK_WIDTH)
    x_ptr = operand(part, X, X_FORMAT, ALIGNED)
    before_ptr = operand(part, BEFORE_COLUMN, X_FORMAT, ALIGNED)
    v_ptr = operand(part, G, G_FORMAT, ALIGNED)
    e_ptr = operand(part, E, tl.float32, ALIGNED)
    whole = whole_groups(part.count)
    sums = no_stats(BLOCK // VECTOR)
    for at in range(0, whole, BLOCK):
        r, mask = _pullback_round(
            s, x_ptr, before_ptr, v_ptr, e_ptr, at, whole, X_FORMAT, G_FORMAT, BEFORE, MOMENT, PULL, STATS, BLOCK
        )
        if STATS:
            sums = add_stats(sums, r, mask, VECTOR)
    all = total_stats(sums)
    if whole < part.count:
        r, mask = _pullback_round(
            s,
            x_ptr,
            before_ptr,
            v_ptr,
            e_ptr,
            whole,
            part.count,
            X_FORMAT,
            G_FORMAT,
            BEFORE,
            MOMENT,
            PULL,
            STATS,
            GROUP,
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
