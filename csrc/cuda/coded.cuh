// The CUDA sweep of operands that lie in the formats of ../codes.h: the rule runs on floats, and what it leaves is
// encoded once the whole block of 32 elements is there, since codes share a scale, and an average beside its weight
// needs the new weight. ../cpu/coded.h does the same with a tile. A kernel knows the formats of its operands at compile
// time, which are the frequent ones, or reads them from the launch: they are the same for all of its threads.
//
// A warp takes 256 elements a round, a thread 8 consecutive ones, so that 4 threads are a block. Where operands are
// aligned, these are accesses of 16 bytes, 8 of bytes. Otherwise, and behind the last 256, they are an access an
// element, which finds the lines of its neighbours in the cache; gradients alone, which often lie anywhere in the
// buckets of DDP and FSDP2, leave the other operands their wide accesses. All loads of a round are before the first
// use.
#pragma once

#include "stats.cuh"

namespace pace {

constexpr int kEach = 8;  // elements of a thread
constexpr int kTile = 32 * kEach;
constexpr int kSharing = kCodeBlock / kEach;  // threads of a block of codes
constexpr unsigned kWarp = 0xffffffffu;

// ---- elements in registers ------------------------------------------------------------------------------------------

// Where 8 elements lie, which are counted by eights: 32 bits suffice, and one instruction (part.h refuses more).
template <int kBits>
__device__ __forceinline__ uint64_t place(uint32_t vector) {
  return static_cast<uint64_t>(vector) * kBits;
}

// 8 elements of kBits each, packed in words.
template <int kBits>
__device__ __forceinline__ void load_wide(uint32_t* words, const void* data, uint32_t vector) {
  const auto* const p = static_cast<const char*>(data) + place<kBits>(vector);
  __builtin_assume(__isGlobal(p));
  if constexpr (kBits == 8) {
    const uint2 part = *reinterpret_cast<const uint2*>(p);
    words[0] = part.x, words[1] = part.y;
  } else {
#pragma unroll
    for (int k = 0; k < kBits / 16; ++k) {
      const uint4 part = reinterpret_cast<const uint4*>(p)[k];
      words[4 * k] = part.x, words[4 * k + 1] = part.y, words[4 * k + 2] = part.z, words[4 * k + 3] = part.w;
    }
  }
}

template <int kBits>
using ElementOf = std::conditional_t<kBits == 8, uint8_t, std::conditional_t<kBits == 16, uint16_t, uint32_t>>;

// The first `left` of them.
template <int kBits>
__device__ __forceinline__ void load_each(uint32_t* words, const void* data, uint32_t vector, int left) {
  const auto* const p =
      reinterpret_cast<const ElementOf<kBits>*>(static_cast<const char*>(data) + place<kBits>(vector));
  __builtin_assume(__isGlobal(p));
  constexpr int kParts = 32 / kBits;
  uint32_t element[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) element[j] = j < left ? p[j] : 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    words[j / kParts] = (j % kParts != 0 ? words[j / kParts] : 0) | element[j] << (j % kParts * kBits);
  }
}

template <int kBits, bool kWide>
__device__ __forceinline__ void load(uint32_t* words, const void* data, uint32_t vector, int left) {
  if constexpr (kWide) {
    load_wide<kBits>(words, data, vector);
  } else {
    load_each<kBits>(words, data, vector, left);
  }
}

// A byte of each of 4 values.
template <int kByte>
__device__ __forceinline__ uint32_t four(const uint32_t (&v)[kEach], int k) {
  constexpr unsigned kTwo = kByte << 4 | kByte | 4 << 4;
  return __byte_perm(__byte_perm(v[k], v[k + 1], kTwo), __byte_perm(v[k + 2], v[k + 3], kTwo), 0x5410);
}
__device__ __forceinline__ void store_bytes(void* data, uint32_t vector, uint2 v, bool wide, int left) {
  auto* const p = static_cast<uint8_t*>(data) + place<8>(vector);
  __builtin_assume(__isGlobal(p));
  if (wide) {
    *reinterpret_cast<uint2*>(p) = v;
  } else {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (j < left) p[j] = static_cast<uint8_t>((j < 4 ? v.x : v.y) >> (8 * (j % 4)));
    }
  }
}

