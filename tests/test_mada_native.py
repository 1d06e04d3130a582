"""Promise: MADA's native kernels give the same bits on every instruction set, for every number of threads and memory
layout, sums included where the instruction set is one; they are vectorized; the operators check what they are given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_native import LAYOUTS, processor_isas

from pace_kernels import _C, MADA, ops

ROOT = Path(__file__).parent.parent

# The coefficients rest between instruction sets, whose sums run over lanes of their own; between threads they move.
RUN = """
import hashlib, json, sys, torch
from mada_cases import CASES
from pace_cases import gradients, weights
from pace_kernels import MADA, _C
torch.set_num_threads(int(sys.argv[1]))
digest, sums = hashlib.sha256(), []
for name, options in CASES.items():
    for dtype in (torch.float32, torch.bfloat16):
        if sys.argv[2] == "rest" and options.get("learn") != ():
            options = {**options, "hyper_lr": 0.0}
        params = weights(dtype) + [torch.nn.Parameter(torch.linspace(-1, 1, 100_003).to(dtype))]
        optimizer = MADA(params, **{"lr": 1e-2, **options})
        for t, grads in enumerate(gradients(5, dtype)):
            for param, grad in zip(params, [*grads, torch.linspace(3, -2, 100_003).roll(9 * t).to(dtype)]):
                param.grad = grad
            optimizer.step()
            sums.append(optimizer.hypergradients)
        for param in params:
            for tensor in (param, *optimizer.state[param].values()):
                digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
