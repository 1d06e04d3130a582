"""Promise: the package builds where it can, says why where it can't, and works through torch without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "csrc",
    "pace_kernels",
    "triton_kernels",
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources, so that a build leaves nothing in the working tree."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in SOURCES:
        source = ROOT / name
        skip = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(source, copy / name, ignore=skip) if source.is_dir() else shutil.copy(source, copy / name)
    return copy


def build_wheel(tree: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "bdist_wheel", "--dist-dir", "dist"]
    return subprocess.run(command, cwd=tree, env={**os.environ, **env}, capture_output=True, text=True)


def use(target: Path, code: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PACE_")}
    environment |= {"PYTHONPATH": str(target), **env}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=target, env=environment, capture_output=True, text=True, check=True
    )


STEP = """
import sys, warnings; warnings.simplefilter("always")
if {target!r}:  # not the editable install of this environment: it would lend its extension
    sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f)]
import torch, pace_kernels
assert pace_kernels.__file__.startswith({target!r}), pace_kernels.__file__
registered = torch._C._dispatch_has_kernel_for_dispatch_key("pace_kernels::pace_step_", "CPU")
row = pace_kernels.backends()["cpu"]
assert registered == row.available
print(row.available, row.reason)
for _ in range(2):
    p = torch.nn.Parameter(torch.ones(5)); p.grad = torch.ones(5)
    optimizer = pace_kernels.PACE([p], lr=0.1); optimizer.step(); optimizer.step()
print(p[0].item())
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_one_wheel_for_every_python_and_torch(tree: Path, tmp_path: Path) -> None:
    done = build_wheel(tree)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree / "dist").iterdir()
    assert "-cp310-abi3-" in wheel.name
    target = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(target)
    assert (target / "pace_kernels" / "_C.abi3.so").exists()
    assert (target / "pace_kernels" / "triton_kernels" / "__init__.py").exists()
    assert {p.stem for p in (target / "pace_kernels" / "integrations").iterdir()} == {
        p.stem for p in (ROOT / "pace_kernels" / "integrations").glob("*.py")
    }
    assert {p.name for p in target.iterdir() if p.suffix != ".dist-info"} == {"pace_kernels"}
    out = use(target, STEP.format(target=str(target)))
    assert out.stdout.startswith("True None\n") and out.stderr == ""
    # The stable ABI only: no C++ symbol of torch or of c10 is needed.
    symbols = subprocess.run(
        ["nm", "-DC", "--undefined-only", str(target / "pace_kernels" / "_C.abi3.so")], capture_output=True, text=True
    )
    needed = [line.split("U ", 1)[1] for line in symbols.stdout.splitlines() if " U " in line]
    assert needed
    assert [s for s in needed if s.startswith(("at::", "c10::", "torch::"))] == []


def test_without_a_compiler_it_works_through_torch_and_says_so_once(tree: Path, tmp_path: Path) -> None:
    done = build_wheel(tree, PACE_NO_EXT="1")
    assert done.returncode == 0, done.stderr
    assert "PACE_NO_EXT is set, building without native kernels" in done.stderr
    (wheel,) = (tree / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    target = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(target)
    out = use(target, STEP.format(target=str(target)))
    assert out.stdout.startswith("False the native extension is not built")
    assert out.stderr.count("RuntimeWarning") == 1
    assert "pace_kernels computes through torch, more slowly: the native extension is not built" in out.stderr
    native = subprocess.run(
        [sys.executable, "-c", STEP.format(target="")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert native.stdout.splitlines()[1] == out.stdout.splitlines()[1]


@pytest.mark.parametrize(("version", "too_old"), [("2.9.1+cpu", True), ("2.10.0a0+git1", False), ("3.0.0", False)])
def test_a_torch_too_old_for_the_native_kernels_is_no_obstacle(tree: Path, tmp_path: Path, version: str, too_old: bool):
    """What setup.py would build under a torch of that version, of which it asks no more."""
    (tmp_path / "torch.py").write_text(f"__version__ = {version!r}; version = type('', (), {{'cuda': None}})")
    code = "import runpy; print([e.name for e in runpy.run_path('setup.py')['native_extensions']()])"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.stdout == ("[]\n" if too_old else "['pace_kernels._C']\n"), done.stderr
    said = f"building without native kernels: they need torch >= 2.10, and this is torch {version}\n"
    assert (said in done.stderr) == too_old
    forced = {**environment, "PACE_CUDA": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=forced, capture_output=True, text=True)
    assert done.returncode == 1 and "PACE_CUDA=1, but the " in done.stderr
    assert ("they need torch >= 2.10" in done.stderr) == too_old


def test_a_missing_compiler_is_no_obstacle(tree: Path) -> None:
    done = build_wheel(tree, CXX="no-such-compiler", PATH="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler (no-such-compiler), building without native kernels" in done.stderr


def test_without_torch_the_build_stops_with_one_sentence(tree: Path, tmp_path: Path) -> None:
    """As under pip's build isolation, where torch is not to be seen."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ImportError('hidden')")
    done = build_wheel(tree, PYTHONPATH=str(hidden))
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("pace_kernels builds against the torch you use: install torch >= 2.10 first")
    assert "--no-build-isolation" in last
    assert "Traceback" not in done.stderr


def test_the_source_archive_has_every_source(tree: Path) -> None:
    """Also where it is made without torch, a compiler or nvcc: those who build from it may have them."""
    command = [sys.executable, "setup.py", "sdist", "--dist-dir", "dist"]
    subprocess.run(command, cwd=tree, env={**os.environ, "PACE_NO_EXT": "1"}, capture_output=True, check=True)
    (archive,) = (tree / "dist").iterdir()
    with tarfile.open(archive) as opened:
        packed = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    wanted |= {f"triton_kernels/{path.name}" for path in (ROOT / "triton_kernels").glob("*.py")}
    assert {"csrc/cuda/mada.cu", "csrc/cuda/sweep.cuh", "csrc/rules/pace.h"} <= wanted <= packed


def test_torch_is_not_among_the_build_requirements() -> None:
    requires = next(
        line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("requires =")
    )
    assert "torch" not in requires
    assert all(name in requires for name in ("setuptools", "wheel", "ninja"))


def test_the_version_is_written_once_more_only() -> None:
    import pace_kernels

    assert f'version = "{pace_kernels.__version__}"' in (ROOT / "pyproject.toml").read_text()
