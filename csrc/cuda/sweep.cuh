// The CUDA sweep: a block finds its stretch of a tensor, each thread takes vectors of 16 bytes a memory access, all
// loads of a round before the first use. Where an operand is not aligned to 16 bytes, as gradients in the buckets of
// DDP and FSDP2 are not, a thread takes as many elements a round, one a memory access, kThreads apart. What is left
// over goes element by element. All through the same function.
#pragma once

#include <type_traits>
#include <utility>

#include "kernels.h"
#include "rules.h"

namespace pace {

// N elements of a format, packed in registers: consecutive ones, N = 1 or as many as fill 16 bytes or more; or kSpread,
// kThreads apart, so that the threads of a warp read side by side.
template <class F, int N, bool kSpread>
struct Vector {
  static constexpr int kBytes = N * static_cast<int>(sizeof(typename F::Element));
  static_assert(N == 1 || kBytes % 16 == 0);
  uint32_t words[(kBytes + 3) / 4];

  __device__ __forceinline__ void load(const void* data, int64_t at) {
    const auto* const p = static_cast<const typename F::Element*>(data) + at;
    __builtin_assume(__isGlobal(p));
    if constexpr (N == 1 || kSpread) {
#pragma unroll
      for (int j = 0; j < N; ++j) pack(j, bits(p[j * kThreads]));
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
    if constexpr (N == 1 || kSpread) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if constexpr (kWide) {
          p[j * kThreads] = float_of(words[j]);
        } else {
          p[j * kThreads] = static_cast<typename F::Element>(words[j / 2] >> (16 * (j % 2)));
        }
      }
    } else {
#pragma unroll
      for (int k = 0; k < kBytes / 16; ++k) {
        reinterpret_cast<uint4*>(p)[k] = make_uint4(words[4 * k], words[4 * k + 1], words[4 * k + 2], words[4 * k + 3]);
      }
    }
  }

  __device__ __forceinline__ float get(int j) const {
    if constexpr (kWide) {
      return float_of(words[j]);
    } else {
      return F::load(static_cast<uint16_t>(words[j / 2] >> (16 * (j % 2))));
    }
  }

  __device__ __forceinline__ void set(int j, float value) {
    if constexpr (kWide) {
      words[j] = bits_of(value);
    } else {
      pack(j, F::store(value));
    }
  }

 private:
  static constexpr bool kWide = sizeof(typename F::Element) == 4;

  static __device__ __forceinline__ uint32_t bits(typename F::Element element) {
    if constexpr (kWide) {
      return bits_of(element);
    } else {
      return element;
    }
  }
  __device__ __forceinline__ void pack(int j, uint32_t value) {
    if constexpr (kWide || N == 1) {
      words[j] = value;
    } else {
      words[j / 2] = j % 2 == 0 ? (words[j / 2] & 0xffff0000u) | value : (words[j / 2] & 0xffffu) | value << 16;
    }
  }
};

// No load moves beyond this line, so that all loads of a round are under way before the first is waited for.
__device__ __forceinline__ void loads_end() { asm volatile("" ::: "memory"); }

// A block's part of the work.
struct Stretch {
  int tensor;     // its place in the launch's table
  int64_t begin;  // its first element
  int count;
};

