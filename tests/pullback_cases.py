"""The pullback's switches as data: each case is a name and what differs from the defaults; and steps of a base that are
the same on every backend, so that the operator ``pullback_`` alone is compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pace_cases import gradients, weights
from torch import Tensor

OPTIONS: dict[str, Any] = {
    "lr": 1e-2, "lambda_pullback": 5.0, "gain": None, "clamp_pullback": True, "beta2": 0.99, "eps": 1e-8,
    "step_offset": 0, "beta_ema": 0.01, "ema_kappa": 0.2, "ema_rho": 0.0, "ema_gamma": 1.0, "ema_update_freq": 1,
    "capturable": False,
}  # fmt: skip

# `from`: where the distance is measured; `moment`: whether v is in the parameter's dtype ("narrow") or in float32.
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "narrow moment": {"moment": "narrow"},
    "from the step": {"from": "step"},
    "from the step, narrow moment": {"from": "step", "moment": "narrow"},
    "no clamp": {"clamp_pullback": False, "eps": 1e-3, "lambda_pullback": 0.1},
    "constant": {"gain": 0.25},
    "constant from the step": {"gain": 1.0, "from": "step"},
    "average": {"lambda_pullback": 0.0},
    "average, constant of zero": {"gain": 0.0},
    "average every third step": {"ema_update_freq": 3},
    "average every third step, no pull": {"ema_update_freq": 3, "lambda_pullback": 0.0},
    "fixed averaging weight": {"ema_kappa": None, "beta_ema": 0.05},
    "late and fast decay": {"ema_rho": 2.0, "ema_gamma": 1e3, "ema_kappa": 2.0},
    "no bias correction": {"beta2": 0.0},
    "a base that trained before": {"step_offset": 40, "beta2": 0.999},
    "capturable": {"capturable": True},
    "capturable, average every third step, no pull": {"capturable": True, "ema_update_freq": 3, "lambda_pullback": 0.0},
    "capturable constant": {"capturable": True, "gain": 0.01, "ema_update_freq": 2},
    "everything": {
        "lambda_pullback": 3.0, "ema_kappa": 0.5, "ema_rho": 1.0, "ema_gamma": 0.3, "ema_update_freq": 2,
        "step_offset": 3, "from": "step", "moment": "narrow", "eps": 1e-4,
    },
}  # fmt: skip

Lists = dict[str, list[Tensor]]


def options_of(case: dict[str, Any]) -> dict[str, Any]:
    return OPTIONS | {k: v for k, v in case.items() if k in OPTIONS}


def pulls(case: dict[str, Any]) -> bool:
    o = options_of(case)
    return bool(o["lambda_pullback"] if o["gain"] is None else o["gain"])


def start(case: dict[str, Any], dtype: torch.dtype, state: torch.dtype = torch.float32) -> Lists:
    """The operator's lists before the first step: the average is at the weights, the second moment is 0."""
    params = [p.detach() for p in weights(dtype)]
    o, pull = options_of(case), pulls(case)
    moment_dtype = dtype if case.get("moment") == "narrow" else state
    before, moment = pull and case.get("from") != "step", pull and o["gain"] is None
    return {
        "params": params,
        "befores": [p.clone() for p in params] if before else [],
        "second_moments": [torch.zeros_like(p, dtype=moment_dtype) for p in params] if moment else [],
        "emas": [p.to(state, copy=True) for p in params],
        "steps": [torch.zeros(()) for _ in params],
    }


def base_step(lists: Lists, grads: list[Tensor], o: dict[str, Any]) -> None:
    """A step of a base: the second moment of RMSprop, and a move of at most lr. One rounding an operation, so that it
    is the same wherever the tensors lie: torch's vectorized loops contract, and their remainders do not."""
    for before, param in zip(lists["befores"], lists["params"], strict=False):
        before.copy_(param)
    for v, g in zip(lists["second_moments"], grads, strict=False):
        v.mul_(0.9).add_(g.to(v.dtype).square().mul_(0.1))
    for param, g in zip(lists["params"], grads, strict=True):
        param.sub_((o["lr"] * g.float().clamp(-1.0, 1.0)).to(param.dtype))


def train(
    op: Callable[..., None],
    case: dict[str, Any],
    dtype: torch.dtype,
    steps: int,
    stats: Tensor | None = None,
    state: torch.dtype = torch.float32,
    **given: Any,
) -> Lists:
    """Steps of the base, each with the operator behind it."""
    lists, o = start(case, dtype, state), options_of(case)
    for grads in gradients(steps, dtype):
        base_step(lists, grads, o)
        op(*lists.values(), stats, **o, **given)
    return lists


def assert_same_lists(a: Lists, b: Lists) -> None:
    for name, tensors in a.items():
        for i, (x, y) in enumerate(zip(tensors, b[name], strict=True)):
            assert torch.equal(x, y), f"{name}[{i}]"
