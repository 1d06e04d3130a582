"""Checks of an operator's arguments. All of them run before anything is written; each says which argument, what came
and what is allowed, in the words of ``csrc/checks.h``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..definitions import DEFINITIONS
from ..definitions.kit import STEPS, Definition, Operand
from .codes import CODE_BLOCK

FORMATS = {torch.float32, torch.bfloat16, torch.float16}
FLOAT32_COUNTS = 2.0**24
_NUMBERS = {torch.float32, torch.float64}
_CPU = torch.device("cpu")

# The format of a list, or those of its tensors where they differ.
Formats = torch.dtype | tuple[torch.dtype, ...]


# By operator: the names of its tensors and lists in their order, and the defaults of its options.
_ARGUMENTS = {
    op: (
        (*(entry.list for entry in d.lists), STEPS, *d.optional_tensors, *d.beside),
        {o.name: json.loads(o.default.lower()) for o in d.options if o.default is not None},
    )
    for op, d in DEFINITIONS.items()
}


class Call:
    """The arguments of a step's operator by the names of its definition; lists of operands by their symbols."""

    def __init__(self, definition: Definition, values: tuple[Any, ...], named: dict[str, Any]) -> None:
        names, defaults = _ARGUMENTS[definition.op]
        if len(values) > len(names):
            raise TypeError(f"{definition.op} takes {len(names)} tensors and lists by position, got {len(values)}")
        given = dict(zip(names, values, strict=False)) | named
        self.definition = definition
        self.lists: dict[str, list[Tensor]] = {o.symbol: given[o.list] for o in definition.operands}
        self.params = self.lists[definition.operands[0].symbol]
        self.rows: list[Tensor] = given[definition.rows[0].list] if definition.rows else []
        self.steps: list[Tensor] = given[STEPS]
        self.tensors: dict[str, Tensor | None] = {name: given.get(name) for name in definition.optional_tensors}
        self.beside: dict[str, list[Tensor]] = {
            o.symbol: given.get(o.beside) or [] for o in definition.operands if o.beside is not None
        }
        given = defaults | given
        self.options: dict[str, Any] = {option.name: given[option.name] for option in definition.options}
        self.capturable: bool = given["capturable"]
        others = [self.tensors[extra.name] for extra in definition.extras]
        found = next((t for t in (*self.params[:1], *reversed(others)) if t is not None), None)
        self.device = _CPU if found is None else found.device

    @cached_property
    def shapes(self) -> list[torch.Size]:
        return [p.shape for p in self.params]

    @cached_property
    def contiguous(self) -> bool:
        return all(map(Tensor.is_contiguous, self.params))

    def has(self, symbol: str) -> bool:
        return len(self.lists[symbol]) > 0

    @property
    def coded(self) -> bool:
        """Whether an operand lies in a format of codes.py, alone or with something beside it."""
        alone = [o.symbol for o in self.definition.operands if o.codec in ("moment", "square", "second", "gradient")]
        if self.options.get("stochastic_rounding", False):
            alone.append(self.definition.operands[0].symbol)
        return any(self.beside.values()) or any(
            torch.bfloat16 in {t.dtype for t in self.lists[symbol]} for symbol in alone
        )

    @property
    def counts_on_device(self) -> bool:
        """With found_inf only the device knows whether a step counts. (On the CPU, in the interpreter, step counts are
        always on the device.)"""
        return self.capturable or self.tensors["found_inf"] is not None


@dataclass(frozen=True)
class Play:
    """What a call puts in play: the flags of its kernels, and the operands whose lists may be empty."""

    flags: Any
    may_be_empty: dict[str, bool]


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def place(device: torch.device) -> str:
    return "a CPU tensor" if device.type == "cpu" else f"a tensor on {device}"


def check_length(name: str, tensors: list[Tensor], params: list[Tensor], if_empty: str | None = None) -> None:
    """The list has one tensor for each parameter, or none at all if the option that needs it is off."""
    if len(tensors) == len(params) or (if_empty is not None and not tensors):
        return
    raise RuntimeError(f"{name} has {len(tensors)} tensors, params has {len(params)}{if_empty or ''}")


