"""A build of the CPU extension under AddressSanitizer and UndefinedBehaviorSanitizer, and processes that use it.

python tests/on_sanitizers.py tests/memory_cases.py heap    # builds where something changed (half a minute), and runs
"""

from __future__ import annotations

import functools
import hashlib
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from locks import locked

ROOT = Path(__file__).parent.parent
BASE = ROOT / "build" / "sanitized"
SANITIZERS = "address,undefined"


def _compiler() -> str:
    return os.environ.get("CXX", "c++").split()[0]


@functools.cache
def _runtime() -> str | None:
    """What has to be loaded before Python, which is not instrumented: the sanitizer's runtime; and the C++ library,
    which Python does not load at its start, and whose exceptions the runtime would otherwise not find."""
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):
        done = subprocess.run([_compiler(), f"-print-file-name={name}"], capture_output=True, text=True)
        path = Path(done.stdout.strip())
        if not path.is_absolute() or not path.exists():
            return None
        found.append(str(path))
    return " ".join(found)


@functools.cache
def missing() -> str | None:
    """Why there can be no such build here; None where there can."""
    if sys.platform != "linux":
        return f"sanitizers are preloaded on Linux alone, this is {sys.platform}"
    if shutil.which(_compiler()) is None:
        return f"there is no C++ compiler ({_compiler()})"
    if _runtime() is None:
        return f"{_compiler()} has no libasan.so: its sanitizer runtime is not installed"
    return None


@functools.cache
def library() -> Path:
    """What to put on PYTHONPATH: the package with the instrumented extension, built anew where a source changed."""
    import torch

    sources = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    # The Python files too, which the build copies.
    sources += [ROOT / "setup.py", *sorted((ROOT / "pace_kernels").rglob("*.py"))]
    digest = hashlib.sha256(f"{sys.version} {torch.__version__} {_compiler()}".encode())
    for path in sources:
        digest.update(path.read_bytes())
    stamp = BASE / "stamp"
    with locked(BASE):
        if not stamp.exists() or stamp.read_text() != digest.hexdigest():
            stamp.unlink(missing_ok=True)
            env = {**os.environ, "PACE_SANITIZE": SANITIZERS, "PACE_CUDA": "0"}
            command = [sys.executable, "setup.py", "build", "--build-base", str(BASE), "--force"]
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"the sanitized build failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
            stamp.write_text(digest.hexdigest())
    (extension,) = BASE.glob("lib*/pace_kernels/_C*.so")
    return extension.parent.parent


def environment(**variables: str) -> dict[str, str]:
    runtime = _runtime()
    assert runtime is not None
    return {
        **os.environ,
        "LD_PRELOAD": runtime,
        "OMP_WAIT_POLICY": "passive",  # threads that spin take the cores from those that other processes have work for
        # Leaks are Python's: it frees little at its end. An operator reports every error through an exception, and one
        # thrown is one leaked where torch keeps it for the traceback.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:abort_on_error=0:exitcode=99:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1:exitcode=99",
        "PYTHONPATH": os.pathsep.join([str(library()), str(ROOT / "tests")]),
        **variables,
    }


def run(*arguments: str, timeout: float = 600.0, **variables: str) -> subprocess.CompletedProcess[str]:
    """``python *arguments`` with the instrumented package."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=BASE,  # not the repository, whose own package would come first
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def compile_probe(source: Path, target: Path) -> None:
    """A shared library of its own, with the flags of the build."""
    build = runpy.run_path(str(ROOT / "setup.py"), run_name="build settings")
    flags = ["-fwrapv", *build["COMMON_FLAGS"], *build["sanitizer_flags"](SANITIZERS)]
    subprocess.run([_compiler(), "-shared", "-fPIC", *flags, str(source), "-o", str(target)], check=True)


if __name__ == "__main__":
    if (why := missing()) is not None:
        sys.exit(why)
    script, *rest = sys.argv[1:]
    os.environ.update(environment(), PATH=os.environ["PATH"])
    os.execv(sys.executable, [sys.executable, str(Path(script).resolve()), *rest])
