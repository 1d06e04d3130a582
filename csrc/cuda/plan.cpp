#include "plan.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <tuple>

namespace pace {
namespace {

int64_t blocks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// Which operands a step reads and writes, a bit each.
struct Masks {
  unsigned read, written;
};

template <class D, unsigned... kFlags>
Masks uses(unsigned flags, std::integer_sequence<unsigned, kFlags...>) {
  constexpr auto masks_of = [](const Use* uses) {
    Masks masks{};
    for (int k = 0; k < D::kOperands; ++k) {
      masks.read |= uses[k].read ? bit(k) : 0u, masks.written |= uses[k].written ? bit(k) : 0u;
    }
    return masks;
  };
  static constexpr Masks masks[] = {masks_of(D::template Uses<kFlags>::kUses)...};
  return masks[flags];
}

template <class D>
Masks uses(unsigned flags) {
  return uses<D>(flags, std::make_integer_sequence<unsigned, D::Flag::values>());
}

template <class D>
bool lies_coded(Formats formats) {
  bool coded = false;
  for (int k = 0; k < D::kOperands; ++k) coded = coded || lies_coded<D>(k, format_at(formats, k));
  return coded;
}

template <class D>
bool has_grid(Formats formats) {
  bool grid = false;
  for (int k = 0; k < D::kOperands; ++k) grid = grid || is_grid(format_at(formats, k));
  return grid;
}

// What a general sweep learns from its launch.
template <class Rule>
void set_general(SweepLaunch& launch, Formats formats, unsigned flags) {
  using D = typename Rule::D;
  const Masks with = uses<D>(flags), without = uses<D>(flags & ~Rule::kNow);
  const auto split = [](unsigned some, unsigned every) {
    return UsesAtLaunch{static_cast<uint16_t>(every), static_cast<uint16_t>(some & ~every)};
  };
  launch.formats = formats, launch.flags = flags;
  launch.reads = split(with.read, without.read), launch.writes = split(with.written, without.written);
}

// The sweep of operands in codes, some of which are. Most formats of weights and averages beside moments of 8 bits have
// a kernel each; all others, and sums, have one together.
KernelId coded_kernel(Formats formats, unsigned flags) {
  using D = PaceDefinition;
  const Format x = format_at(formats, D::kX), e = format_at(formats, D::kE);
  const bool moment = (flags & D::Flag::moment) != 0, average = (flags & D::Flag::average) != 0;
  KernelId id{KernelKind::kCoded, RuleName::kPace};
  id.flags = flags;
  id.known = (flags & D::Flag::stats) == 0 && x != Format::kFloat16 && format_at(formats, D::kV) == Format::kSquare8 &&
             (!moment || format_at(formats, D::kM) == Format::kMoment8) && (!average || is_coded(e));
  id.x = x == Format::kDithered16 ? Format::kBFloat16 : x;
  id.e = average ? e : Format::kFloat32;
  return id;
}

// The launches that add up `count` rows into the result: a level for each factor of kRowsPerBlock.
template <class Rule>
void add_sums(const typename Rule::Row* rows, int64_t count, int64_t learn, const StepRequest<Rule>& request,
              const Workspace& workspace, const Emit& emit) {
  using Row = typename Rule::Row;
  for (;;) {
    const int64_t blocks = std::max<int64_t>(1, (count + kRowsPerBlock - 1) / kRowsPerBlock);
    Row* const out = blocks > 1 ? static_cast<Row*>(workspace(static_cast<size_t>(blocks) * sizeof(Row))) : nullptr;
    const SumLaunch<Row> launch{rows, out, request.result, count, request.found_inf, request.lr, learn};
    emit({KernelKind::kSum, Rule::kName}, blocks, kSumThreads, &launch, sizeof launch);
    if (out == nullptr) return;
    rows = out;
    count = blocks;
  }
}

}  // namespace

template <class Rule>
void plan_step(const std::vector<SweepTensor>& tensors, const StepRequest<Rule>& r, const Workspace& workspace,
               const Emit& emit) {
  using D = typename Rule::D;
  using Scalars = typename Rule::Scalars;
  using Row = typename Rule::Row;
  static_assert(D::kOperands <= SweepTensor::kOperands);
  // Tensors of the same formats and the same step count side by side.
  std::vector<const SweepTensor*> order(tensors.size());
  std::transform(tensors.begin(), tensors.end(), order.begin(), [](const SweepTensor& t) { return &t; });
  const auto before = [](const SweepTensor* a, const SweepTensor* b) {
    return std::make_tuple(a->x, a->g, a->formats, a->steps_taken) <
           std::make_tuple(b->x, b->g, b->formats, b->steps_taken);
  };
  if (!std::is_sorted(order.begin(), order.end(), before)) std::stable_sort(order.begin(), order.end(), before);
  const unsigned flags = Rule::flags(r.options, r.lists, r.result != nullptr);
  const bool remembers = Rule::remembers(flags);
  const double* const numbers = Rule::reads_numbers(flags) ? r.numbers : nullptr;
  const bool on_device =
      r.lr.address != nullptr || r.factor.grad_scale != nullptr || r.factor.clip_coef != nullptr ||
      r.found_inf != nullptr || numbers != nullptr || remembers ||
      std::any_of(tensors.begin(), tensors.end(), [](const SweepTensor& t) { return t.step.on_device(); });
  const auto same_count = [](const SweepTensor& a, const SweepTensor& b) {
    return a.step.on_device() == b.step.on_device() && a.steps_taken == b.steps_taken;
  };

  Scalars* scalars = nullptr;
  if (on_device) {
    scalars = static_cast<Scalars*>(workspace(order.size() * sizeof(Scalars)));
    const auto launch = std::make_unique<ScalarsLaunch<Rule>>();
    launch->found_inf = r.found_inf, launch->factor = r.factor, launch->lr = r.lr;
    launch->options = r.options, launch->numbers = numbers;
    for (size_t begin = 0, end = 0; begin < order.size(); begin = end) {
      int k = 0;
      for (; end < order.size() && k < launch->kCapacity && same_count(*order[begin], *order[end]); ++end, ++k) {
        launch->step[k] = order[end]->step, launch->row[k] = remembers ? order[end]->row : nullptr;
      }
      launch->out = scalars + begin;
      launch->steps_taken = order[begin]->steps_taken;
      launch->tensors = k;
      emit({KernelKind::kScalars, Rule::kName}, (k + kThreads - 1) / kThreads, kThreads, launch.get(), sizeof *launch);
    }
  }

  const int64_t all_blocks = std::accumulate(order.begin(), order.end(), int64_t{0},
                                             [](int64_t sum, auto* t) { return sum + blocks_of(t->numel); });
  const bool sums = (flags & Rule::kSums) != 0;
  Row* const rows = sums ? static_cast<Row*>(workspace(static_cast<size_t>(all_blocks) * sizeof(Row))) : nullptr;
  const Masks masks = uses<D>(flags);
  int arrays[SweepTensor::kOperands], array_count = 0;
  for (int k = 0; k < D::kOperands; ++k) {
    if (((masks.read | masks.written) & bit(k)) != 0) arrays[array_count++] = k;
  }
  const int plain_capacity = SweepLaunch::capacity(array_count);
  SweepLaunch launch;  // not cleared: kernels read what is filled alone
  launch.found_inf = r.found_inf;
  typename D::Options options = r.options;
  options.lr = r.lr.value;
  int64_t first_block = 0;
  for (size_t begin = 0, end = 0; begin < order.size(); begin = end) {
    const SweepTensor& first = *order[begin];
    const auto same = [&](const SweepTensor& t) {
      return t.x == first.x && t.g == first.g && t.formats == first.formats &&
             (on_device || t.steps_taken == first.steps_taken);
    };
    const bool coded = lies_coded<D>(first.formats);
    const int capacity = coded ? coded_capacity<D> : plain_capacity;
    bool walks = true;
    if (!on_device) {
      const double t = first.steps_taken + 1.0;
      Scalars now{};
      Rule::fill(now, options, t, 1.0f, nullptr, nullptr);
      std::memcpy(launch.scalars, &now, sizeof now);
      walks = Rule::walks(options, t, flags) || has_grid<D>(first.formats);
    }
    int64_t blocks = 0;
    int k = 0;
    for (; end < order.size() && k < capacity; ++end, ++k) {
      const SweepTensor& t = *order[end];
      const int64_t more = blocks_of(t.numel);
      if (!same(t) || (k > 0 && blocks + more > kMaxBlocks)) break;
      uint64_t* slot = launch.slot + k;
      *slot = static_cast<uint64_t>(t.numel);
      *(slot += capacity) = static_cast<uint64_t>(blocks);
      const auto add = [&](const void* address) { *(slot += capacity) = reinterpret_cast<uint64_t>(address); };
      if (coded) {
        for (int a = 0; a < D::kOperands; ++a) add(t.array[a]);
        for (int a = 0; a < D::kOperands; ++a) add(t.beside[a]);
      } else {
        for (int a = 0; a < array_count; ++a) add(t.array[arrays[a]]);
      }
      blocks += more;
    }
    launch.tensors = k;
    launch.device_scalars = on_device ? scalars + begin : nullptr;
    launch.sums = sums ? rows + first_block : nullptr;
    launch.now = Rule::now(r.options, r.lists);
    KernelId id{KernelKind::kSweep, Rule::kName, first.x, first.g, flags};
    if constexpr (std::is_same_v<D, PaceDefinition>) {
      if (coded) launch.now = coded_now(first.formats, flags), id = coded_kernel(first.formats, flags);
    } else if (coded) {
      set_general<Rule>(launch, first.formats, Rule::coded_flags(flags, first.formats));
      id = {KernelKind::kCoded, Rule::kName};
      id.group = Rule::group(launch.flags);
    }
    if (walks && blocks > 0) emit(id, blocks, kThreads, &launch, sizeof launch);
    first_block += blocks;
  }
  if (r.result == nullptr) return;
  int64_t learn = 0;
  if constexpr (std::is_same_v<D, MadaDefinition>) learn = r.options.learn;
  add_sums<Rule>(rows, sums ? all_blocks : 0, learn, r, workspace, emit);
}

#define PLAN(Rule)                                                                                           \
  template void plan_step<Rule>(const std::vector<SweepTensor>&, const StepRequest<Rule>&, const Workspace&, \
                                const Emit&);
PACE_CUDA_RULES(PLAN)
#undef PLAN

void plan_learn(const LearnRequest& r, const Workspace& workspace, const Emit& emit) {
  LearnLaunch launch{};
  launch.coefficients = r.coefficients, launch.momenta = r.momenta;
  launch.hypergradients = r.hypergradients, launch.hyper_step = r.hyper_step;
  launch.found_inf = r.found_inf;
  std::copy(r.options, r.options + kCoefficients, launch.options);
  launch.warmup = r.warmup;
  launch.learn = r.learn;
  auto next = r.sums.begin();
  for (bool last = false; !last; launch.before = launch.total) {
    launch.calls = static_cast<int32_t>(std::min<int64_t>(LearnLaunch::kCapacity, r.sums.end() - next));
    std::copy(next, next + launch.calls, launch.sums);
    next += launch.calls;
    last = next == r.sums.end();
    launch.total = last ? nullptr : static_cast<double*>(workspace((kCoefficients + 1) * sizeof(double)));
    emit({KernelKind::kLearn, RuleName::kMada}, 1, 32, &launch, sizeof launch);
  }
}

}  // namespace pace
