// What a step of each rule is on the GPU, for the plan on the host and for the kernel that computes scalars on the
// device: which kernel, which scalars, which sums. The formulas of scalars are in ../scalars.h.
//
// A rule more is: a struct here; its element and uses in a .cu file of its own (schedule_free.cu is the shortest),
// which setup.py names in CUDA_KERNELS; its name in RuleName (launches.h) and in PACE_CUDA_RULES below.
#pragma once

#include "launches.h"

namespace pace {

struct PaceRow {
  double values[kPaceStats];
};

struct MadaRow {
  double values[kCoefficients];
};

constexpr unsigned bit(int operand) { return 1u << operand; }

// kFlags of a kernel come from the definition, and are what `flags` says of a call: its options, which lists it has (a
// bit an operand), whether it sums. What hangs on a step is among them too, as that which may happen: kNow. Of a
// general sweep of codes (general.cuh) `coded_flags` adds those that hang on formats, and `group` says which of kGroups
// kernels has them.
struct PaceRule {
  using D = PaceDefinition;
  struct Scalars {
    PaceScalars rule;
    PaceStatScalars stat;
    Rounding rounding;
  };
  using Row = PaceRow;
  static constexpr RuleName kName = RuleName::kPace;
  static constexpr int kResult = D::kStats, kNumbers = -1;
  static constexpr unsigned kNow = D::Flag::average, kSums = D::Flag::stats;

  static unsigned flags(const PaceOptions& o, unsigned lists, bool result) {
    const bool average = (lists & bit(D::kE)) != 0;
    return (o.beta1 != 0.0 ? D::Flag::moment : 0u) | (average && o.lambda_pullback != 0.0 ? D::Flag::pull : 0u) |
           (average ? D::Flag::average : 0u) | (result ? D::Flag::stats : 0u);
  }
  static uint32_t now(const PaceOptions&, unsigned) { return 0; }
  static bool remembers(unsigned) { return false; }
  static bool reads_numbers(unsigned) { return false; }
  static bool walks(const PaceOptions&, double, unsigned) { return true; }
  PACE_RULE void fill(Scalars& to, const PaceOptions& o, double t, float factor, const double*, double*) {
    to.rule = pace_scalars(o, t, factor);
    to.stat = pace_stat_scalars(o, t);
    to.rounding = rounding_of(o, t);
  }
};

struct PullbackRule {
  using D = PullbackDefinition;
  struct Scalars {
    PullbackScalars rule;
    PaceStatScalars stat;
    Rounding rounding;
  };
  using Row = PaceRow;
  static constexpr RuleName kName = RuleName::kPullback;
  static constexpr int kResult = D::kStats, kNumbers = -1;
  static constexpr unsigned kNow = D::Flag::average, kSums = D::Flag::stats;
  static constexpr int kGroups = 2;

  static unsigned flags(const PullbackOptions& o, unsigned lists, bool result) {
    const bool before = (lists & bit(D::kBefore)) != 0 && pulls(o) && !o.pullback_from_step;
    return (before ? D::Flag::before : 0u) | ((lists & bit(D::kV)) != 0 ? D::Flag::moment : 0u) |
           (pulls(o) ? D::Flag::pull : 0u) | D::Flag::average | (result ? D::Flag::stats : 0u);
  }
  static unsigned coded_flags(unsigned flags, Formats) { return flags; }
  static constexpr int group(unsigned flags) { return (flags & D::Flag::stats) != 0 ? 1 : 0; }
  static uint32_t now(const PullbackOptions&, unsigned) { return 0; }
  static bool remembers(unsigned) { return false; }
  static bool reads_numbers(unsigned) { return false; }
  // A step in which nothing pulls and the average rests walks no memory.
  static bool walks(const PullbackOptions& o, double t, unsigned flags) {
    return (flags & (D::Flag::pull | D::Flag::stats)) != 0 || average_moves(o, t);
  }
  PACE_RULE void fill(Scalars& to, const PullbackOptions& o, double t, float, const double*, double*) {
    to.rule = pullback_scalars(o, t);
    to.stat = pullback_stat_scalars(o, t);
    to.rounding = rounding_of(o, t);
  }
};

struct ScheduleFreeRule {
  using D = ScheduleFreeDefinition;
  struct Scalars {
    ScheduleFreeScalars rule;
    Rounding rounding;
  };
  using Row = PaceRow;  // of none
  static constexpr RuleName kName = RuleName::kScheduleFree;
  static constexpr int kResult = -1, kNumbers = D::kSchedule;
  static constexpr unsigned kNow = 0, kSums = 0;
  static constexpr int kGroups = 1;

