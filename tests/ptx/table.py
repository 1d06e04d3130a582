"""The table of instructions: an opcode and what builds a step from its modifiers and operands."""

from __future__ import annotations

from collections.abc import Callable

from .parser import Instruction
from .program import Builder, Step

Maker = Callable[[Builder, Instruction], Step]
MAKERS: dict[str, Maker] = {}


def instruction(*opcodes: str) -> Callable[[Maker], Maker]:
    def register(maker: Maker) -> Maker:
        MAKERS.update(dict.fromkeys(opcodes, maker))
        return maker

    return register
