"""In which formats weights and states lie: what a group asks for, which parameters can have it, and the names of states
then. The formats themselves: csrc/codes.h, torch_rules/codes.py; the way from each to each: conversions.py."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .checks import Group, check_switch, require
from .options import beyond
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
MOMENTS: dict[str, codes.MCode | codes.VCode] = {
    "exp_avg": codes.M_CODE, "exp_avg_sq": codes.V_CODE, "exp_avg_diff": codes.M_CODE, "exp_avg_lion": codes.M_CODE,
}  # fmt: skip
# The average of the weights, or what it is computed from together with them (schedule-free's z).
AVERAGES = ("ema", "z")
# States that lie in bfloat16 with state_bits of 16 and 8: a mean or maximum of second moments, and gradients that are
# kept, these of bfloat16 parameters alone. A maximum is rounded to nearest, since one of dithered values creeps up.
SECONDS = ("mean_exp_avg_sq", "max_exp_avg_sq")
GRADIENTS = ("last_grad", "older_grad")
# Each state that may be coded, with the names that it may have then.
PARTS = {
    **{name: (f"{name}_codes", f"{name}_scales") for name in MOMENTS},
    **{name: (f"{name}_codes", f"{name}_scales", f"{name}_remainder") for name in AVERAGES},
}
CODED = (*(part for parts in PARTS.values() for part in parts), REMAINDER)
_WHOLE = {part: name for name, parts in PARTS.items() for part in parts}
SCALES_BESIDE = tuple(f"{name}_scales" for name in AVERAGES)  # of averages that are known only beside their weights
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


def warn_if_idle(groups: Iterable[Group]) -> None:
    """Warns where options for bfloat16 parameters are given, and there are none."""
    groups = list(groups)
    for name in ("master_weight_bits", "stochastic_rounding"):
        asking = [group for group in groups if group.get(name, OPTIONS[name]) != OPTIONS[name]]
        if asking and not any(param.dtype == torch.bfloat16 for group in asking for param in group["params"]):
            warnings.warn(
                f"{name} is for bfloat16 parameters, and there are none: convert the model first, as by "
                "model.bfloat16()",
                stacklevel=beyond(),
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
    if is_lazy(param):
        return "it has no shape yet"
    if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it is {str(param.dtype).removeprefix('torch.')}, for which there are no codes"
    if is_wrapper(local(param)):
        return "it is a tensor subclass that wraps others"
    if param.dim() < 2:
        return f"it has {param.dim()} dimension{'' if param.dim() == 1 else 's'}, fewer than 2"
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
        elif name in AVERAGES and formats.ema < 32:
            codes_of, scales, rest = PARTS[name]
            found += (codes_of, rest if formats.ema == 24 else scales)
        else:
            found.append(name)
    return (*found, REMAINDER) if formats.weight else tuple(found)


def dtype_of(name: str, formats: Formats, param: Tensor) -> torch.dtype:
    """The dtype of a parameter's state of this name."""
    if name == REMAINDER:
        return torch.int16 if formats.weight == 32 else torch.int8
    if name in CODED:
        if name.endswith("_remainder"):
            return torch.int8
        return EMA_DTYPES[formats.ema] if whole_name(name) in AVERAGES and name.endswith("_codes") else torch.uint8
    narrow = (name in MOMENTS and formats.state == 16) or (name in SECONDS and formats.state < 32)
    narrow = narrow or (name in GRADIENTS and formats.state < 32 and param.dtype == torch.bfloat16)
    return torch.bfloat16 if narrow else state_dtype(param)


def may_be_narrow(name: str) -> bool:
    """Whether a state of this name may lie in bfloat16."""
    return name in MOMENTS or name in SECONDS or name in GRADIENTS


def parts_of(name: str) -> tuple[str, ...]:
    """The names under which a state may be there."""
    return (name, *PARTS.get(name, ()))


def every_name(*states: str) -> tuple[str, ...]:
    """All names under which these states may be there, and a remainder beside the weight."""
    parts = (part for name in states for part in PARTS.get(name, ()))
    return (*states, *parts, REMAINDER)


def has(state: Collection[str], name: str) -> bool:
    """Whether a state is there, in whatever format."""
    return name in state or f"{name}_codes" in state


def has_average(state: Collection[str]) -> bool:
    return has(state, "ema")


def formats_in(state: Mapping[str, Tensor]) -> Formats:
    """The formats of the states that are there."""
    bits = 8 if any(f"{name}_codes" in state for name in MOMENTS) else 32
    if any(name in state and state[name].dtype == torch.bfloat16 for name in MOMENTS):
        bits = 16
    ema = next((state[f"{name}_codes"] for name in AVERAGES if f"{name}_codes" in state), None)
    ema_bits = 32 if ema is None else next(bits for bits, dtype in EMA_DTYPES.items() if dtype == ema.dtype)
    rest = state.get(REMAINDER)
    return Formats(bits, ema_bits, 0 if rest is None else 8 * rest.element_size() + 16)


def beside(states: Mapping[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """What lies beside the states of a call, by the names of the operator's lists."""
    lists = {parts[1]: parts[1] for parts in PARTS.values()} | {REMAINDER: "remainders"}
    lists |= {f"{name}_remainder": f"{name}_scales" for name in AVERAGES}
    return {lists[name]: tensors for name, tensors in states.items() if name in lists}


def taken(states: Mapping[str, list[Tensor]], *names: str) -> list[Tensor]:
    """The list of a state for a call, plain or in codes: of the first of these names that is there; else none."""
    found = (states[part] for name in names for part in (name, f"{name}_codes") if part in states)
    return next(found, [])


def is_beside(state: Collection[str]) -> bool:
    """Whether there is an average that is known only beside its weights."""
    return any(name in state for name in SCALES_BESIDE)
