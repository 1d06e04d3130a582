"""Runs a program: all threads of a batch of blocks in lock step, one numpy operation per instruction.

The threads with the lowest program counter run until they reach others that wait further on, which brings diverged
threads together again where their paths join. `warp_serial` runs one warp at a time instead.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from .dtypes import SIZES, UNSIGNED, PtxError
from .instructions import build_step
from .memory import Memory
from .parser import parse
from .program import Block, Program, Slot, Usage

WARP = 32
Stats = dict[str, Any]
Extent = int | Sequence[int]
_STEP_LIMIT = 20_000_000
# Lanes of a batch: enough that numpy's cost per call is small beside its work, few enough that registers stay in cache.
_BATCH_LANES = 1 << 13
_CACHED_RANGES = 4096


class Lanes:
    """Threads that run together, with their registers.

    ``values[slot]`` is what a step reads and writes. Where the threads are a range of the batch these are views of the
    registers; otherwise copies of those that a block uses, and ``commit`` writes the changed ones back."""

    def __init__(self, machine: Machine, count: int, values: list[Any], bases: dict[int, np.ndarray]) -> None:
        self.machine, self.count, self.values, self.bases = machine, count, values, bases
        self._parent: Lanes | None = None
        self._index: slice | np.ndarray = slice(0, count)
        self._start: int | None = 0  # where the range begins, if it is one

    def select(self, index: slice | np.ndarray, usage: Usage) -> Lanes:
        """Some of these threads, with what ``usage`` touches."""
        values = list(self.values)
        bases = {}
        slots = self.machine.program.slots
        contiguous = isinstance(index, slice)
        for register, numbers in usage.registers.items():
            base = bases[register] = self.bases[register][index]
            for number in numbers:
                values[number] = self.values[number][index] if contiguous else _view(base, slots[number])
        for number in usage.specials:
            values[number] = self.values[number][index]
        lanes = Lanes(self.machine, index.stop - index.start if contiguous else len(index), values, bases)
        lanes._parent, lanes._index = self, index
        lanes._start = self._start + index.start if contiguous and self._start is not None else None
        return lanes

    def commit(self, usage: Usage) -> None:
        if isinstance(self._index, slice):
            return
        for register in usage.written:
            self._parent.bases[register][self._index] = self.bases[register]

    @cached_property
    def numbers(self) -> np.ndarray:
        """The threads' numbers in the batch. Blocks are padded to whole warps: the lane is the number mod 32."""
        if self._start is not None:
            return np.arange(self._start, self._start + self.count)
        return self._parent.numbers[self._index]

    @cached_property
    def lane(self) -> np.ndarray:
        return self.numbers % WARP

    @cached_property
    def warp(self) -> np.ndarray:
        return self.numbers // WARP

    @property
    def threads(self) -> slice | np.ndarray:
        """An index of these threads into anything that has an element a thread of the batch."""
        return self.numbers if self._start is None else slice(self._start, self._start + self.count)

    def run(self, step: Any, predicate: np.ndarray, usage: Usage) -> None:
        """Run a step for those threads for which the predicate holds."""
        count = int(np.count_nonzero(predicate)) if np.ndim(predicate) else self.count * bool(predicate)
        if count == self.count:
            step(self)
        elif count:
            some = self.select(_compact(np.flatnonzero(predicate)), usage)
            step(some)
            some.commit(usage)


def _compact(index: np.ndarray) -> slice | np.ndarray:
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index