// Of each value the lowest kBits; or, of 16, the highest.
template <int kBits, bool kHigh = false>
__device__ __forceinline__ void store(void* data, uint32_t vector, const uint32_t (&v)[kEach], bool wide, int left) {
  if constexpr (kBits == 8) {
    store_bytes(data, vector, {four<0>(v, 0), four<0>(v, 4)}, wide, left);
    return;
  }
  auto* const p = reinterpret_cast<ElementOf<kBits>*>(static_cast<char*>(data) + place<kBits>(vector));
  __builtin_assume(__isGlobal(p));
  if (!wide) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (j < left) p[j] = static_cast<ElementOf<kBits>>(kHigh ? v[j] >> 16 : v[j]);
    }
  } else if constexpr (kBits == 16) {
    const auto two = [&](int k) { return __byte_perm(v[k], v[k + 1], kHigh ? 0x7632 : 0x5410); };
    *reinterpret_cast<uint4*>(p) = make_uint4(two(0), two(2), two(4), two(6));
  } else {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      reinterpret_cast<uint4*>(p)[k] = make_uint4(v[4 * k], v[4 * k + 1], v[4 * k + 2], v[4 * k + 3]);
    }
  }
}

// Element j of packed words.
__device__ __forceinline__ uint32_t byte_of(const uint32_t* words, int j) {
  return __byte_perm(words[j / 4], 0, 0x4440 + j % 4);
}
__device__ __forceinline__ uint32_t half_of(const uint32_t* words, int j) {
  return j % 2 != 0 ? words[j / 2] >> 16 : words[j / 2] & 0xffffu;
}
__device__ __forceinline__ int32_t signed_half_of(const uint32_t* words, int j) {
  return j % 2 != 0 ? static_cast<int32_t>(words[j / 2]) >> 16 : static_cast<int16_t>(words[j / 2] & 0xffffu);
}
__device__ __forceinline__ uint32_t bfloat16_of(const uint32_t* words, int j) {
  return j % 2 != 0 ? words[j / 2] & 0xffff0000u : words[j / 2] << 16;
}

// ---- the same bits as in ../codes.h, in fewer operations ------------------------------------------------------------

// Without the sign, which is added to 4 codes at once.
__device__ __forceinline__ uint32_t code_of(MCode, float m, int32_t b, uint32_t h, uint32_t mask) {
  return static_cast<uint32_t>(MCode::encode(fabsf(m), b, (h << 11 & mask) | 0x400u));
}
__device__ __forceinline__ uint32_t code_of(VCode, float v_settled, int32_t b, uint32_t h, uint32_t mask) {
  return static_cast<uint32_t>(larger(VCode::encode(v_settled, b, (h & mask) | 0x80u), 1));
}
// `upper`: the bits of the bfloat16. Where it is 0 a negative rest counts as 0; otherwise the sum has its sign.
__device__ __forceinline__ float join(uint32_t upper, int32_t rest) {
  const int32_t sum = static_cast<int32_t>(upper & 0x7fffffffu) + rest;
  return float_of((upper & 0x80000000u) | static_cast<uint32_t>(larger(sum, 0)));
}
__device__ __forceinline__ float magnitude_of(uint32_t code, int32_t b) {
  const uint32_t o = static_cast<uint32_t>(b) << 23;
  return float_of(code * (1u << MCode::kDropped) + o) - float_of(o);
}
// Twice rank_of, as unsigned integers: infinities and NaN come out below twice kRankOfZero, where maxima start.
__device__ __forceinline__ uint32_t twice_rank_of(float a) { return bits_of(a) * 2u + 2u * kRankOfZero; }
__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// ---- formats --------------------------------------------------------------------------------------------------------

// The formats of x, m, v and e, and whether there is an average. Where there is none e is kFloat32. Weights that are
// rounded by dither are kBFloat16 too: the launch says it, and the format of g.
template <Format kX, bool kAverage, Format kE>
struct Known {
  static constexpr bool kAny = false;
  __device__ __forceinline__ explicit Known(uint32_t) {}
  static constexpr Format x = kX, m = Format::kMoment8, v = Format::kSquare8, e = kE;
  static constexpr bool average = kAverage;
};

