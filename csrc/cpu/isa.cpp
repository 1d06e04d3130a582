#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace pace {
namespace {

bool processor_has(const std::string& name) {
#if defined(__x86_64__)
  if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (name == "avx512") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return name == "baseline";
}

Isa choose() {
  // Narrowest first, as setup.py lists them.
  const Isa variants[] = {
#define X(isa) {#isa, &pace_kernels_##isa},
      PACE_CPU_VARIANTS
#undef X
  };
  const char* forced = std::getenv("PACE_CPU_ISA");
  std::string names;
  Isa best{};
  for (const Isa& v : variants) {
    if (!processor_has(v.name)) continue;
    if (forced != nullptr && std::string(forced) == v.name) return v;
    names += (names.empty() ? "" : ", ") + std::string(v.name);
    best = v;
  }
  if (forced != nullptr && *forced != '\0') {
    throw std::runtime_error("PACE_CPU_ISA=" + std::string(forced) + ": this build on this processor has " + names);
  }
  return best;
}

}  // namespace

const Isa& chosen_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace pace
