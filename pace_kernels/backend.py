"""Backends are rows of a table: what computes, on which devices, for which dtypes, and why one is not available.

A backend that is asked for by name (the ``backend`` argument of an optimizer, or the environment variable
``PACE_BACKEND``) works or raises its reason. Only the automatic choice may fall back: it takes the first row of the
table that is available and covers the parameter.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from . import torch_rules

BackendName: TypeAlias = Literal["cpu", "cuda", "triton", "torch"]


@dataclass(frozen=True)
class Backend:
    """One row. ``devices`` and ``dtypes`` are what it covers; None means everything that torch has. ``only_by_name``
    are devices that it covers too, but that the automatic choice does not give it."""

    name: str
    available: bool
    reason: str | None
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    architectures: str | None = None  # compute capabilities that the kernels were compiled for
    only_by_name: tuple[str, ...] = ()

    def refusal(self, device: torch.device, dtype: torch.dtype, by_name: bool = False) -> str | None:
        """Why this backend can't step a parameter on ``device`` in ``dtype``; None if it can."""
        if not self.available:
            return self.reason
        devices = self.devices
        if devices is not None and by_name:
            devices = (*devices, *self.only_by_name)
        if devices is not None and device.type not in devices:
            return f"it covers parameters on {', '.join(devices)}, not on {device.type}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"it covers {', '.join(str(d) for d in self.dtypes)}, not {dtype}"
        if self.architectures is not None and device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            if not runs_on(self.architectures, capability):
                return f"it was built for {self.architectures}, not for {capability[0]}.{capability[1]}"
        return None

    @property
    def keeps_plans(self) -> bool:
        """Whether its operators keep the calls of a step for the next one (planning.py)."""
        return self.name in _LIBRARIES

    def new_plan(self) -> Any:
        """An object whose ``handle`` names a plan to the operators; the plan goes when the object does."""
        return importlib.import_module(_LIBRARIES[self.name], __package__).Plan()

    def op(self, name: str) -> Callable[..., None]:
        """The function that does the operator ``name`` (pace_kernels/ops.py) on this backend."""
        if self.name == "torch":
            return getattr(torch_rules, name)  # type: ignore[no-any-return]
        if self.name == "triton":
            # Only now: importing Triton takes longer than all the rest.
            return getattr(importlib.import_module(".triton_kernels", __package__), name)  # type: ignore[no-any-return]
        return getattr(torch.ops.pace_kernels, name).default  # type: ignore[no-any-return]


# GPUs on one chip with the CPU, for which NVIDIA compiles apart (CUDA C++ Programming Guide, binary compatibility).
_TEGRA = {(5, 3), (6, 2), (7, 2), (8, 7), (11, 0)}


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether kernels for ``architectures`` ("8.0;9.0+PTX") run on a GPU of that compute capability: machine code does
    within a major version from its minor one on, but not on a Tegra that it was not made for; PTX on everything
    later."""
    for entry in architectures.split(";"):
        major, minor = map(int, entry.removesuffix("+PTX").split("."))
        same = (major, minor) == capability
        if same or (major == capability[0] and minor <= capability[1] and capability not in _TEGRA):
            return True
        if entry.endswith("+PTX") and (major, minor) <= capability:
            return True
    return False


def _torch_too_old() -> str | None:
    """Why no native library of ours loads under this torch: they call its stable ABI of 2.10, and would end with
    "undefined symbol"."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10):
        return None
    return f"the native kernels need torch >= 2.10, and this is torch {torch.__version__}"


# For pip and for uv pip. Without these options the package that is installed, or one in the cache, would be kept.
_HOW_TO_BUILD = (
    '`pip install "setuptools>=77"`, then `pip install --no-build-isolation --force-reinstall --no-deps '
    "--no-cache-dir SOURCE`, where SOURCE is a clone or the address that the package came from"
)


def _why_missing(library: str, error: ImportError) -> str:
    """What the build wrote into the package on the library that it left out, or why the library does not load."""
    if importlib.util.find_spec(f"{__package__}.{library}") is not None:
        return f"does not load ({error})"
    try:
        why = json.loads(Path(__file__).with_name("_not_built.json").read_text())[library]
    except (OSError, ValueError, KeyError):
        why = str(error)
    return f"is not built: {why}"


def _native_cuda() -> Backend:
    if torch.version.cuda is None:
        return Backend("cuda", False, f"torch {torch.__version__} is not a CUDA build")
    reason: str | None = _torch_too_old()
    if reason is not None:
        return Backend("cuda", False, reason)
    try:
        from . import _cuda
    except ImportError as error:
        reason = f"the CUDA extension {_why_missing('_cuda', error)}. With PACE_CUDA=1, which builds it or fails: "
        return Backend("cuda", False, reason + _HOW_TO_BUILD)
    reason = _cuda.driver_refusal()
    if reason is not None:
        return Backend("cuda", False, reason)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return Backend("cuda", True, None, ("cuda",), dtypes, architectures=_cuda.architectures())


