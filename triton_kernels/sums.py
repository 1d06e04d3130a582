"""Sums over coordinates: within a block, over the blocks of a program, over the rows that programs leave. Always in the
same order, so that they are the same bits on every run; no atomics.

Within a thread at most 32 terms are added in float32, as in the other kernels; everything above is float64.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .mada import HyperTerms
from .scalars import read_lr, skipped

# Doubles of a row of PACE's statistics (14, PACE_STATS in pace_kernels/ops.py) and of MADA's hypergradients (6).
STATS_WIDTH = tl.constexpr(16)
HYPER_WIDTH = tl.constexpr(8)
# Rows that are read at once, and that one program adds up.
ROWS = tl.constexpr(128)
ROWS_OF_A_PROGRAM = tl.constexpr(1024)


class Stats(NamedTuple):
    """What a block sums for the telemetry; minima and maxima of 1/D as the bits of the float, which order like it,
    and NaN above all."""

    inv_D: tl.tensor
    clamped: tl.tensor
    clipped: tl.tensor
    adamw_sq: tl.tensor
    pullback_sq: tl.tensor
    update_sq: tl.tensor
    low: tl.tensor
    high: tl.tensor


@triton.jit
def folded(terms, VECTOR: tl.constexpr):
    """VECTOR neighbours in a row, which one thread holds."""
    return tl.reshape(terms, (terms.shape[0] // VECTOR, VECTOR))


@triton.jit
def fold(terms, mask, VECTOR: tl.constexpr):
    return tl.sum(folded(tl.where(mask, terms, 0.0), VECTOR), axis=1)


@triton.jit
def total(terms):
    return tl.sum(terms.to(tl.float64), axis=0)


# ---- PACE's statistics ----------------------------------------------------------------------------------------------


@triton.jit
def no_stats(LANES: tl.constexpr):
    zero = tl.zeros((LANES,), tl.float32)
    low = tl.full((LANES,), 0x7FFFFFFF, tl.int32)
    return Stats(zero, zero, zero, zero, zero, zero, low, tl.zeros((LANES,), tl.int32))


@triton.jit
def add_stats(stats, r, mask, VECTOR: tl.constexpr):
    bits = r.inv_D.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    low = tl.min(folded(tl.where(mask, bits, 0x7FFFFFFF), VECTOR), axis=1)
    high = tl.max(folded(tl.where(mask, bits, 0), VECTOR), axis=1)
    return Stats(
        stats.inv_D + fold(r.inv_D, mask, VECTOR),
        stats.clamped + fold(r.clamped, mask, VECTOR),
        stats.clipped + fold(tl.where(r.lambda_ >= 1.0, 1.0, 0.0), mask, VECTOR),
        stats.adamw_sq + fold(r.adamw * r.adamw, mask, VECTOR),
        stats.pullback_sq + fold(r.pullback * r.pullback, mask, VECTOR),
        stats.update_sq + fold(r.update * r.update, mask, VECTOR),
        tl.minimum(stats.low, low),
        tl.maximum(stats.high, high),
    )


@triton.jit
def total_stats(stats):
    return Stats(
        total(stats.inv_D),
        total(stats.clamped),
        total(stats.clipped),
        total(stats.adamw_sq),
        total(stats.pullback_sq),
        total(stats.update_sq),
        tl.min(stats.low, axis=0),
        tl.max(stats.high, axis=0),
    )


@triton.jit
def merged_stats(a, b):
    return Stats(
        a.inv_D + b.inv_D,
        a.clamped + b.clamped,
        a.clipped + b.clipped,
        a.adamw_sq + b.adamw_sq,
        a.pullback_sq + b.pullback_sq,
        a.update_sq + b.update_sq,
        tl.minimum(a.low, b.low),
        tl.maximum(a.high, b.high),
    )


@triton.jit
def store_stats(row_ptr, stats, count, weight, gain, cap):
    """A program's row: `block_stats` in csrc/stats.h, which explains weight, gain and cap."""
    low = stats.low.to(tl.float32, bitcast=True).to(tl.float64)
    high = stats.high.to(tl.float32, bitcast=True).to(tl.float64)
    tl.store(row_ptr, count.to(tl.float64))
    tl.store(row_ptr + 1, weight * stats.inv_D)
    tl.store(row_ptr + 2, weight * low)
    tl.store(row_ptr + 3, weight * high)
    tl.store(row_ptr + 4, gain * stats.inv_D)
    tl.store(row_ptr + 5, gain * low)
    tl.store(row_ptr + 6, gain * high)
    tl.store(row_ptr + 7, stats.clamped)
    tl.store(row_ptr + 8, tl.where(gain * low > cap, cap, gain * low))  # keeps NaN
    tl.store(row_ptr + 9, tl.where(gain * high > cap, cap, gain * high))
    tl.store(row_ptr + 10, stats.clipped)
    tl.store(row_ptr + 11, stats.adamw_sq)
    tl.store(row_ptr + 12, stats.pullback_sq)
    tl.store(row_ptr + 13, stats.update_sq)


# Columns of minima and of maxima, a bit each; the others are sums.
_MINIMA = tl.constexpr(1 << 2 | 1 << 5 | 1 << 8)
_MAXIMA = tl.constexpr(1 << 3 | 1 << 6 | 1 << 9)


