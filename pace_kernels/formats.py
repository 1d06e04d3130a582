"""In which formats weights and states lie: what a group asks for, which parameters can have it, and the names of states
then. The formats themselves: csrc/codes.h, torch_rules/codes.py; the way from each to each: conversions.py."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .checks import Group, check_switch, require
from .sharding import is_sharded, is_wrapper, local
from .states import PLAIN, Formats, state_dtype
from .torch_rules import codes

BLOCK = codes.BLOCK
LEAST = 4096  # elements of a parameter whose states are compressed
# Options and their defaults. They stand in groups only where they are others: flattened distributed checkpoints must
# have all that groups do, and those of 0.1.0 do not have them.
OPTIONS: dict[str, Any] = {
    "state_bits": 32, "ema_bits": None, "master_weight_bits": None, "stochastic_rounding": False,
}  # fmt: skip

REMAINDER = "remainder"
HASH = "weights_hash"  # in checkpoints, of the weights beside which an average lies; it stays until that is used first
AVERAGES_BESIDE = "ema_bits 8 or 16, which is known only beside its weights"
MOMENTS: dict[str, codes.MCode | codes.VCode] = {"exp_avg": codes.M_CODE, "exp_avg_sq": codes.V_CODE}
# Each state that may be coded, with the names that it may have then.
PARTS = {
    **{name: (f"{name}_codes", f"{name}_scales") for name in MOMENTS},
    "ema": ("ema_codes", "ema_scales", "ema_remainder"),
}
CODED = (*(part for parts in PARTS.values() for part in parts), REMAINDER)
_WHOLE = {part: name for name, parts in PARTS.items() for part in parts}
AVERAGE = ("ema", *PARTS["ema"], HASH)
EMA_DTYPES = {24: torch.bfloat16, 16: torch.int16, 8: torch.int8}


def check_format_options(group: Group) -> None:
    """Raises ValueError where an option of formats is not allowed."""
    given = OPTIONS | {name: group[name] for name in OPTIONS if name in group}
    allowed: dict[str, tuple[Any, ...]] = {
        "state_bits": (32, 16, 8), "ema_bits": (None, 32, 24, 16, 8), "master_weight_bits": (None, 24, 32),
    }  # fmt: skip
    for name, values in allowed.items():
        value = given[name]
        known = any(value is other or (type(value) is int and value == other) for other in values)
        require(known, name, f"one of {', '.join(map(str, values))}", value)
    check_switch("stochastic_rounding", given["stochastic_rounding"])
    if given["stochastic_rounding"] and given["master_weight_bits"] is not None:
        raise ValueError(
            "stochastic_rounding is for bfloat16 parameters without master weights, and master_weight_bits is "
            f"{given['master_weight_bits']}"
        )


def asked(group: Group) -> Formats:
    """What the group's options ask for."""
    state, ema = group.get("state_bits", 32), group.get("ema_bits")
    master, stochastic = group.get("master_weight_bits"), group.get("stochastic_rounding", False)
    wanted = Formats(state, state if ema is None else ema, master or 0, stochastic)
    return PLAIN if wanted == PLAIN else wanted


def formats_of(wanted: Formats, param: Tensor) -> Formats:
    """What a parameter has of that. Its states are compressed or not by its global shape, so that sharding changes
    nothing."""
    if wanted is PLAIN:
        return PLAIN
    narrow = param.dtype == torch.bfloat16
    weight, stochastic = (wanted.weight, wanted.stochastic) if narrow else (0, False)
    if (wanted.state < 32 or wanted.ema < 32) and why_float32(param) is None:
        return Formats(wanted.state, wanted.ema, weight, stochastic)
    return Formats(32, 32, weight, stochastic) if weight or stochastic else PLAIN


