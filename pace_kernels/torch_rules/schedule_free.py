"""Schedule-free AdamW in plain torch: gradients at y, between the steps z and their weighted mean x.
Source: Defazio et al., "The Road Less Scheduled", arXiv 2405.15682, Algorithm 1; ω as the authors' package has it.

[formula: ScheduleFreeAdamW]
  α_t = α min(t / warmup, 1)                       learning rate, warmed up
  ω_t = t^r (max α_1 … α_t)^p                      weight of this step in the average
  c   = ω_t / (ω_1 + … + ω_t)                      its share
  v   ← β2 v + (1 − β2) g²                         second moment; g at y, the weights that are trained
  u   = g / (sqrt(v / (1 − β2^t)) + ε) + λ_wd y    direction
  y₊  = y + c (z − y) − α_t (1 − β1 (1 − c)) u
  z₊  = z − α_t u                                  where the steps alone lead to
  x   = y + (1 − 1 / β1) (z − y)                   the average, computed to evaluate
[end]

The operations and their order are those of ``csrc/rules/schedule_free.h``, one rounding each: in float32 both give the
same bits (on MPS, which has no float64, but for torch's own square root).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..definitions import SCHEDULE_FREE
from ..definitions.kit import Scalar, at_least
from ..definitions.schedule_free import SCHEDULE, ScheduleFreeScalars, schedule_free_scalars
from .coded import Coded
from .common import (
    Begun,
    at_hand,
    averaged,
    in_double,
    number,
    options_type,
    rounded,
    square_root,
)


class Schedule(NamedTuple):
    """The memory of a group's schedule, under the group's own names."""

    k: Scalar  # steps taken
    weight_sum: Scalar  # ω_1 + … + ω_k
    lr_max: Scalar  # max α_1 … α_k
    scheduled_lr: Scalar  # α_k


def advanced(s: Schedule, lr: Scalar, warmup_steps: float, r: float, power: float) -> tuple[Schedule, Scalar]:
    """The schedule after one more step, and the share c of that step: in numbers, or all in tensors."""
    t = s.k + 1
    alpha = number(lr) * (-at_least(-t / warmup_steps, -1.0) if warmup_steps > 0 else 1.0)
    highest = at_least(s.lr_max, alpha)
    total = s.weight_sum + (weight := _power(t, r) * _power(highest, power))
    if isinstance(total, Tensor):
        return Schedule(t, total, highest, alpha), torch.where(total > 0.0, weight / total, 0.0)
    return Schedule(t, total, highest, alpha), weight / total if total > 0.0 else 0.0


def _power(base: Scalar, exponent: float) -> Scalar:
    try:
        return base**exponent
    except OverflowError:
        return math.inf


# A group's options at one step, by the names of the operator ``schedule_free_step_``: lr is α_t, count t, share c.
ScheduleFreeOptions = options_type(SCHEDULE_FREE)


class ScheduleFreeStep(NamedTuple):
    """The state after the step; the fields of ``ScheduleFreeStep`` in csrc/rules/schedule_free.h."""

    y: Tensor
    v: Tensor
    z: Tensor


def schedule_free_rule(
    s: ScheduleFreeScalars, g: Tensor, y: Tensor, v: Tensor, z: Tensor, increment: bool = False
) -> ScheduleFreeStep:
    """One step. ``increment``: in the place of z₊ is how far z moves, −α_t u."""
    g = s.grad_factor * g
    v = s.beta2 * v + s.one_minus_beta2 * (g * g)
    u = g / (square_root(v * s.inv_bias2) + s.eps) + s.weight_decay * y
    move = s.z_size * u
    return ScheduleFreeStep(averaged(y, z, s.share) - s.y_size * u, v, -move if increment else z - move)


def schedule_free_average(y: Tensor, z: Tensor, beta1: float, out: Tensor | None = None) -> Tensor:
    """x, in the dtype of z."""
    return torch.lerp(y.to(z.dtype), z.to(y.device), 1.0 - 1.0 / beta1, out=out)


def schedule_free_weights(x: Tensor, z: Tensor, beta1: float) -> Tensor:
    """y from x, in the dtype of z; not to the last bit."""
    return torch.lerp(x.to(z.dtype), z.to(x.device), 1.0 - beta1)


def schedule_free_step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg_sqs: list[Tensor],
    zs: list[Tensor],
    steps: list[Tensor],
    schedule: Tensor | None = None,
    lr_tensor: Tensor | None = None,
    grad_scale: Tensor | None = None,
    clip_coef: Tensor | None = None,
    found_inf: Tensor | None = None,
    remainders: list[Tensor] | None = None,
    exp_avg_sq_scales: list[Tensor] | None = None,
    z_scales: list[Tensor] | None = None,
    **options: Any,
) -> None:
    """What the operator ``schedule_free_step_`` does, tensor by tensor; on any device, and in float64 for float64
    parameters."""
    given: dict[str, Any] = {"lr": lr_tensor}
    if schedule is not None:
        held = schedule.tolist() if at_hand(schedule) else in_double(schedule).unbind()
        given |= dict(zip(SCHEDULE, held, strict=True))
    scaling: dict[str, Any] = {"grad_scale": grad_scale, "clip_coef": clip_coef, "found_inf": found_inf}
    begun = Begun(ScheduleFreeOptions, options, steps, exp_avg_sqs, given, **scaling)
    o, keep = begun.o, begun.keep
    scalars = begun.scalars(lambda _: schedule_free_scalars(o, o.count, begun.factor))
    beside = {"y": remainders, "v": exp_avg_sq_scales, "z": z_scales}
    lists = {"y": params, "v": exp_avg_sqs, "z": zs}
    coded = Coded(SCHEDULE_FREE, begun.dtype, lists, beside, stochastic=o.stochastic_rounding)
    for i, (_, its_scalars) in enumerate(zip(params, scalars, strict=not keep.all)):
        stored = coded.stored(i)
        was = stored.read()
        s, g = rounded(its_scalars, begun.dtype), grads[i].to(begun.dtype)
        new = schedule_free_rule(s, g, was["y"], was["v"], was["z"], stored.on_grid)
        stored.write(keep, new._asdict(), begun.counts[i])
