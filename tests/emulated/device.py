"""The CUDA operators on the CPU: the real operators and the real plan of launches (csrc/cuda/ops.cpp and plan.cpp) on a
device whose memory is the CPU's (device.cpp beside this file), and the kernels' real PTX in the interpreter of
tests/ptx. The interpreter has a memory of its own: a launch's tensors are uploaded before it, and what may be written
comes back.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from ptx import Memory, run
from torch import Tensor

from emulated import build
from pace_kernels import _C
from pace_kernels.backend import Backend, backends
from pace_kernels.definitions import DEFINITIONS

GARBAGE = 0xA5  # what device.cpp fills memory with before anything is written to it
PLAN_OPS = ("plan_add_", "plan_learn_", "plan_step_")
OPS = (*DEFINITIONS, "mada_learn_", *PLAN_OPS)
# Arrays, which may lie at any multiple of their elements: operands, and what lies beside them.
ARRAYS = {operand.symbol for definition in DEFINITIONS.values() for operand in definition.operands}
ARRAYS |= {name for definition in DEFINITIONS.values() for name in definition.beside}
_NAMESPACE = torch.library.Library("pace_emulated", "DEF")
for _name in OPS:
    _NAMESPACE.define(str(getattr(torch.ops.pace_kernels, _name).default._schema).removeprefix("pace_kernels::"))


RULES = {op.removesuffix("_").removesuffix("_step"): op for op in DEFINITIONS}


# In their order in csrc/storage.h.
FORMATS = ("Float32", "BFloat16", "Float16", "Dithered16", "Pair24", "Pair32", "Moment8", "Square8", "Grid8", "Grid16")


def coded_formats(x: str, e: str, flags: int) -> str:
    """The formats that a kernel of codes is compiled for, as C++ demangles them."""
    average = flags >> DEFINITIONS["pace_step_"].flags.index("average") & 1
    numbers = [f"(pace::Format){FORMATS.index(name)}" for name in (x, e)]
    return f"pace::Known<{numbers[0]},{'true' if average else 'false'},{numbers[1]}>"


def kernel_name(call: dict[str, Any]) -> str:
    """The name of a launch's kernel, as :func:`build.kernels` has it."""
    definition = DEFINITIONS[RULES[call["rule"]]]
    if call["kind"] == "sweep":
        x, g = (f"pace::{name}" for name in call["formats"])
        of_role = {"weight": x, "copy": x, "gradient": g, "moment": g, "state": "pace::Float32"}
        formats = ",".join(of_role[operand.role] for operand in definition.operands)
        return f"pace::sweep_kernel<pace::{definition.name}<{call['flags']}u>,{formats}>"
    if call["kind"] == "coded" and call["rule"] != "pace":
        return f"pace::general_kernel<pace::{definition.name},{call['group']}>"
    if call["kind"] == "coded":
        formats = coded_formats(call["formats"][0], call["e"], call["flags"]) if call["known"] else "pace::Any"
        stats = call["flags"] >> definition.flags.index("stats") & 1
        return f"pace::coded_kernel<{formats},{'true' if stats else 'false'}>"
    if call["kind"] == "sum":
        return f"pace::sum_kernel<pace::{'Mada' if call['rule'] == 'mada' else 'Pace'}Row>"
    if call["kind"] == "scalars":
        return f"pace::scalars_kernel<pace::{definition.name}Rule>"
    return "pace::learn_kernel"


_LAUNCH = ctypes.CFUNCTYPE(
    *(ctypes.c_int, *[ctypes.c_char_p] * 5, ctypes.c_int, ctypes.c_uint, ctypes.c_int, ctypes.c_int64, ctypes.c_int),
    *(ctypes.c_void_p, ctypes.c_size_t),
)
_running: list[Device] = []  # the device whose operator runs


@_LAUNCH
def _launch(*arguments: Any) -> int:
    kind, rule, x, g, e = (text.decode() for text in arguments[:5])
    known, flags, group, blocks, threads, parameters, size = arguments[5:]
    call = {"kind": kind, "rule": rule, "formats": (x, g), "e": e, "known": bool(known), "flags": flags}
    call |= {"group": group, "blocks": blocks, "threads": threads}
    try:
        _running[-1]._launched({**call, "parameters": ctypes.string_at(parameters, size)})
    except BaseException as error:  # which can't pass through C++
        _running[-1].failure = error
        return 1
    return 0


@cache
def library() -> ctypes.CDLL:
    found = build.operators()
    found.emulated_set_launch(_launch)
    found.emulated_new_plan.restype = found.emulated_allocated.restype = ctypes.c_int64
    found.emulated_allocated.argtypes = [ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)]
    found.emulated_drop_plan.argtypes = [ctypes.c_int64]
    found.emulated_call_plan.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.POINTER(ctypes.c_double), ctypes.c_size_t]
    found.emulated_call_plan.restype = ctypes.c_char_p
    return found


