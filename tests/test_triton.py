"""Promise: in Triton every switch of the rules gives the bits that the CPU kernels give. Triton's interpreter has to be
chosen before Triton is imported, so the cases (test_triton_interpreted.py) run in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pace_kernels import PACE, backends

CASES = Path(__file__).parent / "test_triton_interpreted.py"
CODED = Path(__file__).parent / "test_triton_coded.py"


def in_the_interpreter(cases: Path, *choices: str) -> None:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PACE_")} | {"TRITON_INTERPRET": "1"}
    # NumPy warns of overflows and of divisions by zero that are meant.
    command = [sys.executable, "-m", "pytest", "-x", "--no-header", "-W", "ignore::RuntimeWarning", str(cases), "-k"]
    runs = [
        subprocess.Popen(
            [*command, which], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for which in choices
    ]
    said = [run.communicate()[0] for run in runs]
    assert all(run.returncode == 0 for run in runs), "\n".join(said)
    assert all(" passed" in text for text in said)


def test_in_the_interpreter() -> None:
    in_the_interpreter(CASES, "test_mada and float32", "not (test_mada and float32)")  # half the time of one process


def test_codes_in_the_interpreter() -> None:
    in_the_interpreter(CODED, "test_mada or test_pace", "not (test_mada or test_pace)")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_why() -> None:
    row = backends()["triton"]
    assert not row.available and row.reason in (
        "there is no GPU that this torch can use",
        "the package triton is not installed",
    )
    with pytest.raises(RuntimeError, match="backend='triton' is not available: the"):
        PACE([torch.nn.Parameter(torch.ones(2))], backend="triton")


def test_kernels_are_imported_when_they_are_needed_and_not_before() -> None:
    code = "import sys, pace_kernels; pace_kernels.backends(); sys.exit('pace_kernels.triton_kernels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
