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

from typing import Any

import torch
from torch import Tensor

from ..definitions import PULLBACK
from ..definitions.kit import Options, Scalar, gain_weight
from ..definitions.pullback import PullbackScalars, pullback_gain, pullback_scalars, pulls
from .coded import Averaging, Coded
from .common import Begun, averaged, options_type, rounded, square_root
from .pace import PaceStep, StatsScalars, summed_stats, write_stats

# A parameter group's options, by the names of the operator ``pullback_``, with the meaning of ``Pullback``'s.
PullbackOptions = options_type(PULLBACK)


def stats_scalars(o: Options, t: Scalar) -> StatsScalars:
    return StatsScalars(gain_weight(o, t), pullback_gain(o, t))


def pullback_rule(
    s: PullbackScalars, x: Tensor, before: Tensor | None, v: Tensor | None, e: Tensor, pull: bool = True
) -> PaceStep:
    """One step in which the average moves. ``x`` are the weights after the base's step, ``before`` those before it, or
    None if the distance is measured from x; ``v`` is None with a constant gain. In the result, m and v mean nothing,
    and ``adamw`` is the base's x' − x, 0 without ``before``."""
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
    ema_scales: list[Tensor] | None = None,
    **options: Any,
) -> None:
    """What the operator ``pullback_`` does, tensor by tensor; on any device, and in float64 for float64 averages."""
    begun = Begun(PullbackOptions, options, steps, emas, {"lr": lr_tensor}, found_inf=found_inf)
    o, keep, pull = begun.o, begun.keep, pulls(begun.o)
    scalars = begun.scalars(lambda t: pullback_scalars(o, t))
    of_stats = begun.scalars(lambda t: stats_scalars(o, t), torch.float64) if stats is not None else []
    rows: list[Tensor] = []
    lists = {"x": params, "before": befores, "v": second_moments, "e": emas}
    coded = Coded(PULLBACK, begun.dtype, lists, {"e": ema_scales})
    grid = any(e.dtype in (torch.int8, torch.int16) for e in emas)
    if grid and not befores:
        raise RuntimeError("befores must not be empty where emas are int8 or int16, which are read beside them")
    for i, (param, its_scalars) in enumerate(zip(params, scalars, strict=not keep.all)):
        s = rounded(its_scalars, begun.dtype)
        if not (pull or grid) and stats is None and not isinstance(s.moves, Tensor) and not s.moves:
            continue
        stored = coded.stored(i)
        was = stored.read()
        before = None if o.pullback_from_step or not pull else was.get("before")
        new = pullback_rule(s, was["x"], before, was.get("v"), was["e"], pull)
        states = {"e": new.e} | ({"x": new.x} if pull else {})
        stored.write(keep, states, begun.counts[i], Averaging(s.weight, s.moves, o.ema_update_freq))
        if stats is not None and param.numel() > 0:
            rows.append(summed_stats(new, of_stats[i]).to(stats.dtype))
    write_stats(stats, keep, rows)