class Plan:
    """As ``pace_kernels._cuda.Plan``."""

    changed_groups, gradients = staticmethod(_C.Plan.changed_groups), staticmethod(_C.Plan.gradients)
    holds_states, versions, put = map(staticmethod, (_C.Plan.holds_states, _C.Plan.versions, _C.Plan.put))

    def __init__(self, device: Device) -> None:
        self.handle, self._device = library().emulated_new_plan(), device

    def before(self, options: Sequence[float]) -> None:
        self._device._run("Plan.before", {"plan": self.handle}, partial(self._call, True, options))

    def step(self, options: Sequence[float]) -> None:
        self._device._run("Plan.step", {"plan": self.handle}, partial(self._call, False, options))

    def _call(self, before: bool, options: Sequence[float]) -> None:
        numbers = (ctypes.c_double * len(options))(*options)
        if (failure := library().emulated_call_plan(self.handle, before, numbers, len(options))) is not None:
            raise RuntimeError(failure.decode())

    def __del__(self) -> None:
        library().emulated_drop_plan(self.handle)


def bytes_at(address: int, size: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


@dataclass
class Operand:
    """A tensor of a call, or memory that the operator took: where it lies in the CPU's memory."""

    name: str
    address: int
    size: int
    written: bool
    item: int = 0  # bytes of an element of an array; 0: none that may lie askew
    there: int = 0  # its address in the interpreter's memory


def _operand(name: str, tensor: Any, written: bool) -> Iterator[Operand]:
    """Nothing where there is no memory, or where kernels walk a copy: of a tensor with gaps."""
    if not isinstance(tensor, Tensor) or tensor.numel() == 0:
        return
    extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if extent == tensor.numel():
        item = tensor.element_size() if name in ARRAYS else 0
        yield Operand(name, tensor.data_ptr(), tensor.numel() * tensor.element_size(), written, item)


def translated(parameters: bytes, operands: list[Operand]) -> bytes:
    """A launch's parameters with the addresses that the operands have in the interpreter's memory, sorted by
    address. Tensors are passed by where they begin, or one more (`StepAddress`), workspaces by any place in them.
    Not any number in such a range is an address: padding has what was on the stack, of other addresses too, and a
    switch beside it would be changed with it."""
    words = np.frombuffer(parameters + bytes(-len(parameters) % 8), np.uint64).copy()
    starts = np.array([operand.address for operand in operands], np.uint64)
    sizes = np.array([operand.size if operand.name == "workspace" else 2 for operand in operands], np.uint64)
    there = np.array([operand.there for operand in operands], np.uint64)
    if starts.size:
        k = np.searchsorted(starts, words, "right").astype(np.int64) - 1
        known = np.maximum(k, 0)
        inside = (k >= 0) & (words - starts[known] < sizes[known])
        words[inside] += there[k[inside]] - starts[k[inside]]
    return words.tobytes()[: len(parameters)]


@dataclass
class Device:
    """Runs operators. ``rng`` shuffles the blocks of every launch; with ``warp_serial`` one warp runs at a time, up to
    its next barrier. ``misalign`` puts every array, or those named ``askew``, that many bytes behind a multiple of
    256."""

    arch: str = build.ptx_archs()[0]
    rng: np.random.Generator | None = None
    warp_serial: bool = False
    misalign: int = 0
    askew: Collection[str] = frozenset(ARRAYS)
    launches: list[str] = field(default_factory=list)  # names of kernels
    calls: Counter[str] = field(default_factory=Counter)  # of operators
    # Bytes moved, by (family of the kernel, name of the operand, "ld" or "st").
    moved: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    widths: Counter[tuple[str, str, int]] = field(default_factory=Counter)  # by (family, "ld" or "st", access)
    kept: dict[int, list[Operand]] = field(default_factory=dict)  # operands of plans, by handle
    failure: BaseException | None = None

    @contextmanager
    def in_place_of_the_cpu(self, plans: bool = True) -> Iterator[Device]:
        """Whatever the front-end asks of a backend, it gets from here."""
        backends()  # rows are made before they are patched
        with (
            mock.patch.object(Backend, "name", property(lambda _: "cuda"), create=True),
            mock.patch.object(Backend, "op", lambda _, name: getattr(self, name)),
            mock.patch.object(Backend, "new_plan", lambda _: Plan(self)),
            mock.patch.object(Backend, "keeps_plans", plans),
        ):
            yield self

    def __getattr__(self, name: str) -> Any:
        if name not in OPS:
            raise AttributeError(name)
        return lambda *arguments, **named: self._call(name, *arguments, **named)  # no partial: plans look into those

    # ---- operators --------------------------------------------------------------------------------------------------

    def _call(self, name: str, *arguments: Any, **named: Any) -> None:
        library()
        op = getattr(torch.ops.pace_emulated, name).default
        given = dict(zip((argument.name for argument in op._schema.arguments), arguments, strict=False)) | named
        self._run(name, given, partial(op, *arguments, **named))

    def _run(self, name: str, given: dict[str, Any], call: Callable[[], None]) -> None:
        self.calls[name] += 1
        self.operands = [*self._operands(name, given), *self.kept.get(given.get("plan", -1), [])]
        if name in ("plan_add_", "plan_learn_"):
            self.kept[given["plan"]] = self.operands
        found_inf = given.get("found_inf")
        skipped = found_inf is not None and bool(found_inf)
        self.failure = None
        _running.append(self)
        try:
            call()
            assert skipped or not self._unwritten_words()
        except RuntimeError as error:
            raise (self.failure or error) from None
        finally:
            _running.pop()
            library().emulated_free()

    def _operands(self, name: str, given: dict[str, Any]) -> Iterator[Operand]:
        """The tensors of a call by the names of the definitions."""
        if name in PLAN_OPS or name.startswith("Plan."):
            yield from self._of_plan(name, given)
            return
        definition = DEFINITIONS.get(name)
        symbols = {} if definition is None else {entry.list: entry for entry in definition.lists}
        # The pullback of nothing reads its weights alone.
        reads = name == "pullback_" and not (given["lambda_pullback"] if given["gain"] is None else given["gain"])
        for argument in getattr(torch.ops.pace_emulated, name).default._schema.arguments:
            value, alias = given.get(argument.name), argument.alias_info
            written = alias is not None and alias.is_write and not (reads and argument.name == "params")
            entry = symbols.get(argument.name)
            label = getattr(entry, "symbol", "row") if entry is not None else argument.name
            for tensor in value if isinstance(value, list) else [value]:
                yield from _operand(label, tensor, written)

    def _of_plan(self, name: str, given: dict[str, Any]) -> Iterator[Operand]:
        if name == "plan_add_":
            definition = DEFINITIONS[given["rule"]]
            fresh = definition.lists_of("gradient")
            tensors = iter(given["tensors"])
            labels = [getattr(entry, "symbol", "row") for entry in definition.lists]
            names = [entry.list for entry in definition.lists]
            for name, label, length in zip(
                [*names, "steps", *definition.beside],
                [*labels, "steps", *definition.beside],
                given["lengths"],
                strict=False,
            ):
                if name in fresh:
                    continue
                for _ in range(length):
                    yield from _operand(label, next(tensors), True)
        for label in ("extras", "learned", "fresh"):
            for tensor in given.get(label, ()):
                yield from _operand("g" if label == "fresh" else label, tensor, label != "fresh")
        for label in ("grad_scale", "clip_coef", "found_inf"):
            yield from _operand(label, given.get(label), False)

    # ---- launches ---------------------------------------------------------------------------------------------------

    def _workspaces(self) -> Iterator[Operand]:
        for k in range(1 << 30):
            address = ctypes.c_void_p()
            size = library().emulated_allocated(k, ctypes.byref(address))
            if size < 0:
                return
            if size > 0:
                yield Operand("workspace", address.value or 0, size, True)

    def _unwritten_words(self) -> int:
        """Of the call's workspaces: what compute-sanitizer's initcheck would find to be read, since all of it is."""
        garbage = int.from_bytes(bytes([GARBAGE]) * 4, "little")
        contents = [bytes_at(w.address, w.size) for w in self._workspaces() if w.size % 4 == 0]
        return sum(int((c.view(np.uint32) == garbage).sum()) for c in contents)

    def _launched(self, call: dict[str, Any]) -> None:
        name = kernel_name(call)
        self.launches.append(name)
        memory = Memory()
        operands = sorted([*self.operands, *self._workspaces()], key=lambda operand: operand.address)
        for operand in operands:
            is_askew = operand.item > 0 and operand.name in self.askew
            shift = self.misalign // operand.item * operand.item if is_askew else 0
            contents = bytes_at(operand.address, operand.size)
            operand.there = memory.upload(contents, readonly=not operand.written, misalign=shift)
        names = {operand.there: operand.name for operand in operands}
        text, entry = build.kernels(self.arch)[name]
        parameters = [translated(call["parameters"], operands)]
        serial = self.rng if self.warp_serial else None
        done = run(text, entry, call["blocks"], call["threads"], parameters, memory, order=self.rng, warp_serial=serial)
        family = call["rule"] if call["kind"] in ("sweep", "coded") else f"{call['rule']}_{call['kind']}"
        for kind in ("ld", "st"):
            for address, count in done[f"{kind}_bytes_by_buffer"].items():
                self.moved[family, names[address], kind] += count
            for width, count in done[f"{kind}_bytes_by_width"].items():
                self.widths[family, kind, width] += count
        for operand in operands:
            if operand.written:
                bytes_at(operand.address, operand.size)[:] = memory.download(operand.there)
