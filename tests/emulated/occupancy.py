"""How many registers the sweeps take, and how many warps of them fit a multiprocessor: `make occupancy`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pace_kernels.definitions import DEFINITIONS
from pace_kernels.definitions.kit import Definition

from . import build
from .build import MachineCode
from .device import kernel_name

THREADS = 128  # of a block; csrc/cuda/launches.h
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