@triton.jit(do_not_specialize=["count"])
def _sum_stats_kernel(rows_ptr, out_ptr, count, found_inf_ptr, OUT_WIDTH: tl.constexpr):
    """Row p of `out` from rows p · ROWS_OF_A_PROGRAM and on. With OUT_WIDTH 14 it is the statistics, and where the step
    was left undone, those of nothing."""
    column = tl.arange(0, STATS_WIDTH)
    is_min = ((_MINIMA >> column) & 1) != 0
    is_max = ((_MAXIMA >> column) & 1) != 0
    first = tl.program_id(0).to(tl.int64) * ROWS_OF_A_PROGRAM
    # Doubles that are not negative order like their bits, NaN above all.
    infinity = tl.full((STATS_WIDTH,), 0x7FF0000000000000, tl.int64)
    sums = tl.zeros((STATS_WIDTH,), tl.float64)
    low = infinity
    high = tl.zeros((STATS_WIDTH,), tl.int64)
    for at in range(0, ROWS_OF_A_PROGRAM, ROWS):
        row = first + at + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & (column < 14)[None, :]
        values = tl.load(rows_ptr + row[:, None] * STATS_WIDTH + column[None, :], mask=mask, other=0.0)
        bits = values.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
        sums += tl.sum(values, axis=0)
        low = tl.minimum(low, tl.min(tl.where(mask, bits, infinity[None, :]), axis=0))
        high = tl.maximum(high, tl.max(tl.where(mask, bits, 0), axis=0))
    result = tl.where(is_max, high.to(tl.float64, bitcast=True), sums)
    result = tl.where(is_min, low.to(tl.float64, bitcast=True), result)
    if OUT_WIDTH == 14:
        nothing = tl.where(is_min, infinity, 0).to(tl.float64, bitcast=True)
        result = tl.where(skipped(found_inf_ptr), nothing, result)
    tl.store(out_ptr + tl.program_id(0) * OUT_WIDTH + column, result, mask=column < 14)


# ---- MADA's hypergradients ------------------------------------------------------------------------------------------


@triton.jit
def no_sums(LANES: tl.constexpr):
    zero = tl.zeros((LANES,), tl.float32)
    return HyperTerms(zero, zero, zero, zero, zero, zero)


@triton.jit
def add_terms(sums, r, mask, DIFF: tl.constexpr, SECOND: tl.constexpr, LION: tl.constexpr, VECTOR: tl.constexpr):
    """Terms that are not in play are zeros, and stay it without a sum."""
    return HyperTerms(
        sums.beta1 + fold(r.beta1, mask, VECTOR),
        sums.beta2 + fold(r.beta2, mask, VECTOR),
        (sums.beta3 + fold(r.beta3, mask, VECTOR)) if DIFF else sums.beta3,
        (sums.rho + fold(r.rho, mask, VECTOR)) if SECOND else sums.rho,
        sums.c + fold(r.c, mask, VECTOR),
        (sums.gamma + fold(r.gamma, mask, VECTOR)) if LION else sums.gamma,
    )


@triton.jit
def total_terms(sums):
    return HyperTerms(
        total(sums.beta1), total(sums.beta2), total(sums.beta3), total(sums.rho), total(sums.c), total(sums.gamma)
    )


@triton.jit
def merged_terms(a, b):
    return HyperTerms(
        a.beta1 + b.beta1, a.beta2 + b.beta2, a.beta3 + b.beta3, a.rho + b.rho, a.c + b.c, a.gamma + b.gamma
    )


@triton.jit
def store_terms(row_ptr, factors_ptr, sums):
    """A program's row: its sums times its tensor's factors (`mada_factors` in scalars.py)."""
    for k in tl.static_range(len(sums)):
        tl.store(row_ptr + k, tl.load(factors_ptr + k) * sums[k])


@triton.jit(do_not_specialize=["learn", "count"])
def _sum_hypergradients_kernel(
    rows_ptr, out_ptr, count, found_inf_ptr, lr_ptr, lr: tl.float64, learn, OUT_WIDTH: tl.constexpr
):
    """Row p of `out` from rows p · ROWS_OF_A_PROGRAM and on. With OUT_WIDTH 7 it is the hypergradients, those that are
    learned, and the learning rate; where the step was left undone, zeros."""
    column = tl.arange(0, HYPER_WIDTH)
    first = tl.program_id(0).to(tl.int64) * ROWS_OF_A_PROGRAM
    sums = tl.zeros((HYPER_WIDTH,), tl.float64)
    for at in range(0, ROWS_OF_A_PROGRAM, ROWS):
        row = first + at + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & (column < 6)[None, :]
        sums += tl.sum(tl.load(rows_ptr + row[:, None] * HYPER_WIDTH + column[None, :], mask=mask, other=0.0), axis=0)
    if OUT_WIDTH == 7:
        sums = tl.where(((learn >> column) & 1) != 0, sums, 0.0)
        sums = tl.where(column == 6, read_lr(lr, lr_ptr), sums)
        sums = tl.where(skipped(found_inf_ptr), 0.0, sums)
    tl.store(out_ptr + tl.program_id(0) * OUT_WIDTH + column, sums, mask=column < OUT_WIDTH)
