"""PACE's switches as data: each case is a name and the options that differ from the defaults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

# Without the clamp, eps keeps the gain at most 1.5: beyond 2 the formula itself diverges.
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "weight decay": {"weight_decay": 0.1},
    "no weight decay": {"weight_decay": 0.0},
    "strong pullback": {"lambda_pullback": 20.0},
    "no clamp": {"clamp_pullback": False, "eps": 1e-3},
    "from the step": {"pullback_from": "step", "lambda_pullback": 20.0},
    "from the step, no clamp": {"pullback_from": "step", "clamp_pullback": False, "eps": 1e-3},
    "fixed averaging weight": {"ema_kappa": None, "beta_ema": 0.05},
    "average at rest": {"ema_kappa": None, "beta_ema": 0.0},
    "late decay": {"ema_rho": 7.0, "ema_kappa": 0.7},
    "fast decay": {"ema_gamma": 1e3, "ema_kappa": 2.0},  # reaches the floor of 1e-4
    "no decay of the weight": {"ema_kappa": 0.0},
    "average every third step": {"ema_update_freq": 3},
    "average every third step, from the step": {"ema_update_freq": 3, "pullback_from": "step"},
    "no first moment": {"betas": (0.0, 0.99)},
    "no memory of squares": {"betas": (0.5, 0.0)},
    "no moments": {"betas": (0.0, 0.0)},
    "maximize": {"maximize": True},
    "averaged AdamW": {"lambda_pullback": 0.0},
    "averaged AdamW, every fifth step": {"lambda_pullback": 0.0, "ema_update_freq": 5},
    "AdamW": {"lambda_pullback": 0.0, "use_ema_eval": False},
    "pullback without evaluation": {"use_ema_eval": False},
    "large epsilon": {"eps": 1e-2},
    "capturable": {"capturable": True},
    "capturable, average every third step": {"capturable": True, "ema_update_freq": 3},
    "everything": {
        "weight_decay": 0.2,
        "betas": (0.8, 0.97),
        "lambda_pullback": 3.0,
        "ema_kappa": 0.5,
        "ema_rho": 4.0,
        "ema_gamma": 0.3,
        "ema_update_freq": 2,
        "pullback_from": "step",
        "maximize": True,
        "log_stats": True,
    },
}

SHAPES = [(257, 33), (19,), (), (0, 4), (3, 1, 5)]


def weights(dtype: torch.dtype, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(steps: int, dtype: torch.dtype, seed: int = 1) -> Iterator[list[torch.Tensor]]:
    """Gradients of normal deviates times a scale of each coordinate's own, spread over 12 orders of magnitude, so that
    clamped and unclamped coordinates meet in every tensor. float16 holds the upper part of them."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (-6.0, 3.0) if dtype == torch.float16 else (-9.0, 3.0)
    scales = [10.0 ** torch.empty(shape).uniform_(low, high, generator=generator) for shape in SHAPES]
    for _ in range(steps):
        yield [(torch.randn(s.shape, generator=generator) * s).to(dtype) for s in scales]


def assert_same_bits(a: tuple[list[Any], torch.optim.Optimizer], b: tuple[list[Any], torch.optim.Optimizer]) -> None:
    """Two trainings, each its parameters and its optimizer, ended with the same weights and states."""
    for p, q in zip(a[0], b[0], strict=True):
        assert torch.equal(p, q)
        assert a[1].state[p].keys() == b[1].state[q].keys()
        for key, value in a[1].state[p].items():
            assert torch.equal(value, b[1].state[q][key]), key
