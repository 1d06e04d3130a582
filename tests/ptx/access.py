"""Loads, stores, atomics, copies and what goes with addresses."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np

from .dtypes import DTYPES, SIGNED, SIZES, UNSIGNED, PtxError
from .memory import BASE
from .parser import Instruction, split_operands
from .program import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, Address, Builder, Step
from .table import instruction

if TYPE_CHECKING:
    from .executor import Lanes

# Where a warp's accesses lie: an array of elements, and each lane's index into it, or the first index where the lanes
# follow each other without a gap.
Location = tuple[np.ndarray, "int | np.ndarray"]
Locator = Callable[["Lanes"], Location]

_WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}
_SPACES = {address >> 32: space for space, address in _WINDOWS.items()}
_LOW = np.int64(0xFFFF_FFFF)


@lru_cache(maxsize=64)
def _ramp(count: int, step: int) -> np.ndarray:
    return np.arange(count, dtype=np.int64) * step


def _offsets(lanes: Lanes, address: Address, origin: int) -> np.ndarray:
    """Each lane's address, as a signed distance from an origin."""
    base = lanes.values[address.base]
    if np.ndim(base) == 0:
        return np.full(lanes.count, int(base) + address.displacement - origin, np.int64)
    if base.dtype.itemsize == 8:
        return base.view(np.int64) + (address.displacement - origin)
    return base.astype(np.int64) + (address.displacement - origin)


def _check_alignment(offsets: np.ndarray, width: int, text: str) -> None:
    if width > 1 and int(np.bitwise_or.reduce(offsets)) & (width - 1):
        first = int(offsets[(offsets & (width - 1)) != 0][0])
        raise PtxError(
            f"misaligned {width}-byte access at {first + BASE if first > LOCAL_WINDOW else first:#x}: {text}"
        )


def _locate_global(
    lanes: Lanes, address: Address, element: int, width: int, text: str, write: bool, counted: bool
) -> Location:
    memory = lanes.machine.memory
    offsets = _offsets(lanes, address, BASE)
    count = lanes.count
    first = int(offsets[0])
    adjacent = (
        int(offsets[-1]) - first == width * (count - 1)
        and first % width == 0
        and bool(((offsets - _ramp(count, width)) == first).all())
    )
    if adjacent:
        owner: int | np.ndarray = memory.owner(first, first + width * count, write)
    else:
        _check_alignment(offsets, width, text)
        owner = memory.owner(int(offsets.min()), int(offsets.max()) + width, write)
    if isinstance(owner, int) and owner < 0:
        owner = memory.owners(offsets, width, write, text)
    if counted:
        lanes.machine.count(count, width, owner, write)
    return memory.view(element), first // element if adjacent else offsets // element


def _locate_shared(lanes: Lanes, address: Address, element: int, width: int, text: str) -> Location:
    if address.place is not None:
        offsets = np.full(lanes.count, address.place.offset + address.displacement, np.int64)
    else:
        offsets = _offsets(lanes, address, 0) & _LOW
    _check_alignment(offsets, width, text)
    machine = lanes.machine
    if int(offsets.max()) + width > machine.shared_limit or int(offsets.min()) < 0:
        raise PtxError(f"out-of-bounds shared access, of {machine.shared_limit} bytes: {text}")
    return machine.shared.view(UNSIGNED[element]), (offsets + machine.shared_base[lanes.threads]) // element


def _locate_local(lanes: Lanes, address: Address, element: int, width: int, text: str) -> Location:
    machine = lanes.machine
    if address.place is not None:
        offset = address.place.offset + address.displacement
        _check_alignment(np.array([offset]), width, text)
        low = high = offset
        offsets: int | np.ndarray = offset
    else:
        offsets = _offsets(lanes, address, 0) & _LOW
        _check_alignment(offsets, width, text)
        low, high = int(offsets.min()), int(offsets.max())
    if low < 0 or high + width > machine.program.local_size:
        raise PtxError(f"out-of-bounds local access, of {machine.program.local_size} bytes: {text}")
    return machine.local.view(UNSIGNED[element]), (machine.local_base[lanes.threads] + offsets) // element


