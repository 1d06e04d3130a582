// Plans: what the calls of a step were made of, kept for the next step, so that the host has nothing to do but look
// whether all is as it was. A plan holds tensors; options are arguments. pace_kernels/planning.py makes and drops them.
// Included by one file of each library, which says what its device does (PlansOf below).
#pragma once

#include <torch/csrc/stable/library.h>

#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "call.h"
#include "kept.h"

namespace pace {

// A call of a step's operator on a device: its tensors checked and laid out, then run. An operator makes one and runs
// it; a plan keeps several, and looks again at all that may have changed before the next step.
class Part {
 public:
  virtual ~Part() = default;
  virtual size_t fresh_tensors() const = 0;
  // Each of these may raise, and writes nothing but copies. A plan that raised is not taken up again.
  virtual void keep() = 0;
  virtual void check_kept() const = 0;
  virtual void take(const Tensor* fresh) = 0;
  virtual void prepare(const GradScaling& scaling) = 0;
  virtual void replace_options(const Numbers& options) = 0;
  // Raises where another optimizer's step counts are not as far before ours as the call's options say.
  virtual void check_counts() const = 0;
  // Into the weights of before another optimizer's step, where the part keeps them.
  virtual void copy_weights() = 0;
  // After `prepare`; `skip`: found_inf says that the step is to be left undone, as far as the host knows.
  virtual void run(bool skip) = 0;
  virtual const std::optional<Tensor>& hypergradients() const = 0;
};

// What parts are on every device: the call, and where that which it holds lies.
template <class D>
class PartOfCall : public Part {
 public:
  // `fresh`: the operand that comes with each step anew; −1: all are in the call.
  PartOfCall(Call<D> call, const Place& place, int fresh) : call_(std::move(call)), fresh_(fresh) {
    check_call(call_, place, fresh);
  }

  size_t fresh_tensors() const override { return fresh_ < 0 ? 0 : call_.params().size(); }

  // From here on `check_kept` can tell what has changed.
  void keep() override {
    for (const TensorList& list : call_.lists)
      for (size_t i = 0; i < list.size(); ++i) keep(list, i, true);
    for (const TensorList& list : call_.beside)
      for (size_t i = 0; i < list.size(); ++i) keep(list, i, true);
    for (const TensorList* list : {&call_.rows, &call_.steps, &call_.others})
      for (size_t i = 0; i < list->size(); ++i) keep(*list, i, false);
    for (const auto& extra : call_.extras) {
      if (extra) kept_.add(*extra, false);
    }
    if (call_.lr) kept_.add(*call_.lr, false);
    for (size_t i = 0; i < call_.others.size(); ++i) {
      check_step("others", i, call_.others[i], kCpu);
      check_step("steps", i, call_.steps[i], kCpu);
      pairs_.emplace_back(call_.steps[i], call_.others[i]);
    }
  }

  void check_counts() const override {
    if constexpr (std::is_same_v<D, PullbackDefinition>) {
      const double ahead = static_cast<double>(call_.options.step_offset);
      for (size_t i = 0; i < pairs_.size(); ++i) {
        const auto& [ours, theirs] = pairs_[i];
        STD_TORCH_CHECK(theirs.value() - ours.value() == ahead, entry("others", i), " counts otherwise than before");
      }
    }
  }

  void check_kept() const override { STD_TORCH_CHECK(kept_.same(), "a tensor of the plan lies elsewhere now"); }

  void replace_options(const Numbers& options) override {
    const typename D::Options before = call_.options;
    call_.options.visit(options);
    call_.options.visit(RangeCheck{});
    if constexpr (D::kStochastic) {
      STD_TORCH_CHECK(call_.options.stochastic_rounding == before.stochastic_rounding,
                      "stochastic_rounding is another one than the plan's");
    }
    if constexpr (std::is_same_v<D, MadaDefinition>) {  // by which a state in bfloat16 is rounded
      STD_TORCH_CHECK(call_.options.second_max == before.second_max, "second_max is another one than the plan's");
    }
    check_rule(call_);
  }

  const std::optional<Tensor>& hypergradients() const override {
    static const std::optional<Tensor> none;
    if constexpr (std::is_same_v<D, MadaDefinition>) return call_.extras[D::kHypergradients];
    return none;
  }

 protected:
  Call<D> call_;
  const int fresh_;

 private:
  void keep(const TensorList& list, size_t i, bool shaped) {
    if (i < list.size()) kept_.add(list[i], shaped);
  }

  Memory kept_;
  std::vector<std::pair<Count, Count>> pairs_;  // ours, and those of the other optimizer
};

// The operand that comes with each step anew: the gradients; −1: there are none.
template <class D>
constexpr int fresh_operand() {
  for (int k = 0; k < D::kOperands; ++k) {
    if (D::kLists[k].role == Role::gradient) return k;
  }
  return -1;
}

// What the operators of plans take from a device:
//   template <class D> static std::unique_ptr<Part> part(Call<D> call, const Place& place, int fresh);
//   static Place place_of(const char* name, const Tensor& t);     raises where it is of another device
//   struct Guard { explicit Guard(const Place&); };                makes the device the current one
//   static bool skipped(const std::optional<Tensor>& found_inf);   as far as the host knows
//   static void learn(const LearnArguments&);
template <class Device>
class PlansOf {
 public:
  static int64_t add_plan() {
    const std::lock_guard<std::mutex> lock(mutex_);
    plans_[++last_handle_] = std::make_shared<Plan>();
    return last_handle_;
  }

