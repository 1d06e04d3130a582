// The operators on the CPU. Declared in pace_kernels/ops.py.
#include <torch/csrc/stable/library.h>

#include "part.h"

namespace pace {
namespace {

template <class Host>
void step(StableIValue* stack, uint64_t, uint64_t) {
  using D = typename Host::D;
  const Call<D> call = read_call<D>(stack);
  PartOf<Host> part(call);
  part.prepare(call.scaling);
  part.run(skipped(call.scaling.found_inf));
}

}  // namespace
}  // namespace pace

STABLE_TORCH_LIBRARY_IMPL(pace_kernels, CPU, m) {
  m.impl(pace::PaceDefinition::kOp, &pace::step<pace::PaceHost>);
  m.impl(pace::MadaDefinition::kOp, &pace::step<pace::MadaHost>);
  m.impl(pace::PullbackDefinition::kOp, &pace::step<pace::PullbackHost>);
  m.impl(pace::ScheduleFreeDefinition::kOp, &pace::step<pace::ScheduleFreeHost>);
  m.impl("mada_learn_", TORCH_BOX(&pace::mada_learn_<pace::learn>));
}
