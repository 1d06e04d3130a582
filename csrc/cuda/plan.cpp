#include "plan.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <tuple>

namespace pace {
namespace {

template <class Launch>
KernelCall call(const KernelId& id, int64_t blocks, int threads, const Launch& launch) {
  KernelCall c{id, static_cast<int32_t>(blocks), threads, std::vector<uint8_t>(sizeof(Launch))};
  std::memcpy(c.parameters.data(), &launch, sizeof(Launch));
  return c;
}

int64_t blocks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// The tensors in the order of their launches: those of the same formats and the same step count side by side.
template <class T>
std::vector<const T*> in_order(const std::vector<T>& tensors) {
  std::vector<const T*> order(tensors.size());
  std::transform(tensors.begin(), tensors.end(), order.begin(), [](const T& t) { return &t; });
  std::stable_sort(order.begin(), order.end(), [](const T* a, const T* b) {
    return std::make_tuple(a->x_format, a->g_format, a->steps_taken) <
           std::make_tuple(b->x_format, b->g_format, b->steps_taken);
  });
  return order;
}

// Cuts [0, count) where `same(a, b)` of neighbours is false, and after `capacity` of them: calls run(begin, end).
template <class Same, class Run>
void for_each_run(size_t count, size_t capacity, const Same& same, const Run& run) {
  for (size_t begin = 0; begin < count;) {
    size_t end = begin + 1;
    while (end < count && end - begin < capacity && same(end - 1, end)) ++end;
    run(begin, end);
    begin = end;
  }
}

// Fills launches from tensors [begin, end) of one kernel, a new one where a table is full. `set(launch, k, i)` enters
// tensor i at place k of the table; `finish(launch, first, first_block, blocks)` gets the place of its first tensor and
// the number of blocks before it and in it.
template <class Launch, class Numel, class Set, class Finish>
int64_t fill_launches(size_t begin, size_t end, int64_t first_block, const Launch& common, const Numel& numel,
                      const Set& set, const Finish& finish) {
  while (begin < end) {
    Launch launch = common;
    int64_t blocks = 0;
    int k = 0;
    size_t i = begin;
    for (; i < end && k < Launch::kCapacity; ++i, ++k) {
      const int64_t more = blocks_of(numel(i));
      if (k > 0 && blocks + more > kMaxBlocks) break;
      set(launch, k, i);
      launch.table.numel[k] = numel(i);
      launch.table.first_block[k] = static_cast<int32_t>(blocks);
      blocks += more;
    }
    launch.table.tensors = k;
    if (blocks > 0) finish(launch, begin, first_block, blocks);
    first_block += blocks;
    begin = i;
  }
  return first_block;
}

template <class T>
int64_t count_blocks(const std::vector<T>& tensors) {
  return std::accumulate(tensors.begin(), tensors.end(), int64_t{0},
                         [](int64_t sum, const T& t) { return sum + blocks_of(t.numel); });
}

// The launches that add up `count` rows into the result: a level for each factor of kRowsPerBlock.
template <class Row>
void add_sums(Plan& plan, KernelFamily family, const Row* rows, int64_t count, int64_t learn,
              const StepRequest& request, const Workspace& workspace) {
  KernelId id{};
  id.family = family;
  for (;;) {
    const int64_t blocks = std::max<int64_t>(1, (count + kRowsPerBlock - 1) / kRowsPerBlock);
    Row* const out = blocks > 1 ? static_cast<Row*>(workspace(static_cast<size_t>(blocks) * sizeof(Row))) : nullptr;
    const SumLaunch<Row> launch{rows, out, request.result, count, request.found_inf, request.lr, learn};
    plan.push_back(call(id, blocks, kSumThreads, launch));
    if (out == nullptr) return;
    rows = out;
    count = blocks;
  }
}

// Launches of the kernel that computes the scalars of all tensors on the device.
template <class Launch, class T, class Set>
void add_scalars(Plan& plan, KernelFamily family, const std::vector<const T*>& order, const Launch& common,
                 const Set& set) {
  KernelId id{};
  id.family = family;
  const auto same = [&](size_t a, size_t b) {
    return order[a]->step.on_device() == order[b]->step.on_device() &&
           (order[a]->step.on_device() || order[a]->steps_taken == order[b]->steps_taken);
  };
  for_each_run(order.size(), Launch::kCapacity, same, [&](size_t begin, size_t end) {
    Launch launch = common;
    launch.out += begin;
    launch.steps_taken = order[begin]->steps_taken;
    launch.tensors = static_cast<int32_t>(end - begin);
    for (size_t i = begin; i < end; ++i) {
      launch.step[i - begin] = order[i]->step;
      set(launch, i - begin, *order[i]);
    }
    plan.push_back(call(id, (launch.tensors + kThreads - 1) / kThreads, kThreads, launch));
  });
}

// Where scalars come from the host, tensors of a launch have the same step count; otherwise only the same formats.
template <class T>
auto same_kernel(const std::vector<const T*>& order, bool on_device) {
  return [&order, on_device](size_t a, size_t b) {
    const T &left = *order[a], &right = *order[b];
    return left.x_format == right.x_format && left.g_format == right.g_format &&
           (on_device || left.steps_taken == right.steps_taken);
  };
}

template <class T>
bool any_step_on_device(const std::vector<T>& tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const T& t) { return t.step.on_device(); });
}

}  // namespace

