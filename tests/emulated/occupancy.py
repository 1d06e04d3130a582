"""How many registers the sweeps take, and how many warps of them fit a multiprocessor: `make occupancy`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pace_kernels.definitions import DEFINITIONS
from pace_kernels.definitions.kit import Definition

from . import build
from .build import MachineCode
from .device import FORMATS as FORMAT_NAMES
from .device import kernel_name

THREADS = 128  # of a block; csrc/cuda/launches.h
CODED = r"pace::coded_kernel<pace::(Any|Known<\(pace::Format\)(\d+),(true|false),\(pace::Format\)(\d+)>),(true|false)>"
GENERAL = r"pace::general_kernel<pace::(\w+),(\d+)>"
SWEEP = r"pace::sweep_kernel<pace::(\w+)<(\d+)u>,(.*)>"
# Of a multiprocessor: registers, threads, shared memory in KiB (CUDA C++ Programming Guide, compute capabilities).
MULTIPROCESSOR = {
    "75": (65536, 1024, 64),
    "80": (65536, 2048, 164),
    "86": (65536, 1536, 100),
    "90": (65536, 2048, 228),
    "100": (65536, 2048, 228),
    "120": (65536, 1536, 100),
}
BY_NAME = {definition.name: definition for definition in DEFINITIONS.values()}
# A definition and its flags.
ROWS = {
    "PACE": ("Pace", "moment pull average"),
    "PACE, `log_stats=True`": ("Pace", "moment pull average stats"),
    "`Pullback(AdamW)`": ("Pullback", "before moment pull average"),
    "ScheduleFreeAdamW": ("ScheduleFree", ""),
    "MADA, all learned": ("Mada", "lag diff second lion adam average stay"),
    "MADA, preset `adamw`": ("Mada", "adam average"),
}
FORMATS = {"float32": "Float32", "bfloat16": "BFloat16"}


@dataclass(frozen=True)
class Sweep:
    definition: Definition
    on: dict[str, bool]  # its flags
    formats: list[str]  # of its operands

    @property
    def narrow(self) -> bool:
        return any(name != "Float32" for name in self.formats)


def warps(arch: str, code: MachineCode) -> int:
    """How many fit. Registers are given out 8 a thread; a block takes 1 KiB of shared memory for itself."""
    registers, threads, shared = MULTIPROCESSOR[arch]
    of_registers = registers // (-(-code.registers // 8) * 8 * THREADS)
    of_shared = shared * 1024 // (code.shared + 1024)
    return min(of_registers, threads // THREADS, of_shared) * THREADS // 32


def sweeps(arch: str) -> list[tuple[str, Sweep, MachineCode]]:
    found = []
    for name, code in build.machine_code(arch).items():
        if match := re.fullmatch(SWEEP, name):
            definition, number = BY_NAME[match.group(1)], int(match.group(2))
            on = {flag: bool(number >> k & 1) for k, flag in enumerate(definition.flags)}
            formats = [part.removeprefix("pace::") for part in match.group(3).split(",")]
            found.append((name, Sweep(definition, on, formats), code))
    return found


@dataclass(frozen=True)
class Coded:
    """A sweep of operands in codes: the formats that it is compiled for, None where it is for all."""

    formats: tuple[str, str | None] | None  # of weights and averages
    stats: bool


def coded(arch: str) -> list[tuple[str, Coded, MachineCode]]:
    found = []
    for name, code in build.machine_code(arch).items():
        if match := re.fullmatch(CODED, name):
            of, x, average, e, stats = match.groups()
            formats = (
                None if of == "Any" else (FORMAT_NAMES[int(x)], FORMAT_NAMES[int(e)] if average == "true" else None)
            )
            found.append((name, Coded(formats, stats == "true"), code))
    return found


def general(arch: str) -> list[tuple[str, Definition, int, MachineCode]]:
    """Sweeps of operands in any formats, by definition and group of flags."""
    found = []
    for name, code in build.machine_code(arch).items():
        if match := re.fullmatch(GENERAL, name):
            found.append((name, BY_NAME[match[1]], int(match[2]), code))
    return found


def usual_path(code: MachineCode) -> list[str]:
    """The instructions of a round on the way that most rounds take: with the most accesses of 16 and 8 bytes, without
    calls of functions, and otherwise the shortest. Instructions are 16 bytes."""
    lines = code.instructions
    branches = [(n, re.search(r"\bBRA\b(?!\.DIV).*?(0x[0-9a-f]+)", line)) for n, line in enumerate(lines)]
    jumps = {n: int(match[1], 16) // 16 for n, match in branches if match}
    first = next(n for n, line in enumerate(lines) if re.search(r"\bLDG\.E\.(64|128)\b", line))
    begin, end = max(((to, n) for n, to in jumps.items() if to <= first <= n), key=lambda loop: loop[1] - loop[0])
    best: dict[int, tuple[int, int, int]] = {}  # by instruction: how much better it is from there on; the next one

    def worth(line: str) -> int:
        if "CALL" in line:
            return -1000
        wide = re.search(r"\b(LDG|STG)\.E\.(64|128)\b", line)
        return 10 if wide else -1 if re.search(r"\b(LDG|STG)\.", line) else 0

    for n in range(end, begin - 1, -1):
        line = lines[n]
        always = re.match(r"(BRA|RET|EXIT)\b(?!.*\bU?P\d)", line) is not None
        after = [best[to] for to in ([jumps[n]] if n in jumps else []) if n < to <= end and to in best]
        ways = [(value, -length, to) for (value, length, _), to in zip(after, [jumps.get(n, 0)], strict=False)]
        if not (always and n in jumps) and n + 1 in best:
            ways.append((best[n + 1][0], -best[n + 1][1], n + 1))
        if n == end:
            ways = [(0, 0, -1)]
        if ways:
            value, length, to = max(ways)
            best[n] = (value + worth(line), 1 - length, to)
    path, n = [], begin
    while n >= 0:
        path.append(lines[n])
        n = best[n][2]
    return path


# What does not run on the pipe of integers and comparisons, by the beginnings of names: floating point and IMAD,
# memory, functions, control, the uniform pipe.
NOT_ALU = (
    *("FADD", "FMUL", "FFMA", "IMAD", "LD", "ST", "SHFL", "BAR", "MUFU", "I2F", "F2I", "FRND"),
    *("BRA", "BSSY", "BSYNC", "CALL", "RET", "EXIT", "NOP", "WARPSYNC", "U", "R2UR", "S2UR"),
)


def alu_operations(path: list[str]) -> int:
    names = [re.sub(r"^@!?U?P\w+ ", "", line) for line in path]
    return sum(not name.startswith(NOT_ALU) for name in names)


def table() -> list[str]:
    archs = [f"{arch[:-1]}.{arch[-1]}" for arch in build.ARCHS]
    lines = [f"| registers a thread (warps a multiprocessor) | {' | '.join(archs)} |"]
    lines.append("| --- |" + " --- |" * len(archs))
    for row, (definition_name, flags) in ROWS.items():
        definition = BY_NAME[definition_name]
        number = sum(1 << definition.flags.index(flag) for flag in flags.split())
        rule = definition.op.removesuffix("_").removesuffix("_step")
        for dtype, of in FORMATS.items():
            name = kernel_name({"kind": "sweep", "rule": rule, "formats": (of, of), "flags": number})
            codes = [(arch, build.machine_code(arch)[name]) for arch in build.ARCHS]
            cells = [f"{code.registers} ({warps(arch, code)})" for arch, code in codes]
            lines.append(f"| {row}, {dtype} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
