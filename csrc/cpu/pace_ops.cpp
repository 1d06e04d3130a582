// PACE's operator on the CPU: check, lay out, run in parallel, add up the statistics. Declared in pace_kernels/ops.py.
#include <torch/csrc/stable/library.h>

#include "../arguments.h"
#include "blocks.h"
#include "host_scalars.h"
#include "isa.h"

namespace pace {
namespace {

void step(const PaceArguments& a) {
  check_arguments(a, kCpu);
  const Kernels& kernels = *chosen_isa().kernels;

  std::deque<std::vector<int64_t>> keep;
  PaceOptions options = a.options;
  options.lr = read_lr(a.lr, options.lr);
  const float factor = grad_factor(a.scaling);
  const bool skip = skipped(a.scaling.found_inf);
  const TensorList& params = a.params;
  std::vector<PaceWork> works(params.size());
  std::vector<double> step_counts(params.size());
  const bool moment = options.beta1 != 0.0, pull = !a.emas.empty() && options.lambda_pullback != 0.0;
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& param = params[i];
    const MemoryOrder order(param);
    const auto stream = [&](const char* name, const Tensor& t, bool state, bool written) {
      check_operand(name, i, t, param, written, kCpu);
      return order.stream(t, format_of(name, i, t, state), keep);
    };
    PaceWork& w = works[i];
    const double t = step_counts[i] = checked_steps_taken("steps", i, a.steps[i]) + 1.0;
    w.moment = moment;
    w.pull = pull;
    w.average = !a.emas.empty() && average_moves(options, t);
    w.x = stream("params", param, false, true);
    w.g = stream("grads", a.grads[i], false, false);
    w.v = stream("exp_avg_sqs", a.exp_avg_sqs[i], true, true);
    // What the step does not touch has no stream.
    w.m = moment ? stream("exp_avgs", a.exp_avgs[i], true, true) : Stream{};
    w.e = w.pull || w.average ? stream("emas", a.emas[i], true, true) : Stream{};
    w.scalars = i > 0 && t == step_counts[i - 1] ? works[i - 1].scalars : pace_scalars(options, t, factor);
  }

  double* const stats = a.stats ? static_cast<double*>(a.stats->data_ptr()) : nullptr;
  if (stats != nullptr) clear_stats(stats);
  if (skip) return;
  const Blocks blocks(params);
  std::vector<PaceSums> sums(stats != nullptr ? static_cast<size_t>(blocks.count()) : 0, kNoSums);
  blocks.run([&](size_t i, int64_t begin, int64_t end, int64_t block) {
    kernels.pace(works[i], begin, end, sums.empty() ? nullptr : &sums[static_cast<size_t>(block)]);
  });
  for (size_t i = 0; i < params.size(); ++i) write_step(a.steps[i], step_counts[i]);

  if (stats == nullptr) return;
  size_t block = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t n = params[i].numel();
    const PaceStatScalars scalars = pace_stat_scalars(options, step_counts[i]);
    for (int64_t begin = 0; begin < n; begin += kBlock, ++block) {
      double row[kPaceStats];
      block_stats(row, sums[block], std::min(kBlock, n - begin), scalars);
      merge_stats(stats, row);
    }
  }
}

}  // namespace
}  // namespace pace

STABLE_TORCH_LIBRARY_IMPL(pace_kernels, CPU, m) { m.impl("pace_step_", TORCH_BOX(&pace::pace_step_<pace::step>)); }
