// The pullback behind another optimizer's step, in the CPU sweep. Included by kernels.cpp alone.
#pragma once

#include "sweep.h"

namespace pace {
namespace {

// The rule over one tile; sums as in pace_kernel.h.
template <bool kBefore, bool kMoment, bool kPull, bool kAverage, bool kStats>
void pullback_tile(const PullbackScalars& scalars, int64_t n, float* x, const float* before, const float* v, float* e,
                   PaceSums* sums) {
  const PullbackScalars s = scalars;  // a local copy: stores through x and e can't change it
  float inv_D = 0, clamped = 0, clipped = 0, base_sq = 0, pullback_sq = 0, update_sq = 0;
  int32_t min_inv_D = 0x7fffffff, max_inv_D = 0;
#pragma omp simd reduction(+ : inv_D, clamped, clipped, base_sq, pullback_sq, update_sq) reduction(min : min_inv_D) \
    reduction(max : max_inv_D)
  for (int64_t i = 0; i < n; ++i) {
    const PaceStep r = pullback_rule<kBefore, kMoment, kPull, kAverage>(
        s, x[i], kBefore ? before[i] : 0.0f, kMoment ? v[i] : 0.0f, kPull || kAverage ? e[i] : 0.0f);
    if constexpr (kPull) x[i] = r.x;
    if constexpr (kAverage) e[i] = r.e;
    if constexpr (kStats) {
      inv_D += r.inv_D;
      clamped += r.clamped;
      clipped += r.lambda >= 1.0f ? 1.0f : 0.0f;
      base_sq += r.adamw * r.adamw;
      pullback_sq += r.pullback * r.pullback;
      update_sq += r.update * r.update;
      const int32_t bits = static_cast<int32_t>(bits_of(r.inv_D) & 0x7fffffffu);
      min_inv_D = bits < min_inv_D ? bits : min_inv_D;
      max_inv_D = bits > max_inv_D ? bits : max_inv_D;
    }
  }
  if constexpr (kStats) {
    sums->inv_D += inv_D;
    sums->clamped += clamped;
    sums->clipped += clipped;
    sums->adamw_sq += base_sq;
    sums->pullback_sq += pullback_sq;
    sums->update_sq += update_sq;
    const uint32_t low = static_cast<uint32_t>(min_inv_D), high = static_cast<uint32_t>(max_inv_D);
    sums->min_inv_D = low < sums->min_inv_D ? low : sums->min_inv_D;
    sums->max_inv_D = high > sums->max_inv_D ? high : sums->max_inv_D;
  }
}

using PullbackTile = void (*)(const PullbackScalars&, int64_t, float*, const float*, const float*, float*, PaceSums*);

// The tables of all combinations: what pulls by [before][moment][average][stats]; what does not, by [average][stats].
#define FLAGS(b, m, p, a) {pullback_tile<b, m, p, a, false>, pullback_tile<b, m, p, a, true>}
#define PULLS(b, m) {FLAGS(b, m, true, false), FLAGS(b, m, true, true)}
constexpr PullbackTile kPullbackTiles[2][2][2][2] = {{PULLS(false, false), PULLS(false, true)},
                                                     {PULLS(true, false), PULLS(true, true)}};
constexpr PullbackTile kAverageTiles[2][2] = {FLAGS(false, false, false, false), FLAGS(false, false, false, true)};
#undef PULLS
#undef FLAGS

void pullback(const PullbackWork& w, int64_t begin, int64_t end, PaceSums* sums) {
  if (w.x.data == nullptr) return;  // nothing pulls, the average rests, nobody asks for statistics
  const int64_t step = sums == nullptr ? kTile : kStatsTile;
  alignas(64) float scratch[4][kStatsTile];
  const Stream* const operands[] = {&w.x, &w.before, &w.v, &w.e};
  const bool stats = sums != nullptr;
  const PullbackTile tile = w.pull ? kPullbackTiles[w.before.data != nullptr][w.v.data != nullptr][w.average][stats]
                                   : kAverageTiles[w.average][stats];
  for (int64_t at = begin; at < end; at += step) {
    const int64_t n = end - at < step ? end - at : step;
    for (int64_t ahead = kAhead; ahead < kAhead + step; ahead += kTile) {
      for (const Stream* s : operands) prefetch_tile(*s, at + ahead);
    }
    const Tile x = open_tile(w.x, at, n, scratch[0]), before = open_tile(w.before, at, n, scratch[1]);
    const Tile v = open_tile(w.v, at, n, scratch[2]), e = open_tile(w.e, at, n, scratch[3]);
    tile(w.scalars, n, x.data, before.data, v.data, e.data, sums);
    if (w.pull) close_tile(w.x, at, n, x);
    if (w.average) close_tile(w.e, at, n, e);
  }
}

}  // namespace
}  // namespace pace
