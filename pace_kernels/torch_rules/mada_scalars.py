"""The numbers of a step of MADA that are the same for a whole tensor. csrc/scalars.h computes the same ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..definitions import MADA
from ..definitions.kit import Options, Scalar
from ..definitions.mada import COEFFICIENTS, DONE, MadaScalars, mada_factors, mada_scalars
from .common import options_type

# A parameter group's options, by the names of the operator ``mada_step_``. The coefficients here are the fixed ones;
# where a bit of ``learn`` is set, the coefficient is read from a tensor.
MadaOptions = options_type(MADA)


def coefficients_of(o: Options, learned: Sequence[Scalar] | None) -> list[Scalar]:
    """β1, β2, β3, ρ, c, γ, each learned or fixed."""
    fixed: list[Scalar] = [getattr(o, name) for name in COEFFICIENTS]
    return fixed if learned is None else [learned[k] if o.learn >> k & 1 else fixed[k] for k in range(len(fixed))]


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
