// A call of a step's operator on the CPU: its tensors checked and laid out, then run. An operator makes one and runs it
// (ops.cpp); a plan keeps several, and looks again at all that may have changed before the next step (plans.cpp).
#pragma once

#include <array>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "isa.h"
#include "steps.h"

namespace pace {

// Where a kept tensor lies, by which it is told whether it still does.
class Memory {
 public:
  explicit Memory(const Tensor& t) : t_(t.get()), seen_(look(t_)) {
    const auto sizes = t.sizes(), strides = t.strides();
    shape_.assign(sizes.begin(), sizes.end());
    shape_.insert(shape_.end(), strides.begin(), strides.end());
  }

  bool same() const {
    if (!(look(t_) == seen_)) return false;
    int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t_, &dim));
    if (static_cast<size_t>(2 * dim) != shape_.size()) return false;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t_, &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t_, &strides));
    return std::equal(sizes, sizes + dim, shape_.begin()) && std::equal(strides, strides + dim, shape_.begin() + dim);
  }

 private:
  struct Seen {
    void* address;
    int64_t bytes;
    int32_t dtype;

    bool operator==(const Seen& other) const {
      return address == other.address && bytes == other.bytes && dtype == other.dtype;
    }
  };

  static Seen look(AtenTensorHandle t) {
    Seen seen{};
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(t, &seen.address));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t, &seen.bytes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t, &seen.dtype));
    return seen;
  }

  AtenTensorHandle t_;  // of a tensor that the part holds
  Seen seen_;
  std::vector<int64_t> shape_;  // sizes, then strides
};

class Part {
 public:
  virtual ~Part() = default;
  virtual size_t fresh_tensors() const = 0;
  // Each of these may raise, and writes nothing.
  virtual void check_kept() const = 0;
  virtual void take(const Tensor* fresh) = 0;
  virtual void prepare(const GradScaling& scaling) = 0;
  virtual void replace_options(const std::vector<double>& options) = 0;
  virtual void run(bool skip) = 0;
  virtual const std::optional<Tensor>& hypergradients() const = 0;
};

template <class Host>
class PartOf final : public Part {
 public:
  using D = typename Host::D;
  using Scalars = typename Host::Scalars;

  // `fresh`: the operand that comes with each step anew; −1: all are in the call.
  explicit PartOf(Call<D> call, int fresh = -1) : call_(std::move(call)), fresh_(fresh) {
    check_call(call_, kCpu, fresh);
    const TensorList& params = call_.params();
    works_.resize(params.size());
    orders_.reserve(params.size());
    for (size_t i = 0; i < params.size(); ++i) {
      checked_steps_taken("steps", i, call_.steps[i]);
      const MemoryOrder& order = orders_.emplace_back(params[i]);
      for (int k = 0; k < D::kOperands; ++k) {
        if (k == fresh) continue;
        const TensorList& list = call_.lists[static_cast<size_t>(k)];
        if (!list.empty()) works_[i].streams[k] = stream(k, i, list[i], order, layouts_);
      }
    }
    blocks_ = std::make_unique<Blocks>(params);
  }

  size_t fresh_tensors() const override { return fresh_ < 0 ? 0 : works_.size(); }

  // From here on `check_kept` can tell what has changed.
  void keep() {
    for (const TensorList& list : call_.lists) keep(list);
    keep(call_.rows);
    keep(call_.steps);
    for (const auto& extra : call_.extras) {
      if (extra) kept_.emplace_back(*extra);
    }
    if (call_.lr) kept_.emplace_back(*call_.lr);
  }

  void check_kept() const override {
    for (const Memory& memory : kept_)
      STD_TORCH_CHECK(memory.same(), "the plan of this step has ended: a tensor moved");
  }

  void take(const Tensor* fresh) override {
    fresh_layouts_.clear();
    for (size_t i = 0; i < works_.size(); ++i) {
      const Stream& its = works_[i].streams[fresh_] = stream(fresh_, i, fresh[i], orders_[i], fresh_layouts_);
      // As the optimizers refuse it, which look at dtypes only where there is no plan.
      STD_TORCH_CHECK(its.format == Format::kFloat32 || its.format == works_[i].streams[0].format,
                      entry(D::kLists[fresh_].name, i), " must be of its parameter's dtype, or float32");
    }
  }

  void replace_options(const std::vector<double>& options) override {
    Call<D> next = call_;
    const Numbers numbers(options);
    next.options.visit(numbers);
    numbers.check_done(D::kOp);
    check_call(next, kCpu, fresh_);
    call_ = std::move(next);
  }

  const std::optional<Tensor>& hypergradients() const override {
    static const std::optional<Tensor> none;
    if constexpr (std::is_same_v<D, MadaDefinition>) return call_.extras[D::kHypergradients];
    return none;
  }

  void prepare(const GradScaling& scaling) override {
    host_ = std::make_unique<Host>(call_, scaling);
    const size_t n = works_.size();
    counts_.resize(n);
    scalars_.resize(n);
    for (size_t i = 0; i < n; ++i) {
      Work& w = works_[i];
      const double t = counts_[i] = checked_steps_taken("steps", i, call_.steps[i]) + 1.0;
      const bool same = i > 0 && t == counts_[i - 1] && host_->same_memory(i);
      w.scalars = same ? works_[i - 1].scalars : &scalars_[i];
      if (!same) host_->fill(scalars_[i], t, i);
      if constexpr (std::is_same_v<D, MadaDefinition>) {
        w.flags = same ? works_[i - 1].flags : host_->flags(t, i);
      } else {
        w.flags = same ? works_[i - 1].flags : host_->flags(t);
      }
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
      if (!Host::walks(w.flags)) return;
      sweep(w.streams.data(), w.scalars, w.flags, begin, end, sums ? &sums_[static_cast<size_t>(block)] : nullptr);
    });
    for (size_t i = 0; i < works_.size(); ++i) {
      write_step(call_.steps[i], counts_[i]);
      host_->remember(i);
    }
    host_->finish(counts_, sums_);
  }

 private:
  struct Work {
    std::array<Stream, D::kOperands> streams{};
    const Scalars* scalars = nullptr;
    unsigned flags = 0;
  };
  using Layouts = std::deque<std::vector<int64_t>>;

  Stream stream(int k, size_t i, const Tensor& t, const MemoryOrder& order, Layouts& layouts) const {
    const ListInfo& list = D::kLists[k];
    check_operand(list.name, i, t, call_.params()[i], is_written(call_, k), kCpu);
    return order.stream(t, format_of(list.name, i, t, list.role == Role::state), layouts);
  }
  void keep(const TensorList& list) {
    for (const Tensor& t : list) kept_.emplace_back(t);
  }

  Call<D> call_;
  int fresh_;
  std::vector<Work> works_;
  std::vector<MemoryOrder> orders_;
  Layouts layouts_, fresh_layouts_;  // sizes and strides that streams point to
  std::vector<Memory> kept_;
  std::unique_ptr<Blocks> blocks_;
  std::unique_ptr<Host> host_;  // of this step
  std::vector<double> counts_;
  std::vector<Scalars> scalars_;
  std::vector<BlockSums> sums_;
};

}  // namespace pace
