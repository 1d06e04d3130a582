"""MADA's switches as data: each case is a name and the options that differ from the defaults."""

from __future__ import annotations

from typing import Any

INSIDE = {"beta3": 0.4, "rho": 0.35, "c": 0.6, "gamma": 0.7}
SOON = {"hyper_warmup": 3, "hyper_lr": 0.01}  # so that a short test sees the coefficients move
ADAM = {"beta3": 0.0, "rho": 1.0, "learn": ()}

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "all, inside": {**INSIDE, **SOON},
    "all, from Adam": {**SOON, "beta3": 0.0, "rho": 1.0},
    "all, from Lion": {**SOON, "gamma": 0.0},
    "all, maximum": {**INSIDE, **SOON, "second_moment": "max"},
    "beta1 alone": {**INSIDE, **SOON, "learn": ("beta1",)},
    "hyperadam": {**SOON, "beta3": 0.0, "rho": 1.0, "learn": ("beta1", "beta2")},
    "no differences": {**INSIDE, **SOON, "beta3": 0.0, "learn": ("rho", "c", "gamma")},
    "no mean": {**INSIDE, **SOON, "rho": 1.0, "learn": ("beta1", "beta3", "gamma")},
    "no Lion": {**INSIDE, **SOON, "gamma": 1.0, "learn": ("beta2", "beta3", "rho", "c")},
    "differences alone": {**SOON, "beta3": 0.3, "rho": 1.0, "learn": ("beta3",)},
    "mean alone": {**SOON, "beta3": 0.0, "learn": ("rho",)},
    "Lion alone": {**SOON, "beta3": 0.0, "rho": 1.0, "learn": ("gamma",)},
    "fixed, inside": {**INSIDE, "learn": ()},
    "fixed, maximum": {**INSIDE, "learn": (), "second_moment": "max"},
    "fixed, no differences": {**INSIDE, "beta3": 0.0, "learn": ()},
    "AdamW": ADAM,
    "AVGrad": {**ADAM, "rho": 0.0},
    "AMSGrad": {**ADAM, "rho": 0.0, "second_moment": "max"},
    "Yogi": {**ADAM, "c": 0.0},
    "Adan": {**ADAM, "beta3": 0.92},
    "Adam and Lion": {**ADAM, "gamma": 0.5},
    "Lion": {**ADAM, "gamma": 0.0},
    "averaged Lion": {**ADAM, "gamma": 0.0, "use_ema_eval": True},
    "Lion pulled": {**ADAM, "gamma": 0.0, "lambda_pullback": 1.0},
    "no weight decay": {**INSIDE, **SOON, "weight_decay": 0.0},
    "pulled": {**INSIDE, **SOON, "lambda_pullback": 2.0},
    "pulled, AdamW": {**ADAM, "lambda_pullback": 0.5},
    "pulled from the step": {**INSIDE, **SOON, "lambda_pullback": 2.0, "pullback_from": "step"},
    "averaged, every third step": {**INSIDE, **SOON, "use_ema_eval": True, "ema_update_freq": 3},
    "pulled, every third step": {
        **INSIDE, **SOON, "lambda_pullback": 0.5, "ema_update_freq": 3, "clamp_pullback": False, "eps": 1e-3,
        "ema_kappa": None, "beta_ema": 0.05,
    },
    "maximize": {**INSIDE, **SOON, "maximize": True},
    "capturable": {**INSIDE, **SOON, "capturable": True},
}  # fmt: skip

# The state tensors of a parameter's size that each case may keep.
ADAM_STATES = {"exp_avg", "exp_avg_sq"}
STATES = {
    "default": {*ADAM_STATES, "exp_avg_diff", "mean_exp_avg_sq", "exp_avg_lion", "last_grad", "older_grad"},
    "all, maximum": {*ADAM_STATES, "exp_avg_diff", "max_exp_avg_sq", "exp_avg_lion", "last_grad", "older_grad"},
    "hyperadam": {*ADAM_STATES, "last_grad"},
    "no differences": {*ADAM_STATES, "mean_exp_avg_sq", "exp_avg_lion", "last_grad"},
    "no mean": {*ADAM_STATES, "exp_avg_diff", "exp_avg_lion", "last_grad", "older_grad"},
    "no Lion": {*ADAM_STATES, "exp_avg_diff", "mean_exp_avg_sq", "last_grad", "older_grad"},
    "fixed, inside": {*ADAM_STATES, "exp_avg_diff", "mean_exp_avg_sq", "exp_avg_lion", "last_grad"},
    "AdamW": ADAM_STATES,
    "AVGrad": {*ADAM_STATES, "mean_exp_avg_sq"},
    "AMSGrad": {*ADAM_STATES, "max_exp_avg_sq"},
    "Yogi": ADAM_STATES,
    "Adan": {*ADAM_STATES, "exp_avg_diff", "last_grad"},
    "Lion": {"exp_avg_lion"},
    "averaged Lion": {"exp_avg_lion", "ema"},
    "Lion pulled": {*ADAM_STATES, "exp_avg_lion", "ema"},
    "pulled, AdamW": {*ADAM_STATES, "ema"},
}
