// The pullback's operator on the CPU: check, lay out, run in parallel, add up the statistics. Declared in
// pace_kernels/ops.py.
#include <torch/csrc/stable/library.h>

#include "../arguments.h"
#include "blocks.h"
#include "host_scalars.h"
#include "isa.h"

namespace pace {
namespace {

void pull_back(const PullbackArguments& a) {
  check_arguments(a, kCpu);
  const Kernels& kernels = *chosen_isa().kernels;

  std::deque<std::vector<int64_t>> keep;
  PullbackOptions options = a.options;
  options.pace.lr = read_lr(a.lr, options.pace.lr);
  const TensorList& params = a.params;
  std::vector<PullbackWork> works(params.size());
  std::vector<double> step_counts(params.size());
  const bool pull = a.pull();
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& param = params[i];
    const MemoryOrder order(param);
    const auto stream = [&](const char* name, const TensorList& list, bool needed, bool state, bool written) {
      if (list.empty()) return Stream{};
      check_operand(name, i, list[i], param, written, kCpu);
      const Format format = format_of(name, i, list[i], state);
      return needed ? order.stream(list[i], format, keep) : Stream{};
    };
    PullbackWork& w = works[i];
    const double t = step_counts[i] = checked_steps_taken("steps", i, a.steps[i]) + 1.0;
    w.pull = pull;
    w.average = average_moves(options.pace, t);
    // A step in which nothing pulls and the average rests walks no memory.
    w.x = stream("params", params, pull || w.average || a.stats, false, pull);
    w.before = stream("befores", a.befores, true, false, false);
    w.v = stream("second_moments", a.second_moments, true, false, false);
    w.e = stream("emas", a.emas, pull || w.average, true, true);
    w.scalars = i > 0 && t == step_counts[i - 1] ? works[i - 1].scalars : pullback_scalars(options, t);
  }

  double* const stats = a.stats ? static_cast<double*>(a.stats->data_ptr()) : nullptr;
  if (stats != nullptr) clear_stats(stats);
  if (skipped(a.found_inf)) return;
  const Blocks blocks(params);
  std::vector<PaceSums> sums(stats != nullptr ? static_cast<size_t>(blocks.count()) : 0, kNoSums);
  blocks.run([&](size_t i, int64_t begin, int64_t end, int64_t block) {
    kernels.pullback(works[i], begin, end, sums.empty() ? nullptr : &sums[static_cast<size_t>(block)]);
  });
  for (size_t i = 0; i < params.size(); ++i) write_step(a.steps[i], step_counts[i]);

  if (stats == nullptr) return;
  size_t block = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t n = params[i].numel();
    const PaceStatScalars scalars = pullback_stat_scalars(options, step_counts[i]);
    for (int64_t begin = 0; begin < n; begin += kBlock, ++block) {
      double row[kPaceStats];
      block_stats(row, sums[block], std::min(kBlock, n - begin), scalars);
      merge_stats(stats, row);
    }
  }
}

}  // namespace
}  // namespace pace

STABLE_TORCH_LIBRARY_IMPL(pace_kernels, CPU, m) { m.impl("pullback_", TORCH_BOX(&pace::pullback_<pace::pull_back>)); }
