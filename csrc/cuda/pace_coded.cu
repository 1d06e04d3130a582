// PACE on the GPU, of weights and states in codes: the formats that a kernel is compiled for, and one for all.
#include "coded.cuh"

namespace pace {

template <Format kX, bool kAverage, Format kE>
const void* known() {
  return (const void*)coded_kernel<Known<kX, kAverage, kE>, false>;
}

template <Format kX>
const void* of_weights(const KernelId& id) {
  if ((id.flags & PaceDefinition::Flag::average) == 0) return known<kX, false, Format::kFloat32>();
  return id.e == Format::kGrid8    ? known<kX, true, Format::kGrid8>()
         : id.e == Format::kGrid16 ? known<kX, true, Format::kGrid16>()
                                   : known<kX, true, Format::kPair24>();
}

template <>
const void* coded_function<PaceRule>(const KernelId& id) {
  if (!id.known) {
    const bool stats = (id.flags & PaceDefinition::Flag::stats) != 0;
    return stats ? (const void*)coded_kernel<Any, true> : (const void*)coded_kernel<Any, false>;
  }
  return id.x == Format::kFloat32    ? of_weights<Format::kFloat32>(id)
         : id.x == Format::kBFloat16 ? of_weights<Format::kBFloat16>(id)
         : id.x == Format::kPair24   ? of_weights<Format::kPair24>(id)
                                     : of_weights<Format::kPair32>(id);
}

}  // namespace pace
