// The operators on CUDA: check, plan, launch on the current stream. Nothing here waits for the device. Declared in
// pace_kernels/ops.py.
#include <torch/csrc/stable/library.h>

#include "operands.h"

namespace pace {
namespace {

// From a checked call to what the plan takes; raises where an operand can't be walked, and has written nothing then but
// copies.
template <class Rule>
void add_tensor(const Call<typename Rule::D>& call, size_t i, Operands& operands, const Place& place, SweepTensor& to) {
  using D = typename Rule::D;
  to = {};
  to.array[0] = operands.parameter(D::kLists[0], call.params()[i], i, &to.x, is_written(call, 0));
  to.g = to.x;
  for (int k = 1; k < D::kOperands; ++k) {
    const TensorList& list = call.lists[static_cast<size_t>(k)];
    if (list.empty()) continue;
    const Role role = D::kLists[k].role;
    Format format;
    to.array[k] = operands.operand(D::kLists[k], list[i], i, &format);
    const std::string name = entry(D::kLists[k].name, i);
    STD_TORCH_CHECK(role != Role::copy || format == to.x, name, " must be of its parameter's dtype");
    if (role != Role::gradient && role != Role::moment) continue;
    STD_TORCH_CHECK(format == to.x || format == Format::kFloat32, name,
                    " must be of its parameter's dtype, or float32");
    to.g = format;
  }
  to.numel = call.params()[i].numel();
  std::tie(to.step, to.steps_taken) = step_of(call.steps, i, call.options.capturable, place);
  if (!call.rows.empty()) to.row = static_cast<double*>(call.rows[i].data_ptr());
}

template <class Rule>
StepRequest<Rule> request_of(const Call<typename Rule::D>& call) {
  using D = typename Rule::D;
  const GradScaling& s = call.scaling;
  STD_TORCH_CHECK(call.options.capturable || !s.found_inf,
                  "found_inf needs capturable: only the device knows whether a step counts, so steps must be there");
  const auto extra = [&](int k) { return k < 0 ? nullptr : call.numbers(static_cast<typename D::Extra>(k)); };
  const bool is_double = call.lr && call.lr->scalar_type() == ScalarType::Double;
  StepRequest<Rule> r{call.options,
                      0,
                      {call.options.lr, call.lr ? call.lr->data_ptr() : nullptr, is_double},
                      {address(s.grad_scale), address(s.clip_coef)},
                      address(s.found_inf),
                      extra(Rule::kNumbers),
                      extra(Rule::kResult)};
  for (int k = 0; k < D::kOperands; ++k) r.lists |= call.lists[static_cast<size_t>(k)].empty() ? 0u : bit(k);
  return r;
}

// An operator: all checks, then the launches.
template <class Rule>
void step(StableIValue* stack, uint64_t, uint64_t) {
  using D = typename Rule::D;
  Call<D> call = read_call<D>(stack);
  if (call.params().empty()) return;
  const Place place = place_of("params[0]", call.params()[0]);
  check_call(call, place);
  const torch::stable::accelerator::DeviceGuard guard(place.index);
  const StepRequest<Rule> request = request_of<Rule>(call);
  Operands operands(place);
  std::vector<SweepTensor> tensors(call.params().size());
  for (size_t i = 0; i < tensors.size(); ++i) add_tensor<Rule>(call, i, operands, place, tensors[i]);
  DeviceWorkspace workspace(call.params()[0]);
  plan_step(tensors, request, workspace.give(), launcher(place));
  operands.copy_back();
  if (call.options.capturable) return;
  for (size_t i = 0; i < tensors.size(); ++i) write_step(call.steps[i], tensors[i].steps_taken + 1.0);
}

void mada_learn(const LearnArguments& a) {
  const Place place = place_of("coefficients", a.coefficients);
  check_call(a, place);
  STD_TORCH_CHECK(a.sums.size() <= LearnLaunch::kCapacity, "sums must have at most ", LearnLaunch::kCapacity,
                  " entries, got ", a.sums.size());
  const torch::stable::accelerator::DeviceGuard guard(place.index);
  const auto doubles = [](const Tensor& t) { return static_cast<double*>(t.data_ptr()); };
  LearnRequest request{};
  for (const Tensor& row : a.sums) request.sums.push_back(doubles(row));
  request.coefficients = doubles(a.coefficients), request.momenta = doubles(a.momenta);
  request.hypergradients = doubles(a.hypergradients), request.hyper_step = doubles(a.hyper_step);
  request.found_inf = address(a.found_inf);
  for (size_t k = 0; k < kCoefficients; ++k) request.options[k] = a.options(k);
  request.warmup = static_cast<double>(a.warmup);
  request.learn = a.learn;
  plan_learn(request, launcher(place));
}

}  // namespace
}  // namespace pace

STABLE_TORCH_LIBRARY_IMPL(pace_kernels, CUDA, m) {
#define PACE_IMPLEMENT(Rule) m.impl(pace::Rule::D::kOp, &pace::step<pace::Rule>);
  PACE_CUDA_RULES(PACE_IMPLEMENT)
  m.impl("mada_learn_", TORCH_BOX(&pace::mada_learn_<pace::mada_learn>));
}
