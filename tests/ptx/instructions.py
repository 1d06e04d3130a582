"""Builds the step of any instruction; the families of instructions are in modules of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import access, arithmetic, bits, compare, convert, warp  # noqa: F401  they fill the table
from .dtypes import PtxError
from .parser import Instruction
from .program import Builder, Step
from .table import MAKERS

if TYPE_CHECKING:
    from .executor import Lanes


# Modifiers that change a result, and that no kernel had yet.
_UNKNOWN = {"cc", "pack", "relu", "rs", "sat", "satfinite", "xorsign"}


def build_step(builder: Builder, instruction: Instruction, predicate: int | None) -> Step:
    """An instruction that is not known, or not in this form, raises when a kernel gets to it: many never do."""
    try:
        if instruction.opcode not in MAKERS or _UNKNOWN.intersection(instruction.modifiers):
            raise builder.error()
        step = _chain(builder, MAKERS[instruction.opcode](builder, instruction))
    except PtxError as error:
        step = _raise(error)
    except (KeyError, IndexError, StopIteration):
        step = _raise(builder.error())
    return step if predicate is None else _predicated(builder, step, predicate, instruction.negated)


def _chain(builder: Builder, step: Step) -> Step:
    if not builder.before and not builder.after:
        return step
    steps = [*builder.before, step, *builder.after]

    def chained(lanes: Lanes) -> None:
        for one in steps:
            one(lanes)

    return chained


def _raise(error: PtxError) -> Step:
    def step(lanes: Lanes) -> None:
        raise error

    return step


def _predicated(builder: Builder, step: Step, predicate: int, negated: bool) -> Step:
    usage = builder.usage()

    def predicated(lanes: Lanes) -> None:
        holds = lanes.values[predicate]
        lanes.run(step, ~holds if negated else holds, usage)

    return predicated
