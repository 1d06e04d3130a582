"""The CUDA operators on the CPU: the real plan of launches (csrc/cuda/plan.cpp), and the kernels' real PTX in the
interpreter of tests/ptx. A device of its own: tensors are uploaded before a call, and what may be written comes back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from ptx import Memory, run
from torch import Tensor

from emulated import build
from pace_kernels.backend import Backend
from pace_kernels.definitions import DEFINITIONS
from pace_kernels.definitions.kit import Definition, Operand

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
GARBAGE = 0xA5  # what a workspace holds before anything is written to it


RULES = {op.removesuffix("_").removesuffix("_step"): op for op in DEFINITIONS}


def kernel_name(call: dict[str, Any]) -> str:
    """The name of a launch's kernel, as :func:`build.kernels` has it."""
    definition = DEFINITIONS[RULES[call["rule"]]]
    if call["kind"] == "sweep":
        x, g = (f"pace::{name}" for name in call["formats"])
        of_role = {"weight": x, "copy": x, "gradient": g, "moment": g, "state": "pace::Float32"}
        formats = ",".join(of_role[operand.role] for operand in definition.operands)
        return f"pace::sweep_kernel<pace::{definition.name}<{call['flags']}u>,{formats}>"
    if call["kind"] == "sum":
        return f"pace::sum_kernel<pace::{'Mada' if call['rule'] == 'mada' else 'Pace'}Row>"
    if call["kind"] == "scalars":
        return f"pace::scalars_kernel<pace::{definition.name}Rule>"
    return "pace::learn_kernel"


def as_array(tensor: Tensor) -> np.ndarray:
    flat = tensor.detach().reshape(-1)
    return flat.view(torch.int16).numpy().view(np.uint16) if tensor.element_size() == 2 else flat.numpy()


