"""Moves, logic, shifts and other work on bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import elementwise
from .dtypes import DTYPES, SIGNED, SIZES, UNSIGNED
from .parser import Instruction
from .program import Builder, Step
from .table import instruction

if TYPE_CHECKING:
    from .executor import Lanes

U32 = np.uint32


@instruction("mov")
def make_move(builder: Builder, ins: Instruction) -> Step:
    target, source = ins.operands
    if ins.type == "b128":
        return _move_128(builder, target, source)
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


def _move_128(builder: Builder, target: str, source: str) -> Step:
    def halves(operand: str) -> list[tuple[str, int]]:
        inner = [o.strip() for o in operand.strip("{}").split(",")]
        return [(inner[0], 0), (inner[0], 1)] if len(inner) == 1 else [(o, 0) for o in inner]

    from_slots = [builder.read(name, "b64", part) for name, part in halves(source)]
    to_slots = [builder.write(name, "b64", part) for name, part in halves(target)]

    def step(lanes: Lanes) -> None:
        for destination, value in zip(to_slots, [lanes.values[s].copy() for s in from_slots], strict=True):
            lanes.values[destination][...] = value

    return step


def _logic(opcode: str, bitwise: np.ufunc, logical: np.ufunc) -> None:
    @instruction(opcode)
    def make(builder: Builder, ins: Instruction) -> Step:
        return elementwise(builder, ins, logical if ins.type == "pred" else bitwise, ufunc=True)


_logic("and", np.bitwise_and, np.logical_and)
_logic("or", np.bitwise_or, np.logical_or)
_logic("xor", np.bitwise_xor, np.logical_xor)
_logic("not", np.invert, np.logical_not)


@instruction("cnot")
def make_c_not(builder: Builder, ins: Instruction) -> Step:
    return elementwise(builder, ins, lambda a: (a == 0).astype(a.dtype))


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


# prmt's modes: for the last two bits of the selector, the four bytes chosen.
_PERMUTATIONS = {
    "f4e": (0x3210, 0x4321, 0x5432, 0x6543),
    "b4e": (0x5670, 0x6701, 0x7012, 0x0123),
    "rc8": (0x0000, 0x1111, 0x2222, 0x3333),
    "ecl": (0x3210, 0x3211, 0x3222, 0x3333),
    "ecr": (0x0000, 0x1110, 0x2210, 0x3210),
    "rc16": (0x1010, 0x3232, 0x1010, 0x3232),
}


@instruction("prmt")
def make_permute(builder: Builder, ins: Instruction) -> Step:
    low, high, selector = (builder.read(operand, "u32") for operand in ins.operands[1:4])
    destination = builder.write(ins.operands[0], "u32")
    mode = next((np.array(_PERMUTATIONS[m], U32) for m in ins.modifiers if m in _PERMUTATIONS), None)

    def step(lanes: Lanes) -> None:
        values = lanes.values
        pair = (np.asarray(values[high], np.uint64) << np.uint64(32)) | values[low]
        choice = values[selector] if mode is None else mode[values[selector] & U32(3)]
        result = np.zeros(lanes.count, U32)
        for byte in range(4):
            nibble = (choice >> U32(4 * byte)) & U32(15)
            chosen = ((pair >> ((nibble & U32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)).astype(U32)
            if mode is None:  # bit 3 spreads the chosen byte's sign
                sign = np.where(chosen & U32(128), U32(255), U32(0))
                chosen = np.where(nibble & U32(8), sign, chosen)
            result |= chosen << U32(8 * byte)
        values[destination][...] = result

    return step


@instruction("lop3")
def make_three_input_logic(builder: Builder, ins: Instruction) -> Step:
    if ins.type != "b32" or len(ins.modifiers) > 1:
        raise builder.error()
    sources = [builder.read(operand, "b32") for operand in ins.operands[1:4]]
    destination = builder.write(ins.operands[0], "b32")
    table = int(ins.operands[4], 0)

    def step(lanes: Lanes) -> None:
        a, b, c = (lanes.values[s] for s in sources)
        result = np.zeros(lanes.count, U32)
        for row in range(8):
            if table >> row & 1:
                result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        lanes.values[destination][...] = result

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


@instruction("bfi")
def make_insert(builder: Builder, ins: Instruction) -> Step:
    type_ = ins.type
    width = 8 * SIZES[type_]
    field, base = (builder.read(operand, type_) for operand in ins.operands[1:3])
    start, length = (builder.read(operand, "u32") for operand in ins.operands[3:5])
    destination = builder.write(ins.operands[0], type_)
    dtype = DTYPES[type_]

    def step(lanes: Lanes) -> None:
        a, b = lanes.values[field], lanes.values[base]
        first = (lanes.values[start] & U32(255)).astype(dtype)
        size = (lanes.values[length] & U32(255)).astype(dtype)
        one = dtype.type(1)
        ones = np.where(size >= width, ~dtype.type(0), (one << np.minimum(size, width - 1).astype(dtype)) - one)
        at = np.minimum(first, width - 1).astype(dtype)
        mask = np.where(first >= width, dtype.type(0), ones << at)
        lanes.values[destination][...] = (b & ~mask) | ((a << at) & mask)

    return step


@instruction("bmsk")
def make_mask(builder: Builder, ins: Instruction) -> Step:
    """Ones from a position on, so many; past the end, clamped or wrapped."""
    start, length = (builder.read(operand, "u32") for operand in ins.operands[1:3])
    destination = builder.write(ins.operands[0], "u32")
    wrap = ins.has("wrap")

    def step(lanes: Lanes) -> None:
        first, size = (np.asarray(lanes.values[s], np.uint64) for s in (start, length))
        if wrap:
            first, size = first & np.uint64(31), size & np.uint64(31)
        first, size = (np.minimum(v, np.uint64(32)) for v in (first, size))
        lanes.values[destination][...] = (((np.uint64(1) << size) - np.uint64(1)) << first).astype(U32)

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


@instruction("clz", "popc", "bfind")
def make_count(builder: Builder, ins: Instruction) -> Step:
    type_ = ins.type
    size = SIZES[type_]
    source = builder.read(ins.operands[1], type_)
    destination = builder.write(ins.operands[0], "u32")
    distance = ins.has("shiftamt")

    def step(lanes: Lanes) -> None:
        a = np.asarray(lanes.values[source])
        if ins.opcode == "popc":
            result = np.bitwise_count(a)
        else:
            if type_[0] == "s":
                a = np.where(a < 0, ~a, a)
            result = _leading_zeros(a.view(UNSIGNED[size]))
            if ins.opcode == "bfind":
                position = result if distance else 8 * size - 1 - result
                result = np.where(a == 0, 0xFFFFFFFF, position)
        lanes.values[destination][...] = result

    return step


@instruction("brev")
def make_reverse(builder: Builder, ins: Instruction) -> Step:
    def reverse(a: np.ndarray) -> np.ndarray:
        dtype = a.dtype
        reversed_bytes = np.ascontiguousarray(a).reshape(-1).byteswap().view(np.uint8)
        bits = np.packbits(np.unpackbits(reversed_bytes, bitorder="little"), bitorder="big")
        return bits.view(dtype).reshape(np.shape(a))

    return elementwise(builder, ins, reverse)


@instruction("szext")
def make_extend(builder: Builder, ins: Instruction) -> Step:
    """Keep so many of the lowest bits, and extend them by zeros or by their sign."""
    signed = ins.type == "s32"
    wrap = ins.has("wrap")
    value, amount = builder.read(ins.operands[1], "u32"), builder.read(ins.operands[2], "u32")
    destination = builder.write(ins.operands[0], "u32")

    def step(lanes: Lanes) -> None:
        size = lanes.values[amount] & U32(31) if wrap else np.minimum(lanes.values[amount], U32(32))
        up = U32(32) - size
        shifted = np.asarray(lanes.values[value] << up)
        extended = (shifted.view(SIGNED[4]) >> up.view(SIGNED[4])).view(U32) if signed else shifted >> up
        lanes.values[destination][...] = np.where(size == 0, U32(0), extended)

    return step
