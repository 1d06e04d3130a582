// PACE on the GPU: csrc/rules/pace.h in the sweep of sweep.cuh.
#include "kernels.h"
#include "stats.cuh"

namespace pace {

template <class X, class G, bool kMoment, bool kPull, bool kAverage, bool kStats>
struct PaceRound {
  void* x;
  const void* g;
  float *m, *v, *e;
  const PaceStepScalars& scalars;
  PaceThreadSums& sums;

  template <int N>
  __device__ __forceinline__ void run(int64_t at) const {
    const PaceScalars s = scalars.rule;
    const bool moves = kAverage && s.moves != 0;
    Vector<X, N> xs;
    Vector<G, N> gs;
    Vector<Float32, N> ms, vs, es;
    xs.load(x, at);
    gs.load(g, at);
    if constexpr (kMoment) ms.load(m, at);
    vs.load(v, at);
    if constexpr (kAverage) {
      if (kPull || moves) es.load(e, at);
    }
    loads_end();
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const PaceStep r = pace_rule<kMoment, kPull, kAverage>(s, gs.get(j), xs.get(j), kMoment ? ms.get(j) : 0.0f,
                                                             vs.get(j), kAverage ? es.get(j) : 0.0f);
      xs.set(j, r.x);
      if constexpr (kMoment) ms.set(j, r.m);
      vs.set(j, r.v);
      if constexpr (kAverage) es.set(j, r.e);
      if constexpr (kStats) sums.add(r);
    }
    xs.store(x, at);
    if constexpr (kMoment) ms.store(m, at);
    vs.store(v, at);
    if constexpr (kAverage) {
      if (moves) es.store(e, at);
    }
  }
};

// kAverage: an average is kept; whether it moves in this step is a scalar. 5 blocks a multiprocessor leave 96 registers
// a thread, 4 leave 128, which the sums need.
template <class X, class G, bool kMoment, bool kPull, bool kAverage, bool kStats>
__global__ void __launch_bounds__(kThreads, kStats ? 4 : 5) pace_kernel(const __grid_constant__ PaceLaunch launch) {
  if (skipped(launch.found_inf)) return;
  __shared__ PaceStepScalars scalars;
  const Stretch part = find_stretch(launch.table);
  copy_scalars(&scalars, launch.scalars, launch.device_scalars, part.tensor);
  PaceThreadSums sums;
  const int i = part.tensor;
  const PaceRound<X, G, kMoment, kPull, kAverage, kStats> round{launch.x[i], launch.g[i], launch.m[i], launch.v[i],
                                                                launch.e[i], scalars,     sums};
  sweep<kVector<X, G>>(part, all_aligned(round.x, round.g, round.m, round.v, round.e), round);
  if constexpr (kStats) {
    const PaceSums all = block_sums(sums);
    if (threadIdx.x == 0) block_stats(launch.rows[blockIdx.x].stats, all, part.count, scalars.stat);
  }
}

__global__ void __launch_bounds__(kThreads) pace_scalars_kernel(const __grid_constant__ PaceScalarsLaunch launch) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i >= launch.tensors || skipped(launch.found_inf)) return;
  const StepAddress step = launch.step[i];
  const double t = read(step, launch.steps_taken) + 1.0;
  PaceOptions options = launch.options;
  options.lr = read(launch.lr);
  PaceStepScalars& out = launch.out[i];
  clear_words(out);
  out.rule = pace_scalars(options, t, read(launch.factor));
  out.stat = pace_stat_scalars(options, t);
  write(step, t);
}

template <class X, class G>
const void* pace_function(const KernelId& id) {
#define PULLED(m, p, a)                                                                           \
  {                                                                                               \
    (const void*)pace_kernel<X, G, m, p, a, false>, (const void*)pace_kernel<X, G, m, p, a, true> \
  }
  static const void* const functions[2][3][2] = {
      {PULLED(false, false, false), PULLED(false, false, true), PULLED(false, true, true)},
      {PULLED(true, false, false), PULLED(true, false, true), PULLED(true, true, true)}};
#undef PULLED
  return functions[id.moment][id.pull ? 2 : (id.average ? 1 : 0)][id.stats];
}

const void* pace_kernel_function(const KernelId& id) { return PACE_BY_FORMAT(pace_function, id); }

const void* pace_scalars_function() { return (const void*)pace_scalars_kernel; }

}  // namespace pace
