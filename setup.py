"""Builds the native kernels against PyTorch's stable ABI, one wheel (cp310-abi3) for every CPython >= 3.10 and torch >=
2.10: pace_kernels._C, the CPU kernels, and beside it, where torch is a CUDA build and there is an nvcc,
pace_kernels._cuda. Where they can't be built (no torch, torch 2.9, no compiler, Windows) the package is built without
them, and the reason goes into it: pace_kernels.backends() tells it. Environment variables:

    PACE_NO_EXT=1        build without extensions; the package then computes through Triton or torch
    PACE_CUDA            auto (default): the CUDA kernels where they can be built; 0: not; 1: or fail with the reason
    PACE_CUDA_DEFINES    of PACE's kernels: -DPACE_VARIANTS has those that `make gpu` measures beside the ones in use
    PACE_CUDA_ARCHS      compute capabilities, as in TORCH_CUDA_ARCH_LIST; no GPU is asked (default: CUDA_ARCHS below)
    CUDA_HOME            the CUDA toolkit (default: the nvidia wheels beside torch, nvcc on PATH, /usr/local/cuda)
    CXX                  the C++17 compiler (GCC >= 11 or Clang >= 14)
    PACE_SANITIZE        sanitizers to instrument the CPU kernels with, for tests/test_sanitizers.py, which shows how to
                         run such a build: PACE_SANITIZE=address,undefined python setup.py build --build-base
                         build/sanitized. Never in place: an ordinary Python can't load it
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, LinkError

# An older one, such as the 65.5 that Python 3.11 brings into its environments, rejects `license = "MIT"` in 90 lines.
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"pace_kernels is built by setuptools >= 77, and this is {setuptools.__version__}: run "
        '`pip install "setuptools>=77"` first'
    )

NO_EXT = os.environ.get("PACE_NO_EXT", "0") not in ("", "0")
PACE_CUDA = os.environ.get("PACE_CUDA") or "auto"
SANITIZE = os.environ.get("PACE_SANITIZE") or ""

# Narrowest first. Arm's baseline is NEON. The rules' arithmetic contract (csrc/rules/arith.h) is -ffp-contract=off, so
# that all of these compute the same bits; the other two let the compiler vectorize square roots and selects.
ISA_FLAGS: dict[str, list[str]] = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma"]
    ISA_FLAGS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
    ]
COMMON_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off"]
COMMON_FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
KERNEL_FLAGS = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
# Every finding ends the process. float-cast-overflow is no part of GCC's "undefined". The module and libtorch don't
# share their type information, which vptr would need. Many Pythons compile with -fwrapv: no overflow would be one.
SANITIZER_FLAGS = ["-fno-sanitize-recover=all", "-fno-sanitize=vptr", "-fno-omit-frame-pointer", "-fno-wrapv"]
SANITIZER_FLAGS += ["-D_GLIBCXX_ASSERTIONS", "-O1", "-g1"]


def sanitizer_flags(names: str) -> list[str]:
    """For compiler and linker; nothing where no sanitizer is named."""
    also = ["-fsanitize=float-cast-overflow"] if "undefined" in names.split(",") else []
    return [f"-fsanitize={names}", *also, *SANITIZER_FLAGS] if names else []


DEFINES = [
    ("Py_LIMITED_API", "0x030A0000"),
    ("TORCH_TARGET_VERSION", "0x020A000000000000"),
    ("TORCH_STABLE_ONLY", None),
    ("PACE_CPU_VARIANTS", " ".join(f"X({isa})" for isa in ISA_FLAGS)),
]
KERNELS = "csrc/cpu/kernels.cpp"  # compiled once per instruction set
SOURCES = ["csrc/module.cpp", *(f"csrc/cpu/{name}.cpp" for name in ("isa", "ops"))]
HERE = os.path.dirname(os.path.abspath(__file__))
# Library: why it is not built. Written into the package as _not_built.json, which pace_kernels/backend.py reads.
not_built: dict[str, str] = {}
# csrc/definitions.h, which says what the definitions in pace_kernels/definitions say. A new one is as old as they are:
# the tree of an archive that was just unpacked then compiles no CUDA kernel again that lies in its build folder.
DEFINITIONS = os.path.join(HERE, "csrc", "definitions.h")
IS_NEW = not os.path.exists(DEFINITIONS)
runpy.run_path(os.path.join(HERE, "csrc", "definitions.py"))["write"]()
if IS_NEW:
    written_from = [f"{HERE}/csrc/definitions.py", *glob(f"{HERE}/pace_kernels/definitions/*.py")]
    os.utime(DEFINITIONS, times=(max(map(os.path.getmtime, written_from)),) * 2)
HEADERS = sorted(path for end in ("h", "cuh") for path in glob(f"csrc/**/*.{end}", root_dir=HERE, recursive=True))

# Turing (T4), Ampere (A100; RTX 30), Hopper, Blackwell (B200; RTX 50), and PTX for what lies between (8.7, 11.0) and
# comes after. Ada (8.9) runs 8.6's code.
CUDA_ARCHS = "7.5;8.0+PTX;8.6;9.0;10.0;12.0+PTX"
# -fmad=false is the arithmetic contract again. The kernels' parameters, up to 32,764 bytes, need CUDA >= 12.1.
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr", "-Xfatbin=-compress-all"]
NVCC_FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
# The oldest driver of NVIDIA for the kernels, by the major version of CUDA (of 12, from 12.1 on).
DRIVERS = {12: 530, 13: 580}
CUDA_SOURCES = [f"csrc/cuda/{name}.cpp" for name in ("device", "module", "ops", "plan")]
# Device code, an object each: name, source, defines. MADA has many instances, so an object for each pair of formats.
FORMATS = [("Float32", "Float32")]
FORMATS += [(x, g) for x in ("BFloat16", "Float16") for g in (x, "Float32")]
CUDA_KERNELS = [
    ("pace", "csrc/cuda/pace.cu", os.environ.get("PACE_CUDA_DEFINES", "").split()),
    *((name, f"csrc/cuda/{name}.cu", []) for name in ("pullback", "schedule_free", "small")),
    *((name, f"csrc/cuda/{name}.cu", []) for name in ("pace_coded", "mada_coded")),
    *((f"mada_{x}_{g}", "csrc/cuda/mada.cu", [f"-DPACE_X={x}", f"-DPACE_G={g}"]) for x, g in FORMATS),
]


@dataclass(frozen=True)
class Torch:
    """What a build needs of torch, which is not imported: that takes seconds, and fails under build isolation."""

    root: Path
    version: str
    cuda: str | None

    @property
    def includes(self) -> list[str]:
        return [str(self.root / "include"), str(self.root / "include/torch/csrc/api/include")]

    @property
    def libraries(self) -> str:
        return str(self.root / "lib")

    @property
    def too_old(self) -> bool:
        return tuple(int(part) for part in self.version.split(".")[:2]) < (2, 10)


def find_torch() -> Torch | None:
    """The torch that can be imported, else that of the environment that pip installs into: its build isolation takes
    that environment's packages from sys.path, but not from sysconfig. (uv's builds in an environment of its own.)"""
    spec = importlib.util.find_spec("torch")
    roots = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    roots.append(Path(sysconfig.get_path("platlib")) / "torch")
    for root in roots:
        if (root / "version.py").exists():
            said = runpy.run_path(str(root / "version.py"))
            return Torch(root, said["__version__"], said.get("cuda"))
    return None


class Nvcc:
    """A CUDA compiler and the toolkit that it belongs to. An nvcc on PATH may be a wrapper: the toolkit is what the
    compiler itself says."""

    def __init__(self, path: str) -> None:
        self.path = path
        said = self._say("--dryrun", "-E", "-x", "cu", os.devnull)
        top = re.search(r"^#\$ TOP=(.*)$", said, re.M)
        self.root = Path(top.group(1).strip()).resolve() if top else None
        found = re.search(r"release (\d+)\.(\d+)", self._say("--version"))
        self.version = (int(found.group(1)), int(found.group(2))) if found else (0, 0)

    def _say(self, *arguments: str) -> str:
        """What it answers; nothing, where it does not run at all."""
        try:
            done = subprocess.run([self.path, *arguments], capture_output=True, text=True)
        except OSError:
            return ""
        return done.stdout + done.stderr

    def static_runtime(self) -> Path | None:
        if self.root is None:
            return None
        places = ("lib64", "lib", f"targets/{platform.machine()}-linux/lib", "targets/sbsa-linux/lib")
        return next((p for p in (self.root / d / "libcudart_static.a" for d in places) if p.exists()), None)

    def knows(self, arch: str) -> bool:
        return f"sm_{arch.removesuffix('+PTX').replace('.', '')}" in self._say("--list-gpu-code").split()


def find_nvcc(torch: Torch | None = None) -> Nvcc | str:
    """The first nvcc of the major version of CUDA of that torch, or of any; or why there is none."""
    packages = [Path(path) / "nvidia" for path in sys.path if path]
    if torch is not None:
        packages.append(torch.root.parent / "nvidia")
    places = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if not places:
        places += [bin_ for p in packages for bin_ in sorted(p.glob("cu*/bin"), reverse=True)]
        if on_path := shutil.which("nvcc"):
            places.append(Path(on_path).parent)
        places.append(Path("/usr/local/cuda/bin"))
    # Through a symbolic link nvcc does not find its own files.
    found = [Nvcc(str((place / "nvcc").resolve())) for place in places if (place / "nvcc").exists()]
    if not found:
        return "no nvcc in CUDA_HOME, among the nvidia wheels, on PATH or in /usr/local/cuda"
    usable = [nvcc for nvcc in found if nvcc.version >= (12, 1) and nvcc.static_runtime() is not None]
    if not usable:
        return (
            f"{found[0].path} (CUDA {'.'.join(map(str, found[0].version))}) is older than 12.1 or has no static cudart"
        )
    if torch is None or torch.cuda is None:
        return usable[0]
    same = [nvcc for nvcc in usable if nvcc.version[0] == int(torch.cuda.split(".")[0])]
    if not same:
        print(
            f"pace_kernels: {usable[0].path} is of CUDA {usable[0].version[0]}, torch of CUDA {torch.cuda}: the CUDA "
            f"kernels will need a driver of CUDA {usable[0].version[0]}, and Triton's serve on an older one",
            file=sys.stderr,
        )
    return [*same, *usable][0]


def cuda_archs(nvcc: Nvcc) -> list[str]:
    """Those asked for, all of which nvcc must know; or those of the default that it knows."""
    asked = os.environ.get("PACE_CUDA_ARCHS") or ""
    archs = re.split(r"[;, ]+", asked.strip() or CUDA_ARCHS)
    unknown = [arch for arch in archs if not (re.fullmatch(r"\d+\.\d(\+PTX)?", arch) and nvcc.knows(arch))]
    if unknown and asked:
        sys.exit(f"PACE_CUDA_ARCHS: {nvcc.path} does not know {', '.join(unknown)}; allowed are 9.0, 9.0+PTX and so on")
    known = [arch for arch in archs if arch not in unknown]
    if not known:
        raise RuntimeError(f"{nvcc.path} knows none of {CUDA_ARCHS}")
    if unknown:
        print(f"pace_kernels: nvcc does not know {', '.join(unknown)}; PTX of {known[-1]} beside", file=sys.stderr)
        known[-1] = known[-1].removesuffix("+PTX") + "+PTX"
    return known


def headers_of(source: str) -> set[str]:
    """The headers of this project that a source includes, by way of others too."""
    found: set[str] = set()
    left = [os.path.join(HERE, source)]
    while left:
        path = left.pop()
        for name in re.findall(r'^ *#include "(.*)"', Path(path).read_text(), re.MULTILINE):
            header = os.path.normpath(os.path.join(os.path.dirname(path), name))
            if header not in found:
                found.add(header)
                left.append(header)
    return found


def compile_cuda_kernels(nvcc: Nvcc, archs: list[str], out: str) -> list[str]:
    """The objects of CUDA_KERNELS; what is up to date is left as it is."""
    gencode = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        gencode.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            gencode.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    os.makedirs(out, exist_ok=True)

    def build(name: str, source: str, defines: list[str]) -> str:
        target = Path(out) / f"{name}.o"
        host = [f"-ccbin={os.environ['CXX'].split()[0]}"] if os.environ.get("CXX") else []
        command = [nvcc.path, *NVCC_FLAGS, *host, *gencode, *defines, "-c", source, "-o", str(target)]
        stamp = target.with_suffix(".command")
        text = f"{nvcc.version} {' '.join(command)}"
        newest = max(os.path.getmtime(path) for path in (source, *headers_of(source)))
        if not (target.exists() and stamp.exists() and stamp.read_text() == text and stamp.stat().st_mtime > newest):
            stamp.unlink(missing_ok=True)
            subprocess.run(command, check=True)
            stamp.write_text(text)
        return str(target)

    # The largest first, so that no core is left with one at the end.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda kernel: build(*kernel), reversed(CUDA_KERNELS)))


def write_reasons(package: Path) -> None:
    """Beside the package's modules. Libraries that an earlier build left there are no part of this one."""
    package.mkdir(parents=True, exist_ok=True)
    note = package / "_not_built.json"
    note.unlink(missing_ok=True)
    if not_built:
        note.write_text(json.dumps(not_built, indent=2) + "\n")
    if package != Path(HERE, "pace_kernels"):
        for path in (path for library in not_built for path in package.glob(f"{library}.*so")):
            path.unlink()


