// The operators on the CPU. Declared in pace_kernels/ops.py.
#include <torch/csrc/stable/library.h>

#include "part.h"

namespace pace {
namespace {

struct CpuDevice {
  template <class D>
  static std::unique_ptr<Part> part(Call<D> call, const Place&, int fresh) {
    return std::make_unique<PartOf<decltype(host_of(std::declval<D>()))>>(std::move(call), fresh);
  }
  static Place place_of(const char*, const Tensor&) { return kCpu; }  // the dispatcher has seen to it
  struct Guard {
    explicit Guard(const Place&) {}
  };
  static bool skipped(const std::optional<Tensor>& found_inf) { return pace::skipped(found_inf); }
  static void learn(const LearnArguments& a) { pace::learn(a); }
};

template <class D>
void step(StableIValue* stack, uint64_t, uint64_t) {
  Call<D> call = read_call<D>(stack);
  const GradScaling scaling = call.scaling;
  const auto part = CpuDevice::part(std::move(call), kCpu, -1);
  part->prepare(scaling);
  part->run(skipped(scaling.found_inf));
}

}  // namespace

PACE_PLANS_OF(CpuDevice)

}  // namespace pace

STABLE_TORCH_LIBRARY_IMPL(pace_kernels, CPU, m) {
  m.impl(pace::PaceDefinition::kOp, &pace::step<pace::PaceDefinition>);
  m.impl(pace::MadaDefinition::kOp, &pace::step<pace::MadaDefinition>);
  m.impl(pace::PullbackDefinition::kOp, &pace::step<pace::PullbackDefinition>);
  m.impl(pace::ScheduleFreeDefinition::kOp, &pace::step<pace::ScheduleFreeDefinition>);
  m.impl("mada_learn_", TORCH_BOX(&pace::mada_learn_<pace::learn>));
  PACE_IMPLEMENT_PLANS(m, pace::CpuDevice);
}