Plan plan_pace(const std::vector<PaceTensor>& tensors, const PaceRequest& r, const Workspace& workspace) {
  Plan plan;
  const StepRequest& request = r.step;
  const PaceOptions& options = r.options;
  const auto order = in_order(tensors);
  const bool on_device = request.on_device() || any_step_on_device(tensors);
  const bool stats = request.result != nullptr;
  const int64_t all_blocks = count_blocks(tensors);
  PaceRow* const rows =
      stats ? static_cast<PaceRow*>(workspace(static_cast<size_t>(all_blocks) * sizeof(PaceRow))) : nullptr;
  PaceStepScalars* scalars = nullptr;
  if (on_device) {
    scalars = static_cast<PaceStepScalars*>(workspace(tensors.size() * sizeof(PaceStepScalars)));
    PaceScalarsLaunch common{};
    common.out = scalars;
    common.found_inf = request.found_inf;
    common.factor = request.factor;
    common.lr = request.lr;
    common.options = options;
    add_scalars(plan, KernelFamily::kPaceScalars, order, common, [](auto&, size_t, const auto&) {});
  }
  int64_t block = 0;
  for_each_run(order.size(), order.size(), same_kernel(order, on_device), [&](size_t begin, size_t end) {
    const PaceTensor& first = *order[begin];
    KernelId id{};
    id.family = KernelFamily::kPace;
    id.x = first.x_format, id.g = first.g_format;
    id.moment = options.beta1 != 0.0;
    id.average = r.average;
    id.pull = id.average && options.lambda_pullback != 0.0;
    id.stats = stats;
    PaceLaunch common{};
    common.found_inf = request.found_inf;
    if (!on_device) {
      PaceOptions o = options;
      o.lr = request.lr.value;
      common.scalars = {pace_scalars(o, first.steps_taken + 1.0, 1.0f), pace_stat_scalars(o, first.steps_taken + 1.0)};
    }
    block = fill_launches(
        begin, end, block, common, [&](size_t i) { return order[i]->numel; },
        [&](PaceLaunch& launch, int k, size_t i) {
          const PaceTensor& t = *order[i];
          launch.x[k] = t.x, launch.g[k] = t.g, launch.m[k] = t.m, launch.v[k] = t.v, launch.e[k] = t.e;
        },
        [&](PaceLaunch& launch, size_t place, int64_t first_block, int64_t blocks) {
          launch.device_scalars = on_device ? scalars + place : nullptr;
          launch.rows = stats ? rows + first_block : nullptr;
          plan.push_back(call(id, blocks, kThreads, launch));
        });
  });
  if (stats) add_sums(plan, KernelFamily::kPaceSum, rows, all_blocks, 0, request, workspace);
  return plan;
}

