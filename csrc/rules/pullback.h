// Pullback: the EMA of the weights and the pull toward it, behind the step of any optimizer.
// Source: Au and Block, "Training for the Model You Return", arXiv 2606.25086, eq. 8 (constant Π) and 10 (Λ).
//
// [formula: Pullback]
//   x'  = base_step(x)                               any optimizer's step
//   D   = sqrt(v / (1 − β2^t)) + ε                   of the base's second moment v
//   w_t = max((1 + γ max(0, t − ρ))^(−κ), 1e−4)      averaging weight
//   Λ   = min(α c w_t / D, 1)                        pullback gain, clipped; or a constant Π
//   x₊  = x' + Λ (e − x)                             pulled toward the average e
//   e₊  = e + w_t (x₊ − e)                           the average
// [end]
//
// Switches: those of pace.h. t in the averaging weight counts the steps of the average, t in D those of the base, which
// may have trained before. Where v has no bias correction, β2 = 0.
#pragma once

#include "pace.h"

namespace pace {

// What one step of one tensor needs, computed in double on the host and rounded once (scalars.h).
struct PullbackScalars {
  float inv_bias2;  // 1 / (1 − β2^t)
  float eps;
  float gain;      // α c w_t, or Π
  float gain_cap;  // 1, or infinity without the clamp
  float weight;
  int32_t moves;  // 1: the average moves in this step
};

// `x` are the weights as the base's step left them, `before` those that it found. kBefore: these are at hand, and the
// distance is measured from them; otherwise from x. kMoment: Λ comes of v; otherwise it is Π. kPull: Λ acts. kAverage:
// e moves in this step. Of PaceStep, m and v stay unset, and `adamw` is the base's x' − x, 0 without kBefore.
template <bool kBefore, bool kMoment, bool kPull, bool kAverage>
PACE_RULE PaceStep pullback_rule(const PullbackScalars& s, float x, float before, float v, float e) {
  PaceStep r;
  r.inv_D = kMoment ? 1.0f / (square_root(v * s.inv_bias2) + s.eps) : 1.0f;
  r.lambda = s.gain * r.inv_D;
  r.clamped = smaller(r.lambda, s.gain_cap);
  r.pullback = kPull ? r.clamped * (e - (kBefore ? before : x)) : 0.0f;
  r.x = kPull ? x + r.pullback : x;
  r.e = kAverage ? averaged(e, r.x, s.weight) : e;
  r.adamw = kBefore ? x - before : 0.0f;
  r.update = r.adamw + r.pullback;
  return r;
}

}  // namespace pace
