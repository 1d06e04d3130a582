// MADA on the GPU, of plain formats. setup.py compiles this file once for each pair of them, PACE_X and PACE_G, since
// there are many instances.
#include "mada.cuh"

namespace pace {

template <class X, class G>
const void* mada_function(const KernelId& id) {
  return instances<Mada, X, G>(id);
}

template const void* mada_function<PACE_X, PACE_G>(const KernelId& id);

}  // namespace pace
