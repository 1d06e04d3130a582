// A call of a step's operator on CUDA: its tensors checked, their addresses laid out, then the launches. An operator
// makes one and runs it (ops.cpp); a plan keeps several (../plans.h). Nothing here waits for the device.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "../plans.h"
#include "device.h"

namespace pace {

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

// Copies of what lies otherwise than kernels walk: they walk memory as the parameter's lies, and a parameter with gaps
// as a copy without.
class Copies {
 public:
  explicit Copies(const Place& place) : place_(place) {}

  // The tensor, or its copy in memory that lies as `order`'s; copied back in the end, where it is written.
  Tensor in_order_of(const Tensor& order, const Tensor& t, bool written) {
    if (same_order(t, order)) return t;
    return copy(t, {order.sizes().begin(), order.sizes().end()}, {order.strides().begin(), order.strides().end()},
                written);
  }
  Tensor dense(const Tensor& t, bool written) {
    if (is_dense(t)) return t;
    const std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
    return copy(t, sizes, strides, written);
  }

  bool any() const { return !copies_.empty(); }
  void drop() { copies_.clear(), back_.clear(); }
  // What was written to copies, back to where it belongs.
  void copy_back() {
    for (auto& [tensor, copy] : back_) torch::stable::copy_(tensor, copy);
  }

 private:
  Tensor copy(const Tensor& t, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, bool written) {
    int32_t dtype = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
    Tensor copy = copies_.emplace_back(device_empty(sizes, strides, dtype, place_));
    torch::stable::copy_(copy, t);
    if (written) back_.emplace_back(t, copy);
    return copy;
  }

  Place place_;
  TensorList copies_;
  std::vector<std::pair<Tensor, Tensor>> back_;
};

// Memory for the launches of a call.
class DeviceWorkspace {
 public:
  explicit DeviceWorkspace(const Place& place) : place_(place) {}

  Workspace give() {
    return [this](size_t bytes) {
      return buffers_.emplace_back(device_empty({static_cast<int64_t>(bytes)}, {1}, aoti_torch_dtype_uint8(), place_))
          .data_ptr();
    };
  }

 private:
  Place place_;
  TensorList buffers_;
};

// By the definition, its rule; they are declared alone.
#define RULE_OF(Rule) Rule rule_of(const Rule::D&);
PACE_CUDA_RULES(RULE_OF)
#undef RULE_OF

inline float* address(const std::optional<Tensor>& t) { return t ? static_cast<float*>(t->data_ptr()) : nullptr; }

template <class Rule>
class PartOf final : public PartOfCall<typename Rule::D> {
 public:
  using D = typename Rule::D;

  PartOf(Call<D> call, const Place& place, int fresh)
      : PartOfCall<D>(std::move(call), place, fresh), place_(place), copies_(place) {
    const TensorList& params = call_.params();
    tensors_.resize(params.size());
    counts_.resize(params.size());
    for (size_t i = 0; i < params.size(); ++i) {
      SweepTensor& to = tensors_[i] = {};
      to.numel = params[i].numel();
      for (int k = 0; k < D::kOperands; ++k) {
        const TensorList& list = call_.lists[static_cast<size_t>(k)];
        if (k != fresh && !list.empty()) add(k, i, list[i]);
      }
      if (!call_.rows.empty()) to.row = static_cast<double*>(call_.rows[i].data_ptr());
      const Tensor& step = call_.steps[i];
      check_step("steps", i, step, call_.options.capturable ? place : kCpu);
      if (call_.options.capturable) {
        const bool is_double = step.scalar_type() == ScalarType::Double;
        to.step.tagged = reinterpret_cast<uintptr_t>(step.data_ptr()) | uintptr_t{is_double};
      } else {
        counts_[i] = Count(step);
      }
    }
  }

  void keep() override {
    STD_TORCH_CHECK(!copies_.any(), "a plan keeps no tensor that lies otherwise than its parameter, or with gaps");
    PartOfCall<D>::keep();
  }

  void take(const Tensor* fresh) override {
    copies_.drop();
    for (size_t i = 0; i < tensors_.size() && fresh_ >= 0; ++i) add(fresh_, i, fresh[i]);
  }

  void replace_options(const Numbers& options) override {
    const bool capturable = call_.options.capturable;
    PartOfCall<D>::replace_options(options);
    STD_TORCH_CHECK(call_.options.capturable == capturable, "capturable is another one than the plan's");
  }

