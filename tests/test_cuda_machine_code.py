"""Promise: for every architecture, no kernel spills; sweeps load and store 128 bits at a time; before the first use as
much is under way as keeps a multiprocessor's memory busy, of tensors that are not aligned too; nothing is contracted.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from emulated import build
from emulated.build import machine_code
from emulated.occupancy import MULTIPROCESSOR, Sweep, alu_operations, coded, general, sweeps, table, usual_path, warps

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))


def operands(sweep: Sweep) -> tuple[int, int]:
    """128-bit loads and stores of a round."""
    elements = 8 if sweep.narrow else 4
    loads = stores = 0
    for operand, name in zip(sweep.definition.operands, sweep.formats, strict=True):
        parts = elements * (4 if name == "Float32" else 2) // 16
        loads += parts * does(operand.reads, sweep.on)
        stores += parts * does(operand.writes, sweep.on)
    return loads, stores


def does(condition: str, on: dict[str, bool]) -> bool:
    """What a definition says in C++."""
    python = condition.replace("||", "or").replace("&&", "and").replace("true", "True").replace("false", "False")
    return bool(eval(python, {}, dict(on)))


FIND_NVCC = """
import runpy
setup = runpy.run_path('setup.py')
print(setup['find_nvcc'](setup['find_torch']()).path)
"""

# By definition and group of flags (csrc/cuda/rules.h): how many warps fit a multiprocessor at the least.
GENERAL_WARPS = {
    **{("Mada", 0): 24, ("Mada", 1): 16, ("Mada", 2): 12, ("ScheduleFree", 0): 24},
    **{("Pullback", 0): 24, ("Pullback", 1): 20},
}
# And how many operands they read at the most.
GENERAL_OPERANDS = {
    **{("Mada", 0): 6, ("Mada", 1): 9, ("Mada", 2): 10, ("ScheduleFree", 0): 4},
    **{("Pullback", 0): 4, ("Pullback", 1): 4},
}
# What their steps read of a parameter in the frequent formats: weights of 32 bits, states of 8, gradients in bfloat16.
GENERAL_BYTES = {
    **{("Mada", 0): 4 + 2 + 2, ("Mada", 1): 4 + 2 + 4 + 2 + 2, ("Mada", 2): 4 + 2 + 4 + 2 + 2 * 2},
    **{("ScheduleFree", 0): 4 + 2 + 1 + 2, ("Pullback", 0): 2 + 2 + 4 + 1, ("Pullback", 1): 2 + 2 + 4 + 1},
}


@pytest.mark.parametrize("arch", build.ARCHS)
def test_every_instance_is_there(arch: str) -> None:
    names = [sweep.definition.name for _, sweep, _ in sweeps(arch)]
    assert names.count("Pace") == 5 * 12 and names.count("Mada") == 5 * 17
    assert names.count("Pullback") == 5 * 4 + 3 * 6  # with a second moment in 5 pairs of formats, without in 3 formats
    assert names.count("ScheduleFree") == 5
    of = [sweep.formats for _, sweep, _ in coded(arch)]
    assert len(of) == 4 * 4 + 2 and of.count(None) == 2  # weights x averages; one for all formats, one with sums
    groups = [(definition.name, group) for _, definition, group, _ in general(arch)]
    assert sorted(groups) == sorted(GENERAL_WARPS)
    assert len(machine_code(arch)) == len(names) + len(of) + len(groups) + 7  # scalars of four, sums of two, learning


@pytest.mark.parametrize("arch", build.ARCHS)
def test_nothing_spills(arch: str) -> None:
    for name, code in machine_code(arch).items():
        assert code.stack == 0, name
        assert not any(re.search(r"\b(LDL|STL)\b", line) for line in code.instructions), name


@pytest.mark.parametrize("arch", build.ARCHS)
def test_the_vector_path_moves_128_bits(arch: str) -> None:
    for name, sweep, code in sweeps(arch):
        loads, stores = operands(sweep)
        wide = [line for line in code.instructions if re.search(r"\b(LDG|STG)\.E\.128\b", line)]
        assert sum("LDG" in line for line in wide) == loads, name
        assert sum("STG" in line for line in wide) == stores, name


# Accesses of 128 and of 64 bits that 8 elements take.
CODED = {
    **{"Float32": (2, 0), "BFloat16": (1, 0), "Pair32": (2, 0), "Pair24": (1, 1)},
    **{"Grid8": (0, 1), "Grid16": (1, 0), None: (0, 0)},
}


@pytest.mark.parametrize("arch", build.ARCHS)
def test_codes_are_moved_64_bits_at_a_time_and_all_else_128(arch: str) -> None:
    for name, sweep, code in coded(arch):
        if sweep.formats is None:
            continue
        x, e = (CODED[part] for part in sweep.formats)
        for kind, gradients in (("LDG", 1 + 2), ("STG", 0)):  # of bfloat16, and of float32
            of = [sum(f"{kind}.E.{bits}" in line for line in code.instructions) for bits in (128, 64)]
            assert of == [x[0] + e[0] + gradients, x[1] + e[1] + 2], (name, kind)


@pytest.mark.parametrize("arch", build.ARCHS)
def test_enough_codes_are_under_way_before_the_first_use(arch: str) -> None:
    for name, sweep, code in coded(arch):
        if sweep.formats is None:
            continue
        path = build.MachineCode(tuple(line for line in usual_path(code) if not re.search(r"\bBRA\b", line)), 0, 0, 0)
        bytes_ = under_way(path, True) + under_way(path, False) - 16  # of gradients in bfloat16
        assert warps(arch, code) * 32 * bytes_ >= IN_FLIGHT, (name, bytes_)


def test_an_h100_has_time_for_the_operations_of_codes() -> None:
    """For 85 on the pipe of integers a parameter at its bandwidth (1.33 clocks of 64 lanes at 16.2 bytes)."""
    for name, sweep, code in coded("90"):
        if sweep.formats is not None:
            path = usual_path(code)
            gradients = 4  # to take bfloat16 apart, where the path has those in float32
            assert (alu_operations(path) + gradients) / 8 <= 70, (name, alu_operations(path) / 8)


# The memory of a multiprocessor of an H100 is busy with some 15 KB in flight (3.35 TB/s x 0.6 µs / 132); twice that.
IN_FLIGHT = 2 * 15_000
WIDTHS = {"128": 16, "64": 8, "U16": 2}


def under_way(code: build.MachineCode, wide: bool) -> int:
    """The most bytes that a thread has asked for before it uses any of them: in accesses of 128 bits, or in others."""
    most = 0
    filled: dict[int, int] = {}  # by the first register of a load
    for line in code.instructions:
        target, sources = registers(line)
        if any(first <= source < first + (size + 3) // 4 for first, size in filled.items() for source in sources):
            filled = {}
        load = re.search(r"\bLDG\.E((?:\.\w+)*)", line)
        if re.search(r"\bBRA\b", line):
            filled = {}
        elif load is not None:
            size = next((WIDTHS[part] for part in load[1].split(".") if part in WIDTHS), 4)
            if (size == 16) == wide:
                filled[target] = size
        most = max(most, sum(filled.values()))
    return most


@pytest.mark.parametrize("wide", [True, False], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("arch", build.ARCHS)
def test_enough_loads_are_under_way_before_the_first_use(arch: str, wide: bool) -> None:
    """Of tensors that are not aligned to 16 bytes too, which are read an element an access."""
    for name, _, code in sweeps(arch):
        assert warps(arch, code) * 32 * under_way(code, wide) >= IN_FLIGHT, (name, under_way(code, wide))


def registers(line: str) -> tuple[int, list[int]]:
    """The number of the register that an instruction writes, -1 where its first operand is none (a store, a comparison
    that sets a predicate), and those that it reads; R64 of an address stands for R64 and R65."""
    operands = re.sub(r"^(@!?U?P\w+ )?[\w.]+ ?", "", line).split(", ")
    target = re.fullmatch(r"R(\d+)(\.\w+)*", operands[0].rstrip(" ;"))
    read = []
    for number, wide in re.findall(r"\bR(\d+)(\.64)?", ", ".join(operands[1:] if target else operands)):
        read += [int(number)] + ([int(number) + 1] if wide else [])
    return (int(target.group(1)) if target else -1), read


def test_registers_of_instructions() -> None:
    assert registers("@P0 LDG.E.128 R48, desc[UR12][R108.64] ;") == (48, [108, 109])
    assert registers("STG.E.128 desc[UR12][R2.64], R4 ;") == (-1, [2, 3, 4])
    assert registers("ISETP.NE.AND P0, PT, R4, RZ, PT ;") == (-1, [4])
    assert registers("FMUL R11, R36.reuse, R5 ;") == (11, [36, 5])


@pytest.mark.parametrize("arch", build.ARCHS)
def test_occupancy(arch: str) -> None:
    for name, sweep, code in sweeps(arch):
        least = 16 if sweep.definition.name != "Mada" else (8 if sweep.narrow else 12)
        assert warps(arch, code) >= least, (name, code.registers)
    for name, of, code in coded(arch):
        assert warps(arch, code) >= (20 if of.formats is not None else 12 if of.stats else 16), (name, code.registers)
    for name, definition, group, code in general(arch):
        least = min(GENERAL_WARPS[definition.name, group], MULTIPROCESSOR[arch][1] // 32)
        assert warps(arch, code) >= least, (name, code.registers)


def test_the_readme_has_this_table() -> None:
    readme = (build.ROOT / "tests/gpu/README.md").read_text()
    assert "\n".join(table()) in readme, "make occupancy"


@pytest.mark.parametrize("arch", build.ARCHS)
def test_nothing_is_contracted(arch: str) -> None:
    """FFMA is there for IEEE division and square root alone: 4 to 6 each, none where the rule has neither."""
    for name, code in machine_code(arch).items():
        fused = sum("FFMA" in line for line in code.instructions)
        functions = sum("MUFU.RCP" in line or "MUFU.RSQ" in line for line in code.instructions)
        assert fused <= 6 * functions + 8, name
        if functions == 0:
            assert fused == 0, name


@pytest.mark.parametrize("arch", build.ARCHS)
def test_all_loads_of_a_general_round_are_before_the_first_use(arch: str) -> None:
    """In accesses of 16 bytes, where all operands are in float32, or of 8, where all have 16 bits: the launch says
    formats, and which of these the path has is the compiler's choice. The bytes of the frequent formats are what keeps
    a multiprocessor's memory busy."""
    for name, definition, group, code in general(arch):
        path = build.MachineCode(tuple(line for line in usual_path(code) if not re.search(r"\bBRA\b", line)), 0, 0, 0)
        loads = max(under_way(path, True) // 16, under_way(path, False) // 8)
        assert loads >= GENERAL_OPERANDS[definition.name, group], (name, loads)
        assert warps(arch, code) * 32 * 4 * GENERAL_BYTES[definition.name, group] >= IN_FLIGHT * 2 / 3, name


def test_variants_that_are_to_be_measured_do_not_spill(tmp_path: Path) -> None:
    """They are compiled for `make gpu` alone."""
    nvcc = build.run([build.PYTHON, "-c", FIND_NVCC], cwd=build.ROOT).split()[-1]
    flags = [*build.SETTINGS["NVCC_FLAGS"], "-gencode=arch=compute_90,code=sm_90", "-DPACE_VARIANTS", "-Xptxas=-v"]
    command = [nvcc, *flags, "-c", "csrc/cuda/pace.cu", "-o", str(tmp_path / "o")]
    said = build.run(["sh", "-c", '"$@" 2>&1', "sh", *command], cwd=build.ROOT)
    found = re.findall(r"function '(\S+)' .*\n.*\n +(\d+) bytes stack.*\n.*Used (\d+) registers", said)
    bound = {name: (int(stack), int(registers)) for name, stack, registers in found if "PaceTight" in name}
    assert len(bound) == 5 * 12 and {stack for stack, _ in bound.values()} == {0}
    assert all(registers <= 80 for name, (_, registers) in bound.items() if "ILj7E" in name)