struct Any {
  using D = PaceDefinition;
  static constexpr bool kAny = true;
  __device__ __forceinline__ explicit Any(uint32_t now)
      : x(format_at(now, D::kX)),
        m(format_at(now, D::kM)),
        v(format_at(now, D::kV)),
        e(format_at(now, D::kE)),
        average((flags_of(now) & D::Flag::average) != 0) {}
  const Format x, m, v, e;
  const bool average;
};

// ---- a round --------------------------------------------------------------------------------------------------------

// What is read of 8 elements of each operand.
struct Raw {
  uint32_t x[kEach], rest[kEach / 2], g[kEach], m[kEach], v[kEach], e[kEach], e_rest[kEach / 4];
  int32_t m_scale, v_scale, e_scale;
};

// Over the threads that share a block.
__device__ __forceinline__ int32_t largest_of_block(uint32_t twice_rank) {
  static_assert(kSharing == 4);
  twice_rank = larger(twice_rank, __shfl_xor_sync(kWarp, twice_rank, 1));
  return static_cast<int32_t>(larger(twice_rank, __shfl_xor_sync(kWarp, twice_rank, 2)) >> 1);
}

// Which operands have accesses of 16 bytes, 8 of bytes.
enum Aligned : unsigned { kNone = 0, kOthers = 1, kGradients = 2 };

// What the compiler must not know, or else it keeps what follows from it for each place where that is asked.
__device__ __forceinline__ unsigned opaque(unsigned a) {
  asm volatile("" : "+r"(a));
  return a;
}

template <class F, class Sums>
struct CodedRound {
  using D = PaceDefinition;
  using Scalars = PaceRule::Scalars;

  const SweepLaunch& launch;
  int tensor;
  const Scalars& s;
  const float* const spread;  // the dithers of averages, by place in the block
  Sums& sums;

  // From here on addresses and scalars are loaded anew, instead of kept in registers: 18 and 16 of them.
  __device__ __forceinline__ CodedRound anew() const {
    CodedRound again = *this;
    asm volatile("" : "+r"(again.tensor)::"memory");
    return again;
  }

  template <class T = void>
  __device__ __forceinline__ T* address(int row) const {
    return reinterpret_cast<T*>(launch.slot[(SweepLaunch::kHeadRows + row) * kCodedCapacity + tensor]);
  }
  template <class T = void>
  __device__ __forceinline__ T* beside(int operand) const {
    return address<T>(kCodedBeside + operand);
  }
  __device__ __forceinline__ bool has(unsigned flag) const { return (flags_of(launch.now) & flag) != 0; }

  __device__ __forceinline__ unsigned aligned() const {
    const F f(launch.now);
    const auto beyond = [&](const void* p, int bytes) {
      return reinterpret_cast<uintptr_t>(p) & (bytes == 1 ? 7 : 15);
    };
    uintptr_t others = 0;
    for (const int k : {D::kX, D::kM, D::kV, D::kE}) others |= beyond(address(k), bytes_of(format_at(launch.now, k)));
    if (f.x == Format::kPair24 || f.x == Format::kPair32) others |= beyond(beside(D::kX), bytes_of_rest(f.x));
    if (f.average && f.e == Format::kPair24) others |= beyond(beside(D::kE), 1);
    return (others == 0 ? kOthers : kNone) | (beyond(address(D::kG), 2) == 0 ? kGradients : kNone);
  }

  template <bool kWide>
  static __device__ __forceinline__ void load_moment(Format format, uint32_t* words, const void* data, uint32_t vector,
                                                     int left) {
    if (format == Format::kFloat32) {
      load<32, kWide>(words, data, vector, left);
    } else if (format == Format::kDithered16) {
      load<16, kWide>(words, data, vector, left);
    } else {
      load<8, kWide>(words, data, vector, left);
    }
  }

