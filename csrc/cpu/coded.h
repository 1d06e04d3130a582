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

template <class Code>
void store_codes(const Stream& s, int64_t begin, int64_t n, const float* in, const uint32_t* h) {
  uint8_t* const codes = static_cast<uint8_t*>(s.data) + begin;
  for (int64_t k = 0; k < n; k += kCodeBlock) {
    int32_t rank = kRankOfZero;
#pragma omp simd reduction(max : rank)
    for (int i = 0; i < kCodeBlock; ++i) rank = larger(rank, rank_of(in[k + i]));
    const int32_t b = Code::scale(rank);
    alignas(64) uint32_t code[kCodeBlock];
#pragma omp simd
    for (int i = 0; i < kCodeBlock; ++i) code[i] = Code::store(in[k + i], b, Code::dithered(h[k + i]));
#pragma omp simd
    for (int i = 0; i < kCodeBlock; ++i) codes[k + i] = static_cast<uint8_t>(code[i]);
    s.scales[(begin + k) / kCodeBlock] = static_cast<uint8_t>(b);
  }
}

// Averages beside their weights.
struct GridTile {
  alignas(64) float grid[kLargestTile], offset[kLargestTile], u[kCodeBlock];

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
  // choice in them gcc vectorizes but one arm. Codes are narrowed in a loop of their own, or floats fill half a vector.
  template <int kBits, class Int>
  void store(const Stream& s, int64_t begin, int64_t n, const float* x, float weight) {
    using Code = GridCode<kBits>;
    Int* const codes = static_cast<Int*>(s.data) + begin;
    if (weight == 1.0f) {
      for (int64_t i = 0; i < n; ++i) grid[i] = x[i], offset[i] = 0.0f;
    }
    for (int64_t k = 0; k < n; k += kCodeBlock) {
      alignas(64) float increment[kCodeBlock];
      alignas(64) int32_t code[kCodeBlock];
      int32_t rank = kRankOfZero;
#pragma omp simd reduction(max : rank)
      for (int i = 0; i < kCodeBlock; ++i) {
        const float g = grid[k + i], o = offset[k + i], to = x[k + i], more = weight * (to - (g + o));
        rank = larger(rank, rank_of(((g - to) + o) + more));
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
  }
};

// The operands of a rule that has none in codes.
template <class D, bool kCodes = std::is_base_of_v<PaceDefinition, D>>
struct Coded {
  const uint32_t read;

  Coded(const Stream*, const Rounding*, uint32_t reads, uint32_t) : read(reads) {}
  static constexpr bool has(int) { return false; }
  static constexpr bool any() { return false; }
  static float* opened(int, int64_t, int64_t, float* const*, float*) { return nullptr; }
  static void close(int64_t, int64_t, float* const*) {}
};

template <class D>
struct Coded<D, true> {
  static constexpr int operand(Codec codec) {
    for (int k = 0; k < D::kOperands; ++k) {
      if (D::kLists[k].codec == codec) return k;
    }
    return -1;
  }
  static constexpr int kX = operand(Codec::weight), kM = operand(Codec::moment), kV = operand(Codec::square),
                       kE = operand(Codec::average);
  static_assert(kX == 0, "averages are read beside weights, which are read first");

  uint32_t read;

  Coded(const Stream* streams, const Rounding* rounding, uint32_t reads, uint32_t writes)
      : read(reads), streams_(streams), rounding_(rounding), written_(writes) {
    if (rounding == nullptr) return;
    for (int k = 0; k < D::kOperands; ++k) {
      if (streams[k].data == nullptr || !is_coded(streams[k].format)) continue;
      const bool grid = is_grid(streams[k].format);
      if (!grid && (reads >> k & 1) == 0) continue;
      coded_ |= 1u << k;
      hashes_ = hashes_ || !(grid || streams[k].format == Format::kPair32);
    }
    if (kE >= 0 && has(kE) && is_grid(streams[kE].format)) {
      read |= 1u << kE;  // its codes depend on the weights, whatever a step does with the average
      for (uint32_t i = 0; i < kCodeBlock; ++i) grid_.u[i] = unit_of(evenly(rounding->moves, i));
    }
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
        grid_.template load<8, int8_t>(s, at, n, data[kX], out);
        break;
      case Format::kGrid16:
        grid_.template load<16, int16_t>(s, at, n, data[kX], out);
        break;
      default:
        load_tile<BFloat16>(s, at, n, out);
    }
    return out;
  }

  // Writes the coded operands, which the rule has left in `data`, new. All are dithered by the weight and the second
  // moment as they were before any of them is rounded.
  void close(int64_t at, int64_t n, float* const* data) {
    float *const x = data[kX], *const v = data[kV];
    alignas(64) uint32_t h[kLargestTile];
    if (hashes_) {
      const uint32_t key = rounding_->key;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) h[i] = dither(settled(x[i]), settled_square(v[i]), key);
    }
    close_moment(kM, at, n, data, h);
    close_moment(kV, at, n, data, h);
    if (has(kX)) close_weight(at, n, x, h);
    if (!has(kE)) return;
    const Stream& s = streams_[kE];
    if (s.format == Format::kPair24) {
      if ((written_ >> kE & 1) == 0) return;
      round_tile<24, 24>(data[kE], h, n);
      store_pair<RestOf24>(s, at, n, data[kE]);
      return;
    }
    alignas(64) float scratch[kLargestTile];
    const float* const back = read_back(x, n, scratch);
    if (s.format == Format::kGrid8) {
      grid_.template store<8, int8_t>(s, at, n, back, rounding_->weight);
    } else {
      grid_.template store<16, int16_t>(s, at, n, back, rounding_->weight);
    }
  }

 private:
  void close_moment(int k, int64_t at, int64_t n, float* const* data, const uint32_t* h) const {
    if (!has(k) || (written_ >> k & 1) == 0) return;
    const Stream& s = streams_[k];
    if (s.format == Format::kMoment8) {
      store_codes<MCode>(s, at, n, data[k], h);
    } else if (s.format == Format::kSquare8) {
      float* const v = data[k];
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) v[i] = settled_square(v[i]);
      store_codes<VCode>(s, at, n, v, h);
    } else {
      if (k == kM) {
        round_tile<16>(data[k], h, n);
      } else {
        round_tile<16, 16>(data[k], h, n);
      }
      store_tile<HighPart>(s, at, n, data[k]);
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
  const Rounding* const rounding_;
  const uint32_t written_;
  uint32_t coded_ = 0;
  bool hashes_ = false;
  GridTile grid_;
};

}  // namespace
}  // namespace pace
