"""From a parsed entry to a program: blocks of steps, ready to run.

Calls are inlined. What an instruction reads and writes becomes a *slot*: a number under which the executor keeps a
numpy array (a register seen as one type, a special register) or a scalar (a constant, an address). A step is a closure
over slots, so that nothing is parsed or looked up by name while a kernel runs.

A block is straight-line code. Threads wait for each other at the beginnings of blocks only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .dtypes import DTYPES, FLOATS, SIZES, UNSIGNED, PtxError
from .parser import Function, Instruction, Module, Variable, immediate, parse_instruction, split_operands

if TYPE_CHECKING:
    from .executor import Lanes

Step = Callable[["Lanes"], None]
BuildStep = Callable[["Builder", Instruction, "int | None"], Step]

# Generic addresses: an address's upper half tells the window, global memory lies above all of them.
SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW = 1 << 32, 2 << 32, 3 << 32
SPECIAL = re.compile(
    r"%(?:tid|ntid|ctaid|nctaid)\.[xyz]$|%(?:laneid|warpid|nwarpid|smid|nsmid|gridid)$|%lanemask_(?:lt|le|eq|gt|ge)$"
    r"|%clock(?:_hi|64)?$|%globaltimer(?:_lo|_hi)?$|%dynamic_smem_size$|%total_smem_size$"
)
_ADDRESS = re.compile(r"([\w$%.]+)\s*(?:([+-])\s*(-?\w+))?$")
_TERMINATORS = frozenset({"bra", "brx", "ret", "exit", "bar", "barrier"})


@dataclass(frozen=True, slots=True)
class Place:
    """A fixed address: an offset in a state space, or a module variable's name. ``frame`` is where a call's parameters
    lie: local memory, which ``ld.param`` and ``st.param`` reach."""

    space: str
    offset: int = 0
    symbol: str = ""

    @property
    def address(self) -> int:
        return self.offset + (LOCAL_WINDOW if self.space == "frame" else 0)


class Slot(NamedTuple):
    """A register (by number) seen as a dtype from a byte offset on, a special register, or an address or a constant."""

    kind: str
    dtype: np.dtype
    register: int = -1
    offset: int = 0
    name: str = ""
    value: Any = None


@dataclass(frozen=True, slots=True)
class Address:
    """An operand in brackets: the slot that holds its base, or a fixed place, and a displacement."""

    base: int = -1
    place: Place | None = None
    displacement: int = 0


@dataclass
class Usage:
    """What some steps touch: per register its slots, the special registers' slots, the registers written."""

    registers: dict[int, list[int]] = field(default_factory=dict)
    specials: list[int] = field(default_factory=list)
    written: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, slots: Iterable[int], written: Iterable[int], table: list[Slot]) -> Usage:
        usage = cls(written=set(written))
        for number in sorted(set(slots)):
            slot = table[number]
            if slot.kind == "register":
                usage.registers.setdefault(slot.register, []).append(number)
            elif slot.kind == "special":
                usage.specials.append(number)
        return usage


@dataclass(frozen=True, slots=True)
class Mention:
    """The registers of an instruction, and those of them that it writes for all threads without having read them."""

    registers: frozenset[int]
    defined: frozenset[int]


@dataclass
class Barrier:
    """``bar.sync`` and ``bar.red``: who waits, for how many, and what is reduced over them."""

    identifier: int
    count: int | None
    aligned: bool
    reduction: str | None = None
    destination: int = -1
    predicate: int = -1


@dataclass
class Block:
    """``kind`` says how it ends: falls through (next), branch, switch, exit or barrier."""

    steps: list[Step]
    usage: Usage
    kind: str = "next"
    text: str = ""
    length: int = 0
    predicate: int | None = None
    negated: bool = False
    target: int = -1
    targets: np.ndarray | None = None
    selector: int = -1
    barrier: Barrier | None = None


@dataclass(eq=False)
class Instance:
    """One inlined copy of a function: its registers, call frames and parameters are its own."""

    function: Function
    places: dict[str, Place] = field(default_factory=dict)
    frames: dict[tuple[int, str], Place] = field(default_factory=dict)
    registers: dict[tuple[int, str], int] = field(default_factory=dict)
    positions: dict[int, int] = field(default_factory=dict)

    @cached_property
    def mentions(self) -> Counter[str]:
        texts = (i.text for i in self.function.code.instructions)
        return Counter(word for text in texts for word in re.findall(r"[\w$%]+", text))