Plan plan_mada(const std::vector<MadaTensor>& tensors, const MadaRequest& r, const Workspace& workspace) {
  Plan plan;
  const auto order = in_order(tensors);
  const bool lag = r.options.learn != 0;
  const bool remembers =
      std::any_of(tensors.begin(), tensors.end(), [](const MadaTensor& t) { return t.last != nullptr; });
  const bool on_device = r.step.on_device() || lag || remembers || any_step_on_device(tensors);
  const int64_t all_blocks = count_blocks(tensors);
  MadaRow* const rows =
      lag ? static_cast<MadaRow*>(workspace(static_cast<size_t>(all_blocks) * sizeof(MadaRow))) : nullptr;
  MadaStepScalars* scalars = nullptr;
  if (on_device) {
    scalars = static_cast<MadaStepScalars*>(workspace(tensors.size() * sizeof(MadaStepScalars)));
    MadaScalarsLaunch common{};
    common.out = scalars;
    common.found_inf = r.step.found_inf;
    common.factor = r.step.factor;
    common.lr = r.step.lr;
    common.options = r.options;
    common.coefficients = r.coefficients;
    add_scalars(plan, KernelFamily::kMadaScalars, order, common,
                [](MadaScalarsLaunch& launch, size_t k, const MadaTensor& t) { launch.last[k] = t.last; });
  }
  int64_t block = 0;
  for_each_run(order.size(), order.size(), same_kernel(order, on_device), [&](size_t begin, size_t end) {
    const MadaTensor& first = *order[begin];
    KernelId id{};
    id.family = KernelFamily::kMada;
    id.x = first.x_format, id.g = first.g_format;
    id.lag = lag;
    id.diff = r.diff, id.second = r.second, id.lion = r.lion, id.adam = r.adam;
    MadaLaunch common{};
    common.found_inf = r.step.found_inf;
    common.pull = r.options.lambda_pullback != 0.0;
    common.roles_stay = r.roles_stay;
    if (!on_device) {
      MadaOptions o = r.options;
      o.lr = r.step.lr.value;
      const double t = first.steps_taken + 1.0;
      common.scalars.now = mada_scalars(o, t, o.lr, fixed_coefficients(o));
      common.scalars.pull = pace_scalars(o, t, 1.0f);
    }
    block = fill_launches(
        begin, end, block, common, [&](size_t i) { return order[i]->numel; },
        [&](MadaLaunch& launch, int k, size_t i) {
          const MadaTensor& t = *order[i];
          launch.x[k] = t.x, launch.g[k] = t.g;
          launch.m[k] = t.m, launch.n[k] = t.n, launch.v[k] = t.v, launch.w[k] = t.w, launch.l[k] = t.l;
          launch.last_g[k] = t.last_g, launch.older_g[k] = t.older_g, launch.e[k] = t.e;
        },
        [&](MadaLaunch& launch, size_t place, int64_t first_block, int64_t blocks) {
          launch.device_scalars = on_device ? scalars + place : nullptr;
          launch.rows = lag ? rows + first_block : nullptr;
          plan.push_back(call(id, blocks, kThreads, launch));
        });
  });
  if (r.step.result != nullptr) {
    add_sums(plan, KernelFamily::kMadaSum, rows, lag ? all_blocks : 0, r.options.learn, r.step, workspace);
  }
  return plan;
}

