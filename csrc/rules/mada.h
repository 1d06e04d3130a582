// MADA: a parameterized optimizer, its coefficients learned by hypergradient descent.
// Source: Ozkara et al., "MADA: Meta-Adaptive Optimizers through Hyper-Gradient Descent", ICML 2024 (PMLR 235),
// sections 2, 3, 4.1, C.1, D.
//
// [formula: MADA]
//   d   = g − g₋                                  g₋: the previous gradient; at a parameter's first step d = 0
//   m   ← β1 m + (1 − β1) g                       Adam's first moment
//   n   ← β3 n + (1 − β3) d                       Adan's gradient-difference moment
//   ĝ   = g + β3 d
//   s   = sign(ĝ² − v̄)                            v̄: the value before this step
//   g̃²  = c ĝ² + (1 − c)(v̄ + ĝ² s)                c = 1 Adam, c = 0 Yogi
//   v̄   ← β2 v̄ + (1 − β2) g̃²
//   ṽ   ← (v̄ + (t − 1) ṽ) / t                     AVGrad; second_moment="max": ṽ ← max(ṽ, v̄), AMSGrad
//   V   = (ρ v̄ + (1 − ρ) ṽ) / (1 − β2^t)          ρ = 1 Adam, ρ = 0 AVGrad
//   N   = m / (1 − β1^t) + β3 n
//   u   = λ1 l + (1 − λ1) g                       Lion; l: the value before this step
//   l   ← λ2 l + (1 − λ2) g
//   U   = γ N / (sqrt(V) + ε) + (1 − γ) sign(u)   γ = 0 Lion
//   x₊  = x (1 − α λ_wd) − α U
// [end]
//
// A pullback toward the average then acts as in pace.h, by D = sqrt(V) + ε. The hypergradient of a coefficient q is
// the sum over all coordinates of the new gradient times ∂x/∂q of the step before, with the states before that step and
// ṽ held constant, and b1 = 1 − β1^t, b2 = 1 − β2^t, R = α γ N / D² / (2 sqrt(V)), which is 0 where V = 0; m₋, n₋, v̄₋
// are the values before the step:
//
// [formula: MADA hypergradients]
//   ∂x/∂β1 = −(α γ / D) [ (m₋ − g)/b1 + m t β1^(t−1) / b1² ]
//   ∂x/∂β2 =  R [ ρ (v̄₋ − g̃²) / b2 + V t β2^(t−1) / b2 ]
//   ∂x/∂β3 = −(α γ / D) [ n + β3 (n₋ − d) ] + R ρ (1 − β2) 2 ĝ (c + (1 − c) s) d / b2
//   ∂x/∂ρ  =  R (v̄ − ṽ) / b2
//   ∂x/∂c  =  R ρ (1 − β2)(ĝ² − v̄₋ − ĝ² s) / b2
//   ∂x/∂γ  = −α [ N / D − sign(u) ]
// [end]
//
// These are not kept. Moments are kept one step behind, with the last gradient: the pass redoes the last step, which
// gives the moments after it and its sensitivities, and then does the new one, by the same function.
#pragma once

#include "arith.h"
#include "pace.h"