  static unsigned flags(const ScheduleFreeOptions&, unsigned, bool) { return 0; }
  static unsigned coded_flags(unsigned flags, Formats formats) {
    return flags | (is_grid(format_at(formats, D::kZ)) ? D::Flag::increment : 0u);
  }
  static constexpr int group(unsigned) { return 0; }
  static uint32_t now(const ScheduleFreeOptions&, unsigned) { return 0; }
  static bool remembers(unsigned) { return false; }
  static bool reads_numbers(unsigned) { return true; }
  static bool walks(const ScheduleFreeOptions&, double, unsigned) { return true; }
  PACE_RULE void fill(Scalars& to, ScheduleFreeOptions o, double t, float factor, const double* schedule, double*) {
    if (schedule != nullptr) o.count = schedule[0], o.share = schedule[1];
    to.rule = schedule_free_scalars(o, factor);
    to.rounding = rounding_of(o, t);
  }
};

struct MadaRule {
  using D = MadaDefinition;
  struct Scalars {
    MadaScalars now, last;  // of the new step, and of the one that is redone, where there is one
    PaceScalars pull;
    MadaCoefficients factors;
    int32_t first;  // no last gradient was kept yet
    Rounding rounding;
  };
  using Row = MadaRow;
  static constexpr RuleName kName = RuleName::kMada;
  static constexpr int kResult = D::kHypergradients, kNumbers = D::kCoefficients;
  static constexpr unsigned kNow = D::Flag::average | D::Flag::stay, kSums = D::Flag::lag;
  static constexpr int kGroups = 3;
  enum Launched : uint32_t { kPulls = 1, kRolesStay = 2, kHasAverage = 4 };

  static unsigned flags(const MadaOptions& o, unsigned lists, bool) {
    const bool lag = o.learn != 0, diff = (lists & bit(D::kN)) != 0;
    return (lag ? D::Flag::lag : 0u) | (diff ? D::Flag::diff : 0u) |
           ((lists & bit(D::kW)) != 0 ? D::Flag::second : 0u) | ((lists & bit(D::kL)) != 0 ? D::Flag::lion : 0u) |
           ((lists & bit(D::kV)) != 0 ? D::Flag::adam : 0u) | D::Flag::average | (lag && diff ? D::Flag::stay : 0u);
  }
  static unsigned coded_flags(unsigned flags, Formats) { return flags; }
  // Of what learns, of other differences and second moments, and of Adam and Lion alone, which have half the operands.
  static constexpr int group(unsigned flags) {
    return (flags & D::Flag::lag) != 0 ? 2 : (flags & (D::Flag::diff | D::Flag::second)) != 0 ? 1 : 0;
  }
  // Those who replay a captured graph know tensors, not their roles, so there the roles stay.
  static uint32_t now(const MadaOptions& o, unsigned lists) {
    return (o.lambda_pullback != 0.0 ? kPulls : 0u) | (o.capturable ? kRolesStay : 0u) |
           ((lists & bit(D::kE)) != 0 ? kHasAverage : 0u);
  }
  static bool remembers(unsigned flags) { return (flags & (D::Flag::lag | D::Flag::diff)) != 0; }
  static bool reads_numbers(unsigned flags) { return (flags & D::Flag::lag) != 0; }
  static bool walks(const MadaOptions&, double, unsigned) { return true; }
  // `last` remembers this step, where gradients are kept.
  PACE_RULE void fill(Scalars& to, const MadaOptions& o, double t, float factor, const double* learned_now,
                      double* last) {
    MadaCoefficients q = fixed_coefficients(o);
    for (int k = 0; k < kCoefficients; ++k) q[k] = learned(o, k) ? learned_now[k] : q[k];
    to.now = mada_scalars(o, t, o.lr, q);
    to.pull = pace_scalars(o, t, factor);
    to.first = last != nullptr && last[kTaken] == kNoGradient;
    to.rounding = rounding_of(o, t);
    if (o.learn != 0) {
      const LastStep redo = last_step(o, t - 1.0, last);
      to.last = redo.scalars;
      to.factors = redo.factors;
    }
    if (last == nullptr) return;
    last[kTaken] = o.learn != 0 ? kRedo : kDone;
    last[kLastLr] = o.lr;
    for (int k = 0; k < kCoefficients; ++k) last[kLastCoefficients + k] = q[k];
  }
};

#define PACE_CUDA_RULES(with) with(PaceRule) with(MadaRule) with(PullbackRule) with(ScheduleFreeRule)

#define FITS(Rule)                                               \
  static_assert(sizeof(ScalarsLaunch<Rule>) <= kParameterBytes); \
  static_assert(sizeof(Rule::Scalars) <= SweepLaunch::kScalarBytes);
PACE_CUDA_RULES(FITS)
#undef FITS

}  // namespace pace
