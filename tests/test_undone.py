"""Promise: with ``skip_nonfinite`` a bad gradient leaves the whole step undone; so does memory that is gone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pace_cases import assert_same_bits

from pace_kernels import MADA, PACE

RULES = {"PACE": PACE, "MADA": MADA}
SHAPES = [(5, 3), (), (7,)]


def build(rule: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[list[torch.nn.Parameter], Any]:
    params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES]
    extra = {"hyper_warmup": 1} if rule == "MADA" else {}
    groups = [{"params": params[:2]}, {"params": params[2:], **options.pop("second", {})}]
    return params, RULES[rule](groups, lr=1e-2, **extra, **options)


def step(params: list[torch.nn.Parameter], optimizer: Any, t: int, bad: float | None = None, where: int = 2) -> None:
    generator = torch.Generator().manual_seed(t)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    if bad is not None:
        params[where].grad.view(-1)[0] = bad
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_that_is_left_undone_never_was(rule: str, bad: float, dtype: torch.dtype) -> None:
    """Also the first; and the gradients that MADA keeps stay those of the last step that counted."""
    one, other = build(rule, dtype, skip_nonfinite=True), build(rule, dtype)
    for t in range(6):
        if t in (0, 2, 3):
            before = [p.detach().clone() for p in one[0]]
            step(*one, t + 100, bad, where=t % 3)
            assert all(torch.equal(a, p) for a, p in zip(before, one[0], strict=True))
        step(*one, t)
        step(*other, t)
    assert_same_bits(one, other)
    assert one[1].skipped_steps == 3 and other[1].skipped_steps == 0
    if rule == "MADA":
        assert one[1].coefficients == other[1].coefficients


@pytest.mark.parametrize("rule", RULES)
def test_only_groups_that_ask_for_it_are_watched(rule: str) -> None:
    params, optimizer = build(rule, second={"skip_nonfinite": True})
    step(params, optimizer, 0, float("nan"), where=0)
    assert optimizer.skipped_steps == 0 and params[0].isnan().any()
    before = params[0].detach().clone()
    step(params, optimizer, 1, float("nan"), where=2)  # watched: the whole step, of the first group too
    assert optimizer.skipped_steps == 1 and torch.equal(params[0].nan_to_num(), before.nan_to_num())
    assert params[2].isfinite().all() and optimizer.state[params[0]]["step"] == 1


@pytest.mark.parametrize("rule", RULES)
def test_the_count_is_in_checkpoints(rule: str) -> None:
    params, optimizer = build(rule, skip_nonfinite=True)
    for t in range(3):
        step(params, optimizer, t, float("inf") if t == 1 else None)
    saved = copy.deepcopy(optimizer.state_dict())
    step(params, optimizer, 3, float("nan"))
    _, other = build(rule)
    other.load_state_dict(saved)
    assert (optimizer.skipped_steps, other.skipped_steps) == (2, 1)


def test_the_option_is_checked() -> None:
    with pytest.raises(ValueError, match="skip_nonfinite must be True or False, got 1"):
        PACE([torch.nn.Parameter(torch.ones(2))], skip_nonfinite=1)


# ---- memory that is gone ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_swap_with_an_emptied_parameter_is_refused_whole(dtype: torch.dtype, swapped: bool) -> None:
    params, optimizer = build("PACE", dtype)
    step(params, optimizer, 0)
    if swapped:
        optimizer.eval()
    kept = params[2].untyped_storage().nbytes()
    values = params[2].detach().clone()
    params[2].data.untyped_storage().resize_(0)
    before = [p.detach().clone() for p in params[:2]]
    with pytest.raises(RuntimeError, match=r"memory"):
        (optimizer.train if swapped else optimizer.eval)()
    assert all(torch.equal(a, p) for a, p in zip(before, params[:2], strict=True)) and optimizer._swapped is swapped
    params[2].data.untyped_storage().resize_(kept)
    params[2].data.copy_(values)
    optimizer.eval()
    optimizer.train()


@pytest.mark.parametrize("rule", RULES)
def test_an_emptied_gradient_in_a_second_group_stops_the_first_too(rule: str) -> None:
    params, optimizer = build(rule)
    step(params, optimizer, 0)
    before = [p.detach().clone() for p in params]
    params[2].grad.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"memory"):
        optimizer.step()
    assert all(torch.equal(a, p) for a, p in zip(before, params, strict=True))
    assert {state["step"].item() for state in optimizer.state.values()} == {1.0}
