// MADA on the GPU: csrc/rules/mada.h as an element of a sweep.
#pragma once

#include "sweep.cuh"

namespace pace {

struct MadaThreadSums {
  float term[kCoefficients] = {};
};

// Flag::lag: moments are one step behind; the last step is redone, and its hypergradient terms are summed.
template <unsigned flags>
struct Mada {
  using Rule = MadaRule;
  using D = Rule::D;
  using Uses = D::Uses<flags>;
  using Scalars = Rule::Scalars;
  using Sums = MadaThreadSums;
  static constexpr unsigned kFlags = flags;
  // All combinations with Adam's moments; without them there is Lion alone, and nothing is learned.
  static constexpr bool kThere = Uses::average && Uses::stay == (Uses::lag && Uses::diff) &&
                                 (Uses::adam || (Uses::lion && !(Uses::lag || Uses::diff || Uses::second)));
  static constexpr bool kThereInCodes = kThere, kScalarsAnew = true;
  // 3 blocks a multiprocessor leave 168 registers a thread, 2 leave 255: a 16-bit format has 8 elements in flight.
  static constexpr int blocks(int vector) { return vector == 4 ? 3 : 2; }
  static constexpr int kBlocksInCodes = Uses::lag ? 3 : (Uses::diff || Uses::second ? 4 : 6);

  struct Now {
    bool average, moves, roles_stay, first;
    __device__ __forceinline__ Now(const Scalars& s, uint32_t launched)
        : average((launched & Rule::kHasAverage) != 0 && ((launched & Rule::kPulls) != 0 || s.pull.moves != 0)),
          moves(average && s.pull.moves != 0),
          roles_stay((launched & Rule::kRolesStay) != 0),
          first(s.first != 0) {}
    __device__ __forceinline__ bool reads(int) const { return average; }
    __device__ __forceinline__ bool writes(int k) const { return k == D::kE ? moves : roles_stay || first; }
  };

  static __device__ __forceinline__ void step(const Scalars& s, const Now& now, float (&a)[D::kOperands], Sums& sums) {
    constexpr bool lag = Uses::lag, diff = Uses::diff, second = Uses::second, lion = Uses::lion, adam = Uses::adam;
    const float g = s.pull.grad_factor * a[D::kG];
    const float last_g = lag || diff ? (now.first ? g : a[D::kLastG]) : 0.0f;
    const auto keep = [&](const MadaStep& r) {
      a[D::kM] = r.m, a[D::kN] = r.n, a[D::kV] = r.v, a[D::kW] = r.w, a[D::kL] = r.l;
    };
    if constexpr (lag) {
      // Without an average the gain of its pull is 0, and the terms the same to the bit.
      const MadaStep r = mada_rule<adam, diff, second, lion, true>(s.last, last_g, a[D::kOlderG], g, a[D::kM], a[D::kN],
                                                                   a[D::kV], a[D::kW], a[D::kL]);
      add(r, sums);
      keep(r);
    }
    const MadaStep r = mada_rule<adam, diff, second, lion, false>(s.now, g, last_g, 0.0f, a[D::kM], a[D::kN], a[D::kV],
                                                                  a[D::kW], a[D::kL]);
    if (now.average) {
      const MadaWeights with = mada_weights<adam, true>(s.pull, a[D::kX], a[D::kE], r.update, r.inv_D);
      a[D::kX] = with.x, a[D::kE] = with.e;
    } else {
      a[D::kX] = mada_weights<adam, false>(s.pull, a[D::kX], 0.0f, r.update, r.inv_D).x;
    }
    if constexpr (!lag) keep(r);
    a[D::kOlderG] = now.roles_stay ? last_g : g;
    a[D::kLastG] = g;
  }

  static __device__ __forceinline__ void add(const MadaStep& r, Sums& sums) {
    sums.term[kBeta1] += r.beta1;
    sums.term[kBeta2] += r.beta2;
    if constexpr (Uses::diff) sums.term[kBeta3] += r.beta3;
    if constexpr (Uses::second) sums.term[kRho] += r.rho;
    sums.term[kC] += r.c;
    if constexpr (Uses::lion) sums.term[kGamma] += r.gamma;
  }

  static __device__ __forceinline__ void finish(const Sums& sums, const Scalars& s, void* rows, int) {
    if constexpr (Uses::lag) {
      __shared__ MadaRow warps[kThreads / 32];
      MadaRow mine;
#pragma unroll
      for (int k = 0; k < kCoefficients; ++k) mine.values[k] = sums.term[k];
      const MadaRow all = block_reduce(
          mine, warps,
          [](MadaRow a, const MadaRow& b) {
#pragma unroll
            for (int k = 0; k < kCoefficients; ++k) a.values[k] += b.values[k];
            return a;
          },
          [](MadaRow a, int distance) {
#pragma unroll
            for (int k = 0; k < kCoefficients; ++k) a.values[k] = __shfl_down_sync(0xffffffffu, a.values[k], distance);
            return a;
          });
      if (threadIdx.x != 0) return;
      for (int k = 0; k < kCoefficients; ++k) {
        static_cast<MadaRow*>(rows)[blockIdx.x].values[k] = s.factors[k] * all.values[k];
      }
    }
  }
};

}  // namespace pace
