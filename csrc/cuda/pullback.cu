// The pullback on the GPU: csrc/rules/pullback.h in the sweeps of sweep.cuh and, of codes, general.cuh.
#include "general.cuh"
#include "stats.cuh"

namespace pace {

template <unsigned flags>
struct Pullback {
  using Rule = PullbackRule;
  using D = Rule::D;
  using Uses = D::Uses<flags>;
  using Scalars = Rule::Scalars;
  using Sums = std::conditional_t<Uses::stats, PaceThreadSums, NoSums>;
  static constexpr unsigned kFlags = flags;
  static constexpr bool kThere = Uses::average && (Uses::pull || !(Uses::before || Uses::moment));
  static constexpr bool kThereInCodes = kThere, kScalarsAnew = false;
  // Blocks a multiprocessor, so that 30 KB are in flight (tests/test_cuda_machine_code.py): the fewer operands, the
  // more blocks. A 16-bit format has 8 elements of each in flight, float32 has 4.
  static constexpr int blocks(int vector) {
    const bool most = Uses::stats && (vector == 8 || (Uses::before && Uses::moment));
    return most ? 4 : (Uses::before || Uses::moment || vector == 8 ? 5 : 8);
  }
  static constexpr int kBlocksInCodes = Uses::stats ? 5 : 6;

  struct Now {
    bool moves;
    __device__ __forceinline__ Now(const Scalars& s, uint32_t) : moves(s.rule.moves != 0) {}
    __device__ __forceinline__ bool reads(int) const { return moves; }
    __device__ __forceinline__ bool writes(int) const { return moves; }
  };

  static __device__ __forceinline__ void step(const Scalars& s, const Now&, float (&a)[D::kOperands], Sums& sums) {
    const PaceStep r = pullback_rule<Uses::before, Uses::moment, Uses::pull, true>(s.rule, a[D::kX], a[D::kBefore],
                                                                                   a[D::kV], a[D::kE]);
    a[D::kX] = r.x, a[D::kE] = r.e;
    if constexpr (Uses::stats) sums.add(r);
  }
  static __device__ __forceinline__ void finish(const Sums& sums, const Scalars& s, void* rows, int count) {
    finish_stats(sums, s, rows, count);
  }
};

template <class X, class V>
const void* with_moment(const KernelId& id) {
  return instances<Pullback, X, V>(id);
}

template <>
const void* sweep_function<PullbackRule>(const KernelId& id) {
  return PACE_BY_FORMAT(with_moment, id);
}

template <>
const void* coded_function<PullbackRule>(const KernelId& id) {
  return general_function<Pullback>(id);
}

}  // namespace pace
