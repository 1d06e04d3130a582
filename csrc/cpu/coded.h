// Tiles of operands that lie in the formats of ../codes.h: read into floats, and encoded again once the rule has run on
// the whole tile, since codes share a scale within a block, and an average beside its weight needs the new weight.
// Included by sweep.h alone.
#pragma once

#include "../codes.h"
#include "elements.h"

namespace pace {
namespace {

// The two parts of a float, which may lie in different orders.
struct HighPart {
  using Element = uint16_t;
  PACE_RULE uint16_t store(float a) { return high_part(settled(a)); }
};
struct RestOf32 {
  using Element = int16_t;
  PACE_RULE int16_t store(float a) { return rest_of_32(settled(a)); }
};
struct RestOf24 {
  using Element = int8_t;
  PACE_RULE int8_t store(float a) { return rest_of_24(settled(a)); }
};

template <class Rest>
void load_pair(const Stream& s, int64_t begin, int64_t n, float* out) {
  load_tile<BFloat16>(s, begin, n, out);
  for_each_run(*s.rest, begin, n, [&](int64_t at, int64_t stride, int64_t done, int64_t count) {
    const auto* const rest = static_cast<const typename Rest::Element*>(s.rest->data) + at;
    float* const to = out + done;
    if (stride == 1) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) to[i] = joined(static_cast<uint16_t>(bits_of(to[i]) >> 16), rest[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = joined(static_cast<uint16_t>(bits_of(to[i]) >> 16), rest[i * stride]);
    }
  });
}

template <class Rest>
void store_pair(const Stream& s, int64_t begin, int64_t n, const float* in) {
  store_tile<HighPart>(s, begin, n, in);
  store_tile<Rest>(*s.rest, begin, n, in);
}

// Rounds in place, by the bits of `h` from `kShift` on.
template <int kBits, int kShift = 0>
void round_tile(float* a, const uint32_t* h, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) a[i] = float_of(rounded_bits<kBits>(settled(a[i]), h[i] >> kShift));
}

template <class Code>
void load_codes(const Stream& s, int64_t begin, int64_t n, float* out) {
  const uint8_t* const codes = static_cast<const uint8_t*>(s.data) + begin;
  for (int64_t k = 0; k < n; k += kCodeBlock) {
    const int32_t b = s.scales[(begin + k) / kCodeBlock];
#pragma omp simd
    for (int i = 0; i < kCodeBlock; ++i) out[k + i] = Code::load(codes[k + i], b);
  }
}

template <class Code, int kShift = 0>
void store_codes(const Stream& s, int64_t begin, int64_t n, const float* in, const uint32_t* h) {
  uint8_t* const codes = static_cast<uint8_t*>(s.data) + begin;
  for (int64_t k = 0; k < n; k += kCodeBlock) {
    int32_t rank = kRankOfZero;
#pragma omp simd reduction(max : rank)
    for (int i = 0; i < kCodeBlock; ++i) rank = larger(rank, rank_of(in[k + i]));
    const int32_t b = Code::scale(rank);
    alignas(64) uint32_t code[kCodeBlock];
#pragma omp simd
    for (int i = 0; i < kCodeBlock; ++i) code[i] = Code::store(in[k + i], b, Code::dithered(h[k + i] >> kShift));
#pragma omp simd
    for (int i = 0; i < kCodeBlock; ++i) codes[k + i] = static_cast<uint8_t>(code[i]);
    s.scales[(begin + k) / kCodeBlock] = static_cast<uint8_t>(b);
  }
}

// Averages, or iterates, beside their weights.
struct GridTile {
  alignas(64) float grid[kLargestTile], offset[kLargestTile];

