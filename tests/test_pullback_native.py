"""Promise: the operator ``pullback_`` gives the bits of the plain torch rule, for every switch, format, instruction
set, number of threads and memory layout; it is vectorized; and it refuses before it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pullback_cases import CASES, OPTIONS, Lists, assert_same_lists, options_of, train
from test_native import LAYOUTS, processor_isas

from pace_kernels import _C
from pace_kernels.ops import PACE_STATS
from pace_kernels.torch_rules import pullback_ as torch_pullback_

ROOT = Path(__file__).parent.parent
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.ops.pace_kernels.pullback_
U = 2.0**-24


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_native_and_torch_give_the_same_bits(case: str, dtype: torch.dtype) -> None:
    rows = [torch.zeros(len(PACE_STATS), dtype=torch.float64) for _ in range(2)]
    ours = train(CPU, CASES[case], dtype, 7, rows[0])
    assert_same_lists(ours, train(torch_pullback_, CASES[case], dtype, 7, rows[1]))
    assert_same_lists(ours, train(CPU, CASES[case], dtype, 7))  # statistics change nothing
    # A float sum of a tile's 256 terms; the rest is in float64.
    torch.testing.assert_close(*rows, rtol=255 * U, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_in_float64_it_is_the_formula(case: str) -> None:
    """The torch rule in float64 beside the formula written out here. Without a clamp, too, all gains are at most 1."""
    o = options_of(CASES[case])
    seen: list[Lists] = []

    def watched(*lists: Any, **options: Any) -> None:
        names = ("params", "befores", "second_moments", "emas", "steps")
        before = {name: [t.clone() for t in some] for name, some in zip(names, lists, strict=False)}
        torch_pullback_(*lists, **options)
        for i, (x, e, step) in enumerate(zip(before["params"], before["emas"], before["steps"], strict=True)):
            t = step.item() + 1
            decaying = max((1 + o["ema_gamma"] * max(0.0, t - o["ema_rho"])) ** -(o["ema_kappa"] or 0.0), 1e-4)
            w = o["beta_ema"] if o["ema_kappa"] is None else decaying
            lam: Any = o["gain"]
            if lam is None:
                v = before["second_moments"][i] if before["second_moments"] else torch.ones_like(x)
                D = (v / (1 - o["beta2"] ** (t + o["step_offset"]))).sqrt() + o["eps"]
                lam = o["lr"] * o["lambda_pullback"] * (1.0 if o["ema_kappa"] is None else decaying) / D
                lam = lam.clamp(max=1.0) if o["clamp_pullback"] else lam
            pulled = x + lam * (e - (before["befores"][i] if before["befores"] else x))
            torch.testing.assert_close(lists[0][i], pulled, rtol=1e-14, atol=1e-14)
            average = e + w * (pulled - e) if t % o["ema_update_freq"] == 0 else e
            torch.testing.assert_close(lists[3][i], average, rtol=1e-14, atol=1e-14)
        seen.append(before)

    train(watched, CASES[case], torch.float64, 7, state=torch.float64)
    assert len(seen) == 7


RUN = """
import hashlib, json, sys, torch
import pace_cases
pace_cases.SHAPES.append((100_003,))
from pullback_cases import CASES, train
from pace_kernels import _C
from pace_kernels.ops import PACE_STATS
def op(*lists, **options):
    # Alone: torch's own vectorized powers depend on where its threads divide a tensor.
    torch.set_num_threads(int(sys.argv[1]))
    torch.ops.pace_kernels.pullback_(*lists, **options)
    torch.set_num_threads(1)
