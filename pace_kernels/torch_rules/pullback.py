"""The pullback in plain torch: the EMA of the weights and the pull toward it, behind the step of any optimizer.
Source: Au and Block, "Training for the Model You Return", arXiv 2606.25086, eq. 8 (constant Π) and 10 (Λ).

[formula: Pullback]
  x'  = base_step(x)                               any optimizer's step
  D   = sqrt(v / (1 − β2^t)) + ε                   of the base's second moment v
  w_t = max((1 + γ max(0, t − ρ))^(−κ), 1e−4)      averaging weight
  Λ   = min(α c w_t / D, 1)                        pullback gain, clipped; or a constant Π
  x₊  = x' + Λ (e − x)                             pulled toward the average e
  e₊  = e + w_t (x₊ − e)                           the average
[end]

The operations and their order are those of ``csrc/rules/pullback.h``, one rounding each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import PACE_STATS
from .common import (
    Keep,
    Scalar,
    averaged,
    check_steps,
    computed_there,
    counted,
    handed_over,
    number,
    place,
    rounded,
    square_root,
)
from .pace import PaceStep, StatsScalars, average_moves, average_weight, gain_weight, merge_stats, summed_stats


@dataclass(frozen=True)
class PullbackOptions:
    """A parameter group's options, by the names of the operator ``pullback_``, with the meaning of ``Pullback``'s."""

    lr: Scalar
    lambda_pullback: float
    gain: float | None
    clamp_pullback: bool
    beta2: float
    eps: float
    step_offset: int
    beta_ema: float
    ema_kappa: float | None
    ema_rho: float
    ema_gamma: float
    ema_update_freq: int
    capturable: bool

    @property
    def pulls(self) -> bool:
        return self.lambda_pullback != 0.0 if self.gain is None else self.gain != 0.0


class PullbackScalars(NamedTuple):
    """What one step of one tensor needs; the fields of ``PullbackScalars`` in csrc/rules/pullback.h."""

    inv_bias2: Scalar
    eps: float
    gain: Scalar
    gain_cap: float
    weight: Scalar
    moves: Scalar


def pullback_gain(o: PullbackOptions, t: Scalar) -> Scalar:
    """The gain, but for 1 / D where there is a second moment."""
    return number(o.lr) * o.lambda_pullback * gain_weight(o, t) if o.gain is None else o.gain


def stats_scalars(o: PullbackOptions, t: Scalar) -> StatsScalars:
    return StatsScalars(gain_weight(o, t), pullback_gain(o, t))


def pullback_scalars(o: PullbackOptions, t: Scalar) -> PullbackScalars:
    return PullbackScalars(
        inv_bias2=1.0 / (1.0 - o.beta2 ** (t + o.step_offset)),
        eps=o.eps,
        gain=pullback_gain(o, t),
        gain_cap=1.0 if o.clamp_pullback else math.inf,
        weight=average_weight(o, t),
        moves=average_moves(o, t),
    )


def pullback_rule(
    s: PullbackScalars, x: Tensor, before: Tensor | None, v: Tensor | None, e: Tensor, pull: bool = True
) -> PaceStep:
    """One step in which the average moves. ``x`` are the weights as the base's step left them, ``before`` those that it
    found, None where the distance is measured from x; ``v`` is None with a constant gain. Of the result, m and v mean
    nothing, and ``adamw`` is the base's x' − x, 0 without ``before``."""
    inv_D = torch.ones_like(x) if v is None else 1.0 / (square_root(v * s.inv_bias2) + s.eps)
    lambda_ = s.gain * inv_D
    clamped = lambda_.clamp(max=s.gain_cap)
    pullback = clamped * (e - (x if before is None else before)) if pull else torch.zeros_like(x)
    x_new = x + pullback if pull else x
    e_new = averaged(e, x_new, s.weight)
    moved = torch.zeros_like(x) if before is None else x - before
    return PaceStep(x_new, x, x, e_new, inv_D, lambda_, clamped, moved, pullback, moved + pullback)


def pullback_(
    params: list[Tensor],
    befores: list[Tensor],
    second_moments: list[Tensor],
    emas: list[Tensor],
    steps: list[Tensor],
    stats: Tensor | None = None,
    lr_tensor: Tensor | None = None,
    found_inf: Tensor | None = None,
    **options: Any,
) -> None:
    """What the operator ``pullback_`` does, tensor by tensor; on any device, and in float64 for float64 averages."""
    check_steps(steps)
    o = PullbackOptions(**options | ({} if lr_tensor is None else {"lr": lr_tensor}))
    keep, pulls = Keep(found_inf), o.pulls
    counts = [] if keep.all else counted(steps, keep, o.capturable)
    device, dtype = place(emas)
    o, counts = computed_there(o, counts, device, tensors=isinstance(o.lr, Tensor))
    scalars = handed_over(lambda t: pullback_scalars(o, t), counts, dtype, device)
    of_stats = handed_over(lambda t: stats_scalars(o, t), counts if stats is not None else (), torch.float64, device)
    rows: list[Tensor] = []
    for i, (param, its_scalars) in enumerate(zip(params, scalars, strict=not keep.all)):
        e = emas[i]
        s = rounded(its_scalars, e.dtype)
        if not pulls and stats is None and not isinstance(s.moves, Tensor) and not s.moves:
            continue
        before, v = (tensors[i].to(e.dtype) if tensors else None for tensors in (befores, second_moments))
        new = pullback_rule(s, param.to(e.dtype), before, v, e, pulls)
        if pulls:
            keep.copy_(param, new.x)
        assert new.e is not None
        if isinstance(s.moves, Tensor):
            keep.copy_(e, torch.where(s.moves != 0, new.e, e))
        elif s.moves:
            keep.copy_(e, new.e)
        if stats is not None and param.numel() > 0:
            rows.append(summed_stats(new, of_stats[i]).to(stats.dtype))
    if stats is not None:
        nothing = [math.inf if name.endswith("_min") else 0.0 for name in PACE_STATS]
        empty = torch.stack([torch.full_like(stats[0], value) for value in nothing])
        keep.copy_(stats.copy_(empty), merge_stats([empty, *rows]))
