"""The numbers of a step of MADA that are the same for a whole tensor. csrc/scalars.h computes the same ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..definitions import MADA
from ..definitions.mada import COEFFICIENTS, DONE
from .common import Options, Scalar, options_type
from .pace import gain_weight

# A parameter group's options, by the names of the operator ``mada_step_``. The coefficients here are the fixed ones;
# where a bit of ``learn`` is set, the coefficient is read from a tensor.
MadaOptions = options_type(MADA)


def coefficients_of(o: Options, learned: Sequence[Scalar] | None) -> list[Scalar]:
    """β1, β2, β3, ρ, c, γ, each learned or fixed."""
    fixed: list[Scalar] = [getattr(o, name) for name in COEFFICIENTS]
    return fixed if learned is None else [learned[k] if o.learn >> k & 1 else fixed[k] for k in range(len(fixed))]


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


def no_step(o: Options) -> MadaScalars:
    """The scalars of a step that leaves the moments as they are and has no sensitivities."""
    keep = dict.fromkeys(("beta1", "beta2", "beta3", "lion_beta2", "mean_old", "eps"), 1.0)
    return MadaScalars(**(dict.fromkeys(MadaScalars._fields[:-1], 0.0) | keep), second_max=o.second_max)


def last_step(o: Options, t: Scalar, last: Sequence[Scalar]) -> tuple[MadaScalars, list[Scalar]]:
    """The scalars and factors of the last step, ``t``, from the ``last_scalars`` that it left."""
    taken, lr, *q = last
    none, zeros = no_step(o), [0.0] * len(COEFFICIENTS)
    if not isinstance(taken, Tensor):
        return (mada_scalars(o, t, lr, q), mada_factors(t, lr, q)) if taken > DONE else (none, list(zeros))
    if not isinstance(t, Tensor):
        t = torch.full_like(taken, t)  # it may be 0, by which numbers of Python can't be divided

    def chosen(values: Iterable[Any], otherwise: Iterable[Any]) -> list[Any]:
        # Of two numbers torch.where makes float32; of the row's own kind, float64.
        first = (a if isinstance(a, Tensor) else torch.full_like(taken, a) for a in values)
        return [torch.where(taken > DONE, a, b) for a, b in zip(first, otherwise, strict=True)]

    scalars = chosen(mada_scalars(o, t, lr, q)[:-1], none[:-1])
    return MadaScalars._make([*scalars, o.second_max]), chosen(mada_factors(t, lr, q), zeros)
