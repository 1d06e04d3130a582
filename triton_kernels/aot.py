"""Ahead-of-time compilation of the kernels, for a target that need not be present: to look at their code in tests, and
to fill Triton's cache before a training starts.

>>> from triton.backends.compiler import GPUTarget
>>> compiled = compile_kernels(GPUTarget("cuda", 90, 32), ["pace float32"])
>>> "ld.global.v4.b32" in compiled["pace float32"].asm["ptx"]
True
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import learn_kernel, scalars, schedule_free_kernel, sums
from .launch import MADA, PACE, PULLBACK, SCHEDULE_FREE, Sweep, Target, compile_options
from .table import Part

# Types of the kernels' arguments that are not numbers in float64 and not compiled in.
_POINTERS = {
    "table_ptr": "*i64",
    "blocks_ptr": "*i32",
    "scalars_ptr": "*fp32",
    "stat_scalars_ptr": "*fp64",
    "factors_ptr": "*fp64",
    "rows_ptr": "*fp64",
    "out_ptr": "*fp64",
    "coefficients_ptr": "*fp64",
    "momenta_ptr": "*fp64",
    "hypergradients_ptr": "*fp64",
    "hyper_step_ptr": "*fp64",
    "sums_ptr": "*fp64",
    "options_ptr": "*fp64",
    "schedule_ptr": "*fp64",
    "lr_ptr": "*fp32",
    "grad_scale_ptr": "*fp32",
    "clip_coef_ptr": "*fp32",
    "found_inf_ptr": "*fp32",
}

_SHORT = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_PACE_FLAGS = {  # name: MOMENT, PULL, AVERAGE
    "": (True, True, True),
    " without pullback": (True, False, True),
    " AdamW": (True, False, False),
    " without first moment": (False, True, True),
}
_PULLBACK_FLAGS = {  # name: BEFORE, MOMENT, PULL
    "": (True, True, True),
    " from the step": (False, True, True),
    " constant": (True, False, True),
    " constant from the step": (False, False, True),
    " average": (False, False, False),
}
_MADA_FLAGS = {  # name: LAG, DIFF, SECOND, LION, ADAM
    "": (True, True, True, True, True),
    " hyperadam": (True, False, False, False, True),
    " fixed": (False, True, True, True, True),
    " AdamW": (False, False, False, False, True),
    " Lion": (False, False, False, True, False),
}


@dataclass(frozen=True)
class Variant:
    """A kernel, what is compiled in, and its options on a backend."""

    kernel: Any
    constants: dict[str, Any]
    warps: int = 1
    sweep: Sweep | None = None

    def options(self, target: GPUTarget) -> dict[str, Any]:
        if self.sweep is None:
            return {"num_warps": self.warps}
        return self.sweep.options(Target(target.backend, target.warp_size))


def _sweeps() -> dict[str, Variant]:
    found: dict[str, Variant] = {}

    def add(name: str, sweep: Sweep, part: Part, **constants: Any) -> None:
        constants |= sweep.constants(part)
        found[name] = Variant(sweep.kernel, constants, sweep=sweep)

    for x, g, aligned in (
        (torch.float32, torch.float32, True),
        (torch.float32, torch.float32, False),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.bfloat16, torch.float32, True),
        (torch.float16, torch.float16, True),
    ):
        part = Part(x, g, aligned, 0, 1)
        name = (_SHORT[x] if x == g else f"{_SHORT[x]}/{_SHORT[g]}") + ("" if aligned else " unaligned")
        for label, (moment, pull, average) in _PACE_FLAGS.items():
            flags = {"MOMENT": moment, "PULL": pull, "AVERAGE": average}
            absent = {"stat_scalars_ptr": None, "rows_ptr": None, "found_inf_ptr": None}
            add(f"pace {name}{label}", PACE, part, STATS=False, **flags, **absent)
            if label in ("", " without pullback"):
                add(f"pace {name}{label} stats", PACE, part, STATS=True, **flags)
        for label, (before, moment, pull) in _PULLBACK_FLAGS.items():
            flags = {"BEFORE": before, "MOMENT": moment, "PULL": pull}
            absent = {"stat_scalars_ptr": None, "rows_ptr": None, "found_inf_ptr": None}
            add(f"pullback {name}{label}", PULLBACK, part, STATS=False, **flags, **absent)
            if label == "":
                add(f"pullback {name} stats", PULLBACK, part, STATS=True, **flags)
        add(f"schedule_free {name}", SCHEDULE_FREE, part, found_inf_ptr=None)
        for label, (lag, diff, second, lion, adam) in _MADA_FLAGS.items():
            flags = {"LAG": lag, "DIFF": diff, "SECOND": second, "LION": lion, "ADAM": adam}
            absent = {} if lag else {"factors_ptr": None, "rows_ptr": None, "found_inf_ptr": None}
            plain = {"AVERAGE": False, "PULL": False, "ROLES_STAY": False}
            add(f"mada {name}{label}", MADA, part, **flags, **absent, **plain)
            if label == "":
                add(f"mada {name} pulled capturable", MADA, part, **flags, AVERAGE=True, PULL=True, ROLES_STAY=True)
    return found


def variants() -> dict[str, Variant]:
    """Kernels that represent those that a user can hit, the largest among them."""
    found = _sweeps()
    for on_device in (False, True):
        where = " on device" if on_device else ""
        absent = {} if on_device else {"lr_ptr": None, "grad_scale_ptr": None, "found_inf_ptr": None}
        found[f"pace scalars{where}"] = Variant(scalars._pace_scalars_kernel, {"ON_DEVICE": on_device, **absent})
        flags = {"ON_DEVICE": on_device, **absent, **({} if on_device else {"schedule_ptr": None})}
        found[f"schedule_free scalars{where}"] = Variant(schedule_free_kernel._schedule_free_scalars_kernel, flags)
        flags = {"ON_DEVICE": on_device, **{k: v for k, v in absent.items() if k != "grad_scale_ptr"}}
        found[f"pullback scalars{where}"] = Variant(scalars._pullback_scalars_kernel, flags)
        flags = {"ON_DEVICE": on_device, "LAG": True, "GRADS_KEPT": True, **absent}
        found[f"mada scalars{where}"] = Variant(scalars._mada_scalars_kernel, flags)
    for name, kernel, row, result in (
        ("stats", sums._sum_stats_kernel, sums.STATS_WIDTH.value, 14),
        ("hypergradients", sums._sum_hypergradients_kernel, sums.HYPER_WIDTH.value, 7),
    ):
        found[f"{name} rows"] = Variant(kernel, {"OUT_WIDTH": row}, warps=4)
        found[name] = Variant(kernel, {"OUT_WIDTH": result}, warps=4)
    found["learn"] = Variant(learn_kernel._mada_learn_kernel, {})
    return found


def signature(kernel: Any, constants: dict[str, Any]) -> dict[str, str]:
    """The types of a kernel's arguments, as its launches have them."""
    types = {}
    for name, parameter in inspect.signature(kernel.fn).parameters.items():
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            types[name] = _POINTERS[name]
        else:
            types[name] = "fp64" if "float64" in str(parameter.annotation) else "i32"
    return types


def compiled(kernel: Any, constants: dict[str, Any], target: GPUTarget, options: dict[str, Any]) -> Any:
    """A kernel as a launch with these constants compiles it."""
    types = signature(kernel, constants)
    # What a launch finds out by itself: torch allocates tensors at multiples of 16 bytes.
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t.startswith("*")}
    source = ASTSource(kernel, types, constants, aligned)
    return triton.compile(source, target=target, options=compile_options(**options))


def compile_kernels(target: GPUTarget, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Compiles kernels, all of :func:`variants` by default: name → Triton's compiled kernel, which has ``asm`` (a dict:
    ptx and cubin, or amdgcn and hsaco) and ``metadata``."""
    known = variants()
    chosen = {name: known[name] for name in (known if names is None else names)}
    return {name: compiled(v.kernel, v.constants, target, v.options(target)) for name, v in chosen.items()}
