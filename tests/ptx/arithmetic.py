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
_PACKED = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32", "u16x2": "u16", "s16x2": "s16"}


def elementwise(builder: Builder, ins: Instruction, compute: Compute, ufunc: bool = False) -> Step:
    """A result of the instruction's type from operands of the same, with the modifiers that floats know.

    A ``ufunc`` writes into the register itself where nothing is to be done before or after it. A packed operand's
    elements are computed one after the other."""
    type_ = ins.type
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
    is_float = type_ in FLOATS
    flush = ins.has("ftz") and type_ == "f32"
    saturate, relu = ins.has("sat") and is_float, ins.has("relu")
    plain = ufunc and not (flush or saturate or relu or type_ == "bf16")
    dtype = DTYPES[type_]

    def step_to(result: int) -> Step:
        if plain and builder.slot_dtype(result) == dtype:
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
            if type_ == "bf16":
                operands = [floats.bf16_to_f32(operand) for operand in operands]
            if flush:
                operands = [floats.flush(operand) for operand in operands]
            value = compute(*operands)
            if flush:
                value = floats.flush(value)
            if saturate:
                value = floats.saturate(value)
            if relu:
                value = floats.rectify(value)
            if type_ == "bf16" and value.dtype != np.uint16:
                value = floats.f32_to_bf16(value)
            lanes.values[result][...] = value

        return step

    return destination, step_to


def _by_rounding(ins: Instruction, single: Compute, double: Compute) -> Compute | None:
    """What computes in the instruction's rounding, if that is not the nearest."""
    mode = ins.rounding
    if mode in (None, "rn") or ins.type not in ("f32", "f64", "f32x2"):
        return None
    return partial(double if ins.type == "f64" else single, mode=mode)


