#include "device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "kernels.h"

namespace pace {

Place place_of(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cuda(), name, " must be a tensor on a CUDA device");
  return {true, t.get_device_index()};
}

DeviceGuard::DeviceGuard(const Place& place) : guard_(new torch::stable::accelerator::DeviceGuard(place.index)) {}
DeviceGuard::~DeviceGuard() { delete static_cast<torch::stable::accelerator::DeviceGuard*>(guard_); }

Tensor device_empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype,
                    const Place& place) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  dtype, aoti_torch_device_type_cuda(), place.index, &handle));
  return Tensor(handle);
}

Emit launcher(const Place& place) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(place.index, &stream));
  return [=](const KernelId& id, int64_t blocks, int threads, const void* parameters, size_t) {
    const char* const error = launch_kernel(id, blocks, threads, parameters, place.index, stream);
    STD_TORCH_CHECK(error == nullptr,
                    "pace_kernels: a CUDA kernel could not be launched, or an earlier one failed: ", error);
  };
}

}  // namespace pace

STABLE_TORCH_LIBRARY_IMPL(pace_kernels, CUDA, m) { pace::implement_operators(m); }
