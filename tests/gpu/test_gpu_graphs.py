"""Promise: a step captured into a CUDA graph and replayed does what a step does, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import on_gpu
import pytest
import torch
from mada_cases import INSIDE, SOON
from on_gpu import DEVICE, assert_same, both, contents, need
from pace_cases import gradients

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "PACE": ("PACE", {}),
    "PACE, every third step": ("PACE", {"ema_update_freq": 3}),
    "PACE, statistics": ("PACE", {"log_stats": True}),
    "MADA": ("MADA", {**INSIDE, **SOON}),
    "MADA, pulled": ("MADA", {**INSIDE, **SOON, "lambda_pullback": 2.0}),
    "MADA, fixed": ("MADA", {**INSIDE, "learn": ()}),
    "MADA, preset adamw": ("MADA", {"beta3": 0.0, "rho": 1.0, "learn": ()}),
}
WARM_UP, STEPS = 3, 10


def run(case: str, backend: str, dtype: torch.dtype, captured: bool) -> tuple[dict[str, Any], list[list[float]]]:
    """Weights and states in the end, and the coefficients after every step. The learning rate, a tensor, and the
    gradients change in place between steps."""
    kind, options = CASES[case]
    params = on_gpu.parameters(dtype=dtype)
    for param in params:
        param.grad = torch.zeros_like(param)
    lr = torch.tensor(0.0, device=DEVICE)
    optimizer = on_gpu.OPTIMIZERS[kind](params, lr=lr, capturable=True, backend=need(backend), **options)
    graph, path = None, []
    for t, grads in enumerate(gradients(STEPS, dtype)):
        for param, grad in zip(params, grads, strict=True):
            param.grad.copy_(grad)
        lr.fill_(1e-2 / (1 + t))
        if captured and t < WARM_UP:
            with on_gpu.beside():
                optimizer.step()
        elif captured:
            graph = graph or on_gpu.Graph(optimizer.step)
            graph.replay()
        else:
            optimizer.step()
        if kind == "MADA" and optimizer.param_groups[0]["learn"]:
            path.append(optimizer.param_groups[0]["coefficient_values"].tolist())
    found = contents(params, optimizer)
    if options.get("log_stats"):
        stats = optimizer.get_step_stats()
        found["stats"] = torch.tensor(list(stats.values()), dtype=torch.float64)
    return found, path


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_replayed_step_is_a_step(case: str, dtype: torch.dtype, backend: str) -> None:
    replayed, path = run(case, backend, dtype, captured=True)
    stepped, expected = run(case, backend, dtype, captured=False)
    assert_same(replayed, stepped)
    assert path == expected
    if path:
        assert path[WARM_UP] != path[-1]  # coefficients move in replays
    assert replayed["0 step"].item() == STEPS


@both
@on_gpu.each
def test_a_replayed_step_does_nothing_where_a_gradient_is_infinite(kind: str, backend: str) -> None:
    params = on_gpu.parameters()
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = on_gpu.OPTIMIZERS[kind](params, lr=1e-2, capturable=True, backend=need(backend))
    optimizer.grad_scale = torch.full((), 8.0, device=DEVICE)
    optimizer.found_inf = torch.zeros((), device=DEVICE)
    with on_gpu.beside():
        optimizer.step()
        optimizer.step()
    graph = on_gpu.Graph(optimizer.step)
    graph.replay()
    before = contents(params, optimizer)
    optimizer.found_inf.fill_(1.0)
    graph.replay()
    assert_same(contents(params, optimizer), before)
    optimizer.found_inf.fill_(0.0)
    graph.replay()
    after = contents(params, optimizer)
    assert after["0 step"].item() == before["0 step"].item() + 1 == 4
    assert not torch.equal(after["0 weights"], before["0 weights"])


@both
@on_gpu.each
def test_gradients_may_be_allocated_within_the_capture(kind: str, backend: str) -> None:
    """As in the capture of a whole training step, where they lie elsewhere than in the steps before it."""
    found = []
    for captured in (False, True):
        params = on_gpu.parameters()
        inputs = [torch.zeros_like(p) for p in params]
        optimizer = on_gpu.OPTIMIZERS[kind](params, lr=1e-2, capturable=True, backend=need(backend))

        def train(params: Any = params, inputs: Any = inputs, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad(set_to_none=True)
            sum(((p * x).sum() for p, x in zip(params, inputs, strict=True)), torch.zeros((), device=DEVICE)).backward()
            optimizer.step()

        graph = None
        for t, grads in enumerate(gradients(8, torch.float32)):
            for x, grad in zip(inputs, grads, strict=True):
                x.copy_(grad)
            if captured and t >= 3:
                if graph is None:
                    optimizer.zero_grad(set_to_none=True)
                    graph = on_gpu.Graph(train)
                graph.replay()
            else:
                with on_gpu.beside():
                    train()
        found.append(contents(params, optimizer))
    assert_same(*found)


@both
@on_gpu.each
def test_a_bare_capture_right_behind_other_steps(kind: str, backend: str) -> None:
    """The tables that it takes over are still on their way when it begins."""
    found = []
    for captured in (False, True):
        params = on_gpu.parameters()
        on_gpu.give(params, next(iter(gradients(1, torch.float32))))
        optimizer = on_gpu.OPTIMIZERS[kind](params, lr=1e-2, capturable=True, backend=need(backend))
        with on_gpu.beside():
            on_gpu.occupy(20.0)
            for _ in range(3):
                optimizer.step()
            step = on_gpu.Graph(optimizer.step, bare=True).replay if captured else optimizer.step
            for _ in range(3):
                step()
        found.append(contents(params, optimizer))
    assert_same(*found)


FIRST = """
import sys, torch
sys.path[:0] = sys.argv[1:3]
import on_gpu
from pace_kernels import MADA, PACE
for kind in (PACE, MADA):
    found = []
    for captured in (True, False):
        params = on_gpu.parameters()
        for param in params:
            param.grad = torch.ones_like(param)
        saved = kind(on_gpu.parameters(torch.device("cpu")), lr=1e-2, capturable=True)
        on_gpu.give(saved.param_groups[0]["params"], [torch.ones(p.shape) for p in params])
        saved.step()
        optimizer = kind(params, lr=1e-2, capturable=True, backend=on_gpu.BACKENDS[0])
        optimizer.load_state_dict(saved.state_dict())
        step = on_gpu.Graph(optimizer.step).replay if captured else optimizer.step
        found.append([on_gpu.contents(params, optimizer) for _ in range(2) if step() is None])
    for replayed, stepped in zip(*found, strict=True):
        on_gpu.assert_same(replayed, stepped)
"""


def test_a_kernel_may_have_its_first_launch_within_a_capture() -> None:
    """After a checkpoint was loaded, in a process that has launched nothing yet: the captured steps come first."""
    need(on_gpu.BACKENDS[0])
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    done = subprocess.run([sys.executable, "-c", FIRST, *folders], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