torch.set_num_threads(1)
digest, stats = hashlib.sha256(), []
for case in CASES.values():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        row = torch.zeros(len(PACE_STATS), dtype=torch.float64)
        for tensors in train(op, case, dtype, 3, row).values():
            for tensor in tensors:
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        stats.append(row.tolist())
print(json.dumps([_C.cpu_isa(), digest.hexdigest(), stats]))
"""


def run_in_a_process(isa: str, threads: int) -> Any:
    env = {**os.environ, "PACE_CPU_ISA": isa, "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", RUN, str(threads)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_threads_and_instruction_sets_give_the_same_bits() -> None:
    first, *others = (run_in_a_process(_C.cpu_isa(), threads) for threads in (1, 2, 3))
    assert all(other == first for other in others)  # statistics too, to the last digit
    for isa in processor_isas()[:-1]:
        name, digest, stats = run_in_a_process(isa, 1)
        assert name == isa and digest == first[1]
        for ours, theirs in zip(stats, first[2], strict=True):
            assert ours == pytest.approx(theirs, rel=2 * 255 * U)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    like, other = LAYOUTS[layout]()
    expanded = 0 in other.stride()  # only what is read may be

    def laid(a: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(a.shape, a.stride(), dtype=kind).copy_(torch.randn(a.shape))

    operands = [
        laid(like, dtype),
        other.to(dtype) if expanded else laid(other, dtype),
        other.square() if expanded else laid(other, torch.float32).square_(),
        laid(like, torch.float32),
    ]
    plain = [t.clone(memory_format=torch.contiguous_format) for t in operands]
    for x, before, v, e in (operands, plain):
        CPU([x], [before], [v], [e], [torch.zeros(())], None, **OPTIONS)
    assert torch.equal(operands[0], plain[0]) and torch.equal(operands[3], plain[3])


def operands() -> dict[str, list[torch.Tensor]]:
    torch.manual_seed(0)
    names = ("params", "befores", "second_moments", "emas")
    return {name: [torch.rand(7, 3) for _ in range(2)] for name in names} | {"steps": [torch.zeros(()) for _ in "ab"]}


@pytest.mark.parametrize("change", [{}, {"befores": []}, {"second_moments": [], "gain": 0.5}], ids=str)
def test_opcheck(change: dict[str, Any]) -> None:
    lists = {k: change.get(k, v) for k, v in operands().items()}
    options = OPTIONS | {k: v for k, v in change.items() if k in OPTIONS}
    stats = torch.zeros(len(PACE_STATS), dtype=torch.float64)
    torch.library.opcheck(torch.ops.pace_kernels.pullback_.default, (*lists.values(), stats), options)


REFUSED: dict[str, dict[str, Any]] = {
    "befores has 1 tensors, params has 2": {"befores": [torch.rand(7, 3)]},
    "second_moments has 0 tensors, params has 2": {"second_moments": []},
    "emas has 0 tensors": {"emas": []},
    "steps has 0 tensors": {"steps": []},
    "second_moments must be empty where gain is given": {"gain": 0.5},
    "befores must be empty where nothing pulls": {"lambda_pullback": 0.0, "second_moments": []},
    "second_moments must be empty where nothing pulls": {"lambda_pullback": 0.0, "befores": []},
    r"gain must lie in \[0, 1\], got 1.5": {"gain": 1.5, "second_moments": []},
    r"gain must lie in \[0, 1\], got nan": {"gain": float("nan"), "second_moments": []},
    "step_offset must be >= 0, got -1": {"step_offset": -1},
    "ema_update_freq must be >= 1, got 0": {"ema_update_freq": 0},
    r"befores\[1\] has shape \(3, 7\), its parameter has \(7, 3\)": {"befores": [torch.rand(7, 3), torch.rand(3, 7)]},
    r"second_moments\[0\] must be float32, bfloat16 or float16": {"second_moments": [torch.rand(7, 3).double()] * 2},
    r"emas\[1\] must be float32": {"emas": [torch.rand(7, 3), torch.rand(7, 3).half()]},
    r"emas\[0\] overlaps itself": {"emas": [torch.rand(3).expand(7, 3), torch.rand(7, 3)]},
    r"steps\[0\] must be a CPU tensor, float32 or float64, with one element": {
        "steps": [torch.zeros(2), torch.zeros(())]
    },
}


def refused(op: Any, message: str) -> None:
    """Also called for Triton's operator, in its interpreter."""
    change = REFUSED[message]
    lists = {k: change.get(k, v) for k, v in operands().items()}
    before = {name: [t.clone() for t in tensors] for name, tensors in lists.items()}
    with pytest.raises(RuntimeError, match=message):
        op(*lists.values(), None, **OPTIONS | {k: v for k, v in change.items() if k in OPTIONS})
    assert_same_lists(lists, before)


@pytest.mark.parametrize("message", REFUSED)
def test_the_operator_refuses_before_it_writes(message: str) -> None:
    refused(CPU, message)


def test_a_skipped_step_changes_nothing() -> None:
    lists = operands()
    before = {name: [t.clone() for t in tensors] for name, tensors in lists.items()}
    for op in (CPU, torch_pullback_):
        stats = torch.zeros(len(PACE_STATS), dtype=torch.float64)
        op(*lists.values(), stats, found_inf=torch.ones(1), **OPTIONS)
        assert_same_lists(lists, before)
        assert stats.tolist() == [float("inf") if name.endswith("_min") else 0.0 for name in PACE_STATS]


def test_a_learning_rate_as_a_tensor() -> None:
    a, b = operands(), operands()
    CPU(*a.values(), None, lr_tensor=torch.tensor(0.02, dtype=torch.float64), **OPTIONS)
    CPU(*b.values(), None, **{**OPTIONS, "lr": 0.02})
    assert_same_lists(a, b)