def check_operands(name: str, tensors: list[Tensor], call: Call, role: str, written: bool) -> tuple[Formats, bool]:
    """Requires dense tensors of their parameters' shapes, all on one device, in formats of their role; a written one
    may not repeat elements. Returns the formats, and whether all are contiguous.

    The usual case is checked for the whole list at once: each step checks thousands of tensors, and a look at one costs
    50 to 100 ns.
    """
    params, device = call.params, call.device
    dtypes = {t.dtype for t in tensors}
    strided = {t.layout for t in tensors} <= {torch.strided}
    contiguous = strided and (call.contiguous if tensors is params else all(map(Tensor.is_contiguous, tensors)))
    usual = (
        {t.device for t in tensors} <= {device}
        and strided
        and dtypes <= ({torch.float32} if role == "state" else FORMATS)
        and (tensors is params or [t.shape for t in tensors] == call.shapes)
        and (not written or contiguous)
    )
    for i, (t, param) in enumerate(zip(tensors, params, strict=True) if not usual else ()):
        entry = f"{name}[{i}]"
        require(role != "state" or t.dtype == torch.float32, f"{entry} must be float32")
        require(t.dtype in FORMATS, f"{entry} must be float32, bfloat16 or float16 for the Triton kernel")
        _check_place(entry, t, param, device, written)
    if role == "copy":
        for i, (t, param) in enumerate(zip(tensors, params, strict=True)):
            require(t.dtype == param.dtype, f"{name}[{i}] must be of its parameter's dtype")
    return _formats(tensors, dtypes), contiguous


def _formats(tensors: list[Tensor], dtypes: set[torch.dtype]) -> Formats:
    return next(iter(dtypes)) if len(dtypes) == 1 else tuple(t.dtype for t in tensors)


def _check_place(entry: str, t: Tensor, param: Tensor, device: torch.device, written: bool = True) -> None:
    """Requires a tensor on the right device, in its parameter's shape."""
    require(t.device == device, f"{entry} must be {place(device)}")
    require(t.layout is torch.strided, f"{entry} must be a dense (strided) tensor")
    shapes = tuple(t.shape), tuple(param.shape)
    require(shapes[0] == shapes[1], f"{entry} has shape {shapes[0]}, its parameter has {shapes[1]}")
    if written:
        for d, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
            require(size <= 1 or stride != 0, f"{entry} overlaps itself: dimension {d} has stride 0")


# What an operand may be in codes, by its codec: alone, and with what lies beside it of which dtypes.
_ALONE = {
    "weight": (torch.float32, torch.bfloat16, torch.float16), "moment": (torch.float32, torch.bfloat16),
    "square": (torch.float32, torch.bfloat16), "second": (torch.float32, torch.bfloat16),
    "gradient": (torch.float32, torch.bfloat16), "average": (torch.float32,), "iterate": (torch.float32,),
}  # fmt: skip
_PAIRED: dict[str, dict[torch.dtype, tuple[torch.dtype, ...]]] = {
    "weight": {torch.bfloat16: (torch.int16, torch.int8)},
    "moment": {torch.uint8: (torch.uint8,)},
    "square": {torch.uint8: (torch.uint8,)},
    "average": {torch.int8: (torch.uint8,), torch.int16: (torch.uint8,), torch.bfloat16: (torch.int8,)},
    "second": {},
    "gradient": {},
}
_PAIRED["iterate"] = _PAIRED["average"]


def _names(dtypes: Iterable[torch.dtype]) -> str:
    *first, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(first)} or {last}" if first else last


def check_coded(
    operand: Operand, tensors: list[Tensor], beside: list[Tensor], call: Call
) -> tuple[Formats, Formats | None, bool]:
    """The same for an operand that may be in codes, and what lies beside it, if anything does. Returns the formats of
    both too. Code blocks are 32 consecutive elements, so tensors that have such are contiguous."""
    assert operand.codec is not None
    params, device = call.params, call.device
    name, other, known = operand.list, operand.beside, _PAIRED[operand.codec]
    dtypes = {t.dtype for t in tensors}
    formats, others = _formats(tensors, dtypes), _formats(beside, {t.dtype for t in beside}) if beside else None
    every = (*(() if tensors is params else tensors), *beside)
    strided = {t.layout for t in (*tensors, *beside)} <= {torch.strided}
    contiguous = strided and call.contiguous and all(map(Tensor.is_contiguous, every))
    if beside:
        pairs = {(dtype, its) for dtype, allowed in known.items() for its in allowed}
        fits = {(t.dtype, its.dtype) for t, its in zip(tensors, beside, strict=True)} <= pairs
    else:
        fits = dtypes <= set(_ALONE[operand.codec])
    usual = (
        fits
        and {t.device for t in (*tensors, *beside)} <= {device}
        and contiguous
        and (tensors is params or [t.shape for t in tensors] == call.shapes)
        and (others == torch.uint8 or [t.shape for t in beside] == call.shapes[: len(beside)])
        and (others != torch.uint8 or [t.numel() * CODE_BLOCK.value for t in beside] == [p.numel() for p in params])
    )
    for i, (t, param) in enumerate(zip(tensors, params, strict=True) if not usual else ()):
        entry = f"{name}[{i}]"
        _check_place(entry, t, param, device)
        if not beside:
            without = " for the Triton kernel" if operand.codec == "weight" else f" without {other}" if other else ""
            require(t.dtype in _ALONE[operand.codec], f"{entry} must be {_names(_ALONE[operand.codec])}{without}")
            continue
        require(t.dtype in known, f"{entry} must be {_names(known)}, with {other}")
        its, allowed = beside[i], known[t.dtype]
        if allowed != (torch.uint8,):
            _check_place(f"{other}[{i}]", its, param, device)
            require(its.dtype in allowed, f"{other}[{i}] must be {_names(allowed)}")
            continue
        block = CODE_BLOCK.value
        require(its.device == device, f"{other}[{i}] must be {place(device)}")
        require(param.numel() % block == 0, f"params[{i}] must have a multiple of {block} elements, with {other}")
        require(
            param.is_contiguous() and t.is_contiguous(), f"{entry} and its parameter must be contiguous, with {other}"
        )
        good = its.dtype == torch.uint8 and its.is_contiguous() and its.numel() == param.numel() // block
        require(good, f"{other}[{i}] must be contiguous, uint8, with an element for {block} of its codes")
    one = not isinstance(others, tuple) or torch.uint8 not in others
    require(one, f"{other} must all be of one dtype where some are uint8")
    return formats, others, contiguous