def _locate_parameter(lanes: Lanes, address: Address, element: int, width: int, text: str) -> Location:
    """Kernel parameters: by name, or by an address that the kernel worked out."""
    if address.place is not None:
        offsets = np.array([address.place.offset + address.displacement])
    else:
        offsets = _offsets(lanes, address, 0) & _LOW
    _check_alignment(offsets, width, text)
    machine = lanes.machine
    if int(offsets.max()) + width > machine.parameter_size or int(offsets.min()) < 0:
        raise PtxError(f"out-of-bounds parameter access, of {machine.parameter_size} bytes: {text}")
    return machine.parameters.view(UNSIGNED[element]), offsets // element


def _in_spaces(
    builder: Builder, ins: Instruction, operand: str, element: int, width: int, write: bool
) -> Callable[[Callable[[Locator], Step]], Step]:
    """From "what to do at a location" to a step that finds the location, in whatever space the address lies."""
    address = builder.address(operand)
    text = ins.text
    space = ins.space
    if address.place is not None:
        space = "local" if address.place.space == "frame" else address.place.space
    arguments = (address, element, width, text)

    def locator(name: str) -> Locator:
        if name in ("global", "const"):
            counted = name == "global"
            return lambda lanes: _locate_global(lanes, *arguments, write=write, counted=counted)
        locate = {"shared": _locate_shared, "local": _locate_local, "param": _locate_parameter}[name]
        if name == "param" and write:
            raise builder.error()
        return lambda lanes: locate(lanes, *arguments)

    def finish(make: Callable[[Locator], Step]) -> Step:
        if space not in ("generic", "param") or address.place is not None:
            return make(locator(space))
        names = ["global", "shared", "local", *(() if write else ("param",))]
        steps = {name: make(locator(name)) for name in names}
        by_window = {window: name for window, name in _SPACES.items() if name in steps}

        def step(lanes: Lanes) -> None:
            windows = _offsets(lanes, address, 0) >> 32
            if space == "param":  # its addresses are offsets, save those of a call's frame
                windows = np.where(windows == 0, PARAM_WINDOW >> 32, windows)
            first = int(windows[0])
            if (windows == first).all():
                steps[by_window.get(first, "global")](lanes)
                return
            usage = builder.usage()
            for window, name in by_window.items():
                lanes.run(steps[name], windows == window, usage)
            lanes.run(steps["global"], ~np.isin(windows, list(by_window)), usage)

        return step

    return finish


@instruction("ld")
def make_load(builder: Builder, ins: Instruction) -> Step:
    type_, count, size = ins.type, ins.vector, SIZES[ins.type]
    signed = type_[0] == "s"
    register_type = type_ if signed else f"b{8 * size}"
    target = ins.operands[0]
    # One element with braces around registers is packed from them.
    names = split_operands(target[1:-1]) if ins.vector > 1 else [target]
    destinations = [builder.write(name, register_type) for name in names]
    if len(destinations) != count:
        raise builder.error()

    def make(locate: Locator) -> Step:
        def step(lanes: Lanes) -> None:
            array, index = locate(lanes)
            if signed:
                array = array.view(SIGNED[size])
            values = lanes.values
            if isinstance(index, int):
                chunk = array[index : index + count * lanes.count]
                for part, destination in enumerate(destinations):
                    values[destination][...] = chunk[part::count]
                return
            # The address may be in a register that is loaded: all elements before any.
            parts = [array[index + part if part else index] for part in range(count)]
            for destination, part in zip(destinations, parts, strict=True):
                values[destination][...] = part

        return step

    return _in_spaces(builder, ins, ins.operands[1], size, size * count, write=False)(make)


@instruction("st")
def make_store(builder: Builder, ins: Instruction) -> Step:
    type_, count, size = ins.type, ins.vector, SIZES[ins.type]
    source = ins.operands[1]
    names = split_operands(source[1:-1]) if ins.vector > 1 else [source]
    sources = [builder.read(name, type_) for name in names]
    if len(sources) != count:
        raise builder.error()
    dtype = DTYPES[type_]

    def make(locate: Locator) -> Step:
        def step(lanes: Lanes) -> None:
            array, index = locate(lanes)
            array = array.view(dtype)
            values = lanes.values
            if isinstance(index, int):
                chunk = array[index : index + count * lanes.count]
                for part, slot in enumerate(sources):
                    chunk[part::count] = values[slot]
                return
            for part, slot in enumerate(sources):
                array[index + part if part else index] = values[slot]

        return step

    return _in_spaces(builder, ins, ins.operands[0], size, size * count, write=True)(make)


