// What a plan keeps of tensors between steps: where they lie, and step counts on the CPU.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "checks.h"

namespace pace {

// Where kept tensors lie, and of what shape they are, by which it is told whether they still are.
class Memory {
 public:
  // `shaped`: the shape counts too; of single numbers and rows of them the memory is all.
  void add(const Tensor& t, bool shaped) {
    Seen seen = look(t.get());
    seen.tensor = t.get();
    std::memcpy(&seen.its, seen.tensor, sizeof seen.its);
    if (shaped) {
      seen.dim = t.dim();
      const auto sizes = t.sizes(), strides = t.strides();
      shapes_.insert(shapes_.end(), sizes.begin(), sizes.end());
      shapes_.insert(shapes_.end(), strides.begin(), strides.end());
    }
    seen_.push_back(seen);
  }

  bool same() const {
    const int64_t* shape = shapes_.data();
    for (size_t i = 0; i < seen_.size(); ++i) {
      const Seen& seen = seen_[i];
      if (i + 2 * kAhead < seen_.size()) __builtin_prefetch(seen_[i + 2 * kAhead].tensor);
      if (i + kAhead < seen_.size()) fetch(seen_[i + kAhead].its);
      const Seen now = look(seen.tensor);
      if (now.address != seen.address || now.bytes != seen.bytes || now.dtype != seen.dtype) return false;
      if (seen.dim < 0) continue;
      int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(seen.tensor, &dim));
      if (dim != seen.dim) return false;
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(seen.tensor, &sizes));
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(seen.tensor, &strides));
      if (!std::equal(sizes, sizes + dim, shape) || !std::equal(strides, strides + dim, shape + dim)) return false;
      shape += 2 * dim;
    }
    return true;
  }

 private:
  struct Seen {
    AtenTensorHandle tensor = nullptr;  // held by the part
    const char* its = nullptr;          // what the handle points to, see `fetch`
    void* address = nullptr;
    int64_t bytes = 0;
    int64_t dim = -1;  // −1: the shape does not count
    int32_t dtype = 0;
  };

  // Thousands of tensors lie in no cache, and waiting for one after the other took a quarter of PACE's whole step. A
  // handle points to a pointer to what torch keeps of the tensor; if it ever pointed to something else, this would help
  // nothing and harm nothing.
  static void fetch(const char* its) {
    for (int line = 0; line < 3; ++line) __builtin_prefetch(its + 64 * line);
  }
  static constexpr size_t kAhead = 8;

  static Seen look(AtenTensorHandle t) {
    Seen seen;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(t, &seen.address));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t, &seen.bytes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t, &seen.dtype));
    return seen;
  }

  std::vector<Seen> seen_;
  std::vector<int64_t> shapes_;  // sizes, then strides, of each that counts
};

// A step count on the CPU, where it lies.
class Count {
 public:
  Count() = default;
  explicit Count(const Tensor& t) : address_(t.data_ptr()), is_double_(t.scalar_type() == ScalarType::Double) {}

  double value() const { return is_double_ ? *static_cast<double*>(address_) : *static_cast<float*>(address_); }
  // The steps taken so far, where the count can go on.
  double taken(size_t i) const {
    const double taken = value();
    STD_TORCH_CHECK(taken < kFloat32Counts || is_double_, entry("steps", i),
                    " is float32 and has reached 2^24, where float32 stops counting: make it float64");
    return taken;
  }
  void write(double t) const {
    if (is_double_) {
      *static_cast<double*>(address_) = t;
    } else {
      *static_cast<float*>(address_) = static_cast<float>(t);
    }
  }

 private:
  void* address_ = nullptr;
  bool is_double_ = false;
};

}  // namespace pace