@dataclass(slots=True)
class Line:
    instance: Instance
    instruction: Instruction
    target: Callable[[], int] | None = None


class Program:
    """An entry and the functions that it calls. ``blocks`` run; the rest says what storage a launch needs."""

    def __init__(self, module: Module, entry: Function, build_step: BuildStep) -> None:
        self.module, self.entry, self._build_step = module, entry, build_step
        self.slots: list[Slot] = []
        self.registers: list[str] = []  # their types
        self.storage: list[str] = []  # the types of the arrays that hold them
        self.stored_at: list[int] = []  # which of those arrays, by register
        self.local_size = 0
        self.shared_size = 0
        self.parameters: list[tuple[int, Variable]] = []
        self._numbers: dict[Slot, int] = {}
        self._shared: dict[tuple[str, int, str], Place] = {}
        self._module_places: dict[str, Place] = {}
        self._lines: list[Line] = []

        parameter_places = {}
        offset = 0
        for parameter in entry.parameters:
            offset = _align(offset, parameter.align)
            self.parameters.append((offset, parameter))
            parameter_places[parameter.name] = Place("param", offset)
            offset += parameter.size
        self.parameter_size = offset
        self._place_module_variables()
        instance = Instance(entry, parameter_places)
        self._expand(instance, ())
        self._lines.append(Line(instance, parse_instruction("exit")))
        # What is left of the block's shared memory is dynamic, and all of it in one place.
        self.shared_size = _align(self.shared_size, 128)
        self._dynamic = Place("shared", self.shared_size)
        self.blocks = self._build_blocks()
        self.everything = Usage.of(range(len(self.slots)), (), self.slots)
        self.reduces = any(block.barrier and block.barrier.reduction for block in self.blocks)

    # Storage

    def _place_module_variables(self) -> None:
        for variable in self.module.variables:
            if variable.space != "shared":
                self._module_places[variable.name] = Place("global", symbol=variable.name)
            elif not (variable.extern and variable.size == 0):
                self._module_places[variable.name] = self._new_shared(variable)

    def _new_shared(self, variable: Variable) -> Place:
        offset = _align(self.shared_size, variable.align)
        self.shared_size = offset + variable.size
        return Place("shared", offset)

    def new_frame(self, size: int, align: int, space: str = "frame") -> Place:
        offset = _align(self.local_size, max(align, 1))
        self.local_size = offset + size
        return Place(space, offset)

    def place(self, instance: Instance, scope: int, name: str) -> Place | None:
        """Where a variable or a parameter lies; None where the name is neither."""
        if variable := instance.function.code.variable(scope, name):
            key = variable.scope, name
            if variable.space == "shared":
                # However often a function is inlined, its shared variables are one.
                shared_key = instance.function.name, *key
                if shared_key not in self._shared:
                    self._shared[shared_key] = self._new_shared(variable)
                return self._shared[shared_key]
            if key not in instance.frames:
                space = {"param": "frame", "local": "local"}.get(variable.space)
                if space is None:
                    raise PtxError(f"unknown declaration: .{variable.space} {name} in a function")
                instance.frames[key] = self.new_frame(variable.size, variable.align, space)
            return instance.frames[key]
        if name in instance.places:
            return instance.places[name]
        if name in self._module_places:
            return self._module_places[name]
        if any(v.name == name for v in self.module.variables):
            return self._dynamic
        return None

    def slot(self, slot: Slot) -> int:
        number = self._numbers.get(slot)
        if number is None:
            number = self._numbers[slot] = len(self.slots)
            self.slots.append(slot)
        return number

    def register(self, type_: str) -> int:
        self.registers.append(type_)
        return len(self.registers) - 1

    # Inlining

    def _expand(self, instance: Instance, callers: tuple[str, ...]) -> None:
        function = instance.function
        if function.name in callers:
            raise PtxError(f"recursive call of {function.name}")
        code = function.code
        for variable in code.variables.values():
            if variable.space == "shared":
                self.place(instance, variable.scope, variable.name)
        end = len(code.instructions)
        for position, instruction in enumerate(code.instructions):
            instance.positions[position] = len(self._lines)
            callee = next((o for o in instruction.operands if o in self.module.functions), None)
            if instruction.opcode == "call" and callee:
                self._call(instance, instruction, self.module.functions[callee], (*callers, function.name))
                continue
            line = Line(instance, instruction)
            if instruction.opcode == "bra":
                label = code.label(instruction.scope, instruction.operands[0])
                line.target = lambda label=label: instance.positions[label]
            elif instruction.opcode == "ret" and callers:
                line.target = lambda: instance.positions[end]
            self._lines.append(line)
        instance.positions[end] = len(self._lines)

    def _call(self, caller: Instance, instruction: Instruction, function: Function, callers: tuple[str, ...]) -> None:
        operands = instruction.operands
        name_at = operands.index(function.name)
        results = split_operands(operands[0][1:-1]) if name_at else []
        arguments = split_operands(operands[name_at + 1][1:-1]) if len(operands) > name_at + 1 else []
        if len(results) != len(function.returns) or len(arguments) != len(function.parameters):
            raise PtxError(f"arguments do not match {function.name}: {instruction.text}")
        callee = Instance(function)
        end: list[int] = []
        if instruction.predicate:
            sign = "" if instruction.negated else "!"
            skip = parse_instruction(f"@{sign}{instruction.predicate} bra after", instruction.scope)
            self._lines.append(Line(caller, skip, lambda: end[0]))

        def move(owner: Instance, scope: int, text: str) -> None:
            self._lines.append(Line(owner, parse_instruction(text, scope)))

        def bind(formal: Variable, actual: str) -> str | None:
            """Let a formal parameter lie where the actual one does; a register or a literal needs a place first."""
            place = self.place(caller, instruction.scope, actual) if re.match(r"[\w$%]", actual) else None
            register = None
            if place is None or place.space != "frame":
                place, register = self.new_frame(formal.size, formal.align), actual
            key = f"{formal.name} of call {len(self._lines)}"
            for instance in (caller, callee):
                instance.places[re.sub(r"\W", "_", key)] = place
            callee.places[formal.name] = place
            return re.sub(r"\W", "_", key) if register or formal.space == "reg" else None

        for formal, actual in zip(function.parameters, arguments, strict=True):
            if key := bind(formal, actual):
                if self.place(caller, instruction.scope, actual) is None:
                    move(caller, instruction.scope, f"st.param.{formal.type} [{key}], {actual}")
                if formal.space == "reg":
                    function.code.registers[0, formal.name] = formal.type
                    move(callee, 0, f"ld.param.{formal.type} {formal.name}, [{key}]")
        keys = [bind(formal, actual) for formal, actual in zip(function.returns, results, strict=True)]
        for formal in function.returns:
            if formal.space == "reg":
                function.code.registers[0, formal.name] = formal.type
        self._expand(callee, callers)
        for formal, actual, key in zip(function.returns, results, keys, strict=True):
            if key and formal.space == "reg":
                move(callee, 0, f"st.param.{formal.type} [{key}], {formal.name}")
            if key and self.place(caller, instruction.scope, actual) is None:
                move(caller, instruction.scope, f"ld.param.{formal.type} {actual}, [{key}]")
        end.append(len(self._lines))

    # Blocks

    def _build_blocks(self) -> list[Block]:
        leaders = {0}
        for position, line in enumerate(self._lines):
            if _ends_block(line.instruction):
                leaders.add(position + 1)
            if line.target:
                leaders.add(line.target())
            if line.instruction.opcode == "brx":
                leaders.update(self._switch_targets(line))
        starts = sorted(p for p in leaders if p < len(self._lines))
        numbers = {position: number for number, position in enumerate(starts)}
        mentions: list[list[Mention]] = []
        blocks = []
        for start, stop in zip(starts, [*starts[1:], len(self._lines)], strict=True):
            mentions.append([])
            blocks.append(self._build_block(self._lines[start:stop], numbers, mentions[-1]))
        self._store_registers(mentions)
        return blocks

    def _store_registers(self, blocks: list[list[Mention]]) -> None:
        """Let registers share arrays, so that a batch stays in cache: compilers name each value once.

        A register that one block alone mentions, and that its first instruction there writes for all threads, is dead
        outside of it; from its last mention on, another may have its array."""
        home: dict[int, int | None] = {}
        for number, block in enumerate(blocks):
            for mention in block:
                for register in mention.registers:
                    if register not in home:
                        home[register] = number if register in mention.defined else None
                    elif home[register] != number:
                        home[register] = None
        self.stored_at = [-1] * len(self.registers)
        free: dict[str, list[int]] = {}

        def new(type_: str) -> int:
            self.storage.append(type_)
            return len(self.storage) - 1

        for number, block in enumerate(blocks):
            last = {register: at for at, mention in enumerate(block) for register in mention.registers}
            for at, mention in enumerate(block):
                for register in mention.registers:
                    type_ = self.registers[register]
                    if self.stored_at[register] < 0:
                        spare = free.setdefault(_storage_class(type_), []) if home[register] == number else []
                        self.stored_at[register] = spare.pop() if spare else new(type_)
                # Not before the instruction's results have theirs: no operand is overwritten by another's result.
                for register in mention.registers:
                    if home[register] == number and last[register] == at:
                        free.setdefault(_storage_class(self.registers[register]), []).append(self.stored_at[register])
        unused = {}
        for register, where in enumerate(self.stored_at):
            if where < 0:
                type_ = self.registers[register]
                if type_ not in unused:
                    unused[type_] = new(type_)
                self.stored_at[register] = unused[type_]

    def _switch_targets(self, line: Line) -> list[int]:
        instruction, instance = line.instruction, line.instance
        labels = instance.function.code.branch_targets[instruction.operands[1]]
        code = instance.function.code
        return [instance.positions[code.label(instruction.scope, label)] for label in labels]

    def _build_block(self, lines: list[Line], numbers: dict[int, int], mentions: list[Mention]) -> Block:
        steps, slots, written = [], [], []
        block = Block(steps, Usage(), length=len(lines))
        for line in lines:
            instruction = line.instruction
            builder = Builder(self, line.instance, instruction)
            predicate = builder.read(instruction.predicate, "pred") if instruction.predicate else None
            if _ends_block(instruction):
                block.predicate, block.negated, block.text = predicate, instruction.negated, instruction.text
                self._finish_block(block, builder, line, numbers)
                steps.extend(builder.before)
            else:
                steps.append(self._build_step(builder, instruction, predicate))
            slots.extend(builder.slots)
            written.extend(builder.written)
            mentions.append(builder.mention(conditional=predicate is not None))
        block.usage = Usage.of(slots, written, self.slots)
        return block

    def _finish_block(self, block: Block, builder: Builder, line: Line, numbers: dict[int, int]) -> None:
        instruction = line.instruction
        if line.target:  # a branch, or the return of an inlined function
            block.kind, block.target = "branch", numbers[line.target()]
        elif instruction.opcode == "brx":
            block.kind = "switch"
            block.selector = builder.read(instruction.operands[0], "u32")
            block.targets = np.array([numbers[t] for t in self._switch_targets(line)], np.int32)
        elif instruction.opcode in ("ret", "exit"):
            block.kind = "exit"
        else:
            block.kind, block.barrier = "barrier", _barrier(builder, instruction)


