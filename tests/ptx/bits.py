"""Moves, logic, shifts and other work on bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import elementwise
from .dtypes import DTYPES, SIZES, UNSIGNED
from .parser import Instruction
from .program import Builder, Step
from .table import instruction

if TYPE_CHECKING:
    from .executor import Lanes

U32 = np.uint32


@instruction("mov")
def make_move(builder: Builder, ins: Instruction) -> Step:
    target, source = ins.operands
    type_ = ins.type if ins.type == "pred" else f"b{8 * SIZES[ins.type]}"
    if source[0] != "{" and target[0] != "{":
        from_slot = builder.read(source, ins.type if ins.type in DTYPES else type_)
    else:
        from_slot = builder.read(source, type_)
    same_type = ins.type if builder.slot_dtype(from_slot) != DTYPES[type_] else type_
    to_slot = builder.write(target, same_type)

    def step(lanes: Lanes) -> None:
        lanes.values[to_slot][...] = lanes.values[from_slot]

    return step


def _logic(opcode: str, bitwise: np.ufunc, logical: np.ufunc) -> None:
    @instruction(opcode)
    def make(builder: Builder, ins: Instruction) -> Step:
        return elementwise(builder, ins, logical if ins.type == "pred" else bitwise, ufunc=True)


_logic("and", np.bitwise_and, np.logical_and)
_logic("or", np.bitwise_or, np.logical_or)
_logic("xor", np.bitwise_xor, np.logical_xor)
_logic("not", np.invert, np.logical_not)


@instruction("shl", "shr")
def make_shift(builder: Builder, ins: Instruction) -> Step:
    """By the width or more: zero, or all sign bits."""
    type_ = ins.type
    signed = type_[0] == "s"
    size = SIZES[type_]
    value, amount = builder.read(ins.operands[1], type_), builder.read(ins.operands[2], "u32")
    destination = builder.write(ins.operands[0], type_)
    dtype = DTYPES[type_]
    shift = np.left_shift if ins.opcode == "shl" else np.right_shift

    def step(lanes: Lanes) -> None:
        by = np.minimum(lanes.values[amount], U32(8 * size - signed if ins.opcode == "shr" else 8 * size)).astype(dtype)
        shift(lanes.values[value], by, lanes.values[destination])

    return step


@instruction("shf")
def make_funnel_shift(builder: Builder, ins: Instruction) -> Step:
    low, high, amount = (builder.read(operand, "u32") for operand in ins.operands[1:4])
    destination = builder.write(ins.operands[0], "u32")
    left, clamp = ins.has("l"), ins.has("clamp")

    def step(lanes: Lanes) -> None:
        values = lanes.values
        by = np.minimum(values[amount], U32(32)) if clamp else values[amount] & U32(31)
        by = by.astype(np.uint64)
        pair = (np.asarray(values[high], np.uint64) << np.uint64(32)) | values[low]
        values[destination][...] = ((pair << by) >> np.uint64(32) if left else pair >> by).astype(U32)

    return step


@instruction("prmt")
def make_permute(builder: Builder, ins: Instruction) -> Step:
    if ins.modifiers != ("b32",):
        raise builder.error()
    low, high, selector = (builder.read(operand, "u32") for operand in ins.operands[1:4])
    destination = builder.write(ins.operands[0], "u32")

    def step(lanes: Lanes) -> None:
        values = lanes.values
        pair = (np.asarray(values[high], np.uint64) << np.uint64(32)) | values[low]
        result = np.zeros(lanes.count, U32)
        for byte in range(4):
            nibble = (values[selector] >> U32(4 * byte)) & U32(15)
            chosen = ((pair >> ((nibble & U32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)).astype(U32)
            sign = np.where(chosen & U32(128), U32(255), U32(0))
            chosen = np.where(nibble & U32(8), sign, chosen)  # bit 3 spreads the chosen byte's sign
            result |= chosen << U32(8 * byte)
        values[destination][...] = result

    return step


@instruction("bfe")
def make_extract(builder: Builder, ins: Instruction) -> Step:
    """A field of bits, its sign bit spread if signed; beyond the top, the value's own sign bit."""
    type_ = ins.type
    width = 8 * SIZES[type_]
    signed = type_[0] == "s"
    value = builder.read(ins.operands[1], type_)
    start, length = (builder.read(operand, "u32") for operand in ins.operands[2:4])
    destination = builder.write(ins.operands[0], type_)
    dtype = DTYPES[type_]

    def step(lanes: Lanes) -> None:
        a = lanes.values[value]
        first = np.asarray(lanes.values[start] & U32(255), np.int64)
        size = np.asarray(lanes.values[length] & U32(255), np.int64)
        # The field's end at the top, then down again: the second shift spreads the sign.
        there = np.minimum(size, np.maximum(width - first, 0))
        up = (a >> np.minimum(first, width - 1).astype(dtype)) << np.minimum(width - there, width - 1).astype(dtype)
        field = up >> np.minimum(width - there, width - 1).astype(dtype)
        beyond = a >> dtype.type(width - 1) if signed else dtype.type(0)
        result = np.where(there > 0, field, beyond)
        lanes.values[destination][...] = np.where(size == 0, dtype.type(0), result)

    return step


def _leading_zeros(a: np.ndarray) -> np.ndarray:
    """By halving: whether the upper half is empty, for ever smaller halves."""
    width = 8 * a.dtype.itemsize
    zeros = np.zeros(np.shape(a), np.int64)
    half = width // 2
    while half:
        empty = a < a.dtype.type(1 << (width - half))
        zeros = zeros + np.where(empty, half, 0)
        a = np.where(empty, a << a.dtype.type(half), a)
        half //= 2
    return zeros + (a == 0)


@instruction("clz", "popc")
def make_count(builder: Builder, ins: Instruction) -> Step:
    type_ = ins.type
    size = SIZES[type_]
    source = builder.read(ins.operands[1], type_)
    destination = builder.write(ins.operands[0], "u32")

    def step(lanes: Lanes) -> None:
        a = np.asarray(lanes.values[source])
        result = np.bitwise_count(a) if ins.opcode == "popc" else _leading_zeros(a.view(UNSIGNED[size]))
        lanes.values[destination][...] = result

    return step
