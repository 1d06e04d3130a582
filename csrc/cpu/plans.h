// The life of a plan, which the Python object pace_kernels._C.Plan owns (module.cpp).
#pragma once

#include <cstdint>

namespace pace {

int64_t new_plan();
void drop_plan(int64_t handle);

}  // namespace pace
