// MADA on the GPU, of weights and states in codes: a kernel for what learns, and one for what does not.
#include "general.cuh"
#include "mada.cuh"

namespace pace {

template <>
const void* coded_function<MadaRule>(const KernelId& id) {
  return general_function<Mada, MadaRule::kCompiled>(id.flags);
}

}  // namespace pace
