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


@instruction("cvt")
def make_convert(builder: Builder, ins: Instruction) -> Step:
    to, origin = ins.modifiers[-2:]
    if ins.rounding not in (None, "rn", *_TO_INTEGRAL):
        raise builder.error()
    if to in ("f16x2", "bf16x2"):
        return _convert_pair(builder, ins, to[:-2], origin)
    convert: Callable[[np.ndarray], np.ndarray]
    if origin in FLOATS and to in FLOATS:
        convert = _float_to_float(builder, ins, to, origin)
    elif origin in FLOATS:
        convert = _float_to_integer(ins, to)
    elif to in FLOATS:
        if to not in ("f32", "f64"):
            raise builder.error()
        convert = _to(to)
    else:
        convert = _to(to)
    source = builder.read(ins.operands[1], origin)
    destination = builder.write(ins.operands[0], to)
    flush = ins.has("ftz") and origin == "f32"

    def step(lanes: Lanes) -> None:
        x = lanes.values[source]
        if origin == "bf16":
            x = floats.bf16_to_f32(x)
        lanes.values[destination][...] = convert(floats.flush(x) if flush else x)

    return step


def _to(type_: str) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: np.asarray(x).astype(DTYPES[type_])


def _narrow(x: np.ndarray, to: str) -> np.ndarray:
    """To bfloat16's bits or to a float of numpy's, which rounds once to nearest."""
    return floats.f32_to_bf16(x) if to == "bf16" else x.astype(DTYPES[to])


def _convert_pair(builder: Builder, ins: Instruction, to: str, origin: str) -> Step:
    """Two floats to a packed pair, the first of them to the upper half."""
    if origin != "f32":
        raise builder.error()
    high, low = (builder.read(operand, origin) for operand in ins.operands[1:3])
    destinations = [builder.write(ins.operands[0], to, part) for part in (1, 0)]

    def step(lanes: Lanes) -> None:
        results = [_narrow(np.asarray(lanes.values[slot]), to) for slot in (high, low)]
        for destination, result in zip(destinations, results, strict=True):
            lanes.values[destination][...] = result

    return step


def _float_to_float(builder: Builder, ins: Instruction, to: str, origin: str) -> Callable[[np.ndarray], np.ndarray]:
    if to == "bf16" and origin == "f64":
        raise builder.error()
    flush = ins.has("ftz") and to == "f32"
    integral = _TO_INTEGRAL.get(ins.rounding or "")

    def convert(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x)
        x = _narrow(integral(x) if integral else x, to)
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
