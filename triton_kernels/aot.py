"""Ahead-of-time compilation of the kernels, for a target that need not be present: to inspect their code in tests, and
to fill Triton's cache before training starts.

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

from . import learn_kernel, sums
from .coded import lies
from .launch import Rule, Target, compile_options
from .rules import CODED, RULES
from .scalars import _scalars_kernel
from .sweep import _sweep_kernel

# Pointers are to float64, but for these.
_POINTERS = {"table_ptr": "*i64", "blocks_ptr": "*i32"}
_POINTERS |= dict.fromkeys(("scalars_ptr", "lr_ptr", "grad_scale_ptr", "clip_coef_ptr", "found_inf_ptr"), "*fp32")

_SHORT = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# By rule: names of sets of its flags that are compiled.
_FLAGS = {
    "pace": {
        "": "moment pull average",
        " stats": "moment pull average stats",
        " without pullback": "moment average",
        " without pullback stats": "moment average stats",
        " AdamW": "moment",
        " without first moment": "pull average",
    },
    "pullback": {
        "": "before moment pull average",
        " stats": "before moment pull average stats",
        " from the step": "moment pull average",
        " constant": "before pull average",
        " constant from the step": "pull average",
        " average": "average",
    },
    "mada": {
        "": "lag diff second lion adam",
        " pulled capturable": "lag diff second lion adam average pull stay",
        " hyperadam": "lag adam",
        " fixed": "diff second lion adam",
        " AdamW": "adam",
        " Lion": "lion",
    },
}
_FORMATS = (  # of weights and gradients, and whether aligned to 16 bytes
    (torch.float32, torch.float32, True),
    (torch.float32, torch.float32, False),
    (torch.bfloat16, torch.bfloat16, True),
    (torch.bfloat16, torch.bfloat16, False),
    (torch.bfloat16, torch.float32, True),
    (torch.float16, torch.float16, True),
)
# Of coded rules, by their names: how each operand lies, in their order (coded.py says what the numbers are; "-": not in
# play), and flags.
_CODED = {
    "pace_coded": {
        "32 8 8": ("32 bfloat16 8 8 8", "moment pull average"),
        "32 8 8 unaligned": ("32 bfloat16 8 8 8", "moment pull average"),
        "24 8 16": ("24 float32 8 8 16", "moment pull average"),
        "float32 8 8": ("float32 float32 8 8 8", "moment pull average"),
        "dithered 16 24": ("dithered bfloat16 16 16 24", "moment pull average"),
        "32 32 32": ("32 bfloat16 32 32 32", "moment pull average"),
    },
    "mada_coded": {
        "32 8": ("32 bfloat16 8 8 8 16 8 16 16 -", "lag diff second lion adam"),
        "32 8 unaligned": ("32 bfloat16 8 8 8 16 8 16 16 -", "lag diff second lion adam"),
        "24 8 8 pulled capturable": (
            "24 bfloat16 8 8 8 16 8 16 16 8", "lag diff second lion adam average pull stay"
        ),
        "dithered 16 24": ("dithered bfloat16 16 16 16 16 16 16 16 24", "lag diff second lion adam average pull"),
        "float32 8 hyperadam": ("float32 float32 8 8 - - - 32 - -", "lag adam"),
        "32 8 AMSGrad": ("32 bfloat16 8 8 - 16 - - - -", "second adam nearest"),
        "32 8 AdamW": ("32 bfloat16 8 8 - - - - - -", "adam"),
        "dithered 8 Lion": ("dithered bfloat16 - - - - 8 - - -", "lion"),
    },
    "pullback_coded": {
        "bfloat16 8": ("bfloat16 bfloat16 bfloat16 8", "before from_before moment pull average"),
        "float32 8 unaligned": ("float32 float32 float32 8", "before from_before moment pull average"),
        "float32 16 from the step": ("float32 float32 float32 16", "before moment pull average"),
        "float32 8 average": ("float32 float32 - 8", "before average"),
        "bfloat16 24": ("bfloat16 - - 24", "average"),
    },
    "schedule_free_coded": {
        "32 8 8": ("32 bfloat16 8 8", ""),
        "32 8 8 unaligned": ("32 bfloat16 8 8", ""),
        "24 8 16": ("24 float32 8 16", ""),
        "dithered 16 24": ("dithered bfloat16 16 24", ""),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A kernel, its compile-time constants, and its options on a backend."""

    kernel: Any
    constants: dict[str, Any]
    warps: int = 1
    rule: Rule | None = None

    def options(self, target: GPUTarget) -> dict[str, Any]:
        if self.rule is None:
            return {"num_warps": self.warps}
        return self.rule.compiled_with(Target(target.backend, target.warp_size))


