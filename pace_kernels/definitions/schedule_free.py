"""Schedule-free AdamW: gradients at y, between the steps z and their weighted mean. The rule:
csrc/rules/schedule_free.h."""

from typing import NamedTuple

from .kit import (
    AT_LEAST_ONE,
    BELOW_ONE,
    NONNEGATIVE,
    POSITIVE,
    STOCHASTIC_ROUNDING,
    UNIT,
    Definition,
    Extra,
    Operand,
    Option,
    Options,
    Scalar,
)

# The numbers of the tensor `schedule`, in place of the options of these names where only the device knows them.
SCHEDULE = ("count", "share")

SCHEDULE_FREE = Definition(
    op="schedule_free_step_",
    name="ScheduleFree",
    lists=(
        Operand("y", "params", "weight", codec="weight"),
        Operand("g", "grads", "gradient", writes="false", mutable=False),
        Operand("v", "exp_avg_sqs", codec="square", dither=1),
        Operand("z", "zs", codec="iterate", dither=2),
    ),
    options=(
        Option("lr", "float", NONNEGATIVE),
        Option("beta1", "float", BELOW_ONE),
        Option("beta2", "float", BELOW_ONE),
        Option("eps", "float", POSITIVE),
        Option("weight_decay", "float", NONNEGATIVE),
        Option("count", "float", AT_LEAST_ONE),
        Option("share", "float", UNIT),
        Option("maximize", "bool"),
        STOCHASTIC_ROUNDING,
    ),
    # Where z lies on a grid, a rule leaves how far it moves in its place: z₊ has not the bits to tell.
    flags=("increment",),
    extras=(Extra("schedule", len(SCHEDULE), written=False),),
)


class ScheduleFreeScalars(NamedTuple):
    """The scalars of one tensor's step; the fields of ``ScheduleFreeScalars`` in csrc/rules/schedule_free.h."""

    grad_factor: Scalar
    beta2: float
    one_minus_beta2: float
    inv_bias2: Scalar
    eps: float
    weight_decay: float
    share: Scalar
    y_size: Scalar
    z_size: Scalar


def schedule_free_scalars(o: Options, t: Scalar, factor: Scalar = 1.0) -> ScheduleFreeScalars:
    """``factor`` multiplies the gradient: clip coefficient / gradient scale."""
    return ScheduleFreeScalars(
        grad_factor=-factor if o.maximize else factor,
        beta2=o.beta2,
        one_minus_beta2=1.0 - o.beta2,
        inv_bias2=1.0 / (1.0 - o.beta2**t),
        eps=o.eps,
        weight_decay=o.weight_decay,
        share=o.share,
        y_size=o.lr * (1.0 - o.beta1 * (1.0 - o.share)),
        z_size=o.lr,
    )
