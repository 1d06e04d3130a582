"""The CUDA operators on the CPU: the real plan of launches (csrc/cuda/plan.cpp), and the kernels' real PTX in the
interpreter of tests/ptx. A device of its own: tensors are uploaded before a call, and what may be written comes back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from ptx import Memory, run
from torch import Tensor

from emulated import build
from pace_kernels.backend import Backend
from pace_kernels.ops import MADA_STATES

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
GARBAGE = 0xA5  # what a workspace holds before anything is written to it


def kernel_name(call: dict[str, Any]) -> str:
    """The name of a launch's kernel, as :func:`build.kernels` has it."""
    family = call["family"]
    formats = [f"pace::{name}" for name in call["formats"]]
    if family in ("pace", "mada", "pullback"):
        flags = [str(flag).lower() for flag in call[f"{family}_flags"]]
        return f"pace::{family}_kernel<{','.join(formats + flags)}>"
    if family == "schedule_free":
        return f"pace::schedule_free_kernel<{','.join(formats)}>"
    if family.endswith("_sum"):
        return f"pace::sum_kernel<pace::{family.split('_')[0].capitalize()}Row>"
    return f"pace::{family}_kernel"


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
            for kind in ("ld", "st"):
                for address, count in done[f"{kind}_bytes_by_buffer"].items():
                    self.moved[call["family"], self.names[address], kind] += count
                for width, count in done[f"{kind}_bytes_by_width"].items():
                    self.widths[call["family"], kind, width] += count
        assert self.skipped or not self._unwritten_words()
        for tensor, address in self.uploaded:
            out = torch.from_numpy(np.ascontiguousarray(self.memory.download(address)))
            if tensor.element_size() == 2:
                out = out.view(torch.int16).view(tensor.dtype)
            tensor.detach().copy_(out.view(tensor.shape))

    # ---- operators -------------------------------------------------------------------------------------------------

    def _request(self, tensors: dict[str, Tensor | None], result: Tensor | None) -> dict[str, Any]:
        lr, found_inf = tensors.get("lr_tensor"), tensors.get("found_inf")
        self.skipped = found_inf is not None and bool(found_inf)
        names = ("grad_scale", "clip_coef", "found_inf", "lr_tensor")
        request: dict[str, Any] = {name: self._small(name, tensors.get(name), False) for name in names}
        request["lr_is_double"] = lr is not None and lr.dtype == torch.float64
        request["result"] = self._small("result", result)
        return request

    def _step(self, step: Tensor, on_device: bool) -> dict[str, Any]:
        """Its address, the lowest bit set where it is float64, or its value."""
        if not on_device:
            return {"step": None, "steps_taken": step.item()}
        return {"step": (self._small("step", step) or 0) | (step.dtype == torch.float64), "steps_taken": 0.0}

    def _count(self, steps: list[Tensor], on_device: bool) -> None:
        if not on_device:
            for step in steps:
                step += 1

    def pace_step_(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        emas: list[Tensor],
        steps: list[Tensor],
        stats: Tensor | None = None,
        lr_tensor: Tensor | None = None,
        grad_scale: Tensor | None = None,
        clip_coef: Tensor | None = None,
        found_inf: Tensor | None = None,
        **options: Any,
    ) -> None:
        self._begin()
        moment = options["beta1"] != 0.0
        on_device = options["capturable"]
        assert on_device or found_inf is None  # as the operator requires
        tensors = [
            {
                "x": self._up("x", param),
                "g": self._up("g", grads[i], False),
                "m": self._up("m", exp_avgs[i]) if moment else None,
                "v": self._up("v", exp_avg_sqs[i]),
                "e": self._up("e", emas[i]) if emas else None,
                "x_format": DTYPES[param.dtype],
                "g_format": DTYPES[grads[i].dtype],
                "numel": param.numel(),
                **self._step(steps[i], on_device),
            }
            for i, param in enumerate(params)
        ]
        given = {"lr_tensor": lr_tensor, "grad_scale": grad_scale, "clip_coef": clip_coef, "found_inf": found_inf}
        request = self._request(given, stats) | {"average": bool(emas)}
        self._run(self.plan.pace(tensors, options, request, self._workspace))
        self._count(steps, on_device)

    def mada_step_(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        *lists: Any,
        **options: Any,
    ) -> None:
        self._begin()
        optional = ("coefficients", "hypergradients", "lr_tensor", "grad_scale", "clip_coef", "found_inf")
        given = dict(zip((*MADA_STATES, *optional), lists, strict=False))
        given |= {k: options.pop(k) for k in optional if k in options}
        on_device = options["capturable"]
        assert on_device or given.get("found_inf") is None
        names = {
            "m": "exp_avgs", "v": "exp_avg_sqs", "n": "exp_avg_diffs", "w": "second_exp_avg_sqs",
            "l": "exp_avg_lions", "last_g": "last_grads", "older_g": "older_grads", "e": "emas",
        }  # fmt: skip
        tensors = [
            {
                "x": self._up("x", param),
                "g": self._up("g", grads[i], False),
                **{k: self._up(k, given[name][i]) if given[name] else None for k, name in names.items()},
                "last": self._small("last", given["last_scalars"][i]) if given["last_scalars"] else None,
                "x_format": DTYPES[param.dtype],
                "g_format": DTYPES[grads[i].dtype],
                "numel": param.numel(),
                **self._step(given["steps"][i], on_device),
            }
            for i, param in enumerate(params)
        ]
        request = self._request(given, given.get("hypergradients"))
        in_play = {"diff": "n", "second": "w", "lion": "l", "adam": "v"}
        request |= {flag: bool(given[names[operand]]) for flag, operand in in_play.items()}
        request["coefficients"] = self._small("coefficients", given.get("coefficients"), False)
        self._run(self.plan.mada(tensors, options, request, self._workspace))
        self._count(given["steps"], on_device)

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

    def pullback_(
        self,
        params: list[Tensor],
        befores: list[Tensor],
        second_moments: list[Tensor],
        emas: list[Tensor],
        steps: list[Tensor],
        stats: Tensor | None = None,
        lr_tensor: Tensor | None = None,
        found_inf: Tensor | None = None,
        **options: Any,
    ) -> None:
        self._begin()
        on_device = options["capturable"]
        assert on_device or found_inf is None
        written = bool(options["lambda_pullback"] if options["gain"] is None else options["gain"])
        tensors = [
            {
                "x": self._up("x", param, written),
                "before": self._up("before", befores[i], False) if befores else None,
                "v": self._up("v", second_moments[i], False) if second_moments else None,
                "e": self._up("e", emas[i]),
                "x_format": DTYPES[param.dtype],
                "g_format": DTYPES[(second_moments[i] if second_moments else param).dtype],
                "numel": param.numel(),
                **self._step(steps[i], on_device),
            }
            for i, param in enumerate(params)
        ]
        request = self._request({"lr_tensor": lr_tensor, "found_inf": found_inf}, stats)
        request |= {"before": bool(befores), "moment": bool(second_moments)}
        self._run(self.plan.pullback(tensors, options, request, self._workspace))
        self._count(steps, on_device)

    def schedule_free_step_(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avg_sqs: list[Tensor],
        zs: list[Tensor],
        steps: list[Tensor],
        schedule: Tensor | None = None,
        lr_tensor: Tensor | None = None,
        grad_scale: Tensor | None = None,
        clip_coef: Tensor | None = None,
        found_inf: Tensor | None = None,
        **options: Any,
    ) -> None:
        self._begin()
        on_device = options["capturable"]
        assert on_device or found_inf is None
        tensors = [
            {
                "y": self._up("y", param),
                "g": self._up("g", grads[i], False),
                "v": self._up("v", exp_avg_sqs[i]),
                "z": self._up("z", zs[i]),
                "x_format": DTYPES[param.dtype],
                "g_format": DTYPES[grads[i].dtype],
                "numel": param.numel(),
                **self._step(steps[i], on_device),
            }
            for i, param in enumerate(params)
        ]
        given = {"lr_tensor": lr_tensor, "grad_scale": grad_scale, "clip_coef": clip_coef, "found_inf": found_inf}
        request = self._request(given, None) | {"schedule": self._small("schedule", schedule, False)}
        self._run(self.plan.schedule_free(tensors, options, request, self._workspace))
        self._count(steps, on_device)
