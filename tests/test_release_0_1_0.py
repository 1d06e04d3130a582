"""Promise: a checkpoint that 0.1.0 saved, plain, swapped or flattened, loads, and training goes on to the same bits,
but for the average, which is e + w (x₊ − e) since. tests/data/make_release010.py says how the files were made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from data import checkpoint
from data.make_format0 import CASES, DTYPES, ends, model_of, optimizer_of, train
from data.make_release010 import FLAT
from test_checkpoint_properties import bits
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

import pace_kernels


def load_plain(model: torch.nn.Module, optimizer: Any, saved: dict[str, Any]) -> None:
    optimizer.load_state_dict(saved["optimizer"])
    model.load_state_dict(saved["model"])


def load_model_first(model: torch.nn.Module, optimizer: Any, saved: dict[str, Any]) -> None:
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])


def load_flat(model: torch.nn.Module, optimizer: Any, saved: dict[str, Any]) -> None:
    set_optimizer_state_dict(model, optimizer, saved["flat"], options=FLAT)
    model.load_state_dict(saved["model"])


LOADS: list[Callable[[torch.nn.Module, Any, dict[str, Any]], None]] = [load_plain, load_model_first, load_flat]


def resumed(case: str, dtype: torch.dtype, load: Callable[..., None]) -> tuple[torch.nn.Module, Any, dict[str, Any]]:
    made = torch.load(checkpoint(f"release010-{case}.pt"), weights_only=True)[str(dtype)]
    model = model_of(dtype)
    optimizer = optimizer_of(pace_kernels, case, model)
    load(model, optimizer, made["saved"])
    assert optimizer._swapped == CASES[case][3]
    optimizer.train()
    return model, optimizer, made


def without_averages(found: dict[str, Any]) -> dict[str, Any]:
    states = [{name: value for name, value in state.items() if name != "ema"} for state in found["states"]]
    return {"model": dict(found["model"]), "states": states, "learned": found["learned"]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("case", CASES)
def test_it_goes_on_where_0_1_0_went_on(case: str, load: Callable[..., None], dtype: torch.dtype) -> None:
    """Weights, moments, coefficients to the bit of 0.1.0; the average to that of what was recorded since, which is
    three steps, of three roundings each in either form, away."""
    if load is load_flat and CASES[case][3]:
        with pytest.raises(ValueError, match=r"saved between eval\(\) and train\(\).*call optimizer.train\(\)"):
            resumed(case, dtype, load)
        return
    model, optimizer, made = resumed(case, dtype, load)
    train(model, optimizer, range(4, 7))
    now = ends(model, optimizer)
    assert bits(without_averages(now)) == bits(without_averages(made["ends_of_old"]))
    assert bits(now["states"]) == bits(made["ends"]["states"])
    for ours, theirs in zip(now["states"], made["ends_of_old"]["states"], strict=True):
        assert ours.keys() == theirs.keys()
        if "ema" in ours:
            bound = 3 * 6 * 2**-24 * float(theirs["ema"].abs().max())
            torch.testing.assert_close(ours["ema"], theirs["ema"], rtol=0, atol=bound)


@pytest.mark.parametrize("case", [case for case, (*_, swapped) in CASES.items() if swapped or case == "pace"])
def test_its_averages_go_on_by_the_formula_of_today(case: str) -> None:
    model, optimizer, _ = resumed(case, torch.float32, load_plain)
    averages = {p: optimizer.state[p]["ema"].clone() for p in model.parameters()}
    for t in range(4, 7):
        train(model, optimizer, range(t, t + 1))
        w = torch.tensor(max((1.0 + 1.0 * (t + 1)) ** -0.2, 1e-4), dtype=torch.float32)  # κ 0.2, ρ 0, γ 1; steps from 1
        for p, e in averages.items():
            e += w * (p.detach() - e)
            assert torch.equal(optimizer.state[p]["ema"], e)
