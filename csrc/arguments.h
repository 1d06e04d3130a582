// The operators' arguments by name, and the checks of them that all devices share. Declared in pace_kernels/ops.py;
// each device registers its own function of the struct, through pace_step_, mada_step_, mada_learn_ and
// pullback_ below.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "checks.h"
#include "stats.h"

namespace pace {

// What mixed precision and clipping hand over: the gradient is divided by `grad_scale` and multiplied by `clip_coef`;
// where `found_inf` is not 0, the step is left undone. One float32 element each, on the device of the parameters.
struct GradScaling {
  std::optional<Tensor> grad_scale, clip_coef, found_inf;

  bool any() const { return grad_scale || clip_coef || found_inf; }
};

struct PaceArguments {
  TensorList params, grads, exp_avgs, exp_avg_sqs, emas, steps;
  std::optional<Tensor> stats, lr;  // lr: in place of the option, on the device of the parameters
  GradScaling scaling;
  PaceOptions options;
  bool capturable;  // the step counts are on the device of the parameters
};

struct MadaArguments {
  TensorList params, grads, exp_avgs, exp_avg_sqs, exp_avg_diffs, second_exp_avg_sqs, exp_avg_lions, last_grads,
      older_grads, last_scalars, emas, steps;
  std::optional<Tensor> coefficients, hypergradients, lr;
  GradScaling scaling;
  int64_t learn;
  MadaOptions options;
  MadaCoefficients fixed;
  bool capturable;

  bool learned(MadaCoefficient k) const { return (learn >> k & 1) != 0; }
  bool lag() const { return learn != 0; }
  bool diff() const { return !exp_avg_diffs.empty(); }
  bool second() const { return !second_exp_avg_sqs.empty(); }
  bool lion() const { return !exp_avg_lions.empty(); }
  bool adam() const { return !exp_avg_sqs.empty(); }
  bool pull() const { return options.pace.lambda_pullback != 0.0; }
};

struct LearnArguments {
  Tensor coefficients, momenta, hypergradients, hyper_step;
  TensorList sums;
  std::optional<Tensor> found_inf;
  int64_t learn;
  std::vector<double> hyper_lr, hyper_momentum, lower, upper;
  double clip;
  int64_t warmup;
};

struct PullbackArguments {
  TensorList params, befores, second_moments, emas, steps;
  std::optional<Tensor> stats, lr, found_inf;
  PullbackOptions options;
  bool capturable;

