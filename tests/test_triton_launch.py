"""Promise: from its second launch on a Triton kernel is found without Triton's search, and gets what that would have
given it. A driver without a GPU takes the launches down."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") or torch.cuda.is_available():
    pytest.skip("compiles for a GPU, and has none", allow_module_level=True)

from pace_kernels.triton_kernels import launch, ops, sums, sweep, table
from pace_kernels.triton_kernels.learn_kernel import _mada_learn_kernel
from pace_kernels.triton_kernels.scalars import _scalars_kernel
from test_native import OPTIONS, operands
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from pace_kernels.ops import PACE_STATS

KERNELS = (sweep._sweep_kernel, _scalars_kernel, sums._add_up_kernel, _mada_learn_kernel)


class Driver:
    """Of compiled kernels by name: the arguments of their launches."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, tuple[Any, ...]]] = []
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 1, 32, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 2**17},
            unload_module=lambda _: None,
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        # Grid and stream, then what belongs to the kernel, its arguments last.
        return lambda *given: self.launches.append((metadata.name, (*given[:5], *given[9:])))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(driver, "_active", Driver())
    return driver.active


def shown(value: Any) -> Any:
    """Scratch memory may lie elsewhere in each step."""
    return (value.dtype, value.shape) if isinstance(value, torch.Tensor) else value


def searches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    real = type(sweep._sweep_kernel).run

    def run(kernel: Any, *arguments: Any, **named: Any) -> Any:
        found.append(kernel.__name__)
        return real(kernel, *arguments, **named)

    monkeypatch.setattr(type(sweep._sweep_kernel), "run", run)
    return found


def test_a_kernel_is_searched_once_and_launched_the_same(recorded: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    found = searches(monkeypatch)
    lists, result = operands(), torch.zeros(len(PACE_STATS), dtype=torch.float64)
    taken = []
    for _ in range(3):
        for step in lists[-1]:
            step.fill_(4.0)
        recorded.launches.clear()
        ops.pace_step_(*lists, result, **OPTIONS)
        taken.append([(name, *map(shown, given)) for name, given in recorded.launches])
    assert sorted(found) == ["_add_up_kernel", "_scalars_kernel", "_sweep_kernel"]
    assert len(taken[0]) == 3 and taken[0] == taken[1] == taken[2]


F32 = torch.tensor(0.1)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("lr_tensor", None, F32),
        ("lr_tensor", F32, F32.double()),
        ("lr_tensor", F32, torch.ones(2)[1:]),  # at an address that is no multiple of 16
        ("clip_coef", None, F32),
        ("lambda_pullback", 5.0, 0.0),
    ],
)
def test_what_a_kernel_is_compiled_for_is_told_apart(
    name: str, before: Any, after: Any, recorded: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = operands()
    ops.pace_step_(*lists, **{**OPTIONS, name: before})
    found = searches(monkeypatch)
    for _ in range(2):
        ops.pace_step_(*lists, **{**OPTIONS, name: after})
    assert found == (["_sweep_kernel"] if name == "lambda_pullback" else ["_scalars_kernel"])


def test_triton_specializes_for_no_number() -> None:
    """Those of options would be compiled for anew: a launch looks at whole numbers alone."""
    for kernel in KERNELS:
        numbers = [p for p in kernel.params if not (p.is_constexpr or p.name.endswith("_ptr"))]
        assert all(p.do_not_specialize or p.annotation_type == "fp64" for p in numbers)


def test_tables_that_a_capture_may_take_belong_to_what_is_stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "launch", lambda *_, **__: None)
    seen: list[int] = []
    real = table._make_plan
    monkeypatch.setattr(table, "_make_plan", lambda *given: seen.append(id((made := real(*given)).blocks)) or made)
    first, other = operands(), operands()
    ops.pace_step_(*first, **OPTIONS)
    first[1][:] = [g.clone() for g in first[1]]
    ops.pace_step_(*first, **OPTIONS)
    ops.pace_step_(*other, **OPTIONS)
    assert seen[0] == seen[1] != seen[2]
