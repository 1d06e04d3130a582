// Codes: states in one or two bytes, and weights in a bfloat16 with what it leaves over. All of it is single float32
// and 32-bit integer operations, so that every device and instruction set has the same bits, and torch_rules/codes.py
// too.
//
// A block is 32 consecutive elements, with a byte b for each state: the power of two 2^(b − 127) that its codes are
// measured by. New states are zeros: m = 0, v = 0, e = x.
//
// Rounding is stochastic, since to nearest a small change would be lost at every step (with β2 = 0.999 a step changes v
// by less than half a code, and v would never fall). Its dither comes from what is stored, and from the place within a
// block: no generator, no index in the tensor, so that replicas, shards and resumed runs round alike.
#pragma once

#include <cstdint>

#include "storage.h"

namespace pace {

constexpr int kCodeBlock = 32;

PACE_RULE int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
PACE_RULE int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// ---- dither ---------------------------------------------------------------------------------------------------------

// A permutation of 32 bits in which every input bit changes about half of the output's.
PACE_RULE uint32_t mixed(uint32_t h) {
  h ^= h >> 16;
  h *= 0x21f0aaadu;
  h ^= h >> 15;
  h *= 0x735a2d97u;
  return h ^ h >> 15;
}

constexpr uint32_t kGolden = 0x9e3779b1u;  // 2^32 / golden ratio

// Of the parameter's step t, modulo 2^32. Without it a value that rounds back to itself would stay for ever.
PACE_RULE uint32_t dither_key(uint32_t t) { return mixed(t * kGolden); }

// A float's bits with one NaN for all: which one an operation makes differs between devices, and of 0x7fffffff, CUDA's,
// the roundings below would make −0.
PACE_RULE uint32_t settled(float a) { return a == a ? bits_of(a) : 0x7fc00000u; }

// A second moment with infinity for NaN: neither ever comes back.
PACE_RULE float settled_square(float v) {
  const uint32_t u = bits_of(v);
  return float_of(u < 0x7f800000u ? u : 0x7f800000u);
}

// The 32 bits that one element's roundings in one step are dithered by, of the new weight and second moment before they
// are rounded. m takes bits 0 to 7, v 8 to 18, x the lowest 8 or 16, an e of 24 bits 24 to 31: the leading bits, which
// decide most roundings, are another's for each but m and x. A rule without a second moment has its other moment, or
// the average, in its place, as settled bits.
PACE_RULE uint32_t dither(uint32_t x_settled, float v_settled, uint32_t key) {
  return mixed(x_settled * kGolden ^ bits_of(v_settled) ^ key);
}

// An element has more roundings than PACE's where its rule has more states: h is the first word, this gives the next of
// one. Of each an operand takes 16 bits of its own (`dither` in pace_kernels/definitions/kit.py).
PACE_RULE uint32_t further(uint32_t h) { return mixed(h + kGolden); }

// ---- scales of blocks -----------------------------------------------------------------------------------------------

PACE_RULE float power_of_two(int32_t b) { return float_of(static_cast<uint32_t>(b) << 23); }

// By which the largest finite magnitude of a block is found, as a maximum of signed integers: infinities and NaN come
// out negative, so that one of them is its own coordinate's affair. Maxima start at kRankOfZero.
constexpr int32_t kRankOfZero = 0x800000;
PACE_RULE int32_t rank_of(float a) { return static_cast<int32_t>((bits_of(a) & 0x7fffffffu) + 0x800000u); }

// ---- m and v: mu-law ------------------------------------------------------------------------------------------------

// With o the block's power of two, a code is what |a| + o has above o in a float's own exponent and four leading bits
// of its fraction: 16 codes a binade, and evenly spaced (by o / 16) below o. The addition is the only other rounding.
template <int kBits>
struct MuLaw {
  static constexpr int32_t kLast = (1 << kBits) - 1;
  static constexpr int32_t kBinades = 1 << (kBits - 4);
  static constexpr int kDropped = 19;  // bits of a float below a code
  static constexpr uint32_t kNearest = 1u << (kDropped - 1);

