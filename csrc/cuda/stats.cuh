// PACE's telemetry on the GPU: what a thread sums, and the sums of a block.
#pragma once

#include "sweep.cuh"

namespace pace {

// What a thread sums, in float as on the CPU: at most 32 elements.
struct PaceThreadSums {
  float inv_D = 0, clamped = 0, clipped = 0, adamw_sq = 0, pullback_sq = 0, update_sq = 0;
  uint32_t min_inv_D = kNoSums.min_inv_D, max_inv_D = kNoSums.max_inv_D;

  __device__ __forceinline__ void add(const PaceStep& r) {
    inv_D += r.inv_D;
    clamped += r.clamped;
    clipped += r.lambda >= 1.0f ? 1.0f : 0.0f;
    adamw_sq += r.adamw * r.adamw;
    pullback_sq += r.pullback * r.pullback;
    update_sq += r.update * r.update;
    const uint32_t bits = bits_of(r.inv_D) & 0x7fffffffu;
    min_inv_D = bits < min_inv_D ? bits : min_inv_D;
    max_inv_D = bits > max_inv_D ? bits : max_inv_D;
  }
};

// The sums of all threads, in thread 0.
__device__ __forceinline__ PaceSums block_sums(const PaceThreadSums& sums) {
  __shared__ PaceSums warps[kThreads / 32];
  const PaceSums mine{sums.inv_D,       sums.clamped,   sums.clipped,   sums.adamw_sq,
                      sums.pullback_sq, sums.update_sq, sums.min_inv_D, sums.max_inv_D};
  return block_reduce(
      mine, warps,
      [](const PaceSums& a, const PaceSums& b) {
        return PaceSums{a.inv_D + b.inv_D,
                        a.clamped + b.clamped,
                        a.clipped + b.clipped,
                        a.adamw_sq + b.adamw_sq,
                        a.pullback_sq + b.pullback_sq,
                        a.update_sq + b.update_sq,
                        a.min_inv_D < b.min_inv_D ? a.min_inv_D : b.min_inv_D,
                        a.max_inv_D > b.max_inv_D ? a.max_inv_D : b.max_inv_D};
      },
      [](const PaceSums& a, int distance) {
        const auto from = [&](auto value) { return __shfl_down_sync(0xffffffffu, value, distance); };
        return PaceSums{from(a.inv_D),       from(a.clamped),   from(a.clipped),   from(a.adamw_sq),
                        from(a.pullback_sq), from(a.update_sq), from(a.min_inv_D), from(a.max_inv_D)};
      });
}

// The statistics of a block, where a kernel sums.
template <class Scalars>
__device__ __forceinline__ void finish_stats(const PaceThreadSums& sums, const Scalars& s, void* rows, int count) {
  const PaceSums all = block_sums(sums);
  if (threadIdx.x == 0) block_stats(static_cast<PaceRow*>(rows)[blockIdx.x].values, all, count, s.stat);
}
template <class Scalars>
__device__ __forceinline__ void finish_stats(const NoSums&, const Scalars&, void*, int) {}

}  // namespace pace
