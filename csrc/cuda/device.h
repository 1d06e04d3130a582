// What the operators need of the device itself: its place, its memory, launches. device.cpp has it for CUDA; the tests
// link another one (tests/emulated/device.cpp), so that the operators run without a GPU, as they are.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <vector>

#include "../checks.h"
#include "plan.h"

namespace pace {

// Raises where the tensor is not on such a device.
Place place_of(const char* name, const Tensor& t);

// Makes the device the current one.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Place& place);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  void* guard_;
};

// Memory in the order of the current stream: it may be freed before the kernels ran. Not cleared. `dtype` as torch's
// shim numbers them.
Tensor device_empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype,
                    const Place& place);

// Launches on the device's current stream.
Emit launcher(const Place& place);

// Registers all operators (ops.cpp), each with the names of pace_kernels/ops.py.
void implement_operators(torch::stable::detail::StableLibrary& library);

}  // namespace pace
