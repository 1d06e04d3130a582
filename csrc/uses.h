// The words in which definitions.h, which is written from pace_kernels/definitions, says what a rule's operands and
// options are.
#pragma once

#include <cstdint>

namespace pace {

// In which format an operand may lie: `weight` and `copy` are of the parameter's, `gradient` and `moment` of it or
// float32, `state` is float32.
enum class Role : uint8_t { weight, gradient, moment, copy, state };

// In which codes it may lie instead (codes.h), but for `second` and `gradient` with a list of what lies beside them.
enum class Codec : uint8_t { none, weight, moment, square, second, gradient, average, iterate };

// A list of an operator: what ends the refusal of its length where it may be missing, null where it may not; the list
// beside it, null where there never is one; and which 16 bits of an element's dither are its own (`further` in
// codes.h).
struct ListInfo {
  const char* name;
  Role role;
  bool mutable_;
  const char* empty;
  Codec codec;
  const char* beside;
  int dither;
};

// A tensor of so many float64 numbers.
struct RowInfo {
  const char* name;
  int numbers;
};

// What a step does with an operand.
struct Use {
  bool read, written;
  constexpr bool in_play() const { return read || written; }
};

// What an option may be; checks.h has the sentences.
enum class Range : uint8_t { any, nonnegative, positive, below_one, unit, at_least_one, not_negative };

}  // namespace pace
