// csrc/codes.h for tests/test_codes.py, which compiles this file once for each instruction set: its functions in loops
// over flat arrays, and the tests that go through all patterns. Loops over blocks are as a sweep would have them.
#include "codes.h"

using namespace pace;

namespace {

// How many i < n there are for which it does not hold.
template <class Holds>
int64_t failures(int64_t n, Holds holds) {
  int64_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) count += holds(static_cast<uint32_t>(i)) ? 0 : 1;
  return count;
}

template <class Code>
void load_blocks(int64_t blocks, const uint8_t* codes, const uint8_t* scales, float* a) {
  for (int64_t k = 0; k < blocks; ++k, a += kCodeBlock, codes += kCodeBlock) {
    const int32_t b = scales[k];
#pragma omp simd
    for (int i = 0; i < kCodeBlock; ++i) a[i] = Code::load(codes[i], b);
  }
}

template <class Code, class Store>
void store_blocks(int64_t blocks, const float* a, const uint32_t* h, uint8_t* codes, uint8_t* scales, Store store) {
  for (int64_t k = 0; k < blocks; ++k, a += kCodeBlock, codes += kCodeBlock) {
    int32_t rank = kRankOfZero;
#pragma omp simd reduction(max : rank)
    for (int i = 0; i < kCodeBlock; ++i) rank = larger(rank, rank_of(a[i]));
    const int32_t b = Code::scale(rank);
#pragma omp simd
    for (int i = 0; i < kCodeBlock; ++i) {
      codes[i] = store(a[i], b, h == nullptr ? Code::kNearest : Code::dithered(h[k * kCodeBlock + i]));
    }
    scales[k] = static_cast<uint8_t>(b);
  }
}

// The average of each block goes by w toward weights that went from x to `to`; or, without codes of before, to e.
template <int kBits, class Int>
void move_blocks(int64_t blocks, const float* x, const float* to, const float* e, float w, const uint32_t* h,
                 Int* codes, uint8_t* scales) {
  using Code = GridCode<kBits>;
  using Place = typename Code::Place;
  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t at = k * kCodeBlock;
    const int32_t was = scales[k];
    float grid[kCodeBlock], offset[kCodeBlock], increment[kCodeBlock];
    int32_t rank = kRankOfZero;
#pragma omp simd reduction(max : rank)
    for (int i = 0; i < kCodeBlock; ++i) {
      const Place p = e == nullptr ? Code::moved(Code::load(codes[at + i], x[at + i], was), to[at + i], w)
                                   : Place{e[at + i], 0.0f, 0.0f};
      rank = larger(rank, rank_of(Code::difference(p, to[at + i])));
      grid[i] = p.grid, offset[i] = p.offset, increment[i] = p.increment;
    }
    const int32_t b = Code::scale(rank);
#pragma omp simd
    for (int i = 0; i < kCodeBlock; ++i) {
      const float u = h == nullptr ? 0.5f : unit_of(h[at + i]);
      codes[at + i] = static_cast<Int>(Code::store({grid[i], offset[i], increment[i]}, to[at + i], b, u));
    }
    scales[k] = static_cast<uint8_t>(b);
  }
}

template <int kBits, class Int>
void load_averages(int64_t blocks, const float* x, const Int* codes, const uint8_t* scales, float* e) {
  for (int64_t k = 0; k < blocks; ++k, x += kCodeBlock, codes += kCodeBlock, e += kCodeBlock) {
    const int32_t b = scales[k];
#pragma omp simd
    for (int i = 0; i < kCodeBlock; ++i) {
      const auto p = GridCode<kBits>::load(codes[i], x[i], b);
      e[i] = p.grid + p.offset;
    }
  }
}

// Every code and scale, with dithers `step` apart: a decoded value gets its code back, whatever the dither.
template <class Code>
int64_t unstable(int codes, uint32_t step) {
  int64_t count = 0;
  for (int32_t b = 24; b <= 254 - Code::kBinades; ++b) {
    for (int32_t c = 0; c < codes; ++c) {
      const float a = Code::decode(static_cast<uint32_t>(c), b);
      count += failures((1u << Code::kDropped) / step, [&](uint32_t i) { return Code::encode(a, b, i * step) == c; });
    }
  }
  return count;
}

// The largest value of a block, each that a float has in three binades, never has the last code.
template <class Code>
int64_t overflowing() {
  int64_t count = 0;
  const uint32_t exponents[] = {24 + Code::kBinades, 127, 252};
  for (const uint32_t exponent : exponents) {
    count += failures(1 << 23, [&](uint32_t i) {
      const float a = float_of((exponent << 23) + i);
      const int32_t b = Code::scale(rank_of(a));
      return Code::encode(a, b, Code::dithered(~0u)) < Code::kLast && Code::encode(a, b, 0) >= Code::kLast / 4;
    });
  }
  return count;
}

// By how many codes, at most, the mean over all dithers of the code is off, on `points` values that are evenly spaced
// over the first two codes. Infinity where a code is off by one or more, or falls while values rise.
template <class Code>
double bias(uint32_t points, uint32_t dithers, int shift) {
  const int32_t b = 127;
  double worst = 0;
  int32_t last_low = 0, last_high = 0;
  for (uint32_t i = 0; i < points; ++i) {
    const uint32_t place = static_cast<uint32_t>((static_cast<uint64_t>(i) << (Code::kDropped + 1)) / points);
    const float a = float_of((127u << 23) + place) - 1.0f;
    int64_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (uint32_t k = 0; k < dithers; ++k) sum += Code::encode(a, b, Code::dithered(k << shift));
    const double exact = static_cast<double>(place) / (1u << Code::kDropped);
    const double off = __builtin_fabs(static_cast<double>(sum) / dithers - exact);
    const int32_t low = Code::encode(a, b, Code::dithered(0)), high = Code::encode(a, b, Code::dithered(~0u));
    if (low < last_low || high < last_high || low <= exact - 1 || high >= exact + 1) return __builtin_inf();
    last_low = low, last_high = high;
    worst = off > worst ? off : worst;
  }
  return worst;
}

}  // namespace