print(json.dumps([_C.cpu_isa(), digest.hexdigest(), sums]))
"""


def run_in_a_process(isa: str, threads: int, coefficients: str) -> tuple[str, str, list[dict[str, float]]]:
    env = {**os.environ, "PACE_CPU_ISA": isa, "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-c", RUN, str(threads), coefficients]
    return tuple(json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout))


@pytest.mark.slow
def test_threads_do_not_change_a_bit_nor_does_another_run() -> None:
    first, *others = (run_in_a_process(_C.cpu_isa(), threads, "learn") for threads in (1, 1, 2, 3))
    assert all(other == first for other in others)  # the sums too: compared as printed, to the last digit
    assert any(value != 0.0 for row in first[2] for value in row.values())


@pytest.mark.slow
def test_instruction_sets_give_the_same_bits() -> None:
    baseline = run_in_a_process("baseline", 1, "rest")
    for isa in processor_isas()[1:]:
        name, digest, _ = run_in_a_process(isa, 1, "rest")
        assert name == isa and digest == baseline[1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    start, grad = LAYOUTS[layout]()
    if dtype != torch.float32:
        start, grad = (
            torch.empty_strided(a.shape, a.stride(), dtype=dtype).copy_(a) for a in (start, grad.contiguous())
        )
    params = [torch.nn.Parameter(start), torch.nn.Parameter(start.clone(memory_format=torch.contiguous_format))]
    results = []
    for param in params:
        optimizer = MADA([param], lr=1e-2, hyper_lr=0.0, use_ema_eval=True, gamma=0.5, backend="cpu")
        for scale in (1.0, -0.5, 2.0):
            param.grad = grad * scale if param is params[0] else (grad * scale).contiguous()
            if layout.endswith("expanded") and scale == 1.0 and param is params[0]:
                param.grad = grad
            optimizer.step()
        results.append([param.detach(), *(v for k, v in sorted(optimizer.state[param].items()))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


OPTIONS: dict[str, Any] = {
    "learn": 63, "lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "beta3": 0.9, "rho": 0.5, "c": 0.5, "gamma": 0.5, "eps": 1e-8,
    "weight_decay": 0.1, "lion_beta1": 0.95, "lion_beta2": 0.98, "second_max": False, "lambda_pullback": 1.0,
    "clamp_pullback": True, "beta_ema": 0.01, "ema_kappa": 0.2, "ema_rho": 0.0, "ema_gamma": 1.0, "ema_update_freq": 1,
    "pullback_from_step": False, "maximize": False, "capturable": False,
}  # fmt: skip
LEARN: dict[str, Any] = {
    "learn": 63, "hyper_lr": [0.1] * 6, "hyper_momentum": [0.5] * 6, "lower": [0.0] * 6, "upper": [1.0] * 6,
    "clip": 10.0, "warmup": 0,
}  # fmt: skip
LISTS = ("params", "grads", *ops.MADA_STATES)


def operands(n: int = 2) -> dict[str, Any]:
    named: dict[str, Any] = {name: [torch.rand(7, 3) for _ in range(n)] for name in LISTS}
    named["steps"] = [torch.tensor(4.0) for _ in range(n)]
    row = [1.0, 1e-2, 0.9, 0.95, 0.9, 0.5, 0.5, 0.5]
    named["last_scalars"] = [torch.tensor(row, dtype=torch.float64) for _ in range(n)]
    return named | {
        "coefficients": torch.tensor(row[2:], dtype=torch.float64),
        "hypergradients": torch.zeros(7, dtype=torch.float64),
    }


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.pace_kernels.mada_step_.default, tuple(operands().values()), OPTIONS)
    empty = {
        "exp_avg_diffs",
        "second_exp_avg_sqs",
        "exp_avg_lions",
        "last_grads",
        "older_grads",
        "last_scalars",
        "emas",
    }
    lists = [[] if name in empty else value for name, value in operands().items()]
    plain = {**OPTIONS, "learn": 0, "beta3": 0.0, "rho": 1.0, "gamma": 1.0, "lambda_pullback": 0.0}
    torch.library.opcheck(torch.ops.pace_kernels.mada_step_.default, (*lists[:-2], None, None), plain)
    six = [torch.rand(6, dtype=torch.float64) for _ in range(3)]
    sums = [torch.rand(7, dtype=torch.float64) for _ in range(2)]
    count = torch.zeros((), dtype=torch.float64)
    torch.library.opcheck(torch.ops.pace_kernels.mada_learn_.default, (*six, count, sums), LEARN)


REFUSED: dict[str, dict[str, Any]] = {
    "grads has 1 tensors, params has 2": {"grads": [torch.rand(7, 3)]},
    "exp_avgs has 0 tensors": {"exp_avgs": []},
    "exp_avg_sqs may be empty only where gamma is 0": {"exp_avg_sqs": []},
    "exp_avg_lions may be empty only where gamma is fixed at 1": {"exp_avg_lions": []},
    "exp_avg_diffs may be empty only where beta3 is fixed at 0": {"exp_avg_diffs": []},
    "second_exp_avg_sqs may be empty only where rho is fixed at 1": {"second_exp_avg_sqs": []},
    "last_scalars has 0 tensors, params has 2": {"last_scalars": []},
    "last_grads has 0 tensors": {"last_grads": []},
    "older_grads has 0 tensors": {"older_grads": []},
    "emas has 0 tensors": {"emas": []},
    r"older_grads\[1\] has shape \(3, 7\), its parameter has \(7, 3\)": {
        "older_grads": [torch.rand(7, 3), torch.rand(3, 7)]
    },
    r"last_grads\[1\] must be float32 or bfloat16": {"last_grads": [torch.rand(7, 3), torch.rand(7, 3).half()]},
    r"last_scalars\[0\] must be a CPU tensor, contiguous, float64, with 8 elements": {
        "last_scalars": [torch.zeros(8), torch.zeros(8)]
    },
    "coefficients must be a CPU tensor, contiguous, float64, with 6 elements": {
        "coefficients": torch.zeros(5).double()
    },
    "hypergradients must be a CPU tensor, contiguous, float64, with 7 elements": {
        "hypergradients": torch.zeros(6).double()
    },
    r"beta3 must lie in \[0, 1\), got 1": {"beta3": 1.0},
    r"rho must lie in \[0, 1\], got 1.5": {"rho": 1.5},
    r"gamma must lie in \[0, 1\], got -0.5": {"gamma": -0.5},
    r"c must lie in \[0, 1\], got nan": {"c": float("nan")},
    r"lion_beta2 must lie in \[0, 1\), got 1": {"lion_beta2": 1.0},
    "lr must be finite": {"lr": float("inf")},
}


@pytest.mark.parametrize("message", REFUSED)
def test_the_operator_refuses_before_it_writes(message: str) -> None:
    change = REFUSED[message]
    named = operands() | {k: v for k, v in change.items() if k not in OPTIONS}
    before = {k: [t.clone() for t in v] if isinstance(v, list) else v.clone() for k, v in named.items()}
    with pytest.raises(RuntimeError, match=message):
        options = OPTIONS | {k: v for k, v in change.items() if k in OPTIONS}
        torch.ops.pace_kernels.mada_step_(*named.values(), **options)
    for name, value in named.items():
        pairs = zip(value, before[name], strict=True) if isinstance(value, list) else [(value, before[name])]
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_learning_clips_remembers_and_projects(backend: str) -> None:
    from pace_kernels.backend import backends

    learn = backends()[backend].op("mada_learn_")
    q = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 0.9], dtype=torch.float64)
    b = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    h, count = torch.zeros(6, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    sums = [
        torch.tensor(row, dtype=torch.float64) for row in ([0.25, 1, -99, 99, 1, -1, 1e-3], [0.25, 1, 0, 0, 1, 0, 0])
    ]
    options = {**LEARN, "learn": 0b101111, "warmup": 1, "lower": [0.0] * 3 + [0.4] * 3, "clip": 2.0}
    learn(q, b, h, count, sums, **options)
    assert count.item() == 1 and h.tolist() == [0.5, 2, -99, 99, 2, -1]
    assert q.tolist() == [0.5, 0.5, 0.5, 0.5, 0.5, 0.9] and b[1] == 1.0  # warm-up
    learn(q, b, h, count, sums, **options)
    assert b.tolist() == [0.5, 2.5, -2, 2, 0, -1]  # clipped, the momentum of beta2 kept, c not learned
    assert q.tolist() == pytest.approx([0.45, 0.25, 0.7, 0.4, 0.5, 1.0], rel=1e-15)  # rho and gamma at their bounds
    moved = q.clone()
    learn(q, b, h, count, [torch.tensor([1.0] * 6 + [0.0], dtype=torch.float64)], **options)
    assert torch.equal(q, moved) and count.item() == 2 and h.tolist() == [1.0] * 6  # no learning rate, no learning
