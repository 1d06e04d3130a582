// MADA on the GPU, of weights and states in codes: a kernel for each group of flags.
#include "general.cuh"
#include "mada.cuh"

namespace pace {

template <>
const void* coded_function<MadaRule>(const KernelId& id) {
  return general_function<Mada>(id);
}

}  // namespace pace
