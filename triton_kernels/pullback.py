"""The pullback: the EMA of the weights and the pull toward it, behind the step of any optimizer.
Source: Au and Block, "Training for the Model You Return", arXiv 2606.25086, eq. 8 (constant Π) and 10 (Λ).

[formula: Pullback]
  x'  = base_step(x)                               any optimizer's step
  D   = sqrt(v / (1 − β2^t)) + ε                   of the base's second moment v
  w_t = max((1 + γ max(0, t − ρ))^(−κ), 1e−4)      averaging weight
  Λ   = min(α c w_t / D, 1)                        pullback gain, clipped; or a constant Π
  x₊  = x' + Λ (e − x)                             pulled toward the average e
  e₊  = e + w_t (x₊ − e)                           the average
[end]

The operations and their order are those of ``csrc/rules/pullback.h``, where the switches are explained.
"""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl

from .arith import averaged, divided, smaller, square_root
from .pace import PaceStep

# What one step of one tensor needs; the fields of ``PullbackScalars`` in csrc/rules/pullback.h, float32.
PullbackScalars = namedtuple("PullbackScalars", "inv_bias2 eps gain gain_cap weight moves")


@triton.jit
def pullback_rule(s, x, before, v, e, BEFORE: tl.constexpr, MOMENT: tl.constexpr, PULL: tl.constexpr):
    """BEFORE: the weights before the base's step are at hand. MOMENT: Λ comes from v. PULL: Λ acts. In PaceStep, m and
    v mean nothing, and `adamw` is the base's x' − x, 0 without BEFORE."""
    zero = tl.zeros_like(x)
    inv_D = divided(1.0, square_root(v * s.inv_bias2) + s.eps) if MOMENT else zero + 1.0
    lambda_ = s.gain * inv_D
    clamped = smaller(lambda_, s.gain_cap)
    pullback = zero
    x_new = x
    if PULL:
        pullback = clamped * (e - (before if BEFORE else x))
        x_new = x + pullback
    e = averaged(e, x_new, s.weight)
    moved = zero
    if BEFORE:
        moved = x - before
    return PaceStep(x_new, zero, zero, e, inv_D, lambda_, clamped, moved, pullback, moved + pullback)
