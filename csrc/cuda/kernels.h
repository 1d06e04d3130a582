// The door between the operators (ops.cpp, without CUDA's headers) and the kernels (*.cu, without torch's).
#pragma once

#include <string>

#include "launches.h"

namespace pace {

// A rule's sweep, in the rule's .cu file; null where there is no such instance.
template <class Rule>
const void* sweep_function(const KernelId& id);

// The same of operands in codes.
template <class Rule>
const void* coded_function(const KernelId& id);

// Launches a kernel on a device's stream; null, or what went wrong.
const char* launch_kernel(const KernelId& id, int64_t blocks, int threads, const void* parameters, int32_t device,
                          void* stream);

// Why the driver that is here can't run these kernels; empty where it can, or where there is none.
std::string driver_refusal();

// Which formats of weights and gradients there are: gradients as the weights, or float32.
#define PACE_BY_FORMAT(function, id)                                                                              \
  ((id).x == Format::kFloat32                                                                                     \
       ? function<Float32, Float32>(id)                                                                           \
       : ((id).x == Format::kBFloat16                                                                             \
              ? ((id).g == Format::kFloat32 ? function<BFloat16, Float32>(id) : function<BFloat16, BFloat16>(id)) \
              : ((id).g == Format::kFloat32 ? function<Float16, Float32>(id) : function<Float16, Float16>(id))))

}  // namespace pace
