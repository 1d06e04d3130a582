// The operators on CUDA: check, plan, launch on the current stream. Nothing here waits for the device. Declared in
// pace_kernels/ops.py.
#include <torch/csrc/stable/library.h>

#include "operands.h"

namespace pace {
namespace {

void pace_step(const PaceArguments& a) {
  if (a.params.empty()) return;
  const Place place = place_of("params[0]", a.params[0]);
  check_arguments(a, place);
  const torch::stable::accelerator::DeviceGuard guard(place.index);
  const PaceRequest request{step_request(a.lr, a.options.lr, a.scaling, a.capturable, a.stats), a.options,
                            !a.emas.empty()};
  Operands operands(place);
  std::vector<PaceTensor> tensors(a.params.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    PaceTensor& t = tensors[i];
    t.x = operands.parameter(a.params, i, &t.x_format);
    t.g = operands.gradient(a.grads, i, t.x_format, &t.g_format);
    t.m = operands.state("exp_avgs", a.exp_avgs, i, a.options.beta1 != 0.0);
    t.v = operands.state("exp_avg_sqs", a.exp_avg_sqs, i);
    t.e = operands.state("emas", a.emas, i, !a.emas.empty());
    t.numel = a.params[i].numel();
    std::tie(t.step, t.steps_taken) = step_of(a.steps, i, a.capturable, place);
  }
  DeviceWorkspace workspace(a.params[0]);
  launch(plan_pace(tensors, request, workspace.give()), place);
  operands.copy_back();
  if (!a.capturable) count_steps(a.steps, tensors);
}

void mada_step(const MadaArguments& a) {
  if (a.params.empty()) return;
  const Place place = place_of("params[0]", a.params[0]);
  check_arguments(a, place);
  const torch::stable::accelerator::DeviceGuard guard(place.index);
  MadaRequest request{step_request(a.lr, a.options.pace.lr, a.scaling, a.capturable, a.hypergradients),
                      a.options,
                      a.fixed,
                      doubles(a.coefficients),
                      a.learn,
                      a.diff(),
                      a.second(),
                      a.lion(),
                      a.adam(),
                      a.capturable};
  Operands operands(place);
  std::vector<MadaTensor> tensors(a.params.size());
  const bool grads_kept = a.lag() || a.diff();
  for (size_t i = 0; i < tensors.size(); ++i) {
    MadaTensor& t = tensors[i];
    t.x = operands.parameter(a.params, i, &t.x_format);
    t.g = operands.gradient(a.grads, i, t.x_format, &t.g_format);
    t.m = operands.state("exp_avgs", a.exp_avgs, i, a.adam());
    t.n = operands.state("exp_avg_diffs", a.exp_avg_diffs, i, a.diff());
    t.v = operands.state("exp_avg_sqs", a.exp_avg_sqs, i, a.adam());
    t.w = operands.state("second_exp_avg_sqs", a.second_exp_avg_sqs, i, a.second());
    t.l = operands.state("exp_avg_lions", a.exp_avg_lions, i, a.lion());
    t.last_g = operands.state("last_grads", a.last_grads, i, grads_kept);
    t.older_g = operands.state("older_grads", a.older_grads, i, a.lag() && a.diff());
    t.e = operands.state("emas", a.emas, i, !a.emas.empty());
    t.last = grads_kept ? static_cast<double*>(a.last_scalars[i].data_ptr()) : nullptr;
    t.numel = a.params[i].numel();
    std::tie(t.step, t.steps_taken) = step_of(a.steps, i, a.capturable, place);
  }
  DeviceWorkspace workspace(a.params[0]);
  launch(plan_mada(tensors, request, workspace.give()), place);
  operands.copy_back();
  if (!a.capturable) count_steps(a.steps, tensors);
}

void mada_learn(const LearnArguments& a) {
  const Place place = place_of("coefficients", a.coefficients);
  check_arguments(a, place);
  STD_TORCH_CHECK(a.sums.size() <= LearnLaunch::kCapacity, "sums must have at most ", LearnLaunch::kCapacity,
                  " entries, got ", a.sums.size());
  const torch::stable::accelerator::DeviceGuard guard(place.index);
  LearnRequest request{};
  for (const Tensor& row : a.sums) request.sums.push_back(static_cast<const double*>(row.data_ptr()));
  request.coefficients = doubles(a.coefficients), request.momenta = doubles(a.momenta);
  request.hypergradients = doubles(a.hypergradients), request.hyper_step = doubles(a.hyper_step);
  request.found_inf = address(a.found_inf);
  for (size_t k = 0; k < kCoefficients; ++k) request.options[k] = hyper_options(a, k);
  request.warmup = static_cast<double>(a.warmup);
  request.learn = a.learn;
  launch(plan_learn(request), place);
}

void pull_back(const PullbackArguments& a) {
  if (a.params.empty()) return;
  const Place place = place_of("params[0]", a.params[0]);
  check_arguments(a, place);
  const torch::stable::accelerator::DeviceGuard guard(place.index);
  const GradScaling scaling{std::nullopt, std::nullopt, a.found_inf};
  const PullbackRequest request{step_request(a.lr, a.options.pace.lr, scaling, a.capturable, a.stats), a.options,
                                a.before(), a.moment()};
  Operands operands(place);
  std::vector<PullbackTensor> tensors(a.params.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    PullbackTensor& t = tensors[i];
    t.x = operands.parameter(a.params, i, &t.x_format, a.pull());
    t.g_format = t.x_format;
    Format before = t.x_format;
    t.before = operands.operand("befores", a.befores, i, request.before, false, false, &before);
    STD_TORCH_CHECK(before == t.x_format, entry("befores", i), " must be of its parameter's dtype");
    t.v = operands.narrow_or_float32("second_moments", a.second_moments, i, request.moment, t.x_format, &t.g_format);
    t.e = operands.state("emas", a.emas, i);
    t.numel = a.params[i].numel();
    std::tie(t.step, t.steps_taken) = step_of(a.steps, i, a.capturable, place);
  }
  DeviceWorkspace workspace(a.params[0]);
  launch(plan_pullback(tensors, request, workspace.give()), place);
  operands.copy_back();
  if (!a.capturable) count_steps(a.steps, tensors);
}

}  // namespace
}  // namespace pace

STABLE_TORCH_LIBRARY_IMPL(pace_kernels, CUDA, m) {
  m.impl("pace_step_", TORCH_BOX(&pace::pace_step_<pace::pace_step>));
  m.impl("mada_step_", TORCH_BOX(&pace::mada_step_<pace::mada_step>));
  m.impl("mada_learn_", TORCH_BOX(&pace::mada_learn_<pace::mada_learn>));
  m.impl("pullback_", TORCH_BOX(&pace::pullback_<pace::pull_back>));
}
