// Schedule-free AdamW: gradients at y, between the steps z and their weighted mean x.
// Source: Defazio et al., "The Road Less Scheduled", arXiv 2405.15682, Algorithm 1; ω as the authors' package has it.
//
// [formula: ScheduleFreeAdamW]
//   α_t = α min(t / warmup, 1)                       learning rate, warmed up
//   ω_t = t^r (max α_1 … α_t)^p                      weight of this step in the average
//   c   = ω_t / (ω_1 + … + ω_t)                      its share
//   v   ← β2 v + (1 − β2) g²                         second moment; g at y, the weights that are trained
//   u   = g / (sqrt(v / (1 − β2^t)) + ε) + λ_wd y    direction
//   y₊  = y + c (z − y) − α_t (1 − β1 (1 − c)) u
//   z₊  = z − α_t u                                  where the steps alone lead to
//   x   = y + (1 − 1 / β1) (z − y)                   the average, computed to evaluate
// [end]
//
// α_t and c are those of a whole group: pace_kernels/torch_rules/schedule_free.py computes them, and x.
#pragma once

#include "arith.h"

namespace pace {

// What one step of one tensor needs, computed in double on the host and rounded once (scalars.h).
struct ScheduleFreeScalars {
  float grad_factor;  // clip coefficient / gradient scale, negative to maximize; 1 without either
  float beta2, one_minus_beta2;
  float inv_bias2;  // 1 / (1 − β2^t)
  float eps;
  float weight_decay;
  float share;   // c
  float y_size;  // α_t (1 − β1 (1 − c))
  float z_size;  // α_t
};

struct ScheduleFreeStep {
  float y, v, z;
};

// kIncrement: in the place of z₊ is how far z moves, −α_t u.
template <bool kIncrement = false>
PACE_RULE ScheduleFreeStep schedule_free_rule(const ScheduleFreeScalars& s, float g, float y, float v, float z) {
  ScheduleFreeStep r;
  g = s.grad_factor * g;
  r.v = s.beta2 * v + s.one_minus_beta2 * (g * g);
  const float u = g / (square_root(r.v * s.inv_bias2) + s.eps) + s.weight_decay * y;
  r.y = averaged(y, z, s.share) - s.y_size * u;
  const float move = s.z_size * u;
  r.z = kIncrement ? -move : z - move;
  return r;
}

}  // namespace pace
