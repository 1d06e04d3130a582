// What a step does with one element, for each rule: its operands, by their numbers in the definition, in an array, and
// the terms that are summed. Included by kernels.cpp alone.
#pragma once

#include "kernels.h"

namespace pace {
namespace {

// Terms of sums, and one of which the least and the largest are kept; by name, since the vectorizer takes no arrays.
struct Terms {
  float a, b, c, d, e, f;
  int32_t bits;
};

// How memory is walked: elements of a tile, and whether memory is asked for ahead of the hardware's own prefetcher.
struct Walk {
  int64_t tile;
  bool ahead;
};

// A tile is 64 elements, and memory is asked for 256 elements (1 KiB of float32) ahead of it. The hardware prefetcher
// stops at each 4 KiB page, of each of five operands; this goes on. PACE, 32 M float32 parameters, 2 cores, medians:
// 24.4 ms; with tiles of 1,024 and no prefetch 27.2 ms; with tiles of 128 to 1,024 and one tile's lines at once 25
// to 32.
//
// With telemetry a tile is 256 elements: what a reduction costs after its loop (gcc adds the lanes of each of eight
// sums one by one) comes once a tile. PACE with telemetry, 32 M parameters, 2 cores with AVX-512, in times of PACE
// without: tiles of 64 1.75 (float32) and 1.74 (bfloat16), of 256 1.49 and 1.25, of 512 1.57 and 1.35 (medians of three
// runs).
constexpr Walk short_tiles(bool stats) { return {stats ? 256 : 64, true}; }

PACE_RULE Terms statistics(const PaceStep& r) {
  // 1/D is never negative, and such floats order like their bits (NaN, its sign cleared, comes out as the largest). An
  // integer minimum vectorizes without -ffinite-math-only, a float one does not.
  const int32_t bits = static_cast<int32_t>(bits_of(r.inv_D) & 0x7fffffffu);
  return {r.inv_D,
          r.clamped,
          r.lambda >= 1.0f ? 1.0f : 0.0f,
          r.adamw * r.adamw,
          r.pullback * r.pullback,
          r.update * r.update,
          bits};
}

template <unsigned kFlags>
struct Pace : PaceDefinition, PaceDefinition::Uses<kFlags> {
  using Scalars = PaceScalars;
  using U = PaceDefinition::Uses<kFlags>;
  static constexpr bool kThere = true, kSums = U::stats, kExtremes = true;
  static constexpr Walk kWalk = short_tiles(U::stats);

  static inline __attribute__((always_inline)) Terms element(const Scalars& s, float (&a)[kOperands]) {
    const PaceStep r = pace_rule<U::moment, U::pull, U::average>(s, a[kG], a[kX], a[kM], a[kV], a[kE]);
    a[kX] = r.x, a[kM] = r.m, a[kV] = r.v, a[kE] = r.e;
    return statistics(r);
  }
};

template <unsigned kFlags>
struct Pullback : PullbackDefinition, PullbackDefinition::Uses<kFlags> {
  using Scalars = PullbackScalars;
  using U = PullbackDefinition::Uses<kFlags>;
  static constexpr bool kThere = U::pull || !(U::before || U::moment), kSums = U::stats, kExtremes = true;
  static constexpr Walk kWalk = short_tiles(U::stats);

  static inline __attribute__((always_inline)) Terms element(const Scalars& s, float (&a)[kOperands]) {
    const PaceStep r = pullback_rule<U::before, U::moment, U::pull, U::average>(s, a[kX], a[kBefore], a[kV], a[kE]);
    a[kX] = r.x, a[kE] = r.e;
    return statistics(r);
  }
};

template <unsigned kFlags>
struct ScheduleFree : ScheduleFreeDefinition, ScheduleFreeDefinition::Uses<kFlags> {
  using Scalars = ScheduleFreeScalars;
  using U = ScheduleFreeDefinition::Uses<kFlags>;
  static constexpr bool kThere = true, kSums = false, kExtremes = false;
  static constexpr Walk kWalk = short_tiles(false);

  static inline __attribute__((always_inline)) Terms element(const Scalars& s, float (&a)[kOperands]) {
    const ScheduleFreeStep r = schedule_free_rule<U::increment>(s, a[kG], a[kY], a[kV], a[kZ]);
    a[kY] = r.y, a[kV] = r.v, a[kZ] = r.z;
    return {};
  }
};

// The terms of MADA's sums are those of the hypergradients, in the order of the coefficients.
template <unsigned kFlags>
struct Mada : MadaDefinition, MadaDefinition::Uses<kFlags> {
  using Scalars = MadaTileScalars;
  using U = MadaDefinition::Uses<kFlags>;
  // Without Adam's moments there is Lion alone, and nothing is learned; lists that could keep their roles are two.
  static constexpr bool kThere =
      (U::adam || !(U::lag || U::diff || U::second || !U::lion || U::stay)) && (!U::stay || (U::lag && U::diff));
  static constexpr bool kSums = U::lag, kExtremes = false;
  // Ten operands and six sums cost too much a tile for tiles of 64. Asking ahead for ten streams of memory takes
  // longer than the hardware's own prefetcher, where fewer gain. 32 M float32 parameters, 2 cores, in times of
  // AdamW(fused=True), all six learned / AdamW's preset: tiles of 64 with prefetch 3.1 / 1.02; of 256 with 3.4 / 1.08,
  // without 2.6 / 1.14; of 512 without 2.5 / 1.08; of 256 with prefetch where nothing is redone 2.6 / 1.01.
  static constexpr Walk kWalk = {256, !U::lag};

  static inline __attribute__((always_inline)) Terms element(const Scalars& s, float (&a)[kOperands]) {
    const float g = s.pull.grad_factor * a[kG];
    const float last_g = U::lag || U::diff ? (s.first != 0 ? g : a[kLastG]) : 0.0f;
    Terms terms{};
    if constexpr (U::lag) {
      const MadaStep r = mada_rule<U::adam, U::diff, U::second, U::lion, U::average>(s.last, last_g, a[kOlderG], g,
                                                                                     a[kM], a[kN], a[kV], a[kW], a[kL]);
      terms = {r.beta1, r.beta2, r.beta3, r.rho, r.c, r.gamma, 0};
      a[kM] = r.m, a[kN] = r.n, a[kV] = r.v, a[kW] = r.w, a[kL] = r.l;
    }
    const MadaStep r = mada_rule<U::adam, U::diff, U::second, U::lion, U::average>(s.now, g, last_g, 0.0f, a[kM], a[kN],
                                                                                   a[kV], a[kW], a[kL]);
    const MadaWeights to = mada_weights<U::adam, U::average>(s.pull, a[kX], a[kE], r.update, r.inv_D);
    if constexpr (!U::lag) a[kM] = r.m, a[kN] = r.n, a[kV] = r.v, a[kW] = r.w, a[kL] = r.l;
    a[kX] = to.x, a[kE] = to.e;
    a[kOlderG] = U::stay ? last_g : g, a[kLastG] = g;
    return terms;
  }
};

}  // namespace
}  // namespace pace
