// The pullback behind another optimizer's step, on the GPU: csrc/rules/pullback.h in the sweep of sweep.cuh.
#include "kernels.h"
#include "stats.cuh"

namespace pace {

template <class X, class V, bool kBefore, bool kMoment, bool kPull, bool kStats>
struct PullbackRound {
  void* x;
  const void *before, *v;
  float* e;
  const PullbackStepScalars& scalars;
  PaceThreadSums& sums;

  template <int N>
  __device__ __forceinline__ void run(int64_t at) const {
    const PullbackScalars s = scalars.rule;
    const bool moves = s.moves != 0;
    Vector<X, N> xs, befores;
    Vector<V, N> vs;
    Vector<Float32, N> es;
    xs.load(x, at);
    if constexpr (kBefore) befores.load(before, at);
    if constexpr (kMoment) vs.load(v, at);
    if (kPull || moves) es.load(e, at);
    loads_end();
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const PaceStep r = pullback_rule<kBefore, kMoment, kPull, true>(s, xs.get(j), kBefore ? befores.get(j) : 0.0f,
                                                                      kMoment ? vs.get(j) : 0.0f, es.get(j));
      if constexpr (kPull) xs.set(j, r.x);
      es.set(j, r.e);
      if constexpr (kStats) sums.add(r);
    }
    if constexpr (kPull) xs.store(x, at);
    if (moves) es.store(e, at);
  }
};

// Blocks a multiprocessor, so that 30 KB are in flight (tests/test_cuda_machine_code.py): the fewer operands, the more
// blocks. A 16-bit format has 8 elements of each in flight, float32 has 4.
template <class X, bool kBefore, bool kMoment, bool kStats>
constexpr int kPullbackBlocks =
    kBefore && kMoment ? (kStats ? 4 : 5) : (kBefore || kMoment || sizeof(typename X::Element) == 2 ? 5 : 8);

template <class X, class V, bool kBefore, bool kMoment, bool kPull, bool kStats>
__global__ void __launch_bounds__(kThreads, kPullbackBlocks<X, kBefore, kMoment, kStats>)
    pullback_kernel(const __grid_constant__ PullbackLaunch launch) {
  if (skipped(launch.found_inf)) return;
  __shared__ PullbackStepScalars scalars;
  const Stretch part = find_stretch(launch.table);
  copy_scalars(&scalars, launch.scalars, launch.device_scalars, part.tensor);
  PaceThreadSums sums;
  const int i = part.tensor;
  const PullbackRound<X, V, kBefore, kMoment, kPull, kStats> round{launch.x[i], launch.before[i], launch.v[i],
                                                                   launch.e[i], scalars,          sums};
  sweep<kVector<X, V>>(part, all_aligned(round.x, round.before, round.v, round.e), round);
  if constexpr (kStats) {
    const PaceSums all = block_sums(sums);
    if (threadIdx.x == 0) block_stats(launch.rows[blockIdx.x].stats, all, part.count, scalars.stat);
  }
}

__global__ void __launch_bounds__(kThreads)
    pullback_scalars_kernel(const __grid_constant__ PullbackScalarsLaunch launch) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i >= launch.tensors || skipped(launch.found_inf)) return;
  const StepAddress step = launch.step[i];
  const double t = read(step, launch.steps_taken) + 1.0;
  PullbackOptions options = launch.options;
  options.lr = read(launch.lr);
  PullbackStepScalars& out = launch.out[i];
  clear_words(out);
  out.rule = pullback_scalars(options, t);
  out.stat = pullback_stat_scalars(options, t);
  write(step, t);
}

#define STATS(v, b, m, p) \
  {(const void*)pullback_kernel<X, v, b, m, p, false>, (const void*)pullback_kernel<X, v, b, m, p, true>}

// Without a second moment its format is that of the weights, so that there is one instance.
template <class X, class V>
const void* pullback_function(const KernelId& id) {
  static const void* const average[2] = STATS(X, false, false, false);
  static const void* const constant[2][2] = {STATS(X, false, false, true), STATS(X, true, false, true)};
  static const void* const clipped[2][2] = {STATS(V, false, true, true), STATS(V, true, true, true)};
  if (!id.pull) return average[id.stats];
  return (id.moment ? clipped : constant)[id.before][id.stats];
}

#undef STATS

const void* pullback_kernel_function(const KernelId& id) { return PACE_BY_FORMAT(pullback_function, id); }

const void* pullback_scalars_function() { return (const void*)pullback_scalars_kernel; }

}  // namespace pace