  template <bool kWide>
  __device__ __forceinline__ void load_others(const F& f, Raw& r, uint32_t vector, int left) const {
    if (f.x == Format::kFloat32) {
      load<32, kWide>(r.x, address(D::kX), vector, left);
    } else {
      load<16, kWide>(r.x, address(D::kX), vector, left);
    }
    if (f.x == Format::kPair32) load<16, kWide>(r.rest, beside(D::kX), vector, left);
    if (f.x == Format::kPair24) load<8, kWide>(r.rest, beside(D::kX), vector, left);
    load_moment<kWide>(f.v, r.v, address(D::kV), vector, left);
    if (has(D::Flag::moment)) load_moment<kWide>(f.m, r.m, address(D::kM), vector, left);
    if (!f.average || !(is_grid(f.e) || has(D::Flag::pull) || s.rule.moves != 0)) return;
    if (f.e == Format::kFloat32) load<32, kWide>(r.e, address(D::kE), vector, left);
    if (f.e == Format::kGrid16 || f.e == Format::kPair24) load<16, kWide>(r.e, address(D::kE), vector, left);
    if (f.e == Format::kGrid8) load<8, kWide>(r.e, address(D::kE), vector, left);
    if (f.e == Format::kPair24) load<8, kWide>(r.e_rest, beside(D::kE), vector, left);
  }

  template <bool kWide>
  __device__ __forceinline__ void load_gradients(Raw& r, uint32_t vector, int left) const {
    if (format_at(launch.now, D::kG) == Format::kFloat32) {
      load<32, kWide>(r.g, address(D::kG), vector, left);
    } else {
      load<16, kWide>(r.g, address(D::kG), vector, left);
    }
  }

  __device__ __forceinline__ void load_scales(const F& f, Raw& r, uint32_t block) const {
    const auto scale = [&](int k) { return static_cast<int32_t>(beside<const uint8_t>(k)[block]); };
    if (f.v == Format::kSquare8) r.v_scale = scale(D::kV);
    if (f.m == Format::kMoment8 && has(D::Flag::moment)) r.m_scale = scale(D::kM);
    if (f.average && is_grid(f.e)) r.e_scale = scale(D::kE);
  }

