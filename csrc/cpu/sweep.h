// The CPU sweep: walk the operands of one tensor tile by tile, once. Operands that already are consecutive floats are
// used where they lie; others pass through a tile of scratch in the L1 cache. The loop around a rule's element is
// vectorized by the compiler. Included by kernels.cpp alone.
#pragma once

#include <utility>

#include "../codes.h"
#include "elements.h"

namespace pace {
namespace {

constexpr int64_t kLine = 64;    // elements that are asked for at once
constexpr int64_t kAhead = 256;  // and how far ahead
constexpr int64_t kLargestTile = 256;

template <class F>
void load_run(const Stream& s, int64_t at, int64_t stride, int64_t n, float* out) {
  const auto* data = static_cast<const typename F::Element*>(s.data) + at;
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = F::load(data[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = F::load(data[i * stride]);
  }
}

template <class F>
void store_run(const Stream& s, int64_t at, int64_t stride, int64_t n, const float* in) {
  auto* data = static_cast<typename F::Element*>(s.data) + at;
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) data[i] = F::store(in[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) data[i * stride] = F::store(in[i]);
  }
}

// Calls run(at, stride, done, n) for each stretch of elements [begin, begin + n) that lies evenly spaced in memory.
template <class Run>
void for_each_run(const Stream& s, int64_t begin, int64_t n, Run run) {
  if (s.ndim == 0) return run(begin, 1, 0, n);
  const int last = s.ndim - 1;
  for (int64_t done = 0; done < n;) {
    int64_t rest = begin + done, at = 0;
    const int64_t first = rest % s.sizes[last];
    for (int d = last; d >= 0; --d) {
      at += rest % s.sizes[d] * s.strides[d];
      rest /= s.sizes[d];
    }
    const int64_t left = s.sizes[last] - first, count = left < n - done ? left : n - done;
    run(at, s.strides[last], done, count);
    done += count;
  }
}

template <class F>
void load_tile(const Stream& s, int64_t begin, int64_t n, float* out) {
  for_each_run(s, begin, n, [&](int64_t at, int64_t stride, int64_t done, int64_t count) {
    load_run<F>(s, at, stride, count, out + done);
  });
}

template <class F>
void store_tile(const Stream& s, int64_t begin, int64_t n, const float* in) {
  for_each_run(s, begin, n, [&](int64_t at, int64_t stride, int64_t done, int64_t count) {
    store_run<F>(s, at, stride, count, in + done);
  });
}

void prefetch_bytes(const void* data, int64_t first, int64_t bytes) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(first);
  for (int64_t byte = 0; byte < bytes; byte += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(from + static_cast<uintptr_t>(byte)), 1);
  }
}

// Asks for the elements from `at` on. They may lie beyond the tensor: a prefetch never faults.
void prefetch_tile(const Stream& s, int64_t at) {
  if (s.data == nullptr || s.ndim != 0) return;
  const int64_t size = bytes_of(s.format);
  prefetch_bytes(s.data, at * size, kLine * size);
  if (s.rest != nullptr && s.rest->ndim == 0)
    prefetch_bytes(s.rest->data, at * bytes_of_rest(s.format), kLine * bytes_of_rest(s.format));
}

// One operand within one tile.
struct Tile {
  bool direct;
  float* data;
};

Tile open_tile(const Stream& s, int64_t begin, int64_t n, float* scratch) {
  if (s.data == nullptr) return {true, nullptr};
  if (s.ndim == 0 && s.format == Format::kFloat32) return {true, static_cast<float*>(s.data) + begin};
  switch (s.format) {
    case Format::kFloat32:
      load_tile<Float32>(s, begin, n, scratch);
      break;
    case Format::kFloat16:
      load_tile<Float16>(s, begin, n, scratch);
      break;
    default:
      load_tile<BFloat16>(s, begin, n, scratch);
      break;
  }
  return {false, scratch};
}

void close_tile(const Stream& s, int64_t begin, int64_t n, const Tile& tile) {
  if (tile.direct) return;
  switch (s.format) {
    case Format::kFloat32:
      store_tile<Float32>(s, begin, n, tile.data);
      break;
    case Format::kFloat16:
      store_tile<Float16>(s, begin, n, tile.data);
      break;
    default:
      store_tile<BFloat16>(s, begin, n, tile.data);
      break;
  }
}

}  // namespace
}  // namespace pace

#include "coded.h"

