// The CUDA sweep: a block finds its stretch of a tensor, each thread takes vectors of 16 bytes a memory access, all
// loads of a round before the first use; what is left over, and tensors that are not aligned to 16 bytes, element by
// element, through the same function.
#pragma once

#include "launches.h"

namespace pace {

// N consecutive elements of a format, in registers as they lie in memory. N = 1, or as many as fill 16 bytes or more.
template <class F, int N>
struct Vector {
  static constexpr int kBytes = N * static_cast<int>(sizeof(typename F::Element));
  static_assert(N == 1 || kBytes % 16 == 0);
  uint32_t words[(kBytes + 3) / 4];

  __device__ __forceinline__ void load(const void* data, int64_t at) {
    const auto* const p = static_cast<const typename F::Element*>(data) + at;
    __builtin_assume(__isGlobal(p));
    if constexpr (N == 1) {
      if constexpr (kBytes == 4) {
        words[0] = bits_of(*p);
      } else {
        words[0] = *p;
      }
    } else {
#pragma unroll
      for (int k = 0; k < kBytes / 16; ++k) {
        const uint4 part = reinterpret_cast<const uint4*>(p)[k];
        words[4 * k] = part.x, words[4 * k + 1] = part.y, words[4 * k + 2] = part.z, words[4 * k + 3] = part.w;
      }
    }
  }

  __device__ __forceinline__ void store(void* data, int64_t at) const {
    auto* const p = static_cast<typename F::Element*>(data) + at;
    __builtin_assume(__isGlobal(p));
    if constexpr (N == 1) {
      if constexpr (kBytes == 4) {
        *p = float_of(words[0]);
      } else {
        *p = static_cast<typename F::Element>(words[0]);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kBytes / 16; ++k) {
        reinterpret_cast<uint4*>(p)[k] = make_uint4(words[4 * k], words[4 * k + 1], words[4 * k + 2], words[4 * k + 3]);
      }
    }
  }

  __device__ __forceinline__ float get(int j) const {
    if constexpr (sizeof(typename F::Element) == 4) {
      return float_of(words[j]);
    } else {
      return F::load(static_cast<uint16_t>(words[j / 2] >> (16 * (j % 2))));
    }
  }

  __device__ __forceinline__ void set(int j, float value) {
    if constexpr (sizeof(typename F::Element) == 4) {
      words[j] = bits_of(value);
    } else {
      const uint32_t half = F::store(value);
      words[j / 2] = j % 2 == 0 ? (words[j / 2] & 0xffff0000u) | half : (words[j / 2] & 0xffffu) | half << 16;
    }
  }
};

// No load moves beyond this line, so that all loads of a round are under way before the first is waited for.
__device__ __forceinline__ void loads_end() { asm volatile("" ::: "memory"); }

// Elements a thread takes at once: 16 bytes of the narrower of weights and gradients.
template <class X, class G>
constexpr int kVector = sizeof(typename X::Element) == 2 || sizeof(typename G::Element) == 2 ? 8 : 4;

// A block's part of the work.
struct Stretch {
  int tensor;     // its place in the launch's table
  int64_t begin;  // its first element
  int count;
};

template <int kCapacity>
__device__ __forceinline__ Stretch find_stretch(const Table<kCapacity>& table) {
  const int block = static_cast<int>(blockIdx.x);
  int low = 0, high = table.tensors - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int64_t begin = (block - table.first_block[low]) * kChunk, left = table.numel[low] - begin;
  return {low, begin, static_cast<int>(left < kChunk ? left : kChunk)};
}

template <class... Pointers>
__device__ __forceinline__ bool all_aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;  // null is aligned
}

// Calls round<N>(element) for a vector of N elements, or 1, at a time.
template <int N, class Round>
__device__ __forceinline__ void sweep(const Stretch& part, bool aligned, const Round& round) {
  int done = 0;
  if (aligned) {
    done = part.count / N * N;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) * N; i < done; i += kThreads * N) round.template run<N>(part.begin + i);
  }
#pragma unroll 1
  for (int i = done + static_cast<int>(threadIdx.x); i < part.count; i += kThreads) {
    round.template run<1>(part.begin + i);
  }
}

// Clears the scalars of a tensor, the gaps between members included: blocks copy all of it, and compute-sanitizer's
// initcheck reports what is read and nobody wrote.
template <class T>
__device__ __forceinline__ void clear_words(T& to) {
  static_assert(sizeof(T) % 4 == 0);
  for (size_t k = 0; k < sizeof(T) / 4; ++k) reinterpret_cast<uint32_t*>(&to)[k] = 0;
}

// A block's copy of its tensor's scalars, in shared memory: as many registers would not leave room for the operands.
template <class T>
__device__ __forceinline__ void copy_scalars(T* to, const T& by_value, const T* on_device, int tensor) {
  static_assert(sizeof(T) % 4 == 0);
  auto* const words = reinterpret_cast<uint32_t*>(to);
#pragma unroll 1
  for (int k = static_cast<int>(threadIdx.x); k < static_cast<int>(sizeof(T) / 4); k += kThreads) {
    words[k] = on_device != nullptr ? reinterpret_cast<const uint32_t*>(on_device + tensor)[k]
                                    : reinterpret_cast<const uint32_t*>(&by_value)[k];
  }
  __syncthreads();
}

__device__ __forceinline__ bool skipped(const float* found_inf) { return found_inf != nullptr && *found_inf != 0.0f; }

__device__ __forceinline__ double read(const LrSource& lr) {
  if (lr.address == nullptr) return lr.value;
  return lr.is_double != 0 ? *static_cast<const double*>(lr.address)
                           : static_cast<double>(*static_cast<const float*>(lr.address));
}

// The steps taken so far; `host` where the count is not on the device.
__device__ __forceinline__ double read(StepAddress step, double host) {
  if (step.tagged == 0) return host;
  const uintptr_t address = step.tagged & ~uintptr_t{1};
  return address != step.tagged ? *reinterpret_cast<const double*>(address)
                                : static_cast<double>(*reinterpret_cast<const float*>(address));
}

__device__ __forceinline__ void write(StepAddress step, double t) {
  const uintptr_t address = step.tagged & ~uintptr_t{1};
  if (address == 0) return;
  if (address != step.tagged) {
    *reinterpret_cast<double*>(address) = t;
  } else {
    *reinterpret_cast<float*>(address) = static_cast<float>(t);
  }
}

__device__ __forceinline__ float read(const FactorSource& s) {
  return (s.clip_coef != nullptr ? *s.clip_coef : 1.0f) / (s.grad_scale != nullptr ? *s.grad_scale : 1.0f);
}

// Merges the threads' values into thread 0's: within each warp by halves, then the warps in order. `shared` holds one
// value a warp. Always in the same order, so that the result is the same on every run.
template <class T, class Merge, class Shift>
__device__ __forceinline__ T block_reduce(T value, T* shared, const Merge& merge, const Shift& shift) {
  for (int distance = 16; distance > 0; distance /= 2) value = merge(value, shift(value, distance));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / 32; ++warp) value = merge(value, shared[warp]);
  }
  return value;
}

}  // namespace pace
