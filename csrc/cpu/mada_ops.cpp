// MADA's operators on the CPU: check, lay out, run in parallel, add up the hypergradients. Declared in
// pace_kernels/ops.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>

#include "../arguments.h"
#include "blocks.h"
#include "host_scalars.h"
#include "isa.h"

namespace pace {
namespace {

void step(const MadaArguments& a) {
  check_arguments(a, kCpu);
  const bool skip = skipped(a.scaling.found_inf);
  MadaOptions options = a.options;
  const double lr = options.pace.lr = read_lr(a.lr, options.pace.lr);
  const float factor = grad_factor(a.scaling);
  MadaCoefficients q = a.fixed;
  if (a.coefficients) {
    const double* const learned = static_cast<const double*>(a.coefficients->data_ptr());
    for (size_t k = 0; k < q.size(); ++k) q[k] = a.learned(static_cast<MadaCoefficient>(k)) ? learned[k] : q[k];
  }
  double* const out = a.hypergradients ? static_cast<double*>(a.hypergradients->data_ptr()) : nullptr;
  const TensorList& params = a.params;
  const bool lag = a.lag(), diff = a.diff(), second = a.second(), lion = a.lion(), adam = a.adam();
  const bool grads_kept = !a.last_scalars.empty();
  const Kernels& kernels = *chosen_isa().kernels;

  std::deque<std::vector<int64_t>> keep;
  std::vector<MadaWork> works(params.size());
  std::vector<double> step_counts(params.size());
  std::vector<double*> last(grads_kept ? params.size() : 0);
  std::vector<MadaCoefficients> factors(lag ? params.size() : 0);
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& param = params[i];
    const MemoryOrder order(param);
    // What the step does not touch has no stream.
    const auto stream = [&](const char* name, const TensorList& list, bool needed, bool state, bool written) {
      if (!needed) return Stream{};
      check_operand(name, i, list[i], param, written, kCpu);
      return order.stream(list[i], format_of(name, i, list[i], state), keep);
    };
    MadaWork& w = works[i];
    const double t = step_counts[i] = checked_steps_taken("steps", i, a.steps[i]) + 1.0;
    w.lag = lag, w.diff = diff, w.second = second, w.lion = lion, w.adam = adam;
    // Those who replay a captured graph know tensors, not their roles, so there the roles stay. Here that is for show.
    w.roles_stay = a.capturable && lag && diff;
    w.average = !a.emas.empty() && (a.pull() || average_moves(options.pace, t));
    w.x = stream("params", a.params, true, false, true);
    w.g = stream("grads", a.grads, true, false, false);
    w.m = stream("exp_avgs", a.exp_avgs, adam, true, true);
    w.n = stream("exp_avg_diffs", a.exp_avg_diffs, diff, true, true);
    w.v = stream("exp_avg_sqs", a.exp_avg_sqs, adam, true, true);
    w.w = stream("second_exp_avg_sqs", a.second_exp_avg_sqs, second, true, true);
    w.l = stream("exp_avg_lions", a.exp_avg_lions, lion, true, true);
    w.last_g = stream("last_grads", a.last_grads, lag || diff, true, true);
    w.older_g = stream("older_grads", a.older_grads, lag && diff, true, true);
    w.e = stream("emas", a.emas, w.average, true, true);
    if (i > 0 && t == step_counts[i - 1]) {
      w.now = works[i - 1].now, w.pull = works[i - 1].pull;
    } else {
      w.now = mada_scalars(options, t, lr, q);
      w.pull = pace_scalars(options.pace, t, factor);
    }
    if (!grads_kept) continue;
    last[i] = static_cast<double*>(a.last_scalars[i].data_ptr());
    w.first = last[i][kTaken] == kNoGradient;
    if (!lag) continue;
    if (i > 0 && t == step_counts[i - 1] && std::equal(last[i], last[i] + kLastScalars, last[i - 1])) {
      w.last = works[i - 1].last, factors[i] = factors[i - 1];
    } else {
      const LastStep redo = last_step(options, t - 1.0, last[i]);
      w.last = redo.scalars, factors[i] = redo.factors;
    }
  }

  if (out != nullptr) std::fill(out, out + kHypergradients, 0.0);
  if (skip) return;
  const Blocks blocks(params);
  std::vector<std::array<double, kCoefficients>> sums(lag ? static_cast<size_t>(blocks.count()) : 0);
  blocks.run([&](size_t i, int64_t begin, int64_t end, int64_t block) {
    kernels.mada(works[i], begin, end, lag ? sums[static_cast<size_t>(block)].data() : nullptr);
  });
  for (size_t i = 0; i < params.size(); ++i) {
    write_step(a.steps[i], step_counts[i]);
    if (!grads_kept) continue;
    last[i][kTaken] = lag ? kRedo : kDone;
    last[i][kLastLr] = lr;
    std::copy(q.begin(), q.end(), last[i] + kLastCoefficients);
  }
  if (out == nullptr) return;
  size_t block = 0;
  for (size_t i = 0; i < params.size() && lag; ++i) {
    MadaCoefficients total{};
    for (int64_t begin = 0; begin < params[i].numel(); begin += kBlock, ++block) {
      for (size_t k = 0; k < kCoefficients; ++k) total[k] += sums[block][k];
    }
    for (size_t k = 0; k < kCoefficients; ++k) {
      out[k] += a.learned(static_cast<MadaCoefficient>(k)) ? factors[i][k] * total[k] : 0.0;
    }
  }
  out[kCoefficients] = lr;
}

void learn(const LearnArguments& a) {
  check_arguments(a, kCpu);
  if (skipped(a.found_inf)) return;
  double* const q = static_cast<double*>(a.coefficients.data_ptr());
  double* const b = static_cast<double*>(a.momenta.data_ptr());
  double* const step = static_cast<double*>(a.hyper_step.data_ptr());
  std::array<double, kHypergradients> total{};
  for (const Tensor& row : a.sums) {
    const double* const values = static_cast<const double*>(row.data_ptr());
    for (int k = 0; k < kHypergradients; ++k) total[k] += values[k];
  }
  std::copy(total.begin(), total.begin() + kCoefficients, static_cast<double*>(a.hypergradients.data_ptr()));
  if (!(total[kCoefficients] > 0.0)) return;
  *step += 1.0;
  if (*step <= static_cast<double>(a.warmup)) return;
  for (size_t k = 0; k < kCoefficients; ++k) {
    if ((a.learn >> k & 1) == 0) continue;
    hyper_rule(hyper_options(a, k), total[k], q[k], b[k]);
  }
}

}  // namespace
}  // namespace pace

STABLE_TORCH_LIBRARY_IMPL(pace_kernels, CPU, m) {
  m.impl("mada_step_", TORCH_BOX(&pace::mada_step_<pace::step>));
  m.impl("mada_learn_", TORCH_BOX(&pace::mada_learn_<pace::learn>));
}
