"""How kernels are launched: what is compiled in, and the options that they are compiled with."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch

from .mada_kernel import _mada_kernel
from .pace_kernel import _pace_kernel
from .pullback_kernel import _pullback_kernel
from .schedule_free_kernel import _schedule_free_kernel
from .table import TRITON_DTYPES, Part


@dataclass(frozen=True)
class Target:
    """What the code depends on: cuda or hip, and the lanes of a warp."""

    backend: str
    warp_size: int = 32


@functools.cache
def target_of(device: torch.device) -> Target:
    if not torch.version.hip or device.type != "cuda":
        return Target("cuda")
    return Target("hip", torch.cuda.get_device_properties(device).warp_size)


@dataclass(frozen=True)
class Sweep:
    """A kernel that sweeps; the warps of 32 of a program; the elements that a thread has at a time where weights or
    gradients are narrower than float32; and the registers that a thread may take (None: 255, as many as there are)."""

    kernel: Any
    warps: int
    narrow: int
    registers: int | None = None

    def constants(self, part: Part) -> dict[str, Any]:
        """A thread has four elements of float32 at a time, 16 bytes. Where operands are not aligned to 16 bytes, it has
        two, one an access."""
        narrow = part.x_dtype != torch.float32 or part.g_dtype != torch.float32
        vector = (self.narrow if narrow else 4) if part.aligned else 2
        return {
            "X_FORMAT": TRITON_DTYPES[part.x_dtype],
            "G_FORMAT": TRITON_DTYPES[part.g_dtype],
            "ALIGNED": part.aligned,
            "BLOCK": self.warps * 32 * vector,
            "VECTOR": vector if part.aligned else 1,
        }

    def options(self, target: Target) -> dict[str, Any]:
        capped = self.registers is not None and target.backend == "cuda"  # ROCm has no such option
        return {
            "num_warps": self.warps * 32 // target.warp_size,
            **({"maxnreg": self.registers} if capped else {}),
        }


# PACE takes 46 to 55 registers, with eight elements of bfloat16 a thread (16 bytes) 68 to 80: four (three) programs of
# 8 warps fit on an SM. MADA with everything learned takes 184: with 168, and nothing spilled, three programs of 4 warps
# fit instead of two. With eight elements it would take 255 and spill, so weights and gradients in bfloat16, 6 of its 58
# bytes an element, are moved 8 bytes at a time. ptxas 12.8 and 13, sm_80 to sm_120.
PACE = Sweep(_pace_kernel, warps=8, narrow=8)
MADA = Sweep(_mada_kernel, warps=4, narrow=4, registers=168)
PULLBACK = Sweep(_pullback_kernel, warps=8, narrow=8)
SCHEDULE_FREE = Sweep(_schedule_free_kernel, warps=8, narrow=8)


def compile_options(**options: Any) -> dict[str, Any]:
    """The arithmetic contract (:mod:`.arith`) is an option: it has to be there wherever a kernel is compiled."""
    return {"num_warps": 1, "enable_fp_fusion": False, **options}


def launch(kernel: Any, programs: int, device: torch.device, options: dict[str, Any], **arguments: Any) -> None:
    if programs == 0:
        return
    # Triton launches on the current device.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](**arguments, **compile_options(**options))
