// How an operator's tensors become work: the order in which elements are counted, and blocks dealt to torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <deque>
#include <numeric>
#include <utility>
#include <vector>

#include "../checks.h"
#include "kernels.h"

namespace pace {

// Work is dealt in blocks of 16,384 elements (0.3 MB of PACE's operands). Sums are kept per block and added in the
// order of the blocks, so that they are the same bits for every number of threads.
inline constexpr int64_t kBlock = 16384;
// at::parallel_for's usual grain: below this many elements a thread costs more than it brings.
inline constexpr int64_t kGrain = 32768;

// How the elements of one parameter are counted: its dimensions from the widest stride to the narrowest, so that the
// sweep follows the parameter's own memory.
class MemoryOrder {
 public:
  explicit MemoryOrder(const Tensor& param) : contiguous_(param.is_contiguous()) {
    if (contiguous_) return;
    dims_.resize(static_cast<size_t>(param.dim()));
    std::iota(dims_.begin(), dims_.end(), 0);
    const auto strides = param.strides();
    std::stable_sort(dims_.begin(), dims_.end(), [&](size_t a, size_t b) { return strides[a] > strides[b]; });
  }

  // `keep` owns the sizes and strides that the stream points to.
  Stream stream(const Tensor& t, Format format, std::deque<std::vector<int64_t>>& keep) const {
    Stream s{t.data_ptr(), format, 0, nullptr, nullptr};
    if (contiguous_ && t.is_contiguous()) return s;
    const auto sizes = t.sizes(), strides = t.strides();
    std::vector<int64_t> merged_sizes, merged_strides;
    for (size_t k = 0; k < sizes.size(); ++k) {
      const size_t d = contiguous_ ? k : dims_[k];
      if (sizes[d] == 1) continue;
      if (!merged_sizes.empty() && merged_strides.back() == sizes[d] * strides[d]) {
        merged_sizes.back() *= sizes[d];
        merged_strides.back() = strides[d];
      } else {
        merged_sizes.push_back(sizes[d]);
        merged_strides.push_back(strides[d]);
      }
    }
    if (merged_sizes.empty() || (merged_sizes.size() == 1 && merged_strides[0] == 1)) return s;
    s.ndim = static_cast<int>(merged_sizes.size());
    s.sizes = keep.emplace_back(std::move(merged_sizes)).data();
    s.strides = keep.emplace_back(std::move(merged_strides)).data();
    return s;
  }

 private:
  bool contiguous_;
  std::vector<size_t> dims_;
};

// All blocks of all tensors, in order.
class Blocks {
 public:
  explicit Blocks(const TensorList& tensors) : first_element_{0}, first_block_{0} {
    for (const Tensor& t : tensors) {
      const int64_t n = t.numel();
      first_element_.push_back(first_element_.back() + n);
      first_block_.push_back(first_block_.back() + (n + kBlock - 1) / kBlock);
    }
  }

  int64_t count() const { return first_block_.back(); }

  // Calls body(tensor, begin, end, block) for every block, from torch's thread pool. Threads get equal shares of
  // elements, rounded to whole blocks, each a contiguous stretch.
  template <class Body>
  void run(const Body& body) const {
    torch::stable::parallel_for(0, first_element_.back(), kGrain, [&](int64_t from, int64_t to) {
      // The blocks that start in [from, to).
      size_t t = static_cast<size_t>(std::upper_bound(first_element_.begin(), first_element_.end(), from) -
                                     first_element_.begin() - 1);
      int64_t begin = (from - first_element_[t] + kBlock - 1) / kBlock * kBlock;
      for (;; ++t, begin = 0) {
        if (t + 1 >= first_element_.size()) return;
        const int64_t n = first_element_[t + 1] - first_element_[t];
        for (; begin < n; begin += kBlock) {
          if (first_element_[t] + begin >= to) return;
          body(t, begin, std::min(begin + kBlock, n), first_block_[t] + begin / kBlock);
        }
      }
    });
  }

 private:
  std::vector<int64_t> first_element_, first_block_;
};

}  // namespace pace
