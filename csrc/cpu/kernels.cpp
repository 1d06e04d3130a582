// The kernels of one instruction set. setup.py compiles this file once for each, with that set's flags and PACE_ISA.
#include "kernels.h"

#include "elements.h"
#include "sweep.h"

#define NAME_(isa) pace_kernels_##isa
#define NAME(isa) NAME_(isa)
extern "C" const pace::Kernels NAME(PACE_ISA) = {&pace::sweep<pace::Pace>, &pace::sweep<pace::Mada>,
                                                 &pace::sweep<pace::Pullback>, &pace::sweep<pace::ScheduleFree>};
