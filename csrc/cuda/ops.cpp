// The operators on CUDA. Declared in pace_kernels/ops.py.
#include "part.h"

namespace pace {
namespace {

struct CudaDevice {
  template <class D>
  static std::unique_ptr<Part> part(Call<D> call, const Place& place, int fresh) {
    return std::make_unique<PartOf<decltype(rule_of(std::declval<D>()))>>(std::move(call), place, fresh);
  }
  static Place place_of(const char* name, const Tensor& t) { return pace::place_of(name, t); }
  using Guard = DeviceGuard;
  static bool skipped(const std::optional<Tensor>&) { return false; }
  static void learn(const LearnArguments& a) {
    const auto doubles = [](const Tensor& t) { return static_cast<double*>(t.data_ptr()); };
    LearnRequest request{};
    for (const Tensor& row : a.sums) request.sums.push_back(doubles(row));
    request.coefficients = doubles(a.coefficients), request.momenta = doubles(a.momenta);
    request.hypergradients = doubles(a.hypergradients), request.hyper_step = doubles(a.hyper_step);
    request.found_inf = address(a.found_inf);
    for (size_t k = 0; k < kCoefficients; ++k) request.options[k] = a.options(k);
    request.warmup = static_cast<double>(a.warmup);
    request.learn = a.learn;
    const Place place = place_of("coefficients", a.coefficients);
    DeviceWorkspace workspace(place);
    plan_learn(request, workspace.give(), launcher(place));
  }
};

// All checks, then the launches.
template <class D>
void step(StableIValue* stack, uint64_t, uint64_t) {
  Call<D> call = read_call<D>(stack);
  if (call.params().empty()) return;
  const Place place = place_of("params[0]", call.params()[0]);
  const DeviceGuard guard(place);
  const GradScaling scaling = call.scaling;
  const auto part = CudaDevice::part(std::move(call), place, -1);
  part->prepare(scaling);
  part->run(false);
}

void mada_learn(const LearnArguments& a) {
  const Place place = place_of("coefficients", a.coefficients);
  const DeviceGuard guard(place);
  check_call(a, place);
  CudaDevice::learn(a);
}

}  // namespace

PACE_PLANS_OF(CudaDevice)

void implement_operators(torch::stable::detail::StableLibrary& m) {
#define PACE_IMPLEMENT(Rule) m.impl(Rule::D::kOp, &step<Rule::D>);
  PACE_CUDA_RULES(PACE_IMPLEMENT)
#undef PACE_IMPLEMENT
  m.impl("mada_learn_", TORCH_BOX(&mada_learn_<mada_learn>));
  PACE_IMPLEMENT_PLANS(m, CudaDevice);
}

}  // namespace pace