def check_steps(steps: list[Tensor], device: torch.device) -> None:
    usual = {t.dtype for t in steps} <= _NUMBERS and {t.device for t in steps} <= {device}
    if usual and set(map(Tensor.numel, steps)) <= {1}:
        return
    for i, t in enumerate(steps):
        good = t.device == device and t.numel() == 1 and t.dtype in _NUMBERS
        require(good, f"steps[{i}] must be {place(device)}, float32 or float64, with one element")


def counts_taken(steps: list[Tensor]) -> list[float]:
    """The steps taken so far, if the counts are on the CPU and can go on."""
    taken = list(map(Tensor.item, steps))
    if all(map(FLOAT32_COUNTS.__gt__, taken)):
        return taken
    for i, (count, step) in enumerate(zip(taken, steps, strict=True)):
        good = count < FLOAT32_COUNTS or step.dtype == torch.float64
        require(good, f"steps[{i}] is float32 and has reached 2^24, where float32 stops counting: make it float64")
    return taken


def check_one(name: str, t: Tensor | None, device: torch.device) -> None:
    if t is not None:
        good = t.device == device and t.numel() == 1 and t.dtype == torch.float32
        require(good, f"{name} must be {place(device)}, float32, with one element")


def check_lr(t: Tensor | None, device: torch.device) -> None:
    if t is not None:
        good = t.device == device and t.numel() == 1 and t.dtype in _NUMBERS
        require(good, f"lr_tensor must be {place(device)}, float32 or float64, with one element")


def check_doubles(name: str, t: Tensor | None, count: int, device: torch.device) -> None:
    if t is not None:
        good = t.device == device and t.is_contiguous() and t.numel() == count and t.dtype == torch.float64
        require(good, f"{name} must be {place(device)}, contiguous, float64, with {count} elements")


def check_ranges(definition: Definition, o: dict[str, Any]) -> None:
    for option in definition.options:
        allowed, value = option.allowed, o[option.name]
        if allowed is not None and value is not None and not allowed.allows(value):
            must = f"must lie {allowed.text}" if allowed.text.startswith("in ") else f"must be {allowed.text}"
            raise RuntimeError(f"{option.name} {must}, got {value}")


def check_call(call: Call, play: Play) -> None:
    """Everything but the operands themselves."""
    definition, device, given = call.definition, call.device, call.tensors
    for operand in definition.operands[1:]:
        empty = operand.empty if play.may_be_empty.get(operand.symbol) else None
        check_length(operand.list, call.lists[operand.symbol], call.params, empty)
    check_length(STEPS, call.steps, call.params)
    for operand in definition.operands:
        if operand.beside is not None and call.beside[operand.symbol]:
            check_length(operand.beside, call.beside[operand.symbol], call.params)
    for row in definition.rows:
        for i, t in enumerate(call.rows):
            check_doubles(f"{row.list}[{i}]", t, row.numbers, device)
    for extra in definition.extras:
        check_doubles(extra.name, given[extra.name], extra.numbers, device)
    check_lr(given["lr_tensor"], device)
    for name in definition.scaling:
        check_one(name, given[name], device)
    require(
        call.capturable or given["found_inf"] is None or device == _CPU,
        "found_inf needs capturable: the step counts must be on the device, which alone knows whether a step counts",
    )
    check_steps(call.steps, device if call.counts_on_device else _CPU)
