// The door between the operators (step.h, compiled once) and the kernels (kernels.cpp, compiled once per instruction
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
  const Stream* rest = nullptr;  // of a pair; elements are counted alike
  uint8_t* scales = nullptr;     // of codes in blocks
};

// The scalars of MADA's step of one tensor.
struct MadaTileScalars {
  MadaScalars now, last;  // of the new step, and of the one that is redone, where there is one
  PaceScalars pull;
  int32_t first;  // 1: no last gradient was kept yet: d = 0, whatever last_g holds
};

// What a rule sums over the elements of a block, with the least and the largest of a term that is never negative, as
// the bits of the float. Which terms they are is the rule's (elements.h).
struct BlockSums {
  double sum[6];
  uint32_t low, high;
};

constexpr BlockSums kEmptySums{{}, 0x7fffffffu, 0};

// Does elements [begin, end) of one tensor. `streams` are the operands by their number in the definition, `scalars`
// those of the rule, `flags` the definition's; `rounding` is null where nothing is coded, `sums` may be null where the
// flags ask for none.
using Sweep = void (*)(const Stream* streams, const void* scalars, unsigned flags, const Rounding* rounding,
                       int64_t begin, int64_t end, BlockSums* sums);

struct Kernels {
  Sweep pace, mada, pullback, schedule_free;
};

}  // namespace pace

// One per instruction set that this build has; PACE_CPU_VARIANTS is set by setup.py, e.g. X(baseline) X(avx2)
// X(avx512).
#define X(isa) extern "C" const pace::Kernels pace_kernels_##isa;
PACE_CPU_VARIANTS
#undef X
