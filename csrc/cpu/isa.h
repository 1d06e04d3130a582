// Which of the compiled instruction sets runs here.
#pragma once

#include "kernels.h"

namespace pace {

struct Isa {
  const char* name;
  const Kernels* kernels;
};

// The widest that the processor has, or the one that PACE_CPU_ISA names. Chosen at the first call and kept; throws
// std::runtime_error, each time, where PACE_CPU_ISA names one that is unknown or that this processor lacks.
const Isa& chosen_isa();

}  // namespace pace