def why_float32(param: Tensor) -> str | None:
    """Why the states of a parameter are not compressed; None where they can be."""
    if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it is {str(param.dtype).removeprefix('torch.')}"
    if is_wrapper(local(param)):
        return "it is a tensor subclass that wraps others"
    if param.dim() < 2:
        return f"it has {param.dim()} dimensions, fewer than 2"
    if param.numel() < LEAST:
        return f"it has {param.numel()} elements, fewer than {LEAST}"
    if param.shape[1:].numel() % BLOCK:
        return f"its rows have {param.shape[1:].numel()} elements, no multiple of {BLOCK}"
    if not local(param).is_contiguous():
        return "it is not contiguous"
    return _why_cut(param) if is_sharded(param) else None


def suffix(shape: torch.Size) -> int:
    """The first dimension of the shortest suffix that has whole blocks, dimension 0 left out."""
    product = 1
    for d in range(len(shape) - 1, 0, -1):
        product *= shape[d]
        if product % BLOCK == 0:
            return d
    raise AssertionError("there is none: why_float32() tells")


def _why_cut(param: Any) -> str | None:
    """Why the shards of a DTensor do not hold whole blocks, and those of all its elements; None where they do."""
    first = suffix(param.shape)
    rest = param.shape[first + 1 :].numel()
    for k, placement in enumerate(param.placements):
        if placement.is_replicate():
            continue
        size, d = param.device_mesh.size(k), getattr(placement, "dim", -1)
        if type(placement).__name__ != "Shard" or d > first:
            return f"its placement {placement} cuts blocks of {BLOCK}"
        if d == first and (param.shape[d] % size or param.shape[d] // size * rest % BLOCK):
            return f"its shards along dimension {d} are no multiples of {BLOCK}"
    return None


# ---- names -----------------------------------------------------------------------------------------------------------


def whole_name(name: str) -> str:
    """Of a part of a state, the state."""
    return _WHOLE.get(name, name)


def names_of(formats: Formats, states: Iterable[str]) -> tuple[str, ...]:
    """The names under which a parameter keeps these states."""
    if formats is PLAIN:
        return tuple(states)
    found: list[str] = []
    for name in states:
        if name in MOMENTS and formats.state == 8:
            found += PARTS[name]
        elif name == "ema" and formats.ema < 32:
            found += ("ema_codes", "ema_remainder" if formats.ema == 24 else "ema_scales")
        else:
            found.append(name)
    return (*found, REMAINDER) if formats.weight else tuple(found)


def dtype_of(name: str, formats: Formats, param: Tensor) -> torch.dtype:
    """The dtype of a parameter's state of this name."""
    if name == REMAINDER:
        return torch.int16 if formats.weight == 32 else torch.int8
    if name == "ema_remainder":
        return torch.int8
    if name == "ema_codes":
        return EMA_DTYPES[formats.ema]
    if name in CODED:
        return torch.uint8
    return torch.bfloat16 if name in MOMENTS and formats.state == 16 else state_dtype(param)


def has_average(state: Collection[str]) -> bool:
    return "ema" in state or "ema_codes" in state


def formats_in(state: Mapping[str, Tensor]) -> Formats:
    """The formats of the states that are there."""
    second = state.get("exp_avg_sq", state.get("exp_avg"))
    bits = 8 if any(f"{name}_codes" in state for name in MOMENTS) else 32
    if second is not None and second.dtype == torch.bfloat16:
        bits = 16
    ema = state.get("ema_codes")
    ema_bits = 32 if ema is None else next(bits for bits, dtype in EMA_DTYPES.items() if dtype == ema.dtype)
    rest = state.get(REMAINDER)
    return Formats(bits, ema_bits, 0 if rest is None else 8 * rest.element_size() + 16)


def beside(states: Mapping[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """What lies beside the states of a call, by the names of the operator's lists."""
    lists = {"exp_avg_scales": "exp_avg_scales", "exp_avg_sq_scales": "exp_avg_sq_scales", "ema_scales": "ema_scales"}
    lists |= {"ema_remainder": "ema_scales", REMAINDER: "remainders"}
    return {lists[name]: tensors for name, tensors in states.items() if name in lists}


def is_beside(state: Collection[str]) -> bool:
    """Whether there is an average that is known only beside its weights."""
    return "ema_scales" in state
