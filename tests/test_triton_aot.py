"""Promise: the Triton kernels compile for the GPUs that we name, read and write 16 bytes at a time, spill nothing, and
contract nothing. Nothing here needs a GPU."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from typing import Any

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("in Triton's interpreter there is nothing to compile", allow_module_level=True)

import triton
from pace_kernels.triton_kernels import aot
from triton import knobs
from triton.backends.compiler import GPUTarget

LARGEST = (
    *("pace float32", "pace bfloat16 stats", "mada float32", "mada bfloat16 pulled capturable", "pullback float32"),
    *("pullback bfloat16 stats", "schedule_free float32", "pace_coded 32 8 8", "mada_coded 32 8"),
    *("schedule_free_coded 32 8 8", "pullback_coded bfloat16 8"),
)
OTHERS = (
    *("schedule_free bfloat16", "schedule_free bfloat16/float32", "schedule_free scalars on device"),
    *("pace bfloat16", "pace float32 AdamW", "pace float32 unaligned stats", "pace bfloat16/float32", "pace float16"),
    *("mada float32 fixed", "mada bfloat16 AdamW", "mada float32 unaligned", "mada float32 hyperadam"),
    *("pullback bfloat16", "pullback float32 average", "pullback float32 constant", "pullback bfloat16/float32"),
    *("pullback float32 unaligned", "pullback scalars", "pullback scalars on device"),
    *("pace_coded 24 8 16", "pace_coded 32 8 8 unaligned", "pace_coded float32 8 8 stats", "pace_coded scalars"),
    *("pace_coded dithered 16 24", "pace_coded scalars on device", "mada_coded 24 8 8 pulled capturable"),
    *("mada_coded dithered 16 24", "mada_coded 32 8 unaligned", "mada_coded 32 8 AMSGrad", "mada_coded scalars"),
    *("schedule_free_coded 24 8 16", "schedule_free_coded scalars", "pullback_coded scalars on device"),
    "pullback_coded float32 16 from the step stats",
    *("pace scalars", "mada scalars on device", "stats", "hypergradients rows", "learn"),
)
# Operands that a program of aligned float32 reads and writes.
OPERANDS = {
    "pace float32": (5, 4),
    "pace float32 AdamW": (4, 3),
    "mada float32": (9, 8),  # one of them in a first step alone
    "mada float32 fixed": (8, 7),
    "mada float32 hyperadam": (5, 4),
    "pullback float32": (4, 2),
    "pullback float32 constant": (3, 2),
    "pullback float32 average": (2, 1),
    "schedule_free float32": (4, 3),
}
# With bfloat16 weights and gradients PACE's threads have eight elements: one access of 16 bytes for them, two for every
# float32 operand. MADA's have four: 8 bytes for weights and gradients (launch.py).
NARROW = {
    "pullback bfloat16": (3 + 2, 1 + 2),
    "pullback bfloat16/float32": (2 + 4, 1 + 2),
    "schedule_free bfloat16": (2 + 4, 1 + 4),
    "schedule_free bfloat16/float32": (1 + 6, 1 + 4),
    "pace bfloat16": (2 + 6, 1 + 6),
    "pace float16": (2 + 6, 1 + 6),
    "pace bfloat16/float32": (1 + 8, 1 + 6),
}
# In codes: reads of 16 bytes and of 8, writes of them. 16 of weights, remainders, gradients, 8 of codes in a byte.
CODED = {"pace_coded 32 8 8": (3, 3, 2, 3), "pace_coded 24 8 16": (4, 3, 2, 3)}
CODED |= {"schedule_free_coded 32 8 8": (3, 2, 2, 2), "schedule_free_coded 24 8 16": (4, 2, 2, 2)}
CODED |= {"pullback_coded bfloat16 8": (3, 1, 1, 1)}
# MADA's threads have four elements: 8 bytes of 16 bits each, 4 bytes of codes.
CODED |= {"mada_coded 32 8": (0, 6, 0, 5), "mada_coded dithered 16 24": (0, 10, 0, 9)}
# Registers a thread: with as many, 4 programs of PACE (of 16-bit weights 3, with statistics 2) and 3 of MADA fit on an
# SM. They are those of the compiler and the assembler in Triton 3.9; with 3.7 a few kernels take more, and two spill,
# 8 and 56 bytes.
EXACT = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
REGISTERS = {"pace": 64, "pace bfloat16": 80, "pace float16": 80, "pace bfloat16/float32": 80}
REGISTERS |= {"pace bfloat16 stats": 128, "mada": 168}
REGISTERS |= {"pullback": 64, "pullback bfloat16": 80, "pullback bfloat16/float32": 80, "pullback bfloat16 stats": 128}
REGISTERS |= {"pace_coded": 128, "pace_coded float32 8 8 stats": 208}
REGISTERS |= {"mada_coded": 196, "schedule_free_coded": 128, "pullback_coded": 96}
REGISTERS |= {"pullback_coded float32 16 from the step stats": 112}
REGISTERS |= {"schedule_free": 48, "schedule_free bfloat16": 80, "schedule_free bfloat16/float32": 80}
TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "sm_120": 120}


def of_target(target: str) -> dict[str, Any]:
    names = (*LARGEST, *OTHERS) if target == "sm_80" else LARGEST
    return aot.compile_kernels(GPUTarget("cuda", TARGETS[target], 32), names)


def resources(cubin: bytes, tmp_path: Any) -> dict[str, int]:
    path = tmp_path / "kernel.cubin"
    path.write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}


def opcodes(ptx: str) -> Counter[str]:
    return Counter(re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z]\w*(?:\.\w+)*)", ptx, re.M))


@pytest.mark.parametrize("target", TARGETS)
def test_nvidia(target: str, tmp_path: Any) -> None:
    for name, kernel in of_target(target).items():
        ptx = opcodes(kernel.asm["ptx"])
        wide = {
            kind: sum(n for op, n in ptx.items() if re.fullmatch(rf"{kind}\.global\S*\.v4\.b32", op))
            for kind in ("ld", "st")
        }
        if name in OPERANDS or name in NARROW:
            assert (wide["ld"], wide["st"]) == (OPERANDS | NARROW)[name], name
        if name in CODED:
            found = wide["ld"], ptx["ld.global.v2.b32"], wide["st"], ptx["st.global.v2.b32"]
            assert found == CODED[name], name
        # Nothing is contracted or approximated. (Float64 has fused operations, in exponentials and logarithms alone.)
        single = [op for op in ptx if op.endswith("f32")]
        assert not [op for op in single if op.startswith(("fma", "mad", "ex2", "lg2", "rcp", "rsqrt"))], name
        assert {op for op in single if op.startswith(("div", "sqrt"))} <= {"div.rn.f32", "sqrt.rn.f32"}, name
        if "scalars" not in name:  # where float64's exponential compares high words as floats
            assert not [op for op in single if ".ftz" in op or ".approx" in op], name
        assert not [op for op in ptx if op.startswith(("atom.", "red."))], name
        used = resources(kernel.asm["cubin"], tmp_path)
        assert used["STACK"] + used["LOCAL"] <= (0 if EXACT else 64), name
        rule = name.split()[0]
        if rule in REGISTERS and "scalars" not in name and EXACT:
            assert used["REG"] <= REGISTERS.get(name, REGISTERS[rule]) + 16 * ("stats" in name), (name, used)


def test_amd() -> None:
    for name, kernel in aot.compile_kernels(
        GPUTarget("hip", "gfx942", 64), (*LARGEST, "mada scalars on device")
    ).items():
        assert len(kernel.asm["hsaco"]) > 0
        code = kernel.asm["amdgcn"]
        assert re.findall(r"\.vgpr_spill_count:\s*(\d+)", code) == ["0"]
        if "scalars" not in name:
            lanes = 2 if name.startswith("mada_coded") else 4
            assert f"global_load_dwordx{lanes}" in code and f"global_store_dwordx{lanes}" in code
            # An IEEE division is made of three fused operations and two that accumulate, a root has two; there are no
            # others.
            divisions, roots = code.count("v_div_fixup_f32"), code.count("v_sqrt_f32")
            fused = Counter(re.findall(r"\bv_(?:pk_)?(?:fma|mad)\w*f32", code))
            assert divisions > 0 and roots > 0, name
            assert fused["v_fma_f32"] == 3 * divisions + 2 * roots
            assert fused["v_fmac_f32"] + fused["v_fmac_f32_e32"] == 2 * divisions
            assert set(fused) <= {"v_fma_f32", "v_fmac_f32", "v_fmac_f32_e32"}


def test_every_variant_has_a_signature() -> None:
    for name, variant in aot.variants().items():
        types = aot.signature(variant.kernel, variant.constants)
        assert list(types) == variant.kernel.arg_names, name
