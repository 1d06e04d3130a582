"""What the tests with trainers share: the optimizers as data, and what two runs have to agree in."""

from __future__ import annotations

import copy
from typing import Any

import torch

from pace_kernels import MADA, PACE, ScheduleFreeAdamW

# So small that steps are short, so large that the coefficients and the average move in a few of them.
SOON: dict[str, Any] = {"hyper_warmup": 2, "hyper_lr": 0.01}
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "PACE": (PACE, {"lr": 0.01, "weight_decay": 0.1, "lambda_pullback": 1.0}),
    "MADA": (MADA, {"lr": 0.01, **SOON}),
    "averaged MADA": (MADA, {"lr": 0.01, "use_ema_eval": True, "lambda_pullback": 0.5, **SOON}),
    "schedule-free": (ScheduleFreeAdamW, {"lr": 0.01, "weight_decay": 0.1, "warmup_steps": 3}),
}
AVERAGING = ("PACE", "averaged MADA", "schedule-free")


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def averages_of(module: torch.nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in optimizer.ema_state_dict(module).items()}


def same(a: Any, b: Any) -> bool:
    """Whether two nests of dicts, lists, tensors and numbers are equal, tensors to the last bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A copy of the whole state, options included."""
    return copy.deepcopy(optimizer.state_dict())
