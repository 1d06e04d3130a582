"""MADA: a parameterized optimizer whose coefficients are learned by hypergradient descent. The rule:
csrc/rules/mada.h."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from .kit import (
    AVERAGING,
    BELOW_ONE,
    NONNEGATIVE,
    POSITIVE,
    PULLING,
    STOCHASTIC_ROUNDING,
    UNIT,
    Definition,
    Extra,
    Operand,
    Option,
    Options,
    Row,
    Scalar,
    gain_weight,
)

# MADA's coefficients, in the order of every tensor and list of six; MadaCoefficient in csrc/rules/mada.h has the same.
COEFFICIENTS = ("beta1", "beta2", "beta3", "rho", "c", "gamma")
# What a call of mada_step_ leaves in `hypergradients`, float64: a sum for each coefficient, and the learning rate.
HYPERGRADIENTS = (*COEFFICIENTS, "lr")
# What a parameter remembers of its last step, float64: what can be done about it, and what it used. `taken` is REDO
# where the moments are those before it, DONE where they are those after it, NO_GRADIENT where there is no gradient of a
# last step: then the step takes its own for it, so that differences are 0. LastScalar in csrc/rules/mada.h.
LAST_SCALARS = ("taken", "lr", *COEFFICIENTS)
REDO, DONE, NO_GRADIENT = 1.0, 0.0, -1.0

MADA = Definition(
    op="mada_step_",
    name="Mada",
    lists=(
        Operand("x", "params", "weight", codec="weight"),
        Operand("g", "grads", "gradient", writes="false", mutable=False),
        Operand("m", "exp_avgs", reads="adam", writes="adam", empty="", codec="moment"),
        Operand("v", "exp_avg_sqs", reads="adam", writes="adam", empty="", codec="square", dither=1),
        Operand("n", "exp_avg_diffs", reads="diff", writes="diff", empty="", codec="moment", dither=2),
        # In bfloat16 a mean is rounded stochastically; a maximum to nearest, since one of dithered values creeps up. Of
        # v in 8 bits it is ahead all the same: at beta2 = 0.999 by 3 % after 1,000 steps and 10 % after 3,000, when
        # weights had gone 1.7 % less far.
        Operand("w", "second_exp_avg_sqs", reads="second", writes="second", empty="", codec="second", dither=4),
        Operand("l", "exp_avg_lions", reads="lion", writes="lion", empty="", codec="moment", dither=3),
        # Where both gradients are kept, the new one goes over the older one, and the caller exchanges the two lists;
        # with `stay` the lists keep their roles. What is written twice is rounded once: it has no more bits then.
        Operand(
            *("last_g", "last_grads"),
            reads="lag || diff",
            writes="stay || lag != diff",
            empty="",
            codec="gradient",
            dither=5,
        ),
        Operand(
            *("older_g", "older_grads"),
            reads="lag && diff",
            writes="lag && diff",
            empty="",
            codec="gradient",
            dither=5,
        ),
        Row("last_scalars", len(LAST_SCALARS)),
        Operand("e", "emas", reads="average", writes="average", empty="", codec="average"),
    ),
    options=(
        Option("learn", "int"),
        Option("lr", "float", NONNEGATIVE),
        Option("beta1", "float", BELOW_ONE),
        Option("beta2", "float", BELOW_ONE),
        Option("beta3", "float", BELOW_ONE),
        Option("rho", "float", UNIT),
        Option("c", "float", UNIT),
        Option("gamma", "float", UNIT),
        Option("eps", "float", POSITIVE),
        Option("weight_decay", "float", NONNEGATIVE),
        Option("lion_beta1", "float", BELOW_ONE),
        Option("lion_beta2", "float", BELOW_ONE),
        Option("second_max", "bool"),
        *PULLING,
        Option("clamp_pullback", "bool"),
        *AVERAGING,
        Option("pullback_from_step", "bool"),
        Option("maximize", "bool"),
        STOCHASTIC_ROUNDING,
    ),
    flags=("lag", "diff", "second", "lion", "adam", "average", "stay"),
    extras=(
        Extra("coefficients", len(COEFFICIENTS), written=False),
        Extra("hypergradients", len(HYPERGRADIENTS), written=True),
    ),
)


class MadaScalars(NamedTuple):
    """The scalars of one tensor's step; the fields of ``MadaScalars`` in csrc/rules/mada.h."""

    beta1: Scalar
    one_minus_beta1: Scalar
    beta2: Scalar
    one_minus_beta2: Scalar
    beta3: Scalar
    one_minus_beta3: Scalar
    lion_beta1: Scalar
    one_minus_lion_beta1: Scalar
    lion_beta2: Scalar
    one_minus_lion_beta2: Scalar
    rho: Scalar
    one_minus_rho: Scalar
    c: Scalar
    one_minus_c: Scalar
    mean_new: Scalar
    mean_old: Scalar
    eps: Scalar
    inv_eps: Scalar
    inv_bias1: Scalar
    inv_bias2: Scalar
    adam_size: Scalar
    lion_size: Scalar
    bias1_slope: Scalar
    bias2_slope: Scalar
    square_slope: Scalar
    pull_gain: Scalar
    gain_cap: Scalar
    second_max: bool


def mada_scalars(o: Options, t: Scalar, lr: Scalar, q: Sequence[Scalar]) -> MadaScalars:
    beta1, beta2, beta3, rho, c, gamma = q
    bias1, bias2 = 1.0 - beta1**t, 1.0 - beta2**t
    return MadaScalars(
        beta1=beta1,
        one_minus_beta1=1.0 - beta1,
        beta2=beta2,
        one_minus_beta2=1.0 - beta2,
        beta3=beta3,
        one_minus_beta3=1.0 - beta3,
        lion_beta1=o.lion_beta1,
        one_minus_lion_beta1=1.0 - o.lion_beta1,
        lion_beta2=o.lion_beta2,
        one_minus_lion_beta2=1.0 - o.lion_beta2,
        rho=rho,
        one_minus_rho=1.0 - rho,
        c=c,
        one_minus_c=1.0 - c,
        mean_new=1.0 / t,
        mean_old=(t - 1.0) / t,
        eps=o.eps,
        inv_eps=1.0 / o.eps,
        inv_bias1=1.0 / bias1,
        inv_bias2=1.0 / bias2,
        adam_size=lr * gamma,
        lion_size=lr * (1.0 - gamma),
        bias1_slope=t * beta1 ** (t - 1.0) / bias1,
        bias2_slope=t * beta2 ** (t - 1.0),
        square_slope=2.0 * rho * (1.0 - beta2) / bias2,
        pull_gain=lr * o.lambda_pullback * gain_weight(o, t) if o.pullback_from_step else 0.0,
        gain_cap=1.0 if o.clamp_pullback else math.inf,
        second_max=o.second_max,
    )


def mada_factors(t: Scalar, lr: Scalar, q: Sequence[Scalar]) -> list[Scalar]:
    """The factors common to all coordinates: h_q is the factor of q times the sum of the terms."""
    beta1, beta2, _, rho, _, gamma = q
    bias1, bias2 = 1.0 - beta1**t, 1.0 - beta2**t
    A, square = lr * gamma, rho * (1.0 - beta2)
    return [-A / bias1, A / bias2, A, A / bias2, A * square / bias2, lr]
