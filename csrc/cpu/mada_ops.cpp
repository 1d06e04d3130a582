// MADA's operators on the CPU: check, lay out, run in parallel, add up the hypergradients. Declared in
// pace_kernels/ops.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>

#include "blocks.h"
#include "isa.h"

namespace pace {
namespace {

constexpr size_t kHypergradients = kCoefficients + 1;  // and the learning rate
constexpr size_t kLastScalars = kCoefficients + 2;     // whether there was a step, its learning rate, its coefficients

double* doubles(const char* name, const Tensor& t, size_t count) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && static_cast<size_t>(t.numel()) == count &&
                      t.scalar_type() == ScalarType::Double,
                  name, " must be a contiguous CPU float64 tensor with ", count, " elements");
  return static_cast<double*>(t.data_ptr());
}

void check_mada_options(const MadaOptions& o, const MadaCoefficients& q) {
  check_options(o.pace);
  const auto within = [](const char* name, double value, bool below_one) {
    STD_TORCH_CHECK(value >= 0.0 && (below_one ? value < 1.0 : value <= 1.0), name, " must lie in [0, 1",
                    below_one ? ")" : "]", ", got ", value);
  };
  within("beta3", q[kBeta3], true);
  within("rho", q[kRho], false);
  within("c", q[kC], false);
  within("gamma", q[kGamma], false);
  within("lion_beta1", o.lion_beta1, true);
  within("lion_beta2", o.lion_beta2, true);
}

void mada_step_(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
                TensorList exp_avg_diffs, TensorList second_exp_avg_sqs, TensorList exp_avg_lions,
                TensorList last_grads, TensorList older_grads, TensorList last_scalars, TensorList emas,
                TensorList steps, std::optional<Tensor> coefficients, std::optional<Tensor> hypergradients,
                int64_t learn, double lr, double beta1, double beta2, double beta3, double rho, double c, double gamma,
                double eps, double weight_decay, double lion_beta1, double lion_beta2, bool second_max,
                double lambda_pullback, bool clamp_pullback, double beta_ema, std::optional<double> ema_kappa,
                double ema_rho, double ema_gamma, int64_t ema_update_freq, bool pullback_from_step, bool maximize,
                bool /*capturable: the CPU reads its own memory*/) {
  const MadaOptions options{{lr, beta1, beta2, eps, weight_decay, lambda_pullback, clamp_pullback, beta_ema, ema_kappa,
                             ema_rho, ema_gamma, ema_update_freq, pullback_from_step, maximize},
                            lion_beta1,
                            lion_beta2,
                            second_max};
  MadaCoefficients q{beta1, beta2, beta3, rho, c, gamma};
  check_mada_options(options, q);
  if (coefficients) {
    const double* const learned = doubles("coefficients", *coefficients, kCoefficients);
    for (size_t k = 0; k < kCoefficients; ++k) q[k] = learn >> k & 1 ? learned[k] : q[k];
  }
  double* const out = hypergradients ? doubles("hypergradients", *hypergradients, kHypergradients) : nullptr;
  const auto in_play = [&](MadaCoefficient k, double vertex) { return (learn >> k & 1) != 0 || q[k] != vertex; };
  const bool pull = lambda_pullback != 0.0, lag = !last_scalars.empty(), diff = !exp_avg_diffs.empty();
  const bool adam = !exp_avg_sqs.empty(), second = !second_exp_avg_sqs.empty(), lion = !exp_avg_lions.empty();
  STD_TORCH_CHECK(adam || !(lag || diff || second || pull || in_play(kGamma, 0.0)),
                  "exp_avg_sqs may be empty only where gamma is 0 and nothing is learned or pulls");
  STD_TORCH_CHECK(lion || !in_play(kGamma, 1.0), "exp_avg_lions may be empty only where gamma is fixed at 1");
  STD_TORCH_CHECK(!adam || diff || !in_play(kBeta3, 0.0), "exp_avg_diffs may be empty only where beta3 is fixed at 0");
  STD_TORCH_CHECK(!adam || second || !in_play(kRho, 1.0),
                  "second_exp_avg_sqs may be empty only where rho is fixed at 1");
  STD_TORCH_CHECK(lag || learn == 0, "last_scalars may be empty only where nothing is learned");
  check_length("grads", grads, params);
  check_length("exp_avgs", exp_avgs, params, adam ? nullptr : "");
  check_length("exp_avg_sqs", exp_avg_sqs, params, "");
  check_length("exp_avg_diffs", exp_avg_diffs, params, "");
  check_length("second_exp_avg_sqs", second_exp_avg_sqs, params, "");
  check_length("exp_avg_lions", exp_avg_lions, params, "");
  check_length("last_grads", last_grads, params, lag || diff ? nullptr : "");
  check_length("older_grads", older_grads, params, lag && diff ? nullptr : "");
  check_length("last_scalars", last_scalars, params, "");
  check_length("emas", emas, params, pull ? nullptr : "");
  check_length("steps", steps, params);
  const Kernels& kernels = *chosen_isa().kernels;

  std::deque<std::vector<int64_t>> keep;
  std::vector<MadaWork> works(params.size());
  std::vector<double> step_counts(params.size());
  std::vector<double*> last(lag ? params.size() : 0);
  std::vector<MadaCoefficients> factors(lag ? params.size() : 0);
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& param = params[i];
    const MemoryOrder order(param);
    // What the step does not touch has no stream.
    const auto stream = [&](const char* name, const TensorList& list, bool needed, bool state, bool written) {
      if (!needed) return Stream{};
      check_operand(name, i, list[i], param, written);
      return order.stream(list[i], format_of(name, i, list[i], state), keep);
    };
    MadaWork& w = works[i];
    check_step("steps", i, steps[i]);
    const double t = step_counts[i] = *static_cast<const float*>(steps[i].data_ptr()) + 1.0;
    const bool moves = average_moves(options.pace, t);
    w.lag = lag, w.diff = diff, w.second = second, w.lion = lion, w.adam = adam;
    w.average = !emas.empty() && (pull || moves);
    w.x = stream("params", params, true, false, true);
    w.g = stream("grads", grads, true, false, false);
    w.m = stream("exp_avgs", exp_avgs, adam, true, true);
    w.n = stream("exp_avg_diffs", exp_avg_diffs, diff, true, true);
    w.v = stream("exp_avg_sqs", exp_avg_sqs, adam, true, true);
    w.w = stream("second_exp_avg_sqs", second_exp_avg_sqs, second, true, true);
    w.l = stream("exp_avg_lions", exp_avg_lions, lion, true, true);
    w.last_g = stream("last_grads", last_grads, lag || diff, true, true);
    w.older_g = stream("older_grads", older_grads, lag && diff, true, true);
    w.e = stream("emas", emas, w.average, true, true);
    if (i > 0 && t == step_counts[i - 1]) {
      w.now = works[i - 1].now, w.pull = works[i - 1].pull;
    } else {
      w.now = mada_scalars(options, t, lr, q);
      w.pull = pace_scalars(options.pace, t);
      if (!moves) w.pull.weight = 0.0f, w.pull.one_minus_weight = 1.0f;
    }
    if (!lag) continue;
    last[i] = doubles("last_scalars", last_scalars[i], kLastScalars);
    if (i > 0 && t == step_counts[i - 1] && std::equal(last[i], last[i] + kLastScalars, last[i - 1])) {
      w.last = works[i - 1].last, factors[i] = factors[i - 1];
    } else {
      const LastStep redo = last_step(options, t - 1.0, last[i]);
      w.last = redo.scalars, factors[i] = redo.factors;
    }
  }

  const Blocks blocks(params);
  std::vector<std::array<double, kCoefficients>> sums(lag ? static_cast<size_t>(blocks.count()) : 0);
  blocks.run([&](size_t i, int64_t begin, int64_t end, int64_t block) {
    kernels.mada(works[i], begin, end, lag ? sums[static_cast<size_t>(block)].data() : nullptr);
  });
  for (size_t i = 0; i < params.size(); ++i) {
    *static_cast<float*>(steps[i].data_ptr()) = static_cast<float>(step_counts[i]);
    if (!lag) continue;
    last[i][0] = 1.0;
    last[i][1] = lr;
    std::copy(q.begin(), q.end(), last[i] + 2);
  }
  if (out == nullptr) return;
  std::fill(out, out + kCoefficients, 0.0);
  size_t block = 0;
  for (size_t i = 0; i < params.size() && lag; ++i) {
    MadaCoefficients total{};
    for (int64_t begin = 0; begin < params[i].numel(); begin += kBlock, ++block) {
      for (size_t k = 0; k < kCoefficients; ++k) total[k] += sums[block][k];
    }
    for (size_t k = 0; k < kCoefficients; ++k) out[k] += learn >> k & 1 ? factors[i][k] * total[k] : 0.0;
  }
  out[kCoefficients] = lr;
}

