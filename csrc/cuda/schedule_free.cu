// Schedule-free AdamW on the GPU: csrc/rules/schedule_free.h in the sweeps of sweep.cuh and, of codes, general.cuh.
#include "general.cuh"

namespace pace {

template <unsigned flags>
struct ScheduleFree {
  using Rule = ScheduleFreeRule;
  using D = Rule::D;
  using Uses = D::Uses<flags>;
  using Scalars = Rule::Scalars;
  using Sums = NoSums;
  static constexpr unsigned kFlags = flags;
  static constexpr bool kThere = !Uses::increment, kThereInCodes = true, kScalarsAnew = false;
  // 8 blocks a multiprocessor leave 64 registers a thread, 6 leave 80, which eight elements of a 16-bit format need.
  static constexpr int blocks(int vector) { return vector == 4 ? 8 : 6; }
  static constexpr int kBlocksInCodes = 6;

  struct Now {
    __device__ __forceinline__ Now(const Scalars&, uint32_t) {}
    __device__ __forceinline__ bool reads(int) const { return true; }
    __device__ __forceinline__ bool writes(int) const { return true; }
  };

  static __device__ __forceinline__ void step(const Scalars& s, const Now&, float (&a)[D::kOperands], Sums&) {
    const ScheduleFreeStep r = schedule_free_rule<Uses::increment>(s.rule, a[D::kG], a[D::kY], a[D::kV], a[D::kZ]);
    a[D::kY] = r.y, a[D::kV] = r.v, a[D::kZ] = r.z;
  }
  static __device__ __forceinline__ void finish(const Sums&, const Scalars&, void*, int) {}
};

template <class X, class G>
const void* schedule_free_instances(const KernelId& id) {
  return instances<ScheduleFree, X, G>(id);
}

template <>
const void* sweep_function<ScheduleFreeRule>(const KernelId& id) {
  return PACE_BY_FORMAT(schedule_free_instances, id);
}

template <>
const void* coded_function<ScheduleFreeRule>(const KernelId& id) {
  return general_function<ScheduleFree>(id);
}

}  // namespace pace
