"""Global memory: buffers with guard gaps in one arena.

A granule of 256 bytes belongs to one buffer at most, so that one table look-up per address tells the buffer, however
many there are; an upload costs no more than its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .dtypes import UNSIGNED, PtxError

BASE = 0x7F00_0000_0000  # where the arena begins in the kernels' address space
GRANULE = 256
_GRANULE_SHIFT = 8


@dataclass(frozen=True, slots=True)
class Buffer:
    start: int
    size: int
    dtype: np.dtype
    shape: tuple[int, ...]
    readonly: bool

    @property
    def address(self) -> int:
        return BASE + self.start


def _granules(size: int) -> int:
    return -(-size // GRANULE)


class Memory:
    """The device memory of a test: upload arrays, pass their addresses to ``run``, download what a kernel left."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._by_address: dict[int, int] = {}
        self._end = 0
        self._arena = np.zeros(1 << 16, np.uint8)
        self._views: dict[int, np.ndarray] = {}
        # Row 0 of the tables stands for "no buffer": a granule's owner is its buffer's number plus one.
        self._owner = np.zeros(self._arena.size // GRANULE, np.int32)
        self._starts = np.zeros(16, np.int64)
        self._ends = np.zeros(16, np.int64)
        self._readonly = np.zeros(16, bool)

    def upload(self, array: np.ndarray, readonly: bool = False, misalign: int = 0) -> int:
        """Copy an array to a new buffer and return its address: a multiple of 256 plus ``misalign`` bytes."""
        shape, array = np.shape(array), np.ascontiguousarray(array)
        start = self._end + GRANULE + misalign
        size = array.nbytes
        stop = _granules(start + size) * GRANULE
        number = len(self.buffers) + 1
        self._reserve(stop, number)
        self._end = stop
        self._arena[start : start + size] = array.reshape(-1).view(np.uint8)
        self._owner[start // GRANULE : stop // GRANULE] = number
        self._starts[number], self._ends[number], self._readonly[number] = start, start + size, readonly
        buffer = Buffer(start, size, array.dtype, shape, readonly)
        self.buffers.append(buffer)
        self._by_address[buffer.address] = number - 1
        return buffer.address

    def download(self, address: int) -> np.ndarray:
        """A copy of the buffer at the address that ``upload`` returned, with the dtype and shape it had."""
        buffer = self.buffer(address)
        content = self._arena[buffer.start : buffer.start + buffer.size].copy()
        return content.view(buffer.dtype).reshape(buffer.shape)

    def write(self, address: int, array: np.ndarray) -> None:
        """Overwrite a buffer from the host, read-only ones too."""
        buffer = self.buffer(address)
        array = np.ascontiguousarray(array)
        if array.nbytes != buffer.size:
            raise ValueError(f"{array.nbytes} bytes for a buffer of {buffer.size}")
        self._arena[buffer.start : buffer.start + buffer.size] = array.reshape(-1).view(np.uint8)

    def buffer(self, address: int) -> Buffer:
        if address not in self._by_address:
            raise KeyError(f"no buffer starts at {address:#x}")
        return self.buffers[self._by_address[address]]

    def release(self, count: int) -> None:
        """Forget all but the first ``count`` buffers: a launch's module variables end with it."""
        for buffer in self.buffers[count:]:
            del self._by_address[buffer.address]
            self._owner[buffer.start // GRANULE : _granules(buffer.start + buffer.size)] = 0
        del self.buffers[count:]
        self._end = max((_granules(b.start + b.size) * GRANULE for b in self.buffers[-1:]), default=0)

    def view(self, size: int) -> np.ndarray:
        """The arena as unsigned integers of ``size`` bytes; valid until the next upload."""
        if size not in self._views:
            self._views[size] = self._arena.view(UNSIGNED[size])
        return self._views[size]

    def owner(self, start: int, stop: int, write: bool) -> int:
        """The number of the buffer that all these bytes lie in; -1 where there is none, or none to be written."""
        granule = start >> _GRANULE_SHIFT
        number = int(self._owner[granule]) if 0 <= granule < self._owner.size else 0
        if start < self._starts[number] or stop > self._ends[number] or (write and self._readonly[number]):
            return -1
        return number - 1

    def owners(self, offsets: np.ndarray, size: int, write: bool, what: str) -> np.ndarray:
        """The numbers of the buffers that hold ``size`` bytes at each of the offsets."""
        granules = offsets >> _GRANULE_SHIFT
        outside = granules.view(np.uint64) >= self._owner.size
        numbers = self._owner[np.where(outside, 0, granules)]
        bad = outside | (offsets < self._starts[numbers]) | (offsets + size > self._ends[numbers])
        if bad.any():
            raise PtxError(
                f"out-of-bounds global access at {int(offsets[bad][0]) + BASE:#x} by {int(bad.sum())} lanes: {what}"
            )
        if write and (bad := self._readonly[numbers]).any():
            raise PtxError(f"write to a read-only buffer at {int(offsets[bad][0]) + BASE:#x}: {what}")
        return numbers - 1

    def _reserve(self, size: int, buffers: int) -> None:
        # A granule is kept free behind the last buffer: a lane just past the end falls into it.
        if size + GRANULE > self._arena.size:
            grown = max(2 * self._arena.size, _granules(size + GRANULE) * GRANULE)
            arena, owner = np.zeros(grown, np.uint8), np.zeros(grown // GRANULE, np.int32)
            arena[: self._arena.size], owner[: self._owner.size] = self._arena, self._owner
            self._arena, self._owner = arena, owner
            self._views.clear()
        if buffers >= self._starts.size:
            for name in ("_starts", "_ends", "_readonly"):
                table = getattr(self, name)
                setattr(self, name, np.concatenate([table, np.zeros_like(table)]))
