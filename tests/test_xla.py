"""Promise: everything in tests/xla, which a torch 2.9 with torch_xla runs in an environment of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv-xla" / "bin" / "python"


@pytest.mark.skipif(not PYTHON.exists(), reason=f"{PYTHON} is not there: `make test` sets it up, unless XLA=0")
def test_under_torch_xla() -> None:
    # Without tests/conftest.py, which needs the packages of the first environment; from ROOT, whose package it imports.
    command = [PYTHON, "-m", "pytest", "tests/xla", "--confcutdir=tests/xla", "-p", "no:cacheprovider", "--durations=5"]
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("PACE_", "PYTEST_"))}
    environment = keep | {"PJRT_DEVICE": "CPU", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout[-20000:], done.stderr[-4000:])
    assert done.returncode == 0, f"tests/xla failed, exit code {done.returncode}: its own report is above"
