"""Sums over coordinates: within a block, over the blocks of a program, over the rows that programs leave. The order is
fixed, so every run gives the same bits; there are no atomics.

Within a thread at most 32 terms are added in float32, as in the other kernels; everything above is float64.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .scalars import read_lr, skipped

# Rows that are read at once, and that one program adds up.
ROWS = tl.constexpr(128)
ROWS_OF_A_PROGRAM = tl.constexpr(1024)


class Sums(NamedTuple):
    """The sums of a block: terms, and the least and the largest of non-negative values, as the bits of the float, which
    have the same order, with NaN above all."""

    terms: tl.tuple
    low: tl.tensor
    high: tl.tensor


@triton.jit
def folded(terms, VECTOR: tl.constexpr):
    """VECTOR neighbours in a row, held by one thread."""
    return tl.reshape(terms, (terms.shape[0] // VECTOR, VECTOR))


@triton.jit
def fold(terms, mask, VECTOR: tl.constexpr):
    return tl.sum(folded(tl.where(mask, terms, 0.0), VECTOR), axis=1)


@triton.jit
def no_sums(TERMS: tl.constexpr, LANES: tl.constexpr):
    low = tl.full((LANES,), 0x7FFFFFFF, tl.int32)
    terms = [tl.zeros((LANES,), tl.float32) for _ in tl.tuple(range(TERMS))]
    return Sums(terms, low, tl.zeros((LANES,), tl.int32))


@triton.jit
def add(sums, terms, extreme, mask, VECTOR: tl.constexpr):
    """A term that is None is not in play: its sum stays 0. `extreme` is what has a minimum and a maximum, or None."""
    low = sums.low
    high = sums.high
    if extreme is not None:
        bits = extreme.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        low = tl.min(folded(tl.where(mask, bits, 0x7FFFFFFF), VECTOR), axis=1)
        high = tl.max(folded(tl.where(mask, bits, 0), VECTOR), axis=1)
    added = [
        sums.terms[k] + fold(terms[k], mask, VECTOR) if terms[k] is not None else sums.terms[k]
        for k in tl.tuple(range(len(sums.terms)))
    ]
    return Sums(added, tl.minimum(sums.low, low), tl.maximum(sums.high, high))


@triton.jit
def total(sums):
    terms = [tl.sum(sums.terms[k].to(tl.float64), axis=0) for k in tl.tuple(range(len(sums.terms)))]
    return Sums(terms, tl.min(sums.low, axis=0), tl.max(sums.high, axis=0))


@triton.jit
def merged(a, b):
    terms = [a.terms[k] + b.terms[k] for k in tl.tuple(range(len(a.terms)))]
    return Sums(terms, tl.minimum(a.low, b.low), tl.maximum(a.high, b.high))


@triton.jit(do_not_specialize=["count", "learn"])
def _add_up_kernel(
    rows_ptr, out_ptr, found_inf_ptr, lr_ptr, count, learn, lr: tl.float64,
    COLUMNS: tl.constexpr, MINIMA: tl.constexpr, MAXIMA: tl.constexpr, WIDTH: tl.constexpr, OUT_WIDTH: tl.constexpr,
):  # fmt: skip
    """Row p of `out` from rows p · ROWS_OF_A_PROGRAM and on. Columns are sums, but for those whose bit is set in MINIMA
    or MAXIMA. With fewer columns than a row, `out` is the result: of a step that was left undone, that of nothing; and
    where it has a column more, that is the learning rate, and sums whose bit of `learn` is not set are left out."""
    column = tl.arange(0, WIDTH)
    first = tl.program_id(0).to(tl.int64) * ROWS_OF_A_PROGRAM
    # Doubles that are not negative order like their bits, NaN above all.
    infinity = tl.full((WIDTH,), 0x7FF0000000000000, tl.int64)
    result = tl.zeros((WIDTH,), tl.float64)
    low = infinity
    high = tl.zeros((WIDTH,), tl.int64)
    for at in range(0, ROWS_OF_A_PROGRAM, ROWS):
        row = first + at + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & (column < COLUMNS)[None, :]
        values = tl.load(rows_ptr + row[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
        result += tl.sum(values, axis=0)
        if MINIMA != 0:
            bits = values.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
            low = tl.minimum(low, tl.min(tl.where(mask, bits, infinity[None, :]), axis=0))
            high = tl.maximum(high, tl.max(tl.where(mask, bits, 0), axis=0))
    is_min = ((MINIMA >> column) & 1) != 0
    if MINIMA != 0:
        result = tl.where(((MAXIMA >> column) & 1) != 0, high.to(tl.float64, bitcast=True), result)
        result = tl.where(is_min, low.to(tl.float64, bitcast=True), result)
    if OUT_WIDTH != WIDTH:
        if OUT_WIDTH > COLUMNS:
            result = tl.where(((learn >> column) & 1) != 0, result, 0.0)
            result = tl.where(column == COLUMNS, read_lr(lr, lr_ptr), result)
        nothing = tl.where(is_min, infinity, 0).to(tl.float64, bitcast=True)
        result = tl.where(skipped(found_inf_ptr), nothing, result)
    tl.store(out_ptr + tl.program_id(0) * OUT_WIDTH + column, result, mask=column < OUT_WIDTH)
