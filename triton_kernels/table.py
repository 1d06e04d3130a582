"""What a launch knows of a list of tensors: a table of addresses on the device, a row a tensor, and which tensor each
program has. One launch then does the whole list, and thousands of small tensors cost a few launches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

# Columns of the table, int64. A row is 128 bytes.
NUMEL = tl.constexpr(0)
FIRST_BLOCK = tl.constexpr(1)  # the tensor's first program
FIRST_ROW = tl.constexpr(2)  # and its place by the order of the tensors
STEP = tl.constexpr(3)
LAST_SCALARS = tl.constexpr(4)
X = tl.constexpr(5)
G = tl.constexpr(6)
M = tl.constexpr(7)
V = tl.constexpr(8)
E = tl.constexpr(9)
N = tl.constexpr(10)
W = tl.constexpr(11)
L = tl.constexpr(12)
LAST_G = tl.constexpr(13)
OLDER_G = tl.constexpr(14)
TABLE_WIDTH = tl.constexpr(16)

# Columns that are not swept, and may be aligned to 4 bytes alone.
_SMALL = (STEP.value, LAST_SCALARS.value)

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Uploads:
    """Small tensors on a device, kept while they are asked for again: a training whose gradients stay in place copies
    nothing. The least recently used are dropped.

    A captured graph may be replayed at any time, so what a capture has seen is never dropped. What is made within one
    is not handed out again: its copy is part of that graph, and nothing is there before a replay. Kept by stream too,
    since a copy is ordered before the kernels of its own stream alone.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._recent: OrderedDict[Hashable, Any] = OrderedDict()
        self._captured: list[Any] = []

    def get(self, device: torch.device, key: Hashable, make: Callable[[], Any]) -> Any:
        on_gpu = device.type == "cuda"
        capturing = on_gpu and torch.cuda.is_current_stream_capturing()
        stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
        key = (device, stream, key)
        value = self._recent.get(key)
        if value is None:
            value = make()
            if not capturing:
                self._recent[key] = value
                if len(self._recent) > self._size:
                    self._recent.popitem(last=False)
        else:
            self._recent.move_to_end(key)
        if capturing:
            self._captured.append(value)
        return value

    def __len__(self) -> int:
        return len(self._recent)


@dataclass
class Uploaded:
    """A tensor on the device, and its source in pinned memory, which a captured copy reads again at each replay."""

    tensor: Tensor
    source: Tensor


def upload(source: Tensor, device: torch.device) -> Uploaded:
    if device.type != "cuda":
        return Uploaded(source.to(device), source)
    source = source.pin_memory()
    return Uploaded(source.to(device, non_blocking=True), source)


@dataclass
class Part:
    """Programs of one launch: all their tensors are of these formats, and aligned or not."""

    x_dtype: torch.dtype
    g_dtype: torch.dtype
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


# Each entry is 128 bytes a tensor and 4 a program. Gradients that are allocated anew in each step come back to few
# sets of addresses.
_plans = Uploads(16)
_blocks = Uploads(16)


def plan(columns: dict[int, list[Tensor]], numels: list[int], device: torch.device, chunk: int) -> Plan:
    """The plan of tensors of `numels` elements; `columns` holds the operands by their column of the table."""
    addresses = {column: list(map(Tensor.data_ptr, tensors)) for column, tensors in columns.items()}
    x_dtypes = [t.dtype for t in columns[X.value]]
    g_dtypes = [t.dtype for t in columns[G.value]] if G.value in columns else x_dtypes
    key = (tuple(numels), tuple(x_dtypes), tuple(g_dtypes), *((c, tuple(a)) for c, a in addresses.items()))
    return _plans.get(device, key, lambda: _make_plan(addresses, numels, x_dtypes, g_dtypes, device, chunk))


def _make_plan(
    addresses: dict[int, list[int]],
    numels: list[int],
    x_dtypes: list[torch.dtype],
    g_dtypes: list[torch.dtype],
    device: torch.device,
    chunk: int,
) -> Plan:
    count = len(numels)
    swept = [a for column, a in addresses.items() if column not in _SMALL]
    unaligned = [any(address % 16 for address in row) for row in zip(*swept, strict=True)]
    classes = list(zip(unaligned, map(str, x_dtypes), map(str, g_dtypes), strict=True))
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
            parts.append(Part(x_dtypes[i], g_dtypes[i], not unaligned[i], begin, at - begin))
    table = torch.zeros(count, TABLE_WIDTH.value, dtype=torch.int64)
    table[:, NUMEL.value] = torch.tensor(numels)
    table[:, FIRST_BLOCK.value] = torch.tensor(first_block)
    table[:, FIRST_ROW.value] = torch.tensor(list(accumulate(programs, initial=0))[:-1])
    for column, values in addresses.items():
        table[:, column] = torch.tensor(values)

    def tensor_of_block() -> Uploaded:
        repeats = torch.tensor([programs[i] for i in order], dtype=torch.int64)
        return upload(torch.repeat_interleave(torch.tensor(order, dtype=torch.int32), repeats), device)

    blocks = _blocks.get(device, (tuple(order), tuple(programs)), tensor_of_block)
    uploaded = upload(table, device)
    return Plan(uploaded.tensor, blocks.tensor, parts, at, (uploaded, blocks))
