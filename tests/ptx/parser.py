"""PTX text to functions of instructions.

A module is cut into functions at once, a function's body is read when it is first needed: what nvcc writes for one
source file holds many kernels, and a test runs one or two of them. Operands stay text here; `program` turns them into
registers, constants and addresses.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from .dtypes import SIZES, PtxError

STATE_SPACES = ("global", "shared", "local", "param", "const")
ROUNDINGS = ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.S)
_LINE_DIRECTIVE = re.compile(r"(?m)^\s*\.(?:loc|file|version|target|address_size)\b[^\n]*$")
_SECTION = re.compile(r"\.section\s+[\w.]+\s*\{[^{}]*\}")
_FUNCTION = re.compile(r"(?:\.(?:visible|extern|weak|common)\s+)*\.(entry|func)\b")
_SIGNATURE = re.compile(r"\s*(?:\(([^()]*)\))?\s*([\w$.%]+)\s*(?:\(([^()]*)\))?", re.S)
_VARIABLE = re.compile(r"\s*(?:\.(visible|extern|weak|common)\s+)*\.(global|const|shared|local|param)\b(.*)", re.S)
_DECLARATOR = re.compile(r"([\w$.%]+)\s*((?:\[\s*\d*\s*\])*)\s*(?:=\s*(.*))?$", re.S)
_STATEMENT = re.compile(r"[\s;]*(?:(?P<brace>[{}])|(?P<label>[\w$%.]+)\s*:(?!:)|(?P<text>[^;]+);)")
_INSTRUCTION = re.compile(r"(?:@(!?)\s*([\w$%]+)\s+)?([\w.:]+)\s*(.*)", re.S)
_REGISTER_RANGE = re.compile(r"(.+)<(\d+)>$")
# Top-level commas separate operands; a bracket, a brace or a parenthesis holds its own.
_OPERAND = re.compile(r"(?:[^,{}\[\]()]|\{[^{}]*\}|\[[^\[\]]*\]|\([^()]*\))+")

_HEX_FLOAT = re.compile(r"0[fF]([0-9a-fA-F]{8})$|0[dD]([0-9a-fA-F]{16})$")
_INTEGER = re.compile(r"(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)[Uu]?$")
_DECIMAL = re.compile(r"[\d.]+(?:[eE][-+]?\d+)?$")


@dataclass(slots=True)
class Variable:
    name: str
    space: str
    type: str
    size: int
    align: int
    data: bytes | None = None
    extern: bool = False
    scope: int = 0


@dataclass(slots=True)
class Instruction:
    opcode: str
    modifiers: tuple[str, ...]
    operands: list[str]
    text: str
    scope: int = 0
    predicate: str | None = None
    negated: bool = False

    @property
    def type(self) -> str:
        return self.modifiers[-1]

    @property
    def rounding(self) -> str | None:
        return next((m for m in self.modifiers if m in ROUNDINGS), None)

    @property
    def space(self) -> str:
        return next((s for m in self.modifiers if (s := m.split("::")[0]) in STATE_SPACES), "generic")

    @property
    def vector(self) -> int:
        return next((int(m[1:]) for m in self.modifiers if m in ("v2", "v4", "v8")), 1)

    def has(self, modifier: str) -> bool:
        return modifier in self.modifiers


@dataclass
class Code:
    """A function's body. Names live in nested scopes: a scope is a number, `parents` leads outward."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[tuple[int, str], int] = field(default_factory=dict)
    registers: dict[tuple[int, str], str] = field(default_factory=dict)
    ranges: dict[tuple[int, str], tuple[int, str]] = field(default_factory=dict)
    variables: dict[tuple[int, str], Variable] = field(default_factory=dict)
    branch_targets: dict[str, list[str]] = field(default_factory=dict)
    parents: dict[int, int | None] = field(default_factory=lambda: {0: None})

    def scopes(self, scope: int | None):
        while scope is not None:
            yield scope
            scope = self.parents[scope]

    def register_type(self, scope: int, name: str) -> tuple[tuple[int, str], str] | None:
        """Where a register is declared, seen from a scope, and its type; None where the name is no register."""
        stem = name.rstrip("0123456789")
        digits = name[len(stem) :]
        for outer in self.scopes(scope):
            if (outer, name) in self.registers:
                return (outer, name), self.registers[outer, name]
            if digits and (outer, stem) in self.ranges:
                count, kind = self.ranges[outer, stem]
                if int(digits) < count:
                    return (outer, name), kind
        return None

    def variable(self, scope: int, name: str) -> Variable | None:
        return next((v for s in self.scopes(scope) if (v := self.variables.get((s, name)))), None)

    def label(self, scope: int, name: str) -> int:
        for outer in self.scopes(scope):
            if (outer, name) in self.labels:
                return self.labels[outer, name]
        raise PtxError(f"no label {name}")