def _sweep(rule: Rule, flags: Any, weight: torch.dtype, gradient: torch.dtype, aligned: bool) -> Variant:
    lies = {"weight": weight, "copy": weight, "gradient": gradient, "moment": gradient, "state": torch.float32}
    used = zip(rule.definition.operands, rule.in_play(flags), strict=True)
    formats = tuple(lies[operand.role] if any(uses) else None for operand, uses in used)
    absent = {} if rule.sums(flags) else dict.fromkeys(("factors_ptr", "rows_ptr", "found_inf_ptr"))
    return Variant(_sweep_kernel, rule.constants(formats, aligned, flags) | absent, rule=rule)


def _coded(rule: Rule) -> dict[str, Variant]:
    found = {}
    for name, (words, on) in _CODED[rule.name].items():
        pairs = [lies(o.codec, word) for o, word in zip(rule.definition.operands, words.split(), strict=True)]
        chosen = {*on.split(), *(["stochastic"] if "dithered" in words else [])}
        labels = ("", " stats") if "stats" in rule.definition.flags else ("",)
        for label in labels:
            kind = rule.module.Flags
            flags = kind(
                **{flag: flag in {*chosen, label.strip()} for flag in set(kind._fields) - set(kind._field_defaults)}
            )
            constants = rule.constants(sum(zip(*pairs, strict=True), ()), "unaligned" not in name, flags)
            absent = {} if rule.sums(flags) else dict.fromkeys(("factors_ptr", "rows_ptr", "found_inf_ptr"))
            found[f"{rule.name} {name}{label}"] = Variant(_sweep_kernel, constants | absent, rule=rule)
    return found


def _scalars(rule: Rule) -> dict[str, Variant]:
    found = {}
    lags = rule.summed is not None and rule.summed.flag == "lag"
    for on_device in (False, True):
        constants = rule.scalar_constants(bool(rule.definition.rows), on_device)
        absent = ["factors_ptr"] * (not lags) + ["numbers_ptr"] * (rule.numbers is None)
        absent += ["lr_ptr", "grad_scale_ptr", "found_inf_ptr"] * (not on_device)
        where = " on device" if on_device else ""
        found[f"{rule.name} scalars{where}"] = Variant(_scalars_kernel, constants | dict.fromkeys(absent))
    return found


def variants() -> dict[str, Variant]:
    """Kernels that represent those that a user can reach, including the largest."""
    found: dict[str, Variant] = {}
    for rule in RULES.values():
        kind = rule.module.Flags
        for weight, gradient, aligned in _FORMATS:
            name = _SHORT[weight] if weight == gradient else f"{_SHORT[weight]}/{_SHORT[gradient]}"
            for label, on in _FLAGS.get(rule.name, {"": ""}).items():
                flags = kind(*(flag in on.split() for flag in kind._fields))
                full = f"{rule.name} {name}{'' if aligned else ' unaligned'}{label}"
                found[full] = _sweep(rule, flags, weight, gradient, aligned)
        found |= _scalars(rule)
        if rule.summed is not None:
            summed = rule.summed
            result = next(extra.numbers for extra in rule.definition.extras if extra.name == summed.extra)
            constants = {"COLUMNS": summed.columns, "MINIMA": summed.minima, "MAXIMA": summed.maxima}
            constants |= {"WIDTH": summed.width}
            for label, width in (("", result), (" rows", summed.width)):
                constants = constants | {"OUT_WIDTH": width}
                found[summed.extra + label] = Variant(sums._add_up_kernel, constants, warps=4)
    for rule in CODED.values():
        found |= _coded(rule) | _scalars(rule)
    found["learn"] = Variant(learn_kernel._mada_learn_kernel, {})
    return found


def signature(kernel: Any, constants: dict[str, Any]) -> dict[str, str]:
    """The types of a kernel's arguments, as its launches have them."""
    types = {}
    for name, parameter in inspect.signature(kernel.fn).parameters.items():
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            types[name] = _POINTERS.get(name, "*fp64")
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
