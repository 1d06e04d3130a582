"""The average and the pullback behind another optimizer's step. The rule: csrc/rules/pullback.h."""

import math
from typing import NamedTuple

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
    Options,
    Scalar,
    average_moves,
    average_weight,
    gain_weight,
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


def pulls(o: Options) -> bool:
    """Whether the weights move."""
    return bool(o.lambda_pullback if o.gain is None else o.gain)


class PullbackScalars(NamedTuple):
    """The scalars of one tensor's step; the fields of ``PullbackScalars`` in csrc/rules/pullback.h."""

    inv_bias2: Scalar
    eps: float
    gain: Scalar
    gain_cap: float
    weight: Scalar
    moves: Scalar


def pullback_gain(o: Options, t: Scalar) -> Scalar:
    """The gain, without the factor 1 / D if there is a second moment."""
    gain: Scalar = o.lr * o.lambda_pullback * gain_weight(o, t) if o.gain is None else o.gain
    return gain


def pullback_scalars(o: Options, t: Scalar) -> PullbackScalars:
    return PullbackScalars(
        inv_bias2=1.0 / (1.0 - o.beta2 ** (t + o.step_offset)),
        eps=o.eps,
        gain=pullback_gain(o, t),
        gain_cap=1.0 if o.clamp_pullback else math.inf,
        weight=average_weight(o, t),
        moves=average_moves(o, t),
    )