  // Where there is no m it is −0: with β1 = 0 the rule then has m₊ = g, bit for bit.
  static __device__ __forceinline__ void clear(const F& f, Raw& r) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      r.m[k] = f.m == Format::kMoment8 ? 0x80808080u : (f.m == Format::kDithered16 ? 0x80008000u : 0x80000000u);
      r.e[k] = 0;
    }
    r.e_rest[0] = r.e_rest[1] = 0;
    r.m_scale = r.v_scale = r.e_scale = 127;
  }

  static __device__ __forceinline__ float weight_of(const F& f, const Raw& r, int j) {
    if (f.x == Format::kFloat32) return float_of(r.x[j]);
    if (f.x == Format::kFloat16) return Float16::load(static_cast<uint16_t>(half_of(r.x, j)));
    const uint32_t upper = bfloat16_of(r.x, j);
    if (f.x == Format::kPair32) return join(upper, signed_half_of(r.rest, j));
    if (f.x == Format::kPair24) return join(upper, static_cast<int8_t>(byte_of(r.rest, j)) * 256);
    return float_of(upper);
  }
  // In place: float32 is as it is.
  __device__ __forceinline__ void decode_gradients(uint32_t* g) const {
    const Format format = format_at(launch.now, D::kG);
    if (format == Format::kBFloat16) {
#pragma unroll
      for (int j = kEach - 1; j >= 0; --j) g[j] = bfloat16_of(g, j);
    }
    if (F::kAny && format == Format::kFloat16) {
#pragma unroll
      for (int j = kEach - 1; j >= 0; --j) g[j] = bits_of(Float16::load(static_cast<uint16_t>(half_of(g, j))));
    }
  }
  // In place, from codes in the first two words.
  template <class Code>
  static __device__ __forceinline__ void decode_moments(Format format, uint32_t* a, int32_t b) {
    if (format == Format::kDithered16) {
#pragma unroll
      for (int j = kEach - 1; j >= 0; --j) a[j] = bfloat16_of(a, j);
    }
    if (format != Format::kMoment8 && format != Format::kSquare8) return;
    const uint32_t first = a[0], second = a[1];
    if constexpr (std::is_same_v<Code, MCode>) {
      const uint32_t magnitudes[] = {first & 0x7f7f7f7fu, second & 0x7f7f7f7fu};
#pragma unroll
      for (int j = kEach - 1; j >= 0; --j) {
        const uint32_t signs = __byte_perm(j < 4 ? first : second, 0, (j % 4) << 12 | 0x444);
        a[j] = bits_of(magnitude_of(byte_of(magnitudes, j), b)) | (signs & 0x80000000u);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        a[j] = bits_of(magnitude_of(__byte_perm(j < 4 ? first : second, 0, 0x4440 + j % 4), b));
      }
      // Infinity is rare, so that it is looked for in 4 codes at once: its bits are those of a byte that is 0,
      // inverted.
      const auto some = [](uint32_t codes) { return (~codes - 0x01010101u) & codes & 0x80808080u; };
      if ((some(first) | some(second)) != 0) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          if (((j < 4 ? first : second) >> (8 * (j % 4)) & 0xffu) == 0xffu) a[j] = 0x7f800000u;
        }
      }
    }
  }
  // Where the average lies: grid + offset. One of its own has no offset: −0, which changes nothing.
  static __device__ __forceinline__ float2 average_of(const F& f, const Raw& r, int j, float grid) {
    if (f.e == Format::kFloat32) return {float_of(r.e[j]), -0.0f};
    if (f.e == Format::kPair24) return {float_of(r.e[j]), -0.0f};  // joined in place
    const int32_t code = f.e == Format::kGrid8 ? static_cast<int8_t>(byte_of(r.e, j)) : signed_half_of(r.e, j);
    return {grid, static_cast<float>(code) * power_of_two(larger(r.e_scale, 1))};
  }

  // Averages of 24 bits, joined in place.
  static __device__ __forceinline__ void decode_pairs(Raw& r) {
    uint32_t upper[kEach];
    bool rare = false;
#pragma unroll
    for (int j = 0; j < kEach; ++j) upper[j] = bfloat16_of(r.e, j);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const float e = float_of(upper[j] + static_cast<uint32_t>(static_cast<int8_t>(byte_of(r.e_rest, j)) * 256));
      r.e[j] = bits_of(e);
      rare |= e != e;
    }
    if (!rare) return;
    asm volatile("");
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      r.e[j] = bits_of(join(upper[j], static_cast<int8_t>(byte_of(r.e_rest, j)) * 256));
    }
  }

  // Weights, and grids of averages beside them. What is rare is looked for in all 8 at once, and done again: a rest
  // that is left from another weight than 0, of which the sum is NaN; of codes of 8 bits, a weight beyond 2^22 steps.
  // With 16 bits that is not rare.
  static __device__ __forceinline__ void decode_weights(const F& f, const Raw& r, float (&x)[kEach],
                                                        float (&grid)[kEach]) {
    const bool joins = f.x == Format::kPair32 || f.x == Format::kPair24, rough = f.average && f.e == Format::kGrid8;
    const int32_t b = larger(r.e_scale, 1);
    bool rare = false;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (F::kAny || !joins) {
        x[j] = weight_of(f, r, j);
      } else if (f.x == Format::kPair32) {
        x[j] = float_of(bfloat16_of(r.x, j) + static_cast<uint32_t>(signed_half_of(r.rest, j)));
      } else {
        x[j] = float_of(bfloat16_of(r.x, j) + static_cast<uint32_t>(static_cast<int8_t>(byte_of(r.rest, j)) * 256));
      }
      if (!F::kAny && rough) {
        const float a = x[j] * power_of_two(254 - b);
        grid[j] = nearest_whole(a) * power_of_two(b);
        rare |= !(fabsf(a) < 0x1p22f);
      } else if (f.average && is_grid(f.e)) {
        grid[j] = GridCode<8>::grid(x[j], b);
      }
      if (!F::kAny && joins && !rough) rare |= x[j] != x[j];
    }
    if (!rare) return;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (joins) x[j] = weight_of(f, r, j);
      if (f.average && is_grid(f.e)) grid[j] = GridCode<8>::grid(x[j], b);
    }
  }

  // The weights and averages of their own settled, and no code of a moment is a negative NaN's. A moment is NaN only
  // where its weight is too.
  static __device__ __forceinline__ void settle(const F& f, float (&x)[kEach], float (&m)[kEach], float (&e)[kEach]) {
    bool rare = false;
#pragma unroll
    for (int j = 0; j < kEach; ++j) rare |= x[j] != x[j] || (f.average && f.e == Format::kPair24 && e[j] != e[j]);
    if (!rare) return;
    asm volatile("");  // a branch: as choices these were 3 operations an element
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      x[j] = float_of(settled(x[j]));
      if (f.m == Format::kMoment8) m[j] = float_of(settled(m[j]));
      if (f.average && f.e == Format::kPair24) e[j] = float_of(settled(e[j]));
    }
  }

  // The new weight, settled, as it will be read back; in `bits` as it is stored, without what the format cuts off.
  static __device__ __forceinline__ float rounded_weight(const F& f, float x, uint32_t h, bool dithers,
                                                         uint32_t& bits) {
    if (f.x == Format::kFloat16) {
      bits = Float16::store(x);
      return Float16::load(static_cast<uint16_t>(bits));
    }
    if (f.x == Format::kFloat32) {
      bits = bits_of(x);
      return x;
    }
    if (f.x == Format::kPair32) {
      bits = bits_of(x);
    } else if (f.x == Format::kPair24) {
      bits = rounded_bits<24>(bits_of(x), h);
    } else {
      // As BFloat16::store: half a place, or a bit less where the last bit is even.
      const uint32_t half = 0x7fffu + (bits_of(x) >> 16 & 1u);
      bits = (bits_of(x) + (dithers ? h & 0xffffu : half)) & 0xffff0000u;
    }
    return float_of(bits);
  }

  // The 8 elements of a vector, the first of which is number `place` of its block: decoded, stepped, encoded, stored. A
  // thread of which none is left takes part in the maxima alone: blocks are there or not as a whole.
  __device__ __forceinline__ void run(const F& f, Raw& r, uint32_t vector, int place, bool wide, int left) const {
    const bool pulls = has(D::Flag::pull), dithers = format_at(launch.now, D::kX) == Format::kDithered16;
    float x[kEach], m[kEach], v[kEach], back[kEach], grid[kEach], offset[kEach];
    uint32_t h[kEach], x_bits[kEach], e_bits[kEach];
    uint32_t m_most = 2 * kRankOfZero, v_most = m_most, e_most = m_most;
    decode_weights(f, r, x, grid);
    if (f.average && f.e == Format::kPair24) decode_pairs(r);
    decode_gradients(r.g);
    decode_moments<MCode>(f.m, r.m, r.m_scale);
    decode_moments<VCode>(f.v, r.v, r.v_scale);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const float2 e = f.average ? average_of(f, r, j, grid[j]) : float2{0.0f, 0.0f};
      const float average = e.x + e.y;
      const auto rule = [&](auto pull) {
        return pace_rule<true, decltype(pull)::value, false>(s.rule, float_of(r.g[j]), x[j], float_of(r.m[j]),
                                                             float_of(r.v[j]), average);
      };
      PaceStep step = rule(std::false_type());
      if (f.average) {
        const PaceStep with = rule(std::true_type());
        step.x = pulls ? with.x : step.x;
        step.pullback = pulls ? with.pullback : step.pullback, step.update = pulls ? with.update : step.update;
      }
      if constexpr (!std::is_same_v<Sums, NoSums>) {
        if (j < left) sums.add(step);
      }
      x[j] = step.x, m[j] = step.m, v[j] = step.v;
      grid[j] = e.x, offset[j] = e.y;
      if (f.average && !is_grid(f.e)) grid[j] = averaged(average, step.x, s.rule.weight);
    }
    settle(f, x, m, grid);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const float v_settled = settled_square(v[j]);
      if (f.v == Format::kSquare8) v[j] = v_settled;
      h[j] = dither(bits_of(x[j]), v_settled, s.rounding.key);
      back[j] = rounded_weight(f, x[j], h[j], dithers, x_bits[j]);
      if (f.m == Format::kMoment8) m_most = larger(m_most, twice_rank_of(m[j]));
      if (f.v == Format::kSquare8) v_most = larger(v_most, twice_rank_of(v[j]));
      if (f.average && !is_grid(f.e)) {
        const bool whole = f.e == Format::kFloat32;
        e_bits[j] = whole ? bits_of(grid[j]) : rounded_bits<24>(bits_of(grid[j]), h[j] >> 24);
      }
    }
    if (f.average && is_grid(f.e)) {
      if (s.rounding.weight == 1.0f) {  // the average is the weight
        asm volatile("");               // a branch: as choices these were 2 operations an element
#pragma unroll
        for (int j = 0; j < kEach; ++j) grid[j] = back[j], offset[j] = 0.0f;
      }
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        e_most = larger(e_most, twice_rank_of(GridCode<8>::difference(place_of(grid[j], offset[j], back[j]), back[j])));
      }
    }
    int32_t m_rank = 0, v_rank = 0, e_rank = 0;
    if (f.average && is_grid(f.e)) e_rank = largest_of_block(e_most);
    if (f.m == Format::kMoment8) m_rank = largest_of_block(m_most);
    if (f.v == Format::kSquare8) v_rank = largest_of_block(v_most);

    const CodedRound to = anew();
    to.store_weights(f, vector, x_bits, wide, left);
    to.template store_moments<VCode>(f.v, D::kV, vector, v, h, v_rank, wide, left);
    if (has(D::Flag::moment)) to.template store_moments<MCode>(f.m, D::kM, vector, m, h, m_rank, wide, left);
    if (!f.average) return;
    if (f.e == Format::kGrid8) {
      to.template store_averages<8>(vector, grid, offset, back, e_rank, place, wide, left);
    } else if (f.e == Format::kGrid16) {
      to.template store_averages<16>(vector, grid, offset, back, e_rank, place, wide, left);
    } else if (s.rule.moves != 0) {
      if (f.e == Format::kFloat32) {
        store<32>(to.address(D::kE), vector, e_bits, wide, left);
      } else {
        to.store_pairs(Format::kPair24, D::kE, vector, e_bits, wide, left);
      }
    }
  }

  __device__ __forceinline__ GridCode<8>::Place place_of(float grid, float offset, float back) const {
    return {grid, offset, s.rounding.weight * (back - (grid + offset))};
  }

  // As high_part with rest_of_32 and rest_of_24.
  __device__ __forceinline__ void store_pairs(Format format, int k, uint32_t vector, const uint32_t (&bits)[kEach],
                                              bool wide, int left) const {
    uint32_t words[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) words[j] = bits[j] + 0x8000u;
    store<16, true>(address(k), vector, words, wide, left);
    if (format == Format::kPair32) return store<16>(beside(k), vector, bits, wide, left);
#pragma unroll
    for (int j = 0; j < kEach; ++j) words[j] = bits[j] >> 8;
    store<8>(beside(k), vector, words, wide, left);
  }

  __device__ __forceinline__ void store_weights(const F& f, uint32_t vector, const uint32_t (&bits)[kEach], bool wide,
                                                int left) const {
    if (f.x == Format::kPair32 || f.x == Format::kPair24) {
      store_pairs(f.x, D::kX, vector, bits, wide, left);
    } else if (f.x == Format::kFloat32) {
      store<32>(address(D::kX), vector, bits, wide, left);
    } else if (f.x == Format::kFloat16) {
      store<16>(address(D::kX), vector, bits, wide, left);
    } else {
      store<16, true>(address(D::kX), vector, bits, wide, left);
    }
  }

  // The threads of a block have exchanged maxima of what they made of what they read: all have read its scale by now.
  __device__ __forceinline__ void store_scale(int k, uint32_t vector, int32_t b, int left) const {
    if (threadIdx.x % kSharing == 0 && left > 0) beside<uint8_t>(k)[vector / kSharing] = static_cast<uint8_t>(b);
  }

  template <class Code>
  __device__ __forceinline__ void store_moments(Format format, int k, uint32_t vector, const float (&a)[kEach],
                                                const uint32_t (&h)[kEach], int32_t rank, bool wide, int left) const {
    constexpr int kShift = std::is_same_v<Code, MCode> ? 0 : 16;
    uint32_t words[kEach];
    if (format == Format::kFloat32) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) words[j] = bits_of(a[j]);
      store<32>(address(k), vector, words, wide, left);
    } else if (format == Format::kDithered16) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) words[j] = rounded_bits<16>(settled(a[j]), h[j] >> kShift);
      store<16, true>(address(k), vector, words, wide, left);
    } else {
      const int32_t b = Code::scale(rank);
      // That of `dithered`, in a register, since an instruction takes one constant: `now` has no bit 31.
      const uint32_t mask = (std::is_same_v<Code, MCode> ? 0x7f800u : 0x7ff00u) | launch.now >> 31;
#pragma unroll
      for (int j = 0; j < kEach; ++j) words[j] = code_of(Code(), a[j], b, h[j], mask);
      uint2 packed = {four<0>(words, 0), four<0>(words, 4)};
      if constexpr (std::is_same_v<Code, MCode>) {
        uint32_t all[kEach];
#pragma unroll
        for (int j = 0; j < kEach; ++j) all[j] = bits_of(a[j]);
        packed.x |= four<3>(all, 0) & 0x80808080u, packed.y |= four<3>(all, 4) & 0x80808080u;
      }
      store_bytes(address(k), vector, packed, wide, left);
      store_scale(k, vector, b, left);
    }
  }

  template <int kBits>
  __device__ __forceinline__ void store_averages(uint32_t vector, const float (&grid)[kEach],
                                                 const float (&offset)[kEach], const float (&back)[kEach], int32_t rank,
                                                 int place, bool wide, int left) const {
    using Code = GridCode<kBits>;
    const int32_t b = Code::scale(rank);
    uint32_t words[kEach];
    float u[kEach];
#pragma unroll
    for (int k = 0; k < kEach / 4; ++k) {
      const float4 part = reinterpret_cast<const float4*>(spread + place)[k];
      u[4 * k] = part.x, u[4 * k + 1] = part.y, u[4 * k + 2] = part.z, u[4 * k + 3] = part.w;
    }
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const auto p = place_of(grid[j], offset[j], back[j]);
      words[j] = static_cast<uint32_t>(Code::store({p.grid, p.offset, p.increment}, back[j], b, u[j]));
    }
    store<kBits>(address(D::kE), vector, words, wide, left);
    store_scale(D::kE, vector, b, left);
  }

  // A warp's 256 elements, of which `count` are left, from a vector on.
  __device__ __forceinline__ void take(uint32_t first, int count, unsigned aligned) const {
    const F f(launch.now);
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const uint32_t vector = first + static_cast<uint32_t>(lane);
    const int left = count - lane * kEach;  // of this thread: may be negative, or more than 8
    const unsigned wide = opaque(count >= kTile ? aligned : kNone);
    Raw r;
    clear(f, r);
    if ((wide & kOthers) != 0) {
      load_others<true>(f, r, vector, kEach);
    } else {
      load_others<false>(f, r, vector, left);
    }
    if (left > 0) load_scales(f, r, vector / kSharing);
    if ((wide & kGradients) != 0) {
      load_gradients<true>(r, vector, kEach);
    } else {
      load_gradients<false>(r, vector, left);
    }
    loads_end();
    run(f, r, vector, lane % kSharing * kEach, (wide & kOthers) != 0, left);
  }
};

