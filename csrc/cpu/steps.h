// What a step of each rule is on the host: which of the rule's flags it has, its scalars, and what becomes of the sums.
// part.h calls these functions; the formulas of scalars are in ../scalars.h.
#pragma once

#include <algorithm>
#include <vector>

#include "../call.h"
#include "blocks.h"
#include "kernels.h"

namespace pace {

inline float read_one(const std::optional<Tensor>& t, float otherwise) {
  return t ? *static_cast<const float*>(t->data_ptr()) : otherwise;
}

// What the gradient is multiplied with: clip coefficient / gradient scale, rounded once.
inline float grad_factor(const GradScaling& s) { return read_one(s.clip_coef, 1.0f) / read_one(s.grad_scale, 1.0f); }

inline bool skipped(const std::optional<Tensor>& found_inf) { return read_one(found_inf, 0.0f) != 0.0f; }

// A call's options with the learning rate of this step.
template <class D>
typename D::Options options_now(const Call<D>& call) {
  typename D::Options o = call.options;
  if (call.lr) o.lr = read_number(*call.lr);
  return o;
}

// The statistics of a call from the sums of its blocks; `scalars_of(t)` turns them into gains.
template <class D, class ScalarsOf>
void finish_statistics(const Call<D>& call, const std::vector<double>& counts, const std::vector<BlockSums>& sums,
                       const ScalarsOf& scalars_of) {
  double* const stats = call.numbers(D::kStats);
  size_t block = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    const int64_t n = call.params()[i].numel();
    const PaceStatScalars scalars = scalars_of(counts[i]);
    for (int64_t begin = 0; begin < n; begin += kBlock, ++block) {
      const BlockSums& s = sums[block];
      double row[kPaceStats];
      block_stats(row, {s.sum[0], s.sum[1], s.sum[2], s.sum[3], s.sum[4], s.sum[5], s.low, s.high},
                  std::min(kBlock, n - begin), scalars);
      merge_stats(stats, row);
    }
  }
}

struct PaceHost {
  using D = PaceDefinition;
  using Scalars = PaceScalars;
  static constexpr D::Operand kFresh = D::kG;
  static constexpr Sweep Kernels::* kSweep = &Kernels::pace;

  const Call<D>& call;
  const PaceOptions o;
  const float factor;

  PaceHost(const Call<D>& a, const GradScaling& scaling) : call(a), o(options_now(a)), factor(grad_factor(scaling)) {}

  unsigned flags(double t) const {
    const bool averages = call.has(D::kE);
    return (o.beta1 != 0.0 ? D::Flag::moment : 0u) | (averages && o.lambda_pullback != 0.0 ? D::Flag::pull : 0u) |
           (averages && average_moves(o, t) ? D::Flag::average : 0u) | (call.extras[D::kStats] ? D::Flag::stats : 0u);
  }
  static bool walks(unsigned) { return true; }
  static bool sums(unsigned flags) { return (flags & D::Flag::stats) != 0; }
  static bool same_memory(size_t) { return true; }
  void fill(Scalars& to, double t, size_t) { to = pace_scalars(o, t, factor); }
  Rounding rounding(double t) const { return rounding_of(o, t); }
  void clear() const {
    if (call.extras[D::kStats]) clear_stats(call.numbers(D::kStats));
  }
  static void remember(size_t) {}
  void finish(const std::vector<double>& counts, const std::vector<BlockSums>& block_sums) const {
    if (call.extras[D::kStats]) {
      finish_statistics(call, counts, block_sums, [&](double t) { return pace_stat_scalars(o, t); });
    }
  }
};

struct PullbackHost {
  using D = PullbackDefinition;
  using Scalars = PullbackScalars;
  static constexpr D::Operand kFresh = D::kBefore;
  static constexpr Sweep Kernels::* kSweep = &Kernels::pullback;

  const Call<D>& call;
  const PullbackOptions o;

  PullbackHost(const Call<D>& a, const GradScaling&) : call(a), o(options_now(a)) {}

