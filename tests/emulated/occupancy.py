"""How many registers the sweeps take, and how many warps of them fit a multiprocessor: `make occupancy`."""

from __future__ import annotations

import re

from . import build
from .build import MachineCode

THREADS = 128  # of a block; csrc/cuda/launches.h
SWEEP = r"pace::(pace|mada|pullback|schedule_free)_kernel<pace::(\w+),pace::(\w+),?(.*)>"
# Of a multiprocessor: registers, threads, shared memory in KiB (CUDA C++ Programming Guide, compute capabilities).
MULTIPROCESSOR = {
    "80": (65536, 2048, 164),
    "86": (65536, 1536, 100),
    "90": (65536, 2048, 228),
    "100": (65536, 2048, 228),
    "120": (65536, 1536, 100),
}
ROWS = {
    "PACE": ("pace", "true,true,true,false"),
    "PACE, `log_stats=True`": ("pace", "true,true,true,true"),
    "`Pullback(AdamW)`": ("pullback", "true,true,true,false"),
    "ScheduleFreeAdamW": ("schedule_free", ""),
    "MADA, all learned": ("mada", "true,true,true,true,true"),
    "MADA, preset `adamw`": ("mada", "false,false,false,false,true"),
}
FORMATS = {"float32": "pace::Float32,pace::Float32", "bfloat16": "pace::BFloat16,pace::BFloat16"}


def warps(arch: str, code: MachineCode) -> int:
    """How many fit. Registers are given out 8 a thread; a block takes 1 KiB of shared memory for itself."""
    registers, threads, shared = MULTIPROCESSOR[arch]
    of_registers = registers // (-(-code.registers // 8) * 8 * THREADS)
    of_shared = shared * 1024 // (code.shared + 1024)
    return min(of_registers, threads // THREADS, of_shared) * THREADS // 32


def sweeps(arch: str) -> list[tuple[str, re.Match[str], MachineCode]]:
    found = [(name, re.fullmatch(SWEEP, name), code) for name, code in build.machine_code(arch).items()]
    return [(name, match, code) for name, match, code in found if match is not None]


def table() -> list[str]:
    archs = [f"{arch[:-1]}.{arch[-1]}" for arch in build.ARCHS]
    lines = [f"| registers a thread (warps a multiprocessor) | {' | '.join(archs)} |"]
    lines.append("| --- |" + " --- |" * len(archs))
    for row, (family, flags) in ROWS.items():
        for dtype, formats in FORMATS.items():
            name = f"pace::{family}_kernel<{f'{formats},{flags}'.rstrip(',')}>"
            codes = [(arch, build.machine_code(arch)[name]) for arch in build.ARCHS]
            cells = [f"{code.registers} ({warps(arch, code)})" for arch, code in codes]
            lines.append(f"| {row}, {dtype} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
