"""The exchange of two lists of tensors in the sweep."""

from __future__ import annotations

import triton
import triton.language as tl

from .storage import load, store
from .sweep import GROUP, find_stretch, operand, whole_groups
from .table import E, X


@triton.jit
def _swap_round(a_ptr, b_ptr, at, end, BLOCK: tl.constexpr):
    i = at + tl.arange(0, BLOCK)
    mask = i < end
    a = load(a_ptr + i, mask, tl.float32)
    b = load(b_ptr + i, mask, tl.float32)
    store(a_ptr + i, b, mask, tl.float32)
    store(b_ptr + i, a, mask, tl.float32)


@triton.jit(do_not_specialize=["first_block"])
def _swap_kernel(
    table_ptr,
    blocks_ptr,
    first_block,
    X_FORMAT: tl.constexpr,
    G_FORMAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    part = find_stretch(table_ptr, blocks_ptr, first_block)
    a_ptr = operand(part, X, tl.float32, ALIGNED)
    b_ptr = operand(part, E, tl.float32, ALIGNED)
    whole = whole_groups(part.count)
    for at in range(0, whole, BLOCK):
        _swap_round(a_ptr, b_ptr, at, whole, BLOCK)
    if whole < part.count:
        _swap_round(a_ptr, b_ptr, whole, part.count, GROUP)
