// MADA's rule in the CPU sweep. Included by kernels.cpp alone.
#pragma once

#include "sweep.h"

namespace pace {
namespace {

// The operands of a tile; null where a flag is off.
struct MadaTile {
  float *x, *g, *m, *n, *v, *w, *l, *last, *older, *e;
};

// The rule over one tile. kLag: moments are one step behind; the last step is redone, and its hypergradient terms are
// summed, as six named scalars, so that the loop stays vectorized.
template <bool kLag, bool kDiff, bool kSecond, bool kLion, bool kAdam, bool kAverage>
void mada_tile(const MadaWork& work, int64_t count, const MadaTile& tile, double* sums) {
  const MadaScalars now = work.now, redo = work.last;  // local copies: stores through the tile can't change them
  const PaceScalars pull = work.pull;
  float *const x = tile.x, *const m = tile.m, *const n = tile.n, *const v = tile.v, *const w = tile.w,
               *const l = tile.l, *const last = tile.last, *const older = tile.older, *const e = tile.e;
  const float* const grad = tile.g;
  if (last != nullptr && work.first) {  // the gradient itself, so that d = g − g
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) last[i] = pull.grad_factor * grad[i];
  }
  float beta1 = 0, beta2 = 0, beta3 = 0, rho = 0, c = 0, gamma = 0;
#pragma omp simd reduction(+ : beta1, beta2, beta3, rho, c, gamma)
  for (int64_t i = 0; i < count; ++i) {
    const float g = pull.grad_factor * grad[i];
    const float last_g = kLag || kDiff ? last[i] : 0.0f;
    float m_ = kAdam ? m[i] : 0.0f, n_ = kDiff ? n[i] : 0.0f, v_ = kAdam ? v[i] : 0.0f;
    float w_ = kSecond ? w[i] : 0.0f, l_ = kLion ? l[i] : 0.0f;
    if constexpr (kLag) {
      const float older_g = kDiff ? older[i] : 0.0f;
      const MadaStep r =
          mada_rule<kAdam, kDiff, kSecond, kLion, kAverage>(redo, last_g, older_g, g, m_, n_, v_, w_, l_);
      beta1 += r.beta1;
      beta2 += r.beta2;
      if constexpr (kDiff) beta3 += r.beta3;
      if constexpr (kSecond) rho += r.rho;
      c += r.c;
      if constexpr (kLion) gamma += r.gamma;
      m_ = r.m, n_ = r.n, v_ = r.v, w_ = r.w, l_ = r.l;
    }
    const MadaStep r = mada_rule<kAdam, kDiff, kSecond, kLion, kAverage>(now, g, last_g, 0.0f, m_, n_, v_, w_, l_);
    const MadaWeights a = mada_weights<kAdam, kAverage>(pull, x[i], kAverage ? e[i] : 0.0f, r.update, r.inv_D);
    if constexpr (!kLag) m_ = r.m, n_ = r.n, v_ = r.v, w_ = r.w, l_ = r.l;
    x[i] = a.x;
    if constexpr (kAdam) m[i] = m_;
    if constexpr (kDiff) n[i] = n_;
    if constexpr (kAdam) v[i] = v_;
    if constexpr (kSecond) w[i] = w_;
    if constexpr (kLion) l[i] = l_;
    if constexpr (kLag && kDiff) older[i] = g;
    if constexpr (kLag != kDiff) last[i] = g;
    if constexpr (kAverage) e[i] = a.e;
  }
  if constexpr (kLag) {
    sums[kBeta1] += beta1;
    sums[kBeta2] += beta2;
    sums[kBeta3] += beta3;
    sums[kRho] += rho;
    sums[kC] += c;
    sums[kGamma] += gamma;
  }
}

using MadaTileFunction = void (*)(const MadaWork&, int64_t, const MadaTile&, double*);

// The table of all combinations: [lag][diff][second][lion][average] with Adam's moments; without them there is Lion
// alone, and nothing is learned.
#define AVERAGE(a, b, c, d) {mada_tile<a, b, c, d, true, false>, mada_tile<a, b, c, d, true, true>}
#define LION(a, b, c) {AVERAGE(a, b, c, false), AVERAGE(a, b, c, true)}
#define SECOND(a, b) {LION(a, b, false), LION(a, b, true)}
constexpr MadaTileFunction kMadaTiles[2][2][2][2][2] = {{SECOND(false, false), SECOND(false, true)},
                                                        {SECOND(true, false), SECOND(true, true)}};
#undef SECOND
#undef LION
#undef AVERAGE
constexpr MadaTileFunction kLionTiles[2] = {mada_tile<false, false, false, true, false, false>,
                                            mada_tile<false, false, false, true, false, true>};

// Ten operands and six sums cost too much a tile for tiles of kTile. Asking ahead for ten streams of memory takes
// longer than the hardware's own prefetcher, where fewer gain. 32 M float32 parameters, 2 cores, in times of
// AdamW(fused=True), all six learned / AdamW's preset: tiles of 64 with prefetch 3.1 / 1.02; of 256 with 3.4 / 1.08,
// without 2.6 / 1.14; of 512 without 2.5 / 1.08; of 256 with prefetch where nothing is redone 2.6 / 1.01.
constexpr int64_t kMadaTile = 256;

void mada(const MadaWork& w, int64_t begin, int64_t end, double* sums) {
  alignas(64) float scratch[10][kMadaTile];
  const MadaTileFunction tile_function =
      w.adam ? kMadaTiles[w.lag][w.diff][w.second][w.lion][w.average] : kLionTiles[w.average];
  const Stream* const streams[] = {&w.x, &w.g, &w.m, &w.n, &w.v, &w.w, &w.l, &w.last_g, &w.older_g, &w.e};
  for (int64_t at = begin; at < end; at += kMadaTile) {
    const int64_t n = end - at < kMadaTile ? end - at : kMadaTile;
    if (!w.lag) {
      for (const Stream* s : streams) {
        for (int64_t ahead = kMadaTile; ahead < 2 * kMadaTile; ahead += kTile) prefetch_tile(*s, at + ahead);
      }
    }
    Tile t[10];
    for (int k = 0; k < 10; ++k) t[k] = open_tile(*streams[k], at, n, scratch[k]);
    const MadaTile tile{t[0].data, t[1].data, t[2].data, t[3].data, t[4].data,
                        t[5].data, t[6].data, t[7].data, t[8].data, t[9].data};
    tile_function(w, n, tile, sums);
    if (w.roles_stay) {  // the new gradient went over the older one
      for (int64_t i = 0; i < n; ++i) {
        const float older = tile.older[i];
        tile.older[i] = tile.last[i];
        tile.last[i] = older;
      }
    }
    for (int k = 0; k < 10; ++k) {
      if (k != 1) close_tile(*streams[k], at, n, t[k]);  // all but the gradient
    }
  }
}

}  // namespace
}  // namespace pace
