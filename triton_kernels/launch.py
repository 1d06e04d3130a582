"""How kernels are launched: their compile-time constants, and the options of their compilation."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..definitions.kit import Definition
from .coded import of_formats
from .table import OPERANDS

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, None: None}
TRITON_DTYPES |= {torch.uint8: tl.uint8, torch.int8: tl.int8, torch.int16: tl.int16}  # codes, and rests of weights


@dataclass(frozen=True)
class Target:
    """The target of the code: cuda or hip, and the lanes of a warp."""

    backend: str
    warp_size: int = 32


@functools.cache
def target_of(device: torch.device) -> Target:
    if not torch.version.hip or device.type != "cuda":
        return Target("cuda")
    return Target("hip", torch.cuda.get_device_properties(device).warp_size)


@dataclass(frozen=True)
class Summed:
    """The sums of a rule over coordinates, under a flag, and the tensor of the result: the terms of a block, how a
    program leaves them in a row of how many doubles, and the columns; a bit marks minima and maxima."""

    flag: str
    extra: str
    terms: int
    finish: Any
    width: int
    columns: int
    minima: int = 0
    maxima: int = 0

    @functools.cache  # noqa: B019
    def constants(self, width: int) -> dict[str, Any]:
        """For rows of that width as the result."""
        counted = {"COLUMNS": self.columns, "MINIMA": self.minima, "MAXIMA": self.maxima}
        return {**counted, "WIDTH": self.width, "OUT_WIDTH": width}


@dataclass(frozen=True, eq=False)
class Rule:
    """An optimizer for Triton: its definition, the module with its functions, flags and names of scalars, and its
    sweep: the warps of 32 of a program, the elements that a thread has at a time if weights or gradients are narrower
    than float32, and the registers that a thread may take (None: all 255). ``coded``: its operands may have the formats
    of :mod:`.codes`, with others beside them."""

    definition: Definition
    module: Any
    summed: Summed | None = None
    numbers: str | None = None  # the extra tensor that scalars are computed from
    warps: int = 8
    narrow: int = 8
    registers: int | None = None
    coded: bool = False

    @property
    def name(self) -> str:
        return self.definition.op.removesuffix("_").removesuffix("_step") + "_coded" * self.coded

    @property
    def fields(self) -> tuple[str, ...]:
        return self.module.FIELDS  # type: ignore[no-any-return]

    @property
    def columns(self) -> int:
        return OPERANDS.value + len(self.definition.operands) * (1 + self.coded)

    def sums(self, flags: Any) -> Summed | None:
        return self.summed if self.summed is not None and getattr(flags, self.summed.flag) else None

    @functools.cache  # noqa: B019
    def in_play(self, flags: Any) -> tuple[tuple[bool, bool], ...]:
        """Whether each operand is read and written."""
        return tuple(operand.uses(flags._asdict()) for operand in self.definition.operands)

    @functools.cache  # noqa: B019
    def constants(self, formats: tuple[torch.dtype | None, ...], aligned: bool, flags: Any) -> dict[str, Any]:
        """A thread has four elements of float32 at a time, 16 bytes. If operands are not aligned to 16 bytes, it has
        two, one per access. For a coded rule, the formats of the lists beside operands follow theirs."""
        narrow = any(dtype not in (None, torch.float32) for dtype in formats)
        count = len(self.definition.operands)
        if self.coded:
            flags = of_formats(self.definition, flags, formats[:count], formats[count:])
        vector = (self.narrow if narrow else 4) if aligned else 2
        summed = self.sums(flags)
        return {
            "ROUND": getattr(self.module, f"{self.name}_round"),
            "FLAGS": flags,
            "FORMATS": tuple(TRITON_DTYPES[dtype] for dtype in formats),
            "FIELDS": self.fields,
            "FINISH": summed and summed.finish,
            "TERMS": summed.terms if summed else 0,
            "ROW": summed.width if summed else 0,
            "ALIGNED": aligned,
            "BLOCK": self.warps * 32 * vector,
            "VECTOR": vector if aligned else 1,
            "BESIDE": count,
            "REST": torch.uint8 not in formats[count:],
        }

    @functools.cache  # noqa: B019
    def scalar_constants(self, last: bool, on_device: bool) -> dict[str, Any]:
        return {
            "SCALARS": getattr(self.module, f"{self.name}_scalars"),
            "NAMES": tuple(option.name for option in self.definition.options),
            "FIELDS": self.fields,
            "COLUMNS": self.columns,
            "LAST": last,
            "ON_DEVICE": on_device,
        }

    @functools.cache  # noqa: B019
    def compiled_with(self, target: Target) -> dict[str, Any]:
        capped = self.registers is not None and target.backend == "cuda"  # ROCm has no such option
        return {"num_warps": self.warps * 32 // target.warp_size, **({"maxnreg": self.registers} if capped else {})}


def compile_options(**options: Any) -> dict[str, Any]:
    """The arithmetic contract (:mod:`.arith`) is an option that every compilation of a kernel needs."""
    return {"num_warps": 1, "enable_fp_fusion": False, **options}


# Of this version on, a compiled kernel is called with all arguments in their order, constants among them.
_CALLS_COMPILED = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 4)
# Compiled kernels, each with its constants, whose address is a part of its key.
_compiled: dict[Hashable, tuple[Any, dict[str, Any]]] = {}


def _kind(value: Any) -> Hashable:
    """All of an argument by which Triton may specialize a kernel."""
    if isinstance(value, Tensor):
        small = torch.version.hip is None or value.untyped_storage().nbytes() < 2**31
        return value.dtype, value.data_ptr() % 16 == 0, small
    return None if value is None else (value == 1, value % 16 == 0, value.bit_length() > 31)


def launch(
    kernel: Any, programs: int, device: torch.device, options: dict[str, Any], constants: dict[str, Any], **given: Any
) -> None:
    """``constants`` is the same dict, unchanged, whenever ``kernel``, ``options`` and its values are the same: the
    compiled kernel is known by it, and found without Triton's own search, which looks at each constant."""
    if programs == 0:
        return
    # Triton launches on the current device.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kinds = (_kind(value) for value in given.values() if type(value) is not float)
        key = (id(kernel), id(constants), device, *kinds)
        known = _compiled.get(key)
        if known is not None:
            values = constants | given
            known[0][programs, 1, 1](*map(values.__getitem__, kernel.arg_names))
            return
        compiled = kernel[(programs,)](**given, **constants, **compile_options(**options))
        if _CALLS_COMPILED and compiled is not None:  # the interpreter compiles nothing
            _compiled[key] = compiled, constants