  bool pull() const { return options.pulls(); }
  bool before() const { return !befores.empty(); }
  bool moment() const { return !second_moments.empty(); }
};

constexpr int kHypergradients = kCoefficients + 1;  // what a call leaves: a sum for each coefficient, and the lr

inline void check_scaling(const GradScaling& s, const Place& place) {
  check_one("grad_scale", s.grad_scale, place);
  check_one("clip_coef", s.clip_coef, place);
  check_one("found_inf", s.found_inf, place);
}

inline void check_arguments(const PaceArguments& a, const Place& place) {
  check_options(a.options);
  check_length("grads", a.grads, a.params);
  check_length("exp_avgs", a.exp_avgs, a.params,
               a.options.beta1 == 0.0 ? "; it may be empty, since beta1 is 0" : nullptr);
  check_length("exp_avg_sqs", a.exp_avg_sqs, a.params);
  check_length("emas", a.emas, a.params,
               a.options.lambda_pullback == 0.0 ? "; it may be empty, since lambda_pullback is 0" : nullptr);
  check_length("steps", a.steps, a.params);
  if (a.stats) check_doubles("stats", *a.stats, kPaceStats, place);
  check_lr(a.lr, place);
  check_scaling(a.scaling, place);
}

inline void check_coefficients(const MadaArguments& a) {
  const auto within = [](const char* name, double value, bool below_one) {
    STD_TORCH_CHECK(value >= 0.0 && (below_one ? value < 1.0 : value <= 1.0), name, " must lie in [0, 1",
                    below_one ? ")" : "]", ", got ", value);
  };
  within("beta3", a.fixed[kBeta3], true);
  within("rho", a.fixed[kRho], false);
  within("c", a.fixed[kC], false);
  within("gamma", a.fixed[kGamma], false);
  within("lion_beta1", a.options.lion_beta1, true);
  within("lion_beta2", a.options.lion_beta2, true);
}

inline void check_arguments(const MadaArguments& a, const Place& place) {
  check_options(a.options.pace);
  check_coefficients(a);
  const auto in_play = [&](MadaCoefficient k, double vertex) { return a.learned(k) || a.fixed[k] != vertex; };
  STD_TORCH_CHECK(a.adam() || !(a.lag() || a.diff() || a.second() || a.pull() || in_play(kGamma, 0.0)),
                  "exp_avg_sqs may be empty only where gamma is 0 and nothing is learned or pulls");
  STD_TORCH_CHECK(a.lion() || !in_play(kGamma, 1.0), "exp_avg_lions may be empty only where gamma is fixed at 1");
  STD_TORCH_CHECK(!a.adam() || a.diff() || !in_play(kBeta3, 0.0),
                  "exp_avg_diffs may be empty only where beta3 is fixed at 0");
  STD_TORCH_CHECK(!a.adam() || a.second() || !in_play(kRho, 1.0),
                  "second_exp_avg_sqs may be empty only where rho is fixed at 1");
  STD_TORCH_CHECK(!a.lag() || a.coefficients, "coefficients may be missing only where nothing is learned");
  check_length("grads", a.grads, a.params);
  check_length("exp_avgs", a.exp_avgs, a.params, a.adam() ? nullptr : "");
  check_length("exp_avg_sqs", a.exp_avg_sqs, a.params, "");
  check_length("exp_avg_diffs", a.exp_avg_diffs, a.params, "");
  check_length("second_exp_avg_sqs", a.second_exp_avg_sqs, a.params, "");
  check_length("exp_avg_lions", a.exp_avg_lions, a.params, "");
  check_length("last_grads", a.last_grads, a.params, a.lag() || a.diff() ? nullptr : "");
  check_length("older_grads", a.older_grads, a.params, a.lag() && a.diff() ? nullptr : "");
  check_length("last_scalars", a.last_scalars, a.params, a.lag() || a.diff() ? nullptr : "");
  check_length("emas", a.emas, a.params, a.pull() ? nullptr : "");
  check_length("steps", a.steps, a.params);
  for (size_t i = 0; i < a.last_scalars.size(); ++i) {
    if (are_doubles(a.last_scalars[i], kLastScalars, place)) continue;  // or else its name, which takes a string
    check_doubles(entry("last_scalars", i).c_str(), a.last_scalars[i], kLastScalars, place);
  }
  if (a.coefficients) check_doubles("coefficients", *a.coefficients, kCoefficients, place);
  if (a.hypergradients) check_doubles("hypergradients", *a.hypergradients, kHypergradients, place);
  check_lr(a.lr, place);
  check_scaling(a.scaling, place);
}

inline void check_arguments(const LearnArguments& a, const Place& place) {
  check_doubles("coefficients", a.coefficients, kCoefficients, place);
  check_doubles("momenta", a.momenta, kCoefficients, place);
  check_doubles("hypergradients", a.hypergradients, kCoefficients, place);
  check_doubles("hyper_step", a.hyper_step, 1, place);
  for (const auto* list : {&a.hyper_lr, &a.hyper_momentum, &a.lower, &a.upper}) {
    STD_TORCH_CHECK(list->size() == kCoefficients, "hyper options must have ", static_cast<int>(kCoefficients),
                    " entries, got ", list->size());
  }
  for (const Tensor& row : a.sums) check_doubles("sums", row, kHypergradients, place);
  check_one("found_inf", a.found_inf, place);
}

inline void check_arguments(const PullbackArguments& a, const Place& place) {
  check_options(a.options.pace);
  const std::optional<double>& gain = a.options.gain;
  STD_TORCH_CHECK(!gain || (*gain >= 0.0 && *gain <= 1.0), "gain must lie in [0, 1], got ", gain.value_or(0.0));
  STD_TORCH_CHECK(a.options.step_offset >= 0, "step_offset must be >= 0, got ", a.options.step_offset);
  STD_TORCH_CHECK(a.pull() || !a.before(), "befores must be empty where nothing pulls");
  STD_TORCH_CHECK(a.pull() || !a.moment(), "second_moments must be empty where nothing pulls");
  STD_TORCH_CHECK(!gain || !a.moment(), "second_moments must be empty where gain is given");
  check_length("befores", a.befores, a.params, "");
  check_length("second_moments", a.second_moments, a.params, gain || !a.pull() ? "" : nullptr);
  check_length("emas", a.emas, a.params);
  check_length("steps", a.steps, a.params);
  if (a.stats) check_doubles("stats", *a.stats, kPaceStats, place);
  check_lr(a.lr, place);
  check_one("found_inf", a.found_inf, place);
}

inline HyperOptions hyper_options(const LearnArguments& a, size_t k) {
  return {a.hyper_lr[k], a.hyper_momentum[k], a.lower[k], a.upper[k], a.clip};
}

// ---- the operators, in the order of their schemas -------------------------------------------------------------------

template <void (*run)(const PaceArguments&)>
void pace_step_(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, TensorList emas,
                TensorList steps, std::optional<Tensor> stats, std::optional<Tensor> lr_tensor,
                std::optional<Tensor> grad_scale, std::optional<Tensor> clip_coef, std::optional<Tensor> found_inf,
                double lr, double beta1, double beta2, double eps, double weight_decay, double lambda_pullback,
                bool clamp_pullback, double beta_ema, std::optional<double> ema_kappa, double ema_rho, double ema_gamma,
                int64_t ema_update_freq, bool pullback_from_step, bool maximize, bool capturable) {
  run({std::move(params),
       std::move(grads),
       std::move(exp_avgs),
       std::move(exp_avg_sqs),
       std::move(emas),
       std::move(steps),
       stats,
       lr_tensor,
       {grad_scale, clip_coef, found_inf},
       {lr, beta1, beta2, eps, weight_decay, lambda_pullback, clamp_pullback, beta_ema, ema_kappa, ema_rho, ema_gamma,
        ema_update_freq, pullback_from_step, maximize},
       capturable});
}

template <void (*run)(const MadaArguments&)>
void mada_step_(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
                TensorList exp_avg_diffs, TensorList second_exp_avg_sqs, TensorList exp_avg_lions,
                TensorList last_grads, TensorList older_grads, TensorList last_scalars, TensorList emas,
                TensorList steps, std::optional<Tensor> coefficients, std::optional<Tensor> hypergradients,
                std::optional<Tensor> lr_tensor, std::optional<Tensor> grad_scale, std::optional<Tensor> clip_coef,
                std::optional<Tensor> found_inf, int64_t learn, double lr, double beta1, double beta2, double beta3,
                double rho, double c, double gamma, double eps, double weight_decay, double lion_beta1,
                double lion_beta2, bool second_max, double lambda_pullback, bool clamp_pullback, double beta_ema,
                std::optional<double> ema_kappa, double ema_rho, double ema_gamma, int64_t ema_update_freq,
                bool pullback_from_step, bool maximize, bool capturable) {
  run({std::move(params),
       std::move(grads),
       std::move(exp_avgs),
       std::move(exp_avg_sqs),
       std::move(exp_avg_diffs),
       std::move(second_exp_avg_sqs),
       std::move(exp_avg_lions),
       std::move(last_grads),
       std::move(older_grads),
       std::move(last_scalars),
       std::move(emas),
       std::move(steps),
       coefficients,
       hypergradients,
       lr_tensor,
       {grad_scale, clip_coef, found_inf},
       learn,
       {{lr, beta1, beta2, eps, weight_decay, lambda_pullback, clamp_pullback, beta_ema, ema_kappa, ema_rho, ema_gamma,
         ema_update_freq, pullback_from_step, maximize},
        lion_beta1,
        lion_beta2,
        second_max},
       {beta1, beta2, beta3, rho, c, gamma},
       capturable});
}

template <void (*run)(const LearnArguments&)>
void mada_learn_(Tensor coefficients, Tensor momenta, Tensor hypergradients, Tensor hyper_step, TensorList sums,
                 std::optional<Tensor> found_inf, int64_t learn, std::vector<double> hyper_lr,
                 std::vector<double> hyper_momentum, std::vector<double> lower, std::vector<double> upper, double clip,
                 int64_t warmup) {
  run({coefficients, momenta, hypergradients, hyper_step, std::move(sums), found_inf, learn, std::move(hyper_lr),
       std::move(hyper_momentum), std::move(lower), std::move(upper), clip, warmup});
}

template <void (*run)(const PullbackArguments&)>
void pullback_(TensorList params, TensorList befores, TensorList second_moments, TensorList emas, TensorList steps,
               std::optional<Tensor> stats, std::optional<Tensor> lr_tensor, std::optional<Tensor> found_inf, double lr,
               double lambda_pullback, std::optional<double> gain, bool clamp_pullback, double beta2, double eps,
               int64_t step_offset, double beta_ema, std::optional<double> ema_kappa, double ema_rho, double ema_gamma,
               int64_t ema_update_freq, bool capturable) {
  PaceOptions pace{};
  pace.lr = lr, pace.beta2 = beta2, pace.eps = eps;
  pace.lambda_pullback = lambda_pullback, pace.clamp_pullback = clamp_pullback;
  pace.beta_ema = beta_ema, pace.ema_kappa = ema_kappa, pace.ema_rho = ema_rho, pace.ema_gamma = ema_gamma;
  pace.ema_update_freq = ema_update_freq;
  run({std::move(params),
       std::move(befores),
       std::move(second_moments),
       std::move(emas),
       std::move(steps),
       stats,
       lr_tensor,
       found_inf,
       {pace, gain, step_offset},
       capturable});
}

}  // namespace pace