  unsigned flags(double t) const {
    return (call.has(D::kBefore) && pulls(o) && !o.pullback_from_step ? D::Flag::before : 0u) |
           (call.has(D::kV) ? D::Flag::moment : 0u) | (pulls(o) ? D::Flag::pull : 0u) |
           (average_moves(o, t) ? D::Flag::average : 0u) | (call.extras[D::kStats] ? D::Flag::stats : 0u);
  }
  // A step in which nothing pulls and the average rests walks no memory.
  static bool walks(unsigned flags) { return (flags & (D::Flag::pull | D::Flag::average | D::Flag::stats)) != 0; }
  static bool sums(unsigned flags) { return (flags & D::Flag::stats) != 0; }
  static bool same_memory(size_t) { return true; }
  void fill(Scalars& to, double t, size_t) { to = pullback_scalars(o, t); }
  Rounding rounding(double t) const { return rounding_of(o, t); }
  void clear() const {
    if (call.extras[D::kStats]) clear_stats(call.numbers(D::kStats));
  }
  static void remember(size_t) {}
  void finish(const std::vector<double>& counts, const std::vector<BlockSums>& block_sums) const {
    if (call.extras[D::kStats]) {
      finish_statistics(call, counts, block_sums, [&](double t) { return pullback_stat_scalars(o, t); });
    }
  }
};

struct ScheduleFreeHost {
  using D = ScheduleFreeDefinition;
  using Scalars = ScheduleFreeScalars;
  static constexpr D::Operand kFresh = D::kG;
  static constexpr Sweep Kernels::* kSweep = &Kernels::schedule_free;

  ScheduleFreeOptions o;
  const float factor;

  ScheduleFreeHost(const Call<D>& a, const GradScaling& scaling) : o(options_now(a)), factor(grad_factor(scaling)) {
    if (const double* const now = a.numbers(D::kSchedule)) o.count = now[0], o.share = now[1];
  }

  static bool walks(unsigned) { return true; }
  static bool sums(unsigned) { return false; }
  static bool same_memory(size_t) { return true; }
  void fill(Scalars& to, double, size_t) const { to = schedule_free_scalars(o, factor); }
  Rounding rounding(double t) const { return rounding_of(o, t); }
  static void clear() {}
  static void remember(size_t) {}
  static void finish(const std::vector<double>&, const std::vector<BlockSums>&) {}
};

struct MadaHost {
  using D = MadaDefinition;
  using Scalars = MadaTileScalars;
  static constexpr D::Operand kFresh = D::kG;
  static constexpr Sweep Kernels::* kSweep = &Kernels::mada;

  const Call<D>& call;
  const MadaOptions o;
  const MadaParts parts;
  const float factor;
  MadaCoefficients q;
  std::vector<MadaCoefficients> factors;  // of each tensor's hypergradients

  MadaHost(const Call<D>& a, const GradScaling& scaling)
      : call(a),
        o(options_now(a)),
        parts(a),
        factor(grad_factor(scaling)),
        q(fixed_coefficients(o)),
        factors(parts.lag ? a.params().size() : 0) {
    if (const double* const values = call.numbers(D::kCoefficients)) {
      for (int k = 0; k < kCoefficients; ++k) q[k] = learned(o, k) ? values[k] : q[k];
    }
  }

  double* last(size_t i) const { return static_cast<double*>(call.rows[i].data_ptr()); }

