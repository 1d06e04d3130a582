"""Promise: the package builds where it can, says why where it can't, and works through torch without a compiler."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import products
import pytest
import torch

import pace_kernels
from pace_kernels import backend

ROOT = Path(__file__).parent.parent
TOOL = runpy.run_path(str(ROOT / "tools" / "wheel.py"), run_name="tool")


@functools.cache
def tracked() -> tuple[str, ...]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = tuple(name for name in done.stdout.splitlines() if (ROOT / name).is_file())
    if not names:
        pytest.skip("git knows no files here")
    return names


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A clone, so that a build leaves nothing in the working tree."""
    copy = tmp_path / "tree"
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
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
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
if {target!r}:  # not the editable install of this environment: it would lend its extension
    sys.meta_path = [BuiltinImporter, FrozenImporter, PathFinder]
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


def glibc_needed(library: Path) -> int:
    """The minor version of the newest symbol of glibc 2 that it uses."""
    said = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
    return max(int(minor) for minor in re.findall(r"GLIBC_2\.(\d+)", said))


@pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ and a Linux")
def test_one_wheel_for_every_python_and_torch(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `make wheel` builds it, from the source archive alone."""
    pytest.importorskip("auditwheel", reason="auditwheel is not installed")
    monkeypatch.setenv("PACE_CUDA", "0")
    out = tmp_path / "dist"
    made = TOOL["source_archive"](out, tree)
    wheel = TOOL["repaired"](TOOL["wheel_of"](made, tmp_path / "plain", tmp_path / "temp"), out)
    assert {path.name for path in out.iterdir()} == {made.name, wheel.name}
    tag = re.fullmatch(r"pace_kernels-[\d.]+-cp310-abi3-(?:\w+\.)?manylinux_2_(\d+)_\w+\.whl", wheel.name)
    assert tag is not None, wheel.name
    target = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(target)
    library = target / "pace_kernels" / "_C.abi3.so"
    here = int(platform.libc_ver()[1].split(".")[1])
    assert glibc_needed(library) <= int(tag.group(1)) <= here
    assert {p.name for p in target.iterdir() if p.suffix != ".dist-info"} == {"pace_kernels"}  # no library packed
    package = target / "pace_kernels"
    packed = {str(p.relative_to(package)) for p in package.rglob("*") if p.is_file()}
    wanted = {name.partition("/")[2] for name in tracked() if re.fullmatch(r"pace_kernels/.*\.pyi?", name)}
    wanted |= {name for name in tracked() if re.fullmatch(r"triton_kernels/.*\.py", name)}
    assert wanted | {"py.typed"} <= packed
    done = use(target, STEP.format(target=str(target)))
    assert done.stdout.startswith("True None\n") and done.stderr == ""
    trial = f"import runpy; runpy.run_path({str(ROOT / 'tools' / 'try_installed.py')!r}, run_name='__main__')"
    done = use(target, STEP.partition("registered")[0].format(target=str(target)) + trial)
    assert done.stdout.endswith("PACE, MADA and Pullback give the bits of the reference\n")
    # The stable ABI only: no C++ symbol of torch or of c10 is needed.
    symbols = subprocess.run(["nm", "-DC", "--undefined-only", str(library)], capture_output=True, text=True)
    needed = [line.split("U ", 1)[1] for line in symbols.stdout.splitlines() if " U " in line]
    assert needed
    assert [s for s in needed if s.startswith(("at::", "c10::", "torch::"))] == []


@pytest.mark.skipif(not products.FULL, reason="make test-full builds it")
def test_the_wheel_with_cuda_kernels_is_one_file_of_18_mb(tree: Path, tmp_path: Path) -> None:
    from emulated import build

    pytest.importorskip("auditwheel", reason="auditwheel is not installed")
    if (why := build.missing()) is not None:
        pytest.skip(why)
    build.library()
    before = [path.stat().st_mtime_ns for path in build.objects()]
    made = TOOL["source_archive"](tmp_path, tree)
    plain = TOOL["wheel_of"](made, tmp_path / "plain", build.BUILD, python=str(build.PYTHON))
    wheel = TOOL["repaired"](plain, tmp_path / "dist")
    assert "-cp310-abi3-" in wheel.name and "manylinux_2_" in wheel.name
    assert [path.stat().st_mtime_ns for path in build.objects()] == before  # not compiled again
    assert 12e6 < wheel.stat().st_size < 24e6
    libraries = {name for name in zipfile.ZipFile(wheel).namelist() if ".so" in name}
    assert libraries == {"pace_kernels/_C.abi3.so", "pace_kernels/_cuda.abi3.so"}


def test_without_a_compiler_it_works_through_torch_and_says_so_once(tree: Path, tmp_path: Path) -> None:
    done = build_wheel(tree, PACE_NO_EXT="1")
    assert done.returncode == 0, done.stderr
    assert "building without native kernels: PACE_NO_EXT is set" in done.stderr
    (wheel,) = (tree / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    target = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(target)
    out = use(target, STEP.format(target=str(target)))
    why = "the native extension is not built: PACE_NO_EXT is set. With torch >= 2.10 and a C++ compiler: `pip install "
    assert out.stdout.startswith(f"False {why}")
    assert out.stderr.count("RuntimeWarning") == 1
    assert f"pace_kernels computes through torch, more slowly. Backend cpu: {why}" in out.stderr
    native = subprocess.run(
        [sys.executable, "-c", STEP.format(target="")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert native.stdout.splitlines()[1] == out.stdout.splitlines()[1]


# What setup.py would build, and its reasons, where `path` may hold a torch in place of the one that is here.
DECIDE = """
import json, platform, runpy, sys, sysconfig
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
class Finder(PathFinder):  # finds neither the real torch nor what another finder knows
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return super().find_spec(name, [{path!r}] if name == "torch" else path, target)
sys.meta_path = [BuiltinImporter, FrozenImporter, Finder]
sysconfig.get_path = lambda name: {platlib!r}
platform.system = lambda: {system!r}
settings = runpy.run_path("setup.py")
names = [e.name for e in settings["native_extensions"]()]
print(json.dumps([names, settings["not_built"]]))
"""
NONE = "/nonexistent"


def decide(
    tree: Path, path: Path | str = NONE, platlib: Path | str = NONE, system: str = "Linux", **env: str
) -> tuple[Any, str]:
    """The names and reasons, or None where the build stops, and what it said."""
    code = DECIDE.format(path=str(path), platlib=str(platlib), system=system)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PACE_")} | env
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else None, done.stderr


def torch_of(folder: Path, version: str, cuda: str | None = None) -> Path:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise ImportError('a build does not import it')")
    (folder / "torch" / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")
    return folder


@pytest.mark.parametrize(("version", "too_old"), [("2.9.1+cpu", True), ("2.10.0a0+git1", False), ("3.0.0", False)])
def test_a_torch_too_old_for_the_native_kernels_is_no_obstacle(tree: Path, tmp_path: Path, version: str, too_old: bool):
    (names, reasons), said = decide(tree, torch_of(tmp_path, version))
    why = f"they need torch >= 2.10, and this is torch {version}"
    assert names == ([] if too_old else ["pace_kernels._C"])
    assert (reasons.get("_C") == why) == too_old and "_cuda" in reasons
    assert (f"building without native kernels: {why}\n" in said) == too_old
    stopped, said = decide(tree, tmp_path, PACE_CUDA="1")
    assert stopped is None and said.startswith("PACE_CUDA=1, but the ") and said.count("\n") == 1
    assert (why in said) == too_old


def test_the_torch_that_build_isolation_hides_is_found(tree: Path, tmp_path: Path) -> None:
    """pip takes the packages of the environment from sys.path, and leaves sysconfig."""
    (names, reasons), _ = decide(tree, platlib=torch_of(tmp_path, "2.13.0+cpu"))
    assert names == ["pace_kernels._C"]
    assert reasons == {"_cuda": "torch 2.13.0+cpu is not a CUDA build"}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "the build saw no torch ("),
        ({"system": "Windows"}, "they are not built on Windows"),
        ({"PACE_NO_EXT": "1"}, "PACE_NO_EXT is set"),
    ],
    ids=["no-torch", "windows", "asked"],
)
def test_what_can_not_be_built_is_one_sentence(tree: Path, options: dict[str, str], why: str) -> None:
    (names, reasons), said = decide(tree, **options)
    assert names == [] and reasons["_C"] == reasons["_cuda"] and reasons["_C"].startswith(why)
    assert said.startswith(f"pace_kernels: building without native kernels: {why}") and said.count("\n") == 1
    stopped, said = decide(tree, PACE_CUDA="1", **options)
    assert stopped is None and said.startswith(f"PACE_CUDA=1, but the native kernels can't be built: {why}")


def test_an_nvcc_of_another_major_is_told(tree: Path, tmp_path: Path) -> None:
    """A library with CUDA 13's runtime does not run on the drivers of CUDA 12, on which such a torch does."""
    nvcc = toolkit(tmp_path / "cuda") / "bin" / "nvcc"
    torch_of(tmp_path, "2.10.0+cu128", "12.8")
    (names, reasons), said = decide(tree, tmp_path, CUDA_HOME=str(tmp_path / "cuda"))
    assert names == ["pace_kernels._C", "pace_kernels._cuda"] and reasons == {}
    assert f"{nvcc} is of CUDA 13, torch of CUDA 12.8: the CUDA kernels will need a driver of CUDA 13" in said
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.13.0'\ncuda = '13.0'\n")
    assert decide(tree, tmp_path, CUDA_HOME=str(tmp_path / "cuda")) == ([names, {}], "")


# Compilers that look at what they are given, and at the host's code alone. nvcc knows every GPU.
TOUCH = """#!/bin/sh
for option; do
  if [ "$last" = -o ]; then touch "$option"; fi
  last=$option
done
"""
CXX = TOUCH.replace(
    "do\n",
    """do
  if [ "$option" = -c ]; then exec g++ -fsyntax-only "$@"; fi
""",
)
NVCC = """#!/bin/sh
root=$(dirname "$(dirname "$0")")
case "$*" in
  --dryrun*) echo "#$ TOP=$root" ;;
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
  --list-gpu-code) echo sm_75 sm_80 sm_86 sm_87 sm_90 sm_100 sm_110 sm_120 ;;
  *) for option; do last=$option; done; touch "$last" ;;
esac
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def toolkit(folder: Path) -> Path:
    """A CUDA toolkit, as far as setup.py looks at one."""
    executable(folder / "bin" / "nvcc", NVCC)
    (folder / "lib64").mkdir()
    (folder / "lib64" / "libcudart_static.a").touch()
    return folder


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.parametrize("version", ["2.10.0", "2.11.0"])
def test_the_sources_fit_the_oldest_torch(tree: Path, tmp_path: Path, version: str) -> None:
    """A macro of a newer torch would break the build for an older one."""
    headers = ROOT / "build" / "headers" / version / "torch" / "include"
    if not headers.exists():
        pytest.skip(f"{headers} is not there: `make test` fetches it")
    torch_of(tmp_path, f"{version}+cu130", "13.0")
    (tmp_path / "torch" / "include").symlink_to(headers)
    compiler = executable(tmp_path / "cxx", CXX)
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "built")]
    environment = {"PYTHONPATH": str(tmp_path), "CXX": str(compiler), "CUDA_HOME": str(toolkit(tmp_path / "cuda"))}
    done = subprocess.run(
        command, cwd=tree, env={**os.environ, **environment, "PACE_CUDA": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "built").rglob("*.so")} == {"_C.abi3.so", "_cuda.abi3.so"}
    assert "contain the runtime of CUDA 13, which needs NVIDIA's driver 580 or later" in done.stderr


def test_an_unpacked_archive_compiles_no_kernel_again(tree: Path, tmp_path: Path) -> None:
    """csrc/definitions.h is in no archive: each tree writes its own, which must not look newer than the kernels."""
    torch_of(tmp_path, "2.13.0+cu130", "13.0")
    compiler = executable(tmp_path / "cxx", TOUCH)
    environment = {"PYTHONPATH": str(tmp_path), "CXX": str(compiler), "CUDA_HOME": str(toolkit(tmp_path / "cuda"))}
    environment |= {"PACE_CUDA": "1", "PATH": os.environ["PATH"]}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "built")]
    made = []
    for changed in (None, None, "csrc/rules/pace.h"):
        (tree / "csrc" / "definitions.h").unlink(missing_ok=True)
        if changed is not None:
            (tree / changed).touch()
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        made.append({path.name: path.stat().st_mtime_ns for path in (tmp_path / "built").rglob("*.command")})
    assert made[0] == made[1] and {name for name in made[0] if made[0][name] != made[2][name]} >= {"pace.command"}


def test_a_missing_compiler_is_no_obstacle(tree: Path) -> None:
    done = build_wheel(tree, CXX="no-such-compiler", PATH="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert "building without native kernels: there is no C++ compiler (no-such-compiler)" in done.stderr


def test_a_failing_compiler_ends_in_one_sentence_with_a_way_out(tree: Path, tmp_path: Path) -> None:
    compiler = executable(tmp_path / "cxx", "#!/bin/sh\necho 'internal compiler error' >&2\nexit 1\n")
    done = build_wheel(tree, CXX=str(compiler), PACE_CUDA="0")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "pace_kernels: the C++ compiler or linker failed, as above. The kernels need GCC >= 11 or Clang >= "
        "14, which CXX names; PACE_NO_EXT=1 builds the package without them"
    )


def test_an_old_setuptools_gets_a_sentence(tree: Path) -> None:
    code = "import setuptools; setuptools.__version__ = '65.5.0'; import runpy; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr == (
        'pace_kernels is built by setuptools >= 77, and this is 65.5.0: run `pip install "setuptools>=77"` first\n'
    )


def test_libraries_of_an_earlier_build_stay_out(tree: Path) -> None:
    """setuptools packs all that lies in build/lib, and a build with the kernels may have been there before."""
    where = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "lib"]
    left = tree / "lib" / "pace_kernels" / "_cuda.abi3.so"
    left.parent.mkdir(parents=True)
    left.touch()
    subprocess.run(where, cwd=tree, env={**os.environ, "PACE_NO_EXT": "1"}, capture_output=True, check=True)
    assert not left.exists() and (left.parent / "_cuda.pyi").exists() and (left.parent / "_not_built.json").exists()


def test_why_a_library_is_missing_is_read_from_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "__file__", str(tmp_path / "backend.py"))
    error = ImportError("cannot import name '_cuda'")
    assert backend._why_missing("_absent", error) == "is not built: cannot import name '_cuda'"
    (tmp_path / "_not_built.json").write_text('{"_absent": "nvcc failed with exit status 1"}')
    assert backend._why_missing("_absent", error) == "is not built: nvcc failed with exit status 1"
    assert backend._why_missing("backend", error) == "does not load (cannot import name '_cuda')"


@pytest.mark.parametrize("hip", [None, "7.1"])
def test_a_fall_from_cuda_to_triton_is_told_once(hip: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        backend.Backend("cuda", False, "the CUDA extension is not built: no nvcc"),
        backend.Backend("triton", True, None, ("cuda",)),
        backend.Backend("torch", True, None),
    ]
    monkeypatch.setattr(backend, "_table", lambda: {row.name: row for row in rows})
    monkeypatch.setattr(torch.version, "hip", hip)
    backend.say_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            row = backend.choose.__wrapped__(None, torch.device("cuda"), torch.float32)
            assert row.name == "triton"
    passed = backend.passed_over(row, torch.device("cuda"), torch.float32)  # what memory() prints
    assert passed == ({} if hip else {"cuda": "the CUDA extension is not built: no nvcc"})
    # Triton's kernels are all that an AMD GPU has: that is no fall.
    why = "Backend cuda: the CUDA extension is not built: no nvcc."
    expected = [] if hip else [f"pace_kernels computes through triton, more slowly. {why}"]
    assert [str(w.message) for w in caught] == expected


def test_the_source_archive_has_all_that_is_tracked(tree: Path, tmp_path: Path) -> None:
    """Also where it is made without torch, a compiler or nvcc: those who build from it may have them."""
    made = TOOL["source_archive"](tmp_path / "dist", tree)
    with tarfile.open(made) as opened:
        packed = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    wanted = {name for name in tracked() if not name.startswith((".github/", ".ci/"))}
    assert wanted - packed == set()
    assert {"csrc/rules/pace.h", "triton_kernels/__init__.py", "CHANGELOG.md", "Makefile"} <= packed


def test_torch_is_not_among_the_build_requirements() -> None:
    requires = next(
        line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("requires =")
    )
    assert "torch" not in requires and "setuptools>=77" in requires


def test_the_version_is_that_of_all_files() -> None:
    version = pace_kernels.__version__
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    log = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", log, re.M)
    assert released[0] == version and log.index("## [Unreleased]") < log.index(f"## [{version}]")
    assert set(re.findall(r"^### (.*)$", log, re.M)) <= {
        *("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
    }


def test_what_git_hub_reads_is_well_formed() -> None:
    yaml = pytest.importorskip("yaml")
    workflows = sorted(map(str, (ROOT / ".github" / "workflows").glob("*.yml")))
    assert len(workflows) == 2
    if importlib.util.find_spec("check_jsonschema") is not None:
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    if (actionlint := shutil.which("actionlint")) is not None:
        done = subprocess.run([actionlint, *workflows], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"):
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= set(form)
        ids = [part["id"] for part in form["body"]]
        assert len(set(ids)) == len(ids) and all(part["attributes"]["label"] for part in form["body"])
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    # What a workflow calls is there.
    text = "".join(Path(path).read_text() for path in workflows)
    targets = (ROOT / "Makefile").read_text()
    assert all(f"\n{name}:" in targets for name in re.findall(r"run: make (\w+)", text))
    assert all((ROOT / name).exists() for name in re.findall(r"run: python (\S+)", text))


def test_the_hooks_run_the_linters_of_the_tests() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    wanted = set(re.findall(r'additional_dependencies: \["(.*?)"\]', hooks))
    assert len(wanted) == 2 and all(f'"{requirement}"' in project for requirement in wanted)
