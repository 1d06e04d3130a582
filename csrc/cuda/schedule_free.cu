// Schedule-free AdamW on the GPU: csrc/rules/schedule_free.h in the sweep of sweep.cuh.
#include "kernels.h"
#include "sweep.cuh"

namespace pace {

template <class X, class G>
struct ScheduleFreeRound {
  void* y;
  const void* g;
  float *v, *z;
  const ScheduleFreeScalars& scalars;

  template <int N>
  __device__ __forceinline__ void run(int64_t at) const {
    const ScheduleFreeScalars s = scalars;
    Vector<X, N> ys;
    Vector<G, N> gs;
    Vector<Float32, N> vs, zs;
    ys.load(y, at);
    gs.load(g, at);
    vs.load(v, at);
    zs.load(z, at);
    loads_end();
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const ScheduleFreeStep r = schedule_free_rule(s, gs.get(j), ys.get(j), vs.get(j), zs.get(j));
      ys.set(j, r.y), vs.set(j, r.v), zs.set(j, r.z);
    }
    ys.store(y, at);
    vs.store(v, at);
    zs.store(z, at);
  }
};

// 8 blocks a multiprocessor leave 64 registers a thread, 6 leave 80, which eight elements of a 16-bit format need.
template <class X, class G>
constexpr int kScheduleFreeBlocks = kVector<X, G> == 4 ? 8 : 6;

template <class X, class G>
__global__ void __launch_bounds__(kThreads, kScheduleFreeBlocks<X, G>)
    schedule_free_kernel(const __grid_constant__ ScheduleFreeLaunch launch) {
  if (skipped(launch.found_inf)) return;
  __shared__ ScheduleFreeScalars scalars;
  const Stretch part = find_stretch(launch.table);
  copy_scalars(&scalars, launch.scalars, launch.device_scalars, part.tensor);
  const int i = part.tensor;
  const ScheduleFreeRound<X, G> round{launch.y[i], launch.g[i], launch.v[i], launch.z[i], scalars};
  sweep<kVector<X, G>>(part, all_aligned(round.y, round.g, round.v, round.z), round);
}

__global__ void __launch_bounds__(kThreads)
    schedule_free_scalars_kernel(const __grid_constant__ ScheduleFreeScalarsLaunch launch) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i >= launch.tensors || skipped(launch.found_inf)) return;
  const StepAddress step = launch.step[i];
  const double t = read(step, launch.steps_taken) + 1.0;
  ScheduleFreeOptions options = launch.options;
  options.lr = read(launch.lr);
  if (launch.schedule != nullptr) options.count = launch.schedule[0], options.share = launch.schedule[1];
  launch.out[i] = schedule_free_scalars(options, read(launch.factor));
  write(step, t);
}

template <class X, class G>
const void* schedule_free_function(const KernelId&) {
  return (const void*)schedule_free_kernel<X, G>;
}

const void* schedule_free_kernel_function(const KernelId& id) { return PACE_BY_FORMAT(schedule_free_function, id); }

const void* schedule_free_scalars_function() { return (const void*)schedule_free_scalars_kernel; }

}  // namespace pace