template <class F, bool kStats>
__global__ void __launch_bounds__(kThreads, F::kAny ? (kStats ? 3 : 4) : 5)
    coded_kernel(const __grid_constant__ SweepLaunch launch) {
  using Scalars = PaceRule::Scalars;
  using Sums = std::conditional_t<kStats, PaceThreadSums, NoSums>;
  if (skipped(launch.found_inf)) return;
  __shared__ Scalars scalars;
  __shared__ alignas(16) float spread[kCodeBlock];
  const Stretch part = find_stretch(launch, kCodedCapacity);
  copy_scalars(&scalars, *reinterpret_cast<const Scalars*>(launch.scalars),
               static_cast<const Scalars*>(launch.device_scalars), part.tensor);
  if (threadIdx.x < kCodeBlock) spread[threadIdx.x] = unit_of(evenly(scalars.rounding.moves, threadIdx.x));
  __syncthreads();
  Sums sums;
  const CodedRound<F, Sums> round{launch, part.tensor, scalars, spread, sums};
  const unsigned aligned = opaque(round.aligned());
  const uint32_t first = static_cast<uint32_t>(part.begin / kEach);
#pragma unroll 1
  for (int at = static_cast<int>(threadIdx.x) / 32 * kTile; at < part.count; at += kThreads / 32 * kTile) {
    round.anew().take(first + static_cast<uint32_t>(at / kEach), part.count - at, aligned);
  }
  finish_stats(sums, scalars, launch.sums, part.count);
}

}  // namespace pace
