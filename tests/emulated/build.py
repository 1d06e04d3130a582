"""Builds the CUDA library in the second environment (.venv-cuda, which `make test` sets up: torch's CUDA build and
nvcc), takes its objects apart into PTX and machine code, and builds the door to the plan of launches.

All is kept in build/cuda; setup.py compiles again only what has changed.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import runpy
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locks import locked

ROOT = Path(__file__).parent.parent.parent
PYTHON = Path(os.environ.get("PACE_CUDA_PYTHON", ROOT / ".venv-cuda" / "bin" / "python"))
BUILD = ROOT / "build" / "cuda"
SETTINGS = runpy.run_path(str(ROOT / "setup.py"), run_name="build settings")
ARCHS = tuple(arch.removesuffix("+PTX").replace(".", "") for arch in SETTINGS["CUDA_ARCHS"].split(";"))


def run(command: Iterable[object], **options: Any) -> str:
    done = subprocess.run([str(a) for a in command], capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(str(a) for a in command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def missing() -> str | None:
    """Why the library can't be built here; None where it can."""
    if not PYTHON.exists():
        return f"{PYTHON} is not there: `make test` sets it up"
    return None


_one_thread = threading.Lock()  # functools.cache alone would let a second thread build again, half a minute for nothing


def library() -> Path:
    """The folder that holds the package with both libraries, as a user of torch's CUDA build gets it."""
    with _one_thread:
        return _built()


@functools.cache
def _built() -> Path:
    command = [PYTHON, "setup.py", "build", "--build-temp", BUILD, "--build-lib", BUILD / "lib"]
    this_run = os.environ.get("PYTEST_XDIST_TESTRUNUID", "")
    stamp = BUILD / ".run"
    with locked(BUILD) as lock:
        # Once for all workers of a run: it links anew each time, what another worker may have loaded.
        if not (this_run and stamp.exists() and stamp.read_text() == this_run):
            stamp.unlink(missing_ok=True)
            run(command, cwd=ROOT, env={**os.environ, "PACE_CUDA": "1"}, pass_fds=[lock.fileno()])
            stamp.write_text(this_run)
    return BUILD / "lib"


@functools.cache
def tool(name: str) -> str:
    (path,) = run([PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).split()
    found = sorted(Path(path).glob(f"nvidia/*/bin/{name}")) + sorted(Path(path).glob(f"triton/backends/*/bin/{name}"))
    if not found:
        raise RuntimeError(f"{name} is not in {path}")
    return str(found[0])


@functools.cache
def objects() -> tuple[Path, ...]:
    library()
    return tuple(sorted((BUILD / "cuda").glob("*.o")))


@functools.cache
def ptx(arch: str) -> tuple[str, ...]:
    """The PTX of each object for a virtual architecture, as it lies in the library."""
    texts = []
    for path in objects():
        text = run([tool("cuobjdump"), "-ptx", path])
        parts = [part for part in re.split(r"(?m)^Fatbin \w+ code:\n=+\n", text) if f"arch = sm_{arch}\n" in part]
        parts = [part for part in parts if ".entry" in part]
        assert len(parts) == 1, (path, len(parts))
        texts.append(parts[0][parts[0].index(".version") :])
    return tuple(texts)


def ptx_archs() -> list[str]:
    return [a.removesuffix("+PTX").replace(".", "") for a in SETTINGS["CUDA_ARCHS"].split(";") if a.endswith("+PTX")]


def demangled(names: list[str]) -> dict[str, str]:
    """From names as C++ has them, without arguments and spaces, to those in PTX and machine code."""
    lines = run(["c++filt", *names]).splitlines()
    plain = (re.sub(r"^void |\(pace::\w+(<.*?>)?\)$| ", "", line) for line in lines)
    return dict(zip(plain, names, strict=True))


@functools.cache
def kernels(arch: str) -> dict[str, tuple[str, str]]:
    """By demangled name: the PTX text that a kernel is in, and its name there."""
    found = {}
    for text in ptx(arch):
        names = demangled(re.findall(r"\.entry (\w+)\(", text))
        found |= {plain: (text, name) for plain, name in names.items()}
    return found


@dataclass(frozen=True)
class MachineCode:
    instructions: tuple[str, ...]
    registers: int
    stack: int
    shared: int


@functools.cache
def machine_code(arch: str) -> dict[str, MachineCode]:
    """By demangled name: the instructions of a kernel for a real architecture, and what it occupies."""
    found = {}
    for path in objects():
        code = run([tool("cuobjdump"), "-sass", "-arch", f"sm_{arch}", path])
        usage = run([tool("cuobjdump"), "-res-usage", "-arch", f"sm_{arch}", path])
        used = dict(re.findall(r"Function (\w+):\s*\n\s*(REG:.*)", usage))
        bodies = dict(re.findall(r"Function : (\w+)\n(.*?)(?=\n\s+Function : |\Z)", code, re.S))
        for plain, name in demangled(list(bodies)).items():
            lines = (re.sub(r"/\*.*?\*/", "", line).strip() for line in bodies[name].splitlines())
            fields = dict(re.findall(r"(\w+(?:\[\d+\])?):(\d+)", used[name]))
            found[plain] = MachineCode(
                tuple(line for line in lines if line.endswith(";")),
                int(fields["REG"]),
                int(fields["STACK"]) + int(fields["LOCAL"]),
                int(fields["SHARED"]),
            )
    return found


def is_stale(out: Path, sources: list[Path]) -> bool:
    headers = [ROOT / "tests" / "emulated" / "names.h", *(ROOT / header for header in SETTINGS["HEADERS"])]
    return not out.exists() or out.stat().st_mtime < max(path.stat().st_mtime for path in [*sources, *headers])


@functools.cache
def operators() -> ctypes.CDLL:
    """The CUDA operators (csrc/cuda/ops.cpp) on the device of device.cpp, registered as torch.ops.pace_emulated."""
    sources = [
        ROOT / "tests" / "emulated" / "device.cpp",
        *(ROOT / "csrc" / "cuda" / f"{n}.cpp" for n in ("ops", "plan")),
    ]
    out = BUILD / "operators" / "emulated.so"
    torch = SETTINGS["find_torch"]()
    defines = [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in SETTINGS["DEFINES"]]
    flags = [flag for flag in SETTINGS["COMMON_FLAGS"] if flag != "-O3"]
    includes = [f"-I{ROOT / 'csrc'}", *(f"-isystem{path}" for path in torch.includes)]
    with locked(out.parent):
        if is_stale(out, sources):
            libraries = [f"-L{torch.libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
            run(["c++", "-shared", "-fPIC", "-O1", *flags, *defines, *includes, *sources, *libraries, "-o", out])
    return ctypes.CDLL(str(out))


@functools.cache
def plan_module() -> Any:
    """The module cuda_plan: csrc/cuda/plan.cpp behind tests/emulated/plan_module.cpp."""
    sources = [ROOT / "tests" / "emulated" / "plan_module.cpp", ROOT / "csrc" / "cuda" / "plan.cpp"]
    out = BUILD / "plan" / f"cuda_plan{sysconfig.get_config_var('EXT_SUFFIX')}"
    with locked(BUILD / "plan"):
        if is_stale(out, sources):
            includes = run([sys.executable, "-m", "pybind11", "--includes"]).split()
            flags = [flag for flag in SETTINGS["COMMON_FLAGS"] if flag != "-O3"]
            run(["c++", "-shared", "-fPIC", "-O1", *flags, *includes, f"-I{ROOT / 'csrc'}", *sources, "-o", out])
    spec = importlib.util.spec_from_file_location("cuda_plan", out)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
