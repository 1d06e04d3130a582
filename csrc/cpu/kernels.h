// The door between the operators (*_ops.cpp, compiled once) and the kernels (kernels.cpp, compiled once per instruction
// set). Plain structs and function pointers only: nothing here may leave a symbol that two instruction sets could
// share.
#pragma once

#include <cstdint>

#include "../stats.h"

namespace pace {

// One operand of one tensor. Elements are counted in the order in which the parameter lies in memory. ndim == 0:
// element i is data[i]; otherwise it lies at the coordinates of i in `sizes`, `strides` apart (in elements; 0 for an
// expanded one).
struct Stream {
  void* data;
  Format format;
  int ndim;
  const int64_t* sizes;
  const int64_t* strides;
};

struct PaceWork {
  Stream x, g, m, v, e;
  bool moment, pull, average;  // flags of pace_rule
  PaceScalars scalars;
};

struct MadaWork {
  Stream x, g, m, n, v, w, l, last_g, older_g, e;
  bool lag, diff, second, lion, adam, average;  // flags of mada_tile
  bool first;                                   // no last gradient was kept yet: d = 0, whatever last_g holds
  bool roles_stay;                              // last_g gets the new gradient and older_g the last one
  MadaScalars last, now;                        // of the step that is redone, where there is one, and of the new one
  PaceScalars pull;
};

struct PullbackWork {
  Stream x, before, v, e;  // null where it is not in play
  bool pull, average;      // flags of pullback_rule
  PullbackScalars scalars;
};

// Each function does elements [begin, end) of one tensor.
struct Kernels {
  void (*pace)(const PaceWork& work, int64_t begin, int64_t end, PaceSums* sums);          // sums may be null
  void (*mada)(const MadaWork& work, int64_t begin, int64_t end, double* sums);            // six sums, where it lags
  void (*pullback)(const PullbackWork& work, int64_t begin, int64_t end, PaceSums* sums);  // sums may be null
};

}  // namespace pace

// One per instruction set that this build has; PACE_CPU_VARIANTS is set by setup.py, e.g. X(baseline) X(avx2)
// X(avx512).
#define X(isa) extern "C" const pace::Kernels pace_kernels_##isa;
PACE_CPU_VARIANTS
#undef X
