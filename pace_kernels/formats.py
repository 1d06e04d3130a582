"""In which formats weights and states lie: what a group asks for, which parameters can have it, and the way from each
format to floats and back. The formats themselves: csrc/codes.h, torch_rules/codes.py."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .checks import Group, check_switch, require
from .memory import aligned
from .sharding import is_sharded, is_wrapper, local, local_as
from .states import PLAIN, Formats, empty_state, state_dtype
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
AVERAGE = ("ema", *PARTS["ema"])
_EMA_DTYPES = {24: torch.bfloat16, 16: torch.int16, 8: torch.int8}


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


def _suffix(shape: torch.Size) -> int:
    """The first dimension of the shortest suffix that has whole blocks, dimension 0 left out."""
    product = 1
    for d in range(len(shape) - 1, 0, -1):
        product *= shape[d]
        if product % BLOCK == 0:
            return d
    raise AssertionError("there is none: why_float32() tells")


def _why_cut(param: Any) -> str | None:
    """Why the shards of a DTensor do not hold whole blocks, and those of all its elements; None where they do."""
    first = _suffix(param.shape)
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


# ---- names and new states --------------------------------------------------------------------------------------------


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
        return _EMA_DTYPES[formats.ema]
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
    ema_bits = 32 if ema is None else next(bits for bits, dtype in _EMA_DTYPES.items() if dtype == ema.dtype)
    rest = state.get(REMAINDER)
    return Formats(bits, ema_bits, 0 if rest is None else 8 * rest.element_size() + 16)


def saved_dtypes(name: str) -> tuple[torch.dtype, ...]:
    """Those that a part of this name may have in a checkpoint."""
    if name == "ema_codes":
        return tuple(_EMA_DTYPES.values())
    if name == REMAINDER:
        return torch.int16, torch.int8
    if name == HASH:
        return (torch.int64,)
    return (torch.int8,) if name == "ema_remainder" else (torch.uint8,)


def check_parts(state: Mapping[str, Any], name: str, param: Tensor) -> None:
    """Raises ValueError where a saved state lacks a part, or has parts that this parameter can't."""
    for whole, (first, *_) in PARTS.items():
        there = {key for key in state if whole_name(key) == whole}
        if there <= {whole}:
            continue
        apart = whole == "ema" and getattr(state.get(first), "dtype", None) == torch.bfloat16
        needed = {first, "ema_remainder" if apart else f"{whole}_scales"}
        if there != needed:
            raise ValueError(
                f"{name} has {', '.join(sorted(there))}: {whole} is in codes with {', '.join(sorted(needed))}"
            )
        if not apart and (why := why_float32(param)) is not None:
            raise ValueError(
                f"{name} has {whole} in codes, and this parameter can't have such: {why}. Save float_state_dict()"
            )
    if REMAINDER in state and param.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"{name} has a remainder, which is of bfloat16 parameters, and this one is {param.dtype}")


def new_state(name: str, formats: Formats, param: Tensor, others: Mapping[str, Tensor]) -> Tensor:
    """A coded state at a parameter's first step, where moments are 0 and the average is the weight; ``others`` are
    those that it has."""
    state = _part_of(name, param, dtype_of(name, formats, param))
    if name in ("ema_codes", "ema_remainder") and formats.ema == 24:
        local(state).copy_(_ema_24(weight_in(param, others))[name == "ema_remainder"])
    else:
        local(state).zero_()
    return state


def _ema_24(e: Tensor) -> tuple[Tensor, Tensor]:
    return codes.split(codes.rounded(e, 24, codes.NEAREST_24), 24)