  static void drop(int64_t handle) {
    std::shared_ptr<Plan> dropped;  // its tensors are freed once the map is free for others
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = plans_.find(handle);
    if (found == plans_.end()) return;
    dropped = std::move(found->second);
    plans_.erase(found);
  }

  static void add(int64_t handle, std::string rule, TensorList tensors, std::vector<int64_t> lengths,
                  std::vector<std::optional<Tensor>> extras, std::vector<double> options) {
    const auto make = rule == PaceDefinition::kOp           ? &make_part<PaceDefinition>
                      : rule == MadaDefinition::kOp         ? &make_part<MadaDefinition>
                      : rule == PullbackDefinition::kOp     ? &make_part<PullbackDefinition>
                      : rule == ScheduleFreeDefinition::kOp ? &make_part<ScheduleFreeDefinition>
                                                            : nullptr;
    STD_TORCH_CHECK(make != nullptr, "there is no rule ", rule);
    const auto plan = plan_of(handle);
    make(*plan, std::move(tensors), lengths, extras, options);
  }

  // `options`: learn, clip and warmup, then rates, momenta, lower and upper bounds of each coefficient.
  static void add_learning(int64_t handle, TensorList learned, std::vector<int64_t> parts,
                           std::vector<double> options) {
    const auto plan = plan_of(handle);
    STD_TORCH_CHECK(learned.size() == 4, "learned must have 4 tensors, got ", learned.size());
    STD_TORCH_CHECK(options.size() == 3 + 4 * kCoefficients, "mada_learn_ has ", 3 + 4 * kCoefficients,
                    " options, got ", options.size());
    LearnArguments a{learned[0],
                     learned[1],
                     learned[2],
                     learned[3],
                     {},
                     std::nullopt,
                     whole("learn", options[0]),
                     {},
                     {},
                     {},
                     {},
                     options[1],
                     whole("warmup", options[2])};
    auto at = options.begin() + 3;
    for (auto* list : {&a.hyper_lr, &a.hyper_momentum, &a.lower, &a.upper}) {
      list->assign(at, at + kCoefficients);
      at += kCoefficients;
    }
    for (const int64_t part : parts) {
      STD_TORCH_CHECK(part >= 0 && part < static_cast<int64_t>(plan->parts.size()), "there is no part ", part);
      const auto& sums = plan->parts[static_cast<size_t>(part)]->hypergradients();
      STD_TORCH_CHECK(sums, "part ", part, " learns nothing");
      a.sums.push_back(*sums);
    }
    check_call(a, Device::place_of("coefficients", a.coefficients));
    plan->learning.push_back(std::move(a));
  }

  // What is done before another optimizer's step: all that the plan's own may refuse, and copies of the weights.
  static void before(int64_t handle, const std::vector<double>& options) {
    const auto plan = plan_of(handle);
    const typename Device::Guard guard(plan->place);
    replace_options(*plan, options);
    for (const auto& part : plan->parts) part->check_kept();
    for (const auto& part : plan->parts) part->check_counts();
    for (const auto& part : plan->parts) part->prepare({});
    for (const auto& part : plan->parts) part->copy_weights();
  }

  static void step(int64_t handle, TensorList fresh, std::vector<double> options, std::optional<Tensor> grad_scale,
                   std::optional<Tensor> clip_coef, std::optional<Tensor> found_inf) {
    const auto plan = plan_of(handle);
    const Place place = plan->place;
    const typename Device::Guard guard(place);
    replace_options(*plan, options);
    const GradScaling scaling{std::move(grad_scale), std::move(clip_coef), std::move(found_inf)};
    check_scaling(scaling, place);
    size_t at = 0;
    for (const auto& part : plan->parts) {
      STD_TORCH_CHECK(at + part->fresh_tensors() <= fresh.size(), "the plan needs more tensors than ", fresh.size());
      part->check_kept();
      part->take(fresh.data() + at);
      at += part->fresh_tensors();
    }
    STD_TORCH_CHECK(at == fresh.size(), "the plan needs ", at, " tensors, got ", fresh.size());
    for (LearnArguments& learning : plan->learning) {
      learning.found_inf = scaling.found_inf;
      check_call(learning, place);
    }
    for (const auto& part : plan->parts) part->prepare(scaling);
    const bool skip = Device::skipped(scaling.found_inf);
    size_t taken = 0;
    try {
      for (const auto& part : plan->parts) part->run(skip), ++taken;
      for (const LearnArguments& learning : plan->learning) Device::learn(learning);
    } catch (const std::exception& error) {  // a launch failed, or there was no memory for one
      if (taken == 0) throw;
      throw std::domain_error(error.what());  // a ValueError to Python: some parts have stepped, and must not again
    }
  }

