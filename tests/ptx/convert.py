"""``cvt``: between integers and floating-point formats, in every rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import floats
from .dtypes import DTYPES, FLOATS
from .parser import Instruction
from .program import Builder, Step
from .table import instruction

if TYPE_CHECKING:
    from .executor import Lanes

_TO_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_DOUBLE_EXACT = 2**53


@instruction("cvt")
def make_convert(builder: Builder, ins: Instruction) -> Step:
    to, origin = ins.modifiers[-2:]
    if ins.has("pack") or ins.has("rs"):
        raise builder.error()
    if to in ("f16x2", "bf16x2"):
        return _convert_pair(builder, ins, to[:-2], origin)
    if to == "tf32":
        convert: Callable[[np.ndarray], np.ndarray] = _to_tf32(ins)
    elif origin in FLOATS and to in FLOATS:
        convert = _float_to_float(ins, to, origin)
    elif origin in FLOATS:
        convert = _float_to_integer(ins, to)
    elif to in FLOATS:
        convert = _integer_to_float(ins, to)
    else:
        convert = _integer_to_integer(ins, to)
    source = builder.read(ins.operands[1], origin)
    destination = builder.write(ins.operands[0], "b32" if to == "tf32" else to)
    flush = ins.has("ftz") and origin == "f32"

    def step(lanes: Lanes) -> None:
        x = lanes.values[source]
        if origin == "bf16":
            x = floats.bf16_to_f32(x)
        lanes.values[destination][...] = convert(floats.flush(x) if flush else x)

    return step


def _clip(x: np.ndarray, ins: Instruction) -> np.ndarray:
    """``.relu`` and ``.sat``, which clip before a narrowing as well as after it."""
    if ins.has("relu"):
        x = floats.rectify(x)
    return floats.saturate(x) if ins.has("sat") else x


def _to_short(x: np.ndarray, to: str, mode: str) -> np.ndarray:
    """To bfloat16's bits or to float16, from float32 or float64."""
    if to == "bf16":
        if x.dtype == np.float64:
            return floats.f64_to_bf16(x, mode)
        return floats.f32_to_bf16(x, mode)
    return floats.narrow(x, np.float16, mode)


def _convert_pair(builder: Builder, ins: Instruction, to: str, origin: str) -> Step:
    """Two floats to a packed pair, the first of them to the upper half."""
    mode = ins.rounding or "rn"
    high, low = (builder.read(operand, origin) for operand in ins.operands[1:3])
    destinations = [builder.write(ins.operands[0], to, part) for part in (1, 0)]

    finite = ins.has("satfinite")

    def step(lanes: Lanes) -> None:
        parts = [np.asarray(lanes.values[slot]) for slot in (high, low)]
        if finite:
            parts = [_within(part, to) for part in parts]
        results = [_to_short(_clip(part, ins), to, mode) for part in parts]
        for destination, result in zip(destinations, results, strict=True):
            lanes.values[destination][...] = result

    return step


def _within(x: np.ndarray, to: str) -> np.ndarray:
    largest = x.dtype.type(65504.0 if to == "f16" else (2 - 2.0**-7) * 2.0**127)
    return np.where(np.isnan(x), x, np.clip(x, -largest, largest))


def _to_tf32(ins: Instruction) -> Callable[[np.ndarray], np.ndarray]:
    mode = ins.rounding
    return lambda x: floats.f32_to_tf32(_clip(x, ins), mode)


def _float_to_float(ins: Instruction, to: str, origin: str) -> Callable[[np.ndarray], np.ndarray]:
    mode = ins.rounding or "rn"
    flush = ins.has("ftz") and to == "f32"
    integral = _TO_INTEGRAL.get(mode)
    finite = ins.has("satfinite")

    def convert(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x)
        if integral:
            x = integral(x)
        x = _clip(x, ins)
        if to in ("bf16", "f16"):
            return _to_short(_within(x, to) if finite else x, to, "rn" if integral else mode)
        if to == "f32" and origin == "f64":
            x = floats.narrow(x, np.float32, mode)
        return floats.flush(x) if flush else x

    return convert


def _float_to_integer(ins: Instruction, to: str) -> Callable[[np.ndarray], np.ndarray]:
    """Out of range to the nearest end of the range, NaN to zero (in 64 bits too, as hardware's table has it)."""
    integral = _TO_INTEGRAL[ins.rounding]
    dtype = DTYPES[to]
    limits = np.iinfo(dtype)
    # The ends as floats: 2^63 is one, 2^63 - 1 is not.
    low, above = float(limits.min), float(limits.max + 1)

    def convert(x: np.ndarray) -> np.ndarray:
        whole = integral(np.asarray(x, np.float64))
        inside = (whole >= low) & (whole < above)
        result = np.where(inside, whole, 0.0).astype(dtype)
        result = np.where(whole >= above, dtype.type(limits.max), result)
        return np.where(whole < low, dtype.type(limits.min), result)

    return convert


def _integer_to_float(ins: Instruction, to: str) -> Callable[[np.ndarray], np.ndarray]:
    mode = ins.rounding or "rn"

    def convert(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x)
        if mode == "rn" and to in ("f32", "f64"):
            return x.astype(DTYPES[to])
        if to == "f64":
            nearest, side = _to_double(x)
            return floats.directed(nearest, side, mode)
        return _to_short(_odd(x), to, mode) if to in ("bf16", "f16") else floats.narrow(_odd(x), np.float32, mode)

    return convert


def _to_double(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest float64 and the sign of what is missing: of 64-bit integers the last bits may be."""
    nearest = x.astype(np.float64)
    exact = np.abs(nearest) < _DOUBLE_EXACT
    side = np.zeros(x.shape, np.int64)
    for lane in np.argwhere(~exact):
        difference = int(x[tuple(lane)]) - int(nearest[tuple(lane)])
        side[tuple(lane)] = (difference > 0) - (difference < 0)
    return nearest, side


def _odd(x: np.ndarray) -> np.ndarray:
    nearest, side = _to_double(x)
    return floats.round_to_odd(nearest, side)


def _integer_to_integer(ins: Instruction, to: str) -> Callable[[np.ndarray], np.ndarray]:
    dtype = DTYPES[to]
    limits = np.iinfo(dtype)

    def saturate(x: np.ndarray) -> np.ndarray:
        origin = np.iinfo(x.dtype)
        low, high = max(limits.min, origin.min), min(limits.max, origin.max)
        return np.clip(x, x.dtype.type(low), x.dtype.type(high)).astype(dtype)

    return saturate if ins.has("sat") else lambda x: x.astype(dtype)
