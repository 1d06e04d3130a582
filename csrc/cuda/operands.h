// From torch's tensors to addresses of consecutive elements on a device, and the launch of a plan on its stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../call.h"
#include "kernels.h"
#include "plan.h"

namespace pace {

inline Place place_of(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cuda(), name, " must be a tensor on a CUDA device");
  return {true, t.get_device_index()};
}

// The elements fill their memory without gaps, in whatever order of the dimensions.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<size_t> dims(sizes.size());
  std::iota(dims.begin(), dims.end(), 0);
  std::sort(dims.begin(), dims.end(), [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (const size_t d : dims) {
    if (sizes[d] == 0) return true;
    if (sizes[d] == 1) continue;
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

inline bool same_order(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), left = a.strides(), right = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && left[d] != right[d]) return false;
  }
  return true;
}

inline Tensor empty_in_order_of(const Tensor& order, const Tensor& like) {
  const auto sizes = order.sizes(), strides = order.strides();
  int32_t dtype = 0, device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  dtype, device, like.get_device_index(), &handle));
  return Tensor(handle);
}

// The operands of a call. Kernels walk memory as it lies; an operand that lies otherwise than its parameter, or a
// parameter with gaps, is walked as a copy, which is copied back where it was written.
class Operands {
 public:
  explicit Operands(const Place& place) : place_(place) {}

  // Parameter i, operand 0, whose memory sets the order for its other operands.
  void* parameter(const ListInfo& list, const Tensor& t, size_t i, Format* format, bool written) {
    check_operand(list.name, i, t, t, written, place_);
    *format = format_of(list.name, i, t, false);
    param_ = order_ = t;
    if (is_dense(t)) return t.data_ptr();
    order_ = torch::stable::empty_like(t);
    torch::stable::copy_(order_, t);
    if (written) back_.emplace_back(t, order_);
    return order_.data_ptr();
  }

  void* operand(const ListInfo& list, const Tensor& t, size_t i, Format* format) {
    check_operand(list.name, i, t, param_, list.mutable_, place_);
    *format = format_of(list.name, i, t, list.role == Role::state);
    if (same_order(t, order_)) return t.data_ptr();
    Tensor copy = empty_in_order_of(order_, t);
    torch::stable::copy_(copy, t);
    copies_.push_back(copy);
    if (list.mutable_) back_.emplace_back(t, copy);
    return copy.data_ptr();
  }

  // What was written to copies, back to where it belongs.
  void copy_back() {
    for (auto& [tensor, copy] : back_) torch::stable::copy_(tensor, copy);
  }

 private:
  Place place_;
  Tensor param_, order_;
  TensorList copies_;
  std::vector<std::pair<Tensor, Tensor>> back_;
};

// The step count of parameter i: on the device its address, otherwise its value.
inline std::pair<StepAddress, double> step_of(const TensorList& steps, size_t i, bool on_device, const Place& place) {
  if (!on_device) return {StepAddress{0}, checked_steps_taken("steps", i, steps[i])};
  check_step("steps", i, steps[i], place);
  const bool is_double = steps[i].scalar_type() == ScalarType::Double;
  return {StepAddress{reinterpret_cast<uintptr_t>(steps[i].data_ptr()) | uintptr_t{is_double}}, 0.0};
}

inline float* address(const std::optional<Tensor>& t) { return t ? static_cast<float*>(t->data_ptr()) : nullptr; }

// Memory for a plan, from torch's allocator: in the order of the stream, so that it may be freed before the kernels
// ran.
class DeviceWorkspace {
 public:
  explicit DeviceWorkspace(const Tensor& like) : like_(like) {}

  Workspace give() {
    return [this](size_t bytes) {
      return buffers_.emplace_back(torch::stable::new_empty(like_, {static_cast<int64_t>(bytes)}, ScalarType::Byte))
          .data_ptr();
    };
  }

 private:
  Tensor like_;
  TensorList buffers_;
};

// Launches on a device's current stream.
inline Emit launcher(const Place& place) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(place.index, &stream));
  return [=](const KernelId& id, int64_t blocks, int threads, const void* parameters, size_t) {
    const char* const error = launch_kernel(id, blocks, threads, parameters, place.index, stream);
    STD_TORCH_CHECK(error == nullptr, "pace_kernels: a CUDA kernel could not be launched: ", error);
  };
}

}  // namespace pace