  template <int kBits, class Int>
  void load(const Stream& s, int64_t begin, int64_t n, const float* x, float* e) {
    const Int* const codes = static_cast<const Int*>(s.data) + begin;
    for (int64_t k = 0; k < n; k += kCodeBlock) {
      const int32_t b = s.scales[(begin + k) / kCodeBlock];
#pragma omp simd
      for (int i = 0; i < kCodeBlock; ++i) {
        const auto p = GridCode<kBits>::load(codes[k + i], x[k + i], b);
        grid[k + i] = p.grid, offset[k + i] = p.offset;
        e[k + i] = p.grid + p.offset;
      }
    }
  }

  // `x`: the new weights as they will be read back. Where the weight is 1 the average is x itself; of loops with that
  // choice in them gcc vectorizes but one arm. `u`: the dither of each place in a block.
  template <int kBits, class Int>
  void store_average(const Stream& s, int64_t begin, int64_t n, const float* x, float weight, const float* u) {
    if (weight == 1.0f) {
      for (int64_t i = 0; i < n; ++i) grid[i] = x[i], offset[i] = 0.0f;
    }
    for (int64_t k = 0; k < n; k += kCodeBlock) {
      const float *const g = grid + k, *const o = offset + k, *const to = x + k;
      store_block<kBits, Int>(s, begin, k, x, [=](int i) { return weight * (to[i] - (g[i] + o[i])); }, u);
    }
  }

  // `moves`: how far each iterate moves; `h` dithers it.
  template <int kBits, class Int>
  void store_iterate(const Stream& s, int64_t begin, int64_t n, const float* x, const float* moves, const uint32_t* h) {
    for (int64_t k = 0; k < n; k += kCodeBlock) {
      alignas(64) float u[kCodeBlock];
#pragma omp simd
      for (int i = 0; i < kCodeBlock; ++i) u[i] = unit_of(h[k + i]);
      const float* const move = moves + k;
      store_block<kBits, Int>(s, begin, k, x, [=](int i) { return move[i]; }, u);
    }
  }

 private:
  // Codes are narrowed in a loop of their own, or floats fill half a vector.
  template <int kBits, class Int, class Move>
  inline __attribute__((always_inline)) void store_block(const Stream& s, int64_t begin, int64_t k, const float* x,
                                                         Move move, const float* u) {
    using Code = GridCode<kBits>;
    Int* const codes = static_cast<Int*>(s.data) + begin;
    alignas(64) float increment[kCodeBlock];
    alignas(64) int32_t code[kCodeBlock];
    int32_t rank = kRankOfZero;
#pragma omp simd reduction(max : rank)
    for (int i = 0; i < kCodeBlock; ++i) {
      const float more = move(i);
      rank = larger(rank, rank_of(((grid[k + i] - x[k + i]) + offset[k + i]) + more));
      increment[i] = more;
    }
    const int32_t b = Code::scale(rank);
#pragma omp simd
    for (int i = 0; i < kCodeBlock; ++i) {
      const float g = grid[k + i], o = offset[k + i];
      code[i] = Code::store({g, o, increment[i]}, x[k + i], b, u[i]);
    }
#pragma omp simd
    for (int i = 0; i < kCodeBlock; ++i) codes[k + i] = static_cast<Int>(code[i]);
    s.scales[(begin + k) / kCodeBlock] = static_cast<uint8_t>(b);
  }
};

// Operands of which none is in codes.
struct Plain {
  const uint32_t read;

