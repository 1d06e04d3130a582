"""MADA: a parameterized optimizer whose coefficients are learned by hypergradient descent. The rule:
csrc/rules/mada.h."""

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
    Row,
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
