"""What a launch knows of a list of tensors: a table of addresses on the device, one row per tensor, and the tensor of
each program. One launch then steps the whole list, and thousands of small tensors cost a few launches.
"""

from __future__ import annotations

import functools
import operator
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .checks import Formats

# Columns of the table, int64; from OPERANDS on, an address for each operand of the definition.
NUMEL = tl.constexpr(0)
FIRST_BLOCK = tl.constexpr(1)  # the tensor's first program
FIRST_ROW = tl.constexpr(2)  # and its place by the order of the tensors
STEP = tl.constexpr(3)  # its lowest bit says that it is float64, not float32
LAST_SCALARS = tl.constexpr(4)
OPERANDS = tl.constexpr(5)


class Uploads:
    """Small tensors on a device, kept for reuse: a training whose gradients stay in place copies nothing. Beyond
    ``limit`` bytes the least recently used are dropped.

    A captured graph may be replayed at any time, so tensors that a capture has used are never dropped. A capture takes
    tensors made before it on any stream, so keys have the address of what is stepped: the step that made such a tensor
    wrote there too, and whoever captures or replays a later one on another stream has waited for it. A tensor made
    within one is not reused: its copy is part of that graph, and it holds nothing before a replay. Otherwise a table
    serves only the stream on which it was made: a copy is ordered before the kernels of its own stream alone.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._recent: OrderedDict[Hashable, tuple[int, Any]] = OrderedDict()
        self._captured: dict[int, Any] = {}
        self._lock = threading.Lock()

    def get(self, device: torch.device, key: Hashable, make: Callable[[], Any]) -> Any:
        on_gpu = device.type == "cuda"
        capturing = on_gpu and torch.cuda.is_current_stream_capturing()
        stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
        key = (device, key)
        with self._lock:
            made_on, value = self._recent.get(key, (stream, None))
            if value is not None and (capturing or made_on == stream):
                self._recent.move_to_end(key)
                if capturing:
                    self._captured[id(value)] = value
                return value
        value = make()
        with self._lock:
            if capturing:
                self._captured[id(value)] = value
            else:
                self._held += value.nbytes - self._drop(key)
                self._recent[key] = (stream, value)
                while self._held > self._limit and len(self._recent) > 1:
                    self._held -= self._drop(next(iter(self._recent)))
        return value

    def _drop(self, key: Hashable) -> int:
        _, value = self._recent.pop(key, (0, None))
        return 0 if value is None else int(value.nbytes)

    @property
    def held(self) -> int:
        """Bytes of the kept tensors that may be dropped."""
        return self._held

    def __len__(self) -> int:
        return len(self._recent)


class Reserve:
    """Pinned memory set aside for captures. Within one, torch copies from no other memory, and pinning could allocate,
    which would end the capture. So the steps that precede every capture pin it."""

    ALIGNMENT, LIMIT = 16, 8 << 20  # bytes; 8 MiB are the tables of 64 thousand tensors

    def __init__(self, pinned: Callable[[int], Tensor]) -> None:
        self._pinned = pinned
        self._free = torch.empty(0, dtype=torch.uint8)
        self._lock = threading.Lock()

    def provide(self, nbytes: int) -> None:
        """Sets aside at least so much, up to the limit. Not within a capture."""
        nbytes = min(nbytes, self.LIMIT)
        with self._lock:
            if self._free.numel() < nbytes:
                self._free = self._pinned(nbytes)

    def copy_of(self, source: Tensor) -> Tensor:
        """The source's values in pinned memory, which is not reused."""
        size = -(-source.nbytes // self.ALIGNMENT) * self.ALIGNMENT
        with self._lock:
            if size > self._free.numel():
                raise RuntimeError(
                    f"a captured step needs a table of {source.nbytes} bytes in pinned memory, and {self._free.numel()}"
                    " bytes are set aside: take a step like it, with all of its parameters, before the capture"
                )
            taken, self._free = self._free[:size], self._free[size:]
        copy = taken[: source.nbytes].view(source.dtype).view(source.shape)
        return copy.copy_(source)


@dataclass
class Uploaded:
    """A tensor on the device, and, where its copy is part of a graph, the source that each replay reads again."""

    tensor: Tensor
    source: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


def upload(source: Tensor, device: torch.device) -> Uploaded:
    if device.type != "cuda":
        return Uploaded(source.to(device))
    if torch.cuda.is_current_stream_capturing():
        pinned = _reserve.copy_of(source)
        return Uploaded(pinned.to(device, non_blocking=True), pinned)
    # torch keeps pinned memory until the copy is done.
    return Uploaded(source.pin_memory().to(device, non_blocking=True))


@dataclass
class Part:
    """Programs of one launch: all their tensors have operands of these formats (None: not in play), and are aligned or
    not."""

    formats: tuple[torch.dtype | None, ...]
    aligned: bool
    first_block: int
    blocks: int


@dataclass
class Plan:
    table: Tensor
    blocks: Tensor
    parts: list[Part]
    rows: int  # programs in all
    kept: tuple[Uploaded, ...]  # what the tensors above belong to

    @property
    def nbytes(self) -> int:
        return self.table.nbytes


# A plan is 72 to 200 bytes a tensor, its map of programs 4 bytes a program. Gradients that are allocated anew in each
# step come back to few sets of addresses; with an optimizer for each parameter there are as many plans as parameters.
_plans = Uploads(64 << 20)
_blocks = Uploads(64 << 20)
_reserve = Reserve(lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, pin_memory=True))