def _native_cpu() -> Backend:
    if (reason := _torch_too_old()) is not None:
        return Backend("cpu", False, reason)
    try:
        from . import _C
    except ImportError as error:
        reason = f"the native extension {_why_missing('_C', error)}. With torch >= 2.10 and a C++ compiler: "
        return Backend("cpu", False, reason + _HOW_TO_BUILD)
    try:
        _C.cpu_isa()
    except RuntimeError as error:
        return Backend("cpu", False, str(error))
    return Backend("cpu", True, None, ("cpu",), (torch.float32, torch.bfloat16, torch.float16))


def _triton() -> Backend:
    if importlib.util.find_spec("triton") is None:
        return Backend("triton", False, "the package triton is not installed")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    # Triton's interpreter, for tests: the kernels then run in NumPy, slowly, and on the CPU alone: a table of addresses
    # on a GPU means nothing there.
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y"):
        return Backend("triton", True, None, (), dtypes, only_by_name=("cpu",))
    built_for_gpus = torch.version.cuda is not None or torch.version.hip is not None
    if not (built_for_gpus and torch.cuda.is_available()):
        return Backend("triton", False, "there is no GPU that this torch can use")
    if not any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))):
        return Backend("triton", False, "Triton needs a C compiler for its launcher, and there is no cc, gcc or clang")
    # Not compiled ahead: any GPU that Triton supports and the kernels are meant for.
    architectures = None if torch.version.hip is not None else "8.0+PTX"
    return Backend("triton", True, None, ("cuda",), dtypes, architectures=architectures)


_LIBRARIES = {"cpu": "._C", "cuda": "._cuda"}  # of native operators
# By device: the backends that one would expect there, the fastest first.
_KERNELS = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}


@functools.cache
def _table() -> dict[str, Backend]:
    rows = (
        _native_cuda(),
        _triton(),
        _native_cpu(),
        Backend("torch", True, None),
    )
    return {row.name: row for row in rows}


def backends() -> dict[str, Backend]:
    """The table, fastest first: a dict from the name (cuda, triton, cpu, torch) to a row.

    A row has ``available`` (bool) and ``reason`` (str: why it is not available; None if it is).

    >>> from pace_kernels import backends
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
def choose(name: str | None, device: torch.device, dtype: torch.dtype, wrapper: bool = False) -> Backend:
    """The backend for a parameter on ``device`` in ``dtype``: the one of that name, or the fastest that covers it. For
    tensors that do operations in their own way (``wrapper``), only the backend torch works."""
    if wrapper:
        if name not in (None, "torch"):
            raise RuntimeError(f"backend={name!r} can't step this parameter: it is a tensor subclass that wraps others")
        return _table()["torch"]
    if name is not None:
        row = _table()[name]
        if (why := row.refusal(device, dtype, by_name=True)) is not None:
            raise RuntimeError(f"backend={name!r} can't step this parameter: {why}")
        return row
    wanted = os.environ.get("PACE_CPU_ISA")
    if device.type == "cpu" and wanted and (_table()["cpu"].reason or "").startswith("PACE_CPU_ISA="):
        raise RuntimeError(f"the requested instruction set is not available: {_table()['cpu'].reason}")
    row = next(row for row in _table().values() if row.refusal(device, dtype) is None)
    if dtype != torch.float64 and (passed := passed_over(row, device, dtype)):
        why = " ".join(f"Backend {other}: {reason}." for other, reason in passed.items())
        say_once(f"pace_kernels computes through {row.name}, more slowly. {why}")
    return row


def passed_over(row: Backend, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The kernels that one would expect on that device before those of ``row``, and why they can't compute there."""
    expected = _KERNELS.get(device.type, ())
    if torch.version.hip is not None:  # AMD GPUs have Triton's kernels alone
        expected = tuple(name for name in expected if name != "cuda")
    before = expected[: expected.index(row.name)] if row.name in expected else expected
    return {other: why for other in before if (why := _table()[other].refusal(device, dtype)) is not None}


@functools.cache
def say_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def describe() -> dict[str, Any]:
    """What a benchmark or a bug report needs: the instruction set of the CPU kernels and the state of each backend."""
    cpu_isa = None
    if _table()["cpu"].available:
        from . import _C

        cpu_isa = _C.cpu_isa()
    return {"cpu_isa": cpu_isa, "backends": {n: row.reason or "available" for n, row in _table().items()}}