__device__ __forceinline__ Stretch find_stretch(const SweepLaunch& launch, int capacity) {
  const int block = static_cast<int>(blockIdx.x);
  const auto first_block = [&](int i) { return static_cast<int>(launch.slot[capacity + i]); };
  int low = 0, high = launch.tensors - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first_block(middle) <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int64_t begin = (block - first_block(low)) * kChunk;
  const int64_t left = static_cast<int64_t>(launch.slot[low]) - begin;
  return {low, begin, static_cast<int>(left < kChunk ? left : kChunk)};
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

// ---- a round --------------------------------------------------------------------------------------------------------

// kSometimes: in a step in which the rule's Now says so; the same for all elements of a tensor.
enum class When { never, sometimes, always };

// When a kernel reads and writes operand k: the definition's uses, where those that only a flag of the step brings
// about may happen.
template <class Element>
struct UsesOf {
  using Rule = typename Element::Rule;
  using With = typename Rule::D::template Uses<Element::kFlags>;
  using Without = typename Rule::D::template Uses<Element::kFlags & ~Rule::kNow>;

  static constexpr When when(bool with, bool without) {
    return without ? When::always : (with ? When::sometimes : When::never);
  }
  static constexpr When read(int k) { return when(With::kUses[k].read, Without::kUses[k].read); }
  static constexpr When written(int k) { return when(With::kUses[k].written, Without::kUses[k].written); }
  static constexpr bool in_play(int k) { return With::kUses[k].in_play(); }
  static constexpr int array(int operand) {
    int row = 0;
    for (int k = 0; k < operand; ++k) row += in_play(k) ? 1 : 0;
    return row;
  }
};

template <int k, class V>
struct Slot {
  V held;
};

template <int k, class V>
__device__ __forceinline__ V& held(Slot<k, V>& s) {
  return s.held;
}

template <int N, bool kSpread, class Operands, class... F>
struct Registers;
template <int N, bool kSpread, int... k, class... F>
struct Registers<N, kSpread, std::integer_sequence<int, k...>, F...> : Slot<k, Vector<F, N, kSpread>>... {};

// A round of a sweep: of operands of the formats F..., loads, the rule's element, stores.
template <class Element, class Operands, class... F>
struct Round;

template <class Element, int... k, class... F>
struct Round<Element, std::integer_sequence<int, k...>, F...> {
  using Uses = UsesOf<Element>;
  using Now = typename Element::Now;
  static constexpr int kCount = sizeof...(F);
  static constexpr int kCapacity = SweepLaunch::capacity(Uses::array(kCount));

  void* address[kCount];
  const typename Element::Scalars& scalars;
  const uint32_t launched;
  typename Element::Sums& sums;

  __device__ __forceinline__ Round(const SweepLaunch& launch, int tensor, const typename Element::Scalars& s,
                                   typename Element::Sums& to)
      : scalars(s), launched(launch.now), sums(to) {
    ((address[k] = Uses::in_play(k) ? reinterpret_cast<void*>(
                                          launch.slot[(SweepLaunch::kHeadRows + Uses::array(k)) * kCapacity + tensor])
                                    : nullptr),
     ...);
  }
  __device__ __forceinline__ bool aligned() const {  // null is aligned
    return ((reinterpret_cast<uintptr_t>(address[k]) | ...) & 15) == 0;
  }

  template <int i, When kWhen, class R>
  __device__ __forceinline__ void load(const Now& now, R& r, int64_t at) const {
    if constexpr (Uses::read(i) == kWhen) {
      if (kWhen == When::always || now.reads(i)) held<i>(r).load(address[i], at);
    }
  }
  template <int i, class R>
  static __device__ __forceinline__ float get(R& r, int j) {
    if constexpr (Uses::read(i) != When::never) return held<i>(r).get(j);
    return 0.0f;
  }
  template <int i, class R>
  static __device__ __forceinline__ void set(R& r, int j, float value) {
    if constexpr (Uses::written(i) != When::never) held<i>(r).set(j, value);
  }
  template <int i, When kWhen, class R>
  __device__ __forceinline__ void store(const Now& now, R& r, int64_t at) const {
    if constexpr (Uses::written(i) == kWhen) {
      if (kWhen == When::always || now.writes(i)) held<i>(r).store(address[i], at);
    }
  }

  template <int N, bool kSpread>
  __device__ __forceinline__ void run(int64_t at) const {
    if constexpr (Element::kScalarsAnew) asm volatile("" ::: "memory");  // instead of kept in registers
    const Now now(scalars, launched);  // for each round: for a block, MADA's switches spill
    Registers<N, kSpread, std::integer_sequence<int, k...>, F...> r;
    (load<k, When::always>(now, r, at), ...);
    (load<k, When::sometimes>(now, r, at), ...);
    loads_end();
#pragma unroll
    for (int j = 0; j < N; ++j) {
      float a[kCount] = {get<k>(r, j)...};
      Element::step(scalars, now, a, sums);
      (set<k>(r, j, a[k]), ...);
    }
    // What is always stored first: a branch before it would keep its registers alive, and MADA's 168 spill.
    (store<k, When::always>(now, r, at), ...);
    (store<k, When::sometimes>(now, r, at), ...);
  }
};

// Calls round.run for N elements a thread, consecutive or spread, and for 1.
template <int N, class Round>
__device__ __forceinline__ void walk(const Stretch& part, bool aligned, const Round& round) {
  int done = 0;
  if (aligned) {
    done = part.count / N * N;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) * N; i < done; i += kThreads * N) {
      round.template run<N, false>(part.begin + i);
    }
  } else {
    done = part.count / (kThreads * N) * (kThreads * N);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < done; i += kThreads * N) {
      round.template run<N, true>(part.begin + i);
    }
  }
