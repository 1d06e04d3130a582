"""Promise: a step is whole or not at all, whatever Python runs in between; where it is not, the optimizer says so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from pace_kernels import PACE
from pace_kernels.whole import at_once


def stepped() -> tuple[torch.nn.Parameter, Any]:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = PACE([param], lr=0.1)
    param.grad = torch.ones(3)
    optimizer.step()
    return param, optimizer


def readers(param: torch.nn.Parameter, optimizer: Any) -> list[Any]:
    """What reads weights and states together."""
    model = torch.nn.Module()
    model.weight = param
    export = [lambda: optimizer.ema_state_dict(model), lambda: copy.deepcopy(optimizer)]
    return [optimizer.state_dict, *export, lambda: (optimizer.eval(), optimizer.train()), optimizer.step]


def test_a_step_under_way_is_said() -> None:
    param, optimizer = stepped()
    for call in readers(param, optimizer):
        with optimizer._under_way(), pytest.raises(RuntimeError, match="in the middle of a step"):
            call()
        call()
    assert optimizer.state[param]["step"] == 2


def test_what_an_exception_ended_half_done_needs_a_checkpoint() -> None:
    param, optimizer = stepped()
    saved = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ZeroDivisionError), optimizer._under_way([param]):
        param.detach().zero_()
        _ = 1 / 0
    for call in readers(param, optimizer):
        with pytest.raises(RuntimeError, match=r"half done.*load_state_dict"):
            call()
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert optimizer.state[param]["step"] == 2


def test_an_exception_before_the_first_write_leaves_a_whole_state() -> None:
    param, optimizer = stepped()
    with pytest.raises(ZeroDivisionError), optimizer._under_way([param]):
        _ = 1 / 0
    optimizer.step()
    with pytest.raises(ZeroDivisionError), optimizer._under_way():  # it could write anything
        _ = 1 / 0
    with pytest.raises(RuntimeError, match="in the middle"):
        optimizer.step()


@pytest.mark.parametrize(("number", "whole"), [(0, True), (1, False), (2, False)])
def test_of_calls_made_at_once_the_first_may_raise(number: int, whole: bool) -> None:
    _, optimizer = stepped()
    done: list[int] = []

    def call(i: int) -> Any:
        return lambda: done.append(i if i != number else 1 // 0)

    with pytest.raises(ZeroDivisionError):
        optimizer._at_once([call(0), call(1)], [call(2)])
    assert done == list(range(number)) and (not optimizer._unfinished) is whole


def test_at_once_makes_all_calls_in_order() -> None:
    done: list[int] = []
    at_once([lambda i=i: done.append(i) for i in range(5)])  # type: ignore[misc]
    assert done == [0, 1, 2, 3, 4]
