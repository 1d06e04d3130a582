"""Comparisons and selections."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import floats
from .dtypes import FLOATS
from .parser import Instruction
from .program import Builder, Step
from .table import instruction

if TYPE_CHECKING:
    from .executor import Lanes

_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(name: str, type_: str) -> Callable[..., np.ndarray]:
    """The comparison; of floats, an ordered one is false of a NaN and an unordered one true."""
    if type_ not in FLOATS:
        return _COMPARE[_UNSIGNED.get(name, name)]
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    # numpy's comparisons are ordered, save not_equal, which is unordered.
    opposite = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}
    if name == "neu":
        return np.not_equal
    if name == "equ":
        return lambda a, b: ~((a < b) | (a > b))
    if name in opposite:
        compare = _COMPARE[opposite[name]]
        return lambda a, b: ~compare(a, b)
    if name == "ne":
        return lambda a, b: (a < b) | (a > b)
    return _COMPARE[name]


def _compared(builder: Builder, ins: Instruction, name: str) -> Callable[[Lanes], np.ndarray]:
    type_ = ins.type
    read_as = f"u{type_[1:]}" if name in _UNSIGNED else type_
    first, second = (builder.read(operand, read_as) for operand in ins.operands[1:3])
    compare = _comparison(name, type_)
    flush = ins.has("ftz") and type_ == "f32"

    def result(lanes: Lanes) -> np.ndarray:
        a, b = lanes.values[first], lanes.values[second]
        if type_ == "bf16":
            a, b = floats.bf16_to_f32(a), floats.bf16_to_f32(b)
        elif flush:
            a, b = floats.flush(a), floats.flush(b)
        return compare(a, b)

    return result


@instruction("setp")
def make_set_predicate(builder: Builder, ins: Instruction) -> Step:
    """``p|q = (a op b) combined with c``: q takes the comparison's opposite."""
    name, *rest = (m for m in ins.modifiers[:-1] if m != "ftz")
    targets = [t.strip() for t in ins.operands[0].split("|")]
    compared = _compared(builder, ins, name)
    combine = _COMBINE[rest[0]] if rest else None
    other = builder.read(ins.operands[3], "pred") if combine else -1
    results = [builder.write(target, "pred") for target in targets]

    def step(lanes: Lanes) -> None:
        holds = compared(lanes)
        values = lanes.values
        third = values[other].copy() if combine else None
        values[results[0]][...] = combine(holds, third) if combine else holds
        if len(results) > 1:
            opposite = np.logical_not(holds)
            values[results[1]][...] = combine(opposite, third) if combine else opposite

    if combine is None and len(results) == 1 and ins.type not in FLOATS:
        return _set_integer_predicate(builder, ins, name, results[0])
    return step


def _set_integer_predicate(builder: Builder, ins: Instruction, name: str, result: int) -> Step:
    type_ = f"u{ins.type[1:]}" if name in _UNSIGNED else ins.type
    first, second = (builder.read(operand, type_) for operand in ins.operands[1:3])
    compare = _COMPARE[_UNSIGNED.get(name, name)]

    def step(lanes: Lanes) -> None:
        values = lanes.values
        compare(values[first], values[second], values[result])

    return step


@instruction("selp")
def make_select(builder: Builder, ins: Instruction) -> Step:
    type_ = ins.type
    first, second = (builder.read(operand, type_) for operand in ins.operands[1:3])
    predicate = builder.read(ins.operands[3], "pred")
    destination = builder.write(ins.operands[0], type_)
    keeps_first = builder.same_register(first, destination)

    def step(lanes: Lanes) -> None:
        values = lanes.values
        holds, result = values[predicate], values[destination]
        if keeps_first:
            np.copyto(result, values[second], where=np.logical_not(holds))
        else:
            result[...] = values[second]
            np.copyto(result, values[first], where=holds)

    return step
