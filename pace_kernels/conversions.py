"""States in formats: new ones, and the way from each format to floats and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .formats import (
    AVERAGES,
    BLOCK,
    CODED,
    GRADIENTS,
    HASH,
    MOMENTS,
    PARTS,
    REMAINDER,
    SCALES_BESIDE,
    SECONDS,
    dtype_of,
    formats_in,
    has,
    names_of,
    suffix,
    whole_name,
)
from .memory import aligned
from .sharding import is_sharded, local, local_as
from .states import Formats, empty_state, state_dtype
from .torch_rules import codes

# Those that may lie in other formats than float32.
STATES = (*PARTS, *SECONDS, *GRADIENTS)


def new_state(name: str, formats: Formats, param: Tensor, others: Mapping[str, Tensor]) -> Tensor:
    """A coded state at a parameter's first step, where moments are 0 and the average is the weight; ``others`` are
    those that it has."""
    state = _part_of(name, param, dtype_of(name, formats, param))
    if whole_name(name) in AVERAGES and formats.ema == 24:
        local(state).copy_(_ema_24(weight_in(param, others))[name.endswith("_remainder")])
    else:
        local(state).zero_()
    return state


def _ema_24(e: Tensor) -> tuple[Tensor, Tensor]:
    return codes.split(codes.rounded(e, 24, codes.NEAREST_24), 24)


def scales_shape(param: Tensor) -> tuple[int, ...]:
    first = suffix(param.shape)
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


# The two highest bits of a hash of weights say of which dtype they were: by their number in this list.
_HASHED = (torch.float32, torch.bfloat16, torch.float16)
_BELOW = 2**61


def hash_of(param: Tensor) -> int:
    """Of the dtype and of the bits of all elements and their places. Of a plain tensor: the shards of others would have
    to be added up, and not all ranks may save."""
    flat = param.detach().contiguous().view(-1)
    bits = flat.view(torch.int32 if flat.element_size() == 4 else torch.int16)
    total = 0
    for begin in range(0, flat.numel(), 2**22):  # eight bytes of temporaries for each element of such a part
        total += int(codes.hashed(bits[begin : begin + 2**22], begin))
    dtype = _HASHED.index(param.dtype) if param.dtype in _HASHED else len(_HASHED)
    return total % _BELOW + dtype * _BELOW


def dtype_beside(state: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype of the weights beside which a saved state lies, as far as the state tells it."""
    if REMAINDER in state:
        return torch.bfloat16
    if isinstance(live := state.get("live"), Tensor) and any(name in state for name in SCALES_BESIDE):
        return live.dtype
    found = state.get(HASH)
    if not isinstance(found, Tensor) or found.dtype != torch.int64 or found.numel() != 1 or found.is_meta:
        return None
    number = int(found) // _BELOW
    return _HASHED[number] if 0 <= number < len(_HASHED) else None


def with_hash(state: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """A state as it is saved."""
    if HASH in state or is_sharded(param) or "live" in state:
        return state
    return {**state, HASH: torch.tensor(hash_of(param))}


def in_floats(state: Mapping[str, Tensor], param: Tensor) -> dict[str, Tensor]:
    """A state in float32, under the names of AdamW."""
    plain = {key: value for key, value in state.items() if key not in CODED and key not in (*STATES, HASH)}
    weight = weight_in(state.get("live", param), state)
    there = [name for name in STATES if has(state, name)]
    floats = {name: _filled(name, param, state_in(name, state, weight)) for name in there}
    return plain | floats


def start_again(state: dict[str, Any]) -> None:
    """Makes an average that lies beside its weights equal to these: without a code each element is its weight."""
    for name in AVERAGES:
        for part in (f"{name}_codes", f"{name}_scales"):
            if part in state:
                local(state[part]).zero_()
    state.pop(HASH, None)


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
        return codes.joined(stored, local(state[f"{name}_remainder"]))
    scales = local(state[f"{name}_scales"]).reshape(-1)
    place = codes.E_CODES[8 * stored.element_size()].load(flat, scales, weight.reshape(-1))
    return place.value().view(stored.shape)


def average_in(state: Mapping[str, Tensor], weight: Tensor) -> Tensor | None:
    """The average as floats, where it lies beside its weight; None where it does not."""
    beside = next((scales for scales in SCALES_BESIDE if scales in state), None)
    return None if beside is None else state_in(beside.removesuffix("_scales"), state, weight)


def _bits(a: Tensor) -> Tensor:
    return a.view(torch.int32 if a.element_size() == 4 else torch.int16)


def encode_again(param: Tensor, state: dict[str, Any], before: Tensor | None, average: Tensor | None) -> None:
    """After others wrote a parameter: elements that differ from ``before``, or without that all, have no remainder, and
    ``average``, if that lay beside it, lies beside what it holds now."""
    here, written = local(param).detach(), None
    if before is not None and before.dtype is here.dtype:
        written = _bits(before) != _bits(here)  # a NaN is not equal to itself
    if written is not None and not bool(written.any()):
        return
    if REMAINDER in state:
        rest = local(state[REMAINDER])
        rest.zero_() if written is None else rest.masked_fill_(written, 0)
    if average is None:
        return
    formats = formats_in(state)
    whole = next(name for name in AVERAGES if f"{name}_scales" in state)
    if here.dtype == torch.float64:  # of which there are no codes
        for part in PARTS[whole]:
            state.pop(part, None)
        state[whole] = _filled(whole, param, average.to(here.dtype))
        return
    for name, value in zip(PARTS[whole], encoded(whole, average, weight_in(param, state), formats), strict=False):
        here = local(state[name])
        here.copy_(value.view(here.shape))


def converted(state: Mapping[str, Tensor], param: Tensor, formats: Formats) -> dict[str, Tensor]:
    """The states of a parameter in other formats: floats are rounded to the nearest, which each time gives the same.
    What lies in its format stays: its codes may be others if they are made again."""
    was = weight_in(param, state)
    new: dict[str, Tensor] = {}
    if formats.weight:
        new[REMAINDER] = _remainder(state.get(REMAINDER), param, formats)
    weight, plain = weight_in(param, new), formats._replace(weight=0)
    for name in [name for name in STATES if has(state, name)]:
        parts = names_of(plain, [name])
        fits = all(part in state and state[part].dtype is dtype_of(part, formats, param) for part in parts)
        if fits and (parts[-1] not in SCALES_BESIDE or new.get(REMAINDER) is state.get(REMAINDER)):
            new |= {part: state[part] for part in parts}
            continue
        value = state_in(name, state, was)
        if name in (*SECONDS, *GRADIENTS):
            value = value.to(dtype_of(name, formats, param))
        for part, tensor in zip(parts, encoded(name, value, weight, formats), strict=True):
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
    if name not in AVERAGES:
        if formats.state == 32 or name not in MOMENTS:
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