#pragma unroll 1
  for (int i = done + static_cast<int>(threadIdx.x); i < part.count; i += kThreads) {
    round.template run<1, false>(part.begin + i);
  }
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

// Elements a thread takes at once: 16 bytes of the narrowest of 16-bit and 32-bit formats.
template <class... F>
constexpr int kVectorOf = ((sizeof(typename F::Element) == 2) || ...) ? 8 : 4;

// What a rule without sums has.
struct NoSums {};

template <class Element, class... F>
__global__ void __launch_bounds__(kThreads, Element::blocks(kVectorOf<F...>))
    sweep_kernel(const __grid_constant__ SweepLaunch launch) {
  using Scalars = typename Element::Scalars;
  using SweepRound = Round<Element, std::make_integer_sequence<int, sizeof...(F)>, F...>;
  if (skipped(launch.found_inf)) return;
  __shared__ Scalars scalars;
  const Stretch part = find_stretch(launch, SweepRound::kCapacity);
  copy_scalars(&scalars, *reinterpret_cast<const Scalars*>(launch.scalars),
               static_cast<const Scalars*>(launch.device_scalars), part.tensor);
  typename Element::Sums sums;
  const SweepRound round(launch, part.tensor, scalars, sums);
  walk<kVectorOf<F...>>(part, round.aligned(), round);
  Element::finish(sums, scalars, launch.sums, part.count);
}

// ---- instances ------------------------------------------------------------------------------------------------------

// The format of operand k by its role: a state is float32. Out of play all of G are one, so that there is one instance.
template <class Element, int k, class X, class G>
struct FormatOf {
  static constexpr Role role = Element::Rule::D::kLists[k].role;
  static constexpr bool own = (role == Role::gradient || role == Role::moment) && UsesOf<Element>::in_play(k);
  using type = std::conditional_t<role == Role::state, Float32, std::conditional_t<own, G, X>>;
};

template <class Element, class X, class G, int... k>
const void* instance(std::integer_sequence<int, k...>) {
  return (const void*)sweep_kernel<Element, typename FormatOf<Element, k, X, G>::type...>;
}

template <template <unsigned> class Element, unsigned kFlags, class X, class G>
const void* function_of() {
  using D = typename Element<kFlags>::Rule::D;
  if constexpr (Element<kFlags>::kThere) {
    return instance<Element<kFlags>, X, G>(std::make_integer_sequence<int, D::kOperands>());
  }
  return nullptr;
}

template <template <unsigned> class Element, class X, class G, unsigned... kFlags>
const void* by_flags(unsigned flags, std::integer_sequence<unsigned, kFlags...>) {
  static const void* const functions[] = {function_of<Element, kFlags, X, G>()...};
  return functions[flags];
}

// The kernel of each value of a rule's flags; null where Element::kThere says that there is none.
template <template <unsigned> class Element, class X, class G>
const void* instances(const KernelId& id) {
  return by_flags<Element, X, G>(id.flags, std::make_integer_sequence<unsigned, Element<0>::Rule::D::Flag::values>());
}

}  // namespace pace
