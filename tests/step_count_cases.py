"""Step counts around 2^24, where float32 stops counting: what each body of each operator has to do about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pullback_cases
import pytest
import test_mada_native
import test_native
import test_pullback_native
import torch

LAST = 2**24
NAMES = ("params", "grads", "exp_avgs", "exp_avg_sqs", "emas", "steps")
SLOW = {"ema_update_freq": 3, "ema_kappa": None, "beta_ema": 0.25, "ema_rho": 0.0}
OPERATORS: dict[str, tuple[Callable[[], dict[str, Any]], dict[str, Any]]] = {
    "pace_step_": (
        lambda: dict(zip(NAMES, test_native.operands(), strict=True)),
        test_native.OPTIONS,
    ),
    "mada_step_": (test_mada_native.operands, test_mada_native.OPTIONS),
    "pullback_": (test_pullback_native.operands, pullback_cases.OPTIONS),
}


def moves_every_third_step(op: Callable[..., None], name: str, capturable: bool) -> None:
    """From 2^24 − 4 and 2^24 + 6 on in float64, and from 5 in float32, all in one call."""
    torch.manual_seed(0)
    operands, options = OPERATORS[name]
    lists = {k: [*v, v[0].clone()] if isinstance(v, list) else v for k, v in operands().items()}
    start = (LAST - 4, LAST + 6, 5)
    dtypes = (torch.float64, torch.float64, torch.float32)
    lists["steps"] = [torch.tensor(float(t), dtype=dtype) for t, dtype in zip(start, dtypes, strict=True)]
    for k in range(1, 9):
        before = [e.clone() for e in lists["emas"]]
        op(*lists.values(), **{**options, **SLOW, "capturable": capturable})
        assert [(t.item(), t.dtype) for t in lists["steps"]] == [(t + k, d) for t, d in zip(start, dtypes, strict=True)]
        changed = [not torch.equal(a, b) for a, b in zip(before, lists["emas"], strict=True)]
        assert changed == [(t + k) % 3 == 0 for t in start]


def stops_before_it_loses_count(op: Callable[..., None], name: str, **given: torch.Tensor) -> None:
    """float32 counts up to 2^24 itself; there it is refused, also in a step that found_inf leaves undone, and nothing
    has changed."""
    torch.manual_seed(0)
    operands, options = OPERATORS[name]
    lists = operands()
    lists["steps"] = [torch.tensor(7.0), torch.tensor(float(LAST - 1))]
    op(*lists.values(), **options)
    assert [t.item() for t in lists["steps"]] == [8.0, LAST]
    before = {k: [t.clone() for t in v] if isinstance(v, list) else v.clone() for k, v in lists.items()}
    with pytest.raises(RuntimeError, match=r"steps\[1\] is float32 and has reached 2\^24, where float32 stops"):
        op(*lists.values(), **options, **given)
    for k, v in lists.items():
        for a, b in zip(v, before[k], strict=True) if isinstance(v, list) else [(v, before[k])]:
            assert torch.equal(a, b), k
    lists["steps"][1] = lists["steps"][1].double()
    op(*lists.values(), **options)
    assert lists["steps"][1].item() == LAST + 1
