"""Promise: whatever the operators are given, they compute or refuse. A refusal changes nothing; a computation writes
nowhere else and does not depend on the layout; nothing crashes. tests/fuzz_ops.py says how it is seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_ops
import on_sanitizers
import pytest
import torch
from test_native import OPTIONS, operands

ROOT = Path(__file__).parent.parent
FUZZ = ROOT / "tests" / "fuzz_ops.py"
CASES = 4000


def check(done: subprocess.CompletedProcess[str], cases: int) -> None:
    last = done.stderr.strip().splitlines()[-30:]
    assert done.returncode == 0, "\n".join(last)
    report = json.loads(done.stdout)
    assert report["cases"] == cases and report["failures"] == []
    assert {f"a tensor {what}" for what in fuzz_ops.TENSORS} <= report["changes"].keys()
    for name, outcomes in report["outcomes"].items():
        computed = sum(count for what, count in outcomes.items() if what.startswith("computed"))
        total = sum(outcomes.values())
        assert total in (cases // len(fuzz_ops.WAYS), cases // len(fuzz_ops.WAYS) + 1), name
        assert 0.1 * total < computed < 0.8 * total, (name, outcomes)
    assert len(report["outcomes"]) == len(fuzz_ops.WAYS)


def test_operators_compute_or_refuse() -> None:
    env = {**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, str(FUZZ), "--seed", "0", "--cases", str(CASES)]
    check(subprocess.run(command, env=env, capture_output=True, text=True), CASES)


@pytest.mark.skipif(on_sanitizers.missing() is not None, reason=str(on_sanitizers.missing()))
def test_operators_compute_or_refuse_under_the_sanitizers() -> None:
    check(on_sanitizers.run(str(FUZZ), "--seed", "1", "--cases", str(CASES)), CASES)


def test_every_operator_is_fuzzed() -> None:
    registered = {
        n.removeprefix("pace_kernels::")
        for n in torch._C._dispatch_get_all_op_names()
        if n.startswith("pace_kernels::")
    }
    # plan_learn_ takes what mada_learn_ takes, by the same checks.
    assert {*fuzz_ops.OPERATORS, "plan_add_", "plan_step_", "plan_learn_"} == registered


EMAS = [a.name for a in torch.ops.pace_kernels.pullback_.default._schema.arguments].index("emas")


def writes_and_refuses(*lists: Any, **options: Any) -> None:
    torch.ops.pace_kernels.pullback_(*lists, **options)
    raise RuntimeError("after all")


def writes_beside(*lists: Any, **options: Any) -> None:
    torch.ops.pace_kernels.pullback_(*lists, **options)
    for t in lists[EMAS]:
        if t.storage_offset():
            t.as_strided((1,), (1,), 0).fill_(1.25)


def minds_the_layout(*lists: Any, **options: Any) -> None:
    torch.ops.pace_kernels.pullback_(*lists, **options)
    for t in lists[EMAS]:
        if not t.is_contiguous():
            t.add_(1.0)


@pytest.mark.parametrize(
    ("function", "message"),
    [(writes_and_refuses, "had written"), (writes_beside, "beside its tensors"), (minds_the_layout, "other bits")],
)
def test_the_fuzz_sees(function: Callable[..., None], message: str) -> None:
    numbers = range(list(fuzz_ops.OPERATORS).index("pullback_"), 1000, len(fuzz_ops.OPERATORS))
    with pytest.raises(fuzz_ops.Failure, match=message):
        for number in numbers:
            fuzz_ops.run_case(0, number, function=function)


# ---- what it found ----


def emptied(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = ()) -> torch.Tensor:
    tensor = torch.zeros(shape, dtype=dtype)
    tensor.untyped_storage().resize_(0)
    return tensor


def misaligned(dtype: torch.dtype, count: int, shape: tuple[int, ...] = ()) -> torch.Tensor:
    return torch.frombuffer(bytearray(count * dtype.itemsize + 1), dtype=dtype, offset=1).view(shape)


FOUND: dict[str, tuple[dict[str, Any], str]] = {
    "an emptied lr": ({"lr_tensor": emptied()}, "lr_tensor has more elements than memory"),
    "an emptied found_inf": ({"found_inf": emptied()}, "found_inf has more elements than memory"),
    "an emptied step": ({"steps": [torch.zeros(()), emptied()]}, r"steps\[1\] has more elements than memory"),
    "emptied statistics": ({"stats": emptied(torch.float64, (14,))}, "stats has more elements than memory"),
    "a shrunk moment": ({"exp_avgs": [torch.zeros(7, 3), emptied(shape=(7, 3))]}, r"exp_avgs\[1\] has more elements"),
    "a misaligned gradient": (
        {"grads": [misaligned(torch.float32, 21, (7, 3)), torch.zeros(7, 3)]},
        r"grads\[0\] must lie at a multiple of its element size: clone it",
    ),
    "a misaligned lr": ({"lr_tensor": misaligned(torch.float64, 1)}, "lr_tensor must lie at a multiple"),
    "one tensor on meta": ({"grads": [torch.zeros(7, 3), torch.zeros(7, 3, device="meta")]}, "on meta, or none"),
    "a negative view that is written": (
        {"emas": [torch._neg_view(torch.zeros(7, 3)), torch.zeros(7, 3)]},
        "emas must not hold negative views",
    ),
}


@pytest.mark.parametrize("what", FOUND)
def test_refused_since(what: str) -> None:
    change, message = FOUND[what]
    named = dict(zip(("params", "grads", "exp_avgs", "exp_avg_sqs", "emas", "steps"), operands(), strict=True)) | change
    before = [t.clone() for t in named["params"]]
    with pytest.raises((RuntimeError, ValueError), match=message):
        torch.ops.pace_kernels.pace_step_(**named, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(named["params"], before, strict=True))


def test_a_gradient_that_is_a_negative_view_counts_as_what_it_is() -> None:
    lists = operands(1)
    twin = [[t.clone() for t in tensors] for tensors in lists]
    memory = -lists[1][0]
    torch.ops.pace_kernels.pace_step_(lists[0], [torch._neg_view(memory)], *lists[2:], None, **OPTIONS)
    torch.ops.pace_kernels.pace_step_(*twin, None, **OPTIONS)
    for a, b in zip(lists, twin, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
