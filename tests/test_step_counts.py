"""Promise: steps are counted beyond 2^24, and an average that moves every so many steps moves at these, on every
backend. Triton's and CUDA's bodies are in test_triton_interpreted.py and test_cuda_emulated.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from step_count_cases import OPERATORS, moves_every_third_step, stops_before_it_loses_count

from pace_kernels import torch_rules

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