 private:
  struct Plan {
    std::vector<std::unique_ptr<Part>> parts;
    std::vector<LearnArguments> learning;
    Place place = kCpu;  // of all parts
  };

  static std::shared_ptr<Plan> plan_of(int64_t handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = plans_.find(handle);
    STD_TORCH_CHECK(found != plans_.end(), "there is no plan ", handle);
    return found->second;
  }

  // The lists of a call, one after the other but for the fresh one; those beside them last, all or none; behind these,
  // of a pullback, the step counts of the other optimizer.
  template <class D>
  static void make_part(Plan& plan, TensorList tensors, const std::vector<int64_t>& lengths,
                        const std::vector<std::optional<Tensor>>& extras, const std::vector<double>& options) {
    constexpr int kFresh = fresh_operand<D>();
    Call<D> call;
    size_t list = 0, at = 0;
    const auto next = [&](TensorList& to) {
      STD_TORCH_CHECK(list < lengths.size(), D::kOp, " has more lists than ", lengths.size());
      const size_t end = at + static_cast<size_t>(lengths[list++]);
      STD_TORCH_CHECK(end >= at && end <= tensors.size(), "the lengths of lists do not add up");
      to.assign(std::make_move_iterator(tensors.begin() + static_cast<std::ptrdiff_t>(at)),
                std::make_move_iterator(tensors.begin() + static_cast<std::ptrdiff_t>(end)));
      at = end;
    };
    for (const int k : D::kOrder) {
      if (k == kFresh) {
        ++list;
      } else {
        next(k < 0 ? call.rows : call.lists[static_cast<size_t>(k)]);
      }
    }
    next(call.steps);
    for (size_t k = 0; k < D::kOperands && list < lengths.size(); ++k) {
      if (D::kLists[k].beside != nullptr) next(call.beside[k]);
    }
    if (std::is_same_v<D, PullbackDefinition> && list < lengths.size()) {
      next(call.others);
      if (!call.others.empty()) check_length("others", call.others, call.params());
    }
    STD_TORCH_CHECK(list == lengths.size() && at == tensors.size(), "the lengths of lists do not add up");
    STD_TORCH_CHECK(!call.params().empty(), "a plan needs parameters");
    STD_TORCH_CHECK(extras.size() == D::kExtras + 1, D::kOp, " has ", D::kExtras + 1, " extra tensors, got ",
                    extras.size());
    for (size_t k = 0; k < D::kExtras; ++k) call.extras[k] = extras[k];
    call.lr = extras[D::kExtras];
    const Numbers numbers(options);
    call.options.visit(numbers);
    numbers.check_done(D::kOp);
    const Place place = Device::place_of("params[0]", call.params()[0]);
    STD_TORCH_CHECK(plan.parts.empty() || plan.place.holds(call.params()[0]), "params[0] must be ", plan.place.tensor(),
                    ", as those of the plan's other parts");
    plan.place = place;
    const typename Device::Guard guard(place);
    auto part = Device::part(std::move(call), place, kFresh);
    part->keep();
    plan.parts.push_back(std::move(part));
  }

  // `options`: those of all parts one after the other, where some changed since the last step; otherwise none.
  static void replace_options(const Plan& plan, const std::vector<double>& options) {
    if (options.empty()) return;
    const Numbers numbers(options);
    for (const auto& part : plan.parts) part->replace_options(numbers);
    numbers.check_done("the plan");
  }

  static inline std::mutex mutex_;  // of the map; a plan itself is its optimizer's, which steps in one thread at a time
  static inline std::map<int64_t, std::shared_ptr<Plan>> plans_;
  static inline int64_t last_handle_ = 0;
};

// The life of a plan, which the Python object Plan of the library's module owns (plan_type.h).
int64_t new_plan();
void drop_plan(int64_t handle);
// Its calls without tensors.
void plan_before(int64_t handle, const std::vector<double>& options);
void plan_step(int64_t handle, const std::vector<double>& options);

// In a library's file of operators, once.
#define PACE_PLANS_OF(Device)                                                                                        \
  int64_t new_plan() { return PlansOf<Device>::add_plan(); }                                                         \
  void drop_plan(int64_t handle) { PlansOf<Device>::drop(handle); }                                                  \
  void plan_before(int64_t handle, const std::vector<double>& options) { PlansOf<Device>::before(handle, options); } \
  void plan_step(int64_t handle, const std::vector<double>& options) {                                               \
    PlansOf<Device>::step(handle, {}, options, {}, {}, {});                                                          \
  }

#define PACE_IMPLEMENT_PLANS(m, Device)                                   \
  m.impl("plan_add_", TORCH_BOX(&pace::PlansOf<Device>::add));            \
  m.impl("plan_learn_", TORCH_BOX(&pace::PlansOf<Device>::add_learning)); \
  m.impl("plan_step_", TORCH_BOX(&pace::PlansOf<Device>::step))

}  // namespace pace
