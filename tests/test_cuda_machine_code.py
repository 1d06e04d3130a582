"""Promise: for every architecture, no kernel spills; sweeps load and store 128 bits at a time, all loads of a round
before the first use; nothing is contracted; and enough threads fit a multiprocessor to keep its memory busy."""

from __future__ import annotations

import re

import pytest
from emulated import build
from emulated.build import machine_code
from emulated.occupancy import Sweep, sweeps, table, warps

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))


# What hangs on the step: an average that rests, gradients that change places.
NOW = {"Pace": ("average",), "Pullback": ("average",), "Mada": ("average", "stay"), "ScheduleFree": ()}


def operands(sweep: Sweep) -> tuple[int, int, int]:
    """128-bit loads and stores of a round, and how many of the loads, the last, hang on the step."""
    resting = sweep.on | dict.fromkeys(NOW[sweep.definition.name], False)
    elements = 8 if sweep.narrow else 4
    loads = stores = maybe = 0
    for operand, name in zip(sweep.definition.operands, sweep.formats, strict=True):
        parts = elements * (4 if name == "Float32" else 2) // 16
        loads += parts * does(operand.reads, sweep.on)
        stores += parts * does(operand.writes, sweep.on)
        maybe += parts * (does(operand.reads, sweep.on) - does(operand.reads, resting))
    return loads, stores, maybe


def does(condition: str, on: dict[str, bool]) -> bool:
    """What a definition says in C++."""
    python = condition.replace("||", "or").replace("&&", "and").replace("true", "True").replace("false", "False")
    return bool(eval(python, {}, dict(on)))


@pytest.mark.parametrize("arch", build.ARCHS)
def test_every_instance_is_there(arch: str) -> None:
    names = [sweep.definition.name for _, sweep, _ in sweeps(arch)]
    assert names.count("Pace") == 5 * 12 and names.count("Mada") == 5 * 17
    assert names.count("Pullback") == 5 * 4 + 3 * 6  # with a second moment in 5 pairs of formats, without in 3 formats
    assert names.count("ScheduleFree") == 5
    assert len(machine_code(arch)) == len(names) + 7  # scalars of four, sums of two, learning


@pytest.mark.parametrize("arch", build.ARCHS)
def test_nothing_spills(arch: str) -> None:
    for name, code in machine_code(arch).items():
        assert code.stack == 0, name
        assert not any(re.search(r"\b(LDL|STL)\b", line) for line in code.instructions), name


@pytest.mark.parametrize("arch", build.ARCHS)
def test_the_vector_path_moves_128_bits(arch: str) -> None:
    for name, sweep, code in sweeps(arch):
        loads, stores, _ = operands(sweep)
        wide = [line for line in code.instructions if re.search(r"\b(LDG|STG)\.E\.128\b", line)]
        assert sum("LDG" in line for line in wide) == loads, name
        assert sum("STG" in line for line in wide) == stores, name


@pytest.mark.parametrize("arch", build.ARCHS)
def test_all_loads_of_a_round_come_before_the_first_use(arch: str) -> None:
    """From the first 128-bit load to the last, no instruction reads a register that one of them fills. Loads that hang
    on whether the average moves may come after a branch, and are not looked at."""
    for name, sweep, code in sweeps(arch):
        loads, _, maybe = operands(sweep)
        places = [i for i, line in enumerate(code.instructions) if "LDG.E.128" in line][: loads - maybe]
        filled: set[int] = set()
        for line in code.instructions[places[0] : places[-1] + 1]:
            target, sources = registers(line)
            assert not filled & set(sources), (name, line)
            if "LDG.E.128" in line:
                filled |= set(range(target, target + 4))


@pytest.mark.parametrize("arch", build.ARCHS)
def test_tensors_that_are_not_aligned_have_as_many_loads_under_way(arch: str) -> None:
    """Somewhere as many elements of each operand as in vectors are loaded, one an access, before the first is used."""
    for name, sweep, code in sweeps(arch):
        filled: set[int] = set()
        most = 0
        for line in code.instructions:
            target, sources = registers(line)
            if filled & set(sources) or re.search(r"\bBRA\b", line):
                filled = set()
            if re.search(r"\bLDG\.E(\.U16)?(\.CONSTANT)? ", line):
                filled.add(target)
            most = max(most, len(filled))
        resting = sweep.on | dict.fromkeys(NOW[sweep.definition.name], False)
        arrays = sum(does(operand.reads, resting) for operand in sweep.definition.operands)
        assert most >= arrays * (8 if sweep.narrow else 4), (name, most)


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
    """The memory of a multiprocessor of an H100 is busy with some 15 KB in flight (3.35 TB/s x 0.6 µs / 132). PACE has
    80 to 144 bytes a thread of loads in flight in a round, MADA 160 to 288."""
    for name, sweep, code in sweeps(arch):
        least = 16 if sweep.definition.name != "Mada" else (8 if sweep.narrow else 12)
        assert warps(arch, code) >= least, (name, code.registers)
        loads, _, _ = operands(sweep)
        assert warps(arch, code) * 32 * loads * 16 >= 2 * 15_000, name


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
