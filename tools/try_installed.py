"""Tries the installed package: the native kernels load, and compute the bits of the reference in torch.

python tools/try_installed.py        from any folder, with the Python that has it
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import pace_kernels


def trained(backend: str, kind: str, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(1000).to(dtype))
    optimizers = {
        "PACE": lambda: pace_kernels.PACE([parameter], lr=0.01, lambda_pullback=5.0, backend=backend),
        "MADA": lambda: pace_kernels.MADA.preset("adan", [parameter], lr=0.01, backend=backend),
        "Pullback": lambda: pace_kernels.Pullback(torch.optim.SGD([parameter], lr=0.01), gain=0.05, backend=backend),
    }
    optimizer = optimizers[kind]()
    for _ in range(3):
        parameter.grad = torch.randn(1000).to(dtype)
        optimizer.step()
    state = (optimizer.base if kind == "Pullback" else optimizer).state[parameter]
    return [parameter.detach(), *(value for value in state.values() if isinstance(value, torch.Tensor))]


def main() -> None:
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {Path(pace_kernels.__file__).parent}")
    for row in pace_kernels.backends().values():
        print(f"{row.name}: {row.reason or 'available'}")
    if not pace_kernels.backends()["cpu"].available:
        sys.exit("the native kernels are missing")
    for kind in ("PACE", "MADA", "Pullback"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            native, reference = (trained(backend, kind, dtype) for backend in ("cpu", "torch"))
            if not all(torch.equal(a, b) for a, b in zip(native, reference, strict=True)):
                sys.exit(f"{kind} in {dtype}: the native kernels and torch differ")
    print("PACE, MADA and Pullback give the bits of the reference")


if __name__ == "__main__":
    main()
