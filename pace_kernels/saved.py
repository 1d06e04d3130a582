"""The values of a saved state: what they may be, and copies of them as states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .checks import Group
from .conversions import as_coded, dtype_beside
from .formats import (
    AVERAGES,
    CODED,
    EMA_DTYPES,
    HASH,
    PARTS,
    REMAINDER,
    asked,
    dtype_of,
    formats_of,
    may_be_narrow,
    whole_name,
    why_float32,
)
from .memory import is_whole
from .sharding import local
from .states import FLOATING, as_state, step_dtype
from .torch_rules.common import has_values


def with_short_count(state: Any, name: str) -> Any:
    """A state as it is saved: a count in torch's float32, as far as that counts."""
    count = state.get(name) if isinstance(state, dict) else None
    if not isinstance(count, Tensor) or count.dtype != torch.float64 or not has_values(count):
        return state
    return {**state, name: count.to(step_dtype(count.item()))}


def check_saved(state: str, name: str, value: Any, shape: tuple[int, ...], param: Tensor) -> None:
    """Raises ValueError where a value of a checkpoint is no tensor of this shape that can be a state of ``param``."""
    if not isinstance(value, Tensor) or value.shape != shape:
        came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{state}: {name} must be a tensor of shape {shape}, got {came}")
    complex_too = param.is_complex()
    if name in CODED or name == HASH:
        if value.dtype not in saved_dtypes(name) or value.layout is not torch.strided:
            kinds = " or ".join(map(str, saved_dtypes(name)))
            raise ValueError(f"{state}: {name} must be dense, of {kinds}, got {value.dtype}, {value.layout}")
    elif not (value.is_complex() if complex_too else value.dtype in FLOATING) or value.layout is not torch.strided:
        kind = value.dtype if value.layout is torch.strided else value.layout
        allowed = "a complex dtype" if complex_too else ", ".join(map(str, FLOATING))
        raise ValueError(f"{state}: {name} must be dense, of {allowed}, got {kind}")
    if not is_whole(local(value)):
        raise ValueError(f"{state}: {name} has more elements than memory: was its storage resized?")
    if value.is_meta and not param.is_meta:
        raise ValueError(f"{state}: {name} is on the meta device, where there are no values")


def saved_dtypes(name: str) -> tuple[torch.dtype, ...]:
    """Those that a part of this name may have in a checkpoint."""
    if name.endswith("_codes") and whole_name(name) in AVERAGES:
        return tuple(EMA_DTYPES.values())
    if name == REMAINDER:
        return torch.int16, torch.int8
    if name == HASH:
        return (torch.int64,)
    return (torch.int8,) if name.endswith("_remainder") else (torch.uint8,)


def check_parts(state: Mapping[str, Any], name: str, param: Tensor) -> None:
    """Raises ValueError where a saved state lacks a part, or has parts that this parameter can't."""
    for whole, (first, *_) in PARTS.items():
        there = {key for key in state if whole_name(key) == whole}
        if there <= {whole}:
            continue
        apart = whole in AVERAGES and getattr(state.get(first), "dtype", None) == torch.bfloat16
        needed = {first, f"{whole}_remainder" if apart else f"{whole}_scales"}
        if there != needed:
            raise ValueError(
                f"{name} has {', '.join(sorted(there))}: {whole} is in codes with {', '.join(sorted(needed))}"
            )
        if not apart and (why := why_float32(param)) is not None:
            raise ValueError(
                f"{name} has {whole} in codes, but this parameter can't have codes: {why}. Save float_state_dict()"
            )
    was = dtype_beside(state)
    if was is not None and was is not param.dtype:
        whose, weights = ("codes are", "state_dict()")
        if REMAINDER in state:
            whose, weights = "remainder is", "master_state_dict(model)"
        raise ValueError(
            f"{name} was saved from a parameter of {was}, and this one is {param.dtype}: its {whose} of that dtype. "
            f"Load into the model the {weights} of the old one, and here the old optimizer's float_state_dict(); if "
            f"there is only this checkpoint, load it into a model of {was} first, and save both from there"
        )


def copied(name: str, value: Tensor, param: Tensor, group: Group) -> Tensor:
    """A copy of a saved value as a state of ``param``. What lies in codes stays so: it is converted when it is used
    first."""
    if name == HASH:
        return value.detach().cpu().clone()
    if name in CODED:
        return as_coded(name, param, value)
    narrow = may_be_narrow(name) and value.dtype == torch.bfloat16
    narrow = narrow and dtype_of(name, formats_of(asked(group), param), param) == torch.bfloat16
    return as_state(param, value, value.dtype if name == "live" or narrow else None)
