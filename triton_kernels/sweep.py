"""The sweep: how memory is walked. One launch does a whole list of tensors; a program finds its stretch of one tensor
in a table of addresses (:mod:`.table`) and takes it a block at a time, through storage, by the rule.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .storage import pointer
from .table import FIRST_BLOCK, FIRST_ROW, NUMEL, TABLE_WIDTH

# Elements of a program. 32 M parameters are 8,192 programs, some 15 waves of an H100's 132 SMs with 4 of them each, so
# that the last wave costs little; and the few dependent loads that find its tensor and its scalars (about 2 µs) cost a
# program little beside 150 to 260 KB of operands.
CHUNK = tl.constexpr(4096)
# Masks of whole groups of 16 elements keep the accesses 16 bytes wide. The rest of a tensor, up to 15 elements, goes
# through the same function in a block of its own.
GROUP = tl.constexpr(16)


class Stretch(NamedTuple):
    """A program's part of the work: the row of its tensor in the table, where in the tensor it begins, how many
    elements it has, and its place among all programs by the order of the tensors, which sums are kept at."""

    tensor: tl.tensor
    row_ptr: tl.tensor
    begin: tl.tensor
    count: tl.tensor
    place: tl.tensor


@triton.jit
def find_stretch(table_ptr, blocks_ptr, first_block):
    block = first_block + tl.program_id(0)
    tensor = tl.load(blocks_ptr + block).to(tl.int64)
    row_ptr = table_ptr + tensor * TABLE_WIDTH
    chunk = block - tl.load(row_ptr + FIRST_BLOCK)
    begin = chunk * CHUNK
    left = tl.load(row_ptr + NUMEL) - begin
    count = tl.where(left < CHUNK, left, CHUNK).to(tl.int32)
    return Stretch(tensor, row_ptr, begin, count, tl.load(row_ptr + FIRST_ROW) + chunk)


@triton.jit
def operand(stretch, COLUMN: tl.constexpr, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to the first element of the stretch in one operand."""
    return pointer(tl.load(stretch.row_ptr + COLUMN), FORMAT, ALIGNED) + stretch.begin


@triton.jit
def whole_groups(count):
    return tl.multiple_of(count // GROUP * GROUP, GROUP)
