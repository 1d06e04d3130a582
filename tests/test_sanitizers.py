"""Promise: over the conformance cases the CPU kernels read and write nothing beside their tensors, and nothing in them
is undefined; and the sanitizers that say so would have said otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mada_cases
import on_sanitizers
import pace_cases
import pytest
from test_native import processor_isas

ROOT = Path(__file__).parent.parent
CASES = ROOT / "tests" / "memory_cases.py"
instrumented = pytest.mark.skipif(on_sanitizers.missing() is not None, reason=str(on_sanitizers.missing()))


def results(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout)


def guarded(isa: str) -> dict[str, Any]:
    env = {
        **os.environ,
        "PACE_CPU_ISA": isa,
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    return results(subprocess.run([sys.executable, str(CASES), "guard"], env=env, capture_output=True, text=True))


@pytest.fixture(scope="module")
def guarded_runs() -> dict[str, dict[str, Any]]:
    isas = processor_isas()
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(isas, pool.map(guarded, isas), strict=True))


def test_no_access_beside_a_tensor_by_the_code_that_ships(guarded_runs: dict[str, dict[str, Any]]) -> None:
    """Vectorized code of every instruction set; pages without access right behind each tensor, or right before it."""
    for isa, run in guarded_runs.items():
        assert run["isa"] == isa
        assert run["cases"] == {"PACE": 5 * len(pace_cases.CASES), "MADA": 5 * len(mada_cases.CASES)}
        assert run["tensors"] > 30_000
    assert len({run["digest"] for run in guarded_runs.values()}) == 1


@instrumented
def test_sanitizers_find_nothing_in_the_conformance_cases(guarded_runs: dict[str, dict[str, Any]]) -> None:
    run = results(on_sanitizers.run(str(CASES), "heap"))
    (any_isa, *_) = guarded_runs.values()
    assert run["cases"] == any_isa["cases"] and run["tensors"] == any_isa["tensors"]
    assert run["digest"] == any_isa["digest"]  # what ran under the sanitizers is what ships, to the last bit


# ---- the harness itself ----

BAD: dict[str, tuple[str, str]] = {
    "a write behind a tensor": ("lib.write(data, 1000)", "heap-buffer-overflow"),
    "a write before a tensor": ("lib.write(data, -1)", "heap-buffer-overflow"),
    "a read behind a tensor": ("lib.read(data, 1000)", "heap-buffer-overflow"),
    "a read of a tensor that is gone": ("del tensor; lib.read(data, 0)", "heap-use-after-free"),
    "a misaligned read": ("lib.read_at_byte(data, 1)", "misaligned address"),
    "a null pointer": ("lib.read(None, 0)", "null pointer"),
    "an overflow of integers": ("lib.multiply(big, 3)", "signed integer overflow"),
    "a float that no integer holds": ("lib.to_integer(ctypes.c_double(1e30))", "outside the range of representable"),
    "an index out of a table": ("lib.table(4)", "index 4 out of bounds"),
    "an index out of a vector": ("lib.entry_of_vector(4)", "__n < this->size()"),
    "a shift too far": ("lib.shift(32)", "shift exponent 32 is too large"),
}
PROBE = """
import ctypes, sys, torch
lib = ctypes.CDLL(sys.argv[1])
tensor, big = torch.zeros(1000), ctypes.c_int64(2**62)
for function in (lib.write, lib.read, lib.read_at_byte):
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64]
data = tensor.data_ptr()
lib.write(data, 999); lib.read(data, 0); lib.read_at_byte(data, 4); lib.multiply(3, 3); lib.table(3); lib.shift(3)
lib.entry_of_vector(3); lib.to_integer(ctypes.c_double(1e3))
print("good calls pass", flush=True)
{bad}
print("bad call passed", flush=True)
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("probe") / "probe.so"
    on_sanitizers.compile_probe(ROOT / "tests" / "sanitizer_probe.cpp", target)
    return target


@instrumented
@pytest.mark.parametrize("what", BAD)
def test_the_sanitizers_catch(what: str, probe: Path) -> None:
    call, message = BAD[what]
    done = on_sanitizers.run("-c", PROBE.replace("{bad}", call), str(probe))
    assert done.returncode != 0 and message in done.stderr, done.stderr[-3000:]
    assert done.stdout == "good calls pass\n"


def test_guard_pages_catch() -> None:
    code = (
        "import memory_cases, ctypes, torch, sys; place = memory_cases.Guarded()\n"
        "after, before = place(1000, torch.float32), place(1000, torch.float32)\n"
        "ctypes.memset(after.data_ptr(), 0, 4000); ctypes.memset(before.data_ptr(), 0, 4000)\n"
        "print('good calls pass', flush=True)\n"
        "ctypes.memset({call}, 0, 1)\n"
        "print('bad call passed')"
    )
    for call in ("after.data_ptr() + 4000", "before.data_ptr() - 1"):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        done = subprocess.run([sys.executable, "-c", code.format(call=call)], env=env, capture_output=True, text=True)
        assert done.returncode == -11 and done.stdout == "good calls pass\n", done.stderr


@instrumented
def test_a_sanitized_build_is_never_in_place() -> None:
    env = {**os.environ, "PACE_SANITIZE": on_sanitizers.SANITIZERS, "PACE_CUDA": "0"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode != 0 and "not in place" in done.stderr