  static constexpr bool has(int) { return false; }
  static constexpr bool any() { return false; }
  static float* opened(int, int64_t, int64_t, float* const*, float*) { return nullptr; }
  static void close(int64_t, int64_t, float* const*) {}
};

// The operands of a call, by the definition D, that lie in codes.
template <class D>
class Coded {
  static constexpr int operand(Codec codec) {
    for (int k = 0; k < D::kOperands; ++k) {
      if (D::kLists[k].codec == codec) return k;
    }
    return -1;
  }
  static constexpr int before() {
    for (int k = 0; k < D::kOperands; ++k) {
      if (D::kLists[k].role == Role::copy) return k;
    }
    return 0;
  }
  static constexpr int kX = 0, kV = operand(Codec::square);
  static constexpr int kBefore = before();  // the weights that an average is read beside
  static constexpr int kE = operand(Codec::average) >= 0 ? operand(Codec::average) : operand(Codec::iterate);
  static_assert(kE > kBefore, "averages are read beside weights, which are read first");
  // In place of a second moment, where there is none.
  static constexpr int kOther = [] {
    for (int k = D::kOperands - 1; k >= 0; --k) {
      if (D::kLists[k].codec == Codec::moment) return k;
    }
    return kE;
  }();
  static constexpr bool kIterates = operand(Codec::average) < 0;
  // Of each operand, the word of its dither. A copy, since a name of D's would be a symbol that instruction sets share.
  struct Words {
    int of[D::kOperands], count;
  };
  static constexpr Words kWords = [] {
    Words words{};
    for (int k = 0; k < D::kOperands; ++k) {
      words.of[k] = D::kLists[k].dither / 2;
      if (words.of[k] >= words.count) words.count = words.of[k] + 1;
    }
    return words;
  }();

 public:
  uint32_t read;

  Coded(const Stream* streams, const Rounding& rounding, uint32_t reads, uint32_t writes)
      : read(reads), streams_(streams), rounding_(rounding), written_(writes) {
    for (int k = 0; k < D::kOperands; ++k) {
      const Format format = streams[k].format;
      if (streams[k].data == nullptr || !is_coded(format)) continue;
      const bool grid = is_grid(format);
      if (!grid && (reads >> k & 1) == 0) continue;
      coded_ |= 1u << k;
      const bool hashed = grid ? kIterates : format != Format::kPair32;
      if (hashed) words_ = larger(words_, kWords.of[k] + 1);
    }
    if (!has(kE) || !is_grid(streams[kE].format)) return;
    // Its codes depend on the weights, whatever a step does with the average.
    read |= 1u << kE | 1u << kBefore;
    for (uint32_t i = 0; i < kCodeBlock; ++i) spread_[i] = unit_of(evenly(rounding.moves, i));
  }

  bool has(int k) const { return (coded_ >> k & 1) != 0; }
  bool any() const { return coded_ != 0; }

  // Operand k as floats; `data` has those before it.
  float* opened(int k, int64_t at, int64_t n, float* const* data, float* out) {
    const Stream& s = streams_[k];
    switch (s.format) {
      case Format::kPair24:
        load_pair<RestOf24>(s, at, n, out);
        break;
      case Format::kPair32:
        load_pair<RestOf32>(s, at, n, out);
        break;
      case Format::kMoment8:
        load_codes<MCode>(s, at, n, out);
        break;
      case Format::kSquare8:
        load_codes<VCode>(s, at, n, out);
        break;
      case Format::kGrid8:
        grid_.template load<8, int8_t>(s, at, n, data[kBefore], out);
        break;
      case Format::kGrid16:
        grid_.template load<16, int16_t>(s, at, n, data[kBefore], out);
        break;
      default:
        load_tile<BFloat16>(s, at, n, out);
    }
    return out;
  }

  // Writes the coded operands, which the rule has left in `data`, new. All are dithered by the weight and the second
  // moment as they were before any of them is rounded.
  void close(int64_t at, int64_t n, float* const* data) {
    alignas(64) uint32_t words[kWords.count][kLargestTile];
    hash(n, data, words);
    close_states(at, n, data, words, std::make_integer_sequence<int, D::kOperands>{});
    if (has(kX)) close_weight(at, n, data[kX], words[0]);
    if (has(kE)) close_average(at, n, data[kX], data[kE], words[kWords.of[kE]]);
  }