@dataclass
class Function:
    name: str
    is_entry: bool
    parameters: list[Variable]
    returns: list[Variable]
    directives: str
    body: str

    @cached_property
    def code(self) -> Code:
        return _parse_body(self.body)

    def directive(self, name: str) -> list[int] | None:
        """The numbers of a directive between the parameters and the body, such as ``.reqntid 128, 1, 1``."""
        match = re.search(rf"\.{name}\s+(\d+(?:\s*,\s*\d+)*)", self.directives)
        return [int(n) for n in match.group(1).split(",")] if match else None


@dataclass
class Module:
    functions: dict[str, Function] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)

    def entry(self, name: str | None) -> Function:
        entries = [f for f in self.functions.values() if f.is_entry and name in (None, f.name)]
        if not entries:
            raise PtxError(f"no entry {name}, only {sorted(f.name for f in self.functions.values() if f.is_entry)}")
        return entries[0]


def split_operands(text: str) -> list[str]:
    return [operand.strip() for operand in _OPERAND.findall(text) if operand.strip()]


def immediate(text: str, type_: str) -> int | None:
    """The bits of a literal read as a value of this type; None where the text is no literal."""
    negative = text.startswith("-")
    body = text[1:].lstrip() if negative else text
    bits = 8 * SIZES.get(type_, 8)
    if match := _INTEGER.match(body):
        digits = match.group(1)
        octal = len(digits) > 1 and digits[0] == "0" and digits.isdigit()
        value = int(digits, 8) if octal else int(digits, 0)
        return (-value if negative else value) & ((1 << bits) - 1)
    if match := _HEX_FLOAT.match(body):
        single, double = match.groups()
        if (type_ == "f64") == (double is not None) or type_ not in ("f32", "f64"):
            return int(single or double, 16)
        number = struct.unpack(">f", bytes.fromhex(single)) if single else struct.unpack(">d", bytes.fromhex(double))
        return _float_bits(number[0], type_)
    if _DECIMAL.match(body):
        return _float_bits(-float(body) if negative else float(body), type_)
    return None


def _float_bits(number: float, type_: str) -> int:
    code = ("<f", "<I") if type_ == "f32" else ("<d", "<Q")
    return struct.unpack(code[1], struct.pack(code[0], number))[0]


def parse_variable(text: str, space: str, scope: int = 0, extern: bool = False) -> Variable:
    text = re.sub(r"\.attribute\([^)]*\)", "", text)
    match = _DECLARATOR.search(text)
    if match is None:
        raise PtxError(f"unknown declaration: {text}")
    head = text[: match.start()]
    align = re.search(r"\.align\s+(\d+)", head)
    type_ = next(t for t in reversed(re.findall(r"\.(\w+)", head)) if t in SIZES)
    element = SIZES[type_] * next((int(v) for v in re.findall(r"\.v([248])\b", head)), 1)
    count = 1
    for dimension in re.findall(r"\[\s*(\d*)\s*\]", match.group(2)):
        count *= int(dimension or 0)
    data = None
    if match.group(3):
        width = SIZES[type_]
        values = [immediate(v.strip(), type_) for v in match.group(3).strip().strip("{}").split(",") if v.strip()]
        if None in values:
            raise PtxError(f"unknown initial value: {text}")
        data = b"".join((v & ((1 << 8 * width) - 1)).to_bytes(width, "little") for v in values)
        data = data.ljust(count * element, b"\0")
    return Variable(
        match.group(1), space, type_, count * element, int(align.group(1)) if align else element, data, extern, scope
    )