class BuildModules(build_py):
    """With the reasons for what is not built, also where there is nothing for build_ext to do."""

    def run(self) -> None:
        super().run()
        write_reasons(Path(HERE if self.editable_mode else self.build_lib, "pace_kernels"))


class BuildKernels(build_ext):
    """Compiles each source with the flags of its instruction set or device; setuptools knows one set of flags."""

    def run(self) -> None:
        if SANITIZE and self.inplace:
            sys.exit("PACE_SANITIZE builds a library that an ordinary Python can't load: not in place")
        super().run()
        write_reasons(Path(HERE if self.inplace else self.build_lib, "pace_kernels"))

    def build_extension(self, ext: Extension) -> None:
        if ext.name != "pace_kernels._cuda":
            try:
                return self._build_cpu(ext)
            except (CompileError, LinkError):
                sys.exit(
                    "pace_kernels: the C++ compiler or linker failed, as above. The kernels need GCC >= 11 "
                    "or Clang >= 14, which CXX names; PACE_NO_EXT=1 builds the package without them"
                )
        try:
            self._build_cuda(ext)
        except (RuntimeError, subprocess.CalledProcessError, CompileError, LinkError) as error:
            # Not the whole command, which is in the output above.
            failed = isinstance(error, subprocess.CalledProcessError)
            why = f"nvcc failed with exit status {error.returncode}" if failed else str(error)
            if PACE_CUDA == "1":
                sys.exit(f"PACE_CUDA=1, but the CUDA kernels can't be built: {why}")
            # The CPU kernels are built by now, and serve without it. setuptools leaves out what is optional and failed.
            print(f"pace_kernels: going on without CUDA kernels: {why}", file=sys.stderr)
            not_built["_cuda"] = why
            raise CompileError(why) from error

    def _compile(self, source: str, out: str, flags: list[str], defines: list[tuple[str, str | None]]) -> str:
        torch = find_torch()
        assert torch is not None
        sanitized = sanitizer_flags(SANITIZE)
        (built,) = self.compiler.compile(
            [source],
            output_dir=os.path.join(self.build_temp, out),
            macros=DEFINES + defines,
            include_dirs=self.include_dirs,
            extra_postargs=[*COMMON_FLAGS, *flags, *sanitized, *(f"-isystem{path}" for path in torch.includes)],
        )
        return str(built)

    def _link(self, ext: Extension, objects: list[str], libraries: list[str], directories: list[str]) -> None:
        torch = find_torch()
        assert torch is not None
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=["torch", "torch_cpu", "c10", *libraries],
            library_dirs=[torch.libraries, *directories],
            extra_postargs=sanitizer_flags(SANITIZE),
            target_lang="c++",
        )

    def _build_cpu(self, ext: Extension) -> None:
        jobs = [(KERNELS, isa) for isa in ISA_FLAGS] + [(source, None) for source in SOURCES]

        def compile_one(job: tuple[str, str | None]) -> str:
            source, isa = job
            if isa is None:
                return self._compile(source, "common", [], [])
            return self._compile(source, isa, KERNEL_FLAGS + ISA_FLAGS[isa], [("PACE_ISA", isa)])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, jobs))
        self._link(ext, objects, [], [])

    def _build_cuda(self, ext: Extension) -> None:
        nvcc = cuda_compiler()
        assert isinstance(nvcc, Nvcc), nvcc
        archs = cuda_archs(nvcc)
        objects = compile_cuda_kernels(nvcc, archs, os.path.join(self.build_temp, "cuda"))
        defines = [("USE_CUDA", None), ("PACE_CUDA_ARCHITECTURES", f'"{";".join(archs)}"')]
        objects += [self._compile(source, "cuda", [], defines) for source in CUDA_SOURCES]
        runtime = nvcc.static_runtime()
        assert runtime is not None
        self._link(ext, objects, ["torch_cuda", "cudart_static", "rt", "dl", "pthread"], [str(runtime.parent)])
        major = nvcc.version[0]
        driver = f"driver {DRIVERS[major]} or later" if major in DRIVERS else "a driver of that version"
        print(
            f"pace_kernels: the CUDA kernels contain the runtime of CUDA {major}, which needs NVIDIA's {driver}; on an "
            "older one Triton's kernels serve",
            file=sys.stderr,
        )