def _view(base: np.ndarray, slot: Slot) -> np.ndarray:
    if slot.dtype.itemsize == base.dtype.itemsize:
        return base.view(slot.dtype)
    size = slot.dtype.itemsize
    return base.view(slot.dtype)[slot.offset // size :: base.dtype.itemsize // size]


class Machine:
    """The state of a batch of blocks: registers, shared and local memory, program counters, barriers."""

    def __init__(
        self,
        program: Program,
        memory: Memory,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        blocks: int,
        parameters: bytes,
        symbols: dict[str, int],
        dynamic_shared: int,
        stats: Stats,
    ) -> None:
        self.program, self.memory, self.grid, self.block, self.stats = program, memory, grid, block, stats
        self.symbols = symbols
        self.block_threads = block[0] * block[1] * block[2]
        self.block_lanes = -(-self.block_threads // WARP) * WARP
        self.blocks = blocks
        self.lanes = blocks * self.block_lanes
        self.dynamic_shared = dynamic_shared
        self.shared_limit = program.shared_size + dynamic_shared
        self.shared_stride = -(-self.shared_limit // 16) * 16 + 16
        self.local_stride = -(-program.local_size // 16) * 16 + 16
        self.shared = np.empty(self.shared_stride * blocks, np.uint8)
        self.local = np.empty(self.local_stride * self.lanes, np.uint8)
        self.shared_base = np.repeat(np.arange(blocks) * self.shared_stride, self.block_lanes)
        self.local_base = np.arange(self.lanes) * self.local_stride
        self.parameters = np.frombuffer(parameters + bytes(-len(parameters) % 16 + 16), np.uint8)
        self.parameter_size = len(parameters)
        self.load_bytes = np.zeros(len(memory.buffers), np.int64)
        self.store_bytes = np.zeros(len(memory.buffers), np.int64)
        # Registers begin with a pattern, not with zeros: a read before the first write shows.
        storage = [_register(type_, self.lanes) for type_ in program.storage]
        self._bases = {number: storage[where] for number, where in enumerate(program.stored_at)}
        self.full = Lanes(self, self.lanes, self._slot_values(), self._bases)
        self._ranges: dict[tuple[int, int], Lanes] = {(0, self.lanes): self.full}
        self.counters = np.zeros(self.lanes, np.int32)
        self.waiting = np.full(self.lanes, -1, np.int32)
        self.wait_count = np.zeros(self.lanes, np.int64)
        self.wait_block = np.zeros(self.lanes, np.int32)
        self.vote = np.zeros(self.lanes, bool)
        self.done = np.zeros(self.lanes, bool)

    def _slot_values(self) -> list[Any]:
        values: list[Any] = []
        for slot in self.program.slots:
            if slot.kind == "register":
                values.append(_view(self._bases[slot.register], slot))
            elif slot.kind == "special":
                values.append(np.zeros(self.lanes, slot.dtype))
            elif slot.kind == "symbol":
                values.append(np.array(self.symbols[slot.name] + slot.offset, np.uint64).astype(slot.dtype)[()])
            elif slot.dtype.kind == "b":
                values.append(slot.value)
            else:
                values.append(np.frombuffer(slot.value, slot.dtype)[0])
        return values

    def _special(self, name: str, thread: np.ndarray, block: np.ndarray) -> np.ndarray | int:
        lane = thread % WARP
        axis = name[-1]
        if name.startswith(("%tid.", "%ctaid.")):
            index, extent = (thread, self.block) if name.startswith("%tid") else (block, self.grid)
            if axis == "z":
                return index // (extent[0] * extent[1])
            return index % extent[0] if axis == "x" else index // extent[0] % extent[1]
        if name.startswith(("%ntid.", "%nctaid.")):
            return (self.block if name.startswith("%ntid") else self.grid)["xyz".index(axis)]
        if name.startswith("%lanemask"):
            below, this = (1 << lane) - 1, 1 << lane
            masks = {"lt": below, "le": below | this, "eq": this, "gt": ~(below | this), "ge": ~below}
            return masks[name[-2:]] & 0xFFFFFFFF
        fixed = {"%nsmid": 1, "%nwarpid": self.block_lanes // WARP, "%dynamic_smem_size": self.dynamic_shared}
        fixed["%total_smem_size"] = self.shared_limit
        return {"%laneid": lane, "%warpid": thread // WARP}.get(name, fixed.get(name, 0))

    # One batch

    def run(self, blocks: np.ndarray, warp_serial: np.random.Generator | None) -> None:
        """Run these blocks of the grid, by their linear numbers, to their end; no more of them than the machine has."""
        lanes = len(blocks) * self.block_lanes
        thread = np.tile(np.arange(self.block_lanes), self.blocks)
        block = np.zeros(self.lanes, np.int64)
        block[:lanes] = np.repeat(blocks, self.block_lanes)
        for number, slot in enumerate(self.program.slots):
            if slot.kind == "special":
                self.full.values[number][...] = self._special(slot.name, thread, block)
        self.shared[...] = 0xFF
        self.local[...] = 0xFF
        self.counters[...] = 0
        self.waiting[...] = -1
        self.done[...] = thread >= self.block_threads
        self.done[lanes:] = True
        self._schedule(warp_serial)

    def _schedule(self, warp_serial: np.random.Generator | None) -> None:
        steps = 0
        warp: int | None = None
        blocks = self.program.blocks
        while True:
            runnable = ~self.done & (self.waiting < 0)
            if not runnable.any():
                if self.done.all():
                    return
                self._release_barriers()
                continue
            if warp_serial is not None:
                ready = runnable.reshape(-1, WARP).any(1)
                if warp is None or not ready[warp]:
                    warp = int(warp_serial.choice(np.flatnonzero(ready)))
                runnable &= np.arange(self.lanes) // WARP == warp
            numbers = np.flatnonzero(runnable)
            counters = self.counters[numbers]
            counter = int(counters.min())
            here = counters == counter
            others = counters[~here]
            # Beyond this point other threads wait, and are to be taken along.
            horizon = int(others.min()) if others.size else len(blocks)
            index = _compact(numbers[here])
            while True:
                block = blocks[counter]
                steps += block.length
                if steps > _STEP_LIMIT:
                    raise PtxError(f"no end after {_STEP_LIMIT} instructions")
                following = self._run_block(block, counter, index)
                if following is None:
                    break
                if following >= horizon:
                    self.counters[index] = following
                    break
                counter = following

    def _range(self, index: slice) -> Lanes:
        key = index.start, index.stop
        if key not in self._ranges:
            if len(self._ranges) > _CACHED_RANGES:
                self._ranges = {(0, self.lanes): self.full}
            self._ranges[key] = self.full.select(index, self.program.everything)
        return self._ranges[key]

    def _run_block(self, block: Block, counter: int, index: slice | np.ndarray) -> int | None:
        """The block where all these threads go on, or None where they part, wait or end."""
        lanes = self._range(index) if isinstance(index, slice) else self.full.select(index, block.usage)
        self.stats["instr"] += lanes.count * block.length
        for step in block.steps:
            step(lanes)
        lanes.commit(block.usage)
        if block.kind == "next":
            return counter + 1
        taken = None
        if block.predicate is not None:
            taken = lanes.values[block.predicate]
            if block.negated:
                taken = ~taken
            if np.ndim(taken) == 0:
                taken = np.full(lanes.count, taken)
            count = int(np.count_nonzero(taken))
            if count == 0:
                return counter + 1
            if count == lanes.count:
                taken = None
        if block.kind == "branch" and taken is None:
            return block.target
        threads = lanes.numbers if taken is None else lanes.numbers[taken]
        self.counters[index] = counter + 1
        if block.kind == "branch":
            self.counters[threads] = block.target
        elif block.kind == "switch":
            selected = np.broadcast_to(lanes.values[block.selector], lanes.count)
            if taken is not None:
                selected = selected[taken]
            if (selected >= len(block.targets)).any():
                raise PtxError(f"no such branch target: {block.text}")
            self.counters[threads] = block.targets[selected]
        elif block.kind == "exit":
            self.done[threads] = True
        else:
            self._wait(block, counter, lanes, threads, taken)
        return None

    # Barriers

    def _wait(self, block: Block, counter: int, lanes: Lanes, threads: np.ndarray, taken: np.ndarray | None) -> None:
        barrier = block.barrier

        def values(slot: int) -> np.ndarray:
            value = lanes.values[slot]
            return value if np.ndim(value) == 0 or taken is None else value[taken]

        if barrier.aligned:
            arrived = np.zeros(self.lanes, bool)
            arrived[threads] = True
            per_warp = arrived.reshape(-1, WARP)
            if (per_warp.any(1) & (per_warp != ~self.done.reshape(-1, WARP)).any(1)).any():
                raise PtxError(f"divergent aligned barrier: {block.text}")
        self.waiting[threads] = values(barrier.identifier)
        self.wait_count[threads] = values(barrier.count) if barrier.count is not None else 0
        self.wait_block[threads] = counter
        if barrier.reduction:
            self.vote[threads] = values(barrier.predicate)

    def _release_barriers(self) -> None:
        """Let those go on whose barrier is complete: by its thread count, or by all live threads of the block."""
        shape = self.blocks, self.block_lanes
        live, waiting = ~self.done.reshape(shape), self.waiting.reshape(shape)
        counts = self.wait_count.reshape(shape)
        released = False
        for identifier in np.unique(self.waiting[~self.done]):
            if identifier < 0:
                continue
            here = live & (waiting == identifier)
            expected = np.where(here, counts, 0).max(1)
            expected = np.where(expected > 0, expected, live.sum(1))
            complete = here.any(1) & (here.sum(1) == expected)
            if self.program.reduces:
                for block in np.flatnonzero(complete):
                    self._reduce(block * self.block_lanes + np.flatnonzero(here[block]))
            if complete.any():
                released = True
                waiting[here & complete[:, None]] = -1
        if not released:
            raise PtxError("deadlock at a barrier: threads wait at different barriers, or for threads that ended")
        self.stats["barriers"] += 1

    def _reduce(self, threads: np.ndarray) -> None:
        barriers = {int(b): self.program.blocks[b].barrier for b in np.unique(self.wait_block[threads])}
        votes = self.vote[threads]
        for number, barrier in barriers.items():
            if barrier.reduction is None:
                continue
            there = threads[self.wait_block[threads] == number]
            result = {"popc": votes.sum(), "and": votes.all(), "or": votes.any()}[barrier.reduction]
            self.full.values[barrier.destination][there] = result

    # Global memory

    def count(self, lanes: int, width: int, owners: int | np.ndarray, write: bool) -> None:
        key, counts = ("st_bytes", self.store_bytes) if write else ("ld_bytes", self.load_bytes)
        size = lanes * width
        self.stats[key] += size
        by_width = self.stats[key + "_by_width"]
        by_width[width] = by_width.get(width, 0) + size
        if isinstance(owners, int):
            counts[owners] += size
        else:
            counts += width * np.bincount(owners, minlength=len(counts))

    # Warps

    def active(self, lanes: Lanes, where: np.ndarray | None = None) -> np.ndarray:
        """Each thread's warp as a mask of those that run now, or of those of them for which ``where`` holds."""
        bits = np.zeros(self.lanes, bool)
        bits[lanes.threads] = True if where is None else where
        return self._masks(bits)[lanes.warp]

    def check_members(self, lanes: Lanes, mask: np.ndarray, what: str) -> None:
        """All members named by a warp instruction's mask run it now; those that ended are only counted."""
        if np.ndim(mask) == 0 and mask == 0xFFFFFFFF and lanes.count == self.lanes and not self.done.any():
            return
        if ((mask >> lanes.lane.astype(np.uint32)) & np.uint32(1) == 0).any():
            raise PtxError(f"a running lane is not in the membermask: {what}")
        alive = self._masks(~self.done)[lanes.warp]
        if (mask & alive & ~self.active(lanes)).any():
            raise PtxError(f"divergent warp instruction, a member is elsewhere: {what}")
        if (mask & ~alive).any():
            self.stats["mask_names_exited_lane"] += 1

    def all_run(self, lanes: Lanes, threads: np.ndarray) -> bool:
        running = np.zeros(self.lanes, bool)
        running[lanes.threads] = True
        return bool(running[threads].all())

    def _masks(self, bits: np.ndarray) -> np.ndarray:
        return np.packbits(bits, bitorder="little").view(np.uint32)


def _register(type_: str, lanes: int) -> np.ndarray:
    if type_ == "pred":
        return np.zeros(lanes, bool)
    size = SIZES[type_]
    pattern = np.full(lanes * size, 0xCD, np.uint8)
    return pattern.view(np.complex128 if size == 16 else UNSIGNED[size])


# Launches


@lru_cache(maxsize=64)
def compile_entry(text: str, name: str | None) -> Program:
    module = parse(text)
    return Program(module, module.entry(name), build_step)


def _extent(extent: Extent) -> tuple[int, int, int]:
    values = (extent,) if isinstance(extent, int) else tuple(int(v) for v in extent)
    return (*values, *(1,) * (3 - len(values)))


def _pack_parameters(program: Program, arguments: Sequence[Any]) -> bytes:
    if len(arguments) > len(program.parameters):
        raise PtxError(f"{len(arguments)} arguments for {len(program.parameters)} parameters")
    packed = bytearray(program.parameter_size)
    for (offset, parameter), argument in zip(program.parameters, arguments, strict=False):
        if isinstance(argument, (bytes, bytearray, memoryview)):
            value = bytes(argument)
        elif parameter.type in ("f32", "f64"):
            value = struct.pack("<f" if parameter.type == "f32" else "<d", argument)
        elif isinstance(argument, float):  # newer PTX declares floating-point parameters as bits
            value = struct.pack("<f" if parameter.size == 4 else "<d", argument)
        else:
            value = (int(argument) & ((1 << 8 * parameter.size) - 1)).to_bytes(parameter.size, "little")
        if len(value) != parameter.size:
            raise PtxError(f"{len(value)} bytes for {parameter.name} of {parameter.size}")
        packed[offset : offset + len(value)] = value
    return bytes(packed)


def _check_block(program: Program, block: tuple[int, int, int]) -> None:
    entry = program.entry
    required = entry.directive("reqntid")
    if required and _extent(required) != block:
        raise PtxError(f".reqntid {required}, but the block is {block}")
    most = entry.directive("maxntid")
    if most and np.prod(most) < np.prod(block):
        raise PtxError(f".maxntid {most}, but the block is {block}")


def run(
    ptx: str,
    name: str | None,
    grid: Extent,
    block: Extent,
    arguments: Sequence[Any],
    memory: Memory,
    dynamic_shared: int = 0,
    order: np.random.Generator | None = None,
    warp_serial: np.random.Generator | None = None,
    batch_lanes: int = _BATCH_LANES,
) -> Stats:
    """Launch an entry (the only one, if ``name`` is None) and return what it did.

    ``arguments``: addresses, integers, floats, structs as bytes; those left out at the end are zero. ``order`` runs
    the blocks in random order. ``warp_serial`` runs one random warp at a time up to its next barrier, which shows a
    missing ``__syncthreads`` that lock step hides.

    The result counts, of global memory, ``ld_bytes`` and ``st_bytes``, the same ``_by_width`` of an access in bytes and
    ``_by_buffer`` (by address); atomics count as stores, and their lanes as ``atom_lanes``; further ``instr`` (of all
    threads), ``barriers``, ``shfl_from_inactive`` and ``mask_names_exited_lane``.
    """
    program = compile_entry(ptx, name)
    extents = _extent(grid), _extent(block)
    _check_block(program, extents[1])
    parameters = _pack_parameters(program, arguments)
    counters = ("instr", "barriers", "ld_bytes", "st_bytes", "atom_lanes", "shfl_from_inactive")
    stats: Stats = dict.fromkeys((*counters, "mask_names_exited_lane"), 0)
    stats.update(ld_bytes_by_width={}, st_bytes_by_width={})
    blocks = np.arange(np.prod(extents[0], dtype=np.int64))
    if order is not None:
        blocks = order.permutation(blocks)
    lanes = -(-int(np.prod(extents[1])) // WARP) * WARP
    batch = min(max(1, batch_lanes // lanes), max(1, len(blocks)))
    kept = len(memory.buffers)
    symbols = _upload_variables(program, memory)
    try:
        with np.errstate(all="ignore"):
            machine = Machine(program, memory, *extents, batch, parameters, symbols, dynamic_shared, stats)
            for first in range(0, len(blocks), batch):
                machine.run(blocks[first : first + batch], warp_serial)
        for key, counts in (("ld_bytes_by_buffer", machine.load_bytes), ("st_bytes_by_buffer", machine.store_bytes)):
            stats[key] = {memory.buffers[b].address: int(counts[b]) for b in np.flatnonzero(counts)}
    finally:
        memory.release(kept)
    return stats


def _upload_variables(program: Program, memory: Memory) -> dict[str, int]:
    """Module variables begin afresh at every launch, and end with it."""
    symbols = {}
    for variable in program.module.variables:
        if variable.space in ("global", "const"):
            data = variable.data or bytes(max(variable.size, 1))
            symbols[variable.name] = memory.upload(np.frombuffer(data, np.uint8), readonly=variable.space == "const")
    return symbols
