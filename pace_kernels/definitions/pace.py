"""PACE: AdamW + EMA of the weights + clipped pullback toward it. The rule: csrc/rules/pace.h."""

import math
from typing import NamedTuple

from .kit import (
    AVERAGING,
    BELOW_ONE,
    NONNEGATIVE,
    PACE_STATS,
    POSITIVE,
    PULLING,
    STOCHASTIC_ROUNDING,
    Definition,
    Extra,
    Operand,
    Option,
    Options,
    Scalar,
    average_moves,
    average_weight,
    gain_weight,
)

PACE = Definition(
    op="pace_step_",
    name="Pace",
    lists=(
        Operand("x", "params", "weight", codec="weight"),
        Operand("g", "grads", "gradient", writes="false", mutable=False),
        Operand(
            *("m", "exp_avgs"),
            reads="moment",
            writes="moment",
            empty="; it may be empty, since beta1 is 0",
            codec="moment",
        ),
        Operand("v", "exp_avg_sqs", codec="square", dither=1),
        Operand(
            *("e", "emas"),
            reads="pull || average",
            writes="average",
            empty="; it may be empty, since lambda_pullback is 0",
            codec="average",
        ),
    ),
    options=(
        Option("lr", "float", NONNEGATIVE),
        Option("beta1", "float", BELOW_ONE),
        Option("beta2", "float", BELOW_ONE),
        Option("eps", "float", POSITIVE),
        Option("weight_decay", "float", NONNEGATIVE),
        *PULLING,
        Option("clamp_pullback", "bool"),
        *AVERAGING,
        Option("pullback_from_step", "bool"),
        Option("maximize", "bool"),
        STOCHASTIC_ROUNDING,
    ),
    flags=("moment", "pull", "average", "stats"),
    extras=(Extra("stats", len(PACE_STATS), written=True),),
)


class PaceScalars(NamedTuple):
    """The scalars of one tensor's step; the fields of ``PaceScalars`` in csrc/rules/pace.h."""

    grad_factor: Scalar
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    inv_bias2: Scalar
    eps: float
    decay: Scalar
    shrink: Scalar
    step_size: Scalar
    gain: Scalar
    gain_cap: float
    weight: Scalar
    from_step: bool
    moves: Scalar


def pace_scalars(o: Options, t: Scalar, factor: Scalar = 1.0) -> PaceScalars:
    """``factor`` multiplies the gradient: clip coefficient / gradient scale. MADA has these options too."""
    return PaceScalars(
        grad_factor=-factor if o.maximize else factor,
        beta1=o.beta1,
        one_minus_beta1=1.0 - o.beta1,
        beta2=o.beta2,
        one_minus_beta2=1.0 - o.beta2,
        inv_bias2=1.0 / (1.0 - o.beta2**t),
        eps=o.eps,
        decay=1.0 - o.lr * o.weight_decay,
        shrink=o.lr * o.weight_decay,
        step_size=o.lr / (1.0 - o.beta1**t),
        gain=o.lr * o.lambda_pullback * gain_weight(o, t),
        gain_cap=1.0 if o.clamp_pullback else math.inf,
        weight=average_weight(o, t),
        from_step=o.pullback_from_step,
        moves=average_moves(o, t),
    )