 private:
  void hash(int64_t n, float* const* data, uint32_t (*words)[kLargestTile]) const {
    if (words_ == 0) return;
    const uint32_t key = rounding_.key;
    const float* const x = data[kX];
    uint32_t* const h = words[0];
    if (kV >= 0 && data[larger(kV, 0)] != nullptr) {
      const float* const v = data[larger(kV, 0)];
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) h[i] = dither(settled(x[i]), settled_square(v[i]), key);
    } else {
      const float* const other = data[kOther];
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) h[i] = dither(settled(x[i]), float_of(settled(other[i])), key);
    }
    for (int word = 1; word < kWords.count && word < words_; ++word) {
      const uint32_t* const last = words[word - 1];
      uint32_t* const next = words[word];
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) next[i] = further(last[i]);
    }
  }

  template <int... k>
  void close_states(int64_t at, int64_t n, float* const* data, uint32_t (*words)[kLargestTile],
                    std::integer_sequence<int, k...>) const {
    (close_state<k>(at, n, data[k], words), ...);
  }

  // Moments and gradients: what is neither a weight nor an average.
  template <int k>
  void close_state(int64_t at, int64_t n, float* a, uint32_t (*words)[kLargestTile]) const {
    constexpr ListInfo list = D::kLists[k];
    if constexpr (list.codec != Codec::none && list.codec != Codec::weight && k != kE) {
      if (!has(k) || (written_ >> k & 1) == 0) return;
      constexpr int kShift = list.dither % 2 * 16;
      const Stream& s = streams_[k];
      const uint32_t* const h = words[list.dither / 2];
      if constexpr (list.codec == Codec::moment) {
        if (s.format == Format::kMoment8) return store_codes<MCode, kShift>(s, at, n, a, h);
      }
      if constexpr (list.codec == Codec::square) {
        if (s.format == Format::kSquare8) {
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) a[i] = settled_square(a[i]);
          return store_codes<VCode>(s, at, n, a, h);
        }
      }
      round_tile<16, kShift>(a, h, n);
      store_tile<HighPart>(s, at, n, a);
    }
  }

  void close_weight(int64_t at, int64_t n, float* x, const uint32_t* h) const {
    const Stream& s = streams_[kX];
    if (s.format == Format::kPair32) return store_pair<RestOf32>(s, at, n, x);
    if (s.format == Format::kPair24) {
      round_tile<24>(x, h, n);
      return store_pair<RestOf24>(s, at, n, x);
    }
    round_tile<16>(x, h, n);
    store_tile<HighPart>(s, at, n, x);
  }

  void close_average(int64_t at, int64_t n, const float* x, float* e, const uint32_t* h) {
    const Stream& s = streams_[kE];
    if (s.format == Format::kPair24) {
      if ((written_ >> kE & 1) == 0) return;
      round_tile<24, 24>(e, h, n);
      return store_pair<RestOf24>(s, at, n, e);
    }
    alignas(64) float scratch[kLargestTile];
    const float* const back = read_back(x, n, scratch);
    if (kIterates) {
      s.format == Format::kGrid8 ? grid_.template store_iterate<8, int8_t>(s, at, n, back, e, h)
                                 : grid_.template store_iterate<16, int16_t>(s, at, n, back, e, h);
    } else {
      const float weight = rounding_.weight;
      s.format == Format::kGrid8 ? grid_.template store_average<8, int8_t>(s, at, n, back, weight, spread_)
                                 : grid_.template store_average<16, int16_t>(s, at, n, back, weight, spread_);
    }
  }

  // The weights as the next step will read them.
  const float* read_back(const float* x, int64_t n, float* out) const {
    if (streams_[kX].format == Format::kBFloat16) return through<BFloat16>(x, n, out);
    if (streams_[kX].format == Format::kFloat16) return through<Float16>(x, n, out);
    return x;
  }

  template <class F>
  static const float* through(const float* x, int64_t n, float* out) {
    alignas(64) typename F::Element stored[kLargestTile];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) stored[i] = F::store(x[i]);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = F::load(stored[i]);
    return out;
  }

  const Stream* const streams_;
  const Rounding& rounding_;
  const uint32_t written_;
  uint32_t coded_ = 0;
  int32_t words_ = 0;  // of the dither, that are needed
  alignas(64) float spread_[kCodeBlock];
  GridTile grid_;
};

}  // namespace
}  // namespace pace
