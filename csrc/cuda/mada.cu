// MADA on the GPU: csrc/rules/mada.h in the sweep of sweep.cuh. setup.py compiles this file once for each pair of
// formats, PACE_X and PACE_G, since there are many instances.
#include "kernels.h"
#include "sweep.cuh"

namespace pace {

struct MadaThreadSums {
  float beta1 = 0, beta2 = 0, beta3 = 0, rho = 0, c = 0, gamma = 0;
};

// kLag: moments are one step behind; the last step is redone, and its hypergradient terms are summed.
template <class X, class G, bool kLag, bool kDiff, bool kSecond, bool kLion, bool kAdam>
struct MadaRound {
  void* x;
  const void* g;
  float *m, *n, *v, *w, *l, *last, *older, *e;
  const MadaStepScalars& scalars;
  bool average;     // e takes part
  bool roles_stay;  // see MadaLaunch
  MadaThreadSums& sums;

  template <int N>
  __device__ __forceinline__ void run(int64_t at) const {
    asm volatile("" ::: "memory");  // scalars are read anew in each round, instead of kept in registers
    const bool first = scalars.first != 0;
    Vector<X, N> xs;
    Vector<G, N> gs;
    Vector<Float32, N> ms, ns, vs, ws, ls, lasts, olders, es;
    xs.load(x, at);
    gs.load(g, at);
    if constexpr (kAdam) ms.load(m, at);
    if constexpr (kDiff) ns.load(n, at);
    if constexpr (kAdam) vs.load(v, at);
    if constexpr (kSecond) ws.load(w, at);
    if constexpr (kLion) ls.load(l, at);
    if constexpr (kLag || kDiff) lasts.load(last, at);
    if constexpr (kLag && kDiff) olders.load(older, at);
    if (average) es.load(e, at);
    loads_end();
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float g_ = scalars.pull.grad_factor * gs.get(j);
      const float last_g = kLag || kDiff ? (first ? g_ : lasts.get(j)) : 0.0f;
      float m_ = kAdam ? ms.get(j) : 0.0f, n_ = kDiff ? ns.get(j) : 0.0f, v_ = kAdam ? vs.get(j) : 0.0f;
      float w_ = kSecond ? ws.get(j) : 0.0f, l_ = kLion ? ls.get(j) : 0.0f;
      if constexpr (kLag) {
        const float older_g = kDiff ? olders.get(j) : 0.0f;
        // Without an average the gain of its pull is 0, and the terms the same to the bit.
        const MadaStep r =
            mada_rule<kAdam, kDiff, kSecond, kLion, true>(scalars.last, last_g, older_g, g_, m_, n_, v_, w_, l_);
        add(r);
        m_ = r.m, n_ = r.n, v_ = r.v, w_ = r.w, l_ = r.l;
      }
      const MadaStep r =
          mada_rule<kAdam, kDiff, kSecond, kLion, false>(scalars.now, g_, last_g, 0.0f, m_, n_, v_, w_, l_);
      const float x_ = xs.get(j);
      const MadaWeights without = mada_weights<kAdam, false>(scalars.pull, x_, 0.0f, r.update, r.inv_D);
      const MadaWeights with = mada_weights<kAdam, true>(scalars.pull, x_, es.get(j), r.update, r.inv_D);
      xs.set(j, average ? with.x : without.x);
      es.set(j, with.e);
      if constexpr (!kLag) m_ = r.m, n_ = r.n, v_ = r.v, w_ = r.w, l_ = r.l;
      if constexpr (kAdam) ms.set(j, m_);
      if constexpr (kDiff) ns.set(j, n_);
      if constexpr (kAdam) vs.set(j, v_);
      if constexpr (kSecond) ws.set(j, w_);
      if constexpr (kLion) ls.set(j, l_);
      if constexpr (kLag && kDiff) olders.set(j, roles_stay ? last_g : g_);
      if constexpr (kLag || kDiff) lasts.set(j, g_);
    }
    xs.store(x, at);
    if constexpr (kAdam) ms.store(m, at);
    if constexpr (kDiff) ns.store(n, at);
    if constexpr (kAdam) vs.store(v, at);
    if constexpr (kSecond) ws.store(w, at);
    if constexpr (kLion) ls.store(l, at);
    if constexpr (kLag && kDiff) {
      olders.store(older, at);
      if (roles_stay || first) lasts.store(last, at);
    } else if constexpr (kLag || kDiff) {
      lasts.store(last, at);
    }
    if (average && scalars.pull.moves != 0) es.store(e, at);
  }

