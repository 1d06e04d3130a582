// PACE's rule in the CPU sweep. Included by kernels.cpp alone.
#pragma once

#include "sweep.h"

namespace pace {
namespace {

// The rule over one tile. kStats: also the sums; as named scalars, so that the loop stays vectorized.
template <bool kMoment, bool kPull, bool kAverage, bool kStats>
void pace_tile(const PaceScalars& scalars, int64_t n, float* x, const float* g, float* m, float* v, float* e,
               PaceSums* sums) {
  const PaceScalars s = scalars;  // a local copy: stores through x, m, v, e can't change it
  float inv_D = 0, clamped = 0, clipped = 0, adamw_sq = 0, pullback_sq = 0, update_sq = 0;
  // 1/D is never negative, and such floats order like their bits (NaN, its sign cleared, comes out as the largest). An
  // integer minimum vectorizes without -ffinite-math-only, a float one does not.
  int32_t min_inv_D = 0x7fffffff, max_inv_D = 0;
#pragma omp simd reduction(+ : inv_D, clamped, clipped, adamw_sq, pullback_sq, update_sq) reduction(min : min_inv_D) \
    reduction(max : max_inv_D)
  for (int64_t i = 0; i < n; ++i) {
    const PaceStep r = pace_rule<kMoment, kPull, kAverage>(s, g[i], x[i], kMoment ? m[i] : 0.0f, v[i],
                                                           kPull || kAverage ? e[i] : 0.0f);
    x[i] = r.x;
    v[i] = r.v;
    if constexpr (kMoment) m[i] = r.m;
    if constexpr (kAverage) e[i] = r.e;
    if constexpr (kStats) {
      inv_D += r.inv_D;
      clamped += r.clamped;
      clipped += r.lambda >= 1.0f ? 1.0f : 0.0f;
      adamw_sq += r.adamw * r.adamw;
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
    sums->adamw_sq += adamw_sq;
    sums->pullback_sq += pullback_sq;
    sums->update_sq += update_sq;
    const uint32_t low = static_cast<uint32_t>(min_inv_D), high = static_cast<uint32_t>(max_inv_D);
    sums->min_inv_D = low < sums->min_inv_D ? low : sums->min_inv_D;
    sums->max_inv_D = high > sums->max_inv_D ? high : sums->max_inv_D;
  }
}

using PaceTile = void (*)(const PaceScalars&, int64_t, float*, const float*, float*, float*, float*, PaceSums*);

// The table of all combinations: [moment][pull][average][stats].
#define FLAGS(m, p, a) {pace_tile<m, p, a, false>, pace_tile<m, p, a, true>}
constexpr PaceTile kPaceTiles[2][2][2][2] = {
    {{FLAGS(false, false, false), FLAGS(false, false, true)}, {FLAGS(false, true, false), FLAGS(false, true, true)}},
    {{FLAGS(true, false, false), FLAGS(true, false, true)}, {FLAGS(true, true, false), FLAGS(true, true, true)}}};
#undef FLAGS

void pace(const PaceWork& w, int64_t begin, int64_t end, PaceSums* sums) {
  const int64_t step = sums == nullptr ? kTile : kStatsTile;
  alignas(64) float scratch[5][kStatsTile];
  const Stream* const operands[] = {&w.x, &w.g, &w.m, &w.v, &w.e};
  const PaceTile tile = kPaceTiles[w.moment][w.pull][w.average][sums != nullptr];
  for (int64_t at = begin; at < end; at += step) {
    const int64_t n = end - at < step ? end - at : step;
    for (int64_t ahead = kAhead; ahead < kAhead + step; ahead += kTile) {
      for (const Stream* s : operands) prefetch_tile(*s, at + ahead);
    }
    const Tile x = open_tile(w.x, at, n, scratch[0]), g = open_tile(w.g, at, n, scratch[1]);
    const Tile m = open_tile(w.m, at, n, scratch[2]), v = open_tile(w.v, at, n, scratch[3]);
    const Tile e = open_tile(w.e, at, n, scratch[4]);
    tile(w.scalars, n, x.data, g.data, m.data, v.data, e.data, sums);
    close_tile(w.x, at, n, x);
    close_tile(w.m, at, n, m);
    close_tile(w.v, at, n, v);
    if (w.average) close_tile(w.e, at, n, e);
  }
}

}  // namespace
}  // namespace pace
