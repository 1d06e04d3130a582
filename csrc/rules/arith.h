// Marks and the few operations that rules are written with. A rule is plain scalar float code: a CUDA thread runs it
// per element; on the CPU the compiler vectorizes the loop around it.
//
// Arithmetic contract: every operation is rounded once, in the order written, and nothing is contracted into a fused
// multiply-add (-ffp-contract=off, -fmad=false). An element's result then depends on its inputs alone: not on the
// instruction set, the vector width, its place in the tensor, or how tensors are sharded. The kernels wait for memory,
// so this costs nothing.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PACE_ON_BOTH __host__ __device__ __forceinline__
#define PACE_RULE static PACE_ON_BOTH
#else
#define PACE_ON_BOTH inline __attribute__((always_inline))
#define PACE_RULE static PACE_ON_BOTH
#endif

namespace pace {

constexpr float kSmallestNormal = 0x1p-126f;

PACE_RULE float square_root(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(a);
#else
  return __builtin_sqrtf(a);
#endif
}

PACE_RULE float smaller(float a, float b) { return a < b ? a : b; }
PACE_RULE float larger(float a, float b) { return a > b ? a : b; }

// −1, 0 or 1.
PACE_RULE float sign(float a) { return a > 0.0f ? 1.0f : (a < 0.0f ? -1.0f : 0.0f); }

// e₊ = e + w (x − e): rounded thrice, it leaves an average of weights at rest where it is, which (1 − w) e + w x, both
// weights rounded, does not. Where w is 1 it is x itself, so that a burn-in copies: e + (x − e) may miss x by a
// rounding.
PACE_RULE float averaged(float e, float x, float w) { return w == 1.0f ? x : e + w * (x - e); }

}  // namespace pace
