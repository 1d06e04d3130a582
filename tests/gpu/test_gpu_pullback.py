"""Promise: the pullback around any optimizer does on a GPU what it does on the CPU: the operator to the bit; and the
wrapper waits for nothing, also in a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import on_gpu
import pullback_cases
import pytest
import torch
from on_gpu import DEVICE, DTYPES, assert_same, both, contents, need, no_waiting
from pace_cases import gradients

from pace_kernels import Pullback, backends
from pace_kernels.ops import PACE_STATS

STEPS = 12
U = 2.0**-24

# A base, and the pullback's options.
WRAPPED: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"lambda_pullback": 3.0}),
    "AdamW, from the step": (torch.optim.AdamW, {"lambda_pullback": 3.0, "pullback_from": "step"}),
    "SGD, average alone": (torch.optim.SGD, {"lambda_pullback": 0.0}),
    "SGD, constant": (torch.optim.SGD, {"gain": 0.1}),
}


def operator_trained(backend: str, device: torch.device, case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The base steps on the CPU at all times, so that the operator alone is compared."""
    op, o = backends()[backend].op("pullback_"), pullback_cases.options_of(case)
    lists = pullback_cases.start(case, dtype)
    stats = torch.zeros(len(PACE_STATS), dtype=torch.float64, device=device)
    for grads in gradients(STEPS, dtype):
        pullback_cases.base_step(lists, grads, o)
        there = {
            name: on_gpu.on(device if name != "steps" or o["capturable"] else torch.device("cpu"), tensors)
            for name, tensors in lists.items()
        }
        op(*there.values(), stats, **o)
        lists = {name: on_gpu.on(torch.device("cpu"), tensors) for name, tensors in there.items()}
    found = {f"{name} {i}": t for name, tensors in lists.items() for i, t in enumerate(tensors)}
    return found | {"statistics": stats.cpu()}


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", pullback_cases.CASES)
def test_the_operator(case: str, dtype: torch.dtype, backend: str) -> None:
    found = operator_trained(need(backend), DEVICE, pullback_cases.CASES[case], dtype)
    expected = operator_trained(on_gpu.reference(), torch.device("cpu"), pullback_cases.CASES[case], dtype)
    sums, expected_sums = found.pop("statistics"), expected.pop("statistics")
    if backend in on_gpu.EXACT_SCALARS:
        assert_same(found, expected)
        # Sums in float32 over at most 135 roundings (test_gpu_bits.py), of terms that are the same.
        torch.testing.assert_close(sums, expected_sums, rtol=2 * 135 * U, atol=0)
        return
    for name, value in found.items():
        # Scalars that are a unit of float32 off move the pull, at most the distance, by four units of it, and the
        # average by as much; a weight at a midpoint of its format may be rounded to either side.
        stored = torch.finfo(dtype).eps / 2 if name.startswith("params") and dtype != torch.float32 else 0.0
        wanted = expected[name].double()
        bound = STEPS * (16 * U + stored) * (1 + wanted.abs())
        same = value.double() == wanted  # infinite second moments of float16
        assert bool((same | ((value.double() - wanted).abs() <= bound)).all()), name


def wrapped(name: str, params: list[Any], backend: str, **base_options: Any) -> Pullback:
    base, options = WRAPPED[name]
    if base is torch.optim.AdamW:
        base_options |= {"capturable": not on_gpu.DRY}
    return Pullback(base(params, **base_options), backend=need(backend), log_stats=True, **options)


@both
@pytest.mark.parametrize("name", WRAPPED)
def test_a_step_waits_for_nothing(name: str, backend: str) -> None:
    params = on_gpu.parameters()
    optimizer = wrapped(name, params, backend, lr=1e-2)
    for t, grads in enumerate([on_gpu.on(DEVICE, grads) for grads in gradients(6, torch.float32)]):
        on_gpu.give(params, grads)
        if t < 2:  # creates states, and compiles
            optimizer.step()
            continue
        with no_waiting():
            optimizer.step()


@both
@pytest.mark.parametrize("name", [name for name in WRAPPED if name.startswith("AdamW")])
def test_a_replayed_step_is_a_step(name: str, backend: str) -> None:
    found = []
    for captured in (False, True):
        params = on_gpu.parameters()
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer = wrapped(name, params, backend, lr=torch.tensor(1e-2, device=DEVICE))
        graph = None
        for t, grads in enumerate(gradients(10, torch.float32)):
            for param, grad in zip(params, grads, strict=True):
                param.grad.copy_(grad)
            if captured and t >= 3:
                graph = graph or on_gpu.Graph(optimizer.step)
                graph.replay()
            else:
                with on_gpu.beside():
                    optimizer.step()
        found.append({**contents(params, optimizer), "stats": torch.tensor([*optimizer.get_step_stats().values()])})
        found[-1] |= {f"{i} average": optimizer.state[p]["ema"].cpu() for i, p in enumerate(params)}
    assert_same(*found)


@both
def test_evaluation_holds_the_average(backend: str) -> None:
    params = on_gpu.parameters()
    optimizer = wrapped("AdamW", params, backend, lr=1e-2)
    for grads in gradients(4, torch.float32):
        on_gpu.give(params, grads)
        optimizer.step()
    live = [p.detach().clone() for p in params]
    averages = [optimizer.state[p]["ema"].clone() for p in params]
    with optimizer.averaged():
        assert all(torch.equal(p, e) for p, e in zip(params, averages, strict=True))
    assert all(torch.equal(p, x) for p, x in zip(params, live, strict=True))
