// The exchange of two tensors in the CPU sweep. Included by kernels.cpp alone.
#pragma once

#include "sweep.h"

namespace pace {
namespace {

void swap(const Stream& a_stream, const Stream& b_stream, int64_t begin, int64_t end) {
  alignas(64) float scratch[2][kTile];
  for (int64_t at = begin; at < end; at += kTile) {
    const int64_t n = end - at < kTile ? end - at : kTile;
    const Tile a = open_tile(a_stream, at, n, scratch[0]), b = open_tile(b_stream, at, n, scratch[1]);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float kept = a.data[i];
      a.data[i] = b.data[i];
      b.data[i] = kept;
    }
    close_tile(a_stream, at, n, a);
    close_tile(b_stream, at, n, b);
  }
}

}  // namespace
}  // namespace pace
