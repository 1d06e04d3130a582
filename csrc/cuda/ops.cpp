// The operators on CUDA: check, plan, launch on the current stream. Nothing here waits for the device. Declared in
// pace_kernels/ops.py.
#include <torch/csrc/stable/library.h>

#include "operands.h"

namespace pace {
namespace {

// What the operators share: checks, the device and its memory, and what follows the launches. `plan` gives the launches
// of the call from its operands.
template <class D, class T, class PlanOf>
void run(StableIValue* stack, const PlanOf& plan) {
  Call<D> call = read_call<D>(stack);
  if (call.params().empty()) return;
  const Place place = place_of("params[0]", call.params()[0]);
  check_call(call, place);
  const torch::stable::accelerator::DeviceGuard guard(place.index);
  Operands operands(place);
  std::vector<T> tensors(call.params().size());
  DeviceWorkspace workspace(call.params()[0]);
  launch(plan(call, operands, tensors, place, workspace.give()), place);
  operands.copy_back();
  if (!call.options.capturable) count_steps(call.steps, tensors);
}

template <class D>
StepRequest request_of(const Call<D>& call, typename D::Extra result) {
  return step_request(call.lr, call.options.lr, call.scaling, call.options.capturable, call.extras[result]);
}

void pace_step(StableIValue* stack, uint64_t, uint64_t) {
  using D = PaceDefinition;
  run<D, PaceTensor>(stack, [](const Call<D>& call, Operands& operands, std::vector<PaceTensor>& tensors,
                               const Place& place, const Workspace& workspace) {
    const PaceRequest request{request_of(call, D::kStats), call.options, call.has(D::kE)};
    for (size_t i = 0; i < tensors.size(); ++i) {
      PaceTensor& t = tensors[i];
      t.x = operands.parameter(call.params(), i, &t.x_format);
      t.g = operands.gradient(call[D::kG], i, t.x_format, &t.g_format);
      t.m = operands.state("exp_avgs", call[D::kM], i, call.options.beta1 != 0.0);
      t.v = operands.state("exp_avg_sqs", call[D::kV], i);
      t.e = operands.state("emas", call[D::kE], i, call.has(D::kE));
      t.numel = call.params()[i].numel();
      std::tie(t.step, t.steps_taken) = step_of(call.steps, i, call.options.capturable, place);
    }
    return plan_pace(tensors, request, workspace);
  });
}

void mada_step(StableIValue* stack, uint64_t, uint64_t) {
  using D = MadaDefinition;
  run<D, MadaTensor>(stack, [](const Call<D>& call, Operands& operands, std::vector<MadaTensor>& tensors,
                               const Place& place, const Workspace& workspace) {
    const MadaParts parts(call);
    const MadaRequest request{request_of(call, D::kHypergradients),
                              call.options,
                              call.numbers(D::kCoefficients),
                              parts.diff,
                              parts.second,
                              parts.lion,
                              parts.adam,
                              call.options.capturable};
    for (size_t i = 0; i < tensors.size(); ++i) {
      MadaTensor& t = tensors[i];
      t.x = operands.parameter(call.params(), i, &t.x_format);
      t.g = operands.gradient(call[D::kG], i, t.x_format, &t.g_format);
      const auto state = [&](D::Operand k, bool needed) {
        return operands.state(D::kLists[k].name, call[k], i, needed);
      };
      t.m = state(D::kM, parts.adam);
      t.n = state(D::kN, parts.diff);
      t.v = state(D::kV, parts.adam);
      t.w = state(D::kW, parts.second);
      t.l = state(D::kL, parts.lion);
      t.last_g = state(D::kLastG, parts.keeps_gradients());
      t.older_g = state(D::kOlderG, parts.lag && parts.diff);
      t.e = state(D::kE, call.has(D::kE));
      t.last = parts.keeps_gradients() ? static_cast<double*>(call.rows[i].data_ptr()) : nullptr;
      t.numel = call.params()[i].numel();
      std::tie(t.step, t.steps_taken) = step_of(call.steps, i, call.options.capturable, place);
    }
    return plan_mada(tensors, request, workspace);
  });
}

void pull_back(StableIValue* stack, uint64_t, uint64_t) {
  using D = PullbackDefinition;
  run<D, PullbackTensor>(stack, [](const Call<D>& call, Operands& operands, std::vector<PullbackTensor>& tensors,
                                   const Place& place, const Workspace& workspace) {
    const PullbackRequest request{request_of(call, D::kStats), call.options, call.has(D::kBefore), call.has(D::kV)};
    for (size_t i = 0; i < tensors.size(); ++i) {
      PullbackTensor& t = tensors[i];
      t.x = operands.parameter(call.params(), i, &t.x_format, pulls(call.options));
      t.g_format = t.x_format;
      Format before = t.x_format;
      t.before = operands.operand("befores", call[D::kBefore], i, request.before, false, false, &before);
      STD_TORCH_CHECK(before == t.x_format, entry("befores", i), " must be of its parameter's dtype");
      t.v = operands.narrow_or_float32("second_moments", call[D::kV], i, request.moment, t.x_format, &t.g_format);
      t.e = operands.state("emas", call[D::kE], i);
      t.numel = call.params()[i].numel();
      std::tie(t.step, t.steps_taken) = step_of(call.steps, i, call.options.capturable, place);
    }
    return plan_pullback(tensors, request, workspace);
  });
}

void schedule_free_step(StableIValue* stack, uint64_t, uint64_t) {
  using D = ScheduleFreeDefinition;
  run<D, ScheduleFreeTensor>(
      stack, [](const Call<D>& call, Operands& operands, std::vector<ScheduleFreeTensor>& tensors, const Place& place,
                const Workspace& workspace) {
        const ScheduleFreeRequest request{
            step_request(call.lr, call.options.lr, call.scaling, call.options.capturable, std::nullopt), call.options,
            call.numbers(D::kSchedule)};
        for (size_t i = 0; i < tensors.size(); ++i) {
          ScheduleFreeTensor& t = tensors[i];
          t.y = operands.parameter(call.params(), i, &t.x_format);
          t.g = operands.gradient(call[D::kG], i, t.x_format, &t.g_format);
          t.v = operands.state("exp_avg_sqs", call[D::kV], i);
          t.z = operands.state("zs", call[D::kZ], i);
          t.numel = call.params()[i].numel();
          std::tie(t.step, t.steps_taken) = step_of(call.steps, i, call.options.capturable, place);
        }
        return plan_schedule_free(tensors, request, workspace);
      });
}

void mada_learn(const LearnArguments& a) {
  const Place place = place_of("coefficients", a.coefficients);
  check_call(a, place);
  STD_TORCH_CHECK(a.sums.size() <= LearnLaunch::kCapacity, "sums must have at most ", LearnLaunch::kCapacity,
                  " entries, got ", a.sums.size());
  const torch::stable::accelerator::DeviceGuard guard(place.index);
  LearnRequest request{};
  for (const Tensor& row : a.sums) request.sums.push_back(static_cast<const double*>(row.data_ptr()));
  request.coefficients = doubles(a.coefficients), request.momenta = doubles(a.momenta);
  request.hypergradients = doubles(a.hypergradients), request.hyper_step = doubles(a.hyper_step);
  request.found_inf = address(a.found_inf);
  for (size_t k = 0; k < kCoefficients; ++k) request.options[k] = a.options(k);
  request.warmup = static_cast<double>(a.warmup);
  request.learn = a.learn;
  launch(plan_learn(request), place);
}

}  // namespace
}  // namespace pace

STABLE_TORCH_LIBRARY_IMPL(pace_kernels, CUDA, m) {
  m.impl(pace::PaceDefinition::kOp, &pace::pace_step);
  m.impl(pace::MadaDefinition::kOp, &pace::mada_step);
  m.impl(pace::PullbackDefinition::kOp, &pace::pull_back);
  m.impl(pace::ScheduleFreeDefinition::kOp, &pace::schedule_free_step);
  m.impl("mada_learn_", TORCH_BOX(&pace::mada_learn_<pace::mada_learn>));
}