void mada_learn_(Tensor coefficients, Tensor momenta, Tensor hypergradients, Tensor hyper_step, TensorList sums,
                 int64_t learn, std::vector<double> hyper_lr, std::vector<double> hyper_momentum,
                 std::vector<double> lower, std::vector<double> upper, double clip, int64_t warmup) {
  double* const q = doubles("coefficients", coefficients, kCoefficients);
  double* const b = doubles("momenta", momenta, kCoefficients);
  double* const h = doubles("hypergradients", hypergradients, kCoefficients);
  double* const step = doubles("hyper_step", hyper_step, 1);
  for (const auto* list : {&hyper_lr, &hyper_momentum, &lower, &upper}) {
    STD_TORCH_CHECK(list->size() == kCoefficients, "hyper options must have ", static_cast<int>(kCoefficients),
                    " entries, got ", list->size());
  }
  for (size_t i = 0; i < sums.size(); ++i) doubles("sums", sums[i], kHypergradients);
  std::array<double, kHypergradients> total{};
  for (const Tensor& row : sums) {
    const double* const values = static_cast<const double*>(row.data_ptr());
    for (size_t k = 0; k < kHypergradients; ++k) total[k] += values[k];
  }
  std::copy(total.begin(), total.begin() + kCoefficients, h);
  if (!(total[kCoefficients] > 0.0)) return;
  *step += 1.0;
  if (*step <= static_cast<double>(warmup)) return;
  for (size_t k = 0; k < kCoefficients; ++k) {
    // What is not finite is seen in the hypergradients, and does not spoil the coefficients of all parameters.
    if ((learn >> k & 1) == 0 || !std::isfinite(total[k])) continue;
    const double clipped = std::clamp(total[k], -clip, clip);
    b[k] = hyper_momentum[k] * b[k] + clipped;
    const double moved = q[k] - hyper_lr[k] * b[k];
    q[k] = moved < lower[k] ? lower[k] : (moved > upper[k] ? upper[k] : moved);
  }
}

}  // namespace
}  // namespace pace

STABLE_TORCH_LIBRARY_IMPL(pace_kernels, CPU, m) {
  m.impl("mada_step_", TORCH_BOX(&pace::mada_step_));
  m.impl("mada_learn_", TORCH_BOX(&pace::mada_learn_));
}
