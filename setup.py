"""Builds pace_kernels._C, the native CPU kernels, against PyTorch's stable ABI.

One wheel (cp310-abi3) so built runs on every CPython >= 3.10 and every torch >= 2.10. Environment variables:

    PACE_NO_EXT=1   build without the extension; the package then computes through torch
    CXX             the C++17 compiler (GCC >= 11 or Clang >= 14)

CUDA kernels will be a second library built and loaded beside this one, so that this one stays free of CUDA.
"""

import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NO_EXT = os.environ.get("PACE_NO_EXT", "0") not in ("", "0")

# Narrowest first. Arm's baseline is NEON. The rules' arithmetic contract (csrc/rules/arith.h) is -ffp-contract=off, so
# that all of these compute the same bits; the other two let the compiler vectorize square roots and selects.
ISA_FLAGS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma"]
    ISA_FLAGS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
    ]
COMMON_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off"]
COMMON_FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
KERNEL_FLAGS = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
DEFINES = [
    ("Py_LIMITED_API", "0x030A0000"),
    ("TORCH_TARGET_VERSION", "0x020A000000000000"),
    ("TORCH_STABLE_ONLY", None),
    ("PACE_CPU_VARIANTS", " ".join(f"X({isa})" for isa in ISA_FLAGS)),
]
KERNELS = "csrc/cpu/kernels.cpp"  # compiled once per instruction set
SOURCES = ["csrc/module.cpp", *(f"csrc/cpu/{name}.cpp" for name in ("isa", "mada_ops", "pace_ops", "swap_ops"))]
HEADERS = sorted(glob("csrc/**/*.h", recursive=True))


class BuildKernels(build_ext):
    """Compiles each source with the flags of its instruction set; setuptools knows only one set of flags a library."""

    def build_extension(self, ext: Extension) -> None:
        try:
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError:
            sys.exit(
                "pace_kernels builds against the torch you use: install torch >= 2.10 first, then "
                "`pip install --no-build-isolation pace_kernels` (PACE_NO_EXT=1 builds without native kernels)."
            )

        def compile_source(source: str, isa: str | None) -> str:
            defines = DEFINES + ([("PACE_ISA", isa)] if isa else [])
            flags = [*COMMON_FLAGS, *(KERNEL_FLAGS + ISA_FLAGS[isa] if isa else [])]
            flags += [f"-isystem{path}" for path in include_paths()]
            out = os.path.join(self.build_temp, isa or "common")
            (built,) = self.compiler.compile(
                [source], output_dir=out, macros=defines, include_dirs=self.include_dirs, extra_postargs=flags
            )
            return built

        jobs = [(KERNELS, isa) for isa in ISA_FLAGS] + [(source, None) for source in SOURCES]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda job: compile_source(*job), jobs))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=["torch", "torch_cpu", "c10"],
            library_dirs=library_paths(),
            target_lang="c++",
        )


def native_extension() -> list[Extension]:
    if NO_EXT:
        print("pace_kernels: PACE_NO_EXT is set, building without native kernels", file=sys.stderr)
        return []
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        print(f"pace_kernels: no C++ compiler ({compiler}), building without native kernels", file=sys.stderr)
        return []
    return [Extension("pace_kernels._C", [KERNELS, *SOURCES], depends=HEADERS, language="c++", py_limited_api=True)]


if __name__ == "__main__":
    extensions = native_extension()
    setup(
        ext_modules=extensions,
        cmdclass={"build_ext": BuildKernels},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
    )