namespace pace {

// The learned coefficients, in the order of every array of six.
enum MadaCoefficient { kBeta1, kBeta2, kBeta3, kRho, kC, kGamma, kCoefficients };

constexpr float kLargest = 3.402823466e+38f;  // float32's

// What one step of one tensor needs, computed in double on the host and rounded once (scalars.h).
struct MadaScalars {
  float beta1, one_minus_beta1, beta2, one_minus_beta2, beta3, one_minus_beta3;
  float lion_beta1, one_minus_lion_beta1, lion_beta2, one_minus_lion_beta2;
  float rho, one_minus_rho, c, one_minus_c;
  float mean_new, mean_old;  // 1 / t, (t − 1) / t
  float eps, inv_eps;
  float inv_bias1, inv_bias2;      // 1 / b1, 1 / b2
  float adam_size, lion_size;      // α γ, α (1 − γ)
  float bias1_slope, bias2_slope;  // t β1^(t−1) / b1, t β2^(t−1)
  float square_slope;              // 2 ρ (1 − β2) / b2
  float pull_gain, gain_cap;       // α c w_t where the pullback is from the step, otherwise 0; 1 or infinity
  int32_t second_max;              // 1: second_moment="max". An int, because the vectorizer has no vector of bool
};

// The moments after the step, w being ṽ; α U and 1 / D; and the terms of the hypergradients, next_g ∂x/∂q but for a
// factor that all coordinates share (mada_factors in scalars.h). The compiler drops what nobody uses.
struct MadaStep {
  float m, n, v, w, l;
  float update, inv_D;
  float beta1, beta2, beta3, rho, c, gamma;
};

// One step, but for weight decay and pullback. kAdam: Adam's moments are in play, kDiff: differences of gradients,
// kSecond: ṽ, kLion: Lion, kAverage: the average. Where a flag is off, its operands are not touched. `next_g` is the
// gradient after the step; a step whose terms nobody uses may have any.
template <bool kAdam, bool kDiff, bool kSecond, bool kLion, bool kAverage>
PACE_RULE MadaStep mada_rule(const MadaScalars& s, float g, float last_g, float next_g, float m, float n, float v,
                             float w, float l) {
  MadaStep r;
  const float d = kDiff ? g - last_g : 0.0f;
  const float g_hat = kDiff ? g + s.beta3 * d : g;
  // Squares that overflow are the largest number: 0 times infinity would be NaN. These comparisons let NaN through.
  const float exact = g_hat * g_hat, square = exact > kLargest ? kLargest : exact;
  const float s_v = sign(square - v);
  const float sum = v + square * s_v, yogi = sum > kLargest ? kLargest : sum;
  const float g_tilde = s.c * square + s.one_minus_c * yogi;
  r.m = s.beta1 * m + s.one_minus_beta1 * g;
  r.n = kDiff ? s.beta3 * n + s.one_minus_beta3 * d : 0.0f;
  r.v = s.beta2 * v + s.one_minus_beta2 * g_tilde;
  const float mean = s.mean_new * r.v + s.mean_old * w, maximum = larger(w, r.v);
  r.w = kSecond ? (s.second_max != 0 ? maximum : mean) : 0.0f;
  const float V = (kSecond ? s.rho * r.v + s.one_minus_rho * r.w : r.v) * s.inv_bias2;
  const float N = kDiff ? r.m * s.inv_bias1 + s.beta3 * r.n : r.m * s.inv_bias1;
  const float root = square_root(V), D = root + s.eps;
  r.inv_D = 1.0f / D;
  const float sign_u = kLion ? sign(s.lion_beta1 * l + s.one_minus_lion_beta1 * g) : 0.0f;
  r.l = kLion ? s.lion_beta2 * l + s.one_minus_lion_beta2 * g : 0.0f;
  const float adam = (s.adam_size * N) * r.inv_D, lion = s.lion_size * sign_u;
  r.update = kAdam ? (kLion ? adam + lion : adam) : lion;

  // One division for 1 / D and 1 / (2 sqrt(V)); 1 / D may differ from the one above by roundings. Where root D is below
  // 2^−126, the root is below 2^−24 ε for the ε ≥ 2^−51 that learning requires: D is ε then.
  const float product = root * D, inv = 1.0f / product;
  const float inv_D = product >= kSmallestNormal ? inv * root : s.inv_eps;
  const float half_inv_root = product >= kSmallestNormal ? (0.5f * inv) * D : 0.0f;
  const float lambda = smaller(s.pull_gain * inv_D, s.gain_cap);  // (1 − Λ) x' + Λ e, where it is from the step
  const float h = kAverage ? next_g * (1.0f - lambda) : next_g;
  const float A = h * inv_D, U = N * inv_D, R = (A * U) * half_inv_root;
  r.beta1 = A * ((m - g) + r.m * s.bias1_slope);
  r.beta2 = R * (s.rho * (v - g_tilde) + V * s.bias2_slope);
  const float square_term = (g_hat * (s.c + s.one_minus_c * s_v)) * d;
  r.beta3 = kDiff ? R * (s.square_slope * square_term) - A * (r.n + s.beta3 * (n - d)) : 0.0f;
  r.rho = kSecond ? R * (r.v - r.w) : 0.0f;
  r.c = R * ((square - v) - square * s_v);
  r.gamma = kLion ? h * (sign_u - U) : 0.0f;
  return r;
}

struct MadaWeights {
  float x, e;
};

// How one coefficient learns.
struct HyperOptions {
  double lr, momentum, lower, upper, clip;
};

// One step of the coefficient q and its momentum b down the hypergradient h: b ← μ b + clip(h), q ← Π[q − hyper_lr b].
// What is not finite moves nothing: it would spoil the coefficients of all parameters.
PACE_RULE void hyper_rule(const HyperOptions& o, double h, double& q, double& b) {
  if (!(h - h == 0.0)) return;
  b = o.momentum * b + (h < -o.clip ? -o.clip : (h > o.clip ? o.clip : h));
  const double moved = q - o.lr * b;
  q = moved < o.lower ? o.lower : (moved > o.upper ? o.upper : moved);
}

// The weights after the step, with weight decay and PACE's pullback, and the average. `p` are PACE's scalars; without a
// pullback its gain is 0.
template <bool kAdam, bool kAverage>
PACE_RULE MadaWeights mada_weights(const PaceScalars& p, float x, float e, float update, float inv_D) {
  MadaWeights a;
  a.x = x * p.decay - update;
  if constexpr (kAdam && kAverage) {
    const float gain = smaller(p.gain * inv_D, p.gain_cap);
    const float pulled = a.x + gain * (e - (p.from_step != 0 ? a.x : x));
    a.x = p.gain != 0.0f ? pulled : a.x;  // 0 times infinity would be NaN
  }
  const float moved = averaged(e, a.x, p.weight);
  a.e = kAverage ? (p.moves != 0 ? moved : e) : 0.0f;
  return a;
}

}  // namespace pace
