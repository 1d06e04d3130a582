"""Checks of an operator's arguments. All of them run before anything is written; each says which argument, what came
and what is allowed, in the words of ``csrc/checks.h``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..definitions.kit import STEPS, Definition

FORMATS = {torch.float32, torch.bfloat16, torch.float16}
FLOAT32_COUNTS = 2.0**24
_NUMBERS = {torch.float32, torch.float64}
_CPU = torch.device("cpu")

# The format of a list, or those of its tensors where they differ.
Formats = torch.dtype | tuple[torch.dtype, ...]


class Call:
    """The arguments of a step's operator by the names of its definition; lists of operands by their symbols."""

    def __init__(self, definition: Definition, values: tuple[Any, ...], named: dict[str, Any]) -> None:
        names = (*(entry.list for entry in definition.lists), STEPS, *definition.optional_tensors)
        if len(values) > len(names):
            raise TypeError(f"{definition.op} takes {len(names)} tensors and lists by position, got {len(values)}")
        given = dict(zip(names, values, strict=False)) | named
        self.definition = definition
        self.lists: dict[str, list[Tensor]] = {o.symbol: given[o.list] for o in definition.operands}
        self.params = self.lists[definition.operands[0].symbol]
        self.rows: list[Tensor] = given[definition.rows[0].list] if definition.rows else []
        self.steps: list[Tensor] = given[STEPS]
        self.tensors: dict[str, Tensor | None] = {name: given.get(name) for name in definition.optional_tensors}
        self.options: dict[str, Any] = {option.name: given[option.name] for option in definition.options}
        self.capturable: bool = given["capturable"]
        others = [self.tensors[extra.name] for extra in definition.extras]
        found = next((t for t in (*self.params[:1], *reversed(others)) if t is not None), None)
        self.device = _CPU if found is None else found.device

    def has(self, symbol: str) -> bool:
        return len(self.lists[symbol]) > 0

    @property
    def counts_on_device(self) -> bool:
        """With found_inf only the device knows whether a step counts. (On the CPU, in the interpreter, the device is
        where step counts always are.)"""
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
    """The list has one tensor for each parameter; or none at all, where the option that needs it is off."""
    if len(tensors) == len(params) or (if_empty is not None and not tensors):
        return
    raise RuntimeError(f"{name} has {len(tensors)} tensors, params has {len(params)}{if_empty or ''}")


def check_operands(
    name: str, tensors: list[Tensor], params: list[Tensor], device: torch.device, role: str, written: bool
) -> Formats:
    """Dense tensors of their parameters' shapes, all in one place, in formats of their role; a written one may not
    repeat elements. Returns the formats.

    What is usual is settled for the whole list at once: thousands of tensors are checked at each step.
    """
    dtypes = {t.dtype for t in tensors}
    usual = (
        {t.device for t in tensors} <= {device}
        and {t.layout for t in tensors} <= {torch.strided}
        and dtypes <= ({torch.float32} if role == "state" else FORMATS)
        and (tensors is params or [t.shape for t in tensors] == [p.shape for p in params])
        and (not written or all(map(Tensor.is_contiguous, tensors)))
    )
    for i, (t, param) in enumerate(zip(tensors, params, strict=True) if not usual else ()):
        entry = f"{name}[{i}]"
        require(t.device == device, f"{entry} must be {place(device)}")
        require(t.layout is torch.strided, f"{entry} must be a dense (strided) tensor")
        require(role != "state" or t.dtype == torch.float32, f"{entry} must be float32")
        require(t.dtype in FORMATS, f"{entry} must be float32, bfloat16 or float16 for the Triton kernel")
        shapes = tuple(t.shape), tuple(param.shape)
        require(shapes[0] == shapes[1], f"{entry} has shape {shapes[0]}, its parameter has {shapes[1]}")
        if written:
            for d, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
                require(size <= 1 or stride != 0, f"{entry} overlaps itself: dimension {d} has stride 0")
    if role == "copy":
        for i, (t, param) in enumerate(zip(tensors, params, strict=True)):
            require(t.dtype == param.dtype, f"{name}[{i}] must be of its parameter's dtype")
    return dtypes.pop() if len(dtypes) == 1 else tuple(t.dtype for t in tensors)


def check_steps(steps: list[Tensor], device: torch.device) -> None:
    usual = {t.dtype for t in steps} <= _NUMBERS and {t.device for t in steps} <= {device}
    if usual and all(t.numel() == 1 for t in steps):
        return
    for i, t in enumerate(steps):
        good = t.device == device and t.numel() == 1 and t.dtype in _NUMBERS
        require(good, f"steps[{i}] must be {place(device)}, float32 or float64, with one element")


def counts_taken(steps: list[Tensor]) -> list[float]:
    """The steps taken so far, where the counts are on the CPU, and can go on."""
    taken = [step.item() for step in steps]
    for i, (count, step) in enumerate(zip(taken, steps, strict=True)):
        good = count < FLOAT32_COUNTS or step.dtype == torch.float64
        require(good, f"steps[{i}] is float32, which counts to 2^24, and is there: make it float64")
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
