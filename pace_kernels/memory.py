"""The memory of tensors: whether it holds all of their elements, and which tensors share it.

Two parameters can be two objects over one memory: weights that were tied through ``.data`` or by
``load_state_dict(assign=True)``, or slices of one tensor.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .sharding import is_wrapper, local
from .torch_rules.common import by_graph, has_values

# A tensor's device, and its first byte and the one behind its last.
Region = tuple[torch.device, int, int]


def _last_byte(tensor: Tensor) -> int:
    """The end of the tensor's elements in its storage, in bytes from the start of it."""
    last = tensor.storage_offset() + sum((n - 1) * st for n, st in zip(tensor.shape, tensor.stride(), strict=True))
    return int(last + 1) * tensor.element_size()


def is_whole(tensor: Tensor) -> bool:
    """Whether there is memory for all elements. A storage can be resized behind a tensor's back, as FSDP does with
    parameters that it puts away; reading or writing there ends the process. Tensors without readable memory (fake and
    meta tensors, subclasses that wrap others, XLA's) count as whole: their address 0 says nothing."""
    if tensor.numel() == 0 or tensor.layout is not torch.strided or not has_values(tensor):
        return True
    if is_wrapper(tensor) or by_graph(tensor.device):
        return True
    try:
        return int(tensor.untyped_storage().nbytes()) >= _last_byte(tensor)
    except (NotImplementedError, RuntimeError):
        return True


def check_whole(tensors: Iterable[Tensor]) -> None:
    """Raises RuntimeError if a tensor has more elements than memory."""
    for tensor in tensors:
        if not is_whole(tensor):
            shape = tuple(tensor.shape)
            raise RuntimeError(f"a tensor of shape {shape} has more elements than memory: was its storage resized?")


def region(tensor: Tensor) -> Region | None:
    """The address and extent of a tensor's local part; None if it has no address."""
    here = local(tensor)
    if here.numel() == 0 or here.layout is not torch.strided or here.device.type == "meta":
        return None
    try:
        storage = here.untyped_storage()
        start = 0 if storage.device.type == "meta" else storage.data_ptr()  # a fake tensor's is on meta
    except (NotImplementedError, RuntimeError):  # of XLA
        return None
    if start == 0:
        return None
    return here.device, start + int(here.storage_offset()) * here.element_size(), start + _last_byte(here)


def overlapping(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors in groups that share memory, in the given order; a tensor that shares none is a group of its own."""
    groups: dict[int, list[Tensor]] = {}
    first: dict[int, int] = {}  # of each tensor, by its place: the group that it is in
    given = list(tensors)
    placed = sorted(
        (where[0].type, where[0].index or 0, where[1], where[2], i)
        for i, where in enumerate(map(region, given))
        if where is not None
    )
    end, device, group = 0, ("", 0), -1
    for kind, index, start, stop, i in placed:
        if (kind, index) != device or start >= end:
            device, end, group = (kind, index), stop, i
        end = max(end, stop)
        first[i] = group
    for i, tensor in enumerate(given):
        groups.setdefault(first.get(i, ~i), []).append(tensor)
    return list(groups.values())


def share_memory(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Whether any of ``some`` is one of ``others``, or shares memory with one of them."""
    some, others = list(some), list(others)
    known = set(map(id, others))
    if any(id(tensor) in known for tensor in some):
        return True
    ours = set(map(id, some))
    return any(
        any(id(t) in ours for t in group) and any(id(t) in known for t in group)
        for group in overlapping([*some, *others])
    )


def overlap_in_part(tensors: list[Tensor]) -> tuple[int, int] | None:
    """Two of the tensors, by number, that share some of their elements but not all of them, or not as elements of one
    dtype; None if there are none. Interleaved slices share none."""
    numbers = {id(tensor): i for i, tensor in enumerate(tensors)}
    for group in overlapping(tensors):
        if len(group) > 1 and (pair := _overlap_in_part(list(map(local, group)))) is not None:
            one, other = sorted(numbers[id(group[k])] for k in pair)
            return one, other
    return None


def _overlap_in_part(group: list[Tensor]) -> tuple[int, int] | None:
    firsts: dict[Region, int] = {}
    for k, tensor in enumerate(group):
        where = region(tensor)
        if where is not None and not _same_elements(tensor, group[j := firsts.setdefault(where, k)]):
            return j, k
    if len(firsts) < 2:
        return None
    # Who has which place, in units that every element begins at: 4 bytes an element of one dtype.
    base = min(start for _, start, _ in firsts)
    unit = math.gcd(*(group[k].element_size() for k in firsts.values()), *(start - base for _, start, _ in firsts))
    owners = torch.full(((max(end for *_, end in firsts) - base) // unit,), -1, dtype=torch.int32, device="cpu")
    for (_, start, _), k in firsts.items():
        tensor = group[k]
        parts = tensor.element_size() // unit
        strides = (*(stride * parts for stride in tensor.stride()), 1)
        places = owners.as_strided((*tensor.shape, parts), strides, (start - base) // unit)
        if (other := int(places.max())) >= 0:
            return other, k
        places.fill_(k)
    return None


def _same_elements(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors in one region have the same elements, in any order."""
    if a.dtype != b.dtype or a.numel() != b.numel():
        return False
    dense = _last_byte(a) - a.storage_offset() * a.element_size() == a.numel() * a.element_size()
    return dense or (a.shape == b.shape and a.stride() == b.stride())


def is_askew(tensor: Tensor) -> bool:
    """Whether the elements have addresses that are no multiple of their size, as in files of safetensors without
    padding. Vectorized loops, torch's too, assume that none has."""
    where = region(tensor) if tensor.device.type == "cpu" else None
    return where is not None and where[1] % tensor.element_size() != 0


def as_bytes(tensor: Tensor) -> Tensor:
    """A view of the bytes of each element, in one more dimension."""
    return tensor.detach().unsqueeze(-1).view(torch.uint8)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy if its address is askew."""
    if not is_askew(tensor):
        return tensor
    return as_bytes(tensor).clone(memory_format=torch.contiguous_format).view(tensor.dtype).squeeze(-1)


def are_twins(params: Iterable[tuple[Tensor, Any]]) -> bool:
    """Whether one of the parameters that have something stored relative to them, as the second of each pair says, is
    one memory with another."""
    found = [(where, relative) for p, relative in params if (where := region(p)) is not None]
    count = Counter(where for where, _ in found)
    return any(relative and count[where] > 1 for where, relative in found)
