// A call of a step's operator on the CPU: its tensors checked and laid out, then run. An operator makes one and runs it
// (ops.cpp); a plan keeps several (../plans.h).
#pragma once

#include <array>
#include <cstring>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "../plans.h"
#include "isa.h"
#include "steps.h"

namespace pace {

template <class Host>
class PartOf final : public PartOfCall<typename Host::D> {
 public:
  using D = typename Host::D;
  using Scalars = typename Host::Scalars;

  PartOf(Call<D> call, int fresh) : PartOfCall<D>(std::move(call), kCpu, fresh) {
    const TensorList& params = call_.params();
    works_.resize(params.size());
    orders_.reserve(params.size());
    for (size_t i = 0; i < params.size(); ++i) {
      check_step("steps", i, call_.steps[i], kCpu);
      works_[i].step = Count(call_.steps[i]);
      const MemoryOrder& order = orders_.emplace_back(params[i]);
      for (int k = 0; k < D::kOperands; ++k) {
        if (k == fresh) continue;
        const TensorList& list = call_.lists[static_cast<size_t>(k)];
        if (!list.empty()) works_[i].streams[k] = stream(k, i, list[i], order, layouts_);
      }
      for (int k = 0; k < D::kOperands; ++k) add_beside(k, i, order);
    }
    blocks_ = std::make_unique<Blocks>(params);
  }

  void keep() override {
    PartOfCall<D>::keep();
    if constexpr (std::is_same_v<D, PullbackDefinition>) {
      for (size_t i = 0; i < works_.size() && call_.has(D::kBefore); ++i) {
        const Stream &from = works_[i].streams[D::kX], &to = works_[i].streams[D::kBefore];
        STD_TORCH_CHECK(from.ndim == 0 && to.ndim == 0 && from.format == to.format, entry("befores", i),
                        " must lie as its parameter, without gaps");
      }
    }
  }

  void take(const Tensor* fresh) override {
    if (fresh_ < 0) return;
    fresh_layouts_.clear();
    for (size_t i = 0; i < works_.size(); ++i) {
      const Stream& its = works_[i].streams[fresh_] = stream(fresh_, i, fresh[i], orders_[i], fresh_layouts_);
      // As the optimizers refuse it, which look at dtypes only where there is no plan.
      STD_TORCH_CHECK(its.format == Format::kFloat32 || its.format == plain_of(works_[i].streams[0].format),
                      entry(D::kLists[fresh_].name, i), " must be of its parameter's dtype, or float32");
    }
  }

  void prepare(const GradScaling& scaling) override {
    host_ = std::make_unique<Host>(call_, scaling);
    const size_t n = works_.size();
    counts_.resize(n);
    scalars_.resize(n);
    roundings_.resize(n);
    for (size_t i = 0; i < n; ++i) {
      Work& w = works_[i];
      const double t = counts_[i] = w.step.taken(i) + 1.0;
      const bool same = i > 0 && t == counts_[i - 1] && host_->same_memory(i);
      w.scalars = same ? works_[i - 1].scalars : &scalars_[i];
      if (!same) host_->fill(scalars_[i], t, i);
      w.rounding = w.coded && same ? works_[i - 1].rounding : nullptr;
      if (w.coded && w.rounding == nullptr) *(w.rounding = &roundings_[i]) = host_->rounding(t);
      if constexpr (std::is_same_v<D, MadaDefinition>) {
        w.flags = same ? works_[i - 1].flags : host_->flags(t, i);
      } else if constexpr (std::is_same_v<D, ScheduleFreeDefinition>) {
        w.flags = is_grid(w.streams[D::kZ].format) ? D::Flag::increment : 0u;
      } else {
        w.flags = same ? works_[i - 1].flags : host_->flags(t);
      }
    }
  }

  // Into the weights of before another optimizer's step, where the part keeps them.
  void copy_weights() override {
    if constexpr (std::is_same_v<D, PullbackDefinition>) {
      if (!call_.has(D::kBefore)) return;
      blocks_->run([&](size_t i, int64_t begin, int64_t end, int64_t) {
        const Stream &from = works_[i].streams[D::kX], &to = works_[i].streams[D::kBefore];
        const int64_t size = from.format == Format::kFloat32 ? 4 : 2;
        std::memcpy(static_cast<char*>(to.data) + begin * size, static_cast<const char*>(from.data) + begin * size,
                    static_cast<size_t>((end - begin) * size));
      });
    }
  }

  // After `prepare`; `skip`: found_inf says that the step is to be left undone.
  void run(bool skip) override {
    host_->clear();
    if (skip) return;
    const Sweep sweep = chosen_isa().kernels->*Host::kSweep;
    const bool sums = !works_.empty() && Host::sums(works_[0].flags);
    sums_.assign(sums ? static_cast<size_t>(blocks_->count()) : 0, kEmptySums);
    blocks_->run([&](size_t i, int64_t begin, int64_t end, int64_t block) {
      const Work& w = works_[i];
      if (i + 2 < works_.size()) {  // of 2,000 small tensors none is in a cache: a tenth of MADA's whole step
        for (const Stream& its : works_[i + 2].streams) __builtin_prefetch(its.data);
      }
      if (!Host::walks(w.flags) && !w.grid) return;
      sweep(w.streams.data(), w.scalars, w.flags, w.rounding, begin, end,
            sums ? &sums_[static_cast<size_t>(block)] : nullptr);
    });
    for (size_t i = 0; i < works_.size(); ++i) {
      works_[i].step.write(counts_[i]);
      host_->remember(i);
    }
    host_->finish(counts_, sums_);
  }

 private:
  struct Work {
    Count step;
    std::array<Stream, D::kOperands> streams{};
    std::array<Stream, D::kOperands> rests{};
    const Scalars* scalars = nullptr;
    Rounding* rounding = nullptr;
    unsigned flags = 0;
    bool coded = false, grid = false;
  };
  using Layouts = std::deque<std::vector<int64_t>>;

  Stream stream(int k, size_t i, const Tensor& t, const MemoryOrder& order, Layouts& layouts) const {
    const ListInfo& list = D::kLists[k];
    check_operand(list.name, i, t, call_.params()[i], is_written(call_, k), kCpu);
    return order.stream(t, checked_format(call_, k, i, t, kCpu), layouts);
  }
  // What lies beside operand k, and whether it is coded.
  void add_beside(int k, size_t i, const MemoryOrder& order) {
    Work& w = works_[i];
    Stream& its = w.streams[k];
    w.coded = w.coded || is_coded(its.format);
    w.grid = w.grid || is_grid(its.format);
    const TensorList& list = call_.beside[static_cast<size_t>(k)];
    if (list.empty() || call_.lists[static_cast<size_t>(k)].empty()) return;
    if (in_blocks(its.format)) {
      its.scales = static_cast<uint8_t*>(list[i].data_ptr());
    } else {
      w.rests[k] = order.stream(list[i], Format::kFloat32, layouts_);  // of its element type only the sweep knows
      its.rest = &w.rests[k];
    }
  }

  using PartOfCall<D>::call_;
  using PartOfCall<D>::fresh_;
  std::vector<Work> works_;
  std::vector<MemoryOrder> orders_;
  Layouts layouts_, fresh_layouts_;  // sizes and strides that streams point to
  std::unique_ptr<Blocks> blocks_;
  std::unique_ptr<Host> host_;  // of this step
  std::vector<double> counts_;
  std::vector<Scalars> scalars_;
  std::vector<Rounding> roundings_;
  std::vector<BlockSums> sums_;
};

}  // namespace pace