def cuda_compiler() -> Nvcc | str:
    """The nvcc for the torch that is here, or why the CUDA kernels can't be built."""
    torch = find_torch()
    if torch is None:
        return "torch is not installed"
    if torch.cuda is None:
        return f"torch {torch.version} is not a CUDA build"
    return find_nvcc(torch)


def why_nothing_native() -> str | None:
    """Why no native kernels can be built here; None where those of the CPU can."""
    if NO_EXT:
        return "PACE_NO_EXT is set"
    if platform.system() == "Windows":
        return "they are not built on Windows"
    torch = find_torch()
    if torch is None:
        return "the build saw no torch (uv builds in an environment of its own, and pip before it installs torch)"
    if torch.too_old:
        return f"they need torch >= 2.10, and this is torch {torch.version}"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        return f"there is no C++ compiler ({compiler})"
    return None


def native_extensions() -> list[Extension]:
    """What is to be built; the reasons for the rest are in not_built."""
    if PACE_CUDA not in ("auto", "0", "1"):
        sys.exit(f"PACE_CUDA must be auto, 0 or 1, got {PACE_CUDA!r}")
    if (why := why_nothing_native()) is not None:
        if PACE_CUDA == "1":
            sys.exit(f"PACE_CUDA=1, but the native kernels can't be built: {why}")
        print(f"pace_kernels: building without native kernels: {why}", file=sys.stderr)
        not_built.update(_C=why, _cuda=why)
        return []
    extensions = [
        Extension("pace_kernels._C", [KERNELS, *SOURCES], depends=HEADERS, language="c++", py_limited_api=True)
    ]
    if PACE_CUDA == "0":
        not_built["_cuda"] = "PACE_CUDA=0 was set"
        return extensions
    nvcc = cuda_compiler()
    if isinstance(nvcc, Nvcc):
        sources = [*CUDA_SOURCES, *sorted({source for _, source, _ in CUDA_KERNELS})]
        extensions.append(
            Extension(
                *("pace_kernels._cuda", sources),
                depends=HEADERS,
                language="c++",
                py_limited_api=True,
                optional=PACE_CUDA != "1",
            )
        )
    elif PACE_CUDA == "1":
        sys.exit(f"PACE_CUDA=1, but the CUDA kernels can't be built: {nvcc}")
    else:
        print(f"pace_kernels: building without CUDA kernels: {nvcc}", file=sys.stderr)
        not_built["_cuda"] = nvcc
    return extensions


if __name__ == "__main__":
    extensions = native_extensions()
    setup(
        ext_modules=extensions,
        cmdclass={"build_ext": BuildKernels, "build_py": BuildModules},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
    )
