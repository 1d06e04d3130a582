"""The package is imported without torch's compilers, which cost more time than all of it: bench/import_time.py."""

import subprocess
import sys

PROBE = """
import sys
import torch
before = set(sys.modules)
import pace_kernels
print(*sorted(set(sys.modules) - before))
"""


def test_the_package_imports_neither_dynamo_nor_triton() -> None:
    new = subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True, text=True).stdout.split()
    assert "pace_kernels.optimizer" in new
    assert not [name for name in new if name.startswith(("torch._dynamo", "torch._inductor", "triton"))]