Plan plan_pullback(const std::vector<PullbackTensor>& tensors, const PullbackRequest& r, const Workspace& workspace) {
  Plan plan;
  const StepRequest& request = r.step;
  const auto order = in_order(tensors);
  const bool on_device = request.on_device() || any_step_on_device(tensors);
  const bool stats = request.result != nullptr;
  const int64_t all_blocks = count_blocks(tensors);
  PaceRow* const rows =
      stats ? static_cast<PaceRow*>(workspace(static_cast<size_t>(all_blocks) * sizeof(PaceRow))) : nullptr;
  PullbackStepScalars* scalars = nullptr;
  if (on_device) {
    scalars = static_cast<PullbackStepScalars*>(workspace(tensors.size() * sizeof(PullbackStepScalars)));
    PullbackScalarsLaunch common{};
    common.out = scalars;
    common.found_inf = request.found_inf;
    common.lr = request.lr;
    common.options = r.options;
    add_scalars(plan, KernelFamily::kPullbackScalars, order, common, [](auto&, size_t, const auto&) {});
  }
  int64_t block = 0;
  for_each_run(order.size(), order.size(), same_kernel(order, on_device), [&](size_t begin, size_t end) {
    const PullbackTensor& first = *order[begin];
    KernelId id{};
    id.family = KernelFamily::kPullback;
    id.x = first.x_format, id.g = first.g_format;
    id.before = r.before;
    id.moment = r.moment;
    id.pull = pulls(r.options);
    id.stats = stats;
    PullbackLaunch common{};
    common.found_inf = request.found_inf;
    if (!on_device) {
      PullbackOptions o = r.options;
      o.lr = request.lr.value;
      const double t = first.steps_taken + 1.0;
      // A step in which nothing pulls and the average rests walks no memory.
      if (!id.pull && !stats && !average_moves(o, t)) return;
      common.scalars = {pullback_scalars(o, t), pullback_stat_scalars(o, t)};
    }
    block = fill_launches(
        begin, end, block, common, [&](size_t i) { return order[i]->numel; },
        [&](PullbackLaunch& launch, int k, size_t i) {
          const PullbackTensor& t = *order[i];
          launch.x[k] = t.x, launch.before[k] = t.before, launch.v[k] = t.v, launch.e[k] = t.e;
        },
        [&](PullbackLaunch& launch, size_t place, int64_t first_block, int64_t blocks) {
          launch.device_scalars = on_device ? scalars + place : nullptr;
          launch.rows = stats ? rows + first_block : nullptr;
          plan.push_back(call(id, blocks, kThreads, launch));
        });
  });
  if (stats) add_sums(plan, KernelFamily::kPaceSum, rows, all_blocks, 0, request, workspace);
  return plan;
}

Plan plan_schedule_free(const std::vector<ScheduleFreeTensor>& tensors, const ScheduleFreeRequest& r,
                        const Workspace& workspace) {
  Plan plan;
  const auto order = in_order(tensors);
  const bool on_device = r.step.on_device() || r.schedule != nullptr || any_step_on_device(tensors);
  ScheduleFreeScalars* scalars = nullptr;
  if (on_device) {
    scalars = static_cast<ScheduleFreeScalars*>(workspace(tensors.size() * sizeof(ScheduleFreeScalars)));
    ScheduleFreeScalarsLaunch common{};
    common.out = scalars;
    common.found_inf = r.step.found_inf;
    common.factor = r.step.factor;
    common.lr = r.step.lr;
    common.options = r.options;
    common.schedule = r.schedule;
    add_scalars(plan, KernelFamily::kScheduleFreeScalars, order, common, [](auto&, size_t, const auto&) {});
  }
  int64_t block = 0;
  for_each_run(order.size(), order.size(), same_kernel(order, on_device), [&](size_t begin, size_t end) {
    KernelId id{};
    id.family = KernelFamily::kScheduleFree;
    id.x = order[begin]->x_format, id.g = order[begin]->g_format;
    ScheduleFreeLaunch common{};
    common.found_inf = r.step.found_inf;
    if (!on_device) common.scalars = schedule_free_scalars(r.options, 1.0f);
    block = fill_launches(
        begin, end, block, common, [&](size_t i) { return order[i]->numel; },
        [&](ScheduleFreeLaunch& launch, int k, size_t i) {
          const ScheduleFreeTensor& t = *order[i];
          launch.y[k] = t.y, launch.g[k] = t.g, launch.v[k] = t.v, launch.z[k] = t.z;
        },
        [&](ScheduleFreeLaunch& launch, size_t place, int64_t, int64_t blocks) {
          launch.device_scalars = on_device ? scalars + place : nullptr;
          plan.push_back(call(id, blocks, kThreads, launch));
        });
  });
  return plan;
}

Plan plan_learn(const LearnRequest& r) {
  LearnLaunch launch{};
  std::copy(r.sums.begin(), r.sums.end(), launch.sums);
  launch.coefficients = r.coefficients, launch.momenta = r.momenta;
  launch.hypergradients = r.hypergradients, launch.hyper_step = r.hyper_step;
  launch.found_inf = r.found_inf;
  std::copy(r.options, r.options + kCoefficients, launch.options);
  launch.warmup = r.warmup;
  launch.learn = r.learn;
  launch.calls = static_cast<int32_t>(r.sums.size());
  KernelId id{};
  id.family = KernelFamily::kLearn;
  return {call(id, 1, 32, launch)};
}

}  // namespace pace
