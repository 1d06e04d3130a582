// PACE: AdamW + EMA of the weights + clipped pullback toward it.
// Source: Au and Block, "Training for the Model You Return", arXiv 2606.25086, eq. 8 and 10, Algorithm 1.
//
// [formula: PACE]
//   m   ← β1 m + (1 − β1) g                          first moment
//   v   ← β2 v + (1 − β2) g²                         second moment
//   D   = sqrt(v / (1 − β2^t)) + ε                   Adam's denominator
//   x'  = x (1 − α λ_wd) − α (m / (1 − β1^t)) / D    AdamW
//   w_t = max((1 + γ max(0, t − ρ))^(−κ), 1e−4)      averaging weight
//   Λ   = min(α c w_t / D, 1)                        pullback gain, clipped
//   x₊  = x' + Λ (e − x)                             pulled toward the average e
//   e₊  = e + w_t (x₊ − e)                           the average
// [end]
//
// Switches: pullback_from="step" measures (e − x') instead of (e − x); clamp_pullback=False drops the min; κ = None
// takes w_t = 1 in Λ and w_t = beta_ema in e₊; between updates of the average (ema_update_freq) e₊ = e; β1 = 0 keeps no
// m.
#pragma once

#include "arith.h"

namespace pace {

// What one step of one tensor needs, computed in double on the host and rounded once (scalars.h).
struct PaceScalars {
  float grad_factor;  // clip coefficient / gradient scale, negative to maximize; 1 without either
  float beta1, one_minus_beta1;
  float beta2, one_minus_beta2;
  float inv_bias2;  // 1 / (1 − β2^t)
  float eps;
  float decay, shrink;  // 1 − α λ_wd, α λ_wd
  float step_size;      // α / (1 − β1^t)
  float gain;           // α c w_t
  float gain_cap;       // 1, or infinity without the clamp
  float weight;
  int32_t from_step;  // 1: pullback_from="step". An int, because the vectorizer has no vector of bool
  int32_t moves;      // 1: the average moves in this step
};

// The state after the step, and what the telemetry sums over coordinates. Unused terms cost nothing: the compiler drops
// them.
struct PaceStep {
  float x, m, v, e;
  float inv_D;                    // gain before α c, divided by w_t
  float lambda;                   // gain before the clamp
  float clamped;                  // gain after it
  float adamw, pullback, update;  // x' − x, Λ (e − x), x₊ − x
};

// kMoment: m is kept (β1 > 0). kPull: Λ acts (e is read). kAverage: e moves in this step. Where a flag is off, its
// operand is not touched. Such flags are the only compile-time ones: what merely changes a value is a scalar.
template <bool kMoment, bool kPull, bool kAverage>
PACE_RULE PaceStep pace_rule(const PaceScalars& s, float g, float x, float m, float v, float e) {
  PaceStep r;
  g = s.grad_factor * g;
  r.m = kMoment ? s.beta1 * m + s.one_minus_beta1 * g : g;
  r.v = s.beta2 * v + s.one_minus_beta2 * (g * g);
  r.inv_D = 1.0f / (square_root(r.v * s.inv_bias2) + s.eps);
  const float move = (s.step_size * r.m) * r.inv_D;
  const float x_adamw = x * s.decay - move;
  r.lambda = s.gain * r.inv_D;
  r.clamped = smaller(r.lambda, s.gain_cap);
  r.pullback = kPull ? r.clamped * (e - (s.from_step != 0 ? x_adamw : x)) : 0.0f;
  r.x = kPull ? x_adamw + r.pullback : x_adamw;
  r.e = kAverage ? averaged(e, r.x, s.weight) : e;
  r.adamw = -(x * s.shrink) - move;  // not x' − x, which loses what is small beside x
  r.update = r.adamw + r.pullback;
  return r;
}

}  // namespace pace
