"""PACE in plain torch: AdamW + EMA of the weights + clipped pullback toward it.
Source: Au and Block, "Training for the Model You Return", arXiv 2606.25086, eq. 8 and 10, Algorithm 1.

[formula: PACE]
  m   ← β1 m + (1 − β1) g                          first moment
  v   ← β2 v + (1 − β2) g²                         second moment
  D   = sqrt(v / (1 − β2^t)) + ε                   Adam's denominator
  x'  = x (1 − α λ_wd) − α (m / (1 − β1^t)) / D    AdamW
  w_t = max((1 + γ max(0, t − ρ))^(−κ), 1e−4)      averaging weight
  Λ   = min(α c w_t / D, 1)                        pullback gain, clipped
  x₊  = x' + Λ (e − x)                             pulled toward the average e
  e₊  = e + w_t (x₊ − e)                           the average
[end]

The operations and their order are those of ``csrc/rules/pace.h``, one rounding each: in float32 both give the same
bits (on MPS, which has no float64, but for torch's own square root).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..definitions import PACE
from ..definitions.kit import PACE_STATS, Options, Scalar, gain_weight
from ..definitions.pace import PaceScalars, pace_scalars
from .coded import Averaging, Coded
from .common import (
    Begun,
    Keep,
    averaged,
    options_type,
    rounded,
    square_root,
)

# A parameter group's options, by the names of the operator ``pace_step_``, with the meaning of ``PACE``'s.
PaceOptions = options_type(PACE)


class PaceStep(NamedTuple):
    """The state after the step, and the terms of the telemetry; the fields of ``PaceStep`` in csrc/rules/pace.h."""

    x: Tensor
    m: Tensor
    v: Tensor
    e: Tensor | None
    inv_D: Tensor
    lambda_: Tensor
    clamped: Tensor
    adamw: Tensor
    pullback: Tensor
    update: Tensor


def pace_rule(
    s: PaceScalars, g: Tensor, x: Tensor, m: Tensor | None, v: Tensor, e: Tensor | None, pull: bool = True
) -> PaceStep:
    """One step in which the average moves. ``m`` is None if β1 = 0, ``e`` is None without an average.

    ``pull`` is False if c = 0: the average is kept, but does not pull.
    """
    g = s.grad_factor * g
    m = g if m is None else s.beta1 * m + s.one_minus_beta1 * g
    v = s.beta2 * v + s.one_minus_beta2 * (g * g)
    inv_D = 1.0 / (square_root(v * s.inv_bias2) + s.eps)
    move = (s.step_size * m) * inv_D
    x_adamw = x * s.decay - move
    lambda_ = s.gain * inv_D
    clamped = lambda_.clamp(max=s.gain_cap)
    if pull and e is not None:
        pullback = clamped * (e - (x_adamw if s.from_step else x))
        x_new = x_adamw + pullback
    else:
        pullback, x_new = torch.zeros_like(x), x_adamw
    e_new = None if e is None else averaged(e, x_new, s.weight)
    adamw = -(x * s.shrink) - move
    return PaceStep(x_new, m, v, e_new, inv_D, lambda_, clamped, adamw, pullback, adamw + pullback)


class StatsScalars(NamedTuple):
    """The factors that turn 1/D into the gain before α c, and into the gain before the clamp."""

    weight: Scalar
    gain: Scalar


def stats_scalars(o: Options, t: Scalar) -> StatsScalars:
    w = gain_weight(o, t)
    return StatsScalars(w, o.lr * o.lambda_pullback * w)


def summed_stats(step: PaceStep, scalars: StatsScalars) -> Tensor:
    """The telemetry of one tensor's step, laid out as ``pace_kernels.ops.PACE_STATS``."""
    weight, gain = scalars
    dtype = torch.float32 if step.x.device.type == "mps" else torch.float64  # MPS has no float64
    inv_D, lambda_, clamped = (a.to(dtype) for a in (step.inv_D, step.lambda_, step.clamped))
    moments = [inv_D.sum(), inv_D.min(), inv_D.max()]
    clipped = (lambda_ >= 1.0).to(dtype).sum()
    squares = [a.to(dtype).square().sum() for a in (step.adamw, step.pullback, step.update)]
    count = torch.full_like(clipped, step.x.numel())
    raw, effective = [weight * a for a in moments], [gain * a for a in moments]
    return torch.stack([count, *raw, *effective, clamped.sum(), clamped.min(), clamped.max(), clipped, *squares])


def merge_stats(rows: list[Tensor]) -> Tensor:
    """The telemetry of several tensors as if of one: sums of sums, minima of minima, maxima of maxima."""
    stacked = torch.stack(rows)
    merged = stacked.sum(dim=0)
    for column in (2, 5, 8):
        merged[column] = stacked[:, column].min()
        merged[column + 1] = stacked[:, column + 1].max()
    return merged


def write_stats(stats: Tensor | None, keep: Keep, rows: list[Tensor]) -> None:
    """The statistics of a call, from the rows of its tensors; those of no tensor if the step is skipped."""
    if stats is not None:
        nothing = [math.inf if name.endswith("_min") else 0.0 for name in PACE_STATS]
        empty = torch.stack([torch.full_like(stats[0], value) for value in nothing])
        keep.copy_(stats.copy_(empty), merge_stats([empty, *rows]))


def pace_step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Tensor],
    steps: list[Tensor],
    stats: Tensor | None = None,
    lr_tensor: Tensor | None = None,
    grad_scale: Tensor | None = None,
    clip_coef: Tensor | None = None,
    found_inf: Tensor | None = None,
    remainders: list[Tensor] | None = None,
    exp_avg_scales: list[Tensor] | None = None,
    exp_avg_sq_scales: list[Tensor] | None = None,
    ema_scales: list[Tensor] | None = None,
    **options: Any,
) -> None:
    """What the operator ``pace_step_`` does, tensor by tensor; on any device, and in float64 for float64 parameters.

    With ``capturable`` the step count stays a tensor, so that nothing waits for the device.
    """
    scaling: dict[str, Any] = {"grad_scale": grad_scale, "clip_coef": clip_coef, "found_inf": found_inf}
    begun = Begun(PaceOptions, options, steps, exp_avg_sqs, {"lr": lr_tensor}, **scaling)
    o, keep = begun.o, begun.keep
    pull, momentum = o.lambda_pullback != 0.0, o.beta1 != 0.0
    scalars = begun.scalars(lambda t: pace_scalars(o, t, begun.factor))
    of_stats = begun.scalars(lambda t: stats_scalars(o, t), torch.float64) if stats is not None else []
    lists = {"x": params, "m": exp_avgs if momentum else [], "v": exp_avg_sqs, "e": emas}
    beside = {"x": remainders, "m": exp_avg_scales, "v": exp_avg_sq_scales, "e": ema_scales}
    coded = Coded(PACE, begun.dtype, lists, beside, stochastic=o.stochastic_rounding)
    rows: list[Tensor] = []
    for i, (param, its_scalars) in enumerate(zip(params, scalars, strict=not keep.all)):
        s = rounded(its_scalars, begun.dtype)
        stored = coded.stored(i)
        was = stored.read()
        new = pace_rule(s, grads[i].to(begun.dtype), was["x"], was.get("m"), was["v"], was.get("e"), pull)
        states = {"x": new.x, "m": new.m, "v": new.v, "e": new.e}
        stored.write(keep, states, begun.counts[i], Averaging(s.weight, s.moves, o.ema_update_freq))
        if stats is not None and param.numel() > 0:
            rows.append(summed_stats(new, of_stats[i]).to(stats.dtype))
    write_stats(stats, keep, rows)