def scales_shape(param: Tensor) -> tuple[int, ...]:
    first = _suffix(param.shape)
    return (*param.shape[:first], param.shape[first:].numel() // BLOCK)


def _new_scales(param: Any) -> Tensor:
    """Zeros, sharded as ``param`` is."""
    shape, here = torch.Size(scales_shape(param)), local(param)
    if not is_sharded(param):
        return torch.zeros(shape, dtype=torch.uint8, device=here.device)
    from torch.distributed.tensor import DTensor

    last = len(shape) - 1
    part = torch.zeros((*here.shape[:last], here.shape[last:].numel() // BLOCK), dtype=torch.uint8, device=here.device)
    strides = tuple(shape[d + 1 :].numel() for d in range(len(shape)))
    return DTensor.from_local(  # type: ignore[no-any-return]
        part, param.device_mesh, param.placements, run_check=False, shape=shape, stride=strides
    )


def _part_of(name: str, param: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor for a part of a state, of any contents."""
    return _new_scales(param) if name.endswith("_scales") else empty_state(param, dtype)


def as_coded(name: str, param: Tensor, value: Tensor) -> Tensor:
    """A copy of a saved state, in its own format."""
    state = _part_of(name, param, value.dtype)
    local(state).copy_(local_as(state, value))
    return state


def beside(states: Mapping[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """What lies beside the states of a call, by the names of the operator's lists."""
    lists = {"exp_avg_scales": "exp_avg_scales", "exp_avg_sq_scales": "exp_avg_sq_scales", "ema_scales": "ema_scales"}
    lists |= {"ema_remainder": "ema_scales", REMAINDER: "remainders"}
    return {lists[name]: tensors for name, tensors in states.items() if name in lists}


def is_beside(state: Collection[str]) -> bool:
    """Whether there is an average that is known only beside its weights."""
    return "ema_scales" in state


def hash_of(param: Tensor) -> int:
    """Of the bits of all elements and their places. Of a plain tensor: the shards of others would have to be added up,
    and not all ranks may save."""
    flat = param.detach().contiguous().view(-1)
    bits = flat.view(torch.int32 if flat.element_size() == 4 else torch.int16)
    total = 0
    for begin in range(0, flat.numel(), 2**22):  # eight bytes of temporaries for each element of such a part
        total += int(codes.hashed(bits[begin : begin + 2**22], begin))
    return total % 2**63


def with_hash(state: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """A state as it is saved."""
    if HASH in state or is_sharded(param) or "live" in state:
        return state
    return {**state, HASH: torch.tensor(hash_of(param))}


def in_floats(state: Mapping[str, Tensor], param: Tensor) -> dict[str, Tensor]:
    """A state in float32, under the names of AdamW."""
    plain = {key: value for key, value in state.items() if key not in CODED and key not in (*PARTS, HASH)}
    weight = weight_in(state.get("live", param), state)
    there = [name for name in PARTS if any(whole_name(key) == name for key in state)]
    floats = {name: _filled(name, param, state_in(name, state, weight)) for name in there}
    return plain | floats


# ---- floats and back -------------------------------------------------------------------------------------------------


def weight_in(param: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """The local weight as a float: the parameter, with its remainder where there is one."""
    here = local(param).detach()
    if REMAINDER in state and here.dtype == torch.bfloat16:
        return codes.joined(aligned(here), local(state[REMAINDER]))
    return here.to(state_dtype(param))


def in_float(param: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """A copy of the parameter with its remainder, sharded as it is."""
    whole = empty_state(param, torch.float32)
    local(whole).copy_(weight_in(param, state))
    return whole


def state_in(name: str, state: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """A state as floats, on this rank. ``weight``: the local one, beside which averages may lie."""
    plain = state.get(name)
    if plain is not None:
        here = local(plain)
        return here.float() if here.dtype == torch.bfloat16 else here
    stored = local(state[f"{name}_codes"])
    flat = stored.reshape(-1)
    if name in MOMENTS:
        return MOMENTS[name].load(flat, local(state[f"{name}_scales"]).reshape(-1)).view(stored.shape)
    if stored.dtype == torch.bfloat16:
        return codes.joined(stored, local(state["ema_remainder"]))
    scales = local(state["ema_scales"]).reshape(-1)
    place = codes.E_CODES[8 * stored.element_size()].load(flat, scales, weight.reshape(-1))
    return place.value().view(stored.shape)


def average_in(state: Mapping[str, Tensor], weight: Tensor) -> Tensor | None:
    """The average as floats, where it lies beside its weight; None where it does not."""
    return state_in("ema", state, weight) if "ema_scales" in state else None


def encode_again(param: Tensor, state: Mapping[str, Tensor], before: Tensor | None, average: Tensor | None) -> None:
    """After others wrote a parameter: elements that differ from ``before``, or without that all, have no remainder, and
    ``average``, if that lay beside it, lies beside what it holds now."""
    if before is not None and torch.equal(before, local(param)):
        return
    if REMAINDER in state:
        rest = local(state[REMAINDER])
        rest.zero_() if before is None else rest.masked_fill_(before != local(param), 0)
    if average is None:
        return
    formats = formats_in(state)
    for name, value in zip(
        ("ema_codes", "ema_scales"), encoded("ema", average, weight_in(param, state), formats), strict=True
    ):
        here = local(state[name])
        here.copy_(value.view(here.shape))


def converted(state: Mapping[str, Tensor], param: Tensor, formats: Formats) -> dict[str, Tensor]:
    """The states of a parameter in other formats: floats are rounded to the nearest, which each time gives the same."""
    weight = weight_in(param, state)
    there = {name: state_in(name, state, weight) for name in {whole_name(key) for key in state} & (PARTS.keys())}
    new: dict[str, Tensor] = {}
    if formats.weight:
        new[REMAINDER] = _remainder(state.get(REMAINDER), param, formats)
    weight, plain = weight_in(param, new), formats._replace(weight=0)
    for name, value in there.items():
        for part, tensor in zip(names_of(plain, [name]), encoded(name, value, weight, formats), strict=True):
            new[part] = _filled(part, param, tensor)
    return new


def _filled(name: str, param: Tensor, value: Tensor) -> Tensor:
    """A part of a state whose elements on this rank are those of ``value``."""
    state = _part_of(name, param, value.dtype)
    local(state).copy_(value.view(local(state).shape))
    return state


def _remainder(rest: Tensor | None, param: Tensor, formats: Formats) -> Tensor:
    dtype = dtype_of(REMAINDER, formats, param)
    if rest is None:
        return _filled(REMAINDER, param, torch.zeros_like(local(param), dtype=dtype))
    here = local(rest)
    if here.dtype == dtype:
        return rest
    if dtype == torch.int16:
        return _filled(REMAINDER, param, here.to(torch.int16) * 256)
    return _filled(REMAINDER, param, ((here.to(torch.int32) + 128) >> 8).clamp(-128, 127).to(torch.int8))


def encoded(name: str, value: Tensor, weight: Tensor, formats: Formats) -> tuple[Tensor, ...]:
    """A state of floats in its format, rounded to the nearest: the tensors of names_of()."""
    if name in MOMENTS:
        if formats.state == 32:
            return (value,)
        if formats.state == 16:
            return (codes.split(codes.rounded(value, 16, codes.NEAREST_16), 32)[0],)
        return MOMENTS[name].store(value.reshape(-1), None)
    if formats.ema == 32:
        return (value,)
    if formats.ema == 24:
        return _ema_24(value)
    place = codes.Place(value.reshape(-1), torch.zeros_like(value.reshape(-1)), 0.0)
    return codes.E_CODES[formats.ema].store(_within(place, weight.reshape(-1)), weight.reshape(-1), None)


def _within(place: codes.Place, weight: Tensor) -> codes.Place:
    """Averages that start anew at their weight where they are further from it than 2^6 times the median magnitude of
    their block: one such outlier, of weights that were edited or loaded, would take all places of its neighbours."""
    e, x = place.grid.view(-1, BLOCK), weight.view(-1, BLOCK)
    usual = torch.maximum(e.abs().nanmedian(1, keepdim=True).values, x.abs().nanmedian(1, keepdim=True).values)
    far = ((e - x).abs() > 64 * usual) & (usual > 0)
    return place._replace(grid=torch.where(far.reshape(-1), weight, place.grid))
