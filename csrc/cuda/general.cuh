// The CUDA sweep of operands that lie in any of the formats of ../codes.h: it reads formats, flags and uses from the
// launch, where they are the same for all of its threads, and branches. coded.cuh has PACE's, whose frequent formats
// are compiled in; rules with many operands have too many combinations of them. What each format is, ../codes.h alone
// says here; ../cpu/coded.h does the same with a tile.
//
// A warp takes 128 elements a round, a thread 4 consecutive ones, so that 8 threads are a block of codes. Accesses are
// of 16 bytes, 8 where an element has 2, 4 where it has one; an access an element where the operand is not aligned to
// these, and behind the last 128. All loads of a round are before the first use, those of gradients, which alone often
// are not aligned, last.
#pragma once

#include "../codes.h"
#include "sweep.cuh"

namespace pace {

constexpr int kFew = 4;  // elements of a thread
constexpr int kFewTile = 32 * kFew;
constexpr int kFewSharing = kCodeBlock / kFew;  // threads of a block of codes

// ---- elements in registers ------------------------------------------------------------------------------------------

using Packed = uint32_t[kFew];  // 4 elements as they lie in memory

// Where 4 elements lie, which are counted by fours: part.h refuses more than 32 bits of them.
template <class T>
__device__ __forceinline__ T* few_at(T* data, uint32_t vector, int bytes) {
  T* const p = data + static_cast<uint64_t>(vector) * static_cast<uint32_t>(kFew * bytes);
  __builtin_assume(__isGlobal(p));
  return p;
}

__device__ __forceinline__ void load_few(Packed& to, const char* data, uint32_t vector, int bytes, bool wide,
                                         int left) {
  const char* const p = few_at(data, vector, bytes);
  if (wide) {
    if (bytes == 4) {
      const uint4 part = *reinterpret_cast<const uint4*>(p);
      to[0] = part.x, to[1] = part.y, to[2] = part.z, to[3] = part.w;
    } else if (bytes == 2) {
      const uint2 part = *reinterpret_cast<const uint2*>(p);
      to[0] = part.x, to[1] = part.y;
    } else {
      to[0] = *reinterpret_cast<const uint32_t*>(p);
    }
    return;
  }
  uint32_t element[kFew];
#pragma unroll
  for (int j = 0; j < kFew; ++j) {
    element[j] = 0;
    if (j >= left) continue;
    if (bytes == 4) {
      element[j] = reinterpret_cast<const uint32_t*>(p)[j];
    } else if (bytes == 2) {
      element[j] = reinterpret_cast<const uint16_t*>(p)[j];
    } else {
      element[j] = reinterpret_cast<const uint8_t*>(p)[j];
    }
  }
  if (bytes == 4) {
#pragma unroll
    for (int j = 0; j < kFew; ++j) to[j] = element[j];
  } else if (bytes == 2) {
    to[0] = element[0] | element[1] << 16, to[1] = element[2] | element[3] << 16;
  } else {
    to[0] = element[0] | element[1] << 8 | element[2] << 16 | element[3] << 24;
  }
}

// Of each value the lowest bytes.
__device__ __forceinline__ void store_few(char* data, uint32_t vector, int bytes, const Packed& v, bool wide,
                                          int left) {
  char* const p = few_at(data, vector, bytes);
  if (wide) {
    if (bytes == 4) {
      *reinterpret_cast<uint4*>(p) = make_uint4(v[0], v[1], v[2], v[3]);
    } else if (bytes == 2) {
      *reinterpret_cast<uint2*>(p) = make_uint2(__byte_perm(v[0], v[1], 0x5410), __byte_perm(v[2], v[3], 0x5410));
    } else {
      *reinterpret_cast<uint32_t*>(p) =
          __byte_perm(__byte_perm(v[0], v[1], 0x0040), __byte_perm(v[2], v[3], 0x0040), 0x5410);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kFew; ++j) {
    if (j >= left) continue;
    if (bytes == 4) {
      reinterpret_cast<uint32_t*>(p)[j] = v[j];
    } else if (bytes == 2) {
      reinterpret_cast<uint16_t*>(p)[j] = static_cast<uint16_t>(v[j]);
    } else {
      reinterpret_cast<uint8_t*>(p)[j] = static_cast<uint8_t>(v[j]);
    }
  }
}

__device__ __forceinline__ uint16_t half_of(const Packed& from, int j) {
  return static_cast<uint16_t>(from[j / 2] >> (16 * (j % 2)));
}
__device__ __forceinline__ uint8_t byte_of(const Packed& from, int j) {
  return static_cast<uint8_t>(from[0] >> (8 * j));
}

// The largest of the threads that share a block of codes.
__device__ __forceinline__ int32_t largest_of_few(int32_t rank) {
#pragma unroll
  for (int distance = 1; distance < kFewSharing; distance *= 2) {
    rank = larger(rank, __shfl_xor_sync(0xffffffffu, rank, distance));
  }
  return rank;
}

// ---- operands of a definition ---------------------------------------------------------------------------------------

template <class F, int... k>
__device__ __forceinline__ void each(std::integer_sequence<int, k...>, const F& f) {
  (f(std::integral_constant<int, k>()), ...);
}

template <class D>
struct Operands {
  using All = std::make_integer_sequence<int, D::kOperands>;

  static constexpr int of(Codec codec) {
    for (int k = 0; k < D::kOperands; ++k) {
      if (D::kLists[k].codec == codec) return k;
    }
    return -1;
  }
  static constexpr int of(Role role) {
    for (int k = 0; k < D::kOperands; ++k) {
      if (D::kLists[k].role == role) return k;
    }
    return -1;
  }
  static constexpr int last_moment() {
    for (int k = D::kOperands - 1; k >= 0; --k) {
      if (D::kLists[k].codec == Codec::moment) return k;
    }
    return -1;
  }
  static constexpr int words() {
    int most = 0;
    for (const ListInfo& list : D::kLists) most = list.dither > most ? list.dither : most;
    return most / 2 + 1;
  }

  static constexpr int kX = 0, kV = of(Codec::square), kWords = words();
  static constexpr bool kIterates = of(Codec::iterate) >= 0;
  static constexpr int kE = kIterates ? of(Codec::iterate) : of(Codec::average);
  static constexpr int kBefore = of(Role::copy) >= 0 ? of(Role::copy) : kX;  // weights that averages are read beside
  static constexpr int kOther = last_moment() >= 0 ? last_moment() : kE;     // dithers, where there is no v
};

// ---- a round --------------------------------------------------------------------------------------------------------

// The flags of a group (Rule::group), which share a kernel: registers are those of the largest among them.
template <template <unsigned> class Element, int kGroup>
struct Group {
  using Rule = typename Element<0>::Rule;
  using D = typename Rule::D;
  using All = std::make_integer_sequence<unsigned, D::Flag::values>;

  template <unsigned kFlags>
  static constexpr bool has() {
    return Element<kFlags>::kThereInCodes && Rule::group(kFlags) == kGroup;
  }
  template <unsigned... kFlags>
  static constexpr unsigned first(std::integer_sequence<unsigned, kFlags...>) {
    unsigned found = D::Flag::values;
    ((found = has<kFlags>() && kFlags < found ? kFlags : found), ...);
    return found;
  }
  // Operands that any of them has in play, a bit each.
  template <unsigned kFlags>
  static constexpr unsigned its_operands() {
    unsigned bits = 0;
    for (int k = 0; k < D::kOperands; ++k)
      bits |= has<kFlags>() && D::template Uses<kFlags>::kUses[k].in_play() ? 1u << k : 0u;
    return bits;
  }
  template <unsigned... kFlags>
  static constexpr unsigned operands(std::integer_sequence<unsigned, kFlags...>) {
    return (its_operands<kFlags>() | ...);
  }

  using First = Element<first(All())>;
  static constexpr unsigned kOperands = operands(All());
};

// The rule's flags, and formats and uses of operands, come with the launch.
template <template <unsigned> class Element, int kGroup>
struct GeneralRound {
  using G = Group<Element, kGroup>;
  using D = typename G::D;
  using O = Operands<D>;
  using Scalars = typename G::Rule::Scalars;
  using Sums = typename G::First::Sums;
  using Now = typename G::First::Now;
  static constexpr int kCapacity = coded_capacity<D>;

  const SweepLaunch& launch;
  int tensor;
  const Scalars& s;
  const float* const spread;  // the dithers of averages, by place in the block
  Sums& sums;

  // From here on addresses and scalars are loaded anew, instead of kept in registers.
  __device__ __forceinline__ GeneralRound anew() const {
    GeneralRound again = *this;
    asm volatile("" : "+r"(again.tensor)::"memory");
    return again;
  }

  __device__ __forceinline__ char* row(int n) const {
    return reinterpret_cast<char*>(launch.slot[(SweepLaunch::kHeadRows + n) * kCapacity + tensor]);
  }
  __device__ __forceinline__ char* beside(int k) const { return row(D::kOperands + k); }
  __device__ __forceinline__ Format format(int k) const { return format_at(launch.formats, k); }
  __device__ __forceinline__ bool on_grid() const { return is_grid(format(O::kE)); }
  static __device__ __forceinline__ bool joins(Format f) { return f == Format::kPair24 || f == Format::kPair32; }

  // The codes of an average depend on the weights, whatever a step does with it.
  __device__ __forceinline__ bool reads(const Now& now, int k) const {
    if ((G::kOperands >> k & 1) == 0) return false;
    const bool beside_weights = (k == O::kE || k == O::kBefore) && on_grid();
    return launch.reads.always(k) || (launch.reads.sometimes(k) && now.reads(k)) || beside_weights;
  }
  __device__ __forceinline__ bool writes(const Now& now, int k) const {
    if ((G::kOperands >> k & 1) == 0) return false;
    return launch.writes.always(k) || (launch.writes.sometimes(k) && now.writes(k)) || (k == O::kE && on_grid());
  }

  // A bit for each operand whose accesses, and those of what lies beside it, are wide.
  __device__ __forceinline__ unsigned aligned() const {
    unsigned bits = 0;
    each(typename O::All(), [&](auto k) {
      const auto beyond = [](const void* p, int bytes) {
        return static_cast<unsigned>(reinterpret_cast<uintptr_t>(p)) & static_cast<unsigned>(kFew * bytes - 1);
      };
      unsigned off = beyond(row(k), bytes_of(format(k)));
      if (joins(format(k))) off |= beyond(beside(k), bytes_of_rest(format(k)));
      bits |= off == 0 ? 1u << k : 0u;
    });
    return bits;
  }

  struct Raw {
    Packed words[D::kOperands], rest[D::kOperands];
    int32_t scale[D::kOperands];
  };
  using Floats = float[D::kOperands][kFew];

  template <int k>
  __device__ __forceinline__ void load(const Now& now, Raw& r, uint32_t vector, unsigned wide, int left) const {
    constexpr Codec codec = D::kLists[k].codec;
    constexpr bool blocks = codec == Codec::moment || codec == Codec::square, pairs = codec == Codec::weight,
                   averages = k == O::kE;
#pragma unroll
    for (int j = 0; j < kFew; ++j) r.words[k][j] = r.rest[k][j] = 0;
    r.scale[k] = 127;
    if (!reads(now, k)) return;
    const Format f = format(k);
    const bool is_wide = (wide >> k & 1) != 0;
    load_few(r.words[k], row(k), vector, bytes_of(f), is_wide, left);
    if constexpr (pairs || averages) {
      if (joins(f)) load_few(r.rest[k], beside(k), vector, bytes_of_rest(f), is_wide, left);
    }
    if constexpr (blocks || averages) {
      if (in_blocks(f) && left > 0) r.scale[k] = reinterpret_cast<const uint8_t*>(beside(k))[vector / kFewSharing];
    }
  }

  template <int k>
  __device__ __forceinline__ void decode(const Raw& r, Floats& all, float (&grid)[kFew], float (&offset)[kFew]) const {
    constexpr Codec codec = D::kLists[k].codec;
    constexpr bool halves = codec == Codec::none || codec == Codec::weight;  // may be float16
    const Format f = format(k);
    const Packed& w = r.words[k];
    float (&a)[kFew] = all[k];
    const auto every = [&](auto element) {
#pragma unroll
      for (int j = 0; j < kFew; ++j) a[j] = element(j);
    };
    if (f == Format::kFloat32) return every([&](int j) { return float_of(w[j]); });
    if constexpr (halves) {
      if (f == Format::kFloat16) return every([&](int j) { return Float16::load(half_of(w, j)); });
    }
    if constexpr (codec == Codec::weight) {
      if (f == Format::kPair32) {
        return every([&](int j) { return joined(half_of(w, j), static_cast<int16_t>(half_of(r.rest[k], j))); });
      }
    }
    if constexpr (codec == Codec::weight || k == O::kE) {
      if (f == Format::kPair24) {
        return every([&](int j) { return joined(half_of(w, j), static_cast<int8_t>(byte_of(r.rest[k], j))); });
      }
    }
    if constexpr (codec == Codec::moment) {
      if (f == Format::kMoment8) return every([&](int j) { return MCode::load(byte_of(w, j), r.scale[k]); });
    }
    if constexpr (codec == Codec::square) {
      if (f == Format::kSquare8) return every([&](int j) { return VCode::load(byte_of(w, j), r.scale[k]); });
    }
    if constexpr (k == O::kE) {
      const bool narrow = f == Format::kGrid8;
      return every([&](int j) {
        const int32_t code = narrow ? static_cast<int8_t>(byte_of(w, j)) : static_cast<int16_t>(half_of(w, j));
        const auto p = GridCode<8>::load(code, all[O::kBefore][j], r.scale[k]);
        grid[j] = p.grid, offset[j] = p.offset;
        return p.grid + p.offset;
      });
    } else {
      every([&](int j) { return BFloat16::load(half_of(w, j)); });
    }
  }

  template <unsigned... kFlags>
  __device__ __forceinline__ void step(Floats& a, int left, std::integer_sequence<unsigned, kFlags...>) const {
    const unsigned flags = launch.flags;
    (step_with<kFlags>(flags, a, left), ...);
  }
  template <unsigned kFlags>
  __device__ __forceinline__ void step_with(unsigned flags, Floats& a, int left) const {
    if constexpr (G::template has<kFlags>()) {
      if (flags != kFlags) return;
      const typename Element<kFlags>::Now now(s, launch.now);
#pragma unroll
      for (int j = 0; j < kFew; ++j) {
        float one[D::kOperands];
#pragma unroll
        for (int k = 0; k < D::kOperands; ++k) one[k] = a[k][j];
        const Sums before = sums;
        Element<kFlags>::step(s, now, one, sums);
        if (j >= left) sums = before;
#pragma unroll
        for (int k = 0; k < D::kOperands; ++k) a[k][j] = one[k];
      }
    }
  }

  // 4 elements from `vector` on, the first of which is number `place` of its block: decoded, stepped, encoded, stored.
  // A thread of which none is left takes part in the maxima alone: blocks are there or not as a whole.
  __device__ __forceinline__ void take(uint32_t vector, int place, unsigned wide, int left) const {
    constexpr int kG = O::of(Role::gradient);
    const Now now(s, launch.now);
    Floats a;
    float grid[kFew] = {}, offset[kFew] = {};
    {
      Raw r;
      each(typename O::All(), [&](auto k) {
        if constexpr (k != kG) load<k>(now, r, vector, wide, left);
      });
      if constexpr (kG >= 0) load<kG>(now, r, vector, wide, left);
      loads_end();
      each(typename O::All(), [&](auto k) { decode<k>(r, a, grid, offset); });
    }
    step(a, left, typename G::All());

    const GeneralRound to = anew();
    uint32_t h[O::kWords][kFew];
#pragma unroll
    for (int j = 0; j < kFew; ++j) {
      float second;
      if constexpr (O::kV < 0) {
        second = float_of(settled(a[O::kOther][j]));
      } else {
        const float v = settled_square(a[O::kV][j]);
        second = to.writes(now, O::kV) ? v : float_of(settled(a[O::kOther][j]));
      }
      h[0][j] = dither(settled(a[O::kX][j]), second, to.s.rounding.key);
#pragma unroll
      for (int word = 1; word < O::kWords; ++word) h[word][j] = further(h[word - 1][j]);
    }
    each(typename O::All(), [&](auto k) {
      if constexpr (k != O::kX && k != O::kE && k != kG && D::kLists[k].mutable_) {
        if (to.writes(now, k)) to.template store_moment<k>(vector, a[k], h[D::kLists[k].dither / 2], wide, left);
      }
    });
    float back[kFew];
    to.store_weight(to.writes(now, O::kX), vector, a[O::kX], h[0], back, wide, left);
    if (to.writes(now, O::kE)) {
      to.store_average(vector, a[O::kE], h[D::kLists[O::kE].dither / 2], grid, offset, back, place, wide, left);
    }
  }

  // All threads of a block have read its scale before they exchanged their maxima.
  __device__ __forceinline__ void store_scale(int k, uint32_t vector, int32_t b, int left) const {
    if (threadIdx.x % kFewSharing == 0 && left > 0) {
      reinterpret_cast<uint8_t*>(beside(k))[vector / kFewSharing] = static_cast<uint8_t>(b);
    }
  }

  template <class Code>
  __device__ __forceinline__ void encode(int k, uint32_t vector, const float (&a)[kFew], const uint32_t (&h)[kFew],
                                         int shift, Packed& words, int left) const {
    int32_t rank = kRankOfZero;
#pragma unroll
    for (int j = 0; j < kFew; ++j) rank = larger(rank, rank_of(a[j]));
    const int32_t b = Code::scale(largest_of_few(rank));
#pragma unroll
    for (int j = 0; j < kFew; ++j) words[j] = Code::store(a[j], b, Code::dithered(h[j] >> shift));
    store_scale(k, vector, b, left);
  }

  template <int k>
  __device__ __forceinline__ void store_moment(uint32_t vector, const float (&a)[kFew], const uint32_t (&h)[kFew],
                                               unsigned wide, int left) const {
    constexpr Codec codec = D::kLists[k].codec;
    constexpr int shift = D::kLists[k].dither % 2 * 16;
    const Format f = format(k);
    Packed words;
    if (f == Format::kFloat32) {
#pragma unroll
      for (int j = 0; j < kFew; ++j) words[j] = bits_of(a[j]);
    } else if (codec == Codec::moment && f == Format::kMoment8) {
      encode<MCode>(k, vector, a, h, shift, words, left);
    } else if (codec == Codec::square && f == Format::kSquare8) {
      float v[kFew];
#pragma unroll
      for (int j = 0; j < kFew; ++j) v[j] = settled_square(a[j]);
      encode<VCode>(k, vector, v, h, 0, words, left);
    } else if (codec == Codec::second && f == Format::kBFloat16) {
#pragma unroll
      for (int j = 0; j < kFew; ++j) words[j] = BFloat16::store(a[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kFew; ++j) words[j] = rounded_bits<16>(settled(a[j]), h[j] >> shift) >> 16;
    }
    store_few(row(k), vector, bytes_of(f), words, (wide >> k & 1) != 0, left);
  }

  // In `back` as it will be read. Where it is not written it is as it was read.
  __device__ __forceinline__ void store_weight(bool written, uint32_t vector, const float (&x)[kFew],
                                               const uint32_t (&h)[kFew], float (&back)[kFew], unsigned wide,
                                               int left) const {
    const Format f = format(O::kX);
    Packed words;
#pragma unroll
    for (int j = 0; j < kFew; ++j) back[j] = x[j], words[j] = bits_of(x[j]);
    if (f == Format::kFloat16) {
#pragma unroll
      for (int j = 0; j < kFew; ++j) words[j] = Float16::store(x[j]), back[j] = Float16::load(words[j] & 0xffffu);
    } else if (f == Format::kBFloat16) {
#pragma unroll
      for (int j = 0; j < kFew; ++j) words[j] = BFloat16::store(x[j]), back[j] = float_of(words[j] << 16);
    } else if (D::kLists[O::kX].codec == Codec::weight && f == Format::kDithered16) {
#pragma unroll
      for (int j = 0; j < kFew; ++j) {
        const uint32_t bits = rounded_bits<16>(settled(x[j]), h[j]);
        words[j] = bits >> 16, back[j] = float_of(bits);
      }
    } else if (D::kLists[O::kX].codec == Codec::weight && f != Format::kFloat32) {
      const bool all = f == Format::kPair32;
#pragma unroll
      for (int j = 0; j < kFew; ++j) {
        words[j] = settled(x[j]);
        words[j] = all ? words[j] : rounded_bits<24>(words[j], h[j]);
        back[j] = float_of(words[j]);
      }
      return store_pair(O::kX, vector, words, all, wide, left);
    }
    if (written) store_few(row(O::kX), vector, bytes_of(f), words, (wide >> O::kX & 1) != 0, left);
  }

  __device__ __forceinline__ void store_pair(int k, uint32_t vector, const Packed& bits, bool all, unsigned wide,
                                             int left) const {
    Packed words;
    const bool is_wide = (wide >> k & 1) != 0;
#pragma unroll
    for (int j = 0; j < kFew; ++j) words[j] = high_part(bits[j]);
    store_few(row(k), vector, 2, words, is_wide, left);
#pragma unroll
    for (int j = 0; j < kFew; ++j) words[j] = static_cast<uint32_t>(rest_of_32(bits[j])) >> (all ? 0 : 8);
    store_few(beside(k), vector, all ? 2 : 1, words, is_wide, left);
  }

  __device__ __forceinline__ void store_average(uint32_t vector, const float (&e)[kFew], const uint32_t (&h)[kFew],
                                                const float (&grid)[kFew], const float (&offset)[kFew],
                                                const float (&back)[kFew], int place, unsigned wide, int left) const {
    const Format f = format(O::kE);
    Packed words;
    if (is_grid(f)) {
      GridCode<8>::Place p[kFew];
      int32_t rank = kRankOfZero;
#pragma unroll
      for (int j = 0; j < kFew; ++j) {
        p[j] = {grid[j], offset[j], e[j]};
        if constexpr (!O::kIterates) p[j] = GridCode<8>::moved(p[j], back[j], s.rounding.weight);
        rank = larger(rank, rank_of(GridCode<8>::difference(p[j], back[j])));
      }
      rank = largest_of_few(rank);
      const int32_t b = f == Format::kGrid8 ? GridCode<8>::scale(rank) : GridCode<16>::scale(rank);
#pragma unroll
      for (int j = 0; j < kFew; ++j) {
        const float u = O::kIterates ? unit_of(h[j]) : spread[place + j];
        words[j] = static_cast<uint32_t>(
            f == Format::kGrid8 ? GridCode<8>::store(p[j], back[j], b, u)
                                : GridCode<16>::store({p[j].grid, p[j].offset, p[j].increment}, back[j], b, u));
      }
      store_scale(O::kE, vector, b, left);
    } else if (f == Format::kPair24) {
#pragma unroll
      for (int j = 0; j < kFew; ++j) words[j] = rounded_bits<24>(settled(e[j]), h[j] >> 24);
      return store_pair(O::kE, vector, words, false, wide, left);
    } else {
#pragma unroll
      for (int j = 0; j < kFew; ++j) words[j] = bits_of(e[j]);
    }
    store_few(row(O::kE), vector, bytes_of(f), words, (wide >> O::kE & 1) != 0, left);
  }
};

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <template <unsigned> class Element, int kGroup>
__global__ void __launch_bounds__(kThreads, Group<Element, kGroup>::First::kBlocksInCodes)
    general_kernel(const __grid_constant__ SweepLaunch launch) {
  using Round = GeneralRound<Element, kGroup>;
  using Scalars = typename Round::Scalars;
  if (skipped(launch.found_inf)) return;
  __shared__ Scalars scalars;
  __shared__ float spread[kCodeBlock];
  const Stretch part = find_stretch(launch, Round::kCapacity);
  copy_scalars(&scalars, *reinterpret_cast<const Scalars*>(launch.scalars),
               static_cast<const Scalars*>(launch.device_scalars), part.tensor);
  if (threadIdx.x < kCodeBlock) spread[threadIdx.x] = unit_of(evenly(scalars.rounding.moves, threadIdx.x));
  __syncthreads();
  typename Round::Sums sums;
  const Round round{launch, part.tensor, scalars, spread, sums};
  const unsigned aligned = round.aligned();
  const uint32_t first = static_cast<uint32_t>(part.begin / kFew);
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
  for (int at = static_cast<int>(threadIdx.x) / 32 * kFewTile; at < part.count; at += kThreads / 32 * kFewTile) {
    const int count = part.count - at;
    round.anew().take(first + static_cast<uint32_t>(at / kFew + lane), lane % kFewSharing * kFew,
                      count >= kFewTile ? aligned : 0u, count - lane * kFew);
  }
  Round::G::First::finish(sums, scalars, launch.sums, part.count);
}

template <template <unsigned> class Element, int... kGroup>
const void* general_of(int group, std::integer_sequence<int, kGroup...>) {
  static const void* const functions[] = {(const void*)general_kernel<Element, kGroup>...};
  return functions[group];
}

template <template <unsigned> class Element>
const void* general_function(const KernelId& id) {
  return general_of<Element>(id.group, std::make_integer_sequence<int, Element<0>::Rule::kGroups>());
}

}  // namespace pace
