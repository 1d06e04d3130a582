// Plans: what the calls of a step were made of, kept for the next step, so that the host has nothing to do but look
// whether all is as it was. A plan holds tensors; options are arguments. pace_kernels/planning.py makes and drops them.
#include "plans.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

#include "part.h"

namespace pace {
namespace {

struct Plan {
  std::vector<std::unique_ptr<Part>> parts;
  std::vector<LearnArguments> learning;
};

std::mutex mutex;  // of the map; a plan itself is its optimizer's, which steps in one thread at a time
std::map<int64_t, std::shared_ptr<Plan>> plans;
int64_t last_handle = 0;

std::shared_ptr<Plan> plan_of(int64_t handle) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = plans.find(handle);
  STD_TORCH_CHECK(found != plans.end(), "there is no plan ", handle);
  return found->second;
}

// The lists of a call, one after the other but for the fresh one.
template <class Host>
std::unique_ptr<Part> make_part(TensorList tensors, const std::vector<int64_t>& lengths,
                                const std::vector<std::optional<Tensor>>& extras, const std::vector<double>& options) {
  using D = typename Host::D;
  Call<D> call;
  size_t list = 0, at = 0;
  const auto next = [&](TensorList& to) {
    STD_TORCH_CHECK(list < lengths.size(), D::kOp, " has more lists than ", lengths.size());
    const size_t end = at + static_cast<size_t>(std::abs(lengths[list++]));
    STD_TORCH_CHECK(end >= at && end <= tensors.size(), "the lengths of lists do not add up");
    to.assign(std::make_move_iterator(tensors.begin() + static_cast<std::ptrdiff_t>(at)),
              std::make_move_iterator(tensors.begin() + static_cast<std::ptrdiff_t>(end)));
    at = end;
  };
  // Of no length, the fresh list is missing, as where nothing pulls; of a negative one, it is kept as others are.
  bool fresh = false;
  for (const int k : D::kOrder) {
    if (k == Host::kFresh && list < lengths.size() && lengths[list] >= 0) {
      fresh = lengths[list++] > 0;
      continue;
    }
    next(k < 0 ? call.rows : call.lists[static_cast<size_t>(k)]);
  }
  next(call.steps);
  STD_TORCH_CHECK(list == lengths.size() && at == tensors.size(), "the lengths of lists do not add up");
  STD_TORCH_CHECK(extras.size() == D::kExtras + 1, D::kOp, " has ", D::kExtras + 1, " extra tensors, got ",
                  extras.size());
  for (size_t k = 0; k < D::kExtras; ++k) call.extras[k] = extras[k];
  call.lr = extras[D::kExtras];
  const Numbers numbers(options);
  call.options.visit(numbers);
  numbers.check_done(D::kOp);
  auto part = std::make_unique<PartOf<Host>>(std::move(call), fresh ? static_cast<int>(Host::kFresh) : -1);
  part->keep();
  return part;
}

void plan_add(int64_t handle, std::string rule, TensorList tensors, std::vector<int64_t> lengths,
              std::vector<std::optional<Tensor>> extras, std::vector<double> options) {
  const auto make = rule == PaceDefinition::kOp           ? &make_part<PaceHost>
                    : rule == MadaDefinition::kOp         ? &make_part<MadaHost>
                    : rule == PullbackDefinition::kOp     ? &make_part<PullbackHost>
                    : rule == ScheduleFreeDefinition::kOp ? &make_part<ScheduleFreeHost>
                                                          : nullptr;
  STD_TORCH_CHECK(make != nullptr, "there is no rule ", rule);
  const auto plan = plan_of(handle);
  plan->parts.push_back(make(std::move(tensors), lengths, extras, options));
}

// `options`: learn, clip and warmup, then rates, momenta, lower and upper bounds of each coefficient.
void plan_learn(int64_t handle, TensorList learned, std::vector<int64_t> parts, std::vector<double> options) {
  const auto plan = plan_of(handle);
  STD_TORCH_CHECK(learned.size() == 4, "learned must have 4 tensors, got ", learned.size());
  STD_TORCH_CHECK(options.size() == 3 + 4 * kCoefficients, "mada_learn_ has ", 3 + 4 * kCoefficients, " options, got ",
                  options.size());
  LearnArguments a{learned[0],
                   learned[1],
                   learned[2],
                   learned[3],
                   {},
                   std::nullopt,
                   static_cast<int64_t>(options[0]),
                   {},
                   {},
                   {},
                   {},
                   options[1],
                   static_cast<int64_t>(options[2])};
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
  check_call(a, kCpu);
  plan->learning.push_back(std::move(a));
}

// `options`: those of all parts one after the other, where some changed since the last step; otherwise none.
void replace_options(const Plan& plan, const std::vector<double>& options) {
  if (options.empty()) return;
  const Numbers numbers(options);
  for (const auto& part : plan.parts) part->replace_options(numbers);
  numbers.check_done("the plan");
}

// What is done before another optimizer's step: all that the plan's own may refuse, and copies of the weights.
void plan_before(int64_t handle, Tensor, std::vector<double> options) {
  const auto plan = plan_of(handle);
  replace_options(*plan, options);
  for (const auto& part : plan->parts) part->check_kept();
  for (const auto& part : plan->parts) part->prepare({});
  for (const auto& part : plan->parts) part->copy_weights();
}

void plan_step(int64_t handle, Tensor, TensorList fresh, std::vector<double> options, std::optional<Tensor> grad_scale,
               std::optional<Tensor> clip_coef, std::optional<Tensor> found_inf) {
  const auto plan = plan_of(handle);
  replace_options(*plan, options);
  const GradScaling scaling{std::move(grad_scale), std::move(clip_coef), std::move(found_inf)};
  check_scaling(scaling, kCpu);
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
    check_call(learning, kCpu);
  }
  for (const auto& part : plan->parts) part->prepare(scaling);
  const bool skip = skipped(scaling.found_inf);
  for (const auto& part : plan->parts) part->run(skip);
  for (const LearnArguments& learning : plan->learning) learn(learning);
}

}  // namespace

int64_t new_plan() {
  const std::lock_guard<std::mutex> lock(mutex);
  plans[++last_handle] = std::make_shared<Plan>();
  return last_handle;
}

void drop_plan(int64_t handle) {
  std::shared_ptr<Plan> dropped;  // its tensors are freed once the map is free for others
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = plans.find(handle);
  if (found == plans.end()) return;
  dropped = std::move(found->second);
  plans.erase(found);
}

}  // namespace pace

STABLE_TORCH_LIBRARY_IMPL(pace_kernels, CPU, m) {
  m.impl("plan_add_", TORCH_BOX(&pace::plan_add));
  m.impl("plan_learn_", TORCH_BOX(&pace::plan_learn));
  m.impl("plan_before_", TORCH_BOX(&pace::plan_before));
  m.impl("plan_step_", TORCH_BOX(&pace::plan_step));
}