  // So that no finite value gets the last code, but from 2^126 on; and that no code is subnormal. 0x700000 less o: a
  // sum below 0x700000 is two codes below the last, and the dither adds one at most.
  PACE_RULE int32_t scale(int32_t rank) {
    const int32_t largest = rank - kRankOfZero;
    const int32_t full = (largest & 0x7fffff) >= 0x700000 - (1 << (24 - kBinades)) ? 1 : 0;
    return smaller(larger((largest >> 23) + full + 1 - kBinades, 24), 254 - kBinades);
  }
  PACE_RULE int32_t encode(float magnitude, int32_t b, uint32_t d) {
    const uint32_t u = bits_of(magnitude + power_of_two(b)) + d;
    return smaller(static_cast<int32_t>(u >> kDropped) - 16 * b, kLast);
  }
  PACE_RULE float decode(uint32_t code, int32_t b) {
    const uint32_t o = static_cast<uint32_t>(b) << 23;
    return float_of((code << kDropped) + o) - float_of(o);
  }
};

// m: a sign and 7 bits, over 8 binades, down to 2^-12 of the block's largest. What is not finite has the last code: its
// weight is NaN, which is enough.
struct MCode : MuLaw<7> {
  PACE_RULE uint32_t dithered(uint32_t h) { return (h & 0xffu) << 11 | 0x400u; }
  PACE_RULE uint8_t store(float m, int32_t b, uint32_t d) {
    const uint32_t sign = m == m ? bits_of(m) >> 24 & 0x80u : 0u;
    const float magnitude = float_of(bits_of(m) & 0x7fffffffu);
    return static_cast<uint8_t>(static_cast<uint32_t>(encode(magnitude, b, d)) | sign);
  }
  PACE_RULE float load(uint8_t code, int32_t b) {
    const uint32_t c = code;
    return float_of(bits_of(decode(c & 0x7fu, b)) | (c & 0x80u) << 24);
  }
};

// v: 8 bits, over 16 binades, down to 2^-20 of the largest: no less than the square of m's, or else a coordinate whose
// m outlasts its v would run away beside a loud neighbour. Therefore never 0 either. The last code is infinity.
struct VCode : MuLaw<8> {
  PACE_RULE uint32_t dithered(uint32_t h) { return (h >> 8 & 0x7ffu) << 8 | 0x80u; }
  PACE_RULE uint8_t store(float v_settled, int32_t b, uint32_t d) {
    return static_cast<uint8_t>(larger(encode(v_settled, b, d), 1));
  }
  PACE_RULE float load(uint8_t code, int32_t b) {
    const uint32_t c = code;
    return c == 0xffu ? float_of(0x7f800000u) : decode(c, b);
  }
};

// ---- e: on a grid of its own, beside x ------------------------------------------------------------------------------

constexpr float kRounder = 12582912.0f;  // 1.5 · 2^23: a number of less than 2^22 plus this has no place below 1

PACE_RULE float nearest_whole(float a) { return (a + kRounder) - kRounder; }

PACE_RULE float floor_of(float a) {
  const float r = nearest_whole(a);
  return r - (r > a ? 1.0f : 0.0f);
}

// In [0, 1): what is below 1 is never rounded up.
PACE_RULE float unit_of(uint32_t h) { return float_of(0x3f800000u | h >> 9) - 1.0f; }

// Of the n-th move of an average and an element's place in its block, 0 to 31: what `store` dithers averages by. Moves
// of an average are much alike from step to step, so dithers that are spread evenly in time err far less than random
// ones. They come in pairs. One by one they take each step of a code where the average lags most, so that it runs ahead
// by up to 0.2 δ; the second of a pair takes its step where it lags least. Distance to float64's average in that of the
// weights, weights with noise and with a drift, w = 1e-3: 8 bits 0.059 and 0.027 (by `dither` 0.105 and 0.118), 16 bits
// 0.0007 and 0.0004 (0.0010 and 0.0007); ahead by 0.001 and 0.002 (one by one 0.001 and 0.007). On v, dithers
// that are even leave a fall short by a tenth.
PACE_RULE uint32_t evenly(uint32_t n, uint32_t place) { return (n >> 1) * kGolden + place * 0x6487ed51u; }

// With δ the block's power of two, e = grid(x) + code · δ, where grid(x) is the multiple of δ next to x. So e lies on
// the grid whatever x does: when x crosses to the next multiple the code changes by 1, exactly. e is rounded only where
// it moves, and by no more than it moves: an average that is stored as its difference from x is rounded at every step.
//
// Schedule-free's z lies so beside y, and moves by its own −α u, dithered by bits of its hash. Mean ways of z and of
// the average were right to 0.5 % at lr 1e-3 to 1e-7 with 8 and 16 bits. With 8 bits a coordinate that walks at random
// in a block whose others went straight for 2,000 steps was as far off as it had walked (the average: 27 α), with 16
// bits by 0.01 of that.
template <int kBits>
struct GridCode {
  static constexpr int32_t kMost = (1 << (kBits - 1)) - 1;
  // 124 and 32,765 of 127 and 32,767 steps: x's distance to its grid, a half, and the dither, 1, fit beside.
  static constexpr int32_t kFull = kBits == 8 ? 0x780000 : 0x7ffa00;

