"""The sweep over memory. One launch steps a whole list of tensors; a program finds its stretch of one tensor in a table
of addresses (:mod:`.table`) and steps it a block at a time, by the rule's round: loads, rule, stores.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .codes import CODE_BLOCK
from .scalars import FACTOR_WIDTH, load_fields, skipped
from .storage import pointer
from .sums import merged, no_sums, total
from .table import FIRST_BLOCK, FIRST_ROW, NUMEL, OPERANDS

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
def find_stretch(table_ptr, blocks_ptr, first_block, COLUMNS: tl.constexpr):
    block = first_block + tl.program_id(0)
    tensor = tl.load(blocks_ptr + block).to(tl.int64)
    row_ptr = table_ptr + tensor * COLUMNS
    chunk = block - tl.load(row_ptr + FIRST_BLOCK)
    begin = chunk * CHUNK
    left = tl.load(row_ptr + NUMEL) - begin
    count = tl.where(left < CHUNK, left, CHUNK).to(tl.int32)
    return Stretch(tensor, row_ptr, begin, count, tl.load(row_ptr + FIRST_ROW) + chunk)


@triton.jit
def operand(stretch, K: tl.constexpr, FORMATS: tl.constexpr, BESIDE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to the first element of the stretch in operand K, or in the tensor beside operand K − BESIDE, where
    uint8 is a scale for each code block. None if it is not in play."""
    SCALES: tl.constexpr = K >= BESIDE and FORMATS[K] == tl.uint8
    ptr = pointer(tl.load(stretch.row_ptr + OPERANDS + K), FORMATS[K], ALIGNED)
    if ptr is not None:
        ptr = ptr + (stretch.begin // CODE_BLOCK if SCALES else stretch.begin)
    return ptr


@triton.jit(do_not_specialize=["first_block"], repr=lambda compiled: compiled.constants["ROUND"].__name__)
def _sweep_kernel(
    table_ptr, blocks_ptr, scalars_ptr, factors_ptr, rows_ptr, found_inf_ptr, first_block,
    ROUND: tl.constexpr, FLAGS: tl.constexpr, FORMATS: tl.constexpr, FIELDS: tl.constexpr,
    FINISH: tl.constexpr, TERMS: tl.constexpr, ROW: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, BESIDE: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """One step of a stretch of one tensor, by ROUND; its sums, by FINISH, go to its place in `rows`. FORMATS has those
    of the definition's operands and, from BESIDE on, if there are more, those of the tensors beside each; None if one
    is not in play. FIELDS are the names of the scalars. REST: tensors may end within a group, as those of whole code
    blocks do not."""
    if skipped(found_inf_ptr):
        return
    part = find_stretch(table_ptr, blocks_ptr, first_block, OPERANDS + len(FORMATS))
    row_ptr = scalars_ptr + part.tensor * len(FIELDS)
    s = load_fields(row_ptr, len(FIELDS))
    p = [operand(part, tl.constexpr(k), FORMATS, BESIDE, ALIGNED) for k in tl.tuple(range(len(FORMATS)))]
    whole = tl.multiple_of(part.count // GROUP * GROUP, GROUP)
    sums = no_sums(TERMS, BLOCK // VECTOR)
    for at in range(0, whole, BLOCK):
        sums = ROUND(sums, s, row_ptr, p, at, whole, FLAGS, BLOCK, VECTOR)
    totals = total(sums)
    if REST:  # noqa: SIM102
        if whole < part.count:
            rest = ROUND(no_sums(TERMS, GROUP), s, row_ptr, p, whole, part.count, FLAGS, GROUP, 1)
            totals = merged(totals, total(rest))
    if FINISH is not None:
        FINISH(rows_ptr + part.place * ROW, factors_ptr + part.tensor * FACTOR_WIDTH, totals, part.count)
