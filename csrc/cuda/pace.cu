// PACE on the GPU: csrc/rules/pace.h in the sweep of sweep.cuh.
#include <cstdlib>

#include "stats.cuh"

namespace pace {

// Flag::average: an average is kept; whether it moves in this step is a scalar.
template <unsigned flags>
struct Pace {
  using Rule = PaceRule;
  using D = Rule::D;
  using Uses = D::Uses<flags>;
  using Scalars = Rule::Scalars;
  using Sums = std::conditional_t<Uses::stats, PaceThreadSums, NoSums>;
  static constexpr unsigned kFlags = flags;
  static constexpr bool kThere = Uses::average || !Uses::pull;
  static constexpr bool kScalarsAnew = false;
  // 5 blocks a multiprocessor leave 96 registers a thread, 4 leave 128, which the sums need.
  static constexpr int blocks(int) { return Uses::stats ? 4 : 5; }

  struct Now {
    bool moves;
    __device__ __forceinline__ Now(const Scalars& s, uint32_t) : moves(Uses::average && s.rule.moves != 0) {}
    __device__ __forceinline__ bool reads(int) const { return moves; }
    __device__ __forceinline__ bool writes(int) const { return moves; }
  };

  static __device__ __forceinline__ void step(const Scalars& s, const Now&, float (&a)[D::kOperands], Sums& sums) {
    const PaceStep r =
        pace_rule<Uses::moment, Uses::pull, Uses::average>(s.rule, a[D::kG], a[D::kX], a[D::kM], a[D::kV], a[D::kE]);
    a[D::kX] = r.x, a[D::kM] = r.m, a[D::kV] = r.v, a[D::kE] = r.e;
    if constexpr (Uses::stats) sums.add(r);
  }
  static __device__ __forceinline__ void finish(const Sums& sums, const Scalars& s, void* rows, int count) {
    finish_stats(sums, s, rows, count);
  }
};

#ifdef PACE_VARIANTS  // what `make gpu` times beside the bounds above: they are kept until another is measured faster
template <unsigned flags>
struct PaceTight : Pace<flags> {
  // 6 leave 80 registers; 16-bit formats spill with 7, and float32, of which 8 fit already, with 9 (sm_90).
  static constexpr int blocks(int) { return Pace<flags>::Uses::stats ? 4 : 6; }
};
#endif

template <class X, class G>
const void* pace_instances(const KernelId& id) {
#ifdef PACE_VARIANTS
  if (std::getenv("PACE_VARIANT") != nullptr) return instances<PaceTight, X, G>(id);
#endif
  return instances<Pace, X, G>(id);
}

template <>
const void* sweep_function<PaceRule>(const KernelId& id) {
  return PACE_BY_FORMAT(pace_instances, id);
}

}  // namespace pace
