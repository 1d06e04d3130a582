// Storage: how an element lies in memory. A format loads to float and stores from float; rules never see it.
// bfloat16 and float16 are converted with integer arithmetic alone, so that every compiler vectorizes the loops around
// it on every instruction set; rounding is to nearest, ties to even, as in torch.
#pragma once

#include <cstdint>

#include "rules/arith.h"

namespace pace {

// Those after kFloat16 are the formats of codes.h. Alone: kDithered16, bfloat16 by stochastic rounding. With a rest
// beside it: kPair32 and kPair24, bfloat16 and int16 or int8. With scales beside it: kMoment8 and kSquare8, kGrid8 and
// kGrid16, codes in blocks.
enum class Format : uint8_t {
  kFloat32,
  kBFloat16,
  kFloat16,
  kDithered16,
  kPair24,
  kPair32,
  kMoment8,
  kSquare8,
  kGrid8,
  kGrid16
};

PACE_RULE constexpr bool is_coded(Format format) { return format > Format::kFloat16; }
PACE_RULE constexpr bool is_grid(Format format) { return format == Format::kGrid8 || format == Format::kGrid16; }
// How its elements are computed with: the dtype of a weight, and of its gradient.
PACE_RULE constexpr Format plain_of(Format format) {
  return format >= Format::kDithered16 && format <= Format::kPair32 ? Format::kBFloat16 : format;
}
// An element's, without what lies beside it; and of a pair's rest.
PACE_RULE constexpr int bytes_of(Format format) {
  const bool one = format == Format::kMoment8 || format == Format::kSquare8 || format == Format::kGrid8;
  return format == Format::kFloat32 ? 4 : one ? 1 : 2;
}
PACE_RULE constexpr int bytes_of_rest(Format format) { return format == Format::kPair32 ? 2 : 1; }
PACE_RULE constexpr bool in_blocks(Format format) { return format >= Format::kMoment8; }

#if defined(__CUDA_ARCH__)
PACE_RULE uint32_t bits_of(float a) { return __float_as_uint(a); }
PACE_RULE float float_of(uint32_t bits) { return __uint_as_float(bits); }
#else
PACE_RULE uint32_t bits_of(float a) { return __builtin_bit_cast(uint32_t, a); }
PACE_RULE float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }
#endif

struct Float32 {
  using Element = float;
  PACE_RULE float load(float a) { return a; }
  PACE_RULE float store(float a) { return a; }
};

struct BFloat16 {
  using Element = uint16_t;
  PACE_RULE float load(uint16_t a) { return float_of(static_cast<uint32_t>(a) << 16); }
  PACE_RULE uint16_t store(float a) {
    const uint32_t u = bits_of(a);
    const uint32_t rounded = u + 0x7fffu + ((u >> 16) & 1u);  // half an ulp, or a bit less where the last bit is even
    return static_cast<uint16_t>(a == a ? rounded >> 16 : 0x7fc0u);
  }
};

struct Float16 {
  using Element = uint16_t;
  PACE_RULE float load(uint16_t a) {
    const uint32_t sign = static_cast<uint32_t>(a & 0x8000u) << 16, magnitude = a & 0x7fffu;
    // Normal: exponent and fraction move into place, the biases, 127 and 15, differ by 112. Subnormal: the fraction is
    // put below 0.5, whose last place is 2^-24 too. No float32 subnormal occurs, which a flushing processor would lose.
    const float value =
        magnitude < 0x400u ? float_of(magnitude + 0x3f000000u) - 0.5f : float_of((magnitude << 13) + 0x38000000u);
    const uint32_t special = 0x7f800000u | (magnitude << 13);  // infinity and NaN keep their fraction
    return float_of(sign | (magnitude >= 0x7c00u ? special : bits_of(value)));
  }
  PACE_RULE uint16_t store(float a) {
    const uint32_t sign = bits_of(a) & 0x80000000u, u = bits_of(a) & 0x7fffffffu;
    // Normal: rebias by 112, then round away 13 bits as above. Subnormal (below 2^-14): adding 0.5 puts the last kept
    // place, 2^-24, at float's last place, so that the addition itself rounds. From 65520 on: infinity.
    const uint32_t normal = (u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13;
    const uint32_t subnormal = bits_of(float_of(u) + 0.5f) - 0x3f000000u;
    const uint32_t large = u > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t magnitude = u >= 0x477ff000u ? large : (u < 0x38800000u ? subnormal : normal);
    return static_cast<uint16_t>((sign >> 16) | magnitude);
  }
};

}  // namespace pace
