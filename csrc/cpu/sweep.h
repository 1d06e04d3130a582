// The CPU sweep: walk the operands of one tensor tile by tile, once. Operands that already are consecutive floats are
// used where they lie; others pass through a tile of scratch in the L1 cache. Included by kernels.cpp alone.
#pragma once

#include "kernels.h"

namespace pace {
namespace {

// A tile is 64 elements, and memory is asked for 256 elements (1 KiB of float32) ahead of it. The hardware prefetcher
// stops at each 4 KiB page, of each of five operands; this goes on. PACE, 32 M float32 parameters, 2 cores, medians:
// 24.4 ms; with tiles of 1,024 and no prefetch 27.2 ms; with tiles of 128 to 1,024 and one tile's lines at once 25
// to 32.
constexpr int64_t kTile = 64;
constexpr int64_t kAhead = 256;

// With telemetry a tile is 256 elements: what a reduction costs after its loop (gcc adds the lanes of each of eight
// sums one by one) comes once a tile. PACE with telemetry, 32 M parameters, 2 cores with AVX-512, in times of PACE
// without: tiles of 64 1.75 (float32) and 1.74 (bfloat16), of 256 1.49 and 1.25, of 512 1.57 and 1.35 (medians of three
// runs).
constexpr int64_t kStatsTile = 256;

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

// Asks for the tile that starts at element `at`. It may lie beyond the tensor: a prefetch never faults.
void prefetch_tile(const Stream& s, int64_t at) {
  if (s.data == nullptr || s.ndim != 0) return;
  const int64_t size = s.format == Format::kFloat32 ? 4 : 2;
  const uintptr_t first = reinterpret_cast<uintptr_t>(s.data) + static_cast<uintptr_t>(at * size);
  for (int64_t byte = 0; byte < kTile * size; byte += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(first + static_cast<uintptr_t>(byte)), 1);
  }
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
    case Format::kBFloat16:
      load_tile<BFloat16>(s, begin, n, scratch);
      break;
    case Format::kFloat16:
      load_tile<Float16>(s, begin, n, scratch);
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
    case Format::kBFloat16:
      store_tile<BFloat16>(s, begin, n, tile.data);
      break;
    case Format::kFloat16:
      store_tile<Float16>(s, begin, n, tile.data);
      break;
  }
}

}  // namespace
}  // namespace pace