@dataclass
class Device:
    """Runs plans. ``rng`` shuffles the blocks of every launch; with ``warp_serial`` one warp runs at a time, up to its
    next barrier. ``misalign`` puts every operand that many bytes behind a multiple of 256."""

    arch: str = build.ptx_archs()[0]
    rng: np.random.Generator | None = None
    warp_serial: bool = False
    misalign: int = 0
    launches: list[str] = field(default_factory=list)  # names of kernels
    # Bytes moved, by (family of the kernel, name of the operand, "ld" or "st").
    moved: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    widths: Counter[tuple[str, str, int]] = field(default_factory=Counter)  # by (family, "ld" or "st", access)

    @property
    def plan(self) -> Any:
        return build.plan_module()

    @contextmanager
    def in_place_of_the_cpu(self) -> Iterator[Device]:
        """Whatever the front-end asks of a backend, it gets from here."""
        with (
            mock.patch.object(Backend, "op", lambda _, name: getattr(self, name)),
            mock.patch.object(Backend, "keeps_plans", False),  # those of the CPU would take the next steps there
        ):
            yield self

    def __getattr__(self, name: str) -> Any:
        if name not in DEFINITIONS:
            raise AttributeError(name)
        return partial(self._step_of, DEFINITIONS[name])

    # ---- memory ----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self.memory = Memory()
        self.uploaded: list[tuple[Tensor, int]] = []
        self.names: dict[int, str] = {}  # by address
        self.skipped = False

    def _up(self, name: str, tensor: Tensor | None, written: bool = True, aligned: bool = False) -> int | None:
        if tensor is None:
            return None
        if tensor.numel() == 0:
            return None  # as torch has it
        shift = 0 if aligned else self.misalign // tensor.element_size() * tensor.element_size()
        address = self.memory.upload(as_array(tensor), readonly=not written, misalign=shift)
        self.names[address] = name
        if written:
            self.uploaded.append((tensor, address))
        return address

    def _small(self, name: str, tensor: Tensor | None, written: bool = True) -> int | None:
        return self._up(name, tensor, written, aligned=True)

    def _workspace(self, size: int) -> int:
        address = self.memory.upload(np.full(max(size, 1), GARBAGE, np.uint8))
        self.names[address] = "workspace"
        return address

    def _unwritten_words(self) -> int:
        """Of the call's workspaces: what compute-sanitizer's initcheck would find to be read, since all of it is."""
        contents = [self.memory.download(a) for a, name in self.names.items() if name == "workspace"]
        garbage = int.from_bytes(bytes([GARBAGE]) * 4, "little")
        return sum(int((c.view(np.uint32) == garbage).sum()) for c in contents if c.size % 4 == 0)

    def _run(self, calls: list[dict[str, Any]]) -> None:
        for call in calls:
            name = kernel_name(call)
            self.launches.append(name)
            text, entry = build.kernels(self.arch)[name]
            done = run(
                text,
                entry,
                call["blocks"],
                call["threads"],
                [call["parameters"]],
                self.memory,
                order=self.rng,
                warp_serial=self.rng if self.warp_serial else None,
            )
            family = call["rule"] if call["kind"] == "sweep" else f"{call['rule']}_{call['kind']}"
            for kind in ("ld", "st"):
                for address, count in done[f"{kind}_bytes_by_buffer"].items():
                    self.moved[family, self.names[address], kind] += count
                for width, count in done[f"{kind}_bytes_by_width"].items():
                    self.widths[family, kind, width] += count
        assert self.skipped or not self._unwritten_words()
        for tensor, address in self.uploaded:
            out = torch.from_numpy(np.ascontiguousarray(self.memory.download(address)))
            if tensor.element_size() == 2:
                out = out.view(torch.int16).view(tensor.dtype)
            tensor.detach().copy_(out.view(tensor.shape))

    # ---- operators -------------------------------------------------------------------------------------------------

    def _step_of(self, definition: Definition, *arguments: Any, **named: Any) -> None:
        self._begin()
        lists, optional = [e.list for e in definition.lists], definition.optional_tensors
        given: dict[str, Any] = dict.fromkeys(optional) | dict(
            zip((*lists, "steps", *optional), arguments, strict=False)
        )
        given |= {name: named.pop(name) for name in list(named) if name in given or name == "steps"}
        on_device, found_inf = named["capturable"], given["found_inf"]
        given["capturable"] = on_device
        assert on_device or found_inf is None  # as the operator requires
        self.skipped = found_inf is not None and bool(found_inf)
        # The pullback of nothing reads its weights alone.
        written = "gain" not in named or bool(named["lambda_pullback"] if named["gain"] is None else named["gain"])
        tensors = [self._tensor(definition, given, i, written) for i in range(len(given["params"]))]
        lr, extras = given["lr_tensor"], definition.extras
        request: dict[str, Any] = dict.fromkeys(("grad_scale", "clip_coef", "numbers", "result"))
        request |= {name: self._small(name, given[name], False) for name in ("lr_tensor", *definition.scaling)}
        for extra in extras:
            place = "result" if extra.written else "numbers"
            request[place] = self._small(place, given[extra.name], extra.written)
        request["lr_is_double"] = lr is not None and lr.dtype == torch.float64
        request["lists"] = sum(bool(given[operand.list]) << k for k, operand in enumerate(definition.operands))
        self._run(getattr(self.plan, definition.op)(tensors, named, request, self._workspace))
        if not on_device:
            for step in given["steps"]:
                step += 1

    def _tensor(self, definition: Definition, given: dict[str, Any], i: int, stepped: bool) -> dict[str, Any]:
        param, step = given["params"][i], given["steps"][i]
        formats = {"x_format": DTYPES[param.dtype], "g_format": DTYPES[param.dtype]}
        operands: list[int | None] = []
        row = None
        for entry in definition.lists:
            if not given[entry.list]:
                operands += [None] if isinstance(entry, Operand) else []
            elif not isinstance(entry, Operand):
                row = self._small("row", given[entry.list][i])
            else:
                tensor = given[entry.list][i]
                written = entry.mutable and (entry.role != "weight" or stepped)
                operands.append(self._up(entry.symbol, tensor, written))
                if entry.role in ("gradient", "moment"):
                    formats["g_format"] = DTYPES[tensor.dtype]
        counted = {"step": None, "steps_taken": step.item()}
        if given["capturable"]:  # the address's lowest bit is set where it is float64
            address = (self._small("step", step) or 0) | (step.dtype == torch.float64)
            counted = {"step": address, "steps_taken": 0.0}
        return {"operands": operands, "row": row, "numel": param.numel(), **formats, **counted}

    def mada_learn_(
        self,
        coefficients: Tensor,
        momenta: Tensor,
        hypergradients: Tensor,
        hyper_step: Tensor,
        sums: list[Tensor],
        found_inf: Tensor | None = None,
        **options: Any,
    ) -> None:
        self._begin()
        request = {
            "sums": [self._small("sums", row, False) for row in sums],
            "coefficients": self._small("coefficients", coefficients),
            "momenta": self._small("momenta", momenta),
            "hypergradients": self._small("hypergradients", hypergradients),
            "hyper_step": self._small("hyper_step", hyper_step),
            "found_inf": self._small("found_inf", found_inf, False),
            **options,
        }
        self._run(self.plan.learn(request))