@instruction("add", "sub", "addc", "subc")
def make_add(builder: Builder, ins: Instruction) -> Step:
    subtract = ins.opcode.startswith("sub")
    if ins.has("cc") or ins.opcode[-1] == "c":
        return _with_carry(builder, ins, subtract)
    if ins.has("sat") and ins.type == "s32":
        sign = -1 if subtract else 1

        def saturated(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return np.clip(np.asarray(a, np.int64) + sign * np.asarray(b, np.int64), -(2**31), 2**31 - 1)

        return elementwise(builder, ins, saturated)
    if rounded := _by_rounding(ins, floats.add_f32, floats.add_f64):
        return elementwise(builder, ins, (lambda a, b: rounded(a, -b)) if subtract else rounded)
    return elementwise(builder, ins, np.subtract if subtract else np.add, ufunc=True)


def _with_carry(builder: Builder, ins: Instruction, subtract: bool) -> Step:
    type_ = f"u{ins.type[1:]}"
    destination = builder.write(ins.operands[0], type_)
    sources = [builder.read(operand, type_) for operand in ins.operands[1:3]]
    carries_in, carries_out = ins.opcode[-1] == "c", ins.has("cc")
    dtype = DTYPES[type_]

    def step(lanes: Lanes) -> None:
        carry = lanes.machine.carry
        a, b = (np.broadcast_to(lanes.values[s], lanes.count) for s in sources)
        carried = carry[lanes.threads].astype(dtype) if carries_in else np.zeros(lanes.count, dtype)
        first = a - b if subtract else a + b
        total = first - carried if subtract else first + carried
        if carries_out:
            out = (a < b) | (first < carried) if subtract else (first < a) | (total < first)
            carry[lanes.threads] = out
        lanes.values[destination][...] = total

    return step


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
    if type_ in FLOATS or type_ in _PACKED:
        rounded = _by_rounding(ins, floats.mul_f32, floats.mul_f64)
        return elementwise(builder, ins, rounded or np.multiply, ufunc=rounded is None)
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


@instruction("mad", "madc")
def make_multiply_add(builder: Builder, ins: Instruction) -> Step:
    type_ = ins.type
    if type_ in FLOATS:
        return make_fma(builder, ins)
    if ins.has("cc") or ins.opcode == "madc":
        return _multiply_add_with_carry(builder, ins)
    if ins.has("sat"):
        raise builder.error()
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


def _multiply_add_with_carry(builder: Builder, ins: Instruction) -> Step:
    """As a product to a register of its own and an addition with carry."""
    type_ = ins.type
    product = builder.temporary(type_)
    first, second = (builder.read(operand, type_) for operand in ins.operands[1:3])
    addend, destination = builder.read(ins.operands[3], type_), builder.write(ins.operands[0], type_)
    high = ins.has("hi")
    carries_in, carries_out = ins.opcode == "madc", ins.has("cc")
    unsigned = DTYPES[f"u{type_[1:]}"]

    def step(lanes: Lanes) -> None:
        a, b = lanes.values[first], lanes.values[second]
        lanes.values[product][...] = _high_product(a, b, type_) if high else a * b
        x = lanes.values[product].view(unsigned)
        y = np.broadcast_to(lanes.values[addend], lanes.count).view(unsigned)
        carry = lanes.machine.carry
        carried = carry[lanes.threads].astype(unsigned) if carries_in else np.zeros(lanes.count, unsigned)
        total = x + y
        result = total + carried
        if carries_out:
            carry[lanes.threads] = (total < x) | (result < total)
        lanes.values[destination][...] = result.view(DTYPES[type_])

    return step


@instruction("mul24", "mad24")
def make_multiply_24(builder: Builder, ins: Instruction) -> Step:
    if ins.has("hi"):
        raise builder.error()

    def product(a: np.ndarray, b: np.ndarray, c: np.ndarray | int = 0) -> np.ndarray:
        eight = a.dtype.type(8)
        return ((a << eight) >> eight) * ((b << eight) >> eight) + np.asarray(c, a.dtype)

    return elementwise(builder, ins, product)


@instruction("sad")
def make_sum_of_absolute_differences(builder: Builder, ins: Instruction) -> Step:
    return elementwise(builder, ins, lambda a, b, c: np.maximum(a, b) - np.minimum(a, b) + c)


@instruction("fma")
def make_fma(builder: Builder, ins: Instruction) -> Step:
    type_ = _PACKED.get(ins.type, ins.type)
    mode = ins.rounding or "rn"
    if type_ == "f64":
        return elementwise(builder, ins, partial(floats.fma_f64, mode=mode))
    if type_ == "f16":
        return elementwise(builder, ins, floats.fma_f16)
    if type_ == "bf16":
        return elementwise(builder, ins, _fma_bf16_relu if ins.has("relu") else floats.fma_bf16)
    if mode != "rn":
        return elementwise(builder, ins, partial(floats.fma_f32_directed, mode=mode))
    return elementwise(builder, ins, _fma_f32, ufunc=True)


def _fma_bf16_relu(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return floats.bf16_to_f32(floats.fma_bf16(a, b, c))


def _fma_f32(a: np.ndarray, b: np.ndarray, c: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    if out is None:
        out = np.empty(np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c), (1,)), np.float32)
    floats.fma_f32(a, b, c, out)
    return out


@instruction("div")
def make_divide(builder: Builder, ins: Instruction) -> Step:
    type_ = ins.type
    if type_ in FLOATS:
        rounded = _by_rounding(ins, floats.div_f32, floats.div_f64)
        return elementwise(builder, ins, rounded or np.divide, ufunc=rounded is None)
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
    rounded = _by_rounding(ins, floats.sqrt_f32, floats.sqrt_f64)
    return elementwise(builder, ins, rounded or np.sqrt, ufunc=rounded is None)


@instruction("rcp")
def make_reciprocal(builder: Builder, ins: Instruction) -> Step:
    if ins.type == "f64" and ins.has("approx"):
        return elementwise(builder, ins, floats.reciprocal_seed)
    if rounded := _by_rounding(ins, floats.div_f32, floats.div_f64):
        return elementwise(builder, ins, lambda a: rounded(np.ones_like(a), a))
    return elementwise(builder, ins, np.reciprocal, ufunc=True)


@instruction("rsqrt")
def make_reciprocal_square_root(builder: Builder, ins: Instruction) -> Step:
    if ins.type == "f64":
        return elementwise(builder, ins, floats.rsqrt_seed)
    return elementwise(builder, ins, _through_f64(lambda a: 1.0 / np.sqrt(a)))


def _through_f64(function: Callable[[np.ndarray], np.ndarray]) -> Compute:
    """The function in float64, rounded once: hardware's approximations lie a few units in the last place beside it."""
    return lambda a: function(np.asarray(a, np.float64)).astype(np.asarray(a).dtype)


for _opcode, _function in {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}.items():
    instruction(_opcode)(lambda b, i, function=_function: elementwise(b, i, _through_f64(function)))


@instruction("min", "max")
def make_extreme(builder: Builder, ins: Instruction) -> Step:
    largest = ins.opcode == "max"
    type_ = _PACKED.get(ins.type, ins.type)
    if type_ not in FLOATS:
        return elementwise(builder, ins, np.maximum if largest else np.minimum, ufunc=True)
    keeps_nan, drops_nan = (np.maximum, np.fmax) if largest else (np.minimum, np.fmin)
    choose = keeps_nan if ins.has("NaN") else drops_nan
    magnitudes, xor_sign = ins.has("abs"), ins.has("xorsign")

    def pick(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        x, y = (np.abs(a), np.abs(b)) if magnitudes else (a, b)
        result = floats.signed_zeros(choose(x, y), x, y, largest)
        if xor_sign:
            result = np.where(np.signbit(a) ^ np.signbit(b), -result, result)
        return result

    def compute(a: np.ndarray, b: np.ndarray, *more: np.ndarray) -> np.ndarray:
        result = pick(a, b)
        return pick(result, more[0]) if more else result

    return elementwise(builder, ins, compute)


@instruction("copysign")
def make_copy_sign(builder: Builder, ins: Instruction) -> Step:
    return elementwise(builder, ins, lambda sign, magnitude: np.copysign(magnitude, sign))


@instruction("testp")
def make_test_property(builder: Builder, ins: Instruction) -> Step:
    tiny = np.finfo(DTYPES[ins.type]).tiny
    test = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda x: (x != 0) & (np.abs(x) < tiny),
    }[ins.modifiers[0]]
    source, destination = builder.read(ins.operands[1], ins.type), builder.write(ins.operands[0], "pred")

    def step(lanes: Lanes) -> None:
        lanes.values[destination][...] = test(lanes.values[source])

    return step
