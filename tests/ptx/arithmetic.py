"""Integer and floating-point arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from . import floats
from .dtypes import DTYPES, FLOATS, SIZES
from .parser import Instruction
from .program import Builder, Step
from .table import instruction

if TYPE_CHECKING:
    from .executor import Lanes

Compute = Callable[..., np.ndarray]
_PACKED = {"f32x2": "f32", "u16x2": "u16", "s16x2": "s16"}


def elementwise(builder: Builder, ins: Instruction, compute: Compute, ufunc: bool = False) -> Step:
    """A result of the instruction's type from operands of the same, with the modifiers that floats know.

    A ``ufunc`` writes into the register itself where nothing is to be done before or after it. A packed operand's
    elements are computed one after the other."""
    type_ = ins.type
    if type_ in ("f16", "bf16") or ins.rounding not in (None, "rn"):
        raise builder.error()
    if element := _PACKED.get(type_):
        steps = [_element(builder, ins, compute, ufunc, element, part) for part in range(2)]
        # Both halves of the operands are read before a half of the result is written.
        results = [builder.temporary(element) for _ in steps]
        halves = [step_to(result) for (_, step_to), result in zip(steps, results, strict=True)]
        destinations = [destination for destination, _ in steps]

        def packed(lanes: Lanes) -> None:
            for half in halves:
                half(lanes)
            for destination, result in zip(destinations, results, strict=True):
                lanes.values[destination][...] = lanes.values[result]

        return packed
    destination, step_to = _element(builder, ins, compute, ufunc, type_, None)
    return step_to(destination)


def _element(
    builder: Builder, ins: Instruction, compute: Compute, ufunc: bool, type_: str, part: int | None
) -> tuple[int, Callable[[int], Step]]:
    destination = builder.write(ins.operands[0], type_, part)
    sources = [builder.read(operand, type_, part or 0) for operand in ins.operands[1:]]
    flush = ins.has("ftz") and type_ == "f32"
    dtype = DTYPES[type_]

    def step_to(result: int) -> Step:
        if ufunc and not flush and builder.slot_dtype(result) == dtype:
            if len(sources) == 2:
                first, second = sources

                def binary(lanes: Lanes) -> None:
                    values = lanes.values
                    compute(values[first], values[second], out=values[result])

                return binary

            def direct(lanes: Lanes) -> None:
                values = lanes.values
                compute(*[values[s] for s in sources], out=values[result])

            return direct

        def step(lanes: Lanes) -> None:
            operands = [lanes.values[s] for s in sources]
            if flush:
                operands = [floats.flush(operand) for operand in operands]
            value = compute(*operands)
            if flush:
                value = floats.flush(value)
            lanes.values[result][...] = value

        return step

    return destination, step_to


@instruction("add", "sub")
def make_add(builder: Builder, ins: Instruction) -> Step:
    return elementwise(builder, ins, np.subtract if ins.opcode == "sub" else np.add, ufunc=True)


def _high_product(a: np.ndarray, b: np.ndarray, type_: str) -> np.ndarray:
    """The upper half of the double-length product."""
    size = SIZES[type_]
    if size < 8:
        wide = DTYPES[f"{type_[0]}{16 * size}"]
        return (np.multiply(a, b, dtype=wide) >> wide.type(8 * size)).astype(DTYPES[type_])
    x, y = (np.asarray(v).view(np.uint64) for v in (a, b))
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x_low, x_high, y_low, y_high = x & mask, x >> half, y & mask, y >> half
    middle = x_high * y_low + ((x_low * y_low) >> half)
    other = (middle & mask) + x_low * y_high
    high = x_high * y_high + (middle >> half) + (other >> half)
    if type_[0] == "s":  # the sign bit counts -2^64, not 2^64, of the other factor
        sign = np.uint64(63)
        high = high - (x >> sign) * y - (y >> sign) * x
    return high.view(DTYPES[type_])


def _wide(type_: str) -> str:
    return f"{type_[0]}{16 * SIZES[type_]}"


@instruction("mul")
def make_multiply(builder: Builder, ins: Instruction) -> Step:
    type_ = ins.type
    if ins.has("hi"):
        return elementwise(builder, ins, partial(_high_product, type_=type_))
    if not ins.has("wide"):
        return elementwise(builder, ins, np.multiply, ufunc=True)
    wide = DTYPES[_wide(type_)]
    destination = builder.write(ins.operands[0], _wide(type_))
    first, second = (builder.read(operand, type_) for operand in ins.operands[1:3])

    def step(lanes: Lanes) -> None:
        values = lanes.values
        np.multiply(values[first], values[second], values[destination], dtype=wide)

    return step


@instruction("mad")
def make_multiply_add(builder: Builder, ins: Instruction) -> Step:
    type_ = ins.type
    if type_ in FLOATS:
        return make_fma(builder, ins)
    if ins.has("hi"):
        return elementwise(builder, ins, lambda a, b, c: _high_product(a, b, type_) + c)
    result_type = _wide(type_) if ins.has("wide") else type_
    destination = builder.write(ins.operands[0], result_type)
    first, second = (builder.read(operand, type_) for operand in ins.operands[1:3])
    third = builder.read(ins.operands[3], result_type)
    dtype = DTYPES[result_type]

    def step(lanes: Lanes) -> None:
        values = lanes.values
        product = np.multiply(values[first], values[second], dtype=dtype)
        np.add(product, values[third], values[destination])

    return step


@instruction("fma")
def make_fma(builder: Builder, ins: Instruction) -> Step:
    if ins.type == "f64":
        return elementwise(builder, ins, floats.fma_f64)
    if ins.type not in ("f32", "f32x2"):
        raise builder.error()
    return elementwise(builder, ins, _fma_f32, ufunc=True)


def _fma_f32(a: np.ndarray, b: np.ndarray, c: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    if out is None:
        out = np.empty(np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c), (1,)), np.float32)
    floats.fma_f32(a, b, c, out)
    return out


@instruction("div")
def make_divide(builder: Builder, ins: Instruction) -> Step:
    if ins.type in FLOATS:
        return elementwise(builder, ins, np.divide, ufunc=True)
    return elementwise(builder, ins, _divide_integers)


def _divide_integers(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Toward zero; by zero, all ones, as hardware gives."""
    divisor = np.where(b == 0, 1, b).astype(a.dtype)
    remainder = np.fmod(a, divisor)
    return np.where(b == 0, ~a.dtype.type(0), (a - remainder) // divisor)


@instruction("rem")
def make_remainder(builder: Builder, ins: Instruction) -> Step:
    return elementwise(
        builder, ins, lambda a, b: np.where(b == 0, a, np.fmod(a, np.where(b == 0, 1, b).astype(a.dtype)))
    )


@instruction("abs")
def make_absolute(builder: Builder, ins: Instruction) -> Step:
    return elementwise(builder, ins, np.absolute, ufunc=True)


@instruction("neg")
def make_negative(builder: Builder, ins: Instruction) -> Step:
    return elementwise(builder, ins, np.negative, ufunc=True)


@instruction("sqrt")
def make_square_root(builder: Builder, ins: Instruction) -> Step:
    return elementwise(builder, ins, np.sqrt, ufunc=True)


@instruction("rcp")
def make_reciprocal(builder: Builder, ins: Instruction) -> Step:
    if ins.type == "f64" and ins.has("approx"):
        return elementwise(builder, ins, floats.reciprocal_seed)
    return elementwise(builder, ins, np.reciprocal, ufunc=True)


@instruction("min", "max")
def make_extreme(builder: Builder, ins: Instruction) -> Step:
    largest = ins.opcode == "max"
    type_ = _PACKED.get(ins.type, ins.type)
    if type_ not in FLOATS:
        return elementwise(builder, ins, np.maximum if largest else np.minimum, ufunc=True)
    keeps_nan, drops_nan = (np.maximum, np.fmax) if largest else (np.minimum, np.fmin)
    choose = keeps_nan if ins.has("NaN") else drops_nan
    if ins.has("abs") or len(ins.operands) != 3:
        raise builder.error()
    return elementwise(builder, ins, lambda a, b: floats.signed_zeros(choose(a, b), a, b, largest))


@instruction("copysign")
def make_copy_sign(builder: Builder, ins: Instruction) -> Step:
    return elementwise(builder, ins, lambda sign, magnitude: np.copysign(magnitude, sign))