def plan(
    columns: dict[int, list[Tensor]], formats: tuple[Formats | None, ...], device: torch.device, chunk: int
) -> Plan:
    """The plan of tensors by their column of the table; `formats` are those of each operand, the first the weights."""
    numels = list(map(Tensor.numel, columns[OPERANDS.value]))
    addresses = {column: list(map(Tensor.data_ptr, tensors)) for column, tensors in columns.items()}
    if STEP.value in columns:
        steps = zip(addresses[STEP.value], columns[STEP.value], strict=True)
        addresses[STEP.value] = [a | (t.dtype == torch.float64) for a, t in steps]
    for values in addresses.values():
        if 0 in values and any(a == 0 and n > 0 for a, n in zip(values, numels, strict=True)):
            raise RuntimeError("a tensor has no memory of its own, as a DTensor has not: pass its local part")
    key = (tuple(numels), formats, *((c, tuple(a)) for c, a in addresses.items()))
    made = _plans.get(device, key, lambda: _make_plan(addresses, numels, formats, device, chunk))
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        # A capture may meet each list at new addresses, as gradients that are allocated within it have.
        _reserve.provide(_plans.held + _blocks.held + Reserve.ALIGNMENT * (len(_plans) + len(_blocks)))
    return made


def _make_plan(
    addresses: dict[int, list[int]],
    numels: list[int],
    formats: tuple[Formats | None, ...],
    device: torch.device,
    chunk: int,
) -> Plan:
    count = len(numels)
    swept = [a for column, a in addresses.items() if column >= OPERANDS.value]  # the others may be aligned to less
    unaligned = [functools.reduce(operator.or_, row) % 16 != 0 for row in zip(*swept, strict=True)]
    each = list(zip(*(f if isinstance(f, tuple) else [f] * count for f in formats), strict=True))
    classes = [(u, *map(str, row)) for u, row in zip(unaligned, each, strict=True)]
    order = sorted(range(count), key=classes.__getitem__)  # keeps the order within a class
    programs = [-(-n // chunk) for n in numels]
    first_block = [0] * count
    parts, at = [], 0
    for _, members in groupby(order, key=classes.__getitem__):
        begin = at
        for i in members:
            first_block[i] = at
            at += programs[i]
        if at > begin:
            parts.append(Part(each[i], not unaligned[i], begin, at - begin))
    table = torch.zeros(count, OPERANDS.value + len(formats), dtype=torch.int64)
    counted = {NUMEL.value: numels, FIRST_BLOCK.value: first_block}
    counted[FIRST_ROW.value] = list(accumulate(programs, initial=0))[:-1]
    for column, values in (counted | addresses).items() if count > 0 else ():
        # An array first: torch.tensor looks at each number of a list.
        table[:, column] = torch.frombuffer(array("q", values), dtype=torch.int64)

    def tensor_of_block() -> Uploaded:
        repeats = torch.tensor([programs[i] for i in order], dtype=torch.int64)
        return upload(torch.repeat_interleave(torch.tensor(order, dtype=torch.int32), repeats), device)

    key = (tuple(order), tuple(programs), tuple(addresses[OPERANDS.value]))
    blocks = _blocks.get(device, key, tensor_of_block)
    uploaded = upload(table, device)
    return Plan(uploaded.tensor, blocks.tensor, parts, at, (uploaded, blocks))
