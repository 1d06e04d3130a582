// How the two doors from C++ to the tests (device.cpp, plan_module.cpp) call what a launch is of.
#pragma once

#include "cuda/launches.h"

namespace pace {

inline const char* name_of(KernelKind kind) {
  static const char* const names[] = {"scalars", "sweep", "coded", "sum", "learn"};
  return names[static_cast<int>(kind)];
}

inline const char* name_of(RuleName rule) {
  static const char* const names[] = {"pace", "mada", "pullback", "schedule_free"};
  return names[static_cast<int>(rule)];
}

inline const char* name_of(Format f) {
  static const char* const names[] = {"Float32", "BFloat16", "Float16", "Dithered16", "Pair24",
                                      "Pair32",  "Moment8",  "Square8", "Grid8",      "Grid16"};
  return names[static_cast<int>(f)];
}

}  // namespace pace
