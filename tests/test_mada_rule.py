"""Promise: every switch of MADA's rule gives the same bits natively and in torch, and keeps no tensor in vain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mada_cases import CASES, STATES
from pace_cases import assert_same_bits, gradients, weights

from pace_kernels import MADA

STEPS = 12
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def train(
    dtype: torch.dtype, backend: str | None, steps: int = STEPS, path: list[list[float]] | None = None, **options: Any
) -> tuple[list[Any], MADA]:
    """``path``: the coefficients to step with, from a run before, since sums of float32 differ in the last place."""
    params = weights(dtype)
    optimizer = MADA(params, backend=backend, **{"lr": 1e-2, **options})
    values = optimizer.param_groups[0]["coefficient_values"]
    for t, grads in enumerate(gradients(steps, dtype)):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        if path is not None and values is not None:
            if t < len(path):
                values.copy_(torch.tensor(path[t], dtype=torch.float64))
            else:
                path.append(values.tolist())
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_and_torch_give_the_same_bits(case: str, dtype: torch.dtype) -> None:
    path: list[list[float]] = []
    native = train(dtype, "cpu", path=path, **CASES[case])
    plain = train(dtype, "torch", path=path, **CASES[case])
    assert_same_bits(native, plain)
    if "warmup" in str(CASES[case]):
        assert path[0] != path[-1]


@pytest.mark.parametrize("case", STATES)
def test_only_the_tensors_that_are_needed_are_kept(case: str) -> None:
    params, optimizer = train(torch.bfloat16, "cpu", steps=3, **CASES[case])
    for param in params:
        state = optimizer.state[param]
        assert state.keys() - {"step", "last_scalars"} == STATES[case]
        assert ("last_scalars" in state) == ("last_grad" in state)
        for name in STATES[case]:
            assert state[name].dtype == torch.float32 and state[name].shape == param.shape


@pytest.mark.parametrize("case", ["default", "all, inside", "hyperadam", "pulled from the step", "Lion", "AdamW"])
def test_where_the_scalars_stay_on_a_device(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the CPU the coefficients, the last step's scalars and the step count stay tensors. The path is the same here
    with tensors of one element, of float64 as there, which are rounded once as numbers are."""
    plain = train(torch.float32, "torch", **CASES[case])
    monkeypatch.setattr("pace_kernels.torch_rules.mada._numbers", lambda row: row.unbind())
    device = train(torch.float32, "torch", **{**CASES[case], "capturable": True})
    for p, q in zip(plain[0], device[0], strict=True):
        # Powers may differ in the last place of float64, and so a rounded scalar, rarely, by a unit of float32.
        torch.testing.assert_close(p, q, rtol=64 * 2**-23, atol=64 * 2**-23)
        for key, value in plain[1].state[p].items():
            torch.testing.assert_close(value, device[1].state[q][key], rtol=64 * 2**-23, atol=1e-30)
