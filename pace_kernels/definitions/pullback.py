"""The average and the pullback behind another optimizer's step. The rule: csrc/rules/pullback.h."""

from .kit import (
    AVERAGING,
    BELOW_ONE,
    NONNEGATIVE,
    NOT_NEGATIVE_COUNT,
    PACE_STATS,
    POSITIVE,
    PULLING,
    UNIT,
    Definition,
    Extra,
    Operand,
    Option,
)

PULLBACK = Definition(
    op="pullback_",
    name="Pullback",
    lists=(
        Operand("x", "params", "weight", writes="pull"),
        Operand("before", "befores", "copy", reads="before", writes="false", mutable=False, empty=""),
        Operand("v", "second_moments", "moment", reads="moment", writes="false", mutable=False, empty=""),
        # On a grid it was written beside the weights as they were before the base's step: it is read beside `before`.
        Operand("e", "emas", reads="pull || average", writes="average", codec="average"),
    ),
    options=(
        Option("lr", "float", NONNEGATIVE),
        *PULLING,
        Option("gain", "float?", UNIT),
        Option("clamp_pullback", "bool"),
        Option("beta2", "float", BELOW_ONE),
        Option("eps", "float", POSITIVE),
        Option("step_offset", "int", NOT_NEGATIVE_COUNT),
        *AVERAGING,
        # Whether the distance is measured from x, also where `before` is there to read an average beside it.
        Option("pullback_from_step", "bool", default="False"),
    ),
    flags=("before", "moment", "pull", "average", "stats"),
    extras=(Extra("stats", len(PACE_STATS), written=True),),
    scaling=("found_inf",),
)
