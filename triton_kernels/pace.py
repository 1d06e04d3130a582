"""PACE: AdamW + EMA of the weights + clipped pullback toward it.
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

The operations and their order are those of ``csrc/rules/pace.h``, where the switches are explained.
"""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl

from .arith import averaged, divided, smaller, square_root

# What one step of one tensor needs; the fields of ``PaceScalars`` in csrc/rules/pace.h, float32.
PaceScalars = namedtuple(
    "PaceScalars",
    "grad_factor beta1 one_minus_beta1 beta2 one_minus_beta2 inv_bias2 eps decay shrink step_size gain gain_cap "
    "weight from_step moves",
)


# The state after the step, and the terms of the telemetry; the fields of ``PaceStep`` in csrc/rules/pace.h.
PaceStep = namedtuple("PaceStep", "x m v e inv_D lambda_ clamped adamw pullback update")


@triton.jit
def pace_rule(s, g, x, m, v, e, MOMENT: tl.constexpr, PULL: tl.constexpr, AVERAGE: tl.constexpr):
    """MOMENT: m is kept (β1 > 0). PULL: Λ acts. AVERAGE: there is an average; whether it moves is the sweep's."""
    g = s.grad_factor * g
    m = s.beta1 * m + s.one_minus_beta1 * g if MOMENT else g
    v = s.beta2 * v + s.one_minus_beta2 * (g * g)
    inv_D = divided(1.0, square_root(v * s.inv_bias2) + s.eps)
    move = (s.step_size * m) * inv_D
    x_adamw = x * s.decay - move
    lambda_ = s.gain * inv_D
    clamped = smaller(lambda_, s.gain_cap)
    if PULL:
        pullback = clamped * (e - tl.where(s.from_step != 0.0, x_adamw, x))
        x_new = x_adamw + pullback
    else:
        pullback = tl.zeros_like(x)
        x_new = x_adamw
    if AVERAGE:
        e = averaged(e, x_new, s.weight)
    adamw = -(x * s.shrink) - move  # not x' − x, which loses what is small beside x
    return PaceStep(x_new, m, v, e, inv_D, lambda_, clamped, adamw, pullback, adamw + pullback)