extern "C" {

void dithers(int64_t n, const float* x, const float* v, int64_t step, uint32_t* h) {
  const uint32_t key = dither_key(static_cast<uint32_t>(step));
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) h[i] = dither(settled(x[i]), settled_square(v[i]), key);
}

void evenly_spread(int64_t n, int64_t move, uint32_t* out) {
  const uint32_t moves = static_cast<uint32_t>(move);
  for (int64_t i = 0; i < n; ++i) out[i] = evenly(moves, static_cast<uint32_t>(i % kCodeBlock));
}

void m_store(int64_t blocks, const float* m, const uint32_t* h, uint8_t* codes, uint8_t* scales) {
  store_blocks<MCode>(blocks, m, h, codes, scales, [](auto... a) { return MCode::store(a...); });
}
void v_store(int64_t blocks, const float* v, const uint32_t* h, uint8_t* codes, uint8_t* scales) {
  store_blocks<VCode>(blocks, v, h, codes, scales,
                      [](float a, int32_t b, uint32_t d) { return VCode::store(settled_square(a), b, d); });
}
void m_load(int64_t blocks, const uint8_t* codes, const uint8_t* scales, float* m) {
  load_blocks<MCode>(blocks, codes, scales, m);
}
void v_load(int64_t blocks, const uint8_t* codes, const uint8_t* scales, float* v) {
  load_blocks<VCode>(blocks, codes, scales, v);
}

void e8_move(int64_t blocks, const float* x, const float* to, const float* e, float w, const uint32_t* h, int8_t* codes,
             uint8_t* scales) {
  move_blocks<8>(blocks, x, to, e, w, h, codes, scales);
}
void e16_move(int64_t blocks, const float* x, const float* to, const float* e, float w, const uint32_t* h,
              int16_t* codes, uint8_t* scales) {
  move_blocks<16>(blocks, x, to, e, w, h, codes, scales);
}
void e8_load(int64_t blocks, const float* x, const int8_t* codes, const uint8_t* scales, float* e) {
  load_averages<8>(blocks, x, codes, scales, e);
}
void e16_load(int64_t blocks, const float* x, const int16_t* codes, const uint8_t* scales, float* e) {
  load_averages<16>(blocks, x, codes, scales, e);
}

void rounded16(int64_t n, const float* a, const uint32_t* d, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = float_of(rounded_bits<16>(settled(a[i]), d[i]));
}
void rounded24(int64_t n, const float* a, const uint32_t* d, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = float_of(rounded_bits<24>(settled(a[i]), d[i]));
}
void split32(int64_t n, const float* a, uint16_t* high, int16_t* rest) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) high[i] = high_part(settled(a[i])), rest[i] = rest_of_32(settled(a[i]));
}
void split24(int64_t n, const float* a, uint16_t* high, int8_t* rest) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) high[i] = high_part(settled(a[i])), rest[i] = rest_of_24(settled(a[i]));
}
void join32(int64_t n, const uint16_t* high, const int16_t* rest, float* a) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) a[i] = joined(high[i], rest[i]);
}
void join24(int64_t n, const uint16_t* high, const int8_t* rest, float* a) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) a[i] = joined(high[i], rest[i]);
}

// Over all 2^32 patterns.
int64_t wrong_joins() {
  return failures(int64_t{1} << 32, [](uint32_t i) {
    const uint32_t u = settled(float_of(i)), high = high_part(u), low = u & 0xffffu;
    const uint32_t nearest = (u >> 16) + (low >= 0x8000u ? 1u : 0u);
    const uint32_t back = bits_of(joined(high_part(u), rest_of_32(u)));
    const uint32_t expected = (i & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : i;
    return ((back ^ expected) | (back ^ u) | (high ^ nearest)) == 0u;
  });
}
// Of all floats of 24 bits: joined to what they were; and each rounding by the dither d to one of the two around.
int64_t wrong_joins_of_24(int64_t dither) {
  const uint32_t d = static_cast<uint32_t>(dither);
  return failures(int64_t{1} << 32, [d](uint32_t i) {
    const uint32_t u = settled(float_of(i)), r = rounded_bits<24>(u, d);
    const bool exact = (u & 0xffu) == 0u, up = r == (u & ~0xffu) + 0x100u, same = r == (u & ~0xffu);
    return bits_of(joined(high_part(r), rest_of_24(r))) == r && (exact ? r == u : same || up) &&
           up == ((u & 0xffu) + (d & 0xffu) > 0xffu);
  });
}
int64_t unstable_m() { return unstable<MCode>(128, 1024); }
int64_t unstable_v() { return unstable<VCode>(256, 1024); }
int64_t overflowing_m() { return overflowing<MCode>(); }
int64_t overflowing_v() { return overflowing<VCode>(); }
double bias_m() { return bias<MCode>(1 << 16, 256, 0); }
double bias_v() { return bias<VCode>(1 << 16, 2048, 8); }

}  // extern "C"
