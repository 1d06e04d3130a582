// PACE's telemetry: what a block of elements sums, and how the sums of blocks become the statistics of a call.
#pragma once

#include <cstdint>

#include "scalars.h"
#include "storage.h"

namespace pace {

// The layout of PACE's statistics; pace_kernels/ops.py has the same names in the same order.
enum PaceStat {
  kCount,
  kRawSum,
  kRawMin,
  kRawMax,
  kGainSum,
  kGainMin,
  kGainMax,
  kClampedSum,
  kClampedMin,
  kClampedMax,
  kClipped,
  kAdamwSq,
  kPullbackSq,
  kUpdateSq,
  kPaceStats
};

// Sums over a block of elements; minima and maxima of 1/D as the bits of the float.
struct PaceSums {
  double inv_D, clamped, clipped, adamw_sq, pullback_sq, update_sq;
  uint32_t min_inv_D, max_inv_D;
};

constexpr PaceSums kNoSums{0, 0, 0, 0, 0, 0, 0x7fffffffu, 0};

// What turns 1/D into the gain before α c, and into the gain before and after the clamp.
struct PaceStatScalars {
  double weight, gain, cap;
};

PACE_RULE PaceStatScalars pace_stat_scalars(const PaceOptions& o, double t) {
  const double w = gain_weight(o, t);
  return {w, o.lr * o.lambda_pullback * w, o.clamp_pullback ? 1.0 : std::numeric_limits<double>::infinity()};
}

// The same of a pullback behind another optimizer's step. With a constant gain 1/D counts as 1, and the gain before α c
// says nothing.
PACE_RULE PaceStatScalars pullback_stat_scalars(const PullbackOptions& o, double t) {
  return {gain_weight(o, t), pullback_gain(o, t), o.clamp_pullback ? 1.0 : std::numeric_limits<double>::infinity()};
}

PACE_RULE void clear_stats(double* stats) {
  for (int k = 0; k < kPaceStats; ++k) stats[k] = 0.0;
  stats[kRawMin] = stats[kGainMin] = stats[kClampedMin] = std::numeric_limits<double>::infinity();
}

// Statistics `b` into `a`: sums, minima and maxima; a maximum keeps NaN.
PACE_RULE void merge_stats(double* a, const double* b) {
  for (int k = 0; k < kPaceStats; ++k) {
    const bool low = k == kRawMin || k == kGainMin || k == kClampedMin;
    const bool high = k == kRawMax || k == kGainMax || k == kClampedMax;
    a[k] = low ? (b[k] < a[k] ? b[k] : a[k]) : (high ? (b[k] <= a[k] ? a[k] : b[k]) : a[k] + b[k]);
  }
}

// The statistics of a block of `count` elements.
PACE_RULE void block_stats(double* stats, const PaceSums& sums, int64_t count, const PaceStatScalars& s) {
  const double low = float_of(sums.min_inv_D), high = float_of(sums.max_inv_D);
  stats[kCount] = static_cast<double>(count);
  stats[kRawSum] = s.weight * sums.inv_D;
  stats[kRawMin] = s.weight * low;
  stats[kRawMax] = s.weight * high;
  stats[kGainSum] = s.gain * sums.inv_D;
  stats[kGainMin] = s.gain * low;
  stats[kGainMax] = s.gain * high;
  stats[kClampedSum] = sums.clamped;
  stats[kClampedMin] = s.gain * low > s.cap ? s.cap : s.gain * low;  // keeps NaN
  stats[kClampedMax] = s.gain * high > s.cap ? s.cap : s.gain * high;
  stats[kClipped] = sums.clipped;
  stats[kAdamwSq] = sums.adamw_sq;
  stats[kPullbackSq] = sums.pullback_sq;
  stats[kUpdateSq] = sums.update_sq;
}

}  // namespace pace