  // Where an average lies, e = grid + offset, and by how much it is to move.
  struct Place {
    float grid, offset, increment;
  };

  // Of the largest |e₊ − x₊|.
  PACE_RULE int32_t scale(int32_t rank) {
    const int32_t largest = rank - kRankOfZero;
    return larger((largest >> 23) + ((largest & 0x7fffff) >= kFull ? 1 : 0) - (kBits - 2), 1);
  }
  PACE_RULE float grid(float x, int32_t b) {
    const float a = x * power_of_two(254 - b);
    const float g = nearest_whole(a) * power_of_two(b);
    return __builtin_fabsf(a) < 0x1p22f ? g : x;  // beyond, a float's own places are the grid
  }
  PACE_RULE Place load(int32_t code, float x, int32_t b) {
    b = larger(b, 1);  // 0 is a new state's
    return {grid(x, b), static_cast<float>(code) * power_of_two(b), 0.0f};
  }
  // e₊ = e + w (x₊ − e), x₊ the weight as it will be read back; x₊ itself where w is 1 (`averaged` in arith.h).
  PACE_RULE Place moved(Place p, float x, float w) {
    const bool copy = w == 1.0f;
    return {copy ? x : p.grid, copy ? 0.0f : p.offset, copy ? 0.0f : w * (x - (p.grid + p.offset))};
  }
  // e₊ − x₊, not rounded to the size of e.
  PACE_RULE float difference(Place p, float x) { return ((p.grid - x) + p.offset) + p.increment; }
  // u: unit_of(evenly(...)), of an iterate unit_of its bits, or 0.5 for the nearest. The place is on the new grid
  // exactly, as a whole number of steps and a rest; the increment and u are added to the rest alone, which is so small
  // that they keep their places.
  PACE_RULE int32_t store(Place p, float x, int32_t b, float u) {
    const float inverse = power_of_two(254 - b);
    const float a = (p.offset + (p.grid - grid(x, b))) * inverse, whole = nearest_whole(a);
    const float t = whole + floor_of(((a - whole) + p.increment * inverse) + u);
    constexpr float kTop = static_cast<float>(kMost);
    return static_cast<int32_t>(t < -kTop ? -kTop : (t < kTop ? t : kTop));  // NaN: the last; x is NaN then
  }
};

// ---- x, and e on its own: bfloat16 and a rest -----------------------------------------------------------------------

// The bits of a settled float are cut to the places that the format has, by stochastic rounding: 32 keeps all.
template <int kBits>
PACE_RULE uint32_t rounded_bits(uint32_t u, uint32_t d) {
  static_assert(kBits == 16 || kBits == 24 || kBits == 32, "bits of a weight");
  constexpr uint32_t kBelow = kBits == 32 ? 0u : (1u << (32 - kBits)) - 1u;
  return (u + (d & kBelow)) & ~kBelow;
}

// As bfloat16, the nearest, ties away from zero, which is what the model computes with, and the bits from there to the
// float, which may be negative. From 2^128 (1 − 2^-9) on the bfloat16 is infinity, and the sum of both right.
PACE_RULE uint16_t high_part(uint32_t u) { return static_cast<uint16_t>((u + 0x8000u) >> 16); }
PACE_RULE int16_t rest_of_32(uint32_t u) {
  return static_cast<int16_t>(u - (static_cast<uint32_t>(high_part(u)) << 16));
}
PACE_RULE int8_t rest_of_24(uint32_t u) { return static_cast<int8_t>(rest_of_32(u) >> 8); }
// Also where others wrote the bfloat16 since: then the float is half a place off it at most. Of 0 no rest is negative:
// one that is left from another weight would make NaN of it.
PACE_RULE float joined(uint16_t high, int16_t rest) {
  const uint32_t u = static_cast<uint32_t>(high) << 16;
  const int32_t r = rest, of_zero = larger(r, 0);
  return float_of(u + static_cast<uint32_t>((u << 1) == 0u ? of_zero : r));
}
PACE_RULE float joined(uint16_t high, int8_t rest) { return joined(high, static_cast<int16_t>(rest * 256)); }

}  // namespace pace