_AT = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
_UPDATE: dict[str, Callable] = {
    **_AT,
    "exch": lambda old, new: new,
    "inc": lambda old, most: np.where(old >= most, 0, old + 1),
    "dec": lambda old, most: np.where((old == 0) | (old > most), most, old - 1),
    "cas": lambda old, expected, new: np.where(old == expected, new, old),
}


@instruction("atom", "red")
def make_atomic(builder: Builder, ins: Instruction) -> Step:
    operation = next((m for m in ins.modifiers if m in _UPDATE), None)
    type_ = ins.type
    if operation is None or ins.vector > 1 or type_ not in DTYPES or type_ in ("f16", "bf16"):
        raise builder.error()
    dtype, size = DTYPES[type_], SIZES[type_]
    returns = ins.opcode == "atom"
    target, *arguments = ins.operands[returns:]
    used = returns and builder.result_is_used(ins.operands[0])
    result = builder.write(ins.operands[0], type_) if used else -1
    sources = [builder.read(a, type_) for a in arguments[: 2 if operation == "cas" else 1]]
    update = _UPDATE[operation]

    def make(locate: Locator) -> Step:
        def step(lanes: Lanes) -> None:
            array, index = locate(lanes)
            if array is lanes.machine.memory.view(size):
                lanes.machine.stats["atom_lanes"] += lanes.count
            array = array.view(dtype)
            if isinstance(index, int):
                index = np.arange(index, index + lanes.count)
            values = [np.broadcast_to(lanes.values[s], lanes.count) for s in sources]
            if operation in _AT and not used:
                _AT[operation].at(array, index, values[0])
                return
            old = array[index]
            if len(index) == 1 or len(np.unique(index)) == len(index):
                array[index] = update(old, *values)
            else:  # lanes that meet at an address take turns
                for lane, at in enumerate(index.tolist()):
                    old[lane] = array[at]
                    array[at] = update(old[lane], *(v[lane] for v in values))
            if used:
                lanes.values[result][...] = old

        return step

    return _in_spaces(builder, ins, target, size, size, write=True)(make)


@instruction("cvta")
def make_convert_address(builder: Builder, ins: Instruction) -> Step:
    window = np.uint64(_WINDOWS.get(ins.space, 0))
    source, result = builder.read(ins.operands[1], "u64"), builder.write(ins.operands[0], "u64")
    to_space = ins.has("to")
    low = np.uint64(0xFFFF_FFFF)

    def step(lanes: Lanes) -> None:
        address = lanes.values[source]
        if not window:
            lanes.values[result][...] = address
        elif to_space:
            np.bitwise_and(address, low, lanes.values[result])
        else:
            np.bitwise_or(address, window, lanes.values[result])

    return step


def _nothing(lanes: Lanes) -> None:
    pass


@instruction(
    "membar", "fence", "prefetch", "prefetchu", "nanosleep", "discard", "createpolicy", "griddepcontrol",
    "applypriority", "setmaxnreg", "pmevent",
)  # fmt: skip
def make_nothing(builder: Builder, ins: Instruction) -> Step:
    """Hints, and fences, which lock step needs none of. A policy's register keeps its pattern: it is not read."""
    return _nothing


def _stop(what: str, lanes: Lanes) -> None:
    raise PtxError(what.format(lanes=lanes.count))


@instruction("trap", "brkpt")
def make_trap(builder: Builder, ins: Instruction) -> Step:
    return partial(_stop, "trap in {lanes} lanes")


@instruction("call")
def make_foreign_call(builder: Builder, ins: Instruction) -> Step:
    """Calls of functions with a body are inlined; these are of functions without one."""
    if "__assertfail" in ins.operands:
        return partial(_stop, "device assertion failed in {lanes} lanes")
    if "vprintf" in ins.operands:
        return _nothing
    raise builder.error()
