"""Promise: steps are counted beyond 2^24, and an average that moves every so many steps moves at these, on every
backend. Triton's and CUDA's bodies are in test_triton_interpreted.py and test_cuda_emulated.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from step_count_cases import OPERATORS, moves_every_third_step, stops_before_it_loses_count

from pace_kernels import MADA, PACE, Pullback, torch_rules
from pace_kernels.states import exact_on

BODIES: dict[str, Callable[[str], Callable[..., Any]]] = {
    "cpu": lambda name: getattr(torch.ops.pace_kernels, name),
    "torch": lambda name: getattr(torch_rules, name),
}


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("body", BODIES)
def test_the_average_moves_every_third_step(body: str, name: str, capturable: bool) -> None:
    moves_every_third_step(BODIES[body](name), name, capturable)


@pytest.mark.parametrize("given", [{}, {"found_inf": torch.ones(())}], ids=["", "skipped"])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("body", BODIES)
def test_float32_is_refused_where_it_stops_counting(body: str, name: str, given: dict[str, Any]) -> None:
    stops_before_it_loses_count(BODIES[body](name), name, **given)


# ---- the optimizers ----

SLOWLY = {"ema_update_freq": 3, "ema_kappa": None, "beta_ema": 0.25}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "PACE": lambda p, **o: PACE([p], **SLOWLY, **o),
    "MADA": lambda p, **o: MADA([p], use_ema_eval=True, **SLOWLY, **o),
    "Pullback": lambda p, **o: Pullback(torch.optim.AdamW([p]), **SLOWLY, **o),
}


def state_of(optimizer: Any, param: torch.Tensor) -> dict[str, Any]:
    return (optimizer.base if isinstance(optimizer, Pullback) else optimizer).state[param]


def stepped(optimizer: Any, param: torch.nn.Parameter) -> None:
    param.grad = torch.linspace(-1, 2, param.numel())
    optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("backend", BODIES)
def test_a_training_goes_on_beyond_float32(backend: str, kind: str) -> None:
    """Also through a checkpoint, which has float32 up to 2^24, and what counts further where it is needed."""
    param = torch.nn.Parameter(torch.linspace(1, 3, 9))
    optimizer = OPTIMIZERS[kind](param, backend=backend)
    stepped(optimizer, param)
    key = "pullback_step" if kind == "Pullback" else "step"
    state_of(optimizer, param)[key].fill_(2.0**24 - 3)
    for t in range(2**24 - 2, 2**24 + 8):
        if t == 2**24 + 3:
            saved = copy.deepcopy(optimizer.state_dict())
            param = torch.nn.Parameter(param.detach().clone())
            optimizer = OPTIMIZERS[kind](param, backend=backend)
            optimizer.load_state_dict(saved)
        before = state_of(optimizer, param)["ema"].clone()
        stepped(optimizer, param)
        step = state_of(optimizer, param)[key]
        assert step.item() == t and step.dtype == (torch.float32 if t <= 2**24 else torch.float64)
        assert torch.equal(before, state_of(optimizer, param)["ema"]) == (t % 3 != 0)


@pytest.mark.parametrize("kind", [PACE, MADA])
@pytest.mark.parametrize("backend", BODIES)
def test_one_count_at_its_end_in_the_last_of_two_groups(backend: str, kind: type) -> None:
    """Nothing of the first group is stepped twice, or once without the second."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in "ab"]
    optimizer = kind([{"params": [p]} for p in params], backend=backend)
    twin = kind([torch.nn.Parameter(torch.ones(3))], backend=backend)
    for step in (1, 2):
        for p in (*params, *twin.param_groups[0]["params"]):
            p.grad = torch.ones(3)
        optimizer.step()
        twin.step()
        if step == 1:
            optimizer.state[params[1]]["step"].fill_(2.0**24)
    assert torch.equal(params[0], twin.param_groups[0]["params"][0])
    assert [optimizer.state[p]["step"].item() for p in params] == [2, 2**24 + 1]


@pytest.mark.parametrize("value", [2**24 + 5, float(2**24 + 5), torch.tensor(2**24 + 5)], ids=["int", "float", "int64"])
@pytest.mark.parametrize("kind", ["PACE", "MADA"])
def test_a_count_beyond_float32_loads(kind: str, value: Any) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = OPTIMIZERS[kind](param)
    stepped(optimizer, param)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = value
    optimizer.load_state_dict(saved)
    assert optimizer.state[param]["step"].dtype == torch.float64 and optimizer.state[param]["step"].item() == 2**24 + 5
    saved["state"][0]["step"] = torch.tensor(5.0, dtype=torch.float64)  # as another program may have written it
    optimizer.load_state_dict(saved)
    assert optimizer.state[param]["step"].dtype == torch.float32


def test_a_short_count_is_saved_in_float32() -> None:
    """On a device, where a count that decides is float64 from the start."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = OPTIMIZERS["PACE"](param)
    stepped(optimizer, param)
    optimizer.state[param]["step"] = optimizer.state[param]["step"].double()
    saved = optimizer.state_dict()["state"][0]
    assert saved["step"].dtype == torch.float32 and saved["ema"] is optimizer.state[param]["ema"]
    assert optimizer.state[param]["step"].dtype == torch.float64
    assert exact_on(torch.device("cuda"), 3) and not exact_on(torch.device("cuda"), 1)
    assert not exact_on(torch.device("mps"), 3) and not exact_on(torch.device("cpu"), 3)