  unsigned flags(double t) const {
    const bool both = parts.lag && parts.diff;
    // Those who replay a captured graph know tensors, not their roles, so there the roles stay. Here that is for show.
    // Where no gradient was kept yet, both lists get this step's.
    return (parts.lag ? D::Flag::lag : 0u) | (parts.diff ? D::Flag::diff : 0u) | (parts.second ? D::Flag::second : 0u) |
           (parts.lion ? D::Flag::lion : 0u) | (parts.adam ? D::Flag::adam : 0u) |
           (call.has(D::kE) && (parts.pull || average_moves(o, t)) ? D::Flag::average : 0u) |
           (both && o.capturable ? D::Flag::stay : 0u);
  }
  unsigned flags(double t, size_t i) const {
    const bool first = parts.lag && parts.diff && last(i)[kTaken] == kNoGradient;
    return flags(t) | (first ? D::Flag::stay : 0u);
  }
  static bool walks(unsigned) { return true; }
  static bool sums(unsigned flags) { return (flags & D::Flag::lag) != 0; }
  bool same_memory(size_t i) {
    if (!parts.keeps_gradients()) return true;
    if (!std::equal(last(i), last(i) + kLastScalars, last(i - 1))) return false;
    if (parts.lag) factors[i] = factors[i - 1];
    return true;
  }
  void fill(Scalars& to, double t, size_t i) {
    to.now = mada_scalars(o, t, o.lr, q);
    to.pull = pace_scalars(o, t, factor);
    to.first = parts.keeps_gradients() && last(i)[kTaken] == kNoGradient;
    if (!parts.lag) return;
    STD_TORCH_CHECK(t > 1.0 || last(i)[kTaken] != kRedo, entry("steps", i),
                    " is 0, but last_scalars has a last step to redo: was it set back by hand? Drop the whole state");
    const LastStep redo = last_step(o, t - 1.0, last(i));
    to.last = redo.scalars, factors[i] = redo.factors;
  }
  Rounding rounding(double t) const { return rounding_of(o, t); }
  void clear() const {
    double* const out = call.numbers(D::kHypergradients);
    if (out != nullptr) std::fill(out, out + kHypergradients, 0.0);
  }
  void remember(size_t i) const {
    if (!parts.keeps_gradients()) return;
    double* const to = last(i);
    to[kTaken] = parts.lag ? kRedo : kDone;
    to[kLastLr] = o.lr;
    std::copy(q.begin(), q.end(), to + kLastCoefficients);
  }
  void finish(const std::vector<double>& counts, const std::vector<BlockSums>& block_sums) const {
    double* const out = call.numbers(D::kHypergradients);
    if (out == nullptr) return;
    size_t block = 0;
    for (size_t i = 0; i < counts.size() && parts.lag; ++i) {
      MadaCoefficients total{};
      for (int64_t begin = 0; begin < call.params()[i].numel(); begin += kBlock, ++block) {
        for (int k = 0; k < kCoefficients; ++k) total[k] += block_sums[block].sum[k];
      }
      for (int k = 0; k < kCoefficients; ++k) out[k] += learned(o, k) ? factors[i][k] * total[k] : 0.0;
    }
    out[kCoefficients] = o.lr;
  }
};

// By the definition, its host; they are declared alone.
PaceHost host_of(const PaceDefinition&);
MadaHost host_of(const MadaDefinition&);
PullbackHost host_of(const PullbackDefinition&);
ScheduleFreeHost host_of(const ScheduleFreeDefinition&);

// mada_learn_.
inline void learn(const LearnArguments& a) {
  check_call(a, kCpu);
  if (skipped(a.found_inf)) return;
  double* const q = static_cast<double*>(a.coefficients.data_ptr());
  double* const b = static_cast<double*>(a.momenta.data_ptr());
  double* const step = static_cast<double*>(a.hyper_step.data_ptr());
  std::array<double, kHypergradients> total{};
  for (const Tensor& row : a.sums) {
    const double* const values = static_cast<const double*>(row.data_ptr());
    for (int k = 0; k < kHypergradients; ++k) total[k] += values[k];
  }
  std::copy(total.begin(), total.begin() + kCoefficients, static_cast<double*>(a.hypergradients.data_ptr()));
  if (!(total[kCoefficients] > 0.0)) return;
  *step += 1.0;
  if (*step <= static_cast<double>(a.warmup)) return;
  for (size_t k = 0; k < kCoefficients; ++k) {
    if ((a.learn >> k & 1) != 0) hyper_rule(a.options(k), total[k], q[k], b[k]);
  }
}

}  // namespace pace
