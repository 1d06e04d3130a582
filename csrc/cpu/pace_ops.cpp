// PACE's operator on the CPU: check, lay out, run in parallel, add up the statistics. Declared in pace_kernels/ops.py.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "blocks.h"
#include "isa.h"

namespace pace {
namespace {

// The layout of PACE's statistics; pace_kernels/ops.py has the same names in the same order.
enum PaceStat {
  kCount,
  kRawSum,
  kRawMin,
  kRawMax,
  kGainSum,
  kGainMin,
  kGainMax,
  kClampedSum,
  kClampedMin,
  kClampedMax,
  kClipped,
  kAdamwSq,
  kPullbackSq,
  kUpdateSq,
  kPaceStats
};

void add_stats(double* stats, const PaceSums& sums, int64_t count, const PaceOptions& o, double t) {
  const double w = gain_weight(o, t), gain = o.lr * o.lambda_pullback * w;
  const double cap = o.clamp_pullback ? 1.0 : std::numeric_limits<double>::infinity();
  const double low = float_of(sums.min_inv_D), high = float_of(sums.max_inv_D);
  const auto lower = [&](PaceStat k, double value) { stats[k] = value < stats[k] ? value : stats[k]; };
  const auto raise = [&](PaceStat k, double value) { stats[k] = value <= stats[k] ? stats[k] : value; };  // keeps NaN
  stats[kCount] += static_cast<double>(count);
  stats[kRawSum] += w * sums.inv_D;
  lower(kRawMin, w * low);
  raise(kRawMax, w * high);
  stats[kGainSum] += gain * sums.inv_D;
  lower(kGainMin, gain * low);
  raise(kGainMax, gain * high);
  stats[kClampedSum] += sums.clamped;
  lower(kClampedMin, std::min(gain * low, cap));
  raise(kClampedMax, std::min(gain * high, cap));
  stats[kClipped] += sums.clipped;
  stats[kAdamwSq] += sums.adamw_sq;
  stats[kPullbackSq] += sums.pullback_sq;
  stats[kUpdateSq] += sums.update_sq;
}

void pace_step_(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs, TensorList emas,
                TensorList steps, std::optional<Tensor> stats, double lr, double beta1, double beta2, double eps,
                double weight_decay, double lambda_pullback, bool clamp_pullback, double beta_ema,
                std::optional<double> ema_kappa, double ema_rho, double ema_gamma, int64_t ema_update_freq,
                bool pullback_from_step, bool maximize, bool /*capturable: the CPU reads its own memory*/) {
  const PaceOptions options{
      lr,       beta1,     beta2,   eps,       weight_decay,    lambda_pullback,    clamp_pullback,
      beta_ema, ema_kappa, ema_rho, ema_gamma, ema_update_freq, pullback_from_step, maximize};
  check_options(options);
  check_length("grads", grads, params);
  check_length("exp_avgs", exp_avgs, params, beta1 == 0.0 ? "; it may be empty, since beta1 is 0" : nullptr);
  check_length("exp_avg_sqs", exp_avg_sqs, params);
  check_length("emas", emas, params,
               lambda_pullback == 0.0 ? "; it may be empty, since lambda_pullback is 0" : nullptr);
  check_length("steps", steps, params);
  if (stats) {
    STD_TORCH_CHECK(stats->is_cpu() && stats->is_contiguous() && stats->numel() == kPaceStats &&
                        stats->scalar_type() == ScalarType::Double,
                    "stats must be a contiguous CPU float64 tensor with ", static_cast<int>(kPaceStats), " elements");
  }
  const Kernels& kernels = *chosen_isa().kernels;

  std::deque<std::vector<int64_t>> keep;
  std::vector<PaceWork> works(params.size());
  std::vector<double> step_counts(params.size());
  const bool moment = beta1 != 0.0;
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& param = params[i];
    const MemoryOrder order(param);
    const auto stream = [&](const char* name, const Tensor& t, bool state, bool written) {
      check_operand(name, i, t, param, written);
      return order.stream(t, format_of(name, i, t, state), keep);
    };
    PaceWork& w = works[i];
    check_step("steps", i, steps[i]);
    const double t = step_counts[i] = *static_cast<const float*>(steps[i].data_ptr()) + 1.0;
    w.moment = moment;
    w.pull = !emas.empty() && lambda_pullback != 0.0;
    w.average = !emas.empty() && average_moves(options, t);
    w.x = stream("params", param, false, true);
    w.g = stream("grads", grads[i], false, false);
    w.v = stream("exp_avg_sqs", exp_avg_sqs[i], true, true);
    // What the step does not touch has no stream.
    w.m = moment ? stream("exp_avgs", exp_avgs[i], true, true) : Stream{};
    w.e = w.pull || w.average ? stream("emas", emas[i], true, true) : Stream{};
    w.scalars = i > 0 && t == step_counts[i - 1] ? works[i - 1].scalars : pace_scalars(options, t);
  }

  const Blocks blocks(params);
  constexpr PaceSums kNoSums{0, 0, 0, 0, 0, 0, 0x7fffffffu, 0};
  std::vector<PaceSums> sums(stats ? static_cast<size_t>(blocks.count()) : 0, kNoSums);
  blocks.run([&](size_t i, int64_t begin, int64_t end, int64_t block) {
    kernels.pace(works[i], begin, end, sums.empty() ? nullptr : &sums[static_cast<size_t>(block)]);
  });
  for (size_t i = 0; i < params.size(); ++i) {
    *static_cast<float*>(steps[i].data_ptr()) = static_cast<float>(step_counts[i]);
  }

  if (!stats) return;
  double* out = static_cast<double*>(stats->data_ptr());
  std::fill(out, out + kPaceStats, 0.0);
  for (const PaceStat k : {kRawMin, kGainMin, kClampedMin}) out[k] = std::numeric_limits<double>::infinity();
  size_t block = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t n = params[i].numel();
    for (int64_t begin = 0; begin < n; begin += kBlock, ++block) {
      add_stats(out, sums[block], std::min(kBlock, n - begin), options, step_counts[i]);
    }
  }
}

}  // namespace
}  // namespace pace

STABLE_TORCH_LIBRARY_IMPL(pace_kernels, CPU, m) { m.impl("pace_step_", TORCH_BOX(&pace::pace_step_)); }