def _barrier(builder: Builder, instruction: Instruction) -> Barrier:
    if instruction.has("arrive"):
        raise PtxError(f"unknown instruction: {instruction.text}")
    operands = list(instruction.operands)
    aligned = instruction.opcode == "bar" or instruction.has("aligned")
    barrier = Barrier(-1, None, aligned)
    if instruction.has("red"):
        barrier.reduction = next(m for m in instruction.modifiers if m in ("popc", "and", "or"))
        barrier.destination = builder.write(operands.pop(0), "u32" if barrier.reduction == "popc" else "pred")
        barrier.predicate = builder.read(operands.pop(), "pred")
    barrier.identifier = builder.read(operands[0], "u32")
    barrier.count = builder.read(operands[1], "u32") if len(operands) > 1 else None
    return barrier


def _ends_block(instruction: Instruction) -> bool:
    return instruction.opcode in _TERMINATORS and not instruction.has("warp")


def _storage_class(type_: str) -> str:
    return "pred" if type_ == "pred" else str(SIZES[type_])


def _align(offset: int, align: int) -> int:
    return -(-offset // align) * align


class Builder:
    """Turns one instruction's operands into slots, and remembers which it handed out.

    ``before`` and ``after`` are steps that bring an operand into a register first, or a result out of one: a negated
    predicate, a vector in braces."""

    def __init__(self, program: Program, instance: Instance, instruction: Instruction) -> None:
        self.program, self.instance, self.instruction = program, instance, instruction
        self.slots: list[int] = []
        self.written: list[int] = []
        self.read_registers: set[int] = set()
        self.before: list[Step] = []
        self.after: list[Step] = []

    def error(self) -> PtxError:
        return PtxError(f"unknown instruction: {self.instruction.text}")

    def _unknown(self, operand: str) -> PtxError:
        return PtxError(f"unknown operand {operand}: {self.instruction.text}")

    def read(self, operand: str, type_: str, part: int = 0) -> int:
        """The slot of an operand read as a type; of a packed operand, its ``part``-th element of that type."""
        dtype, size = DTYPES[type_], SIZES[type_]
        if operand[0] == "!":
            return self._negated(operand[1:].strip())
        if operand[0] == "-" and self._register(operand[1:]) is not None:
            return self._minus(operand[1:], type_, part)
        if operand[0] == "{":
            return self._packed(operand, type_, part)
        if (register := self._register(operand)) is not None:
            held = SIZES[self.program.registers[register]]
            if held < size * (part + 1):
                raise PtxError(f"{operand} is narrower than .{type_}: {self.instruction.text}")
            self.read_registers.add(register)
            return self._use(Slot("register", dtype, register, offset=size * part))
        if SPECIAL.match(operand):
            return self._use(Slot("special", dtype, name=operand))
        if operand == "WARP_SZ":
            return self.constant(32, type_)
        if type_ == "pred":
            return self.constant(bool(int(operand, 0)), type_)
        literal = "b64" if part else type_
        if (bits := immediate(operand, literal)) is not None:
            return self.constant(bits >> (8 * size * part) & ((1 << 8 * size) - 1), type_)
        address = self._named_address(operand)
        if address is None:
            raise self._unknown(operand)
        place = address.place
        if place.space == "global":
            return self._use(Slot("symbol", dtype, offset=address.displacement, name=place.symbol))
        return self.constant(place.address + address.displacement, type_)

    def write(self, operand: str, type_: str, part: int | None = None) -> int:
        """The slot to which a result of a type goes, or that result's ``part``-th element. A register wider than the
        type is seen whole, so that numpy extends the result by its sign."""
        if operand == "_":
            return self.temporary(type_)
        if operand[0] == "{":
            return self._unpacked(operand, type_)
        register = self._register(operand)
        if register is None:
            raise PtxError(f"unknown destination {operand}: {self.instruction.text}")
        dtype, size = DTYPES[type_], SIZES[type_]
        held = SIZES[self.program.registers[register]]
        if held < size:
            raise PtxError(f"{operand} is narrower than .{type_}: {self.instruction.text}")
        if held > size and part is None and type_ not in FLOATS:
            dtype = UNSIGNED[held]
        self.written.append(register)
        return self._use(Slot("register", dtype, register, offset=size * (part or 0)))

    def constant(self, bits: int, type_: str) -> int:
        dtype = DTYPES[type_]
        if type_ == "pred":
            return self._use(Slot("constant", dtype, value=np.bool_(bits)))
        raw = UNSIGNED[dtype.itemsize].type(bits & ((1 << 8 * dtype.itemsize) - 1))
        # Keyed by its bits: 0.0 and -0.0 compare equal.
        return self._use(Slot("constant", dtype, offset=int(raw), value=raw.tobytes()))

    def temporary(self, type_: str) -> int:
        register = self.program.register(type_)
        self.written.append(register)
        return self._use(Slot("register", DTYPES[type_], register))

    def address(self, operand: str) -> Address:
        inner = operand[1:-1].strip()
        match = _ADDRESS.match(inner)
        if match is None:
            raise self.error()
        name, sign, number = match.groups()
        displacement = int(number, 0) * (-1 if sign == "-" else 1) if number else 0
        if (register := self._register(name)) is not None:
            self.read_registers.add(register)
            size = SIZES[self.program.registers[register]]
            return Address(self._use(Slot("register", UNSIGNED[size], register)), None, displacement)
        if (place := self.program.place(self.instance, self.instruction.scope, name)) is None:
            if (bits := immediate(name, "u64")) is None:
                raise self._unknown(name)
            return Address(self.constant(bits, "u64"), None, displacement)
        if place.space == "global":
            slot = Slot("symbol", DTYPES["u64"], offset=0, name=place.symbol)
            return Address(self._use(slot), None, displacement)
        return Address(-1, place, displacement)

    def result_is_used(self, operand: str) -> bool:
        return operand != "_" and self.instance.mentions[operand] > 1

    def same_register(self, a: int, b: int) -> bool:
        one, other = self.program.slots[a], self.program.slots[b]
        return one.kind == other.kind == "register" and one.register == other.register

    def slot_dtype(self, slot: int) -> np.dtype:
        return self.program.slots[slot].dtype

    def mention(self, conditional: bool) -> Mention:
        table = self.program.slots
        registers = frozenset(table[s].register for s in self.slots if table[s].kind == "register")
        return Mention(registers, frozenset(() if conditional else set(self.written) - self.read_registers))

    def usage(self) -> Usage:
        return Usage.of(self.slots, self.written, self.program.slots)

    def _use(self, slot: Slot) -> int:
        number = self.program.slot(slot)
        self.slots.append(number)
        return number

    def _register(self, name: str) -> int | None:
        seen, known = (self.instruction.scope, name), self.instance.registers
        if seen not in known:
            declared = self.instance.function.code.register_type(*seen)
            if declared is None:
                return None
            key, type_ = declared
            if key not in known:
                known[key] = self.program.register(type_)
            known[seen] = known[key]
        return known[seen]

    def _named_address(self, operand: str) -> Address | None:
        match = _ADDRESS.match(operand)
        if match is None:
            return None
        name, sign, number = match.groups()
        place = self.program.place(self.instance, self.instruction.scope, name)
        if place is None:
            return None
        return Address(-1, place, int(number, 0) * (-1 if sign == "-" else 1) if number else 0)

    def _negated(self, operand: str) -> int:
        source, result = self.read(operand, "pred"), self.temporary("pred")

        def step(lanes: Lanes) -> None:
            np.logical_not(lanes.values[source], lanes.values[result])

        self.before.append(step)
        return result

    def _minus(self, operand: str, type_: str, part: int) -> int:
        source, result = self.read(operand, type_, part), self.temporary(type_)

        def step(lanes: Lanes) -> None:
            np.negative(lanes.values[source], lanes.values[result])

        self.before.append(step)
        return result

    def _packed(self, operand: str, type_: str, part: int) -> int:
        elements = split_operands(operand[1:-1])
        size = SIZES[type_] * (part + 1)
        register = self.program.register(f"b{8 * max(size, SIZES[type_])}")
        self.written.append(register)
        element_type = f"b{8 * size // len(elements)}"
        for number, element in enumerate(elements):
            source = self.read(element, element_type)
            offset = SIZES[element_type] * number
            self.before.append(
                _copy(self._use(Slot("register", DTYPES[element_type], register, offset=offset)), source)
            )
        return self._use(Slot("register", DTYPES[type_], register, offset=SIZES[type_] * part))

    def _unpacked(self, operand: str, type_: str) -> int:
        elements = split_operands(operand[1:-1])
        register = self.program.register(f"b{8 * SIZES[type_]}")
        self.written.append(register)
        element_type = f"b{8 * SIZES[type_] // len(elements)}"
        for number, element in enumerate(elements):
            if element == "_":
                continue
            offset = SIZES[element_type] * number
            part = self._use(Slot("register", DTYPES[element_type], register, offset=offset))
            self.after.append(_copy(self.write(element, element_type), part))
        return self._use(Slot("register", DTYPES[type_], register))


def _copy(destination: int, source: int) -> Step:
    def step(lanes: Lanes) -> None:
        lanes.values[destination][...] = lanes.values[source]

    return step
