// How the two doors from C++ to the tests (device.cpp, plan_module.cpp) call what a launch is of.
#pragma once

#include "cuda/launches.h"

namespace pace {

inline const char* name_of(KernelKind kind) {
  static const char* const names[] = {"scalars", "sweep", "sum", "learn"};
  return names[static_cast<int>(kind)];
}

inline const char* name_of(RuleName rule) {
  static const char* const names[] = {"pace", "mada", "pullback", "schedule_free"};
  return names[static_cast<int>(rule)];
}

inline const char* name_of(Format f) {
  return f == Format::kFloat32 ? "Float32" : (f == Format::kBFloat16 ? "BFloat16" : "Float16");
}

}  // namespace pace