def _parameters(text: str | None) -> list[Variable]:
    result = []
    for parameter in split_operands(text or ""):
        space = "reg" if parameter.lstrip().startswith(".reg") else "param"
        plain = re.sub(r"\.ptr(\s+\.(global|const|shared|local))?(\s+\.align\s+\d+)?", "", parameter)
        result.append(parse_variable(re.sub(r"^\s*\.(param|reg)\b", "", plain), space))
    return result


def _closing_brace(text: str, start: int) -> int:
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.start()
    raise PtxError("a function's body does not end")


@lru_cache(maxsize=64)
def parse(text: str) -> Module:
    text = _SECTION.sub("", _LINE_DIRECTIVE.sub("", _COMMENT.sub(" ", text)))
    module = Module()
    position = 0
    while True:
        position += len(text[position:]) - len(text[position:].lstrip("; \t\r\n"))
        if position >= len(text):
            return module
        head = _FUNCTION.match(text, position)
        semicolon = text.find(";", position)
        if head is None:
            if semicolon < 0:
                raise PtxError(f"unknown text: {text[position : position + 200]}")
            if variable := _VARIABLE.match(text[position:semicolon]):
                declared = parse_variable(variable.group(3), variable.group(2), 0, variable.group(1) == "extern")
                module.variables.append(declared)
            position = semicolon + 1
            continue
        brace = text.find("{", position)
        if semicolon >= 0 and (brace < 0 or semicolon < brace):  # a declaration
            position = semicolon + 1
            continue
        end = _closing_brace(text, brace)
        signature = _SIGNATURE.match(text, head.end())
        returns, name, parameters = signature.groups()
        module.functions[name] = Function(
            name,
            head.group(1) == "entry",
            _parameters(parameters),
            _parameters(returns),
            text[signature.end() : brace],
            text[brace + 1 : end],
        )
        position = end + 1


def _declare_registers(code: Code, scope: int, text: str) -> None:
    kind, names = text.split(None, 1)
    for name in names.split(","):
        if match := _REGISTER_RANGE.match(name.strip()):
            code.ranges[scope, match.group(1)] = int(match.group(2)), kind[1:]
        else:
            code.registers[scope, name.strip()] = kind[1:]


def parse_instruction(text: str, scope: int = 0) -> Instruction:
    negated, predicate, name, rest = _INSTRUCTION.match(text).groups()
    opcode, *modifiers = name.split(".")
    return Instruction(opcode, tuple(modifiers), split_operands(rest), text, scope, predicate, negated == "!")


def _parse_body(body: str) -> Code:
    code = Code()
    scopes = [0]
    label = ""
    position = 0
    while match := _STATEMENT.match(body, position):
        position = match.end()
        if match["brace"] == "{":
            scope = len(code.parents)
            code.parents[scope] = scopes[-1]
            scopes.append(scope)
        elif match["brace"]:
            scopes.pop()
        elif match["label"]:
            label = match["label"]
            code.labels[scopes[-1], label] = len(code.instructions)
        else:
            text = " ".join(match["text"].split())
            if text.startswith(".reg "):
                _declare_registers(code, scopes[-1], text[5:])
            elif text.startswith(".branchtargets"):
                code.branch_targets[label] = split_operands(text.split(None, 1)[1])
            elif variable := _VARIABLE.match(text):
                declared = parse_variable(variable.group(3), variable.group(2), scopes[-1])
                code.variables[scopes[-1], declared.name] = declared
            elif not text.startswith("."):
                code.instructions.append(parse_instruction(text, scopes[-1]))
    if rest := body[position:].strip(" \t\r\n;"):
        raise PtxError(f"no semicolon after: {rest[:200]}")
    return code