  __device__ __forceinline__ void add(const MadaStep& r) const {
    sums.beta1 += r.beta1;
    sums.beta2 += r.beta2;
    if constexpr (kDiff) sums.beta3 += r.beta3;
    if constexpr (kSecond) sums.rho += r.rho;
    sums.c += r.c;
    if constexpr (kLion) sums.gamma += r.gamma;
  }
};

// 3 blocks a multiprocessor leave 168 registers a thread, 2 leave 255: a 16-bit format has 8 elements in flight.
template <class X, class G, bool kLag, bool kDiff, bool kSecond, bool kLion, bool kAdam>
__global__ void __launch_bounds__(kThreads, kVector<X, G> == 4 ? 3 : 2)
    mada_kernel(const __grid_constant__ MadaLaunch launch) {
  if (skipped(launch.found_inf)) return;
  __shared__ MadaStepScalars scalars;
  const Stretch part = find_stretch(launch.table);
  copy_scalars(&scalars, launch.scalars, launch.device_scalars, part.tensor);
  MadaThreadSums sums;
  const int i = part.tensor;
  const MadaRound<X, G, kLag, kDiff, kSecond, kLion, kAdam> round{
      launch.x[i],
      launch.g[i],
      launch.m[i],
      launch.n[i],
      launch.v[i],
      launch.w[i],
      launch.l[i],
      launch.last_g[i],
      launch.older_g[i],
      launch.e[i],
      scalars,
      launch.e[i] != nullptr && (launch.pull != 0 || scalars.pull.moves != 0),
      launch.roles_stay != 0,
      sums,
  };
  const bool aligned =
      all_aligned(round.x, round.g, round.m, round.n, round.v, round.w, round.l, round.last, round.older, round.e);
  sweep<kVector<X, G>>(part, aligned, round);
  if constexpr (kLag) {
    __shared__ MadaRow warps[kThreads / 32];
    const MadaRow all = block_reduce(
        MadaRow{{sums.beta1, sums.beta2, sums.beta3, sums.rho, sums.c, sums.gamma}}, warps,
        [](MadaRow a, const MadaRow& b) {
#pragma unroll
          for (int k = 0; k < kCoefficients; ++k) a.sums[k] += b.sums[k];
          return a;
        },
        [](MadaRow a, int distance) {
#pragma unroll
          for (int k = 0; k < kCoefficients; ++k) a.sums[k] = __shfl_down_sync(0xffffffffu, a.sums[k], distance);
          return a;
        });
    if (threadIdx.x == 0) {
      for (int k = 0; k < kCoefficients; ++k) launch.rows[blockIdx.x].sums[k] = scalars.factors[k] * all.sums[k];
    }
  }
}

// All combinations with Adam's moments; without them there is Lion alone, and nothing is learned.
template <class X, class G>
const void* mada_function(const KernelId& id) {
#define LION(a, b, c) \
  {(const void*)mada_kernel<X, G, a, b, c, false, true>, (const void*)mada_kernel<X, G, a, b, c, true, true>}
#define SECOND(a, b)                    \
  {                                     \
    LION(a, b, false), LION(a, b, true) \
  }
  static const void* const functions[2][2][2][2] = {{SECOND(false, false), SECOND(false, true)},
                                                    {SECOND(true, false), SECOND(true, true)}};
#undef SECOND
#undef LION
  if (!id.adam) return (const void*)mada_kernel<X, G, false, false, false, true, false>;
  return functions[id.lag][id.diff][id.second][id.lion];
}

template const void* mada_function<PACE_X, PACE_G>(const KernelId& id);

}  // namespace pace
