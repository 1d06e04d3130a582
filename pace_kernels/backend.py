"""Backends are rows of a table: what computes, on which devices, for which dtypes, and why not, where it is missing.

A backend that is asked for by name (the ``backend`` argument of an optimizer, or the environment variable
``PACE_BACKEND``) works or raises its reason. Only the automatic choice may fall back: it takes the first row of the
table that is available and covers the parameter.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import torch_rules


@dataclass(frozen=True)
class Backend:
    """One row. ``devices`` and ``dtypes`` are what it covers; None means everything that torch has."""

    name: str
    available: bool
    reason: str | None
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend can't step a parameter on ``device`` in ``dtype``; None where it can."""
        if not self.available:
            return self.reason
        if self.devices is not None and device.type not in self.devices:
            return f"it covers parameters on {', '.join(self.devices)}, not on {device.type}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"it covers {', '.join(str(d) for d in self.dtypes)}, not {dtype}"
        return None

    def op(self, name: str) -> Callable[..., None]:
        """The function that does the operator ``name`` (pace_kernels/ops.py) on this backend."""
        if self.name == "torch":
            return getattr(torch_rules, name)  # type: ignore[no-any-return]
        return getattr(torch.ops.pace_kernels, name).default  # type: ignore[no-any-return]


def _native_cpu() -> Backend:
    try:
        from . import _C
    except ImportError as error:
        reason = f"the native extension is not built or does not load ({error}); reinstall with a C++ compiler"
        return Backend("cpu", False, reason)
    try:
        _C.cpu_isa()
    except RuntimeError as error:
        return Backend("cpu", False, str(error))
    return Backend("cpu", True, None, ("cpu",), (torch.float32, torch.bfloat16, torch.float16))


@functools.cache
def _table() -> dict[str, Backend]:
    rows = (
        Backend("cuda", False, "CUDA kernels are not part of this version"),
        Backend("triton", False, "Triton kernels are not part of this version"),
        _native_cpu(),
        Backend("torch", True, None),
    )
    return {row.name: row for row in rows}


def backends() -> dict[str, Backend]:
    """The table, fastest first: a dict from the name (cuda, triton, cpu, torch) to a row.

    A row has ``available`` (bool) and ``reason`` (str: why it is not available; None where it is).

    >>> backends()["torch"].available
    True
    """
    return dict(_table())


def requested(name: str | None) -> str | None:
    """The backend asked for by the argument, else by PACE_BACKEND; None means automatic. Unknown or missing: raises."""
    source = "backend" if name is not None else "PACE_BACKEND"
    name = name if name is not None else os.environ.get("PACE_BACKEND") or None
    if name is None:
        return None
    if name not in _table():
        raise ValueError(f"{source} must be one of {', '.join(_table())}, got {name!r}")
    if not _table()[name].available:
        raise RuntimeError(f"{source}={name!r} is not available: {_table()[name].reason}")
    return name


@functools.cache
def choose(name: str | None, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend for a parameter on ``device`` in ``dtype``: the one of that name, or the fastest that covers it."""
    if name is not None:
        row = _table()[name]
        if (why := row.refusal(device, dtype)) is not None:
            raise RuntimeError(f"backend={name!r} can't step this parameter: {why}")
        return row
    row = next(row for row in _table().values() if row.refusal(device, dtype) is None)
    if row.name == "torch" and device.type == "cpu" and not _table()["cpu"].available:
        _say_once(f"pace_kernels computes through torch, more slowly: {_table()['cpu'].reason}")
    return row


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def describe() -> dict[str, Any]:
    """What a benchmark or a bug report needs: the instruction set of the CPU kernels and the state of each backend."""
    cpu_isa = None
    if _table()["cpu"].available:
        from . import _C

        cpu_isa = _C.cpu_isa()
    return {"cpu_isa": cpu_isa, "backends": {n: row.reason or "available" for n, row in _table().items()}}
