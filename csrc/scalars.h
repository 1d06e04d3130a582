// From an optimizer's options and a step count to the scalars of a rule: in double, rounded to float once. On the host,
// or, where the step count, the learning rate or the coefficients live on the device, there.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

#include "codes.h"
#include "definitions.h"
#include "rules/mada.h"
#include "rules/pace.h"
#include "rules/pullback.h"
#include "rules/schedule_free.h"

namespace pace {

// w_t in the gain; 1 without a decay exponent.
template <class Options>
PACE_RULE double gain_weight(const Options& o, double t) {
  if (!o.ema_kappa) return 1.0;
  return std::max(std::pow(1.0 + o.ema_gamma * std::max(0.0, t - o.ema_rho), -*o.ema_kappa), 1e-4);
}

// w_t in the average; beta_ema without a decay exponent.
template <class Options>
PACE_RULE double average_weight(const Options& o, double t) {
  return o.ema_kappa ? gain_weight(o, t) : o.beta_ema;
}

template <class Options>
PACE_RULE bool average_moves(const Options& o, double t) {
  return std::fmod(t, static_cast<double>(o.ema_update_freq)) == 0.0;
}

// What the codes of a step are dithered by, and how far averages move that are kept beside their weights.
struct Rounding {
  uint32_t key, moves;
  float weight;
};

PACE_RULE uint32_t low_word(double count) {
  return count >= 0.0 && count < 9007199254740992.0 ? static_cast<uint32_t>(static_cast<uint64_t>(count)) : 0u;  // 2^53
}

// Moves of an average are counted: those of every other step are not spread evenly by the count of steps.
template <class Options>
PACE_RULE Rounding rounding_of(const Options& o, double t) {
  return {dither_key(low_word(t)), low_word(std::floor(t / static_cast<double>(o.ema_update_freq))),
          average_moves(o, t) ? static_cast<float>(average_weight(o, t)) : 0.0f};
}

PACE_RULE Rounding rounding_of(const ScheduleFreeOptions&, double t) { return {dither_key(low_word(t)), 0, 0.0f}; }

// `factor` multiplies the gradient: clip coefficient / gradient scale. MADA has these options too.
template <class Options>
PACE_RULE PaceScalars pace_scalars(const Options& o, double t, float factor) {
  PaceScalars s;
  s.grad_factor = o.maximize ? -factor : factor;
  s.beta1 = static_cast<float>(o.beta1);
  s.one_minus_beta1 = static_cast<float>(1.0 - o.beta1);
  s.beta2 = static_cast<float>(o.beta2);
  s.one_minus_beta2 = static_cast<float>(1.0 - o.beta2);
  s.inv_bias2 = static_cast<float>(1.0 / (1.0 - std::pow(o.beta2, t)));
  s.eps = static_cast<float>(o.eps);
  s.decay = static_cast<float>(1.0 - o.lr * o.weight_decay);
  s.shrink = static_cast<float>(o.lr * o.weight_decay);
  s.step_size = static_cast<float>(o.lr / (1.0 - std::pow(o.beta1, t)));
  s.gain = static_cast<float>(o.lr * o.lambda_pullback * gain_weight(o, t));
  s.gain_cap = o.clamp_pullback ? 1.0f : std::numeric_limits<float>::infinity();
  s.weight = static_cast<float>(average_weight(o, t));
  s.from_step = o.pullback_from_step;
  s.moves = average_moves(o, t);
  return s;
}

// Whether the pullback behind another optimizer's step moves the weights.
PACE_RULE bool pulls(const PullbackOptions& o) { return o.gain ? *o.gain != 0.0 : o.lambda_pullback != 0.0; }

// The gain, but for 1 / D where there is a second moment.
PACE_RULE double pullback_gain(const PullbackOptions& o, double t) {
  return o.gain ? *o.gain : o.lr * o.lambda_pullback * gain_weight(o, t);
}

PACE_RULE PullbackScalars pullback_scalars(const PullbackOptions& o, double t) {
  PullbackScalars s;
  s.inv_bias2 = static_cast<float>(1.0 / (1.0 - std::pow(o.beta2, t + static_cast<double>(o.step_offset))));
  s.eps = static_cast<float>(o.eps);
  s.gain = static_cast<float>(pullback_gain(o, t));
  s.gain_cap = o.clamp_pullback ? 1.0f : std::numeric_limits<float>::infinity();
  s.weight = static_cast<float>(average_weight(o, t));
  s.moves = average_moves(o, t);
  return s;
}

// α_t, t and c are the options lr, count and share.
PACE_RULE ScheduleFreeScalars schedule_free_scalars(const ScheduleFreeOptions& o, float factor) {
  ScheduleFreeScalars s;
  s.grad_factor = o.maximize ? -factor : factor;
  s.beta2 = static_cast<float>(o.beta2);
  s.one_minus_beta2 = static_cast<float>(1.0 - o.beta2);
  s.inv_bias2 = static_cast<float>(1.0 / (1.0 - std::pow(o.beta2, o.count)));
  s.eps = static_cast<float>(o.eps);
  s.weight_decay = static_cast<float>(o.weight_decay);
  s.share = static_cast<float>(o.share);
  s.y_size = static_cast<float>(o.lr * (1.0 - o.beta1 * (1.0 - o.share)));
  s.z_size = static_cast<float>(o.lr);
  return s;
}

using MadaCoefficients = std::array<double, kCoefficients>;

PACE_RULE bool learned(const MadaOptions& o, int k) { return (o.learn >> k & 1) != 0; }

// Those that are not learned, and where the others started.
PACE_RULE MadaCoefficients fixed_coefficients(const MadaOptions& o) {
  return {o.beta1, o.beta2, o.beta3, o.rho, o.c, o.gamma};
}

PACE_RULE MadaScalars mada_scalars(const MadaOptions& o, double t, double lr, const MadaCoefficients& q) {
  const auto [beta1, beta2, beta3, rho, c, gamma] = q;
  const double bias1 = 1.0 - std::pow(beta1, t), bias2 = 1.0 - std::pow(beta2, t);
  const auto f = [](double a) { return static_cast<float>(a); };
  MadaScalars s;
  s.beta1 = f(beta1), s.one_minus_beta1 = f(1.0 - beta1);
  s.beta2 = f(beta2), s.one_minus_beta2 = f(1.0 - beta2);
  s.beta3 = f(beta3), s.one_minus_beta3 = f(1.0 - beta3);
  s.lion_beta1 = f(o.lion_beta1), s.one_minus_lion_beta1 = f(1.0 - o.lion_beta1);
  s.lion_beta2 = f(o.lion_beta2), s.one_minus_lion_beta2 = f(1.0 - o.lion_beta2);
  s.rho = f(rho), s.one_minus_rho = f(1.0 - rho);
  s.c = f(c), s.one_minus_c = f(1.0 - c);
  s.mean_new = f(1.0 / t), s.mean_old = f((t - 1.0) / t);
  s.eps = f(o.eps), s.inv_eps = f(1.0 / o.eps);
  s.inv_bias1 = f(1.0 / bias1), s.inv_bias2 = f(1.0 / bias2);
  s.adam_size = f(lr * gamma), s.lion_size = f(lr * (1.0 - gamma));
  s.bias1_slope = f(t * std::pow(beta1, t - 1.0) / bias1);
  s.bias2_slope = f(t * std::pow(beta2, t - 1.0));
  s.square_slope = f(2.0 * rho * (1.0 - beta2) / bias2);
  s.pull_gain = f(o.pullback_from_step ? lr * o.lambda_pullback * gain_weight(o, t) : 0.0);
  s.gain_cap = o.clamp_pullback ? 1.0f : std::numeric_limits<float>::infinity();
  s.second_max = o.second_max;
  return s;
}

// What all coordinates' terms of MadaStep share: h_q is the factor of q times the sum of the terms.
PACE_RULE MadaCoefficients mada_factors(double t, double lr, const MadaCoefficients& q) {
  const double bias1 = 1.0 - std::pow(q[kBeta1], t), bias2 = 1.0 - std::pow(q[kBeta2], t);
  const double A = lr * q[kGamma], square = q[kRho] * (1.0 - q[kBeta2]);
  return {-A / bias1, A / bias2, A, A / bias2, A * square / bias2, lr};
}

// The scalars of a step that leaves the moments as they are and has no sensitivities.
PACE_RULE MadaScalars no_step(const MadaOptions& o) {
  MadaScalars s{};
  s.beta1 = s.beta2 = s.beta3 = s.lion_beta2 = s.mean_old = s.eps = 1.0f;
  s.second_max = o.second_max;
  return s;
}

// What a parameter remembers of its last step, in doubles: what can be done about it, its learning rate, its
// coefficients. LAST_SCALARS in pace_kernels/ops.py.
enum LastScalar { kTaken, kLastLr, kLastCoefficients, kLastScalars = kLastCoefficients + kCoefficients };
// kTaken: 1, the step is to be redone; 0, it is not, but its gradient was kept; −1, no gradient was kept yet.
constexpr double kRedo = 1.0, kDone = 0.0, kNoGradient = -1.0;

// Step t, which was the last, from what it left in `last`.
struct LastStep {
  MadaScalars scalars;
  MadaCoefficients factors;
};

PACE_RULE LastStep last_step(const MadaOptions& o, double t, const double* last) {
  if (last[kTaken] <= kDone) return {no_step(o), {}};
  MadaCoefficients q;
  for (int k = 0; k < kCoefficients; ++k) q[k] = last[kLastCoefficients + k];
  return {mada_scalars(o, t, last[kLastLr], q), mada_factors(t, last[kLastLr], q)};
}

}  // namespace pace
