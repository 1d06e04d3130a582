"""Schedule-free AdamW: gradients at y, between the steps z and their weighted mean x.
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

The operations and their order are those of ``csrc/rules/schedule_free.h``.
"""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl

from .arith import averaged, divided, square_root

# What one step of one tensor needs; the fields of ``ScheduleFreeScalars`` in csrc/rules/schedule_free.h.
ScheduleFreeScalars = namedtuple(
    "ScheduleFreeScalars", "grad_factor beta2 one_minus_beta2 inv_bias2 eps weight_decay share y_size z_size"
)


# The state after the step; the fields of ``ScheduleFreeStep`` in csrc/rules/schedule_free.h.
ScheduleFreeStep = namedtuple("ScheduleFreeStep", "y v z")


@triton.jit
def schedule_free_rule(s, g, y, v, z, INCREMENT: tl.constexpr):
    """INCREMENT: in the place of z₊ is how far z moves, −α_t u."""
    g = s.grad_factor * g
    v = s.beta2 * v + s.one_minus_beta2 * (g * g)
    u = divided(g, square_root(v * s.inv_bias2) + s.eps) + s.weight_decay * y
    y = averaged(y, z, s.share) - s.y_size * u
    return ScheduleFreeStep(y, v, -(s.z_size * u) if INCREMENT else z - s.z_size * u)
