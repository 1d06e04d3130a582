"""PACE: AdamW + EMA of the weights + clipped pullback toward it. The rule: csrc/rules/pace.h."""

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
