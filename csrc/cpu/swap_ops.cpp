// The exchange of weights and averages on the CPU. Declared in pace_kernels/ops.py.
#include <torch/csrc/stable/library.h>

#include "blocks.h"
#include "host_scalars.h"
#include "isa.h"

namespace pace {

void exchange(const TensorList& a, const TensorList& b) {
  const Kernels& kernels = *chosen_isa().kernels;
  std::deque<std::vector<int64_t>> keep;
  std::vector<std::pair<Stream, Stream>> pairs(a.size());
  for (size_t i = 0; i < a.size(); ++i) {
    const MemoryOrder order(a[i]);
    check_operand("a", i, a[i], a[i], true, kCpu);
    check_operand("b", i, b[i], a[i], true, kCpu);
    pairs[i] = {order.stream(a[i], format_of("a", i, a[i], true), keep),
                order.stream(b[i], format_of("b", i, b[i], true), keep)};
  }
  Blocks(a).run([&](size_t i, int64_t begin, int64_t end, int64_t) {
    kernels.swap(pairs[i].first, pairs[i].second, begin, end);
  });
}

}  // namespace pace

STABLE_TORCH_LIBRARY_IMPL(pace_kernels, CPU, m) { m.impl("swap_", TORCH_BOX(&pace::swap_<pace::exchange>)); }