  void prepare(const GradScaling& scaling) override {
    STD_TORCH_CHECK(call_.options.capturable || !scaling.found_inf,
                    "found_inf needs capturable: only the device knows whether a step counts, so steps must be there");
    const auto extra = [&](int k) { return k < 0 ? nullptr : call_.numbers(static_cast<typename D::Extra>(k)); };
    const bool is_double = call_.lr && call_.lr->scalar_type() == ScalarType::Double;
    request_ = {call_.options,
                fresh_ < 0 ? 0u : bit(fresh_),
                {call_.options.lr, call_.lr ? call_.lr->data_ptr() : nullptr, is_double},
                {address(scaling.grad_scale), address(scaling.clip_coef)},
                address(scaling.found_inf),
                extra(Rule::kNumbers),
                extra(Rule::kResult)};
    for (int k = 0; k < D::kOperands; ++k) request_.lists |= call_.lists[static_cast<size_t>(k)].empty() ? 0u : bit(k);
    for (size_t i = 0; i < tensors_.size() && !call_.options.capturable; ++i) {
      tensors_[i].steps_taken = counts_[i].taken(i);
    }
  }

  void copy_weights() override {
    if constexpr (std::is_same_v<D, PullbackDefinition>) {
      for (size_t i = 0; i < tensors_.size() && call_.has(D::kBefore); ++i) {
        Tensor before = call_[D::kBefore][i];
        torch::stable::copy_(before, call_.params()[i]);
      }
    }
  }

  // Whether the step is skipped, the device alone knows.
  void run(bool) override {
    DeviceWorkspace workspace(place_);
    plan_step(tensors_, request_, workspace.give(), launcher(place_));
    copies_.copy_back();
    copies_.drop();
    for (size_t i = 0; i < tensors_.size() && !call_.options.capturable; ++i) {
      counts_[i].write(tensors_[i].steps_taken + 1.0);
    }
  }

 private:
  // Operand k of parameter i, whose memory sets the order of the others.
  void add(int k, size_t i, const Tensor& t) {
    const ListInfo& list = D::kLists[k];
    const bool written = is_written(call_, k);
    const Tensor& param = call_.params()[i];
    check_operand(list.name, i, t, param, written, place_);
    const Format format = checked_format(call_, k, i, t, place_);
    SweepTensor& to = tensors_[i];
    STD_TORCH_CHECK(!lies_coded<D>(k, format) || t.numel() <= kMostCoded, entry(list.name, i), " has ", t.numel(),
                    " elements; in codes it must not have more than 2^34");
    to.formats = (to.formats & ~(Formats{15} << (4 * k))) | Formats{static_cast<uint8_t>(format)} << (4 * k);
    if (k == 0) {
      const Tensor order = copies_.dense(t, written);
      if (order.get() != t.get()) orders_.resize(tensors_.size()), orders_[i] = order;
      to.array[0] = order.data_ptr();
      to.x = to.g = plain_of(format);
      add_beside(0, i, order, format);
      return;
    }
    const Tensor& order = i < orders_.size() && orders_[i] ? *orders_[i] : param;
    to.array[k] = copies_.in_order_of(order, t, written).data_ptr();
    add_beside(k, i, order, format);
    STD_TORCH_CHECK(list.role != Role::copy || format == to.x, entry(list.name, i),
                    " must be of its parameter's dtype");
    if (list.role != Role::gradient && list.role != Role::moment) return;
    STD_TORCH_CHECK(format == to.x || format == Format::kFloat32, entry(list.name, i),
                    " must be of its parameter's dtype, or float32");
    to.g = format;
  }

  void add_beside(int k, size_t i, const Tensor& order, Format format) {
    const TensorList& list = call_.beside[static_cast<size_t>(k)];
    if (list.empty()) return;
    // Those of blocks have another shape; their operands are contiguous.
    const Tensor beside = in_blocks(format) ? list[i] : copies_.in_order_of(order, list[i], true);
    tensors_[i].beside[k] = beside.data_ptr();
  }

  using PartOfCall<D>::call_;
  using PartOfCall<D>::fresh_;
  Place place_;
  Copies copies_;
  std::vector<std::optional<Tensor>> orders_;  // of parameters with gaps: their copies
  std::vector<SweepTensor> tensors_;
  std::vector<Count> counts_;  // where they are the host's
  StepRequest<Rule> request_{};
};

}  // namespace pace
