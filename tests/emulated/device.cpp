// The device of the CUDA operators (csrc/cuda/device.h), for tests: its memory is the CPU's, and a launch is a call of
// Python, which runs the kernel's PTX (device.py beside this file). The operators and the plan are the real ones.
#include "cuda/device.h"
#include "names.h"
#include "plans.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using Launch = int (*)(const char* kind, const char* rule, const char* x, const char* g, const char* e, int known,
                       unsigned flags, int group, int64_t blocks, int threads, const void* parameters, size_t bytes);

Launch launch = nullptr;
std::vector<pace::Tensor> allocated;  // until an operator's call is over, so that what kernels left can be looked at

}  // namespace

namespace pace {

Place place_of(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be a tensor on the emulated device");
  return kCpu;
}

DeviceGuard::DeviceGuard(const Place&) : guard_(nullptr) {}
DeviceGuard::~DeviceGuard() {}

Tensor device_empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype,
                    const Place&) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  dtype, aoti_torch_device_type_cpu(), 0, &handle));
  Tensor& made = allocated.emplace_back(handle);
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(made.get(), &bytes));
  if (bytes > 0) std::memset(made.data_ptr(), 0xA5, static_cast<size_t>(bytes));
  return made;
}

Emit launcher(const Place&) {
  return [](const KernelId& id, int64_t blocks, int threads, const void* parameters, size_t bytes) {
    const int failed = launch(name_of(id.kind), name_of(id.rule), name_of(id.x), name_of(id.g), name_of(id.e), id.known,
                              id.flags, id.group, blocks, threads, parameters, bytes);
    STD_TORCH_CHECK(failed == 0, "the kernel failed in the interpreter");
  };
}

}  // namespace pace

EXPORT void emulated_set_launch(Launch to) { launch = to; }
EXPORT int64_t emulated_new_plan() { return pace::new_plan(); }
EXPORT void emulated_drop_plan(int64_t handle) { pace::drop_plan(handle); }
// A plan's call without tensors: why it failed, or null.
EXPORT const char* emulated_call_plan(int64_t handle, int before, const double* options, size_t count) {
  static std::string failure;
  try {
    const std::vector<double> numbers(options, options + count);
    if (before != 0) {
      pace::plan_before(handle, numbers);
    } else {
      pace::plan_step(handle, numbers);
    }
    return nullptr;
  } catch (const std::exception& error) {
    return (failure = error.what()).c_str();
  }
}
// Allocation k since the last call of emulated_free: where it lies, and how long it is; −1 behind the last one.
EXPORT int64_t emulated_allocated(size_t k, void** address) {
  if (k >= allocated.size()) return -1;
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(allocated[k].get(), &bytes));
  *address = bytes > 0 ? allocated[k].data_ptr() : nullptr;
  return bytes;
}
EXPORT void emulated_free() { allocated.clear(); }

STABLE_TORCH_LIBRARY_IMPL(pace_emulated, CPU, m) { pace::implement_operators(m); }
