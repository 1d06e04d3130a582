"""Checks of an operator's arguments. All of them run before anything is written; each says which argument, what came
and what is allowed, in the words of ``csrc/checks.h``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..definitions.kit import Definition

FORMATS = {torch.float32, torch.bfloat16, torch.float16}
FLOAT32_COUNTS = 2.0**24
_FLOAT32 = {torch.float32}
_NUMBERS = {torch.float32, torch.float64}


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
    name: str, tensors: list[Tensor], params: list[Tensor], device: torch.device, *, state: bool, written: bool
) -> None:
    """Dense tensors of their parameters' shapes, all in one place; a written one may not repeat elements.

    What is usual is settled for the whole list at once: thousands of tensors are checked at each step.
    """
    dtypes = {t.dtype for t in tensors}
    if (
        {t.device for t in tensors} <= {device}
        and {t.layout for t in tensors} <= {torch.strided}
        and dtypes <= (_FLOAT32 if state else FORMATS)
        and (tensors is params or [t.shape for t in tensors] == [p.shape for p in params])
        and (not written or all(map(Tensor.is_contiguous, tensors)))
    ):
        return
    for i, (t, param) in enumerate(zip(tensors, params, strict=True)):
        entry = f"{name}[{i}]"
        require(t.device == device, f"{entry} must be {place(device)}")
        require(t.layout is torch.strided, f"{entry} must be a dense (strided) tensor")
        if state:
            require(t.dtype == torch.float32, f"{entry} must be float32")
        require(t.dtype in FORMATS, f"{entry} must be float32, bfloat16 or float16 for the Triton kernel")
        shapes = tuple(t.shape), tuple(param.shape)
        require(shapes[0] == shapes[1], f"{entry} has shape {shapes[0]}, its parameter has {shapes[1]}")
        if written:
            for d, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
                require(size <= 1 or stride != 0, f"{entry} overlaps itself: dimension {d} has stride 0")


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
        if allowed is not None and value is not None:
            must = f"must lie {allowed.text}" if allowed.text.startswith("in ") else f"must be {allowed.text}"
            require(allowed.allows(value), f"{option.name} {must}, got {value}")


def check_options(o: dict[str, Any]) -> None:
    for name in ("lr", "weight_decay", "lambda_pullback", "ema_kappa", "ema_rho", "ema_gamma"):
        value = o[name]
        if value is not None:
            require(math.isfinite(value) and value >= 0.0, f"{name} must be finite and >= 0, got {value}")
    for name in ("beta1", "beta2"):
        require(0.0 <= o[name] < 1.0, f"{name} must lie in [0, 1), got {o[name]}")
    require(math.isfinite(o["eps"]) and o["eps"] > 0.0, f"eps must be finite and > 0, got {o['eps']}")
    require(0.0 <= o["beta_ema"] <= 1.0, f"beta_ema must lie in [0, 1], got {o['beta_ema']}")
    freq = o["ema_update_freq"]
    require(freq >= 1, f"ema_update_freq must be >= 1, got {freq}")
