"""Promise: NVIDIA's compute-sanitizer finds no access out of bounds, no race in shared memory, and no read of memory
that nobody wrote."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import on_gpu
import pytest
from on_gpu import both, need

SCRIPT = Path(__file__).with_name("sanitized.py")
LIMIT_S = 150.0
# torch's own kernels are not ours to judge: reports count where they name one of these.
OURS = re.compile(r"pace|mada", re.IGNORECASE)


@both
@on_gpu.gpu_only
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_nothing_is_reported(tool: str, backend: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "86", sys.executable, str(SCRIPT), need(backend)]
    # Without torch's cache every tensor is an allocation of its own, so that its bounds are known to the tool.
    paths = os.pathsep.join(path for path in sys.path if path)
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": paths}
    limit_s = max(1.0, min(LIMIT_S, on_gpu.seconds_left()))
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} took longer than {limit_s:.0f} s")
    if done.returncode not in (0, 86):
        pytest.fail(f"{tool} could not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    reports = re.split(r"(?m)^=+\s*$", done.stdout)
    assert not [report for report in reports if OURS.search(report) and "SUMMARY" not in report], done.stdout[-4000:]


@both
def test_the_script_runs(backend: str) -> None:
    import sanitized

    sanitized.run(need(backend), on_gpu.DEVICE)
