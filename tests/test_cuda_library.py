"""Promise: the CUDA library builds where torch is a CUDA build, loads without a GPU, registers its kernels, and never
breaks the import: what can't be built or loaded is a row of backends() with the reason."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from emulated import build

from pace_kernels.backend import runs_on

ROOT = build.ROOT
needs_library = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))


def in_cuda_environment(code: str, package: Path) -> str:
    """Runs code with torch's CUDA build, as a user would who installed the package there."""
    env = {**os.environ, "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([build.PYTHON, "-c", code], cwd=package, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOAD = """
import json, torch, pace_kernels
from torch._subclasses.fake_tensor import FakeTensorMode
assert torch.version.cuda is not None and not torch.cuda.is_available()
row = pace_kernels.backends()["cuda"]
names = ("pace_step_", "mada_step_", "mada_learn_", "pullback_", "schedule_free_step_")
registered = [torch._C._dispatch_has_kernel_for_dispatch_key(f"pace_kernels::{name}", "CUDA") for name in names]
print(json.dumps([row.available, row.reason, row.architectures, registered]))

options = dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.01, lambda_pullback=5.0, clamp_pullback=True,
               beta_ema=0.01, ema_kappa=0.2, ema_rho=0.0, ema_gamma=1.0, ema_update_freq=1, pullback_from_step=False,
               maximize=False, capturable=True)
op = torch.ops.pace_kernels.pace_step_.default
def lists(device):
    return [[torch.rand(7, 3, device=device) for _ in range(2)] for _ in range(5)] + [
        [torch.zeros((), device=device) for _ in range(2)]]
torch.library.opcheck(op, (*lists("cpu"), None), options)
with FakeTensorMode():
    op(*lists("cuda"), None, **options)
    try:
        op(*lists("cuda")[:-1], [], None, **options)
    except ValueError as error:
        print(error)
p = torch.nn.Parameter(torch.ones(5)); p.grad = torch.ones(5)
pace_kernels.PACE([p], lr=0.1).step()
print(round(p[0].item(), 3))
try:
    pace_kernels.PACE([p], backend="cuda")
except RuntimeError as error:
    print(error)
"""


@needs_library
def test_it_loads_without_a_gpu_and_registers() -> None:
    first, fake, weight, refused = in_cuda_environment(LOAD, build.library()).splitlines()
    available, reason, architectures, registered = json.loads(first)
    assert available and reason is None and all(registered)
    assert architectures == build.SETTINGS["CUDA_ARCHS"]
    assert fake == "steps has 0 tensors, params has 2"
    assert weight == "0.899"
    assert refused == "backend='cuda' can't step this parameter: it covers parameters on cuda, not on cpu"


@needs_library
def test_it_needs_the_stable_abi_and_no_cuda_runtime() -> None:
    path = build.library() / "pace_kernels" / "_cuda.abi3.so"
    symbols = build.run(["nm", "-DC", "--undefined-only", path]).splitlines()
    needed = [line.split("U ", 1)[1] for line in symbols if " U " in line]
    assert any(name.startswith("aoti_torch_get_current_cuda_stream") for name in needed)
    assert [name for name in needed if name.startswith(("at::", "c10::", "torch::", "cuda", "cu"))] == []
    libraries = build.run(["objdump", "-p", path])
    assert "libtorch_cuda.so" in libraries and "libcudart" not in libraries


REASON = "import pace_kernels; r = pace_kernels.backends()['cuda']; print(r.available, r.reason)"


@needs_library
def test_a_library_that_does_not_load_is_a_reason(tmp_path: Path) -> None:
    shutil.copytree(build.library(), tmp_path / "lib")
    library = tmp_path / "lib" / "pace_kernels" / "_cuda.abi3.so"
    library.write_bytes(b"no library")
    broken = in_cuda_environment(REASON, tmp_path / "lib")
    assert broken.startswith("False the CUDA extension does not load (") and str(library) in broken
    library.unlink()
    missing = in_cuda_environment(REASON, tmp_path / "lib")
    assert missing.startswith("False the CUDA extension is not built: cannot import name '_cuda'")


def test_without_torchs_cuda_build_it_is_a_reason() -> None:
    done = subprocess.run([sys.executable, "-c", REASON], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False torch ") and "is not a CUDA build" in done.stdout


# ---- what setup.py decides ----


def decide(**env: str) -> subprocess.CompletedProcess[str]:
    """Where nothing is built: the extensions that setup.py would build for the torch that is here, a CPU build."""
    code = "import runpy; s = runpy.run_path('setup.py'); print([e.name for e in s['native_extensions']()])"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True
    )


def test_auto_builds_without_cuda_and_says_why() -> None:
    done = decide(PACE_CUDA="auto")
    assert done.stdout == "['pace_kernels._C']\n"
    assert "building without CUDA kernels: torch" in done.stderr and "is not a CUDA build" in done.stderr


def test_asked_for_it_fails_with_the_reason() -> None:
    done = decide(PACE_CUDA="1")
    assert done.returncode != 0 and done.stderr.startswith("PACE_CUDA=1, but the CUDA kernels can't be built: torch")
    bad = decide(PACE_CUDA="yes")
    assert bad.returncode != 0 and bad.stderr == "PACE_CUDA must be auto, 0 or 1, got 'yes'\n"


def test_turned_off_it_is_not_looked_for() -> None:
    done = decide(PACE_CUDA="0")
    assert done.stdout == "['pace_kernels._C']\n" and done.stderr == ""


@needs_library
def test_an_nvcc_that_is_a_wrapper_leads_to_its_toolkit(tmp_path: Path) -> None:
    real = build.SETTINGS["find_nvcc"]
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    (toolkit,) = Path(build.tool("nvcc")).parent.parent.glob("lib/libcudart_static.a")
    wrapper.write_text(f'#!/bin/sh\nexec {build.tool("nvcc")} "$@"\n')
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_HOME", str(tmp_path))
        nvcc = real()
        assert nvcc.static_runtime().resolve() == toolkit.resolve() and nvcc.version >= (12, 1)
        wrapper.write_text("#!/bin/sh\nexit 1\n")
        assert "is older than 12.1 or has no static cudart" in real()
        wrapper.unlink()
        assert real() == "no nvcc in CUDA_HOME, among the nvidia wheels, on PATH or in /usr/local/cuda"


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("8.0;9.0+PTX", (8, 0), True),
        ("8.0;9.0+PTX", (8, 9), True),
        ("8.0;9.0+PTX", (7, 5), False),
        ("8.0;9.0+PTX", (12, 0), True),
        ("8.6;9.0", (8, 0), False),
        ("8.6;9.0", (8, 7), False),
        ("8.0+PTX;8.6", (8, 7), True),
        ("8.7", (8, 7), True),
        ("7.5;8.0+PTX", (7, 5), True),
        ("7.5;8.0+PTX", (7, 0), False),
        ("8.6;9.0", (10, 0), False),
    ],
)
def test_which_gpus_a_build_runs_on(architectures: str, capability: tuple[int, int], runs: bool) -> None:
    assert runs_on(architectures, capability) is runs