namespace pace {
namespace {

// ---- the loop around an element -------------------------------------------------------------------------------------

template <class Rule, int k>
inline __attribute__((always_inline)) float read(const float* p, int64_t i) {
  if constexpr (Rule::kUses[k].read) return p[i];
  return 0.0f;
}

template <class Rule, int k>
inline __attribute__((always_inline)) void write(float* p, int64_t i, float value) {
  if constexpr (Rule::kUses[k].written) p[i] = value;
}

template <class Rule, class Operands>
struct TileOf;

template <class Rule, int... k>
struct TileOf<Rule, std::integer_sequence<int, k...>> {
  // `data` has an address for each operand, null where it is not in play. Sums are named scalars, so that the loop
  // stays vectorized.
  static void run(const typename Rule::Scalars& scalars, int64_t n, float* const* data, BlockSums* sums) {
    const typename Rule::Scalars s = scalars;  // a local copy: stores can't change it
    float* const p[] = {data[k]...};
    if constexpr (!Rule::kSums) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        float a[] = {read<Rule, k>(p[k], i)...};
        Rule::element(s, a);
        (write<Rule, k>(p[k], i, a[k]), ...);
      }
    } else {
      float a_ = 0, b_ = 0, c_ = 0, d_ = 0, e_ = 0, f_ = 0;
      int32_t low = 0x7fffffff, high = 0;
#pragma omp simd reduction(+ : a_, b_, c_, d_, e_, f_) reduction(min : low) reduction(max : high)
      for (int64_t i = 0; i < n; ++i) {
        float a[] = {read<Rule, k>(p[k], i)...};
        const Terms t = Rule::element(s, a);
        (write<Rule, k>(p[k], i, a[k]), ...);
        a_ += t.a, b_ += t.b, c_ += t.c, d_ += t.d, e_ += t.e, f_ += t.f;
        if constexpr (Rule::kExtremes) {
          low = t.bits < low ? t.bits : low;
          high = t.bits > high ? t.bits : high;
        }
      }
      const float of_tile[] = {a_, b_, c_, d_, e_, f_};
      for (int j = 0; j < 6; ++j) sums->sum[j] += of_tile[j];
      sums->low = static_cast<uint32_t>(low) < sums->low ? static_cast<uint32_t>(low) : sums->low;
      sums->high = static_cast<uint32_t>(high) > sums->high ? static_cast<uint32_t>(high) : sums->high;
    }
  }
};

// A rule's instance for one value of its flags.
template <class Scalars>
struct Instance {
  void (*tile)(const Scalars&, int64_t, float* const*, BlockSums*);
  Walk walk;
  uint32_t read, written;  // a bit for each operand
};

template <class Rule>
constexpr Instance<typename Rule::Scalars> instance_of() {
  Instance<typename Rule::Scalars> instance{nullptr, Rule::kWalk, 0, 0};
  if constexpr (Rule::kThere) {
    instance.tile = TileOf<Rule, std::make_integer_sequence<int, Rule::kOperands>>::run;
    for (int k = 0; k < Rule::kOperands; ++k) {
      instance.read |= (Rule::kUses[k].read ? 1u : 0u) << k;
      instance.written |= (Rule::kUses[k].written ? 1u : 0u) << k;
    }
  }
  return instance;
}

template <template <unsigned> class Rule, unsigned... kFlags>
const Instance<typename Rule<0>::Scalars>& instance(unsigned flags, std::integer_sequence<unsigned, kFlags...>) {
  static constexpr Instance<typename Rule<0>::Scalars> kInstances[] = {instance_of<Rule<kFlags>>()...};
  return kInstances[flags];
}

// Tile by tile. `coded`: the operands in codes, or Plain.
template <int kOperands, class Scalars, class Codes>
inline __attribute__((always_inline)) void walk(const Stream* streams, const void* scalars,
                                                const Instance<Scalars>& its, Codes& coded, int64_t begin, int64_t end,
                                                BlockSums* sums) {
  alignas(64) float scratch[kOperands][kLargestTile];
  const int64_t step = coded.any() ? kLargestTile : its.walk.tile;
  for (int64_t at = begin; at < end; at += step) {
    const int64_t n = end - at < step ? end - at : step;
    for (int64_t ahead = kAhead; its.walk.ahead && ahead < kAhead + step && at + ahead < end; ahead += kLine) {
      for (int k = 0; k < kOperands; ++k) {
        if ((coded.read >> k & 1) != 0) prefetch_tile(streams[k], at + ahead);
      }
    }
    Tile open[kOperands];
    float* data[kOperands];
    for (int k = 0; k < kOperands; ++k) {
      if (coded.has(k)) {
        open[k] = {true, coded.opened(k, at, n, data, scratch[k])};
      } else {
        open[k] = (coded.read >> k & 1) != 0 ? open_tile(streams[k], at, n, scratch[k]) : Tile{true, nullptr};
      }
      data[k] = open[k].data;
    }
    its.tile(*static_cast<const Scalars*>(scalars), n, data, sums);
    if (coded.any()) coded.close(at, n, data);
    for (int k = 0; k < kOperands; ++k) {
      if ((its.written >> k & 1) != 0) close_tile(streams[k], at, n, open[k]);
    }
  }
}

// Elements [begin, end) of one tensor: `Sweep` in kernels.h, for every rule. Where nothing is coded the loop over tiles
// is one of its own, without a question about codes: with them schedule-free in float32 took 1.18 times as long.
template <template <unsigned> class Rule>
void sweep(const Stream* streams, const void* scalars, unsigned flags, const Rounding* rounding, int64_t begin,
           int64_t end, BlockSums* sums) {
  constexpr int kOperands = Rule<0>::kOperands;
  using Scalars = typename Rule<0>::Scalars;
  const Instance<Scalars>& its = instance<Rule>(flags, std::make_integer_sequence<unsigned, Rule<0>::Flag::values>{});
  if (rounding == nullptr) {
    Plain plain{its.read};
    walk<kOperands>(streams, scalars, its, plain, begin, end, sums);
  } else {
    Coded<Rule<0>> coded(streams, *rounding, its.read, its.written);
    walk<kOperands>(streams, scalars, its, coded, begin, end, sums);
  }
}

}  // namespace
}  // namespace pace
